//! What a settle writes: plans become a few batched statements, whatever the size of the batch, and the
//! steps that became ready become messages.
//!
//! There is one struct for each composite type of the same name in `migrations/0001_tasks.sql`; fields
//! stand in the order of the type's columns. Rows, not one array a column: `unnest` of a list of arrays
//! keeps a store for each of them, and the sixty-six of a settle took a third of the time of a small one.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::postgres::{PgHasArrayType, PgTypeInfo};
use sqlx::{PgConnection, Postgres};
use tasker_shared::state_machine::flow::GROUP_SEPARATOR;
use tasker_shared::state_machine::plan::{Due, Move, Plan, Step, Task};
use tasker_shared::state_machine::{StepEvent, StepState};
use tasker_shared::store::Error;
use tasker_shared::trace::context::{Baggage, Traceparent, pass_on};
use tasker_shared::trace::ids::{SpanKey, span_id};
use tracing::instrument;
use uuid::Uuid;

use super::loaded::LoadedTask;
use super::queue::{Outbox, QueueChanges};
use super::{maps, operators, read};

/// What a batch became.
#[derive(Debug, Clone)]
pub(super) struct Applied {
    /// The one time all its rows bear.
    pub at: DateTime<Utc>,
    /// Steps that were moved to cancelled because their task ended.
    pub cancelled: Vec<Cancelled>,
}

/// A step that its task's end cancelled.
#[derive(Debug, Clone)]
pub(super) struct Cancelled {
    pub task_uuid: Uuid,
    /// An attempt was open and its span ends here.
    pub had_attempt: bool,
    /// The worker that is running it.
    pub claimed_by: Option<String>,
}

/// The export batch of a transaction: who delivers it, and for which tasks.
#[derive(Debug, Clone)]
pub(super) struct ExportBatch {
    /// Its row.
    pub batch_id: Uuid,
    /// The orchestrator that holds it in memory.
    pub instance: Uuid,
    /// Tasks whose trace is sampled.
    pub task_uuids: Vec<Uuid>,
}

/// A settle that has committed.
pub(super) struct Committed {
    pub tasks: Vec<LoadedTask>,
    /// One per loaded, in the same order.
    pub plans: Vec<Plan>,
    pub applied: Applied,
    pub began_at: DateTime<Utc>,
    pub export: Option<ExportBatch>,
}

