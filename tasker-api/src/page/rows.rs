//! What the web page shows beyond what the API lists: overviews, one step in full, who works.
//!
//! Read-only, and never part of a decision. Every statement is bounded: none counts a whole table.
//! `namespaces` is what the viewer may see, `None` for everything.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use tasker_shared::store::Error;
use tasker_shared::store::listing;
use tasker_shared::store::views::{self, TaskView};

/// How many of the latest tasks an overview looks at.
pub const LATEST: i64 = 10_000;

/// Which tasks a page lists; the empty filter lists all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is a field of the form of the same name")]
pub struct TaskFilter {
    pub namespace: Option<String>,
    pub template: Option<String>,
    pub status: Option<String>,
    pub correlation_id: Option<String>,
    pub error_type: Option<String>,
    /// Created before this task: for the next page.
    pub before: Option<Uuid>,
}

/// Looks at most at so many pieces of the list, each of which is quick.
const LOOKS: usize = 8;

/// One page of tasks, newest first, and where the list goes on. `most` rows at most; fewer, or none, if
/// what matches is rarer than a few looks can tell.
pub async fn tasks(
    conn: &mut PgConnection,
    namespaces: Option<&[String]>,
    filter: &TaskFilter,
    most: usize,
) -> Result<(Vec<TaskView>, Option<Uuid>), Error> {
    let within = |namespace: &String| namespaces.is_none_or(|own| own.contains(namespace));
    let namespaces = match &filter.namespace {
        Some(namespace) => Some(Some(namespace.clone()).filter(within).into_iter().collect()),
        None => namespaces.map(<[String]>::to_vec),
    };
    let mut wanted = listing::Filter {
        namespaces,
        template: filter.template.clone(),
        statuses: filter.status.iter().cloned().collect(),
        correlation_id: filter.correlation_id.clone(),
        error_type: filter.error_type.clone(),
        after: filter.before,
        ..listing::Filter::default()
    };
    let mut found = Vec::new();
    for _ in 0..LOOKS {
        wanted.limit = u32::try_from(most - found.len()).unwrap_or(u32::MAX);
        let listed = listing::tasks(conn, &wanted).await?;
        found.extend(listed.tasks);
        wanted.after = listed.next;
        if found.len() >= most || listed.next.is_none() {
            break;
        }
    }
    Ok((found, wanted.after))
}

/// The open step of a task that is furthest along.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "columns of tasker.steps and tasker.template_steps")]
pub struct CurrentStep {
    pub task_uuid: Uuid,
    pub name: String,
    pub handler: String,
    pub state: String,
    pub held_by: Option<String>,
    pub due_at: Option<DateTime<Utc>>,
    /// Attempts of it in this generation that ended in an error.
    pub failures: i32,
    pub max_attempts: i32,
    pub worker: Option<String>,
    /// The signal that it waits for.
    pub signal: Option<String>,
}

/// Of each of these tasks what it is at; a task with nothing open is not in the answer.
pub async fn current_steps(conn: &mut PgConnection, tasks: &[Uuid]) -> Result<Vec<CurrentStep>, Error> {
    Ok(sqlx::query_as!(
        CurrentStep,
        r#"select t.task_uuid, c.name as "name!", c.handler as "handler!", c.state as "state!", c.held_by, c.due_at, c.failures as "failures!",
             c.max_attempts as "max_attempts!", c.claimed_by as worker,
             case when c.state = 'waiting' then (select p.definition->'steps'->c.step_index->'wait'->'signal'->>'name'
               from tasker.templates p where p.template_id = t.template_id) end as signal
           from tasker.tasks t cross join lateral (
             select d.name || case when s.item >= 0 then format('[%s]', s.item) else '' end as name, d.handler, s.state, s.held_by, s.due_at,
               s.failures, d.max_attempts, s.claimed_by, s.step_index
             from tasker.steps s join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
             where s.task_uuid = t.task_uuid and s.state not in ('complete', 'cancelled', 'skipped', 'resolved_manually')
               and (s.state <> 'pending' or s.held_by is not null)
             order by case s.state when 'error' then 0 when 'in_progress' then 1 when 'waiting_for_retry' then 2 when 'enqueued' then 3
               when 'pending' then 5 else 4 end, s.due_at, s.step_index
             limit 1) c
           where t.task_uuid = any($1) and t.finished_at is null"#,
        tasks
    )
    .fetch_all(conn)
    .await?)
}

