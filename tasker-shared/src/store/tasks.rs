//! Task rows: lock them, read them, ask for new ones.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use super::Error;
use crate::state_machine::plan::Task;
use crate::trace::span::{SpanId, TraceId};

/// What its trace and its messages say of a locked task.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "columns of tasker.tasks, explained there")]
pub struct TaskRow {
    pub namespace: String,
    pub template_id: i32,
    pub correlation_id: String,
    pub parent_correlation_id: Option<String>,
    pub parent_task_uuid: Option<Uuid>,
    pub trace_id: TraceId,
    pub root_span_id: SpanId,
    pub remote_span_id: Option<SpanId>,
    pub root_link: Option<String>,
    pub trace_flags: u8,
    /// It is awaited by a task whose trace was not sampled and may be kept for its end.
    pub may_be_kept: bool,
    pub tracestate: Option<String>,
    /// The caller's, not yet filtered.
    pub baggage: Option<String>,
    pub created_at: DateTime<Utc>,
    /// The database's time when it was locked.
    pub read_at: DateTime<Utc>,
}

/// Locks those of the tasks that nobody else holds, in id order, and reads them. The ones
/// that are locked elsewhere are simply not in the answer.
pub async fn lock(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<(Task, TaskRow)>, Error> {
    let rows = sqlx::query!(
        r#"select task_uuid, namespace, template_id, state, version, generation, correlation_id, parent_correlation_id,
             parent_task_uuid, priority, input, open_steps, in_flight_steps, retrying_steps, held_steps, failed_steps,
             error_type, reason, ended_by, suspended_from, run_at, trace_id, root_span_id, remote_span_id, root_link, trace_flags, tracestate, baggage,
             created_at, generation_began_at, last_at, clock_timestamp() as "now!"
           from tasker.tasks where task_uuid = any($1) order by task_uuid for no key update skip locked"#,
        task_uuids
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            let id = row.task_uuid;
            let bad = |column, problem: String| Error::bad_row("tasks", column, id, problem);
            let task = Task {
                uuid: row.task_uuid,
                state: row.state.parse().map_err(|e| Error::bad_row("tasks", "state", id, e))?,
                version: row.version,
                generation: row.generation,
                priority: row.priority,
                input: row.input,
                open_steps: row.open_steps,
                in_flight_steps: row.in_flight_steps,
                retrying_steps: row.retrying_steps,
                held_steps: row.held_steps,
                failed_steps: row.failed_steps,
                error_type: row.error_type,
                reason: row.reason,
                ended_by: match row.ended_by.as_deref() {
                    Some("cancel") => Some("cancel"),
                    Some(_) => Some("terminate"),
                    None => None,
                },
                suspended_from: row
                    .suspended_from
                    .map(|word| word.parse())
                    .transpose()
                    .map_err(|e| Error::bad_row("tasks", "suspended_from", id, e))?,
                run_at: row.run_at,
                generation_began_at: row.generation_began_at,
                last_at: row.last_at,
            };
            let row = TaskRow {
                namespace: row.namespace,
                template_id: row.template_id,
                correlation_id: row.correlation_id,
                parent_correlation_id: row.parent_correlation_id,
                parent_task_uuid: row.parent_task_uuid,
                trace_id: bytes(&row.trace_id).ok_or_else(|| bad("trace_id", "needs 16 bytes".into()))?,
                root_span_id: bytes(&row.root_span_id).ok_or_else(|| bad("root_span_id", "needs 8 bytes".into()))?,
                remote_span_id: row.remote_span_id.as_deref().and_then(bytes),
                root_link: row.root_link,
                trace_flags: w3c_flags(row.trace_flags),
                may_be_kept: row.trace_flags & MAY_BE_KEPT != 0,
                tracestate: row.tracestate,
                baggage: row.baggage,
                created_at: row.created_at,
                read_at: row.now,
            };
            Ok((task, row))
        })
        .collect()
}

/// Of `trace_flags`, ours and never sent.
const MAY_BE_KEPT: i16 = 0x80;

/// The flags that others know of.
pub(super) fn w3c_flags(stored: i16) -> u8 {
    u8::from(stored & 1 == 1)
}

pub(super) fn bytes<const N: usize>(slice: &[u8]) -> Option<[u8; N]> {
    slice.try_into().ok()
}

/// Which of these tasks exist; to tell an unknown task from one that is locked elsewhere.
pub async fn existing(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!("select task_uuid from tasker.tasks where task_uuid = any($1)", task_uuids)
        .fetch_all(conn)
        .await?)
}

/// The answer to one request to submit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submitted {
    /// The new task, or the one that had the idempotency key first.
    pub task_uuid: Option<Uuid>,
    /// False when the idempotency key was known.
    pub is_new: bool,
    /// What was wrong with the request.
    pub error: Option<String>,
}

/// Submits requests (each with the keys of a `submit` message and its trace context); one answer each, in order.
pub async fn submit<T: Serialize + Sync>(conn: &mut PgConnection, requests: &[T]) -> Result<Vec<Submitted>, Error> {
    let rows = sqlx::query!(
        r#"select task_uuid, is_new as "is_new!", error from tasker.submit_tasks($1) order by ordinal"#,
        Json(requests) as _
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Submitted { task_uuid: row.task_uuid, is_new: row.is_new, error: row.error })
        .collect())
}