/// Writes the plans: compare-and-set of every row, one log row per move, all with one time;
/// and what the settle does to queues, in the same statement.
///
/// Errors with [`Error::Conflict`] if any row is not as it was read; the caller rolls back.
pub(super) async fn apply(
    conn: &mut PgConnection,
    batch: &[(&Task, &Plan)],
    began_at: DateTime<Utc>,
    export: Option<&ExportBatch>,
    changes: &QueueChanges<'_>,
) -> Result<Applied, Error> {
    let ending: Vec<Uuid> =
        batch.iter().filter(|(_, plan)| plan.cancel_open_steps).map(|(_, plan)| plan.task.uuid).collect();
    let mut floor = latest(batch);
    if !ending.is_empty() {
        floor = floor.max(read::lock_open(conn, &ending).await?);
    }
    let floor = floor.map_or(began_at, |at| (at + TimeDelta::microseconds(1)).max(began_at));

    let tasks: Vec<TaskChange> = batch.iter().filter_map(|(_, plan)| TaskChange::of(plan)).collect();
    let (mut steps, mut created, mut log, mut due) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (_, plan) in batch {
        let task = plan.task.uuid;
        steps.extend(plan.steps.iter().map(|(step, before)| StepChange::of(plan, step, *before)));
        created.extend(new_steps(plan, false));
        log.extend(plan.moves.iter().map(|made| LogRow::of(task, made)));
        // Nothing will come of a task that has ended.
        if !plan.task.state.is_terminal() {
            due.extend(plan.due.iter().map(|hint| DueRow::of(task, hint)));
        }
    }
    let row = sqlx::query_file!(
        "src/lifecycle/write/apply.sql",
        floor,
        began_at,
        &tasks as &[TaskChange<'_>],
        &steps as &[StepChange<'_>],
        &created as &[NewStep<'_>],
        &log as &[LogRow<'_>],
        &due as &[DueRow<'_>],
        export.map_or_else(Uuid::nil, |export| export.batch_id),
        export.map(|export| export.instance),
        export.map_or(&[][..], |export| &export.task_uuids),
        changes.queue,
        changes.done,
        changes.due,
        &changes.outbox.queues,
        &changes.outbox.bodies,
        &changes.outbox.headers,
    )
    .fetch_one(&mut *conn)
    .await?;
    check("tasks", row.tasks, tasks.len())?;
    check("steps", row.steps, steps.len())?;

    let skip_counts: Vec<(Uuid, i32)> = batch.iter().flat_map(|(_, plan)| &plan.skip_counts).copied().collect();
    if !skip_counts.is_empty() {
        set_skip_counts(conn, &skip_counts).await?;
    }
    insert_items(conn, batch, began_at, row.at).await?;
    let mapping: Vec<&Plan> = batch
        .iter()
        .map(|(_, plan)| *plan)
        .filter(|plan| !plan.maps.is_empty() || !plan.forgotten_maps.is_empty())
        .collect();
    if !mapping.is_empty() {
        maps::apply(conn, &mapping, row.at).await?;
    }
    operators::record(conn, batch, row.at).await?;
    // New steps exist by now: a task that ends as it begins cancels them too.
    let cancelled = if ending.is_empty() {
        Vec::new()
    } else {
        sqlx::query_file!("src/lifecycle/write/cancel_open_steps.sql", &ending, began_at, row.at)
            .fetch_all(&mut *conn)
            .await?
            .into_iter()
            .map(|row| Cancelled { task_uuid: row.task_uuid, had_attempt: row.has_attempt, claimed_by: row.claimed_by })
            .collect()
    };
    Ok(Applied { at: row.at, cancelled })
}

fn check(table: &'static str, changed: i64, wanted: usize) -> Result<(), Error> {
    if usize::try_from(changed) == Ok(wanted) { Ok(()) } else { Err(Error::Conflict { table, changed, wanted }) }
}

/// The latest time that any row to be written bears: times of an entity never go back.
fn latest(batch: &[(&Task, &Plan)]) -> Option<DateTime<Utc>> {
    batch.iter().flat_map(|(_, plan)| plan.steps.iter().map(|(step, _)| step.last_at).chain([plan.task.last_at])).max()
}

/// The steps that a plan creates: items of maps, or all others.
fn new_steps(plan: &Plan, items: bool) -> impl Iterator<Item = NewStep<'_>> {
    let steps = plan.new_steps.iter().zip(&plan.new_step_queues);
    let wanted = steps.filter(move |(step, _)| step.item.is_some() == items);
    wanted.map(|(step, queue)| NewStep::of(plan, step, queue))
}

/// Creates the items of maps; every other step is created by the statement that applies its plan.
async fn insert_items(
    conn: &mut PgConnection,
    batch: &[(&Task, &Plan)],
    began_at: DateTime<Utc>,
    at: DateTime<Utc>,
) -> Result<(), Error> {
    let items: Vec<NewStep> = batch.iter().flat_map(|(_, plan)| new_steps(plan, true)).collect();
    if items.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "insert into tasker.steps (step_uuid, task_uuid, step_index, item, queue, priority, state, version, generation, attempt,
           remaining_dependencies, input, ready_at, held_by, held_handler, enqueued_version, enqueued_task_version, enqueued_event,
           enqueued_began_at, enqueued_at, last_at)
         select n.step_uuid, n.task_uuid, n.step_index, n.item, n.queue, n.priority, n.state, n.version, n.generation, n.attempt,
           n.remaining_dependencies, n.input, n.ready_at, split_part(n.held_by, e'\\x1f', 1),
           nullif(split_part(n.held_by, e'\\x1f', 2), ''), n.enqueued_version, n.enqueued_task_version, n.enqueued_event,
           case when n.enqueued then $2::timestamptz end, case when n.enqueued then $3::timestamptz end, $3
         from unnest($1::tasker.new_step[]) n",
        &items as &[NewStep<'_>],
        began_at,
        at,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Writes how many dependencies of these steps were skipped; the batch that skipped them has
/// locked and written their rows.
async fn set_skip_counts(conn: &mut PgConnection, counts: &[(Uuid, i32)]) -> Result<(), Error> {
    let (steps, skipped): (Vec<Uuid>, Vec<i32>) = counts.iter().copied().unzip();
    sqlx::query!(
        "update tasker.steps s set skipped_dependencies = n.skipped
         from unnest($1::uuid[], $2::int[]) n(step_uuid, skipped) where s.step_uuid = n.step_uuid",
        &steps,
        &skipped
    )
    .execute(conn)
    .await?;
    Ok(())
}

macro_rules! composite {
    ($row:ident, $name:literal) => {
        impl sqlx::Type<Postgres> for $row<'_> {
            fn type_info() -> PgTypeInfo {
                PgTypeInfo::with_name($name)
            }
        }

        impl PgHasArrayType for $row<'_> {
            fn array_type_info() -> PgTypeInfo {
                PgTypeInfo::array_of($name)
            }
        }
    };
}

composite!(TaskChange, "tasker.task_change");
composite!(StepChange, "tasker.step_change");
composite!(NewStep, "tasker.new_step");
composite!(LogRow, "tasker.log_row");
composite!(DueRow, "tasker.due_row");

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
struct TaskChange<'a> {
    task_uuid: Uuid,
    state: &'a str,
    version: i32,
    version_before: i32,
    generation: i32,
    open_steps: i32,
    in_flight_steps: i32,
    retrying_steps: i32,
    held_steps: i32,
    failed_steps: i32,
    error_type: Option<&'a str>,
    reason: Option<&'a str>,
    ended_by: Option<&'a str>,
}

impl<'a> TaskChange<'a> {
    /// `None` where the plan leaves the task as it is.
    fn of(plan: &'a Plan) -> Option<Self> {
        let task = &plan.task;
        plan.task_changed.then(|| Self {
            task_uuid: task.uuid,
            state: task.state.as_str(),
            version: task.version,
            version_before: plan.task_version_before,
            generation: task.generation,
            open_steps: task.open_steps,
            in_flight_steps: task.in_flight_steps,
            retrying_steps: task.retrying_steps,
            held_steps: task.held_steps,
            failed_steps: task.failed_steps,
            error_type: task.error_type.as_deref(),
            reason: task.reason.as_deref(),
            ended_by: task.ended_by,
        })
    }
}

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
struct StepChange<'a> {
    step_uuid: Uuid,
    state: &'a str,
    version: i32,
    version_before: i32,
    generation: i32,
    attempt: i32,
    failures: i32,
    losses: i32,
    remaining_dependencies: i32,
    input: Option<&'a Value>,
    due_at: Option<DateTime<Utc>>,
    ready_at: Option<DateTime<Utc>>,
    held_by: Option<String>,
    enqueued: bool,
    enqueued_version: Option<i32>,
    enqueued_task_version: Option<i32>,
    enqueued_event: Option<&'a str>,
}

impl<'a> StepChange<'a> {
    fn of(plan: &Plan, step: &'a Step, version_before: i32) -> Self {
        Self {
            step_uuid: step.uuid,
            state: step.state.as_str(),
            version: step.version,
            version_before,
            generation: step.generation,
            attempt: step.attempt,
            failures: step.failures,
            losses: step.losses,
            remaining_dependencies: step.remaining_dependencies,
            input: step.input.as_ref(),
            due_at: step.due_at,
            ready_at: step.ready_at,
            held_by: held_by(plan, step),
            enqueued: is_enqueued_now(step),
            enqueued_version: step.enqueued_version,
            enqueued_task_version: step.enqueued_task_version,
            enqueued_event: step.enqueued_event.map(StepEvent::as_str),
        }
    }
}

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
struct NewStep<'a> {
    step_uuid: Uuid,
    task_uuid: Uuid,
    step_index: i32,
    item: Option<i32>,
    queue: &'a str,
    priority: i32,
    state: &'a str,
    version: i32,
    generation: i32,
    attempt: i32,
    remaining_dependencies: i32,
    input: Option<&'a Value>,
    ready_at: Option<DateTime<Utc>>,
    held_by: Option<String>,
    enqueued: bool,
    enqueued_version: Option<i32>,
    enqueued_task_version: Option<i32>,
    enqueued_event: Option<&'a str>,
}

