//! Plans -> a few batched writes, whatever the size of the batch.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use super::tasks::TaskRow;
use crate::queue::Traffic;
use crate::state_machine::StepState;
use crate::state_machine::plan::Plan;

/// What a batch became.
#[derive(Debug, Clone)]
pub struct Applied {
    /// The one time all its rows bear.
    pub at: DateTime<Utc>,
    /// Steps that were moved to cancelled because their task ended.
    pub cancelled: Vec<Cancelled>,
}

/// A step that its task's end cancelled.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "columns of tasker.steps, explained there")]
pub struct Cancelled {
    pub task_uuid: Uuid,
    pub step_uuid: Uuid,
    pub attempt: i32,
    /// An attempt was open and its span ends here.
    pub had_attempt: bool,
    /// The worker that is running it.
    pub claimed_by: Option<String>,
}

/// The export batch of a transaction: who delivers it, and for which tasks.
#[derive(Debug, Clone)]
pub struct ExportBatch {
    /// Its row.
    pub batch_id: Uuid,
    /// The orchestrator that holds it in memory.
    pub instance: Uuid,
    /// Tasks whose trace is sampled.
    pub task_uuids: Vec<Uuid>,
}

/// Writes the plans: compare-and-set of every row, one log row per move, all with one time;
/// and what the settle does to queues, in the same statement.
///
/// Errors with [`Error::Conflict`] if any row is not as it was read; the caller rolls back.
#[expect(clippy::too_many_lines, reason = "one line a column of one statement")]
pub async fn apply(
    conn: &mut PgConnection,
    batch: &[(&TaskRow, &Plan)],
    began_at: DateTime<Utc>,
    export: Option<&ExportBatch>,
    traffic: &Traffic<'_>,
) -> Result<Applied, Error> {
    let ending: Vec<Uuid> =
        batch.iter().filter(|(_, plan)| plan.cancel_open_steps).map(|(_, plan)| plan.task.uuid).collect();
    let mut floor = latest(batch);
    if !ending.is_empty() {
        floor = floor.max(super::steps::lock_open(conn, &ending).await?);
    }
    let floor = floor.map_or(began_at, |at| (at + TimeDelta::microseconds(1)).max(began_at));

    let mut tasks = TaskColumns::default();
    let mut steps = StepColumns::default();
    let mut created = NewStepColumns::default();
    let mut log = LogColumns::default();
    let mut due = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (_, plan) in batch {
        tasks.push(plan);
        steps.push(plan);
        created.push(plan);
        log.push(plan);
        for hint in &plan.due {
            due.0.push(hint.at);
            due.1.push(hint.kind.to_owned());
            due.2.push(plan.task.uuid);
            due.3.push(hint.step);
        }
    }
    let row = sqlx::query_file!(
        "src/store/apply.sql",
        floor,
        began_at,
        &tasks.uuid,
        &tasks.state as &[&str],
        &tasks.version,
        &tasks.version_before,
        &tasks.generation,
        &tasks.open,
        &tasks.in_flight,
        &tasks.retrying,
        &tasks.held,
        &tasks.failed,
        &tasks.error_type as &[Option<&str>],
        &tasks.reason as &[Option<&str>],
        &tasks.ended_by as &[Option<&str>],
        &steps.uuid,
        &steps.state as &[&str],
        &steps.version,
        &steps.version_before,
        &steps.generation,
        &steps.attempt,
        &steps.failures,
        &steps.losses,
        &steps.remaining,
        &steps.input as &[Option<Value>],
        &steps.due_at as &[Option<DateTime<Utc>>],
        &steps.ready_at as &[Option<DateTime<Utc>>],
        &steps.held_by as &[Option<&str>],
        &steps.enqueued,
        &steps.enqueued_version as &[Option<i32>],
        &steps.enqueued_task_version as &[Option<i32>],
        &log.task,
        &log.entity,
        &log.version,
        &log.task_version as &[Option<i32>],
        &log.generation,
        &log.attempt as &[Option<i32>],
        &log.from as &[&str],
        &log.to as &[&str],
        &log.event as &[&str],
        &log.actor as &[Option<&str>],
        &log.claim_token as &[Option<Uuid>],
        &log.detail as &[Option<Value>],
        &due.0,
        &due.1,
        &due.2,
        &due.3 as &[Option<Uuid>],
        export.map_or_else(Uuid::nil, |export| export.batch_id),
        export.map(|export| export.instance),
        &export.map_or_else(Vec::new, |export| export.task_uuids.clone()),
        &steps.enqueued_event as &[Option<&str>],
        &created.steps.uuid,
        &created.task,
        &created.index,
        &created.queue as &[&str],
        &created.priority,
        &created.steps.state as &[&str],
        &created.steps.version,
        &created.steps.generation,
        &created.steps.attempt,
        &created.steps.remaining,
        &created.steps.input as &[Option<Value>],
        &created.steps.ready_at as &[Option<DateTime<Utc>>],
        &created.steps.held_by as &[Option<&str>],
        &created.steps.enqueued_version as &[Option<i32>],
        &created.steps.enqueued_task_version as &[Option<i32>],
        &created.steps.enqueued_event as &[Option<&str>],
        &created.steps.enqueued,
        traffic.queue,
        traffic.done,
        traffic.due,
        &traffic.outbox.queues,
        &traffic.outbox.bodies,
        &traffic.outbox.headers,
    )
    .fetch_one(&mut *conn)
    .await?;
    check("tasks", row.tasks, tasks.uuid.len())?;
    check("steps", row.steps, steps.uuid.len())?;

    let skip_counts: Vec<(Uuid, i32)> = batch.iter().flat_map(|(_, plan)| &plan.skip_counts).copied().collect();
    if !skip_counts.is_empty() {
        super::steps::set_skip_counts(conn, &skip_counts).await?;
    }
    insert_items(conn, batch, began_at, row.at).await?;
    let mapping: Vec<&Plan> = batch
        .iter()
        .map(|(_, plan)| *plan)
        .filter(|plan| !plan.maps.is_empty() || !plan.forgotten_maps.is_empty())
        .collect();
    if !mapping.is_empty() {
        super::maps::apply(conn, &mapping, row.at).await?;
    }
    super::operators::record(conn, batch, row.at).await?;
    // New steps exist by now: a task that ends as it begins cancels them too.
    let cancelled = if ending.is_empty() {
        Vec::new()
    } else {
        sqlx::query_file!("src/store/cancel_open_steps.sql", &ending, began_at, row.at)
            .fetch_all(&mut *conn)
            .await?
            .into_iter()
            .map(|row| Cancelled {
                task_uuid: row.task_uuid,
                step_uuid: row.step_uuid,
                attempt: row.attempt,
                had_attempt: row.has_attempt,
                claimed_by: row.claimed_by,
            })
            .collect()
    };
    Ok(Applied { at: row.at, cancelled })
}

