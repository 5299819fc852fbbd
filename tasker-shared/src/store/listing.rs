//! Lists of tasks that stay fast with a million rows: each is read along one index, newest first,
//! and no further than [`BUDGET`] rows at once.
//!
//! Read-only, and never part of a decision.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use super::views::{self, TaskFilter, TaskView};
use crate::state_machine::states::TaskState;

/// How many rows one look reads at most. What is rare may lie behind them: the answer then says
/// where to go on, with fewer tasks than were asked for, or none.
pub const BUDGET: i64 = 2_500;

/// Which tasks to list; the empty filter lists all.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of these namespaces only.
    pub namespaces: Option<Vec<String>>,
    /// Of this template only, in any version.
    pub template: Option<String>,
    /// With one of these public statuses only; none: with any.
    pub statuses: Vec<String>,
    /// With this correlation id only.
    pub correlation_id: Option<String>,
    /// With this idempotency key only.
    pub idempotency_key: Option<String>,
    /// That failed, or are blocked, with an error of this type.
    pub error_type: Option<String>,
    /// Created at this time or later.
    pub created_from: Option<DateTime<Utc>>,
    /// Created before this time.
    pub created_to: Option<DateTime<Utc>>,
    /// Created before this task: for the next page.
    pub after: Option<Uuid>,
    /// How many at most.
    pub limit: u32,
}

/// Some tasks, and where the list goes on.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    /// Newest first.
    pub tasks: Vec<TaskView>,
    /// [`Filter::after`] of the next page; `None`: there is no more.
    pub next: Option<Uuid>,
}

/// The index that a part of a list is read along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Along {
    Created,
    Open,
    Failed,
    /// One type of error.
    ErrorType,
    EndedByHand,
}

impl Along {
    /// The shortest index that holds every task in these states.
    fn of(state: TaskState) -> Self {
        match state {
            TaskState::Complete | TaskState::ResolvedManually => Self::Created,
            // An error always has a type, and what was cancelled has who did it.
            TaskState::Error => Self::Failed,
            TaskState::Cancelled => Self::EndedByHand,
            _ => Self::Open,
        }
    }
}

/// What the parts of a list have in common.
struct Bounds<'a> {
    filter: &'a Filter,
    below: Option<Uuid>,
    above: Option<Uuid>,
    templates: Option<Vec<i32>>,
    limit: i64,
}

/// The latest tasks that match, newest first. Two to five statements.
pub async fn tasks(conn: &mut PgConnection, filter: &Filter) -> Result<Listed, Error> {
    let limit = i64::from(filter.limit.max(1));
    let named = filter.namespaces.is_some() || filter.template.is_some();
    let templates = if named { Some(templates(conn, filter).await?) } else { None };
    let (above, until) = bounds(conn, filter).await?;
    let below = [filter.after, until].into_iter().flatten().min();
    let bounds = Bounds { filter, below, above, templates, limit };

    let mut ids = Vec::new();
    // Where the shortest look ended; nothing behind it has been seen.
    let mut seen_to: Option<Uuid> = None;
    for (along, states) in parts(filter) {
        let (found, ended) = part(conn, &bounds, along, &states).await?;
        ids.extend(found);
        seen_to = seen_to.max(ended);
    }
    ids.sort_unstable_by(|a, b| b.cmp(a));
    ids.dedup();
    ids.retain(|id| seen_to.is_none_or(|end| *id >= end));
    let more = ids.len() > usize::try_from(limit).unwrap_or(usize::MAX);
    ids.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let next = if more { ids.last().copied() } else { seen_to };
    let mut tasks = views::these(conn, &ids).await?;
    tasks.sort_unstable_by_key(|task| std::cmp::Reverse(task.task_uuid));
    Ok(Listed { tasks, next })
}

