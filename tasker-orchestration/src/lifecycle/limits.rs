//! Limits and pauses: what applies to the held steps that a batch admits, locked before they are decided
//! on and written after; and whose turn there is to look at.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::state_machine::Event;
use tasker_shared::state_machine::flow::{Allows, Free, LimitSlots};
use tasker_shared::state_machine::plan::Plan;
use tasker_shared::store::Error;
use uuid::Uuid;

use super::loaded::LoadedTask;
use super::{About, Shared};

/// Takes the locks of the limits that apply to the held steps these hints admit: none to lock
/// costs nothing. After the tasks and steps, before any queue.
pub(super) async fn lock_limits(
    shared: &Shared,
    conn: &mut PgConnection,
    tasks: &[LoadedTask],
    events: &[About<'_>],
) -> Result<LimitSlots, Error> {
    let admitted: Vec<(Uuid, Uuid)> = events
        .iter()
        .filter_map(|about| match about.event {
            Event::Admit { step } => Some((about.task, *step)),
            _ => None,
        })
        .collect();
    if admitted.is_empty() {
        return Ok(LimitSlots::default());
    }
    let tasks: HashMap<Uuid, &LoadedTask> = tasks.iter().map(|task| (task.task().uuid, task)).collect();
    let mut wanted: BTreeMap<String, Wanted> = BTreeMap::new();
    for (task, step) in admitted {
        let Some((task, step)) = tasks.get(&task).and_then(|task| Some((task, task.step(step)?.1))) else {
            continue;
        };
        let definition = &task.template.definition;
        // A key that leads nowhere failed its step when it became ready.
        let limits = definition.limits(step.index, &task.task().input).unwrap_or_default();
        let handler = &definition.steps[step.index as usize].handler;
        let set = shared.admission.with_room(|room| room.limits_of(&definition.namespace, handler));
        let limits = limits.into_iter().map(|limit| (limit.name, Some(limit.allows)));
        for (name, allows) in limits.chain(set.into_iter().map(|name| (name, None))) {
            let namespace = definition.namespace.clone();
            wanted.entry(name.clone()).or_insert(Wanted { namespace, name, allows });
        }
    }
    if wanted.is_empty() {
        return Ok(LimitSlots::default());
    }
    let wanted: Vec<Wanted> = wanted.into_values().collect();
    lock(conn, &wanted).await
}

/// Writes what only held and limited steps have: their hold groups, and the slots that were taken.
pub(super) async fn record_flow(conn: &mut PgConnection, plans: &[Plan], slots: &LimitSlots) -> Result<(), Error> {
    let groups: Vec<(Uuid, String)> = plans.iter().flat_map(|plan| plan.hold_groups.iter().cloned()).collect();
    if !groups.is_empty() {
        set_hold_groups(conn, &groups).await?;
    }
    record(conn, slots).await
}

// The statements.

/// What every orchestrator knows of what is paused and limited, a moment late at most.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// The queues that are paused.
    pub paused: HashSet<String>,
    /// The limits of namespaces and handlers, by name.
    pub limits: HashSet<String>,
}

/// Reads what is paused and limited.
pub async fn rules(conn: &mut PgConnection) -> Result<Rules, Error> {
    let rows = sqlx::query!(
        r#"select true as "paused!", queue as "name!" from tasker.paused_queues
           union all select false, name from tasker.limits where kind <> 'template'"#
    )
    .fetch_all(conn)
    .await?;
    let names = |paused| rows.iter().filter(move |row| row.paused == paused).map(|row| row.name.clone()).collect();
    Ok(Rules { paused: names(true), limits: names(false) })
}

/// A limit to lock: its namespace, and what a template says it allows.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// The namespace that it belongs to.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: String,
    /// `None`: its row says it.
    pub allows: Option<Allows>,
}

/// Takes the locks of these limits, in the order of their ids, and says what they have left.
/// Must come after the locks of tasks and steps.
pub async fn lock(conn: &mut PgConnection, wanted: &[Wanted]) -> Result<LimitSlots, Error> {
    let namespaces: Vec<&str> = wanted.iter().map(|limit| &*limit.namespace).collect();
    let names: Vec<&str> = wanted.iter().map(|limit| limit.name.as_str()).collect();
    let of_template: Vec<bool> = wanted.iter().map(|limit| limit.allows.is_some()).collect();
    let (mut at_once, mut rate, mut per) = (Vec::new(), Vec::new(), Vec::new());
    for limit in wanted {
        let (most, times) = match limit.allows {
            Some(Allows::AtOnce(most)) => (Some(most), None),
            Some(Allows::Rate(times, each)) => (None, Some((times, each))),
            None => (None, None),
        };
        at_once.push(most);
        rate.push(times.map(|(times, _)| times));
        per.push(times.map(|(_, each)| i64::try_from(each.as_millis()).unwrap_or(i64::MAX).max(1)));
    }
    let rows = sqlx::query!(
        r#"select limit_id as "limit_id!", name as "name!", places, tokens
           from tasker.lock_limits($1, $2, $3, $4, $5, $6)"#,
        &namespaces as &[&str],
        &names as &[&str],
        &of_template,
        &at_once as &[Option<i32>],
        &rate as &[Option<i32>],
        &per as &[Option<i64>]
    )
    .fetch_all(conn)
    .await?;
    let mut slots = LimitSlots::default();
    for row in rows {
        slots.set(row.name, Free { limit_id: row.limit_id, slots: row.places, tokens: row.tokens });
    }
    Ok(slots)
}

