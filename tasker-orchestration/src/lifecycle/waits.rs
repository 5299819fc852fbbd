//! What a settle reads and writes beside the plain rows for steps that run no handler. Each
//! function costs nothing where no template of the batch has such a step.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::state_machine::plan::Answer;
use tasker_shared::state_machine::{Plan, StepDefinition, StepState, TaskState};
use tasker_shared::store::waits;
use uuid::Uuid;

use super::load::Work;
use super::{Error, Hint, Look};

/// Reads the signals that were kept for tasks whose templates wait for any; answers the steps
/// to load because one of them may end their wait now.
pub(super) async fn load_signals(
    conn: &mut PgConnection,
    works: &mut [Work],
    hints: &[Hint],
) -> Result<Vec<Uuid>, Error> {
    let listening: Vec<Uuid> =
        works.iter().filter(|work| !work.template.signals.is_empty()).map(|work| work.row.task.uuid).collect();
    if listening.is_empty() {
        return Ok(Vec::new());
    }
    let mut kept: HashMap<Uuid, Vec<_>> = HashMap::new();
    for (task, signal) in waits::kept_signals(conn, &listening).await? {
        kept.entry(task).or_default().push(signal);
    }
    let looking: HashSet<Uuid> =
        hints.iter().filter(|hint| matches!(hint.look, Look::Signal)).map(|hint| hint.task).collect();
    let mut places = Vec::new();
    for work in works.iter_mut() {
        let task = work.row.task.uuid;
        work.signals = kept.remove(&task).unwrap_or_default();
        if looking.contains(&task) {
            let named = |name: &str| work.signals.iter().any(|signal| signal.name == name);
            let waits = work.template.signals.iter().filter(|(_, name)| named(name));
            places.extend(waits.map(|(index, _)| (task, *index)));
        }
    }
    if places.is_empty() {
        return Ok(Vec::new());
    }
    // One signal ends one wait, so of many steps that wait for it only the first are loaded.
    let waiting = waits::waiting(conn, &places).await?;
    let mut wanted = Vec::new();
    for work in works.iter() {
        let mut left: HashMap<&str, usize> = HashMap::new();
        for signal in &work.signals {
            *left.entry(&signal.name).or_default() += 1;
        }
        let names: HashMap<u32, &str> = work.template.signals.iter().map(|(index, name)| (*index, &**name)).collect();
        for (_, index, step) in waiting.iter().filter(|(task, ..)| *task == work.row.task.uuid) {
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
pub(super) async fn load_deadlines(conn: &mut PgConnection, works: &mut [Work], hints: &[Hint]) -> Result<(), Error> {
    let late = hints.iter().filter_map(|hint| match hint.look {
        Look::StepTotal(step) => Some((hint.task, step)),
        _ => None,
    });
    let late: Vec<(Uuid, Uuid)> = late.collect();
    if late.is_empty() {
        return Ok(());
    }
    let mut works: HashMap<Uuid, &mut Work> = works.iter_mut().map(|work| (work.row.task.uuid, work)).collect();
    for (task, step, at) in waits::deadlines(conn, &late).await? {
        if let Some(work) = works.get_mut(&task) {
            work.deadlines.insert(step, at);
        }
    }
    Ok(())
}

/// Writes what the plans say of steps without a handler.
pub(super) async fn record(
    conn: &mut PgConnection,
    works: &[Work],
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
    let ended: Vec<Uuid> = works
        .iter()
        .zip(plans)
        .filter(|(work, plan)| !work.signals.is_empty() && plan.task.state.is_terminal())
        .map(|(work, _)| work.row.task.uuid)
        .collect();
    if !ended.is_empty() {
        waits::forget_signals(conn, &ended).await?;
    }
    if let Some(over) = over(works, plans) {
        waits::forget_due(conn, &over).await?;
    }
    Ok(())
}

/// The tasks and steps that these plans end and for which something may still be due. A task without
/// timeouts, waits and a delayed start has nothing, and pays for no look.
fn over(works: &[Work], plans: &[Plan]) -> Option<waits::Over> {
    let mut over = waits::Over::default();
    for (work, plan) in works.iter().zip(plans).filter(|(_, plan)| !plan.is_empty()) {
        let (task, before) = (plan.task.uuid, &work.row.task);
        if plan.task.state.is_terminal() {
            let may_start =
                before.run_at.is_some() || matches!(before.state, TaskState::Pending | TaskState::Suspended);
            if work.template.has_timers || may_start {
                over.tasks.push(task);
            }
        }
        let ended =
            plan.steps.iter().map(|(step, _)| step).chain(&plan.new_steps).filter(|step| step.state.is_terminal());
        for step in ended {
            if work.template.has_timers
                && !plan.task.state.is_terminal()
                && work.template.definition.steps.get(step.index as usize).is_some_and(StepDefinition::has_timers)
            {
                over.steps.push((task, step.uuid));
            }
            let before = work.steps.get(&step.uuid).map(|row| &row.step);
            let retrying = before.filter(|before| before.state == StepState::WaitingForRetry);
            over.retries.extend(retrying.and_then(|before| Some((task, before.due_at?))));
        }
    }
    (!over.tasks.is_empty() || !over.steps.is_empty() || !over.retries.is_empty()).then_some(over)
}