/// The latest tasks that match, newest first: a look along an index after the other, until there are enough.
pub async fn latest(conn: &mut PgConnection, filter: &TaskFilter) -> Result<Vec<TaskView>, Error> {
    let limit = if filter.limit == 0 { 50 } else { filter.limit };
    let mut wanted = Filter {
        namespaces: filter.namespace.clone().map(|namespace| vec![namespace]),
        template: filter.template.clone(),
        statuses: filter.status.clone().into_iter().collect(),
        correlation_id: filter.correlation_id.clone(),
        after: filter.before,
        limit,
        ..Filter::default()
    };
    let mut found = Vec::new();
    loop {
        let listed = tasks(conn, &wanted).await?;
        found.extend(listed.tasks);
        let left = limit.saturating_sub(u32::try_from(found.len()).unwrap_or(u32::MAX));
        if left == 0 || listed.next.is_none() {
            return Ok(found);
        }
        (wanted.after, wanted.limit) = (listed.next, left);
    }
}

/// The parts of a list: an index each, and the states that are looked for along it.
fn parts(filter: &Filter) -> Vec<(Along, Vec<String>)> {
    let states: Vec<TaskState> = filter.statuses.iter().flat_map(|status| views::states_of(status)).collect();
    if filter.statuses.is_empty() || filter.correlation_id.is_some() || filter.idempotency_key.is_some() {
        let along = if filter.error_type.is_some() { Along::ErrorType } else { Along::Created };
        return vec![(along, states.iter().map(|state| state.as_str().to_owned()).collect())];
    }
    let mut parts: Vec<(Along, Vec<String>)> = Vec::new();
    for state in states {
        let along = if filter.error_type.is_some() { Along::ErrorType } else { Along::of(state) };
        match parts.iter_mut().find(|(known, _)| *known == along) {
            Some((_, states)) => states.push(state.as_str().to_owned()),
            None => parts.push((along, vec![state.as_str().to_owned()])),
        }
    }
    parts
}

async fn templates(conn: &mut PgConnection, filter: &Filter) -> Result<Vec<i32>, Error> {
    Ok(sqlx::query_scalar!(
        "select template_id from tasker.templates
         where ($1::text[] is null or namespace = any($1)) and ($2::text is null or name = $2)",
        filter.namespaces.as_deref(),
        filter.template
    )
    .fetch_all(conn)
    .await?)
}

async fn bounds(conn: &mut PgConnection, filter: &Filter) -> Result<(Option<Uuid>, Option<Uuid>), Error> {
    if filter.created_from.is_none() && filter.created_to.is_none() {
        return Ok((None, None));
    }
    let row = sqlx::query!(
        "select tasker.uuid7_floor($1) as above, tasker.uuid7_floor($2) as below",
        filter.created_from,
        filter.created_to
    )
    .fetch_one(conn)
    .await?;
    Ok((row.above, row.below))
}

/// The tasks that a key or a correlation id names: few, whatever else they must be.
async fn named(conn: &mut PgConnection, bounds: &Bounds<'_>, states: Option<&[String]>) -> Result<Vec<Uuid>, Error> {
    let Bounds { filter, below, above, templates, limit } = bounds;
    let (below, above, wanted) = (below.unwrap_or(Uuid::max()), above.unwrap_or(Uuid::nil()), limit + 1);
    if let Some(key) = &filter.idempotency_key {
        let found = sqlx::query_scalar!(
            "select t.task_uuid from tasker.idempotency_keys k join tasker.tasks t on t.task_uuid = k.task_uuid
             where k.key = $1 and k.namespace = any(array(select distinct p.namespace from tasker.templates p))
               and ($2::int[] is null or t.template_id = any($2)) and ($3::text[] is null or t.state = any($3))
               and ($4::text is null or t.error_type = $4) and ($5::text is null or t.correlation_id = $5)
               and t.task_uuid < $6 and t.task_uuid >= $7
             order by t.task_uuid desc limit $8",
            key,
            templates.as_deref(),
            states,
            filter.error_type,
            filter.correlation_id,
            below,
            above,
            wanted
        );
        return Ok(found.fetch_all(conn).await?);
    }
    let found = sqlx::query_scalar!(
        "select t.task_uuid from tasker.tasks t
             where t.correlation_id = $1
               and ($2::int[] is null or t.template_id = any($2)) and ($3::text[] is null or t.state = any($3))
               and ($4::text is null or t.error_type = $4) and t.task_uuid < $5 and t.task_uuid >= $6
             order by t.task_uuid desc limit $7",
        filter.correlation_id,
        templates.as_deref(),
        states,
        filter.error_type,
        below,
        above,
        wanted
    );
    Ok(found.fetch_all(conn).await?)
}

