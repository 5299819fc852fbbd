//! The rows that a settle locks and reads: tasks, steps, and the attempts behind them. One statement a
//! function, whatever the size of the batch.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use tasker_shared::state_machine::decide::NEVER_PASSED;
use tasker_shared::state_machine::plan::{Outcome, Step, Task};
use tasker_shared::state_machine::states::StepState;
use tasker_shared::store::Error;
use tasker_shared::store::tasks::{bytes, w3c_flags};
use tasker_shared::store::transitions::{failure, milestones};
use tasker_shared::trace::log::Attempt;
use tasker_shared::trace::span::{SpanId, TraceId};
use uuid::Uuid;

/// What its trace and its messages say of a locked task.
#[derive(Debug, Clone)]
pub struct TaskRow {
    pub namespace: String,
    pub template_id: i32,
    pub correlation_id: String,
    pub parent_correlation_id: Option<String>,
    pub parent_task_uuid: Option<Uuid>,
    pub trace_id: TraceId,
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
pub async fn lock_tasks(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<(Task, TaskRow)>, Error> {
    let rows = sqlx::query!(
        r#"select task_uuid, namespace, template_id, state, version, generation, correlation_id, parent_correlation_id,
             parent_task_uuid, priority, input, open_steps, in_flight_steps, retrying_steps, held_steps, failed_steps,
             error_type, reason, ended_by, suspended_from, run_at, trace_id, remote_span_id, root_link, trace_flags, tracestate, baggage,
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

/// A step as it was loaded for a settle.
#[derive(Debug, Clone)]
pub struct StepRow {
    /// Its task.
    pub task_uuid: Uuid,
    /// What decisions depend on.
    pub step: Step,
    /// An event is about it (else it stands directly behind one).
    pub reported: bool,
    /// Only of [`load_all_steps`].
    pub passed: bool,
    /// What the worker reported of its current attempt.
    pub outcome: Option<Outcome>,
    /// The current attempt, for the trace.
    pub attempt: Option<Attempt>,
    /// The database's time when it was read.
    pub read_at: DateTime<Utc>,
}

/// Loads the steps that events are about, with what was reported of their current attempts.
///
/// Takes no lock: whatever a worker may move meanwhile (`enqueued`, `in_progress`) must be
/// locked by [`lock_claimable`] first, everything else is guarded by the lock of its task.
pub async fn load_steps(conn: &mut PgConnection, step_uuids: &[Uuid]) -> Result<Vec<StepRow>, Error> {
    let rows = sqlx::query_file!("src/lifecycle/read/load_steps.sql", step_uuids).fetch_all(conn).await?;
    rows.into_iter()
        .map(|row| {
            let id = row.step_uuid;
            let state: StepState = row.state.parse().map_err(|e| Error::bad_row("steps", "state", id, e))?;
            let failure = row.error.map(failure);
            let attempt = row.claimed_at.map(|claimed_at| Attempt {
                step: id,
                attempt: row.attempt,
                worker: row.worker.unwrap_or_default(),
                worker_version: row.worker_version,
                message_id: row.message_id,
                result_message_id: row.result_message_id,
                claim_began_at: row.claim_began_at.unwrap_or(claimed_at),
                claimed_at,
                report_began_at: row.report_began_at,
                reported_at: row.reported_at,
                start_offset_ms: row.start_offset_ms,
                run_ms: row.run_ms,
                failure: failure.clone(),
                usage: row.usage,
                milestones: row.milestones.map(milestones),
            });
            let outcome = match (row.outcome.as_deref(), failure) {
                (Some("success"), _) => Some(Outcome::Success(row.output.unwrap_or(Value::Null))),
                (Some(_), Some(failure)) => Some(Outcome::Failure(failure)),
                _ => None,
            };
            Ok(StepRow {
                task_uuid: row.task_uuid,
                step: Step {
                    uuid: id,
                    index: u32::try_from(row.step_index).map_err(|e| Error::bad_row("steps", "step_index", id, e))?,
                    item: u32::try_from(row.item).ok(),
                    state,
                    version: row.version,
                    generation: row.generation,
                    attempt: row.attempt,
                    failures: row.failures,
                    losses: row.losses,
                    remaining_dependencies: row.remaining_dependencies,
                    skipped_dependencies: row.skipped_dependencies,
                    priority: row.priority,
                    claim_token: row.claim_token,
                    claimed_by: row.claimed_by,
                    lease_expires_at: row.lease_expires_at,
                    last_heartbeat_at: row.last_heartbeat_at,
                    enqueued_version: row.enqueued_version,
                    enqueued_task_version: row.enqueued_task_version,
                    enqueued_event: row.enqueued_event.and_then(|word| word.parse().ok()),
                    enqueued_began_at: row.enqueued_began_at,
                    enqueued_at: row.enqueued_at,
                    due_at: row.due_at,
                    ready_at: row.ready_at,
                    held_by: row.held_by.and_then(|word| word.parse().ok()),
                    last_at: row.last_at,
                    input: None,
                },
                reported: true,
                passed: false,
                outcome,
                attempt,
                read_at: row.now,
            })
        })
        .collect()
}

/// The position of a step: its task, its index, and its item if it is one.
pub type Position = (Uuid, u32, Option<u32>);

/// Loads steps by their positions: those directly behind the ones that events are about. All
/// that can happen to them is that they become ready, so nothing of an attempt is read.
pub async fn load_steps_behind(conn: &mut PgConnection, positions: &[Position]) -> Result<Vec<StepRow>, Error> {
    let tasks: Vec<Uuid> = positions.iter().map(|(task, ..)| *task).collect();
    let indexes: Vec<i32> = positions.iter().map(|(_, index, _)| i32::try_from(*index).unwrap_or(-1)).collect();
    let item = |item: Option<u32>| item.and_then(|item| i32::try_from(item).ok()).unwrap_or(-1);
    let items: Vec<i32> = positions.iter().map(|(.., of)| item(*of)).collect();
    let rows =
        sqlx::query_file!("src/lifecycle/read/load_behind.sql", &tasks, &indexes, &items).fetch_all(conn).await?;
    rows.into_iter()
        .map(|row| {
            let id = row.step_uuid;
            let index = u32::try_from(row.step_index).map_err(|e| Error::bad_row("steps", "step_index", id, e))?;
            Ok(StepRow {
                task_uuid: row.task_uuid,
                step: Step {
                    state: row.state.parse().map_err(|e| Error::bad_row("steps", "state", id, e))?,
                    version: row.version,
                    attempt: row.attempt,
                    failures: row.failures,
                    losses: row.losses,
                    skipped_dependencies: row.skipped_dependencies,
                    ready_at: row.ready_at,
                    held_by: row.held_by.and_then(|word| word.parse().ok()),
                    item: u32::try_from(row.item).ok(),
                    ..Step::new(id, index, row.generation, row.remaining_dependencies, row.priority, row.last_at)
                },
                reported: false,
                passed: false,
                outcome: None,
                attempt: None,
                read_at: row.last_at,
            })
        })
        .collect()
}

/// Locks steps that a worker may move at this moment, in id order. A statement of its own,
/// so that what is loaded after it is what the lock protects.
pub async fn lock_claimable(conn: &mut PgConnection, step_uuids: &[Uuid]) -> Result<(), Error> {
    sqlx::query!(
        "select 1 as one from tasker.steps where step_uuid = any($1) and state in ('enqueued', 'in_progress')
         order by step_uuid for no key update",
        step_uuids
    )
    .fetch_all(conn)
    .await?;
    Ok(())
}

/// As [`lock_claimable`], but waits for nobody: answers those of the steps that were locked. The others
/// are in another state, or somebody else holds them.
pub async fn try_lock_claimable(conn: &mut PgConnection, step_uuids: &[Uuid]) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(
        "select step_uuid from tasker.steps where step_uuid = any($1) and state in ('enqueued', 'in_progress')
         order by step_uuid for no key update skip locked",
        step_uuids
    )
    .fetch_all(conn)
    .await?)
}

/// Locks the open steps of these tasks that nobody else holds, and answers the tasks of which
/// somebody holds one.
pub async fn try_lock_open(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<Uuid>, Error> {
    // Counts, and not the rows: each step of a wide task would be compared with each.
    Ok(sqlx::query_scalar!(
        r#"with open as materialized (
             select task_uuid, count(*) as steps from tasker.steps where task_uuid = any($1)
               and state not in ('complete', 'error', 'cancelled', 'skipped', 'resolved_manually')
             group by task_uuid
           ), mine as materialized (
             select task_uuid from tasker.steps where task_uuid = any($1)
               and state not in ('complete', 'error', 'cancelled', 'skipped', 'resolved_manually')
             order by step_uuid for no key update skip locked
           ), counted as materialized (
             select task_uuid, count(*) as steps from mine group by task_uuid
           )
           select o.task_uuid as "task_uuid!" from open o left join counted c on c.task_uuid = o.task_uuid
           where c.steps is distinct from o.steps"#,
        task_uuids
    )
    .fetch_all(conn)
    .await?)
}

/// Locks every open step of these tasks and answers the latest time any of them bears.
pub async fn lock_open(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Option<DateTime<Utc>>, Error> {
    let rows = sqlx::query_scalar!(
        "select last_at from tasker.steps where task_uuid = any($1)
           and state not in ('complete', 'error', 'cancelled', 'skipped', 'resolved_manually')
         order by step_uuid for no key update",
        task_uuids
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().max())
}

/// Every step of these tasks, for acts about a whole task: without their attempts. A step in
/// `skipped` or `error` is [`StepRow::passed`] if those behind it may take it for done: an
/// operator skipped it, or its handler failed (rather than its input or its message).
pub async fn load_all_steps(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<StepRow>, Error> {
    let never_passed: Vec<String> = NEVER_PASSED.map(str::to_owned).into();
    let rows =
        sqlx::query_file!("src/lifecycle/read/load_all_steps.sql", task_uuids, &never_passed).fetch_all(conn).await?;
    rows.into_iter()
        .map(|row| {
            let id = row.step_uuid;
            let index = u32::try_from(row.step_index).map_err(|e| Error::bad_row("steps", "step_index", id, e))?;
            Ok(StepRow {
                task_uuid: row.task_uuid,
                step: Step {
                    state: row.state.parse().map_err(|e| Error::bad_row("steps", "state", id, e))?,
                    version: row.version,
                    attempt: row.attempt,
                    failures: row.failures,
                    losses: row.losses,
                    enqueued_task_version: row.enqueued_task_version,
                    due_at: row.due_at,
                    ready_at: row.ready_at,
                    held_by: row.held_by.and_then(|word| word.parse().ok()),
                    skipped_dependencies: row.skipped_dependencies,
                    item: u32::try_from(row.item).ok(),
                    ..Step::new(id, index, row.generation, row.remaining_dependencies, row.priority, row.last_at)
                },
                reported: false,
                passed: row.passed,
                outcome: None,
                attempt: None,
                read_at: row.last_at,
            })
        })
        .collect()
}

/// What a step that was asked for its output has.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// It is complete or was resolved by hand, and this is its output.
    Given(Value),
    /// It was skipped, or it is still open.
    Absent,
}

/// Outputs of steps: `(task, step index) -> output`. What failed or was cancelled is not in the answer.
pub async fn outputs(conn: &mut PgConnection, wanted: &[(Uuid, u32)]) -> Result<HashMap<(Uuid, u32), Output>, Error> {
    let tasks: Vec<Uuid> = wanted.iter().map(|(task, _)| *task).collect();
    let indexes: Vec<i32> = wanted.iter().map(|(_, index)| i32::try_from(*index).unwrap_or(-1)).collect();
    let rows = sqlx::query!(
        r#"select s.task_uuid, s.step_index, s.state, a.output as "output?"
           from unnest($1::uuid[], $2::int[]) w(task_uuid, step_index)
           join tasker.steps s on s.task_uuid = w.task_uuid and s.step_index = w.step_index and s.item = -1
             and s.state not in ('error', 'cancelled')
           left join tasker.attempts a on a.task_uuid = s.task_uuid and a.step_uuid = s.step_uuid and a.attempt = s.attempt"#,
        &tasks,
        &indexes
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .filter_map(|row| {
            let done = [StepState::Complete, StepState::ResolvedManually];
            let is_done = done.iter().any(|state| state.as_str() == row.state);
            let output = if is_done { Output::Given(row.output?) } else { Output::Absent };
            Some(((row.task_uuid, u32::try_from(row.step_index).ok()?), output))
        })
        .collect())
}
