//! What the HTTP API and the page show of one task, and of the system around it: bounded pages,
//! each read along an index.
//!
//! Read-only, and never part of a decision. Payloads are read only where the caller asks for them.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use super::views::{Word, public_word};

/// Counts beyond this one are not counted: each is a row that is looked at.
pub const COUNT_TO: i64 = 2_500;

/// How many tasks have a status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StatusCount {
    /// The public word.
    #[serde(deserialize_with = "public_word")]
    pub status: Word,
    /// How many; at most 2500.
    pub count: i64,
    /// Whether there are more than were counted.
    pub more: bool,
}

/// The public words for a task's state, in the order in which people read them.
pub const STATUSES: [&str; 7] = ["queued", "running", "waiting", "suspended", "completed", "failed", "cancelled"];

/// How many tasks there are of each status, in these namespaces or in all, of those that were
/// looked at: about [`COUNT_TO`] of each kind of end (of the completed, the latest twice as many
/// tasks of a template), and of the latest open ones four times as many.
pub async fn counts(conn: &mut PgConnection, namespaces: Option<&[String]>) -> Result<Vec<StatusCount>, Error> {
    let rows = sqlx::query!(
        r#"with seen as (
             (select t.state, 1 as kind from (
                select state, namespace from tasker.tasks where finished_at is null order by task_uuid desc limit 4 * $2::bigint) t
              where $1::text[] is null or t.namespace = any($1) limit $2::bigint + 1)
             union all
             (select t.state, 2 from tasker.tasks t
              where $1::text[] is null and t.error_type >= '' and t.state = 'error'
              order by t.task_uuid desc limit $2::bigint + 1)
             union all
             (select t.state, 2 from tasker.templates p cross join lateral (
                select t.state from tasker.tasks t
                where t.error_type is not null
                  and (t.template_id, t.task_uuid) >= (p.template_id, '00000000-0000-0000-0000-000000000000')
                  and (t.template_id, t.task_uuid) <= (p.template_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
                order by t.template_id desc, t.task_uuid desc limit $2::bigint + 1) t
              where t.state = 'error' and p.namespace = any($1) limit $2::bigint + 1)
             union all
             (select t.state, 3 from tasker.tasks t
              where $1::text[] is null and t.ended_by >= '' and t.state = 'cancelled'
              order by t.task_uuid desc limit $2::bigint + 1)
             union all
             (select t.state, 3 from tasker.templates p cross join lateral (
                select t.state from tasker.tasks t
                where t.ended_by is not null
                  and (t.template_id, t.task_uuid) >= (p.template_id, '00000000-0000-0000-0000-000000000000')
                  and (t.template_id, t.task_uuid) <= (p.template_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
                order by t.template_id desc, t.task_uuid desc limit $2::bigint + 1) t
              where t.state = 'cancelled' and p.namespace = any($1) limit $2::bigint + 1)
           )
           select state as "state!", count(*) as "n!", sum(count(*)) over (partition by kind) > $2::bigint as "cut!"
           from seen group by kind, state"#,
        namespaces,
        COUNT_TO
    )
    .fetch_all(&mut *conn)
    .await?;
    let completed = match namespaces {
        None => {
            sqlx::query_scalar!(
                r#"select count(*) as "n!" from (
                     select from (select state from tasker.tasks order by task_uuid desc limit 2 * $1::bigint) t
                     where t.state in ('complete', 'resolved_manually') limit $1::bigint + 1) n"#,
                COUNT_TO
            )
            .fetch_one(conn)
            .await?
        }
        Some(namespaces) => {
            sqlx::query_scalar!(
                r#"select count(*) as "n!" from (
                     select from tasker.templates p cross join lateral (
                       select t.state from tasker.tasks t
                       where (t.template_id, t.task_uuid) >= (p.template_id, '00000000-0000-0000-0000-000000000000')
                         and (t.template_id, t.task_uuid) <= (p.template_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
                       order by t.template_id desc, t.task_uuid desc limit 2 * $2::bigint) t
                     where p.namespace = any($1) and t.state in ('complete', 'resolved_manually') limit $2::bigint + 1) n"#,
                namespaces,
                COUNT_TO
            )
            .fetch_one(conn)
            .await?
        }
    };
    Ok(STATUSES
        .into_iter()
        .map(|status| {
            let states: Vec<&str> =
                super::views::states_of(status).map(crate::state_machine::TaskState::as_str).collect();
            let own = rows.iter().filter(|row| states.contains(&row.state.as_str()));
            let (count, more) = match status {
                "completed" => (completed, completed > COUNT_TO),
                _ => own.fold((0, false), |(count, more), row| (count + row.n, more || row.cut)),
            };
            StatusCount { status, count: count.min(COUNT_TO), more }
        })
        .collect())
}