/// Writes what was taken, under the locks of [`lock`].
pub async fn record(conn: &mut PgConnection, slots: &LimitSlots) -> Result<(), Error> {
    let (steps, limits): (Vec<Uuid>, Vec<i64>) = slots.taken().iter().copied().unzip();
    if steps.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "with taken as (
           insert into tasker.places (limit_id, step_uuid)
           select t.limit_id, t.step_uuid from unnest($1::uuid[], $2::bigint[]) t(step_uuid, limit_id)
           join tasker.limits l on l.limit_id = t.limit_id and l.concurrency is not null
           on conflict do nothing
         )
         update tasker.limits l set filled_at = c.now, tokens = least(l.rate, coalesce(l.tokens, l.rate)
             + greatest(extract(epoch from c.now - coalesce(l.filled_at, c.now)), 0) * 1000 * l.rate / l.per_ms) - n.count
         from (select clock_timestamp() as now) c,
           (select t.limit_id, count(*) as count from unnest($2::bigint[]) t(limit_id) group by t.limit_id) n
         where l.limit_id = n.limit_id and l.rate is not null",
        &steps,
        &limits
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Writes in which hold groups held steps wait.
pub async fn set_hold_groups(conn: &mut PgConnection, groups: &[(Uuid, String)]) -> Result<(), Error> {
    let (steps, groups): (Vec<Uuid>, Vec<&str>) = groups.iter().map(|(step, group)| (*step, group.as_str())).unzip();
    sqlx::query!(
        "update tasker.steps s set lane = n.lane from unnest($1::uuid[], $2::text[]) n(step_uuid, lane)
         where s.step_uuid = n.step_uuid and s.lane is distinct from n.lane",
        &steps,
        &groups as &[&str]
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A hold group, in which held steps wait: those of one group are subject to the same limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HoldGroup {
    /// Of all its steps.
    pub priority: i32,
    /// As [`tasker_shared::state_machine::Definition::hold_group`] makes it.
    pub lane: String,
}

/// The hold groups of a queue, most urgent first, those behind `after` before the others, at most `look`.
pub async fn hold_groups(
    conn: &mut PgConnection,
    queue: &str,
    after: &str,
    look: i32,
) -> Result<Vec<HoldGroup>, Error> {
    let groups = sqlx::query_as!(
        HoldGroup,
        r#"select priority as "priority!", lane as "lane!" from tasker.held_lanes($1, $2, $3)"#,
        queue,
        after,
        look
    );
    Ok(groups.fetch_all(conn).await?)
}

/// A held step at the head of its hold group.
#[derive(Debug, Clone)]
pub struct First {
    pub task_uuid: Uuid,
    pub step_uuid: Uuid,
    /// The index of its hold group in the question, from 1.
    pub place: i32,
    pub ready_at: DateTime<Utc>,
}

/// The first steps of each of these hold groups, at most as many as its quota.
pub async fn first_in_groups(
    conn: &mut PgConnection,
    queue: &str,
    groups: &[(&HoldGroup, i32)],
) -> Result<Vec<First>, Error> {
    let priorities: Vec<i32> = groups.iter().map(|(group, _)| group.priority).collect();
    let names: Vec<&str> = groups.iter().map(|(group, _)| group.lane.as_str()).collect();
    let quotas: Vec<i32> = groups.iter().map(|(_, quota)| *quota).collect();
    let steps = sqlx::query_as!(
        First,
        r#"select task_uuid as "task_uuid!", step_uuid as "step_uuid!", place as "place!", ready_at as "ready_at!"
           from tasker.first_in_lanes($1, $2, $3, $4)"#,
        queue,
        &priorities,
        &names as &[&str],
        &quotas
    );
    Ok(steps.fetch_all(conn).await?)
}

/// Forgets limits of templates that are not in use any more; answers how many.
pub async fn forget_limits(conn: &mut PgConnection) -> Result<i32, Error> {
    Ok(sqlx::query_scalar!(r#"select tasker.forget_limits() as "n!""#).fetch_one(conn).await?)
}