fn check(table: &'static str, changed: i64, wanted: usize) -> Result<(), Error> {
    if usize::try_from(changed) == Ok(wanted) { Ok(()) } else { Err(Error::Conflict { table, changed, wanted }) }
}

/// The latest time that any row to be written bears: times of an entity never go back.
fn latest(batch: &[(&TaskRow, &Plan)]) -> Option<DateTime<Utc>> {
    batch.iter().flat_map(|(_, plan)| plan.steps.iter().map(|(step, _)| step.last_at).chain([plan.task.last_at])).max()
}

/// Creates the items of maps; every other step is created by the statement that applies its plan.
async fn insert_items(
    conn: &mut PgConnection,
    batch: &[(&TaskRow, &Plan)],
    began_at: DateTime<Utc>,
    at: DateTime<Utc>,
) -> Result<(), Error> {
    let mut steps = StepColumns::default();
    let (mut task, mut index, mut item) = (Vec::new(), Vec::new(), Vec::new());
    let (mut queue, mut priority) = (Vec::new(), Vec::new());
    for (_, plan) in batch {
        for (step, definition_queue) in plan.new_steps.iter().zip(&plan.new_step_queues) {
            let Some(place) = step.item else {
                continue;
            };
            steps.push_step(step, 0);
            task.push(plan.task.uuid);
            index.push(i32::try_from(step.index).unwrap_or(i32::MAX));
            item.push(i32::try_from(place).unwrap_or(i32::MAX));
            queue.push(&**definition_queue);
            priority.push(step.priority);
        }
    }
    if task.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "insert into tasker.steps (step_uuid, task_uuid, step_index, item, queue, priority, state, version, generation, attempt,
           remaining_dependencies, input, ready_at, held_by, enqueued_version, enqueued_task_version, enqueued_event,
           enqueued_began_at, enqueued_at, last_at)
         select n.step_uuid, n.task_uuid, n.step_index, n.item, n.queue, n.priority, n.state, n.version, n.generation, n.attempt,
           n.remaining_dependencies, n.input, n.ready_at, n.held_by, n.enqueued_version, n.enqueued_task_version, n.enqueued_event,
           case when n.enqueued then $16::timestamptz end, case when n.enqueued then $17::timestamptz end, $17
         from unnest($1::uuid[], $2::uuid[], $3::int[], $4::text[], $5::int[], $6::text[], $7::int[], $8::int[], $9::int[],
             $10::int[], $11::jsonb[], $12::timestamptz[], $13::text[], $14::int[], $15::int[], $18::bool[], $19::text[], $20::int[])
           as n(step_uuid, task_uuid, step_index, queue, priority, state, version, generation, attempt,
             remaining_dependencies, input, ready_at, held_by, enqueued_version, enqueued_task_version, enqueued, enqueued_event, item)",
        &steps.uuid,
        &task,
        &index,
        &queue as &[&str],
        &priority,
        &steps.state as &[&str],
        &steps.version,
        &steps.generation,
        &steps.attempt,
        &steps.remaining,
        &steps.input as &[Option<Value>],
        &steps.ready_at as &[Option<DateTime<Utc>>],
        &steps.held_by as &[Option<&str>],
        &steps.enqueued_version as &[Option<i32>],
        &steps.enqueued_task_version as &[Option<i32>],
        began_at,
        at,
        &steps.enqueued,
        &steps.enqueued_event as &[Option<&str>],
        &item
    )
    .execute(conn)
    .await?;
    Ok(())
}