/// What ties a caller's trace to a task: its trace id, root span and flags.
pub async fn root_span(conn: &mut PgConnection, task: Uuid) -> Result<Option<(Vec<u8>, Vec<u8>, i16)>, Error> {
    let row = sqlx::query!("select trace_id, root_span_id, trace_flags from tasker.tasks where task_uuid = $1", task)
        .fetch_optional(conn)
        .await?;
    Ok(row.map(|row| (row.trace_id, row.root_span_id, row.trace_flags & 1)))
}

/// A cursor in the steps of a task: template order, then the items of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepCursor {
    /// The step's index in its template.
    pub step_index: i32,
    /// The item of a map, -1 of every other step.
    pub item: i32,
}

impl StepCursor {
    /// Before every step.
    pub const START: Self = Self { step_index: -1, item: -1 };
}

/// A step without its payloads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.steps and tasker.template_steps")]
pub struct StepRow {
    pub step_uuid: Uuid,
    pub step_index: i32,
    /// Its place in the list that a map runs over; null of every other step.
    pub item: Option<i32>,
    /// The name in the template; of an item with its place, such as `ship[3]`.
    pub name: String,
    pub handler: String,
    pub queue: String,
    pub state: String,
    pub generation: i32,
    pub attempt: i32,
    pub max_attempts: i32,
    pub priority: i32,
    pub held_by: Option<String>,
    pub due_at: Option<DateTime<Utc>>,
    pub ready_at: Option<DateTime<Utc>>,
    pub worker: Option<String>,
    pub last_heartbeat_at: Option<DateTime<Utc>>,
    pub last_at: DateTime<Utc>,
    /// The type of the latest attempt's error.
    pub error_type: Option<String>,
    /// Of a map: how many items its list has.
    pub items: Option<i32>,
    /// Of a map: how many of them have ended, whatever came of them.
    pub items_ended: Option<i32>,
    /// Of a map: how many of them failed for good.
    pub items_failed: Option<i32>,
}

