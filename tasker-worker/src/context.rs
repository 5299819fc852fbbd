//! What a handler may know and do beyond its input.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::Value;
use sqlx::PgPool;
use tasker_shared::trace::context::inject_current;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::error::StepError;
use crate::held::{Held, Stop};
use crate::protocol::{self, Claim};
use crate::recorder::{Recorder, SHORT};

/// The attempt that a handler runs for. Cheap to clone.
#[derive(Clone)]
pub struct StepContext(Arc<Inner>);

struct Inner {
    claim: Claim,
    namespace: Arc<str>,
    deadline: Option<Instant>,
    stop: Stop,
    held: Arc<Held>,
    pool: PgPool,
    recorder: Recorder,
    capture: Capture,
}

/// Whether payloads are kept with attempts, for people to look at: redacted, and cut at 4 KiB.
/// Nothing is unless it is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capture {
    /// Inputs of handlers, and what was said to models.
    pub input: bool,
    /// Outputs of handlers, and what models answered.
    pub output: bool,
}

/// Something that a step made and that lives elsewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Artifact {
    /// For people.
    pub name: String,
    /// Where it is; a password in it is not kept.
    pub uri: String,
    /// In bytes.
    pub size: Option<u64>,
    /// Such as `sha256:9f86d0…`.
    pub digest: Option<String>,
}

impl StepContext {
    #[expect(clippy::too_many_arguments, reason = "the parts of an attempt, each by its name")]
    pub(crate) fn new(
        claim: Claim,
        namespace: Arc<str>,
        deadline: Option<Instant>,
        stop: Stop,
        held: Arc<Held>,
        pool: PgPool,
        recorder: Recorder,
        capture: Capture,
    ) -> Self {
        Self(Arc::new(Inner { claim, namespace, deadline, stop, held, pool, recorder, capture }))
    }

    /// The task.
    pub fn task_uuid(&self) -> Uuid {
        self.0.claim.task
    }

    /// The step.
    pub fn step_uuid(&self) -> Uuid {
        self.0.claim.step
    }

    /// The step's name in its template.
    pub fn step_name(&self) -> &str {
        &self.0.claim.step_name
    }

    /// The value that people search by.
    pub fn correlation_id(&self) -> &str {
        &self.0.claim.correlation_id
    }

    /// The namespace of the task.
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// The number of this attempt; it begins at 1 and never restarts.
    pub fn attempt(&self) -> u32 {
        u32::try_from(self.0.claim.attempt).unwrap_or(0)
    }

    /// Attempts that the template allows, the first included. An attempt lost
    /// with its worker does not count, so [`attempt`](Self::attempt) can be more.
    pub fn max_attempts(&self) -> u32 {
        u32::try_from(self.0.claim.max_attempts).unwrap_or(0)
    }

    /// When the handler is dropped and the attempt reported as `timeout`;
    /// `None` if the step has no run timeout.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// Fires when the task was cancelled. The handler has `cancel_grace` (10 s
    /// unless configured) to tidy up, then it is dropped.
    pub fn cancellation_token(&self) -> &CancellationToken {
        &self.0.stop.cancel
    }

    /// Notes how far the handler is, for people who watch. It travels with the
    /// next heartbeat, which the worker sends by itself; the last value counts.
    /// Values of more than 4 KiB, or deeper than 64 levels, are not kept, and a line
    /// of the log says so; U+0000 becomes U+FFFD.
    pub fn heartbeat(&self, progress: Value) {
        if let Err(why) = self.0.held.note_progress(self.0.claim.token, progress) {
            tracing::warn!(step_uuid = %self.0.claim.step, "the progress is not kept: it {why}");
        }
    }

    /// The same for every attempt of this step: what an outside system needs
    /// to recognize a repetition.
    pub fn idempotency_key(&self) -> String {
        self.0.claim.step.to_string()
    }

    /// The output of an earlier step of the same task.
    ///
    /// ```no_run
    /// # async fn example(ctx: tasker_worker::StepContext) -> Result<(), tasker_worker::StepError> {
    /// let basket: Vec<String> = ctx.parent_output("load_basket").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// They are ready to be returned with `?`: retryable if the database was
    /// not reached, permanent if no step of that name has completed
    /// (`no_parent_output`) or its output does not fit `T` (`invalid_parent_output`).
    pub async fn parent_output<T: DeserializeOwned>(&self, name: &str) -> Result<T, StepError> {
        let output = self.read_output(name).await.map_err(|error| StepError::retry("database", error.to_string()))?;
        let output = output.ok_or_else(|| {
            StepError::fail(
                "no_parent_output",
                format!("no step {name:?} of this task has completed; name one that this step depends on"),
            )
        })?;
        serde_path_to_error::deserialize(output).map_err(|error| {
            StepError::fail(
                "invalid_parent_output",
                format!("the output of step {name:?} does not fit at {}", error.path()),
            )
        })
    }

