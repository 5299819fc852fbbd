//! What people ask: tasks, steps, attempts, templates, queues, quarantine.
//!
//! Read-only, and never part of a decision. One statement each, except where it says so.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use crate::state_machine::states::TaskState;
use crate::trace::otlp::hex;

/// A word of a fixed set. An alias, so that serde does not take it for a part of what it reads.
pub(super) type Word = &'static str;

fn state_word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Word, D::Error> {
    let word = String::deserialize(deserializer)?;
    word.parse().map(TaskState::as_str).map_err(|_| serde::de::Error::custom("state: is not known to this version"))
}

pub(super) fn public_word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Word, D::Error> {
    let word = String::deserialize(deserializer)?;
    let known = states_of(&word).next().map(TaskState::public_status);
    known.ok_or_else(|| serde::de::Error::custom("status: is not known to this version"))
}

fn maybe_public_word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Word>, D::Error> {
    let word = Option::<String>::deserialize(deserializer)?;
    Ok(word.and_then(|word| states_of(&word).next()).map(TaskState::public_status))
}

/// A task as people see it. Times are the database's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.tasks, explained there")]
pub struct TaskView {
    pub task_uuid: Uuid,
    pub namespace: String,
    pub template: String,
    pub version: String,
    /// The public word: queued, running, waiting, suspended, completed, failed or cancelled.
    #[serde(deserialize_with = "public_word")]
    pub status: Word,
    #[serde(deserialize_with = "state_word")]
    pub state: Word,
    pub correlation_id: String,
    pub idempotency_key: Option<String>,
    /// The task, the step and the attempt that started it.
    pub parent_task_uuid: Option<Uuid>,
    pub parent_step_uuid: Option<Uuid>,
    pub parent_attempt: Option<i32>,
    pub priority: i32,
    pub generation: i32,
    pub open_steps: i32,
    pub failed_steps: i32,
    pub error_type: Option<String>,
    pub reason: Option<String>,
    /// 32 hex digits, what a trace backend searches by.
    pub trace_id: String,
    pub created_at: DateTime<Utc>,
    pub run_at: Option<DateTime<Utc>>,
    pub last_at: DateTime<Utc>,
    pub finished_at: Option<DateTime<Utc>>,
}

impl TaskView {
    /// Whether its generation has ended.
    pub fn is_finished(&self) -> bool {
        self.finished_at.is_some()
    }
}

/// Which tasks to list; the empty filter lists all.
#[derive(Debug, Clone, Default)]
pub struct TaskFilter {
    /// Of this namespace only.
    pub namespace: Option<String>,
    /// Of this template only, in any version.
    pub template: Option<String>,
    /// With this public status only, such as `failed`.
    pub status: Option<String>,
    /// With this correlation id only.
    pub correlation_id: Option<String>,
    /// Created before this task: for the next page.
    pub before: Option<Uuid>,
    /// How many at most; 0 counts as 50.
    pub limit: u32,
}

/// The states that people see under one word; none for a word that is no status.
pub fn states_of(status: &str) -> impl Iterator<Item = TaskState> {
    TaskState::ALL.iter().copied().filter(move |state| state.public_status() == status)
}

/// These tasks, in any order; unknown ones are not in the answer.
pub async fn these(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<TaskView>, Error> {
    let rows = sqlx::query!(
        "select t.task_uuid, t.namespace, p.name, p.version, t.state, t.correlation_id, t.idempotency_key, t.parent_task_uuid,
           t.parent_step_uuid, t.parent_attempt, t.priority, t.generation, t.open_steps, t.failed_steps, t.error_type, t.reason, t.trace_id, t.created_at, t.run_at,
           t.last_at, t.finished_at
         from tasker.tasks t join tasker.templates p on p.template_id = t.template_id
         where t.task_uuid = any($1)",
        task_uuids
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            let state: TaskState =
                row.state.parse().map_err(|problem| Error::bad_row("tasks", "state", row.task_uuid, problem))?;
            Ok(TaskView {
                task_uuid: row.task_uuid,
                namespace: row.namespace,
                template: row.name,
                version: row.version,
                status: state.public_status(),
                state: state.as_str(),
                correlation_id: row.correlation_id,
                idempotency_key: row.idempotency_key,
                parent_task_uuid: row.parent_task_uuid,
                parent_step_uuid: row.parent_step_uuid,
                parent_attempt: row.parent_attempt,
                priority: row.priority,
                generation: row.generation,
                open_steps: row.open_steps,
                failed_steps: row.failed_steps,
                error_type: row.error_type,
                reason: row.reason,
                trace_id: hex(&row.trace_id),
                created_at: row.created_at,
                run_at: row.run_at,
                last_at: row.last_at,
                finished_at: row.finished_at,
            })
        })
        .collect()
}