/// How many of the latest tasks are in a state, and when those that ended in the last hour did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tally {
    /// The state.
    pub state: String,
    /// Minutes since they ended, 0 to 59; `None`: not within the hour, or not at all.
    pub minutes_ago: Option<i32>,
    /// How many.
    pub count: i64,
}

/// Looks at the latest [`LATEST`] tasks.
pub async fn tally(
    conn: &mut PgConnection,
    namespaces: Option<&[String]>,
    namespace: Option<&str>,
) -> Result<Vec<Tally>, Error> {
    Ok(sqlx::query_as!(
        Tally,
        r#"select l.state as "state!", l.minutes_ago, count(*) as "count!"
           from (
             select t.state, t.namespace,
               case when t.finished_at > clock_timestamp() - interval '1 h'
                 then floor(extract(epoch from clock_timestamp() - t.finished_at) / 60)::int end as minutes_ago
             from tasker.tasks t order by t.task_uuid desc limit $3) l
           where ($1::text[] is null or l.namespace = any($1)) and ($2::text is null or l.namespace = $2)
           group by 1, 2"#,
        namespaces,
        namespace,
        LATEST
    )
    .fetch_all(conn)
    .await?)
}

/// The namespaces and template names that a filter may name.
pub async fn names(conn: &mut PgConnection, namespaces: Option<&[String]>) -> Result<Vec<(String, String)>, Error> {
    let rows = sqlx::query!(
        "select distinct namespace, name from tasker.templates
         where $1::text[] is null or namespace = any($1) order by 1, 2 limit 1000",
        namespaces
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.namespace, row.name)).collect())
}

/// The tasks that one search word means: a task's id, a correlation id, an idempotency key; at
/// most 50, newest first.
pub async fn search(conn: &mut PgConnection, namespaces: Option<&[String]>, word: &str) -> Result<Vec<Uuid>, Error> {
    let id: Option<Uuid> = word.parse().ok();
    Ok(sqlx::query_scalar!(
        r#"select f.task_uuid as "task_uuid!" from (
             (select t.task_uuid from tasker.tasks t where t.task_uuid = $2)
             union
             (select t.task_uuid from tasker.tasks t where t.correlation_id = $3 order by t.task_uuid desc limit 50)
             union
             (select k.task_uuid from tasker.idempotency_keys k
              where k.namespace = any(array(select distinct p.namespace from tasker.templates p)) and k.key = $3)) f
           join tasker.tasks t on t.task_uuid = f.task_uuid
           where $1::text[] is null or t.namespace = any($1)
           order by f.task_uuid desc limit 50"#,
        namespaces,
        id,
        word
    )
    .fetch_all(conn)
    .await?)
}

/// What a page shows of a task besides its view: its parent, its input, its template.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "columns of tasker.tasks")]
pub struct TaskDetail {
    pub template_id: i32,
    pub parent_task_uuid: Option<Uuid>,
    pub parent_namespace: Option<String>,
    pub parent_step: Option<String>,
    pub parent_attempt: Option<i32>,
    pub parent_correlation_id: Option<String>,
    pub root_span_id: Vec<u8>,
    pub ended_by: Option<String>,
    pub suspended_from: Option<String>,
    pub version: i32,
    pub input: Value,
    /// The template, for its graph.
    pub definition: Value,
}