    async fn read_output(&self, name: &str) -> Result<Option<Value>, tasker_shared::store::Error> {
        // The pool does not try its connections first; after the server restarted, each is dead once.
        let mut dead = 0;
        loop {
            let mut conn = self.0.pool.acquire().await?;
            match protocol::step_output(&mut conn, self.0.claim.task, name).await {
                Err(error) if error.is_transient() && dead < self.0.pool.options().get_max_connections() => {
                    dead += 1;
                    conn.close_on_drop();
                }
                answer => return answer,
            }
        }
    }

    /// Notes that the handler has come so far, and what there is to say about it. It is kept with the
    /// attempt and becomes an event of its `handler.execution`: redacted, texts cut at 1 KiB, up to
    /// 128 events of 32 KiB together; what does not fit is counted. An attempt that is lost with its
    /// worker loses them.
    ///
    /// ```no_run
    /// # fn example(ctx: &tasker_worker::StepContext) {
    /// ctx.milestone("basket_loaded", [("items", 3.into()), ("shop", "berlin".into())]);
    /// # }
    /// ```
    pub fn milestone<K: AsRef<str>>(&self, name: &str, attributes: impl IntoIterator<Item = (K, Value)>) {
        self.0.recorder.event(name, attributes, SHORT);
    }

    /// Notes how long a part of the work took, as a milestone of that name.
    pub fn timing(&self, name: &str, took: Duration) {
        let milliseconds = (took.as_secs_f64() * 1e6).round() / 1e3;
        self.0.recorder.event(name, [("duration_ms", milliseconds.into())], SHORT);
    }

    /// Notes something that the handler made and that lives elsewhere, as a milestone `artifact`.
    ///
    /// ```no_run
    /// # use tasker_worker::Artifact;
    /// # fn example(ctx: &tasker_worker::StepContext) {
    /// ctx.artifact(Artifact { name: "invoice".into(), uri: "s3://shop/4711.pdf".into(), size: Some(48_211), digest: None });
    /// # }
    /// ```
    pub fn artifact(&self, artifact: Artifact) {
        let Artifact { name, uri, size, digest } = artifact;
        let attributes = [
            ("artifact.name", name.into()),
            ("artifact.uri", uri.into()),
            ("artifact.size", size.map_or(Value::Null, Value::from)),
            ("artifact.digest", digest.map_or(Value::Null, Value::from)),
        ];
        self.0.recorder.event("artifact", attributes, SHORT);
    }

    /// Adds to a number that says what the attempt used, such as `gen_ai.usage.input_tokens` or
    /// `pages`. The numbers of all attempts add up to those of the step and of the task.
    pub fn add_usage(&self, name: &str, amount: f64) {
        self.0.recorder.add_usage(name, amount);
    }

    /// What is kept of payloads here.
    pub fn capture(&self) -> Capture {
        self.0.capture
    }

    /// The name of the handler that runs.
    pub fn handler_name(&self) -> &str {
        &self.0.claim.handler
    }

    pub(crate) fn shared_namespace(&self) -> Arc<str> {
        Arc::clone(&self.0.namespace)
    }

    pub(crate) fn recorder(&self) -> &Recorder {
        &self.0.recorder
    }

    /// The W3C `traceparent` of this attempt, if its task has a valid one.
    /// Spans that the handler starts are below it without further ado.
    pub fn traceparent(&self) -> Option<&str> {
        self.0.claim.traceparent.as_deref()
    }

    /// Writes `traceparent`, `tracestate` and `baggage` of the span that is
    /// current here: an outgoing request or message with these joins the trace.
    pub fn inject<S: std::hash::BuildHasher>(&self, headers: &mut HashMap<String, String, S>) {
        inject_current(headers);
    }
}

impl std::fmt::Debug for StepContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the input, which may hold secrets.
        f.debug_struct("StepContext")
            .field("task_uuid", &self.0.claim.task)
            .field("step_name", &self.0.claim.step_name)
            .field("attempt", &self.0.claim.attempt)
            .finish_non_exhaustive()
    }
}