/// Which of these tasks have ended.
pub async fn finished(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(
        "select task_uuid from tasker.tasks where task_uuid = any($1) and finished_at is not null",
        task_uuids
    )
    .fetch_all(conn)
    .await?)
}

/// The tasks with this correlation id, newest first, at most 20.
pub async fn by_correlation(conn: &mut PgConnection, correlation_id: &str) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(
        "select task_uuid from tasker.tasks where correlation_id = $1 order by task_uuid desc limit 20",
        correlation_id
    )
    .fetch_all(conn)
    .await?)
}

/// The first `limit` tasks that were created since, after this one, the oldest first.
pub async fn created_since(
    conn: &mut PgConnection,
    since: DateTime<Utc>,
    after: Uuid,
    limit: i64,
) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(
        "select task_uuid from tasker.tasks where task_uuid >= tasker.uuid7_floor($1) and task_uuid > $2
         order by task_uuid limit $3",
        since,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// What a task was given; `None` if there is no such task.
pub async fn input(conn: &mut PgConnection, task_uuid: Uuid) -> Result<Option<Value>, Error> {
    Ok(sqlx::query_scalar!("select input from tasker.tasks where task_uuid = $1", task_uuid)
        .fetch_optional(conn)
        .await?)
}

/// What tasks came to: the outputs of the completed steps that no other step depends on, by step name.
pub async fn results(
    conn: &mut PgConnection,
    task_uuids: &[Uuid],
) -> Result<BTreeMap<Uuid, BTreeMap<String, Value>>, Error> {
    let rows = sqlx::query!(
        r#"select t.task_uuid, d.name, coalesce(a.output, 'null') as "output!"
           from tasker.tasks t
           join tasker.steps s on s.task_uuid = t.task_uuid and s.state = 'complete' and s.item = -1
           join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           join tasker.attempts a on a.task_uuid = t.task_uuid and a.step_uuid = s.step_uuid and a.attempt = s.attempt
           where t.task_uuid = any($1)
             and not exists (select from tasker.template_edges e
                             where e.template_id = t.template_id and e.parent_index = s.step_index)"#,
        task_uuids
    )
    .fetch_all(conn)
    .await?;
    let mut results: BTreeMap<Uuid, BTreeMap<String, Value>> = BTreeMap::new();
    for row in rows {
        results.entry(row.task_uuid).or_default().insert(row.name, row.output);
    }
    Ok(results)
}

/// A task that a step started, or could not start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.children and the rows that it ties together")]
pub struct ChildView {
    /// The step that started it, with the place of its item in a map.
    pub step: String,
    pub attempt: i32,
    /// Whether the step waits for it.
    pub awaited: bool,
    /// `None` if it could not be created.
    pub task_uuid: Option<Uuid>,
    pub namespace: Option<String>,
    pub template: Option<String>,
    /// The public word; `None` if it could not be created, or retention removed it.
    #[serde(default, deserialize_with = "maybe_public_word")]
    pub status: Option<Word>,
    /// Why it could not be created.
    pub error: Option<String>,
}

/// The tasks that the steps of a task started, in the order in which they did, at most 1000; those
/// in the trace of their parent only, if `awaited`.
pub async fn children(conn: &mut PgConnection, task_uuid: Uuid, awaited: bool) -> Result<Vec<ChildView>, Error> {
    let rows = sqlx::query!(
        r#"select d.name || case when s.item >= 0 then format('[%s]', s.item) else '' end as "step!", c.attempt, c.awaited,
             c.child_uuid, k.namespace as "namespace?", p.name as "template?", k.state as "state?", c.error
           from tasker.children c
           join tasker.tasks t on t.task_uuid = c.task_uuid
           join tasker.steps s on s.step_uuid = c.step_uuid
           join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           left join tasker.tasks k on k.task_uuid = c.child_uuid
           left join tasker.templates p on p.template_id = k.template_id
           where c.task_uuid = $1 and (c.awaited or not $2) order by c.number limit 1000"#,
        task_uuid,
        awaited
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| ChildView {
            step: row.step,
            attempt: row.attempt,
            awaited: row.awaited,
            task_uuid: row.child_uuid,
            namespace: row.namespace,
            template: row.template,
            status: row.state.and_then(|state| state.parse().ok()).map(TaskState::public_status),
            error: row.error,
        })
        .collect())
}

