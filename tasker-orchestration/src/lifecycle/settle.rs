//! THE transaction: lock, load, decide, apply, send, delete, commit; then the actions.
//!
//! A batch of hints settles in one transaction with set-based statements, so the cost of a
//! step falls as the load rises. This file must never decide anything itself: `load` reads what
//! the decisions need, `decisions` asks for them, `outbox` writes the messages.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::FutureExt as _;
use sqlx::PgConnection;
use tasker_shared::queue::{self, Traffic};
use tasker_shared::state_machine::TaskState;
use tasker_shared::state_machine::plan::Plan;
use tasker_shared::store::apply::{Applied, ExportBatch, apply};
use tasker_shared::store::tasks::{self, TaskRow};
use tasker_shared::store::{locks, steps};
use tasker_shared::template::Keep;
use tracing::instrument;
use uuid::Uuid;

use super::decisions::{decide_with_all_it_needs, lock_limits, record_flow};
use super::load::{self, Work, load_outputs};
use super::locks::Wait;
use super::outbox::outbox;
use super::{Error, Hint, Look, Shared, actions, measure, nested, waits};

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Settled {
    /// Hints of tasks that somebody else settles right now: to be put back for a moment.
    pub deferred: Vec<Hint>,
    /// Tasks of which somebody else holds a step right now: nothing of them was settled.
    pub locked: HashSet<Uuid>,
    /// Messages about tasks or steps that do not exist, and what is wrong with them.
    pub unknown: Vec<(Hint, &'static str)>,
    /// Tasks that ended.
    pub finished: usize,
    /// Tasks that changed in any way.
    pub moved: usize,
}

/// Settles hints that came from one queue (or from none: then `queue` only names the table
/// that no message is deleted from). A panic is an error like another: it must not end the loop
/// that all other tasks wait for.
#[instrument(level = "debug", skip_all, fields(queue, hints = hints.len()))]
pub async fn settle(shared: &Shared, queue: &str, hints: Vec<Hint>) -> Result<Settled, Error> {
    settle_waiting(shared, queue, hints, Wait::Once).await
}

/// As [`settle`], which leaves out what is locked elsewhere at this moment.
pub(super) async fn settle_waiting(
    shared: &Shared,
    queue: &str,
    hints: Vec<Hint>,
    wait: Wait,
) -> Result<Settled, Error> {
    AssertUnwindSafe(transact(shared, queue, hints, wait)).catch_unwind().await.unwrap_or(Err(Error::Panicked))
}

async fn transact(shared: &Shared, queue: &str, hints: Vec<Hint>, wait: Wait) -> Result<Settled, Error> {
    let (source, count, began) = (measure::source(queue, &hints), hints.len(), Instant::now());
    let (settled, done) = shared
        .lines
        .in_tx(async |conn| {
            if wait != Wait::Once {
                locks::wait_briefly(conn).await?;
            }
            let uuids: Vec<Uuid> = hints.iter().map(|hint| hint.task).collect::<HashSet<_>>().into_iter().collect();
            let rows = tasks::lock(conn, &uuids).await?;
            let (hints, mut settled) = sort_out(conn, hints, &rows, uuids.len()).await?;
            let hints = without_granted(conn, hints).await?;
            let load::Batch { mut works, now, held } = load::load(shared, conn, rows, &hints, wait).await?;
            let hints = without_locked(hints, held, &mut settled);
            let mut hints = without_strangers(hints, &works, &mut settled);
            load_outputs(conn, &mut works, &hints).await?;
            let places = lock_limits(shared, conn, &works, &hints).await?;
            let mut decided = decide_with_all_it_needs(shared, conn, (&mut works, &hints), &places, now).await?;
            let held = hold_open_steps(conn, &decided.0, wait).await?;
            if !held.is_empty() {
                works.retain(|work| !held.contains(&work.row.task.uuid));
                hints = without_locked(hints, held, &mut settled);
                decided = decide_with_all_it_needs(shared, conn, (&mut works, &hints), &places, now).await?;
            }
            let (plans, places) = decided;

            let moved: Vec<(&TaskRow, &Plan)> =
                works.iter().map(|work| &work.row).zip(&plans).filter(|(_, plan)| !plan.is_empty()).collect();
            let export = export_batch(shared, &works, &plans, now);
            let done: Vec<i64> = hints.iter().filter_map(|hint| hint.msg_id).collect();
            let due: Vec<i64> = hints.iter().filter_map(|hint| hint.due_id).collect();
            let traffic = Traffic { queue, done: &done, due: &due, outbox: outbox(&works, &plans) };
            let applied = if moved.is_empty() {
                queue::conclude(conn, &traffic).await?;
                Applied { at: now, cancelled: Vec::new() }
            } else {
                apply(conn, &moved, now, export.as_ref(), &traffic).await?
            };
            record_flow(conn, &plans, &places).await?;
            waits::record(conn, &works, &plans, applied.at).await?;
            nested::record(conn, &works, &plans).await?;
            tell_workers(conn, &applied, &plans).await?;
            settled.moved = moved.len();
            settled.finished = plans.iter().filter(|plan| plan.task_changed && plan.task.state.is_terminal()).count();
            Ok::<_, Error>((settled, actions::Committed { works, plans, applied, began_at: now, export }))
        })
        .await
        .inspect_err(|error| {
            measure::failed(&source);
            // The answer to COMMIT may be what was lost: then the spans are still owed.
            if let Some(exporter) = shared.exporter().filter(|_| error.is_transient()) {
                exporter.doubt();
            }
        })?;
    measure::settled(&source, count, began.elapsed());
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
    let (deferred, unknown): (_, Vec<Hint>) = others.into_iter().partition(|hint| existing.contains(&hint.task));
    let unknown = unknown
        .into_iter()
        .map(|hint| (hint, "task: no such task; it was never created here, or retention removed it"))
        .collect();
    Ok((kept, Settled { deferred, unknown, ..Settled::default() }))
}

/// Takes out the wishes whose message is gone: while this batch was slow somebody else read it too,
/// and granted it. A result says which attempt it is of and may come twice; a suspension that came
/// again after the task was resumed would hold it for ever.
async fn without_granted(conn: &mut PgConnection, hints: Vec<Hint>) -> Result<Vec<Hint>, Error> {
    let wishes: Vec<i64> = hints.iter().filter(|hint| hint.look.is_wish()).filter_map(|hint| hint.msg_id).collect();
    if wishes.is_empty() {
        return Ok(hints);
    }
    let there: HashSet<i64> = queue::lock_requests(conn, &wishes).await?.into_iter().collect();
    let is_open = |hint: &Hint| !hint.look.is_wish() || hint.msg_id.is_none_or(|id| there.contains(&id));
    Ok(hints.into_iter().filter(is_open).collect())
}

/// Takes out the hints about tasks of which somebody else holds a step.
fn without_locked(hints: Vec<Hint>, held: HashSet<Uuid>, settled: &mut Settled) -> Vec<Hint> {
    if held.is_empty() {
        return hints;
    }
    let hints = hints.into_iter().filter(|hint| !held.contains(&hint.task)).collect();
    settled.locked.extend(held);
    hints
}

/// Locks the steps that the ends of their tasks cancel; answers the tasks of which somebody else holds
/// one. Who waits for them in turn does so when they are cancelled.
async fn hold_open_steps(conn: &mut PgConnection, plans: &[Plan], wait: Wait) -> Result<HashSet<Uuid>, Error> {
    let ending: Vec<Uuid> = plans.iter().filter(|plan| plan.cancel_open_steps).map(|plan| plan.task.uuid).collect();
    if ending.is_empty() || wait == Wait::InTurn {
        return Ok(HashSet::new());
    }
    Ok(steps::try_lock_open(conn, &ending).await?.into_iter().collect())
}

/// Takes out the messages that name a step which their task does not have.
fn without_strangers(hints: Vec<Hint>, works: &[Work], settled: &mut Settled) -> Vec<Hint> {
    let works: HashMap<Uuid, &Work> = works.iter().map(|work| (work.row.task.uuid, work)).collect();
    let known = |hint: &Hint| {
        let has = |step| works.get(&hint.task).is_some_and(|work| work.steps.contains_key(&step));
        let knows = |name: &String| works.get(&hint.task).is_some_and(|work| work.index(name).is_some());
        let names: &[String] = if let Look::Operate(_, act) = &hint.look { act.names() } else { &[] };
        hint.msg_id.is_none() || (hint.look.step().is_none_or(has) && names.iter().all(knows))
    };
    let (known, strangers): (Vec<Hint>, Vec<Hint>) = hints.into_iter().partition(known);
    settled.unknown.extend(strangers.into_iter().map(|hint| (hint, "step: no such step of this task")));
    known
}

/// The export batch of this transaction, if any of its tasks is sampled.
fn export_batch(shared: &Shared, works: &[Work], plans: &[Plan], now: DateTime<Utc>) -> Option<ExportBatch> {
    let exporter = shared.exporter()?;
    let task_uuids: Vec<Uuid> = works
        .iter()
        .zip(plans)
        .filter(|(_, plan)| !plan.moves.is_empty())
        .filter(|(work, plan)| work.row.trace_flags & 1 == 1 || may_be_kept(work, plan, now))
        .map(|(work, _)| work.row.task.uuid)
        .collect();
    (!task_uuids.is_empty()).then(|| ExportBatch { batch_id: Uuid::new_v4(), instance: exporter.instance, task_uuids })
}

/// Whether a task that was not sampled ends in a way that its template wants to see, or that of
/// the topmost task of its trace may. The exporter looks at the whole logs and has the last word.
fn may_be_kept(work: &Work, plan: &Plan, now: DateTime<Utc>) -> bool {
    let (keep, task) = (&work.template.keep, &plan.task);
    if !plan.task_changed || !task.state.is_terminal() {
        return false;
    }
    // A nested task in its parent's trace goes with that; one with a trace of its own does not.
    if work.row.parent_task_uuid.is_some() && work.row.remote_span_id.is_some() {
        return work.row.may_be_kept;
    }
    keep.iter().any(|keep| match keep {
        Keep::Failed => task.state != TaskState::Complete,
        Keep::Retried => true,
        // The commit is a little later than now.
        Keep::SlowerThan(limit) => {
            (now - work.row.task.generation_began_at).to_std().is_ok_and(|took| took + Duration::from_secs(1) > *limit)
        }
    })
}

async fn tell_workers(conn: &mut PgConnection, applied: &Applied, plans: &[Plan]) -> Result<(), Error> {
    let cancelled = applied.cancelled.iter().filter_map(|step| step.claimed_by.as_ref());
    let workers: BTreeSet<&String> = cancelled.chain(plans.iter().flat_map(|plan| &plan.tell)).collect();
    if !workers.is_empty() {
        queue::notify_cancelled(conn, &workers.into_iter().cloned().collect::<Vec<_>>()).await?;
    }
    Ok(())
}