impl<'a> NewStep<'a> {
    fn of(plan: &Plan, step: &'a Step, queue: &'a str) -> Self {
        let integer = |integer| i32::try_from(integer).unwrap_or(i32::MAX);
        Self {
            step_uuid: step.uuid,
            task_uuid: plan.task.uuid,
            step_index: integer(step.index),
            item: step.item.map(integer),
            queue,
            priority: step.priority,
            state: step.state.as_str(),
            version: step.version,
            generation: step.generation,
            attempt: step.attempt,
            remaining_dependencies: step.remaining_dependencies,
            input: step.input.as_ref(),
            ready_at: step.ready_at,
            held_by: held_by(plan, step),
            enqueued: is_enqueued_now(step),
            enqueued_version: step.enqueued_version,
            enqueued_task_version: step.enqueued_task_version,
            enqueued_event: step.enqueued_event.map(StepEvent::as_str),
        }
    }
}

/// Why it is held, and from now on: of which handler it is, behind a separator. A column of its own would
/// make the type another one, and older releases encode it by the position of its columns.
fn held_by(plan: &Plan, step: &Step) -> Option<String> {
    let reason = step.held_by?.as_str();
    let handler = plan.held_handlers.get(&step.uuid);
    Some(handler.map_or_else(|| reason.to_owned(), |handler| format!("{reason}{GROUP_SEPARATOR}{handler}")))
}