/// A task, and the tasks in its trace: those that it awaits or awaited, and those that they do; the
/// task first, then by age, at most 1000.
pub async fn in_trace_of(conn: &mut PgConnection, task_uuid: Uuid) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(
        r#"with recursive below as (
             select $1::uuid as task_uuid
             union all
             select c.child_uuid from below b join tasker.children c on c.task_uuid = b.task_uuid
             where c.awaited and c.child_uuid is not null
           )
           select task_uuid as "task_uuid!" from below order by task_uuid <> $1, task_uuid limit 1000"#,
        task_uuid
    )
    .fetch_all(conn)
    .await?)
}

/// How often the database counted rare things, by name.
pub async fn counters(conn: &mut PgConnection) -> Result<Vec<(String, i64)>, Error> {
    let rows = sqlx::query!(r#"select name, sum(n)::bigint as "n!" from tasker.counters group by name limit 100"#)
        .fetch_all(conn)
        .await?;
    Ok(rows.into_iter().map(|row| (row.name, row.n)).collect())
}

/// What the attempts of a task used, added up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct UsageView {
    /// Of the whole task.
    pub total: BTreeMap<String, f64>,
    /// Of each step that used anything, by its name; the items of a map together.
    pub steps: BTreeMap<String, BTreeMap<String, f64>>,
}

/// Adds up what the attempts of a task used; empty if none reported any.
pub async fn usage(conn: &mut PgConnection, task_uuid: Uuid) -> Result<UsageView, Error> {
    let rows = sqlx::query!(
        // A sum may be larger, and a share smaller, than any double.
        r#"select d.name, u.key as "key!",
             round(least(greatest(sum(u.value::numeric), -1e300), 1e300), 300)::float8 as "amount!"
           from tasker.attempts a
           join tasker.steps s on s.step_uuid = a.step_uuid
           join tasker.tasks t on t.task_uuid = s.task_uuid
           join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           cross join lateral jsonb_each_text(case when jsonb_typeof(a.usage) = 'object' then a.usage else '{}' end) u
           where a.task_uuid = $1 and a.usage is not null and jsonb_typeof(a.usage->u.key) = 'number'
           group by d.name, u.key"#,
        task_uuid
    )
    .fetch_all(conn)
    .await?;
    let mut usage = UsageView::default();
    for row in rows {
        *usage.total.entry(row.key.clone()).or_default() += row.amount;
        usage.steps.entry(row.name).or_default().insert(row.key, row.amount);
    }
    Ok(usage)
}

/// Usage and milestones that one attempt reported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.attempts")]
pub struct ReportedView {
    pub step: String,
    /// Its place in the list of a map; -1 of every other step.
    pub item: i32,
    pub attempt: i32,
    pub usage: Option<Value>,
    pub milestones: Option<Value>,
}

/// Milestones, timings, artifacts and usage that attempts of a task reported. The first 1,000
/// attempts that reported anything.
pub async fn reported(conn: &mut PgConnection, task_uuid: Uuid) -> Result<Vec<ReportedView>, Error> {
    Ok(sqlx::query_as!(
        ReportedView,
        "select d.name as step, s.item, a.attempt, a.usage, a.milestones
         from tasker.attempts a
         join tasker.steps s on s.step_uuid = a.step_uuid
         join tasker.tasks t on t.task_uuid = s.task_uuid
         join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
         where a.task_uuid = $1 and (a.usage is not null or a.milestones is not null)
         order by s.step_index, s.item, a.attempt limit 1000",
        task_uuid
    )
    .fetch_all(conn)
    .await?)
}

/// A step as people see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.steps and tasker.template_steps")]
pub struct StepView {
    pub step_uuid: Uuid,
    pub name: String,
    pub handler: String,
    pub queue: String,
    pub state: String,
    pub attempt: i32,
    pub max_attempts: i32,
    pub held_by: Option<String>,
    pub due_at: Option<DateTime<Utc>>,
    /// Who holds it now, or held it last.
    pub worker: Option<String>,
    /// What a running handler said last.
    pub progress: Option<Value>,
    pub last_at: DateTime<Utc>,
    /// Of the latest attempt.
    pub output: Option<Value>,
    /// Of the latest attempt.
    pub error: Option<Value>,
    /// Of a map: how many items its list has.
    pub items: Option<i32>,
    /// Of a map: how many of them have ended, whatever came of them.
    pub items_ended: Option<i32>,
    /// Of a map: how many of them failed for good.
    pub items_failed: Option<i32>,
}

