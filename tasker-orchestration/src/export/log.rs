//! What the export alone asks the log: how much there is to read, and whether the trace of a task that
//! was not sampled is kept for the end of its topmost task.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use tasker_shared::store::Error;
use tasker_shared::store::transitions;
use tasker_shared::template::Keep;
use tasker_shared::trace::log::TaskLog;
use uuid::Uuid;

use super::sampling::{Kept, is_sampled, is_within};

/// How much there is to read of a task.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// The task.
    pub task: Uuid,
    /// Whether its trace was chosen when it began.
    pub is_sampled: bool,
    /// Rows of its log: the versions of a task and of its steps count them.
    pub rows: usize,
}

/// How long the logs of these tasks are, without reading them.
pub async fn sizes(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<Size>, Error> {
    let rows = sqlx::query!(
        r#"select t.task_uuid, t.trace_flags & 1 = 1 as "is_sampled!",
             t.version + (select coalesce(sum(s.version), 0) from tasker.steps s where s.task_uuid = t.task_uuid) as "rows!"
           from tasker.tasks t where t.task_uuid = any($1)"#,
        task_uuids
    )
    .fetch_all(conn)
    .await?;
    let size = |n: i64| usize::try_from(n).unwrap_or(0);
    Ok(rows
        .into_iter()
        .map(|row| Size { task: row.task_uuid, is_sampled: row.is_sampled, rows: size(row.rows) })
        .collect())
}

/// How many moves a task made at each of these times, in order.
pub async fn moves_at(
    conn: &mut PgConnection,
    task: Uuid,
    times: &[DateTime<Utc>],
) -> Result<Vec<(DateTime<Utc>, usize)>, Error> {
    let rows = sqlx::query!(
        r#"select at, count(*) as "moves!" from tasker.transitions where task_uuid = $1 and at = any($2) group by at order by at"#,
        task,
        times
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.at, usize::try_from(row.moves).unwrap_or(0))).collect())
}

/// Which of these tasks, of those that were not sampled when their trace began, are in a trace
/// that is kept for the end of its topmost task. No statement if all are sampled.
pub async fn kept(conn: &mut PgConnection, logs: &[TaskLog]) -> Result<HashMap<Uuid, Kept>, Error> {
    let unsampled = || logs.iter().filter(|log| !is_sampled(&log.head));
    let within: Vec<Uuid> = unsampled().filter(|log| is_within(&log.head)).map(|log| log.head.task_uuid).collect();
    let above = if within.is_empty() { HashMap::new() } else { topmost(conn, &within).await? };
    let topmost_of = |log: &TaskLog| {
        let own = log.head.task_uuid;
        if is_within(&log.head) { above.get(&own).copied() } else { Some(own) }
    };
    let tops: Vec<Uuid> = unsampled().filter_map(topmost_of).collect::<HashSet<_>>().into_iter().collect();
    let keeps = if tops.is_empty() { HashMap::new() } else { keeps(conn, &tops).await? };
    let here: HashMap<Uuid, &TaskLog> = logs.iter().map(|log| (log.head.task_uuid, log)).collect();
    let elsewhere: Vec<Uuid> = keeps.keys().copied().filter(|top| !here.contains_key(top)).collect();
    let elsewhere = if elsewhere.is_empty() { Vec::new() } else { transitions::logs(conn, &elsewhere).await? };
    let tops = here.into_values().chain(&elsewhere);
    let tops: HashMap<Uuid, Kept> =
        tops.filter_map(|log| Some((log.head.task_uuid, Kept::of(log, keeps.get(&log.head.task_uuid)?)?))).collect();
    Ok(unsampled().filter_map(|log| Some((log.head.task_uuid, tops.get(&topmost_of(log)?)?.clone()))).collect())
}

/// The topmost task of the trace of each of these nested tasks.
async fn topmost(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<HashMap<Uuid, Uuid>, Error> {
    let rows = sqlx::query!(
        r#"with recursive up as (
             select t.task_uuid, t.task_uuid as above, t.parent_task_uuid, t.remote_span_id
             from tasker.tasks t where t.task_uuid = any($1)
             union all
             select u.task_uuid, t.task_uuid, t.parent_task_uuid, t.remote_span_id
             from up u join tasker.tasks t on t.task_uuid = u.parent_task_uuid and u.remote_span_id is not null
           )
           select task_uuid as "task_uuid!", above as "above!"
           from up where parent_task_uuid is null or remote_span_id is null"#,
        task_uuids
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.task_uuid, row.above)).collect())
}

/// Whether the task that awaited this one took note of its end, and so on up to the topmost: then
/// the end of the topmost came after it.
pub async fn is_noted(conn: &mut PgConnection, task: Uuid) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"with recursive up as (
             select t.task_uuid, t.parent_task_uuid, t.parent_step_uuid, t.parent_attempt, t.remote_span_id, true as noted
             from tasker.tasks t where t.task_uuid = $1
             union all
             select p.task_uuid, p.parent_task_uuid, p.parent_step_uuid, p.parent_attempt, p.remote_span_id, exists (
               select from tasker.transitions r where r.task_uuid = p.task_uuid and r.entity_uuid = u.parent_step_uuid
                 and r.attempt = u.parent_attempt and r.event = 'ChildFinished')
             from up u join tasker.tasks p on p.task_uuid = u.parent_task_uuid and u.remote_span_id is not null
           )
           select bool_and(noted) as "noted!" from up"#,
        task
    )
    .fetch_one(conn)
    .await?)
}

/// What the templates of these tasks want to see of their ends, of those that name something.
async fn keeps(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<HashMap<Uuid, Vec<Keep>>, Error> {
    let rows = sqlx::query!(
        r#"select t.task_uuid, p.definition->'trace'->'keep' as "keep!"
           from tasker.tasks t join tasker.templates p on p.template_id = t.template_id
           where t.task_uuid = any($1) and p.definition->'trace'->'keep' is not null"#,
        task_uuids
    )
    .fetch_all(conn)
    .await?;
    let read = |keep: Value| serde_json::from_value(keep).unwrap_or_default();
    Ok(rows.into_iter().map(|row| (row.task_uuid, read(row.keep))).collect())
}
