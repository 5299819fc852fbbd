//! What nobody sends a message for: due retries, lost claims, timeouts, delayed starts, schedules.
//!
//! A timer is read like a message: put off for a moment, settled, deleted in the same
//! transaction. It decides nothing; the rows do.

use sqlx::PgConnection;
use tasker_shared::state_machine::Event;
use tasker_shared::store::Error as StoreError;
use tracing::instrument;
use uuid::Uuid;

use super::{Error, Shared, batch};

/// Hints taken in one go.
const TAKE: i32 = 500;

/// What a sweep found.
#[derive(Debug)]
pub struct Swept {
    /// How many timers were taken.
    pub taken: usize,
    /// Those that say that a schedule is due: they are not settled here.
    pub schedules: Vec<i64>,
}

/// Settles what is due of tasks.
#[instrument(level = "debug", skip_all)]
pub async fn sweep(shared: &Shared) -> Result<Swept, Error> {
    let due = take_due(&mut *shared.reads.acquire().await.map_err(StoreError::from)?, TAKE).await?;
    let taken = due.len();
    // What is deferred stays put off and comes back.
    batch::run_found(shared, due.iter().filter_map(event)).await?;
    let schedules = due.iter().filter(|due| due.kind == "schedule").map(|due| due.due_id).collect();
    Ok(Swept { taken, schedules })
}

/// Looks at the locks of the workers that hold claims. The claims of those among the suspects that
/// still have none end now; the sweep is woken for them, and for those whose lease has run out.
#[instrument(level = "debug", skip_all)]
pub async fn look_for_dead_workers(shared: &Shared, suspects: &[Unlocked]) -> Result<LookedAt, StoreError> {
    let looked_at = look_at_locks(&mut *shared.reads.acquire().await?, suspects).await?;
    for dead in looked_at.unlocked.iter().filter(|worker| worker.dead) {
        tracing::warn!(worker = dead.worker, "a worker has died: its session is gone; its steps run again elsewhere");
    }
    if looked_at.overdue {
        shared.due.notify_one();
    }
    Ok(looked_at)
}

fn event(due: &Timer) -> Option<(Uuid, Event, Option<i64>)> {
    let event = match (due.kind.as_str(), due.step_uuid) {
        ("lease", Some(step)) => Event::LeaseDue { step },
        ("retry", Some(step)) => Event::RetryDue { step },
        ("queue_timeout", Some(step)) => Event::QueueDue { step },
        ("timer", Some(step)) => Event::TimerDue { step },
        ("step_timeout", Some(step)) => Event::StepTotalDue { step },
        ("signal", _) => Event::SignalDue,
        ("total_timeout", _) => Event::TotalDue,
        ("start", _) => Event::Start,
        _ => return None,
    };
    Some((due.task_uuid?, event, Some(due.due_id)))
}

// The statements.

/// A timer that has fired: a row of `tasker.due`.
#[derive(Debug, Clone)]
struct Timer {
    due_id: i64,
    kind: String,
    task_uuid: Option<Uuid>,
    step_uuid: Option<Uuid>,
}

/// Takes what is due, up to `max` hints, and puts it off for 5 s: see `tasker.take_due`.
async fn take_due(conn: &mut PgConnection, max: i32) -> Result<Vec<Timer>, StoreError> {
    Ok(sqlx::query_as!(
        Timer,
        r#"select due_id as "due_id!", kind as "kind!", task_uuid, step_uuid from tasker.take_due($1)"#,
        max
    )
    .fetch_all(conn)
    .await?)
}

/// What the sweep may sleep on.
#[derive(Debug, Clone, Copy)]
pub struct Ahead {
    /// How long until something is due, by the database's clock; `None` if nothing is.
    pub due_ms: Option<i64>,
    /// Whether somebody may hold a claim.
    pub claims: bool,
}

/// What is ahead.
pub async fn ahead(conn: &mut PgConnection) -> Result<Ahead, StoreError> {
    Ok(sqlx::query_as!(
        Ahead,
        r#"select (extract(epoch from min(due_at) - clock_timestamp()) * 1000)::bigint as due_ms,
             exists (select from tasker.due where kind = 'lease') as "claims!"
           from tasker.due"#
    )
    .fetch_one(conn)
    .await?)
}

/// A worker whose advisory lock nobody held.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "columns of tasker.workers, explained there")]
pub struct Unlocked {
    pub worker: String,
    pub lock_key: i64,
    /// It was suspected before, so its claims have ended.
    pub dead: bool,
}

/// What a look at the locks of the workers that hold claims came to.
#[derive(Debug, Default)]
pub struct LookedAt {
    /// Whether somebody may hold a claim.
    pub claims: bool,
    /// Whether a lease has run out.
    pub overdue: bool,
    /// The workers whose lock was free.
    pub unlocked: Vec<Unlocked>,
}

/// Looks at the locks of the workers that hold claims, and ends the claims of those that are
/// `suspected` and still have none: see `tasker.look_for_dead_workers`.
async fn look_at_locks(conn: &mut PgConnection, suspected: &[Unlocked]) -> Result<LookedAt, StoreError> {
    let workers: Vec<String> = suspected.iter().map(|suspect| suspect.worker.clone()).collect();
    let keys: Vec<i64> = suspected.iter().map(|suspect| suspect.lock_key).collect();
    let rows = sqlx::query!(
        r#"select held as "held!", overdue as "overdue!", worker, lock_key, dead as "dead!" from tasker.look_for_dead_workers($1, $2)"#,
        &workers,
        &keys
    )
    .fetch_all(conn)
    .await?;
    let mut looked_at = LookedAt::default();
    for row in rows {
        looked_at.claims |= row.held;
        looked_at.overdue |= row.overdue;
        if let (Some(worker), Some(lock_key)) = (row.worker, row.lock_key) {
            looked_at.unlocked.push(Unlocked { worker, lock_key, dead: row.dead });
        }
    }
    Ok(looked_at)
}
