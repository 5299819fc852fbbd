//! Schedule rows: find what is due, submit it, and move each schedule on to its next tick.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use crate::schedule::{Look, Missed, Refused, Schedule, Timing, look};

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
            Err(refused) => (Look::default(), Some(refused.to_string())),
            Ok(timing) if !row.planned => first(&timing, row.now),
            Ok(timing) => (look(&timing, missed(&row.missed), row.next_at, row.now), None),
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
fn first(timing: &Timing, now: DateTime<Utc>) -> (Look, Option<String>) {
    let next = timing.next_after(now);
    (Look { runs: Vec::new(), next }, next.is_none().then(|| timing.never().to_string()))
}

fn missed(word: &str) -> Missed {
    match word {
        "skip" => Missed::Skip,
        "run_all" => Missed::RunAll,
        _ => Missed::RunOnce,
    }
}

/// A schedule as people see it. Times are the database's.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.schedules, explained there")]
pub struct ScheduleView {
    pub schedule_uuid: Uuid,
    pub namespace: String,
    pub name: String,
    pub template: String,
    pub version: Option<String>,
    pub input: Value,
    pub priority: i32,
    pub cron: Option<String>,
    pub time_zone: Option<String>,
    pub every_ms: Option<i64>,
    pub once_at: Option<DateTime<Utc>>,
    pub anchor_at: DateTime<Utc>,
    pub missed: String,
    pub overlap: String,
    pub paused: bool,
    /// False: an orchestrator has yet to work `next_at` out.
    pub planned: bool,
    pub next_at: Option<DateTime<Utc>>,
    pub last_at: Option<DateTime<Utc>>,
    pub last_task: Option<Uuid>,
    pub runs: i64,
    pub skipped: i64,
    pub problem: Option<String>,
}

impl ScheduleView {
    /// The next `count` ticks; fewer, or none, if it is paused, ends or cannot be read.
    pub fn next_ticks(&self, count: usize) -> Vec<DateTime<Utc>> {
        let timing = self.timing();
        let first = self.next_at.filter(|_| self.planned && !self.paused);
        let following = |tick: &DateTime<Utc>| timing.as_ref().ok()?.next_after(*tick);
        std::iter::successors(first, following).take(count).collect()
    }

    /// When it ticks.
    pub fn timing(&self) -> Result<Timing, Refused> {
        Timing::new(self.cron.as_deref(), self.time_zone.as_deref(), self.every_ms, self.once_at, self.anchor_at)
    }
}

/// Schedules by name: of one namespace, or one of that namespace and name, or all.
pub async fn list(
    conn: &mut PgConnection,
    namespace: Option<&str>,
    name: Option<&str>,
) -> Result<Vec<ScheduleView>, Error> {
    Ok(sqlx::query_as!(
        ScheduleView,
        "select schedule_uuid, namespace, name, template, version, input, priority, cron, time_zone, every_ms, once_at, anchor_at,
           missed, overlap, paused, planned, next_at, last_at, last_task, runs, skipped, problem
         from tasker.schedules
         where ($1::text is null or namespace = $1) and ($2::text is null or name = $2) order by namespace, name",
        namespace,
        name
    )
    .fetch_all(conn)
    .await?)
}

/// Creates or changes a schedule; answers created, changed or unchanged.
pub async fn set(
    conn: &mut PgConnection,
    schedule: &Schedule,
    every_ms: Option<i64>,
    actor: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.set_schedule(namespace => $1, name => $2, template => $3, cron => $4, time_zone => $5,
             every => make_interval(secs => $6::bigint / 1000.0), once_at => $7, version => $8, input => $9, priority => $10,
             missed => $11, overlap => $12, paused => $13, actor => coalesce($14, session_user::text)) as "answer!""#,
        schedule.namespace,
        schedule.name,
        schedule.template,
        schedule.cron,
        schedule.time_zone,
        every_ms,
        schedule.once_at,
        schedule.version,
        schedule.input,
        schedule.priority,
        schedule.missed.as_str(),
        schedule.overlap.as_str(),
        schedule.paused,
        actor
    )
    .fetch_one(conn)
    .await?)
}

/// Pauses or resumes a schedule; answers accepted, or why not.
pub async fn pause(
    conn: &mut PgConnection,
    (namespace, name): (&str, &str),
    pause: bool,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.pause_schedule(namespace => $1, name => $2, pause => $3, reason => $4,
             actor => coalesce($5, session_user::text)) as "answer!""#,
        namespace,
        name,
        pause,
        reason,
        actor
    )
    .fetch_one(conn)
    .await?)
}

/// Deletes a schedule; answers accepted, or why not.
pub async fn delete(
    conn: &mut PgConnection,
    (namespace, name): (&str, &str),
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.delete_schedule(namespace => $1, name => $2, reason => $3,
             actor => coalesce($4, session_user::text)) as "answer!""#,
        namespace,
        name,
        reason,
        actor
    )
    .fetch_one(conn)
    .await?)
}

/// Runs a schedule now: the task, or why there is none.
pub async fn trigger(
    conn: &mut PgConnection,
    (namespace, name): (&str, &str),
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<Result<Uuid, String>, Error> {
    let row = sqlx::query!(
        "select task_uuid, problem from tasker.trigger_schedule(namespace => $1, name => $2, reason => $3,
           actor => coalesce($4, session_user::text))",
        namespace,
        name,
        reason,
        actor
    )
    .fetch_one(conn)
    .await?;
    Ok(row.task_uuid.ok_or_else(|| row.problem.unwrap_or_default()))
}
