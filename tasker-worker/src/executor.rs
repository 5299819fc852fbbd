//! Runs one attempt: the user's code in the attempt's trace context, its
//! timeout, its cancellation, its panics. It never talks to the database; what
//! it learns goes to `report`.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use opentelemetry::context::FutureExt as _;
use serde_json::Value;
use sqlx::PgPool;
use tasker_shared::redact;
use tasker_shared::trace::context::{Incoming, to_otel_context};
use tokio::sync::OwnedSemaphorePermit;

use crate::context::{Capture, StepContext};
use crate::error::StepError;
use crate::handler::{Handler, Output};
use crate::held::{Held, Stop};
use crate::measure::Numbers;
use crate::protocol::{Claim, Outcome, Report, ReportedError};
use crate::recorder::{MAX_CAPTURE_BYTES, Recorder};
use crate::registry::Registry;
use crate::report::Results;

/// Longest type and message of an error; the database cuts there as well.
const MAX_KIND_BYTES: usize = 100;
const MAX_MESSAGE_BYTES: usize = 1024;

/// Beyond any sensible delay, and within every clock.
const LONGEST_DELAY: Duration = Duration::from_hours(366 * 24);

/// What all attempts of a worker share.
pub(crate) struct Executor {
    pub(crate) registry: Registry,
    pub(crate) namespace: Arc<str>,
    pub(crate) held: Arc<Held>,
    pub(crate) results: Arc<Results>,
    /// For `parent_output`.
    pub(crate) pool: PgPool,
    pub(crate) cancel_grace: Duration,
    pub(crate) numbers: Numbers,
    pub(crate) capture: Capture,
}

/// Gives the claim up if the attempt ends without a report, whatever the
/// reason: heartbeats for it would keep a dead attempt alive.
struct Unreported<'h> {
    held: &'h Held,
    claim: Option<uuid::Uuid>,
}

impl Drop for Unreported<'_> {
    fn drop(&mut self) {
        self.held.remove(&self.claim);
    }
}

impl Executor {
    /// Runs the claim's handler and hands its result over. `slot` is free from then on.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut claim: Claim,
        stop: Stop,
        received: Instant,
        slot: OwnedSemaphorePermit,
    ) {
        let _busy = self.numbers.busy();
        let mut unreported = Unreported { held: &self.held, claim: Some(claim.token) };
        let (step_uuid, token) = (claim.step, claim.token);
        let input = claim.input.take().unwrap_or(Value::Null);
        let incoming =
            Incoming::parse(claim.traceparent.as_deref(), claim.tracestate.as_deref(), claim.baggage.as_deref());
        let timeout = claim.deadline.and_then(|deadline| (deadline - claim.claimed_at).to_std().ok());

        let started = Instant::now();
        let deadline = timeout.and_then(|timeout| started.checked_add(timeout));
        let name = claim.handler.clone();
        let handler = self.registry.get(&name);
        let ctx = StepContext::new(
            claim,
            Arc::clone(&self.namespace),
            deadline,
            stop.clone(),
            Arc::clone(&self.held),
            self.pool.clone(),
            Recorder::new(received),
            self.capture,
        );
        if self.capture.input {
            ctx.recorder().event("handler.input", [("payload", input.clone())], MAX_CAPTURE_BYTES);
        }
        let context = ctx.clone();
        let running = execute(handler, ctx, input, &stop, timeout, self.cancel_grace);
        let output = match &incoming.traceparent {
            Some(parent) => {
                let cx = to_otel_context(parent, incoming.tracestate.as_deref(), &incoming.baggage);
                running.with_context(cx).await
            }
            None => running.await,
        };
        let took = started.elapsed();
        let outcome = output.map(outcome);
        self.numbers.ran(&name, outcome.as_ref(), took, incoming.traceparent.as_ref());
        if let Some(outcome) = outcome {
            if self.capture.output
                && let Outcome::Success { output } = &outcome
            {
                let payload = serde_json::from_str(output.get()).unwrap_or(Value::Null);
                context.recorder().event("handler.output", [("payload", payload)], MAX_CAPTURE_BYTES);
            }
            let (milestones, usage) = context.recorder().take();
            unreported.claim = None;
            self.results.push(Report {
                step: step_uuid,
                token,
                outcome,
                start_offset_ms: milliseconds(started - received),
                run_ms: milliseconds(took),
                usage,
                milestones,
            });
        }
        drop(slot);
    }
}

/// The result to report, or `None` if nobody wants it any more.
#[tracing::instrument(
    name = "handler",
    skip_all,
    fields(
        correlation_id = ctx.correlation_id(),
        task_uuid = %ctx.task_uuid(),
        step_uuid = %ctx.step_uuid(),
        step_name = ctx.step_name(),
        attempt = ctx.attempt(),
        namespace = ctx.namespace(),
    )
)]
async fn execute(
    handler: Option<&dyn Handler>,
    ctx: StepContext,
    input: Value,
    stop: &Stop,
    timeout: Option<Duration>,
    cancel_grace: Duration,
) -> Option<Output> {
    let Some(handler) = handler else {
        return Some(Err(StepError::fail("unknown_handler", "this worker has no handler of that name")));
    };
    let mut running = pin!(AssertUnwindSafe(async move { handler.call(ctx, input).await }).catch_unwind());
    let timer = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    // Biased, so that a handler that needs no waiting never touches the timer.
    let output = tokio::select! {
        biased;
        done = &mut running => done.unwrap_or_else(|panic| Err(StepError::retry("panic", panic_message(&*panic)))),
        () = stop.gone.cancelled() => {
            if stop.cancel.is_cancelled() && tokio::time::timeout(cancel_grace, running).await.is_err() {
                tracing::warn!("the handler did not stop within the grace after its cancellation and was dropped");
            }
            return None;
        }
        () = timer => {
            let limit = timeout.unwrap_or_default();
            Err(StepError::retry("timeout", format!("the handler ran longer than its run timeout of {limit:?}")))
        }
    };
    // It may have stopped because it was told to.
    if stop.gone.is_cancelled() {
        return None;
    }
    if let Err(error) = &output {
        tracing::info!(?error, "the attempt failed");
    }
    Some(output)
}

fn outcome(output: Output) -> Outcome {
    let (kind, message, retryable, after) = match output {
        Ok(output) => return Outcome::Success { output },
        Err(StepError::Retry { kind, message, after }) => (kind, message, true, after),
        Err(StepError::Fail { kind, message }) => (kind, message, false, None),
        Err(StepError::Cancel) => {
            ("cancelled".into(), "the handler stopped as if cancelled, but nobody had asked it to".into(), false, None)
        }
    };
    Outcome::Error {
        error: ReportedError {
            kind: clip(&kind, MAX_KIND_BYTES),
            message: clip(&message, MAX_MESSAGE_BYTES),
            retryable,
            retry_after_ms: after.map(|after| u64::try_from(after.min(LONGEST_DELAY).as_millis()).unwrap_or(0)),
        },
    }
}

/// At most `limit` bytes, no secrets, and nothing that the database cannot store.
fn clip(text: &str, limit: usize) -> String {
    let mut text = redact::clipped(text, limit);
    if text.contains('\0') {
        text = text.replace('\0', "\u{fffd}");
        text.truncate(text.floor_char_boundary(limit));
    }
    text
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "the handler panicked with something that is no text".into())
}

/// To the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
