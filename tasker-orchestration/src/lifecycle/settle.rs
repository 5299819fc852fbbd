//! THE transaction: lock, load, decide, apply, send, delete, commit; then the actions.
//!
//! A batch of hints settles in one transaction with set-based statements, so the cost of a
//! step falls as the load rises. This file must never decide anything itself: `load` reads what
//! the decisions need and asks for them, `write` writes all of it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::FutureExt as _;
use sqlx::PgConnection;
use tasker_shared::metrics::metrics;
use tasker_shared::state_machine::TaskState;
use tasker_shared::state_machine::plan::{Plan, Task};
use tasker_shared::store::tasks;
use tasker_shared::template::Keep;
use tracing::instrument;
use uuid::Uuid;

use super::limits::{lock_limits, record_flow};
use super::load::{self, decide_all, load_outputs};
use super::loaded::LoadedTask;
use super::locks::{self, Wait};
use super::queue::{self, QueueChanges};
use super::read::{self, TaskRow};
use super::write::{Applied, Committed, ExportBatch, apply, outbox};
use super::{About, Error, Shared, actions, measure, nested, waits};

/// What became of a batch.
#[derive(Debug, Default)]
pub(super) struct Settled<'a> {
    /// Events of tasks that somebody else settles right now: to be put back for a moment.
    pub deferred: Vec<About<'a>>,
    /// Tasks of which somebody else holds a step right now: nothing of them was settled.
    pub locked: HashSet<Uuid>,
    /// Messages about tasks or steps that do not exist, and what is wrong with them.
    pub unknown: Vec<(About<'a>, &'static str)>,
    /// Tasks that changed in any way.
    pub moved: usize,
}

/// Settles events that came from one queue (or from none: then `queue` only names the table that no
/// message is deleted from). A panic is an error like another: it must not end the loop that all other
/// tasks wait for.
#[instrument(level = "debug", skip_all, fields(queue, events = events.len()))]
pub(super) async fn settle<'a>(
    shared: &Shared,
    queue: &str,
    events: Vec<About<'a>>,
    wait: Wait,
) -> Result<Settled<'a>, Error> {
    let (source, count, began) = (measure::source(queue, &events), events.len(), Instant::now());
    let transaction = shared.connections.in_tx(async |conn| transact(shared, conn, queue, events, wait).await);
    let result = AssertUnwindSafe(transaction).catch_unwind().await.unwrap_or(Err(Error::Panicked));
    let (settled, committed) = result.inspect_err(|error| {
        metrics().settle_failures.of(&source).inc();
        // The answer to COMMIT may be what was lost: then the spans are still owed.
        if let Some(exporter) = shared.exporter().filter(|_| error.is_transient()) {
            exporter.doubt();
        }
    })?;
    measure::settled(&source, count, began.elapsed());
    actions::run(shared, committed);
    Ok(settled)
}

/// THE transaction.
async fn transact<'a>(
    shared: &Shared,
    conn: &mut PgConnection,
    queue: &str,
    events: Vec<About<'a>>,
    wait: Wait,
) -> Result<(Settled<'a>, Committed), Error> {
    if wait != Wait::Once {
        locks::wait_briefly(conn).await?;
    }
    let uuids: Vec<Uuid> = events.iter().map(|about| about.task).collect::<HashSet<_>>().into_iter().collect();
    let rows = read::lock_tasks(conn, &uuids).await?;
    let (events, mut settled) = sort_out(conn, events, &rows, uuids.len()).await?;
    let events = without_granted(conn, events).await?;
    let load::Batch { mut tasks, now, held } = load::load(shared, conn, rows, &events, wait).await?;
    let events = without_locked(events, held, &mut settled);
    let mut events = without_unknown_steps(events, &tasks, &mut settled);
    load_outputs(conn, &mut tasks, &events).await?;
    let slots = lock_limits(shared, conn, &tasks, &events).await?;
    let mut decided = decide_all(shared, conn, (&mut tasks, &events), &slots, now).await?;
    let held = hold_open_steps(conn, &decided.0, wait).await?;
    if !held.is_empty() {
        tasks.retain(|task| !held.contains(&task.task().uuid));
        events = without_locked(events, held, &mut settled);
        decided = decide_all(shared, conn, (&mut tasks, &events), &slots, now).await?;
    }
    let (plans, slots) = decided;

    let moved: Vec<(&Task, &Plan)> =
        tasks.iter().map(LoadedTask::task).zip(&plans).filter(|(_, plan)| !plan.is_empty()).collect();
    let export = export_batch(shared, &tasks, &plans, now);
    let done: Vec<i64> = events.iter().filter_map(|about| about.msg_id).collect();
    let due: Vec<i64> = events.iter().filter_map(|about| about.due_id).collect();
    let changes = QueueChanges { queue, done: &done, due: &due, outbox: outbox(&tasks, &plans) };
    let applied = if moved.is_empty() {
        queue::conclude(conn, &changes).await?;
        Applied { at: now, cancelled: Vec::new() }
    } else {
        apply(conn, &moved, now, export.as_ref(), &changes).await?
    };
    record_flow(conn, &plans, &slots).await?;
    waits::record(conn, &tasks, &plans, applied.at).await?;
    nested::record(conn, &tasks, &plans).await?;
    tell_workers(conn, &applied, &plans).await?;
    settled.moved = moved.len();
    Ok((settled, Committed { tasks, plans, applied, began_at: now, export }))
}