/// The detail of a task; `None` if there is no such task.
pub async fn task_detail(conn: &mut PgConnection, task: Uuid) -> Result<Option<TaskDetail>, Error> {
    Ok(sqlx::query_as!(
        TaskDetail,
        r#"select t.template_id, t.parent_task_uuid, t.parent_attempt, t.parent_correlation_id, t.root_span_id, t.ended_by,
             t.suspended_from, t.version, t.input, p.definition,
             (select pt.namespace from tasker.tasks pt where pt.task_uuid = t.parent_task_uuid) as parent_namespace,
             (select d.name from tasker.steps s join tasker.tasks pt on pt.task_uuid = s.task_uuid
              join tasker.template_steps d on d.template_id = pt.template_id and d.step_index = s.step_index
              where s.step_uuid = t.parent_step_uuid) as parent_step
           from tasker.tasks t join tasker.templates p on p.template_id = t.template_id where t.task_uuid = $1"#,
        task
    )
    .fetch_optional(conn)
    .await?)
}

/// The tasks that this one started, oldest first, at most 100. They share its correlation id.
pub async fn children(conn: &mut PgConnection, task: Uuid, correlation_id: &str) -> Result<Vec<TaskView>, Error> {
    let ids = sqlx::query_scalar!(
        "select task_uuid from tasker.tasks where correlation_id = $2 and parent_task_uuid = $1 order by task_uuid limit 100",
        task,
        correlation_id
    )
    .fetch_all(&mut *conn)
    .await?;
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let mut found = views::these(conn, &ids).await?;
    found.sort_unstable_by_key(|task| task.task_uuid);
    Ok(found)
}

/// A step as one line of a list: no payloads.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "columns of tasker.steps, tasker.template_steps and tasker.maps")]
pub struct StepLine {
    pub step_uuid: Uuid,
    pub step_index: i32,
    pub name: String,
    pub handler: String,
    pub queue: String,
    pub state: String,
    pub attempt: i32,
    pub failures: i32,
    pub max_attempts: i32,
    pub held_by: Option<String>,
    pub due_at: Option<DateTime<Utc>>,
    pub worker: Option<String>,
    pub last_at: DateTime<Utc>,
    /// The class of its latest attempt's error.
    pub error_type: Option<String>,
    pub items: Option<i32>,
    pub items_ended: Option<i32>,
    pub items_failed: Option<i32>,
}

/// The steps of a task in template order; the items of a map are counted, not listed.
pub async fn step_lines(conn: &mut PgConnection, task: Uuid) -> Result<Vec<StepLine>, Error> {
    Ok(sqlx::query_as!(
        StepLine,
        r#"select s.step_uuid, s.step_index, d.name, d.handler, d.queue, s.state, s.attempt, s.failures, d.max_attempts, s.held_by,
             s.due_at, s.claimed_by as worker, s.last_at,
             case when s.failures > 0 or s.state = 'error' then (select a.error->>'type' from tasker.attempts a
               where a.task_uuid = t.task_uuid and a.step_uuid = s.step_uuid and a.error is not null
               order by a.attempt desc limit 1) end as error_type,
             m.items as "items?", m.items - m.remaining_items as items_ended, m.failed_items as "items_failed?"
           from tasker.tasks t
           join tasker.steps s on s.task_uuid = t.task_uuid and s.item = -1
           join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           left join tasker.maps m on m.task_uuid = s.task_uuid and m.step_uuid = s.step_uuid
           where t.task_uuid = $1 order by s.step_index"#,
        task
    )
    .fetch_all(conn)
    .await?)
}

/// A step that waits, and is in no queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenWait {
    /// The step.
    pub step_uuid: Uuid,
    /// `pending`, `waiting` or `waiting_for_retry`.
    pub state: String,
    /// What holds it back, if it is ready: room, worker, limit or paused.
    pub held_by: Option<String>,
    /// Since when.
    pub since: DateTime<Utc>,
}

