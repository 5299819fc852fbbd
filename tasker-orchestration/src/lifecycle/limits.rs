//! The limits that apply to the held steps which a batch admits: locked before they are decided on,
//! written after.

use std::collections::{BTreeMap, HashMap};

use sqlx::PgConnection;
use tasker_shared::state_machine::Event;
use tasker_shared::state_machine::flow::Places;
use tasker_shared::state_machine::plan::Plan;
use uuid::Uuid;

use super::loaded::LoadedTask;
use super::{About, Error, Shared};
use crate::limits::{self, Wanted};

/// Takes the locks of the limits that apply to the held steps these hints admit: none to lock
/// costs nothing. After the tasks and steps, before any queue.
pub(super) async fn lock_limits(
    shared: &Shared,
    conn: &mut PgConnection,
    tasks: &[LoadedTask],
    events: &[About<'_>],
) -> Result<Places, Error> {
    let admitted: Vec<(Uuid, Uuid)> = events
        .iter()
        .filter_map(|about| match about.event {
            Event::Admit { step } => Some((about.task, *step)),
            _ => None,
        })
        .collect();
    if admitted.is_empty() {
        return Ok(Places::default());
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
        return Ok(Places::default());
    }
    let wanted: Vec<Wanted> = wanted.into_values().collect();
    Ok(limits::lock(conn, &wanted).await?)
}

/// Writes what only held and limited steps have: their lanes, and the places that were taken.
pub(super) async fn record_flow(conn: &mut PgConnection, plans: &[Plan], places: &Places) -> Result<(), Error> {
    let lanes: Vec<(Uuid, String)> = plans.iter().flat_map(|plan| plan.lanes.iter().cloned()).collect();
    if !lanes.is_empty() {
        limits::set_lanes(conn, &lanes).await?;
    }
    Ok(limits::record(conn, places).await?)
}