/// Keeps the events of the tasks that were locked; the others are deferred or unknown.
async fn sort_out<'a>(
    conn: &mut PgConnection,
    events: Vec<About<'a>>,
    rows: &[(Task, TaskRow)],
    wanted: usize,
) -> Result<(Vec<About<'a>>, Settled<'a>), Error> {
    if rows.len() == wanted {
        return Ok((events, Settled::default()));
    }
    let locked: HashSet<Uuid> = rows.iter().map(|(task, _)| task.uuid).collect();
    let (kept, others): (Vec<About>, Vec<About>) = events.into_iter().partition(|about| locked.contains(&about.task));
    let ids: Vec<Uuid> = others.iter().map(|about| about.task).collect();
    let existing: HashSet<Uuid> = tasks::existing(conn, &ids).await?.into_iter().collect();
    let (deferred, unknown): (_, Vec<About>) = others.into_iter().partition(|about| existing.contains(&about.task));
    let unknown = unknown
        .into_iter()
        .map(|about| (about, "task: no such task; it was never created here, or retention removed it"))
        .collect();
    Ok((kept, Settled { deferred, unknown, ..Settled::default() }))
}

/// Takes out the requests of operators whose message is gone: while this batch was slow somebody else
/// read it too, and granted it. A result says which attempt it is of and may come twice; a suspension
/// that came again after the task was resumed would hold it for ever.
async fn without_granted<'a>(conn: &mut PgConnection, events: Vec<About<'a>>) -> Result<Vec<About<'a>>, Error> {
    let requests = events.iter().filter(|about| about.event.is_request());
    let requests: Vec<i64> = requests.filter_map(|about| about.msg_id).collect();
    if requests.is_empty() {
        return Ok(events);
    }
    let there: HashSet<i64> = queue::lock_requests(conn, &requests).await?.into_iter().collect();
    let is_open = |about: &About| !about.event.is_request() || about.msg_id.is_none_or(|id| there.contains(&id));
    Ok(events.into_iter().filter(is_open).collect())
}

/// Takes out the events of tasks of which somebody else holds a step.
fn without_locked<'a>(events: Vec<About<'a>>, held: HashSet<Uuid>, settled: &mut Settled<'a>) -> Vec<About<'a>> {
    if held.is_empty() {
        return events;
    }
    let events = events.into_iter().filter(|about| !held.contains(&about.task)).collect();
    settled.locked.extend(held);
    events
}

/// Locks the steps that the ends of their tasks cancel; answers the tasks of which somebody else holds
/// one. Who waits for them in turn does so when they are cancelled.
async fn hold_open_steps(conn: &mut PgConnection, plans: &[Plan], wait: Wait) -> Result<HashSet<Uuid>, Error> {
    let ending: Vec<Uuid> = plans.iter().filter(|plan| plan.cancel_open_steps).map(|plan| plan.task.uuid).collect();
    if ending.is_empty() || wait == Wait::InTurn {
        return Ok(HashSet::new());
    }
    Ok(read::try_lock_open(conn, &ending).await?.into_iter().collect())
}

/// Takes out the messages that name a step which their task does not have.
fn without_unknown_steps<'a>(
    events: Vec<About<'a>>,
    tasks: &[LoadedTask],
    settled: &mut Settled<'a>,
) -> Vec<About<'a>> {
    let tasks: HashMap<Uuid, &LoadedTask> = tasks.iter().map(|task| (task.task().uuid, task)).collect();
    let known = |about: &About| {
        let task = tasks.get(&about.task);
        let has = |step| task.is_some_and(|task| task.step(step).is_some());
        let knows = |name: &String| task.is_some_and(|task| task.index(name).is_some());
        about.msg_id.is_none() || (about.event.step().is_none_or(has) && about.event.names().iter().all(knows))
    };
    let (known, unknown): (Vec<About>, Vec<About>) = events.into_iter().partition(known);
    settled.unknown.extend(unknown.into_iter().map(|about| (about, "step: no such step of this task")));
    known
}

/// The export batch of this transaction, if any of its tasks is sampled.
fn export_batch(shared: &Shared, tasks: &[LoadedTask], plans: &[Plan], now: DateTime<Utc>) -> Option<ExportBatch> {
    let exporter = shared.exporter()?;
    let task_uuids: Vec<Uuid> = tasks
        .iter()
        .zip(plans)
        .filter(|(_, plan)| !plan.moves.is_empty())
        .filter(|(task, plan)| task.row.trace_flags & 1 == 1 || may_be_kept(task, plan, now))
        .map(|(task, _)| task.task().uuid)
        .collect();
    (!task_uuids.is_empty()).then(|| ExportBatch { batch_id: Uuid::new_v4(), instance: exporter.instance, task_uuids })
}

/// Whether a task that was not sampled ends in a way that its template wants to see, or that of
/// the topmost task of its trace may. The exporter looks at the whole logs and has the last word.
fn may_be_kept(loaded: &LoadedTask, plan: &Plan, now: DateTime<Utc>) -> bool {
    let (keep, task) = (&loaded.template.keep, &plan.task);
    if !plan.task_changed || !task.state.is_terminal() {
        return false;
    }
    // A nested task in its parent's trace goes with that; one with a trace of its own does not.
    if loaded.row.parent_task_uuid.is_some() && loaded.row.remote_span_id.is_some() {
        return loaded.row.may_be_kept;
    }
    keep.iter().any(|keep| match keep {
        Keep::Failed => task.state != TaskState::Complete,
        Keep::Retried => true,
        // The commit is a little later than now.
        Keep::SlowerThan(limit) => {
            (now - loaded.task().generation_began_at).to_std().is_ok_and(|took| took + Duration::from_secs(1) > *limit)
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