#[derive(Default)]
struct TaskColumns<'a> {
    uuid: Vec<Uuid>,
    state: Vec<&'a str>,
    version: Vec<i32>,
    version_before: Vec<i32>,
    generation: Vec<i32>,
    open: Vec<i32>,
    in_flight: Vec<i32>,
    retrying: Vec<i32>,
    held: Vec<i32>,
    failed: Vec<i32>,
    error_type: Vec<Option<&'a str>>,
    reason: Vec<Option<&'a str>>,
    ended_by: Vec<Option<&'a str>>,
}

impl<'a> TaskColumns<'a> {
    fn push(&mut self, plan: &'a Plan) {
        if !plan.task_changed {
            return;
        }
        let task = &plan.task;
        self.uuid.push(task.uuid);
        self.state.push(task.state.as_str());
        self.version.push(task.version);
        self.version_before.push(plan.task_version_before);
        self.generation.push(task.generation);
        self.open.push(task.open_steps);
        self.in_flight.push(task.in_flight_steps);
        self.retrying.push(task.retrying_steps);
        self.held.push(task.held_steps);
        self.failed.push(task.failed_steps);
        self.error_type.push(task.error_type.as_deref());
        self.reason.push(task.reason.as_deref());
        self.ended_by.push(task.ended_by);
    }
}

