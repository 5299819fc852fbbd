//! The worker protocol from a worker's side: one statement per function of
//! `migrations/0004_worker_protocol.sql`.
//!
//! Rust workers use exactly what a worker in any other language uses. Nothing
//! here looks at a table.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use sqlx::types::Json;
use sqlx::{PgConnection, PgExecutor};
use tasker_shared::store::Error;
use uuid::Uuid;

/// Who works, and what it offers.
#[derive(Debug, Clone)]
pub struct Hello<'a> {
    /// Unique among all workers.
    pub worker: &'a str,
    /// The one namespace it works for.
    pub namespace: &'a str,
    /// Whole queue names, such as `worker_fulfillment__slow`.
    pub queues: &'a [String],
    /// Names of the handlers it has.
    pub handlers: &'a [String],
    /// Attempts that it runs at once.
    pub slots: i32,
    /// The advisory lock that its session holds, if it has a session of its own.
    pub lock_key: Option<i64>,
    /// Of the program; a span attribute later.
    pub version: &'a str,
}

/// A lease on one attempt of a step: what `claim_steps` returns, explained in docs/reference/worker-protocol.md.
#[derive(Debug, Clone)]
pub struct Claim {
    pub task: Uuid,
    pub step: Uuid,
    pub step_name: String,
    #[expect(dead_code, reason = "a column of the answer")]
    pub generation: i32,
    pub attempt: i32,
    pub token: Uuid,
    pub handler: String,
    pub input: Option<Value>,
    pub correlation_id: String,
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
    pub baggage: Option<String>,
    pub claimed_at: DateTime<Utc>,
    /// `claimed_at` plus the step's run timeout, if it has one.
    pub deadline: Option<DateTime<Utc>>,
    pub lease_ms: i64,
    pub max_attempts: i32,
}

/// A claim to renew.
#[derive(Debug, Clone, Serialize)]
pub struct Beat {
    /// The step.
    pub step: Uuid,
    /// The claim's token.
    pub token: Uuid,
    /// What the handler last said of its progress; kept up to 4 KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Value>,
}

/// The outcome of renewing one claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewal {
    /// The lease is renewed.
    pub still_yours: bool,
    /// It is not, because somebody cancelled the task: give the handler time to stop.
    pub cancel_requested: bool,
}

/// The result of one attempt.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The step.
    pub step: Uuid,
    /// The claim's token.
    pub token: Uuid,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// From the claim's arrival to the handler's start, in milliseconds.
    pub start_offset_ms: f64,
    /// The handler's duration in milliseconds.
    pub run_ms: f64,
    /// What it used: numbers by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Value>,
    /// Milestones: `[{name, at_ms, attributes}]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub milestones: Option<Value>,
}

/// How an attempt ended.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// With an output.
    Success {
        /// JSON text.
        output: Box<RawValue>,
    },
    /// With an error.
    Error {
        /// What went wrong.
        error: ReportedError,
    },
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReportedError {
    /// A short name that `non_retryable_errors` of a template can list.
    #[serde(rename = "type")]
    pub kind: String,
    /// For a person.
    pub message: String,
    /// Whether another attempt may succeed.
    pub retryable: bool,
    /// Instead of the template's delay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

/// Says that the worker lives: at start, on change and every 10 s.
pub async fn worker_hello(conn: &mut PgConnection, hello: &Hello<'_>) -> Result<(), Error> {
    sqlx::query!(
        r#"select tasker.worker_hello($1, $2, $3, $4, $5, $6, $7)::text as "nothing""#,
        hello.worker,
        hello.namespace,
        hello.queues,
        hello.handlers,
        hello.slots,
        hello.lock_key,
        hello.version
    )
    .fetch_one(conn)
    .await?;
    Ok(())
}

/// Says that the worker takes nothing new.
pub async fn worker_bye(conn: &mut PgConnection, worker: &str) -> Result<(), Error> {
    sqlx::query!(r#"select tasker.worker_bye($1)::text as "nothing""#, worker).fetch_one(conn).await?;
    Ok(())
}

/// Takes the session's advisory lock that says "this worker lives"; false if
/// another session still holds it. Taken again in the same session it counts twice.
pub async fn take_lock(session: impl PgExecutor<'_>, lock_key: i64) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(r#"select pg_try_advisory_lock($1) as "taken!""#, lock_key).fetch_one(session).await?)
}

/// Leases up to `max` steps of the namespace's queue to the worker. May run on a connection that commits asynchronously.
pub async fn claim_steps(
    conn: &mut PgConnection,
    namespace: &str,
    queue: Option<&str>,
    worker: &str,
    handlers: &[String],
    max: i32,
) -> Result<Vec<Claim>, Error> {
    Ok(sqlx::query_as!(
        Claim,
        r#"select task as "task!", step as "step!", step_name as "step_name!", generation as "generation!",
             attempt as "attempt!", token as "token!", handler as "handler!", input,
             correlation_id as "correlation_id!", traceparent, tracestate, baggage,
             claimed_at as "claimed_at!", deadline, lease_ms as "lease_ms!", max_attempts as "max_attempts!"
           from tasker.claim_steps($1, $2, $3, $4, $5)"#,
        namespace,
        queue,
        worker,
        handlers,
        max
    )
    .fetch_all(conn)
    .await?)
}

/// Renews leases; the answers are in the order of the claims. May run on a connection that
/// commits asynchronously.
pub async fn heartbeat(conn: &mut PgConnection, claims: &[Beat]) -> Result<Vec<Renewal>, Error> {
    let rows = sqlx::query_as!(
        Renewal,
        r#"select still_yours as "still_yours!", cancel_requested as "cancel_requested!"
           from tasker.heartbeat($1)"#,
        Json(claims) as _
    )
    .fetch_all(conn)
    .await?;
    one_each("heartbeat", claims.len(), rows)
}

/// Reports results; true where one was accepted (also when it had been before), false where
/// the claim is no longer the current one. The answers are in the order of the reports.
///
/// Never on a connection that commits asynchronously: a worker forgets what was accepted.
pub async fn report_results(conn: &mut PgConnection, reports: &[&Report]) -> Result<Vec<bool>, Error> {
    let rows =
        sqlx::query_scalar!(r#"select accepted as "accepted!" from tasker.report_results($1)"#, Json(reports) as _)
            .fetch_all(conn)
            .await?;
    one_each("report_results", reports.len(), rows)
}

/// The output of a completed step of the task; `None` if no such step has completed.
pub async fn step_output(conn: &mut PgConnection, task: Uuid, step_name: &str) -> Result<Option<Value>, Error> {
    Ok(sqlx::query_scalar!("select tasker.step_output($1, $2)", task, step_name).fetch_one(conn).await?)
}

fn one_each<T>(function: &'static str, asked: usize, answers: Vec<T>) -> Result<Vec<T>, Error> {
    if answers.len() == asked {
        return Ok(answers);
    }
    Err(Error::bad_row(function, "*", asked, format!("{} answers to {asked} items", answers.len())))
}

/// Whether the database objects to what was sent, so that sending it again is no use: data
/// exceptions (such as JSON that `jsonb` cannot hold) and exceeded limits.
pub(crate) fn is_of_the_content(error: &Error) -> bool {
    match error {
        Error::Database(sqlx::Error::Database(error)) => {
            error.code().is_some_and(|code| code.starts_with("22") || code.starts_with("54"))
        }
        Error::Database(sqlx::Error::Encode(_)) => true,
        _ => false,
    }
}