/// The steps of a task that wait now, the items of maps among them; at most 20,000. Of a wait that has not
/// ended nothing is in the log.
pub async fn open_waits(conn: &mut PgConnection, task: Uuid) -> Result<Vec<OpenWait>, Error> {
    Ok(sqlx::query_as!(
        OpenWait,
        r#"select s.step_uuid, s.state, s.held_by, coalesce(s.ready_at, s.last_at) as "since!"
           from tasker.steps s
           where s.task_uuid = $1 and (s.held_by is not null or s.state in ('waiting', 'waiting_for_retry')) limit 20000"#,
        task
    )
    .fetch_all(conn)
    .await?)
}

/// One step in full.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "columns of tasker.steps and tasker.template_steps")]
pub struct StepDetail {
    pub step_uuid: Uuid,
    pub step_index: i32,
    pub item: i32,
    pub name: String,
    pub handler: String,
    pub queue: String,
    pub state: String,
    pub generation: i32,
    pub attempt: i32,
    pub failures: i32,
    pub losses: i32,
    pub max_attempts: i32,
    pub held_by: Option<String>,
    pub ready_at: Option<DateTime<Utc>>,
    pub due_at: Option<DateTime<Utc>>,
    pub worker: Option<String>,
    pub lease_expires_at: Option<DateTime<Utc>>,
    pub last_heartbeat_at: Option<DateTime<Utc>>,
    pub progress: Option<Value>,
    /// With every reference resolved, as its handler gets it.
    pub input: Option<Value>,
    pub last_at: DateTime<Utc>,
}

/// One step of a task; `None` if it has no such step.
pub async fn step(conn: &mut PgConnection, task: Uuid, step: Uuid) -> Result<Option<StepDetail>, Error> {
    Ok(sqlx::query_as!(
        StepDetail,
        r#"select s.step_uuid, s.step_index, s.item, d.name, d.handler, d.queue, s.state, s.generation, s.attempt, s.failures, s.losses,
             d.max_attempts, s.held_by, s.ready_at, s.due_at, s.claimed_by as worker, s.lease_expires_at, s.last_heartbeat_at,
             s.progress,
             case when jsonb_typeof(s.input) = 'object' and s.input ? '$tasker.by_reference'
               then tasker.resolve_input(s.task_uuid, s.input) else s.input end as input,
             s.last_at
           from tasker.tasks t
           join tasker.steps s on s.task_uuid = t.task_uuid
           join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           where t.task_uuid = $1 and s.step_uuid = $2"#,
        task,
        step
    )
    .fetch_optional(conn)
    .await?)
}

/// One attempt in full.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "columns of tasker.attempts")]
pub struct AttemptDetail {
    pub attempt: i32,
    pub generation: i32,
    pub worker: String,
    pub worker_version: Option<String>,
    pub claimed_at: DateTime<Utc>,
    pub reported_at: Option<DateTime<Utc>>,
    pub start_offset_ms: Option<f64>,
    pub run_ms: Option<f64>,
    pub outcome: Option<String>,
    pub output: Option<Value>,
    pub error: Option<Value>,
    pub usage: Option<Value>,
    pub milestones: Option<Value>,
}

/// The attempts of a step, the latest first, at most 200.
pub async fn attempts(conn: &mut PgConnection, task: Uuid, step: Uuid) -> Result<Vec<AttemptDetail>, Error> {
    Ok(sqlx::query_as!(
        AttemptDetail,
        "select attempt, generation, worker, worker_version, claimed_at, reported_at, start_offset_ms, run_ms, outcome, output,
           error, usage, milestones
         from tasker.attempts where task_uuid = $1 and step_uuid = $2 order by attempt desc limit 200",
        task,
        step
    )
    .fetch_all(conn)
    .await?)
}