/// Steps of a task behind a cursor, the items of maps among them.
pub async fn steps(conn: &mut PgConnection, task: Uuid, after: StepCursor, limit: i64) -> Result<Vec<StepRow>, Error> {
    Ok(sqlx::query_as!(
        StepRow,
        r#"select s.step_uuid, s.step_index, nullif(s.item, -1) as item,
             d.name || case when s.item >= 0 then format('[%s]', s.item) else '' end as "name!", d.handler, s.queue, s.state,
             s.generation, s.attempt, d.max_attempts, s.priority, s.held_by, s.due_at, s.ready_at, s.claimed_by as worker,
             s.last_heartbeat_at, s.last_at, a.error->>'type' as error_type,
             m.items as "items?", m.items - m.remaining_items as items_ended, m.failed_items as "items_failed?"
           from (
             select * from tasker.steps s where s.task_uuid = $1 and (s.step_index, s.item) > ($2, $3)
             order by s.step_index, s.item limit $4) s
           join tasker.tasks t on t.task_uuid = s.task_uuid
           join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           left join tasker.maps m on m.task_uuid = s.task_uuid and m.step_uuid = s.step_uuid
           left join tasker.attempts a on a.task_uuid = $1 and a.step_uuid = s.step_uuid and a.attempt = s.attempt
           order by s.step_index, s.item"#,
        task,
        after.step_index,
        after.item,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// What went into a step, what it says while it runs, and what came of its latest attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.steps and tasker.attempts")]
pub struct StepPayloads {
    pub step_uuid: Uuid,
    /// As it is stored: texts such as `${steps.reserve.output.id}` are filled in at claim.
    pub input: Option<Value>,
    pub progress: Option<Value>,
    pub output: Option<Value>,
    pub error: Option<Value>,
}

/// The payloads of one step; `None` if the task has no such step.
pub async fn step_payloads(
    conn: &mut PgConnection,
    task: Uuid,
    name: &str,
    item: i32,
) -> Result<Option<StepPayloads>, Error> {
    Ok(sqlx::query_as!(
        StepPayloads,
        r#"select s.step_uuid, s.input, s.progress, a.output as "output?", a.error as "error?"
           from tasker.tasks t
           join tasker.template_steps d on d.template_id = t.template_id and d.name = $2
           join tasker.steps s on s.task_uuid = t.task_uuid and s.step_index = d.step_index and s.item = $3
           left join tasker.attempts a on a.task_uuid = $1 and a.step_uuid = s.step_uuid and a.attempt = s.attempt
           where t.task_uuid = $1"#,
        task,
        name,
        item
    )
    .fetch_optional(conn)
    .await?)
}

/// One execution of a step. `output`, `error`, `usage` and `milestones` are payloads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.attempts")]
pub struct AttemptRow {
    pub step_uuid: Uuid,
    pub step_index: i32,
    pub item: Option<i32>,
    pub step: String,
    pub attempt: i32,
    pub generation: i32,
    pub worker: String,
    pub worker_version: Option<String>,
    pub claimed_at: DateTime<Utc>,
    pub reported_at: Option<DateTime<Utc>>,
    pub start_offset_ms: Option<f64>,
    pub run_ms: Option<f64>,
    pub outcome: Option<String>,
    pub error_type: Option<String>,
    pub output: Option<Value>,
    pub error: Option<Value>,
    pub usage: Option<Value>,
    pub milestones: Option<Value>,
}

/// Attempts of a task that a worker claimed, by step and attempt, behind a cursor.
pub async fn attempts(
    conn: &mut PgConnection,
    task: Uuid,
    after: (StepCursor, i32),
    payloads: bool,
    limit: i64,
) -> Result<Vec<AttemptRow>, Error> {
    Ok(sqlx::query_as!(
        AttemptRow,
        r#"select s.step_uuid, s.step_index, nullif(s.item, -1) as item,
             d.name || case when s.item >= 0 then format('[%s]', s.item) else '' end as "step!", a.attempt, a.generation,
             a.worker, a.worker_version, a.claimed_at, a.reported_at, a.start_offset_ms, a.run_ms, a.outcome,
             a.error->>'type' as error_type, case when $5 then a.output end as output, case when $5 then a.error end as error,
             case when $5 then a.usage end as usage, case when $5 then a.milestones end as milestones
           from tasker.tasks t
           join tasker.steps s on s.task_uuid = t.task_uuid
           join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           join tasker.attempts a on a.task_uuid = $1 and a.step_uuid = s.step_uuid and a.attempt > 0
           where t.task_uuid = $1 and (s.step_index, s.item, a.attempt) > ($2, $3, $4)
           order by s.step_index, s.item, a.attempt limit $6"#,
        task,
        after.0.step_index,
        after.0.item,
        after.1,
        payloads,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// One row of the log. `detail` is a payload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.transitions, explained there")]
pub struct TransitionRow {
    /// The task itself, or the step.
    pub entity_uuid: Uuid,
    /// The step's name; null: it is the task's own move.
    pub step: Option<String>,
    pub version: i32,
    pub generation: i32,
    pub attempt: Option<i32>,
    pub from_state: String,
    pub to_state: String,
    pub event: String,
    pub actor: Option<String>,
    pub began_at: DateTime<Utc>,
    pub at: DateTime<Utc>,
    pub detail: Option<Value>,
}

/// The log of a task in order of time, behind `(at, entity, version)`.
pub async fn transitions(
    conn: &mut PgConnection,
    task: Uuid,
    after: Option<(DateTime<Utc>, Uuid, i32)>,
    payloads: bool,
    limit: i64,
) -> Result<Vec<TransitionRow>, Error> {
    let (at, entity, version) = match after {
        Some((at, entity, version)) => (Some(at), Some(entity), Some(version)),
        None => (None, None, None),
    };
    Ok(sqlx::query_as!(
        TransitionRow,
        r#"select l.entity_uuid, d.name || case when s.item >= 0 then format('[%s]', s.item) else '' end as step,
             l.version, l.generation, l.attempt, l.from_state, l.to_state, l.event, l.actor, l.began_at, l.at,
             case when $5 then l.detail end as detail
           from (
             select * from tasker.transitions l
             where l.task_uuid = $1 and ($2::timestamptz is null or (l.at, l.entity_uuid, l.version) > ($2, $3, $4))
             order by l.at, l.entity_uuid, l.version limit $6) l
           left join tasker.steps s on s.step_uuid = l.entity_uuid
           left join tasker.tasks t on t.task_uuid = l.task_uuid
           left join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
           order by l.at, l.entity_uuid, l.version"#,
        task,
        at,
        entity,
        version,
        payloads,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// A worker that said hello.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.workers")]
pub struct WorkerRow {
    pub worker: String,
    pub namespace: String,
    pub queues: Vec<String>,
    pub handlers: Vec<String>,
    pub slots: i32,
    pub version: Option<String>,
    pub started_at: DateTime<Utc>,
    pub seen_at: DateTime<Utc>,
    /// Whether it was seen within 30 s.
    pub live: bool,
    /// Attempts that it holds now.
    pub busy: i64,
    /// Why it is of no use, or less than it says: nothing is sent on account of what is wrong.
    #[serde(default)]
    pub problem: Option<String>,
}

/// The workers of these namespaces, or all, the live ones first; at most 1000.
pub async fn workers(conn: &mut PgConnection, namespaces: Option<&[String]>) -> Result<Vec<WorkerRow>, Error> {
    Ok(sqlx::query_as!(
        WorkerRow,
        r#"select w.worker, w.namespace, array_remove(w.queues, null) as "queues!", array_remove(w.handlers, null) as "handlers!",
             w.slots as "slots!", w.version, w.started_at, w.seen_at,
             tasker.worker_problem(w.namespace, w.queues, w.handlers, w.slots) as problem,
             w.seen_at > clock_timestamp() - interval '30 s' as "live!",
             (select coalesce(sum(cardinality(d.step_uuids)), 0) from tasker.due d where d.worker = w.worker and d.kind = 'lease') as "busy!"
           from tasker.workers w where $1::text[] is null or w.namespace = any($1)
           order by "live!" desc, w.namespace, w.worker limit 1000"#,
        namespaces
    )
    .fetch_all(conn)
    .await?)
}

/// An orchestrator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.instances")]
pub struct OrchestratorRow {
    pub instance: Uuid,
    pub version: String,
    pub started_at: DateTime<Utc>,
    pub seen_at: DateTime<Utc>,
    /// Whether it was seen within 30 s.
    pub live: bool,
}

/// The orchestrators, the live ones first; at most 1000.
pub async fn orchestrators(conn: &mut PgConnection) -> Result<Vec<OrchestratorRow>, Error> {
    Ok(sqlx::query_as!(
        OrchestratorRow,
        r#"select instance, version, started_at, seen_at, seen_at > clock_timestamp() - interval '30 s' as "live!"
           from tasker.instances order by 5 desc, started_at desc, instance limit 1000"#
    )
    .fetch_all(conn)
    .await?)
}

/// A namespace: whoever has a template in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NamespaceRow {
    /// Its name.
    pub namespace: String,
    /// How many templates it has, each counted once.
    pub templates: i64,
    /// Its live workers.
    pub workers: i64,
}

/// These namespaces, or all, by name; at most 1000.
pub async fn namespaces(conn: &mut PgConnection, own: Option<&[String]>) -> Result<Vec<NamespaceRow>, Error> {
    Ok(sqlx::query_as!(
        NamespaceRow,
        r#"select p.namespace, count(distinct p.name) as "templates!",
             (select count(*) from tasker.workers w where w.namespace = p.namespace
                and w.seen_at > clock_timestamp() - interval '30 s') as "workers!"
           from tasker.templates p where $1::text[] is null or p.namespace = any($1)
           group by p.namespace order by p.namespace limit 1000"#,
        own
    )
    .fetch_all(conn)
    .await?)
}

/// A message in quarantine. `message` and `headers` are payloads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.quarantine")]
pub struct Quarantined {
    pub quarantine_id: i64,
    pub queue: String,
    /// Of the queue; null: one of the common queues.
    pub namespace: Option<String>,
    pub msg_id: i64,
    pub reason: String,
    pub failures: i32,
    pub read_ct: i32,
    pub message: Option<Value>,
    pub headers: Option<Value>,
    pub enqueued_at: DateTime<Utc>,
    pub quarantined_at: DateTime<Utc>,
}

/// Which messages in quarantine; all of them by default.
#[derive(Debug, Clone, Copy, Default)]
pub struct QuarantineFilter<'a> {
    /// Only this one.
    pub id: Option<i64>,
    /// Of this queue.
    pub queue: Option<&'a str>,
    /// Of queues of these namespaces; the common queues belong to none.
    pub namespaces: Option<&'a [String]>,
    /// Before this one in the list.
    pub before: Option<i64>,
}

/// Messages in quarantine, newest first, with what they carry if `payloads` says so.
pub async fn quarantine(
    conn: &mut PgConnection,
    filter: QuarantineFilter<'_>,
    payloads: bool,
    limit: i64,
) -> Result<Vec<Quarantined>, Error> {
    // As text: what nobody could read must not stop anybody from looking at the rest.
    let rows = sqlx::query!(
        "select quarantine_id, queue, tasker.queue_namespace(queue) as namespace, msg_id, reason, failures, read_ct,
           case when $4 then message::text end as message, case when $4 then headers::text end as headers,
           enqueued_at, quarantined_at
         from tasker.quarantine
         where ($1::text is null or queue = $1) and ($2::text[] is null or tasker.queue_namespace(queue) = any($2))
           and ($3::bigint is null or quarantine_id < $3) and ($6::bigint is null or quarantine_id = $6)
         order by quarantine_id desc limit $5",
        filter.queue,
        filter.namespaces,
        filter.before,
        payloads,
        limit,
        filter.id
    )
    .fetch_all(conn)
    .await?;
    let readable = |json: String| serde_json::from_str(&json).unwrap_or(Value::String(json));
    Ok(rows
        .into_iter()
        .map(|row| Quarantined {
            quarantine_id: row.quarantine_id,
            queue: row.queue,
            namespace: row.namespace,
            msg_id: row.msg_id,
            reason: row.reason,
            failures: row.failures,
            read_ct: row.read_ct,
            message: row.message.map(readable),
            headers: row.headers.map(readable),
            enqueued_at: row.enqueued_at,
            quarantined_at: row.quarantined_at,
        })
        .collect())
}

/// How many messages are in quarantine, of one queue or of all.
pub async fn quarantined(conn: &mut PgConnection, queue: Option<&str>) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "n!" from tasker.quarantine where $1::text is null or queue = $1"#,
        queue
    )
    .fetch_one(conn)
    .await?)
}

/// What an operator did: to a task, or to the `subject`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.audit, explained there")]
pub struct AuditEntry {
    pub audit_id: i64,
    pub task_uuid: Option<Uuid>,
    pub subject: Option<String>,
    pub action: String,
    pub actor: String,
    pub reason: Option<String>,
    pub details: Option<Value>,
    pub at: DateTime<Utc>,
}

/// Which entries of the audit; all of them by default.
#[derive(Debug, Clone, Copy, Default)]
pub struct AuditFilter<'a> {
    /// Done to this task.
    pub task: Option<Uuid>,
    /// Done by this one.
    pub actor: Option<&'a str>,
    /// Done to tasks of these namespaces.
    pub namespaces: Option<&'a [String]>,
    /// Before this entry in the list.
    pub before: Option<i64>,
}

/// What operators did, newest first. Details only if `payloads` says so: they may hold an output
/// that was given by hand.
pub async fn audit(
    conn: &mut PgConnection,
    filter: AuditFilter<'_>,
    payloads: bool,
    limit: i64,
) -> Result<Vec<AuditEntry>, Error> {
    Ok(sqlx::query_as!(
        AuditEntry,
        "select a.audit_id, a.task_uuid, a.subject, a.action, a.actor, a.reason, case when $5 then a.details end as details, a.at
         from tasker.audit a
         where ($1::uuid is null or a.task_uuid = $1) and ($6::text is null or a.actor = $6)
           and ($3::bigint is null or a.audit_id < $3)
           and ($2::text[] is null or exists (
             select from tasker.tasks t where t.task_uuid = a.task_uuid and t.namespace = any($2)))
         order by a.audit_id desc limit $4",
        filter.task,
        filter.namespaces,
        filter.before,
        limit,
        payloads,
        filter.actor
    )
    .fetch_all(conn)
    .await?)
}

/// What moved since a moment ago, and the time of this look.
#[derive(Debug, Clone)]
pub struct Moved {
    /// Tasks of which something moved and when it last did, at most as many as were asked for.
    pub tasks: Vec<(Uuid, DateTime<Utc>)>,
    /// The database's time of this look.
    pub now: DateTime<Utc>,
}

/// The tasks with a row in the log that is younger than `since`, and those submitted since; none
/// without it. One statement, along the times of the log.
pub async fn moved_since(conn: &mut PgConnection, since: Option<DateTime<Utc>>, most: i64) -> Result<Moved, Error> {
    let rows = sqlx::query!(
        r#"select c.now as "now!", m.task_uuid as "task_uuid?", m.at
           from (select clock_timestamp() as now) c
           left join (
             select l.task_uuid, max(l.at) as at from (
               select l.task_uuid, l.at from tasker.transitions l where l.at > $1
               union all select t.task_uuid, t.created_at from tasker.tasks t where t.task_uuid >= tasker.uuid7_floor($1)) l
             group by l.task_uuid limit $2) m on true"#,
        since,
        most
    )
    .fetch_all(conn)
    .await?;
    let now = rows.first().map_or_else(DateTime::default, |row| row.now);
    Ok(Moved { tasks: rows.into_iter().filter_map(|row| row.task_uuid.zip(row.at)).collect(), now })
}
