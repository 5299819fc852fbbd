//! THE transaction: lock, load, decide, apply, send, delete, commit; then the actions.
//!
//! A batch of hints settles in one transaction with set-based statements, so the cost of a
//! step falls as the load rises. This file must never decide anything itself.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::PgConnection;
use tasker_shared::queue;
use tasker_shared::state_machine::plan::{Plan, Room};
use tasker_shared::state_machine::{Event, Snapshot, decide};
use tasker_shared::store::apply::{Applied, ExportBatch, apply};
use tasker_shared::store::steps::{self, StepRow};
use tasker_shared::store::tasks::{self, TaskRow};
use tasker_shared::store::templates::Loaded;
use tasker_shared::store::tx::in_tx;
use tasker_shared::trace::context::Traceparent;
use tasker_shared::trace::ids::{SpanKey, span_id};
use tracing::instrument;
use uuid::Uuid;

use super::{Error, Hint, Look, Shared, actions};
use tasker_shared::message::step_message;

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Settled {
    /// Hints of tasks that somebody else settles right now: to be put back for a moment.
    pub deferred: Vec<Hint>,
    /// Hints of tasks that do not exist.
    pub unknown: Vec<Hint>,
    /// Tasks that ended.
    pub finished: usize,
}

/// One task of the batch, loaded and decided.
pub(super) struct Work {
    pub row: TaskRow,
    pub template: Arc<Loaded>,
    /// The steps as they were read, by uuid.
    pub steps: HashMap<Uuid, StepRow>,
    pub plan: Plan,
}

/// Settles hints that came from one queue (or from none: then `queue` only names the table
/// that no message is deleted from).
#[instrument(level = "debug", skip_all, fields(queue, hints = hints.len()))]
pub async fn settle(shared: &Shared, queue: &str, hints: Vec<Hint>) -> Result<Settled, Error> {
    let (settled, done) = in_tx(&shared.pool, async |conn| {
        let uuids: Vec<Uuid> = hints.iter().map(|hint| hint.task).collect::<HashSet<_>>().into_iter().collect();
        let rows = tasks::lock(conn, &uuids).await?;
        let (hints, mut settled) = sort_out(conn, hints, &rows, uuids.len()).await?;
        let (mut works, now) = load(shared, conn, rows, &hints).await?;
        shared.admission.with_room(|room| decide_all(&mut works, &hints, room, now));

        let export = export_batch(shared, &works);
        let moved: Vec<(&TaskRow, &Plan)> =
            works.iter().filter(|work| !work.plan.is_empty()).map(|work| (&work.row, &work.plan)).collect();
        let applied = if moved.is_empty() {
            Applied { at: now, cancelled: Vec::new() }
        } else {
            apply(conn, &moved, now, export.as_ref()).await?
        };
        send(conn, &works).await?;
        tell_workers(conn, &applied).await?;
        let messages: Vec<i64> = hints.iter().filter_map(|hint| hint.msg_id).collect();
        let due: Vec<i64> = hints.iter().filter_map(|hint| hint.due_id).collect();
        if !messages.is_empty() || !due.is_empty() {
            queue::delete(conn, queue, &messages, &due).await?;
        }
        settled.finished = works.iter().filter(|work| work.plan.task.state.is_terminal()).count();
        Ok::<_, Error>((settled, actions::Committed { works, applied, began_at: now, export }))
    })
    .await?;
    actions::run(shared, done);
    Ok(settled)
}

/// Keeps the hints of the tasks that were locked; the others are deferred or unknown.
async fn sort_out(
    conn: &mut PgConnection,
    hints: Vec<Hint>,
    rows: &[TaskRow],
    wanted: usize,
) -> Result<(Vec<Hint>, Settled), Error> {
    if rows.len() == wanted {
        return Ok((hints, Settled::default()));
    }
    let locked: HashSet<Uuid> = rows.iter().map(|row| row.task.uuid).collect();
    let (kept, others): (Vec<Hint>, Vec<Hint>) = hints.into_iter().partition(|hint| locked.contains(&hint.task));
    let ids: Vec<Uuid> = others.iter().map(|hint| hint.task).collect();
    let existing: HashSet<Uuid> = tasks::existing(conn, &ids).await?.into_iter().collect();
    let (deferred, unknown) = others.into_iter().partition(|hint| existing.contains(&hint.task));
    Ok((kept, Settled { deferred, unknown, finished: 0 }))
}

/// Loads what the decisions need, after the locks: a statement of its own sees what they protect.
async fn load(
    shared: &Shared,
    conn: &mut PgConnection,
    rows: Vec<TaskRow>,
    hints: &[Hint],
) -> Result<(Vec<Work>, DateTime<Utc>), Error> {
    let mut now = rows.iter().map(|row| row.read_at).max().unwrap_or_default();
    let claimable: Vec<Uuid> = hints.iter().filter(|hint| matches!(hint.look, Look::Lease(_) | Look::Queue(_))).filter_map(|hint| hint.look.step()).collect();
    if !claimable.is_empty() {
        steps::lock_claimable(conn, &claimable).await?;
    }
    let about: Vec<Uuid> = hints.iter().filter_map(|hint| hint.look.step()).collect();
    let mut loaded = if about.is_empty() { Vec::new() } else { steps::load(conn, &about).await? };
    let retried: Vec<Uuid> = hints.iter().filter(|hint| matches!(hint.look, Look::OperatorRetry(_))).map(|hint| hint.task).collect();
    let mut with_steps: HashSet<Uuid> = HashSet::new();
    if !retried.is_empty() {
        let (tasks, unfinished) = steps::load_unfinished(conn, &retried).await?;
        with_steps.extend(tasks);
        loaded.retain(|row| !retried.contains(&row.task_uuid));
        loaded.extend(unfinished);
    }
    now = loaded.iter().map(|row| row.read_at).max().map_or(now, |at| at.max(now));

    let ids: Vec<i32> = rows.iter().map(|row| row.template_id).collect();
    let templates = shared.templates(conn, &ids).await?;
    let mut works: Vec<Work> = Vec::with_capacity(rows.len());
    for row in rows {
        let template = templates.get(&row.template_id).cloned().ok_or_else(|| {
            tasker_shared::store::Error::BadRow { table: "tasks", column: "template_id", id: row.task.uuid.to_string(), problem: "no such template".into() }
        })?;
        let has_steps = with_steps.contains(&row.task.uuid);
        let plan = empty_plan(&row, has_steps);
        works.push(Work { row, template, steps: HashMap::new(), plan });
    }
    let places: HashMap<Uuid, usize> = works.iter().enumerate().map(|(place, work)| (work.row.task.uuid, place)).collect();
    for row in loaded {
        if let Some(place) = places.get(&row.task_uuid) {
            works[*place].steps.insert(row.step.uuid, row);
        }
    }
    Ok((works, now))
}