/// `decide` leaves the times of a fresh Enqueue to the database.
fn is_enqueued_now(step: &Step) -> bool {
    matches!(step.state, StepState::Enqueued | StepState::Waiting) && step.enqueued_at.is_none()
}

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
struct LogRow<'a> {
    task_uuid: Uuid,
    entity_uuid: Uuid,
    version: i32,
    task_version: Option<i32>,
    generation: i32,
    attempt: Option<i32>,
    from_state: &'a str,
    to_state: &'a str,
    event: &'a str,
    actor: Option<&'a str>,
    claim_token: Option<Uuid>,
    detail: Option<Value>,
}

impl<'a> LogRow<'a> {
    fn of(task_uuid: Uuid, made: &'a Move) -> Self {
        Self {
            task_uuid,
            entity_uuid: made.entity,
            version: made.version,
            task_version: made.task_version,
            generation: made.generation,
            attempt: made.attempt,
            from_state: made.change.from(),
            to_state: made.change.to(),
            event: made.change.event(),
            actor: made.actor.as_deref(),
            claim_token: made.claim_token,
            detail: made.detail.as_ref().map(|detail| json!(detail)),
        }
    }
}

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
struct DueRow<'a> {
    due_at: DateTime<Utc>,
    kind: &'a str,
    task_uuid: Uuid,
    step_uuid: Option<Uuid>,
}

impl<'a> DueRow<'a> {
    fn of(task_uuid: Uuid, due: &'a Due) -> Self {
        Self { due_at: due.at, kind: due.kind, task_uuid, step_uuid: due.step }
    }
}

/// A message with its priority and destination.
type Letter<'a> = (i32, &'a str, Value, Value);

/// The messages of the steps that became ready.
pub(super) fn outbox(tasks: &[LoadedTask], plans: &[Plan]) -> Outbox {
    let mut letters: Vec<Letter<'_>> = Vec::new();
    for (loaded, plan) in tasks.iter().zip(plans).filter(|(_, plan)| !plan.sends.is_empty()) {
        enqueue_steps(loaded, plan, &mut letters);
    }
    // A queue is read in the order it was written in, so the urgent are written first.
    letters.sort_by_key(|(priority, ..)| std::cmp::Reverse(*priority));
    let mut outbox = Outbox::default();
    for (_, queue, body, headers) in letters {
        outbox.queues.push(queue.to_owned());
        outbox.bodies.push(body);
        outbox.headers.push(headers);
    }
    outbox
}

/// Writes the messages of one task's steps, with the context that their attempts will continue.
#[instrument(skip_all, fields(correlation_id = loaded.row.correlation_id, task_uuid = %loaded.task().uuid))]
fn enqueue_steps<'a>(loaded: &LoadedTask, plan: &'a Plan, letters: &mut Vec<Letter<'a>>) {
    let row = &loaded.row;
    let baggage = baggage(loaded);
    for sent in &plan.sends {
        // The attempt's handler.execution is known before it runs: it is what the worker continues.
        let handler = span_id(&row.trace_id, sent.step, 0, u64::from(sent.attempt.unsigned_abs()), SpanKey::Handler, 0);
        let parent = Traceparent { trace_id: row.trace_id, span_id: handler, flags: row.trace_flags };
        let mut headers = json!({
            "traceparent": parent.to_string(),
            "baggage": baggage,
        });
        if let Some(version) = sent.task_version {
            let ordinal = u64::from(version.unsigned_abs());
            let sender = span_id(&row.trace_id, loaded.task().uuid, 0, 0, SpanKey::Enqueuing, ordinal);
            headers["x-tasker-sender"] = tasker_shared::trace::otlp::hex(&sender).into();
        }
        if let Some(state) = &row.tracestate {
            headers["tracestate"] = state.clone().into();
        }
        let body = step_message(loaded.task().uuid, sent.step, sent.generation, sent.attempt, &sent.handler);
        letters.push((sent.priority, &sent.queue, body, headers));
    }
}

fn baggage(loaded: &LoadedTask) -> String {
    let row = &loaded.row;
    let mut baggage = Baggage::default();
    baggage.insert("correlation_id", &row.correlation_id);
    baggage.insert("task_uuid", &loaded.task().uuid.to_string());
    baggage.insert("namespace", &row.namespace);
    if let Some(callers) = &row.baggage {
        pass_on(&mut baggage, callers);
    }
    baggage.to_string()
}

/// The message that hands a step to the workers of its queue.
fn step_message(task: Uuid, step: Uuid, generation: i32, attempt: i32, handler: &str) -> Value {
    json!({"v": 1, "task": task, "step": step, "generation": generation, "attempt": attempt, "handler": handler})
}

#[cfg(test)]
mod tests;
