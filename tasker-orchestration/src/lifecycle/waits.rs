//! What a settle reads and writes beside the plain rows for steps that run no handler. Each
//! function costs nothing where no template of the batch has such a step.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::state_machine::plan::Answer;
use tasker_shared::state_machine::{Event, Plan, StepDefinition, StepState, TaskState};
use tasker_shared::store::waits;
use uuid::Uuid;

use super::load::{LoadedTask, by_uuid};
use super::{About, Error};

/// Reads the signals that were kept for tasks whose templates wait for any; answers the steps
/// to load because one of them may end their wait now.
pub(super) async fn load_signals(
    conn: &mut PgConnection,
    tasks: &mut [LoadedTask],
    events: &[About<'_>],
) -> Result<Vec<Uuid>, Error> {
    let listening: Vec<Uuid> =
        tasks.iter().filter(|loaded| !loaded.template.signals.is_empty()).map(|loaded| loaded.task().uuid).collect();
    if listening.is_empty() {
        return Ok(Vec::new());
    }
    let mut kept: HashMap<Uuid, Vec<_>> = HashMap::new();
    for (task, signal) in waits::kept_signals(conn, &listening).await? {
        kept.entry(task).or_default().push(signal);
    }
    let looking: HashSet<Uuid> =
        events.iter().filter(|about| *about.event == Event::SignalDue).map(|about| about.task).collect();
    let mut places = Vec::new();
    for loaded in tasks.iter_mut() {
        let task = loaded.task().uuid;
        loaded.snapshot.signals = kept.remove(&task).unwrap_or_default();
        if looking.contains(&task) {
            let named = |name: &str| loaded.snapshot.signals.iter().any(|signal| signal.name == name);
            let waits = loaded.template.signals.iter().filter(|(_, name)| named(name));
            places.extend(waits.map(|(index, _)| (task, *index)));
        }
    }
    if places.is_empty() {
        return Ok(Vec::new());
    }
    // One signal ends one wait, so of many steps that wait for it only the first are loaded.
    let waiting = waits::waiting(conn, &places).await?;
    let mut wanted = Vec::new();
    for loaded in tasks.iter() {
        let mut left: HashMap<&str, usize> = HashMap::new();
        for signal in &loaded.snapshot.signals {
            *left.entry(&signal.name).or_default() += 1;
        }
        let names: HashMap<u32, &str> = loaded.template.signals.iter().map(|(index, name)| (*index, &**name)).collect();
        for (_, index, step) in waiting.iter().filter(|(task, ..)| *task == loaded.task().uuid) {
            let left = names.get(index).and_then(|name| left.get_mut(*name));
            if let Some(left) = left.filter(|left| **left > 0) {
                *left -= 1;
                wanted.push(*step);
            }
        }
    }
    Ok(wanted)
}

/// Reads when the steps must have ended of which hints say that they are late.
pub(super) async fn load_deadlines(
    conn: &mut PgConnection,
    tasks: &mut [LoadedTask],
    events: &[About<'_>],
) -> Result<(), Error> {
    let late = events.iter().filter_map(|about| match about.event {
        Event::StepTotalDue { step } => Some((about.task, *step)),
        _ => None,
    });
    let late: Vec<(Uuid, Uuid)> = late.collect();
    if late.is_empty() {
        return Ok(());
    }
    let mut tasks = by_uuid(tasks);
    for (task, step, at) in waits::deadlines(conn, &late).await? {
        if let Some(loaded) = tasks.get_mut(&task)
            && let Some((key, _)) = loaded.step(step)
        {
            loaded.snapshot.deadlines.insert(key, at);
        }
    }
    Ok(())
}

/// Writes what the plans say of steps without a handler.
pub(super) async fn record(
    conn: &mut PgConnection,
    tasks: &[LoadedTask],
    plans: &[Plan],
    at: DateTime<Utc>,
) -> Result<(), Error> {
    let new_steps = plans.iter().flat_map(|plan| &plan.new_steps);
    let due: Vec<_> = new_steps.filter_map(|step| Some((step.uuid, step.due_at?))).collect();
    if !due.is_empty() {
        waits::set_due(conn, &due).await?;
    }
    let deadlines = plans.iter().flat_map(|plan| plan.deadlines.iter().map(|(step, at)| (plan.task.uuid, *step, *at)));
    let deadlines: Vec<_> = deadlines.collect();
    if !deadlines.is_empty() {
        waits::set_deadlines(conn, &deadlines).await?;
    }
    let answers: Vec<(Uuid, &Answer)> =
        plans.iter().flat_map(|plan| plan.answers.iter().map(|answer| (plan.task.uuid, answer))).collect();
    let used: Vec<i64> = plans.iter().flat_map(|plan| plan.used_signals.iter().copied()).collect();
    if !answers.is_empty() {
        waits::answer(conn, &answers, &used, at).await?;
    }
    let ended: Vec<Uuid> = tasks
        .iter()
        .zip(plans)
        .filter(|(loaded, plan)| !loaded.snapshot.signals.is_empty() && plan.task.state.is_terminal())
        .map(|(loaded, _)| loaded.task().uuid)
        .collect();
    if !ended.is_empty() {
        waits::forget_signals(conn, &ended).await?;
    }
    if let Some(over) = over(tasks, plans) {
        waits::forget_due(conn, &over).await?;
    }
    Ok(())
}

/// The tasks and steps that these plans end and for which something may still be due. A task without
/// timeouts, waits and a delayed start has nothing, and pays for no look.
fn over(tasks: &[LoadedTask], plans: &[Plan]) -> Option<waits::Over> {
    let mut over = waits::Over::default();
    for (loaded, plan) in tasks.iter().zip(plans).filter(|(_, plan)| !plan.is_empty()) {
        let (task, before) = (plan.task.uuid, loaded.task());
        if plan.task.state.is_terminal() {
            let may_start =
                before.run_at.is_some() || matches!(before.state, TaskState::Pending | TaskState::Suspended);
            if loaded.template.has_timers || may_start {
                over.tasks.push(task);
            }
        }
        let ended =
            plan.steps.iter().map(|(step, _)| step).chain(&plan.new_steps).filter(|step| step.state.is_terminal());
        for step in ended {
            if loaded.template.has_timers
                && !plan.task.state.is_terminal()
                && loaded.template.definition.steps.get(step.index as usize).is_some_and(StepDefinition::has_timers)
            {
                over.steps.push((task, step.uuid));
            }
            let before = loaded.step(step.uuid).map(|(_, before)| before);
            let retrying = before.filter(|before| before.state == StepState::WaitingForRetry);
            over.retries.extend(retrying.and_then(|before| Some((task, before.due_at?))));
        }
    }
    (!over.tasks.is_empty() || !over.steps.is_empty() || !over.retries.is_empty()).then_some(over)
}