/// The steps of a task in template order; the items of a map are counted, not listed.
pub async fn steps(conn: &mut PgConnection, task_uuid: Uuid) -> Result<Vec<StepView>, Error> {
    Ok(sqlx::query_as!(
        StepView,
        r#"select s.step_uuid, d.name, d.handler, d.queue, s.state, s.attempt, d.max_attempts, s.held_by, s.due_at,
             s.claimed_by as worker, s.progress, s.last_at, a.output as "output?", a.error as "error?",
             m.items as "items?", m.items - m.remaining_items as items_ended, m.failed_items as "items_failed?"
           from tasker.tasks t
           join tasker.steps s on s.task_uuid = t.task_uuid and s.item = -1
           left join tasker.maps m on m.task_uuid = s.task_uuid and m.step_uuid = s.step_uuid
           join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           left join tasker.attempts a on a.task_uuid = t.task_uuid and a.step_uuid = s.step_uuid and a.attempt = s.attempt
           where t.task_uuid = $1 order by s.step_index"#,
        task_uuid
    )
    .fetch_all(conn)
    .await?)
}

/// One execution of a step, as people see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.attempts")]
pub struct AttemptView {
    pub task_uuid: Uuid,
    pub step: String,
    pub attempt: i32,
    pub worker: String,
    pub claimed_at: DateTime<Utc>,
    pub reported_at: Option<DateTime<Utc>>,
    pub run_ms: Option<f64>,
    pub outcome: Option<String>,
    pub error: Option<Value>,
}

/// Every attempt of these tasks that a worker claimed, by task, step and attempt.
pub async fn attempts(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<AttemptView>, Error> {
    Ok(sqlx::query_as!(
        AttemptView,
        "select a.task_uuid, d.name || case when s.item >= 0 then format('[%s]', s.item) else '' end as \"step!\", a.attempt, a.worker, a.claimed_at, a.reported_at, a.run_ms, a.outcome, a.error
         from tasker.tasks t
         join tasker.steps s on s.task_uuid = t.task_uuid
         join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
         join tasker.attempts a on a.task_uuid = t.task_uuid and a.step_uuid = s.step_uuid
         where t.task_uuid = any($1) and a.attempt > 0 order by a.task_uuid, s.step_index, s.item, a.attempt",
        task_uuids
    )
    .fetch_all(conn)
    .await?)
}

/// A registered template.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.templates")]
pub struct TemplateView {
    pub namespace: String,
    pub name: String,
    pub version: String,
    pub steps: i64,
    pub created_at: DateTime<Utc>,
}

/// The registered templates of one namespace, or of all; of each the latest version stands last.
pub async fn templates(conn: &mut PgConnection, namespace: Option<&str>) -> Result<Vec<TemplateView>, Error> {
    Ok(sqlx::query_as!(
        TemplateView,
        r#"select t.namespace, t.name, t.version, t.created_at,
             (select count(*) from tasker.template_steps s where s.template_id = t.template_id) as "steps!"
           from tasker.templates t where $1::text is null or t.namespace = $1
           order by t.namespace, t.name, t.template_id"#,
        namespace
    )
    .fetch_all(conn)
    .await?)
}

/// The definition of a template, `(id, JSON)`: of the given version, else of the latest.
pub async fn definition(
    conn: &mut PgConnection,
    namespace: &str,
    name: &str,
    version: Option<&str>,
) -> Result<Option<(i32, Value)>, Error> {
    let row = sqlx::query!(
        "select template_id, definition from tasker.templates
         where namespace = $1 and name = $2 and ($3::text is null or version = $3)
         order by template_id desc limit 1",
        namespace,
        name,
        version
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.template_id, row.definition)))
}

/// The id and the input schema of a template, as [`definition`] chooses it.
pub async fn input_schema(
    conn: &mut PgConnection,
    namespace: &str,
    name: &str,
    version: Option<&str>,
) -> Result<Option<(i32, Option<Value>)>, Error> {
    let row = sqlx::query!(
        r#"select template_id, definition->'input_schema' as "schema?" from tasker.templates
           where namespace = $1 and name = $2 and ($3::text is null or version = $3)
           order by template_id desc limit 1"#,
        namespace,
        name,
        version
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.template_id, row.schema)))
}

