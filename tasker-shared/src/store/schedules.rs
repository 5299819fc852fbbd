//! Schedules as people set and see them. Orchestrators alone fire them.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use crate::schedule::{Refused, Schedule, Timing};

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