#[derive(Default)]
struct StepColumns<'a> {
    uuid: Vec<Uuid>,
    state: Vec<&'a str>,
    version: Vec<i32>,
    version_before: Vec<i32>,
    generation: Vec<i32>,
    attempt: Vec<i32>,
    failures: Vec<i32>,
    losses: Vec<i32>,
    remaining: Vec<i32>,
    input: Vec<Option<Value>>,
    due_at: Vec<Option<DateTime<Utc>>>,
    ready_at: Vec<Option<DateTime<Utc>>>,
    held_by: Vec<Option<&'a str>>,
    enqueued: Vec<bool>,
    enqueued_version: Vec<Option<i32>>,
    enqueued_task_version: Vec<Option<i32>>,
    enqueued_event: Vec<Option<&'a str>>,
}

impl<'a> StepColumns<'a> {
    fn push(&mut self, plan: &'a Plan) {
        for (step, before) in &plan.steps {
            self.push_step(step, *before);
        }
    }

    fn push_step(&mut self, step: &'a crate::state_machine::plan::Step, before: i32) {
        self.uuid.push(step.uuid);
        self.state.push(step.state.as_str());
        self.version.push(step.version);
        self.version_before.push(before);
        self.generation.push(step.generation);
        self.attempt.push(step.attempt);
        self.failures.push(step.failures);
        self.losses.push(step.losses);
        self.remaining.push(step.remaining_dependencies);
        self.input.push(step.input.clone());
        self.due_at.push(step.due_at);
        self.ready_at.push(step.ready_at);
        self.held_by.push(step.held_by.map(crate::state_machine::plan::HeldBy::as_str));
        // `decide` leaves the times of a fresh Enqueue to the database.
        let opened = matches!(step.state, StepState::Enqueued | StepState::Waiting);
        self.enqueued.push(opened && step.enqueued_at.is_none());
        self.enqueued_version.push(step.enqueued_version);
        self.enqueued_task_version.push(step.enqueued_task_version);
        self.enqueued_event.push(step.enqueued_event);
    }
}

#[derive(Default)]
struct NewStepColumns<'a> {
    steps: StepColumns<'a>,
    task: Vec<Uuid>,
    index: Vec<i32>,
    queue: Vec<&'a str>,
    priority: Vec<i32>,
}

impl<'a> NewStepColumns<'a> {
    fn push(&mut self, plan: &'a Plan) {
        let ordinary = plan.new_steps.iter().zip(&plan.new_step_queues).filter(|(step, _)| step.item.is_none());
        for (step, queue) in ordinary {
            self.steps.push_step(step, 0);
            self.task.push(plan.task.uuid);
            self.index.push(i32::try_from(step.index).unwrap_or(i32::MAX));
            self.queue.push(queue);
            self.priority.push(step.priority);
        }
    }
}

#[derive(Default)]
struct LogColumns<'a> {
    task: Vec<Uuid>,
    entity: Vec<Uuid>,
    version: Vec<i32>,
    task_version: Vec<Option<i32>>,
    generation: Vec<i32>,
    attempt: Vec<Option<i32>>,
    from: Vec<&'a str>,
    to: Vec<&'a str>,
    event: Vec<&'a str>,
    actor: Vec<Option<&'a str>>,
    claim_token: Vec<Option<Uuid>>,
    detail: Vec<Option<Value>>,
}

impl<'a> LogColumns<'a> {
    fn push(&mut self, plan: &'a Plan) {
        for made in &plan.moves {
            self.task.push(plan.task.uuid);
            self.entity.push(made.entity);
            self.version.push(made.version);
            self.task_version.push(made.task_version);
            self.generation.push(made.generation);
            self.attempt.push(made.attempt);
            self.from.push(made.from);
            self.to.push(made.to);
            self.event.push(made.event);
            self.actor.push(made.actor.as_deref());
            self.claim_token.push(made.claim_token);
            self.detail.push(made.detail.as_ref().map(|detail| serde_json::json!(detail)));
        }
    }
}

#[cfg(test)]
mod tests;