#[expect(clippy::too_many_lines, reason = "one checked statement for each index; there is nothing else in it")]
/// The ids of one part, at most one more than the limit, and where the look ended if it was cut short.
async fn part(
    conn: &mut PgConnection,
    bounds: &Bounds<'_>,
    along: Along,
    states: &[String],
) -> Result<(Vec<Uuid>, Option<Uuid>), Error> {
    let Bounds { filter, below, above, templates, limit } = bounds;
    let (below, above, wanted) = (below.unwrap_or(Uuid::max()), above.unwrap_or(Uuid::nil()), limit + 1);
    let states = (!states.is_empty()).then_some(states);
    if filter.idempotency_key.is_some() || filter.correlation_id.is_some() {
        return Ok((named(conn, bounds, states).await?, None));
    }
    let templates = templates.as_deref();
    let found = match along {
        Along::Created if templates.is_some() => {
            // Compared as pairs, so that no other index fits: how rare a template is, the planner cannot know.
            sqlx::query_scalar!(
                r#"select n.task_uuid as "task_uuid!" from unnest($1::int[]) i(template_id)
                 cross join lateral (
                   select t.task_uuid from tasker.tasks t
                   where (t.template_id, t.task_uuid) < (i.template_id, $2) and (t.template_id, t.task_uuid) >= (i.template_id, $3)
                     and ($4::text[] is null or t.state = any($4))
                   order by t.template_id desc, t.task_uuid desc limit $5) n
                 order by n.task_uuid desc limit $5"#,
                templates,
                below,
                above,
                states,
                wanted
            )
            .fetch_all(&mut *conn)
            .await?
        }
        Along::Created => {
            sqlx::query_scalar!(
                "select task_uuid from (
                   select t.task_uuid, t.state from tasker.tasks t where t.task_uuid < $1 and t.task_uuid >= $2
                   order by t.task_uuid desc limit $5) t
                 where $3::text[] is null or state = any($3) limit $4",
                below,
                above,
                states,
                wanted,
                BUDGET
            )
            .fetch_all(&mut *conn)
            .await?
        }
        Along::Open => {
            sqlx::query_scalar!(
                "select task_uuid from (
                   select t.task_uuid, t.state, t.template_id from tasker.tasks t
                   where t.finished_at is null and t.task_uuid < $1 and t.task_uuid >= $2
                   order by t.task_uuid desc limit $6) t
                 where ($3::text[] is null or state = any($3)) and ($4::int[] is null or template_id = any($4)) limit $5",
                below,
                above,
                states,
                templates,
                wanted,
                BUDGET
            )
            .fetch_all(&mut *conn)
            .await?
        }
        Along::Failed if templates.is_some() => {
            sqlx::query_scalar!(
                r#"select n.task_uuid as "task_uuid!" from unnest($1::int[]) i(template_id)
                 cross join lateral (
                   select t.task_uuid from tasker.tasks t
                   where t.error_type is not null and (t.template_id, t.task_uuid) < (i.template_id, $2)
                     and (t.template_id, t.task_uuid) >= (i.template_id, $3) and ($4::text[] is null or t.state = any($4))
                   order by t.template_id desc, t.task_uuid desc limit $5) n
                 order by n.task_uuid desc limit $5"#,
                templates,
                below,
                above,
                states,
                wanted
            )
            .fetch_all(&mut *conn)
            .await?
        }
        Along::Failed => {
            sqlx::query_scalar!(
                "select task_uuid from (
                   select t.task_uuid, t.state from tasker.tasks t
                   where t.error_type >= '' and t.task_uuid < $1 and t.task_uuid >= $2
                   order by t.task_uuid desc limit $5) t
                 where $3::text[] is null or state = any($3) limit $4",
                below,
                above,
                states,
                wanted,
                BUDGET
            )
            .fetch_all(&mut *conn)
            .await?
        }
        Along::ErrorType => {
            sqlx::query_scalar!(
                "select task_uuid from (
                   select t.task_uuid, t.state, t.template_id from tasker.tasks t
                   where t.error_type is not null and (t.error_type, t.task_uuid) < ($7, $1)
                     and (t.error_type, t.task_uuid) >= ($7, $2)
                   order by t.error_type desc, t.task_uuid desc limit $6) t
                 where ($3::text[] is null or state = any($3)) and ($4::int[] is null or template_id = any($4)) limit $5",
                below,
                above,
                states,
                templates,
                wanted,
                BUDGET,
                filter.error_type
            )
            .fetch_all(&mut *conn)
            .await?
        }
        Along::EndedByHand if templates.is_some() => {
            sqlx::query_scalar!(
                r#"select n.task_uuid as "task_uuid!" from unnest($1::int[]) i(template_id)
                 cross join lateral (
                   select t.task_uuid from tasker.tasks t
                   where t.ended_by is not null and (t.template_id, t.task_uuid) < (i.template_id, $2)
                     and (t.template_id, t.task_uuid) >= (i.template_id, $3) and ($4::text[] is null or t.state = any($4))
                   order by t.template_id desc, t.task_uuid desc limit $5) n
                 order by n.task_uuid desc limit $5"#,
                templates,
                below,
                above,
                states,
                wanted
            )
            .fetch_all(&mut *conn)
            .await?
        }
        Along::EndedByHand => {
            sqlx::query_scalar!(
                "select task_uuid from (
                   select t.task_uuid, t.state from tasker.tasks t
                   where t.ended_by >= '' and t.task_uuid < $1 and t.task_uuid >= $2
                   order by t.task_uuid desc limit $5) t
                 where $3::text[] is null or state = any($3) limit $4",
                below,
                above,
                states,
                wanted,
                BUDGET
            )
            .fetch_all(&mut *conn)
            .await?
        }
    };
    let complete = i64::try_from(found.len()).is_ok_and(|count| count >= wanted);
    // Along the templates there is nothing in between to skip.
    let by_template = templates.is_some() && matches!(along, Along::Created | Along::Failed | Along::EndedByHand);
    if complete || by_template {
        return Ok((found, None));
    }
    Ok((found, cut_short(conn, along, below, above, filter).await?))
}

