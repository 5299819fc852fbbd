//! The log, read back: what the tree is built from when memory does not hold it.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use super::tasks::{self, bytes};
use crate::redact;
use crate::state_machine::plan::{Detail, Failure};
use crate::state_machine::states::Change;
use crate::trace::log::{Attempt, Head, StepInfo, TaskLog, Transition};

/// The whole log of each of these tasks; tasks that do not exist are not in the answer.
pub async fn logs(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<TaskLog>, Error> {
    let mut logs = heads(conn, task_uuids).await?;
    read_steps(conn, task_uuids, &mut logs).await?;
    read_transitions(conn, task_uuids, &mut logs).await?;
    read_attempts(conn, task_uuids, &mut logs).await?;
    Ok(logs.into_values().collect())
}

/// Slices of the logs of these tasks: what they moved at these times, and with it the attempts that
/// were open then. The spans that were settled at these times are the same as from the whole logs.
pub async fn slices(
    conn: &mut PgConnection,
    task_uuids: &[Uuid],
    times: &[DateTime<Utc>],
) -> Result<Vec<TaskLog>, Error> {
    let mut logs = heads(conn, task_uuids).await?;
    let rows = sqlx::query_as!(
        LogRow,
        r#"with moved as materialized (
             select * from tasker.transitions where task_uuid = any($1) and at = any($2)
           ), touched as (
             -- The Enqueue of an attempt after a lost one is a move of the lost one.
             select m.task_uuid, m.entity_uuid, min(m.attempt) - 1 as attempt, max(m.version) as version
             from moved m where m.entity_uuid <> m.task_uuid and m.attempt is not null group by 1, 2
           )
           select task_uuid as "task_uuid!", entity_uuid as "entity_uuid!", version as "version!", task_version,
             generation as "generation!", attempt, from_state as "from_state!", to_state as "to_state!", event as "event!",
             actor, began_at as "began_at!", at as "at!", detail
           from moved
           union all
           select r.task_uuid, r.entity_uuid, r.version, r.task_version, r.generation, r.attempt, r.from_state, r.to_state,
             r.event, r.actor, r.began_at, r.at, r.detail
           from touched t join tasker.transitions r on r.task_uuid = t.task_uuid and r.entity_uuid = t.entity_uuid
           where r.version < t.version and r.attempt >= t.attempt and r.at <> all($2)
           union all
           -- When a generation began, its end has to say.
           select r.task_uuid, r.entity_uuid, r.version, r.task_version, r.generation, r.attempt, r.from_state, r.to_state,
             r.event, r.actor, r.began_at, r.at, r.detail
           from unnest($1::uuid[]) t(task) join tasker.transitions r on r.task_uuid = t.task and r.entity_uuid = t.task
           where r.event in ('OperatorRetry', 'Rerun') and r.at <> all($2)"#,
        task_uuids,
        times
    )
    .fetch_all(&mut *conn)
    .await?;
    let (mut tasks, mut steps, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
    let attempts: HashSet<(Uuid, Uuid, i32)> = rows
        .iter()
        .filter(|row| row.entity_uuid != row.task_uuid)
        .map(|row| (row.task_uuid, row.entity_uuid, row.attempt.unwrap_or(0)))
        .collect();
    for (task, step, attempt) in attempts {
        tasks.push(task);
        steps.push(step);
        numbers.push(attempt);
    }
    for row in rows {
        row.enter(&mut logs)?;
    }
    let rows = sqlx::query_as!(
        InfoRow,
        "select s.task_uuid, s.step_uuid, s.step_index, s.item, d.name, d.handler, d.queue, d.max_attempts
         from tasker.steps s join tasker.tasks t on t.task_uuid = s.task_uuid
         join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
         where s.step_uuid = any($1)",
        &steps
    )
    .fetch_all(&mut *conn)
    .await?;
    for row in rows {
        row.enter(&mut logs);
    }
    let rows = sqlx::query_as!(
        AttemptRow,
        "select a.task_uuid, a.step_uuid, a.attempt, a.worker, a.worker_version, a.message_id, a.result_message_id,
           a.claim_began_at, a.claimed_at, a.report_began_at, a.reported_at, a.start_offset_ms, a.run_ms, a.error, a.usage,
           a.milestones
         from unnest($1::uuid[], $2::uuid[], $3::int[]) w(task, step, attempt)
         join tasker.attempts a on a.task_uuid = w.task and a.step_uuid = w.step and a.attempt = w.attempt",
        &tasks,
        &steps,
        &numbers
    )
    .fetch_all(conn)
    .await?;
    for row in rows {
        row.enter(&mut logs);
    }
    Ok(logs.into_values().collect())
}

async fn heads(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<HashMap<Uuid, TaskLog>, Error> {
    let heads = sqlx::query!(
        r#"select t.task_uuid, t.namespace, t.correlation_id, t.parent_correlation_id, t.parent_task_uuid, t.priority,
             t.generation, t.generation_began_at, t.created_at, t.trace_id, t.remote_span_id, t.root_link, t.trace_flags, t.tracestate,
             p.name, p.version
           from tasker.tasks t join tasker.templates p on p.template_id = t.template_id
           where t.task_uuid = any($1)"#,
        task_uuids
    )
    .fetch_all(conn)
    .await?;
    let mut logs: HashMap<Uuid, TaskLog> = HashMap::new();
    for row in heads {
        let id = row.task_uuid;
        let head = Head {
            task_uuid: id,
            namespace: row.namespace.into(),
            task_name: row.name.into(),
            template_version: row.version.into(),
            correlation_id: row.correlation_id,
            parent_correlation_id: row.parent_correlation_id,
            parent_task_uuid: row.parent_task_uuid,
            priority: row.priority,
            generation: row.generation,
            generation_began_at: row.generation_began_at,
            created_at: row.created_at,
            trace_id: bytes(&row.trace_id).ok_or_else(|| Error::bad_row("tasks", "trace_id", id, "needs 16 bytes"))?,
            remote_span_id: row.remote_span_id.as_deref().and_then(bytes),
            root_link: row.root_link,
            trace_flags: tasks::w3c_flags(row.trace_flags),
            tracestate: row.tracestate,
        };
        logs.insert(id, TaskLog { head, transitions: Vec::new(), attempts: Vec::new(), steps: HashMap::new() });
    }
    Ok(logs)
}

/// A task and the tasks that it awaits, and those that these await, at most `limit`: they are one
/// trace.
pub async fn awaited_below(conn: &mut PgConnection, task: Uuid, limit: i64) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(
        r#"with recursive below as (
             select $1::uuid as task_uuid
             union
             select c.child_uuid from below b
             join tasker.children c on c.task_uuid = b.task_uuid and c.awaited and c.child_uuid is not null
           )
           select task_uuid as "task!" from below limit $2"#,
        task,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// The tasks of a trace, the oldest first, at most `limit`.
pub async fn of_trace(conn: &mut PgConnection, trace_id: &[u8; 16], limit: i64) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(
        "select task_uuid from tasker.tasks where trace_id = $1 order by task_uuid limit $2",
        &trace_id[..],
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// The traces of these tasks, each once, in the order of the tasks.
pub async fn traces_of(conn: &mut PgConnection, tasks: &[Uuid]) -> Result<Vec<[u8; 16]>, Error> {
    let rows = sqlx::query!("select task_uuid, trace_id from tasker.tasks where task_uuid = any($1)", tasks)
        .fetch_all(conn)
        .await?;
    let of: HashMap<Uuid, Vec<u8>> = rows.into_iter().map(|row| (row.task_uuid, row.trace_id)).collect();
    let mut traces = Vec::new();
    for id in tasks.iter().filter_map(|task| <[u8; 16]>::try_from(of.get(task)?.as_slice()).ok()) {
        if !traces.contains(&id) {
            traces.push(id);
        }
    }
    Ok(traces)
}

/// An error as it was reported, by a worker in any language: without its secrets from here on.
pub fn failure(error: Value) -> Failure {
    let mut failure = serde_json::from_value::<Failure>(error).unwrap_or_else(|problem| Failure {
        kind: "error".into(),
        message: format!("the recorded error cannot be read: {problem}"),
        retryable: true,
        retry_after_ms: None,
    });
    for text in [&mut failure.kind, &mut failure.message] {
        if let Cow::Owned(clean) = redact::text(text) {
            *text = clean;
        }
    }
    failure
}

/// What a handler reported of itself, by a worker in any language: without its secrets from here on.
pub fn milestones(mut reported: Value) -> Value {
    redact::json(&mut reported);
    reported
}

struct InfoRow {
    task_uuid: Uuid,
    step_uuid: Uuid,
    step_index: i32,
    item: i32,
    name: String,
    handler: String,
    queue: String,
    max_attempts: i32,
}

impl InfoRow {
    fn enter(self, logs: &mut HashMap<Uuid, TaskLog>) {
        let Some(log) = logs.get_mut(&self.task_uuid) else {
            return;
        };
        let info = StepInfo {
            index: u32::try_from(self.step_index).unwrap_or_default(),
            item: u32::try_from(self.item).ok(),
            name: self.name.into(),
            handler: self.handler.into(),
            queue: Arc::from(self.queue),
            max_attempts: u32::try_from(self.max_attempts).unwrap_or_default(),
        };
        log.steps.insert(self.step_uuid, info);
    }
}

async fn read_steps(conn: &mut PgConnection, ids: &[Uuid], logs: &mut HashMap<Uuid, TaskLog>) -> Result<(), Error> {
    let rows = sqlx::query_as!(
        InfoRow,
        "select s.task_uuid, s.step_uuid, s.step_index, s.item, d.name, d.handler, d.queue, d.max_attempts
         from tasker.tasks t join tasker.steps s on s.task_uuid = t.task_uuid
         join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
         where t.task_uuid = any($1)",
        ids
    )
    .fetch_all(conn)
    .await?;
    for row in rows {
        row.enter(logs);
    }
    Ok(())
}

struct LogRow {
    task_uuid: Uuid,
    entity_uuid: Uuid,
    version: i32,
    task_version: Option<i32>,
    generation: i32,
    attempt: Option<i32>,
    from_state: String,
    to_state: String,
    event: String,
    actor: Option<String>,
    began_at: DateTime<Utc>,
    at: DateTime<Utc>,
    detail: Option<Value>,
}

impl LogRow {
    fn enter(self, logs: &mut HashMap<Uuid, TaskLog>) -> Result<(), Error> {
        let row = self;
        let Some(log) = logs.get_mut(&row.task_uuid) else {
            return Ok(());
        };
        let id = format!("{}/{}", row.entity_uuid, row.version);
        let is_task = row.entity_uuid == row.task_uuid;
        let change = Change::parse(is_task, &row.from_state, &row.event, &row.to_state)
            .map_err(|(column, unknown)| Error::bad_row("transitions", column, id, unknown))?;
        log.transitions.push(Transition {
            entity: row.entity_uuid,
            version: row.version,
            task_version: row.task_version,
            generation: row.generation,
            attempt: row.attempt,
            change,
            actor: row.actor,
            began_at: row.began_at,
            at: row.at,
            detail: row.detail.and_then(|detail| serde_json::from_value::<Detail>(detail).ok()),
        });
        Ok(())
    }
}

async fn read_transitions(
    conn: &mut PgConnection,
    ids: &[Uuid],
    logs: &mut HashMap<Uuid, TaskLog>,
) -> Result<(), Error> {
    let rows = sqlx::query_as!(
        LogRow,
        "select task_uuid, entity_uuid, version, task_version, generation, attempt, from_state, to_state, event, actor,
           began_at, at, detail
         from tasker.transitions where task_uuid = any($1)",
        ids
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter().try_for_each(|row| row.enter(logs))
}

struct AttemptRow {
    task_uuid: Uuid,
    step_uuid: Uuid,
    attempt: i32,
    worker: String,
    worker_version: Option<String>,
    message_id: Option<i64>,
    result_message_id: Option<i64>,
    claim_began_at: DateTime<Utc>,
    claimed_at: DateTime<Utc>,
    report_began_at: Option<DateTime<Utc>>,
    reported_at: Option<DateTime<Utc>>,
    start_offset_ms: Option<f64>,
    run_ms: Option<f64>,
    error: Option<Value>,
    usage: Option<Value>,
    milestones: Option<Value>,
}

impl AttemptRow {
    fn enter(self, logs: &mut HashMap<Uuid, TaskLog>) {
        let row = self;
        let Some(log) = logs.get_mut(&row.task_uuid) else {
            return;
        };
        log.attempts.push(Attempt {
            step: row.step_uuid,
            attempt: row.attempt,
            worker: row.worker,
            worker_version: row.worker_version,
            message_id: row.message_id,
            result_message_id: row.result_message_id,
            claim_began_at: row.claim_began_at,
            claimed_at: row.claimed_at,
            report_began_at: row.report_began_at,
            reported_at: row.reported_at,
            start_offset_ms: row.start_offset_ms,
            run_ms: row.run_ms,
            failure: row.error.map(failure),
            usage: row.usage,
            milestones: row.milestones.map(milestones),
        });
    }
}

async fn read_attempts(conn: &mut PgConnection, ids: &[Uuid], logs: &mut HashMap<Uuid, TaskLog>) -> Result<(), Error> {
    let rows = sqlx::query_as!(
        AttemptRow,
        "select task_uuid, step_uuid, attempt, worker, worker_version, message_id, result_message_id, claim_began_at, claimed_at,
           report_began_at, reported_at, start_offset_ms, run_ms, error, usage, milestones
         from tasker.attempts where task_uuid = any($1)",
        ids
    )
    .fetch_all(conn)
    .await?;
    for row in rows {
        row.enter(logs);
    }
    Ok(())
}