/// An item of a map.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "columns of tasker.steps")]
pub struct ItemLine {
    pub step_uuid: Uuid,
    pub item: i32,
    pub state: String,
    pub attempt: i32,
    pub last_at: DateTime<Utc>,
}

/// The items of a map: those that failed and those that are open first, at most 200.
pub async fn items(conn: &mut PgConnection, task: Uuid, step_index: i32) -> Result<Vec<ItemLine>, Error> {
    Ok(sqlx::query_as!(
        ItemLine,
        "select step_uuid, item, state, attempt, last_at from tasker.steps
         where task_uuid = $1 and step_index = $2 and item >= 0
         order by case state when 'error' then 0 when 'complete' then 3 when 'pending' then 2 else 1 end, item limit 200",
        task,
        step_index
    )
    .fetch_all(conn)
    .await?)
}

/// Steps that wait for a handler that no live worker offers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Unoffered {
    /// Their namespace.
    pub namespace: String,
    /// Their queue.
    pub queue: String,
    /// The handler that is missing.
    pub handler: String,
    /// How many wait, 1,000 at most.
    pub steps: i64,
    /// Since when the longest of them has waited.
    pub since: DateTime<Utc>,
    /// The task of one of them.
    pub task_uuid: Uuid,
}

/// What waits in vain, of the first 1,000 steps that are held for want of a worker, and as many in hold groups.
pub async fn unoffered(conn: &mut PgConnection, namespaces: Option<&[String]>) -> Result<Vec<Unoffered>, Error> {
    Ok(sqlx::query_as!(
        Unoffered,
        r#"with recursive kind as (
             -- The queues and handlers of which any step is held, a probe each.
             (select s.queue, s.held_handler as handler from tasker.steps s
              where s.held_by is not null and s.lane is null and s.held_handler is not null order by s.queue, s.held_handler limit 1)
             union all
             select n.queue, n.held_handler from kind k cross join lateral (
               select s.queue, s.held_handler from tasker.steps s
               where s.held_by is not null and s.lane is null and s.held_handler is not null
                 and (s.queue, s.held_handler) > (k.queue, k.handler)
               order by s.queue, s.held_handler limit 1) n),
           held as (
             (select h.step_uuid from kind k cross join lateral (
                select s.step_uuid from tasker.steps s
                where s.held_by is not null and s.lane is null and s.queue = k.queue and s.held_handler = k.handler
                limit 1000) h
              where not exists (select from tasker.workers w where k.queue = any(w.queues) and k.handler = any(w.handlers)
                                  and w.seen_at > clock_timestamp() - interval '30 s'))
             union all
             (select s.step_uuid from tasker.steps s
              where s.held_by is not null and s.lane is null and s.held_handler is null and s.held_by = 'worker' limit 1000)
             union all
             -- A limit says nothing about who would work on what it lets through.
             (select s.step_uuid from tasker.steps s
              where s.held_by is not null and s.lane is not null and s.held_by in ('worker', 'limit') limit 1000)),
           waiting as (
             select t.namespace, s.queue, d.handler, coalesce(s.ready_at, s.last_at) as since, t.task_uuid
             from held w
             join tasker.steps s on s.step_uuid = w.step_uuid
             join tasker.tasks t on t.task_uuid = s.task_uuid
             join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
             where ($1::text[] is null or t.namespace = any($1)) and t.finished_at is null and t.state <> 'suspended'
               and s.state in ('pending', 'enqueued', 'waiting_for_retry')
               and not exists (select from tasker.workers w where s.queue = any(w.queues) and d.handler = any(w.handlers)
                                 and w.seen_at > clock_timestamp() - interval '30 s'))
           select namespace as "namespace!", queue as "queue!", handler as "handler!", count(*) as "steps!", min(since) as "since!",
             (array_agg(task_uuid order by since))[1] as "task_uuid!"
           from waiting group by 1, 2, 3 order by 5 limit 50"#,
        namespaces
    )
    .fetch_all(conn)
    .await?)
}