/// The last row of a look that went as far as its budget.
async fn cut_short(
    conn: &mut PgConnection,
    along: Along,
    below: Uuid,
    above: Uuid,
    filter: &Filter,
) -> Result<Option<Uuid>, Error> {
    let last = BUDGET - 1;
    Ok(match along {
        Along::Created => {
            sqlx::query_scalar!(
                "select task_uuid from tasker.tasks where task_uuid < $1 and task_uuid >= $2
                 order by task_uuid desc offset $3 limit 1",
                below,
                above,
                last
            )
            .fetch_optional(conn)
            .await?
        }
        Along::Open => {
            sqlx::query_scalar!(
                "select task_uuid from tasker.tasks where finished_at is null and task_uuid < $1 and task_uuid >= $2
                 order by task_uuid desc offset $3 limit 1",
                below,
                above,
                last
            )
            .fetch_optional(conn)
            .await?
        }
        Along::Failed => {
            sqlx::query_scalar!(
                "select task_uuid from tasker.tasks where error_type >= '' and task_uuid < $1 and task_uuid >= $2
                 order by task_uuid desc offset $3 limit 1",
                below,
                above,
                last
            )
            .fetch_optional(conn)
            .await?
        }
        Along::ErrorType => {
            sqlx::query_scalar!(
                "select task_uuid from tasker.tasks
                 where error_type is not null and (error_type, task_uuid) < ($4, $1) and (error_type, task_uuid) >= ($4, $2)
                 order by error_type desc, task_uuid desc offset $3 limit 1",
                below,
                above,
                last,
                filter.error_type
            )
            .fetch_optional(conn)
            .await?
        }
        Along::EndedByHand => {
            sqlx::query_scalar!(
                "select task_uuid from tasker.tasks where ended_by >= '' and task_uuid < $1 and task_uuid >= $2
                 order by task_uuid desc offset $3 limit 1",
                below,
                above,
                last
            )
            .fetch_optional(conn)
            .await?
        }
    })
}
