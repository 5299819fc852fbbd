//! Schedules whose time has come: their tasks are submitted and their next ticks planned.
//!
//! A timer of the kind `schedule` says only that some schedule is due; the rows say which. A tick runs
//! once, because submitting it and moving `next_at` on are one transaction under the row's lock.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::schedule::{DueRuns, Missed, Timing, due_runs};
use tasker_shared::store::tx::in_tx;
use tasker_shared::store::{Error, Fault};
use tracing::instrument;
use uuid::Uuid;

use crate::lifecycle::queue::{self, QueueChanges};
use crate::lifecycle::{self, Shared, locks};

/// Fires what is due, and forgets the hints that said so; not if some of it was left, because somebody
/// else holds it.
#[instrument(level = "debug", skip_all)]
pub async fn run(shared: &Shared, hints: &[i64]) -> Result<(), lifecycle::Error> {
    let mut left = false;
    loop {
        match fire(shared, None).await {
            Ok(fired) => {
                left |= fired.left;
                if !fired.is_full() {
                    break;
                }
            }
            // A key of one of them is somebody else's for now, and nothing says of which.
            Err(error) if error.fault() == Fault::Locked => {
                left = true;
                let due = due(&mut *shared.reads.acquire().await?).await?;
                for schedule in due {
                    match fire(shared, Some(schedule)).await {
                        Ok(_) => {}
                        Err(error) if error.fault() == Fault::Locked => shared.locks.met("schedules", 1),
                        Err(error) => return Err(error),
                    }
                }
                break;
            }
            Err(error) => return Err(error),
        }
    }
    if left {
        // The hint comes back.
        return Ok(());
    }
    // Only now: a hint that nobody could deal with comes back.
    queue::conclude(&mut *shared.pool.acquire().await?, &QueueChanges { due: hints, ..QueueChanges::default() })
        .await?;
    Ok(())
}

async fn fire(shared: &Shared, only: Option<Uuid>) -> Result<Fired, lifecycle::Error> {
    let fired = in_tx(&shared.pool, async |conn| {
        locks::wait_briefly(conn).await?;
        Ok::<Fired, lifecycle::Error>(fire_due(conn, only).await?)
    })
    .await?;
    for problem in &fired.problems {
        tracing::warn!(problem, "a schedule's tick brought no task");
    }
    if !fired.tasks.is_empty() {
        tracing::debug!(tasks = fired.tasks.len(), "schedules submitted tasks");
    }
    if fired.left && only.is_none() {
        shared.locks.met("schedules", 1);
    }
    Ok(fired)
}

// The statements.

/// Schedules that are looked at in one transaction.
const MANY: i64 = 100;

/// What a pass over the due schedules did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fired {
    /// Schedules that were looked at; as many as fit in one pass means there may be more.
    pub looked_at: usize,
    /// Tasks that were submitted.
    pub tasks: Vec<Uuid>,
    /// Ticks that brought no task, and why.
    pub problems: Vec<String>,
    /// Some are due still: somebody else holds them.
    pub left: bool,
}

impl Fired {
    /// Whether more schedules may be due.
    pub fn is_full(&self) -> bool {
        i64::try_from(self.looked_at) == Ok(MANY)
    }
}

/// Submits the tasks of every tick that is due by the database's clock, and plans the next ones,
/// all in the caller's transaction: of all schedules, or of one alone. One that somebody else holds is
/// left, and the hint that found it must not be forgotten.
pub async fn fire_due(conn: &mut PgConnection, only: Option<Uuid>) -> Result<Fired, Error> {
    let rows = sqlx::query!(
        r#"select schedule_uuid, cron, time_zone, every_ms, once_at, anchor_at, missed, planned, next_at as "next_at!",
             clock_timestamp() as "now!"
           from tasker.schedules where not paused and next_at <= clock_timestamp() and ($2::uuid is null or schedule_uuid = $2)
           order by schedule_uuid limit $1 for no key update skip locked"#,
        MANY,
        only
    )
    .fetch_all(&mut *conn)
    .await?;
    let mut fired = Fired { looked_at: rows.len(), ..Fired::default() };
    let (mut due, mut ticks) = (Vec::new(), Vec::new());
    let (mut ids, mut nexts, mut problems) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let timing =
            Timing::new(row.cron.as_deref(), row.time_zone.as_deref(), row.every_ms, row.once_at, row.anchor_at);
        let (found, problem) = match timing {
            Err(refused) => (DueRuns::default(), Some(refused.to_string())),
            Ok(timing) if !row.planned => first(&timing, row.now),
            Ok(timing) => (due_runs(&timing, missed(&row.missed), row.next_at, row.now), None),
        };
        due.extend(found.runs.iter().map(|_| row.schedule_uuid));
        ticks.extend(found.runs);
        ids.push(row.schedule_uuid);
        nexts.push(found.next);
        problems.push(problem);
    }
    fired.left = self::due(conn).await?.iter().any(|schedule| !ids.contains(schedule));
    if ids.is_empty() {
        return Ok(fired);
    }
    if !due.is_empty() {
        let answers = sqlx::query!(
            r#"select f.task_uuid, f.problem from unnest($1::uuid[], $2::timestamptz[]) with ordinality as u(schedule, tick, place)
               cross join lateral tasker.fire_schedule(u.schedule, u.tick) f order by u.place"#,
            &due,
            &ticks
        )
        .fetch_all(&mut *conn)
        .await?;
        for answer in answers {
            fired.tasks.extend(answer.task_uuid);
            fired.problems.extend(answer.problem);
        }
    }
    sqlx::query!(
        "with moved as (
           update tasker.schedules s set next_at = n.next_at, planned = true, problem = coalesce(n.problem, s.problem)
           from unnest($1::uuid[], $2::timestamptz[], $3::text[]) n(schedule_uuid, next_at, problem)
           where s.schedule_uuid = n.schedule_uuid
           returning s.next_at
         )
         insert into tasker.due (due_at, kind) select distinct next_at, 'schedule' from moved where next_at is not null",
        &ids,
        &nexts as &[Option<DateTime<Utc>>],
        &problems as &[Option<String>]
    )
    .execute(conn)
    .await?;
    Ok(fired)
}

/// The schedules that are due, as far as they fit in one transaction.
pub async fn due(conn: &mut PgConnection) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(
        "select schedule_uuid from tasker.schedules where not paused and next_at <= clock_timestamp() order by schedule_uuid limit $1",
        MANY
    )
    .fetch_all(conn)
    .await?)
}

/// The first tick of a schedule that was just set or resumed.
fn first(timing: &Timing, now: DateTime<Utc>) -> (DueRuns, Option<String>) {
    let next = timing.next_after(now);
    (DueRuns { runs: Vec::new(), next }, next.is_none().then(|| timing.never().to_string()))
}

fn missed(word: &str) -> Missed {
    match word {
        "skip" => Missed::Skip,
        "run_all" => Missed::RunAll,
        _ => Missed::RunOnce,
    }
}