/// Messages a second, over the last seconds that somebody looked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rates {
    pub into: f64,
    pub out: f64,
}

/// What was ever sent to a queue, and what is in it: two looks give its rates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueTotals {
    /// Its PGMQ name.
    pub queue: String,
    /// Messages ever sent.
    pub sent: i64,
    /// Messages in it now.
    pub depth: i64,
}

/// The totals of every queue.
pub async fn queue_totals(conn: &mut PgConnection) -> Result<Vec<QueueTotals>, Error> {
    Ok(sqlx::query_as!(
        QueueTotals,
        r#"select queue_name as "queue!", total_messages as "sent!", queue_length as "depth!" from pgmq.metrics_all()"#
    )
    .fetch_all(conn)
    .await?)
}

/// What waits for the collector.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Backlog {
    /// Transactions whose spans are not acknowledged yet, 10,000 at most.
    pub batches: i64,
    /// Since when the oldest of them waits.
    pub oldest_at: Option<DateTime<Utc>>,
}

/// Looks at the first 10,000 batches.
pub async fn export_backlog(conn: &mut PgConnection) -> Result<Backlog, Error> {
    Ok(sqlx::query_as!(
        Backlog,
        r#"select count(*) as "batches!", min(b.at) as oldest_at from (select at from tasker.export_batches limit 10000) b"#
    )
    .fetch_one(conn)
    .await?)
}

/// A registered version of a template.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "columns of tasker.templates")]
pub struct VersionLine {
    pub template_id: i32,
    pub version: String,
    pub created_at: DateTime<Utc>,
}

/// The versions of a template, the latest first, at most 200.
pub async fn versions(conn: &mut PgConnection, namespace: &str, name: &str) -> Result<Vec<VersionLine>, Error> {
    Ok(sqlx::query_as!(
        VersionLine,
        "select template_id, version, created_at from tasker.templates where namespace = $1 and name = $2
         order by template_id desc limit 200",
        namespace,
        name
    )
    .fetch_all(conn)
    .await?)
}

/// The latest version of each template.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "columns of tasker.templates")]
pub struct TemplateLine {
    pub namespace: String,
    pub name: String,
    pub version: String,
    pub description: Option<String>,
    pub versions: i64,
    pub steps: i64,
    pub created_at: DateTime<Utc>,
}

/// The templates, by name; of each the version registered last. At most 1,000.
pub async fn templates(conn: &mut PgConnection, namespaces: Option<&[String]>) -> Result<Vec<TemplateLine>, Error> {
    Ok(sqlx::query_as!(
        TemplateLine,
        r#"select t.namespace, t.name, t.version, t.definition->>'description' as description, l.versions as "versions!", t.created_at,
             (select count(*) from tasker.template_steps s where s.template_id = t.template_id) as "steps!"
           from (select max(template_id) as template_id, count(*) as versions from tasker.templates
                 where $1::text[] is null or namespace = any($1) group by namespace, name) l
           join tasker.templates t on t.template_id = l.template_id
           order by t.namespace, t.name limit 1000"#,
        namespaces
    )
    .fetch_all(conn)
    .await?)
}

/// Why an act cannot be asked of a task in this state; `None` if it can.
pub async fn act_problem(conn: &mut PgConnection, action: &str, state: &str) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!("select tasker.act_problem($1, $2, '{}') as problem", action, state).fetch_one(conn).await?)
}

/// Whether an orchestrator is connected to this database, or was alive within the last 30 s. One that
/// exports no traces keeps no row of its own.
pub async fn orchestrator_runs(conn: &mut PgConnection) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"select exists (select from pg_stat_activity where datname = current_database() and application_name = 'tasker-orchestration')
             or exists (select from tasker.instances where seen_at > clock_timestamp() - interval '30 s') as "yes!""#
    )
    .fetch_one(conn)
    .await?)
}