/// The `(namespace, queue)` pairs of templates with a step for one of these handlers; the
/// queue is the PGMQ name, such as `worker_orders__slow`.
pub async fn queues_of(conn: &mut PgConnection, handlers: &[String]) -> Result<Vec<(String, String)>, Error> {
    let rows = sqlx::query!(
        "select distinct t.namespace, s.queue from tasker.template_steps s
         join tasker.templates t on t.template_id = s.template_id
         where s.handler = any($1) order by 1, 2",
        handlers
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.namespace, row.queue)).collect())
}

/// Whether one live worker offers all of these handlers on the queue.
pub async fn is_offered(conn: &mut PgConnection, queue: &str, handlers: &[String]) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"select exists (select from tasker.workers w where $1 = any(w.queues) and w.handlers @> $2
                            and w.seen_at > clock_timestamp() - interval '30 s') as "yes!""#,
        queue,
        handlers
    )
    .fetch_one(conn)
    .await?)
}

/// One queue, and what stands before and behind it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct QueueView {
    /// Its PGMQ name.
    pub queue: String,
    /// Messages in it, hidden ones included.
    pub depth: i64,
    /// Messages that may be read now.
    pub visible: i64,
    /// Age of the oldest message in seconds.
    pub oldest_s: Option<i32>,
    /// Ready steps that are held back from it; of more than 100,000 in a hold group or in none, so many are counted.
    pub held: i64,
    /// Live workers that read it; always 0 for the queues of orchestrators.
    pub workers: i64,
    /// Messages of it in quarantine, 100,000 at most.
    pub quarantined: i64,
    /// Who paused it and why, as `actor: reason`.
    pub paused: Option<String>,
}

/// Every queue.
pub async fn queues(conn: &mut PgConnection) -> Result<Vec<QueueView>, Error> {
    Ok(sqlx::query_as!(
        QueueView,
        r#"select m.queue_name as "queue!", m.queue_length as "depth!", m.queue_visible_length as "visible!",
             m.oldest_msg_age_sec as oldest_s,
             -- A count each for the two indexes that hold nothing but held steps.
             (select count(*) from (select from tasker.steps s
                where s.queue = m.queue_name and s.held_by is not null and s.lane is null limit 100000) h)
             + (select count(*) from (select from tasker.steps s
                where s.queue = m.queue_name and s.held_by is not null and s.lane is not null limit 100000) h) as "held!",
             (select count(*) from tasker.workers w
              where m.queue_name = any(w.queues) and tasker.queue_namespace(m.queue_name) = w.namespace
                and w.seen_at > clock_timestamp() - interval '30 s') as "workers!",
             (select count(*) from (select from tasker.quarantine q where q.queue = m.queue_name limit 100000) n) as "quarantined!",
             (select concat_ws(': ', p.actor, p.reason) from tasker.paused_queues p where p.queue = m.queue_name) as paused
           from pgmq.metrics_all() m order by 1"#
    )
    .fetch_all(conn)
    .await?)
}

/// Who works for a namespace at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "counts")]
pub struct LiveWorkers {
    pub namespace: String,
    pub workers: i64,
    pub slots: i64,
    /// Workers whose row is of no use: see `tasker.worker_problem`.
    pub unusable: i64,
}

/// Live workers and their slots, of every namespace that any worker ever worked for.
pub async fn live_workers(conn: &mut PgConnection) -> Result<Vec<LiveWorkers>, Error> {
    Ok(sqlx::query_as!(
        LiveWorkers,
        r#"select namespace, count(*) filter (where live) as "workers!",
             coalesce(sum(greatest(slots, 0)) filter (where live), 0) as "slots!",
             count(*) filter (where live and tasker.worker_problem(namespace, queues, handlers, slots) is not null) as "unusable!"
           from (select w.namespace, w.queues, w.handlers, w.slots, w.seen_at > clock_timestamp() - interval '30 s' as live
                 from tasker.workers w) w
           group by namespace"#
    )
    .fetch_all(conn)
    .await?)
}

/// The database's clock, which decides what "now" is in an open trace.
pub async fn now(conn: &mut PgConnection) -> Result<DateTime<Utc>, Error> {
    Ok(sqlx::query_scalar!(r#"select clock_timestamp() as "now!""#).fetch_one(conn).await?)
}
