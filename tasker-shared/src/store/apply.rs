//! Plans -> a few batched writes, whatever the size of the batch.

mod rows;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use self::rows::{DueRow, LogRow, NewStep, StepChange, TaskChange};
use super::Error;
use crate::queue::QueueChanges;
use crate::state_machine::plan::{Plan, Task};

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
pub async fn apply(
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
        floor = floor.max(super::steps::lock_open(conn, &ending).await?);
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
        "src/store/apply.sql",
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

#[cfg(test)]
mod tests;
