//! The transition actions: what is sent out once a settle has committed.
//!
//! Nothing here may fail or wait: the work is durable already. The log rows that were just
//! written go to the exporter as they are, so the tree is never read back from the database.

use crate::export::Batch;
use chrono::{DateTime, Utc};
use tasker_shared::state_machine::attempt_history::{Claimed, attempt_history};
use tasker_shared::state_machine::plan::{Plan, Step};
use tasker_shared::trace::log::{Attempt, Head, StepInfo, TaskLog, Transition};

use tracing::instrument;

use super::loaded::LoadedTask;
use super::write::{Applied, Committed};
use super::{Shared, measure};

/// Runs the actions.
pub(super) fn run(shared: &Shared, done: Committed) {
    measure::committed(&done);
    if done.plans.iter().any(|plan| !plan.due.is_empty()) {
        shared.due.notify_one();
    }
    if done.plans.iter().any(|plan| !plan.sends.is_empty()) {
        shared.claims.notify_one();
    }
    if frees_limit_slots(shared, &done) {
        shared.admission.wake.notify_one();
    }
    shared.admission.settled();
    // The room may be older than the queue or the worker that these steps wait for: look at once.
    let held =
        |plan: &Plan| plan.steps.iter().map(|(step, _)| step).chain(&plan.new_steps).any(|step| step.held_by.is_some());
    if done.plans.iter().any(held) {
        shared.admission.wake.notify_one();
    }
    for (loaded, plan) in
        done.tasks.iter().zip(&done.plans).filter(|(_, plan)| plan.task_changed && plan.task.state.is_terminal())
    {
        ended(loaded, plan);
    }
    export(shared, done);
}

/// Whether an attempt that may have had a slot under a limit was closed.
fn frees_limit_slots(shared: &Shared, done: &Committed) -> bool {
    let cancelled = done.applied.cancelled.iter().any(|step| step.had_attempt);
    if !cancelled && done.plans.iter().all(|plan| plan.closed.is_empty()) {
        return false;
    }
    // What an end cancelled was never loaded: any step of its template may have been among it.
    shared.admission.with_room(|room| room.has_limits())
        || done.tasks.iter().zip(&done.plans).any(|(loaded, plan)| {
            let steps = &loaded.template.definition.steps;
            let limited = |index: u32| !steps[index as usize].limits.is_empty();
            (plan.cancel_open_steps && steps.iter().any(|step| !step.limits.is_empty()))
                || plan.closed.iter().any(|(step, _)| loaded.step(*step).is_some_and(|(_, step)| limited(step.index)))
        })
}

/// Says that a task has ended.
#[instrument(skip_all, fields(correlation_id = loaded.row.correlation_id, task_uuid = %plan.task.uuid))]
fn ended(loaded: &LoadedTask, plan: &Plan) {
    tracing::debug!(namespace = %loaded.row.namespace, state = %plan.task.state, reason = plan.task.reason, "task ended");
}

/// Hands the committed transitions to the exporter.
fn export(shared: &Shared, done: Committed) {
    let (Some(exporter), Some(export)) = (shared.exporter(), done.export) else {
        return;
    };
    let Applied { at, cancelled } = done.applied;
    let (mut slices, mut read) = (Vec::with_capacity(export.task_uuids.len()), Vec::new());
    for (loaded, plan) in
        done.tasks.iter().zip(&done.plans).filter(|(_, plan)| export.task_uuids.contains(&plan.task.uuid))
    {
        // What an ending task cancelled was never loaded: that one log is read.
        // So is that of a task which was not sampled and may be kept for its end.
        if loaded.row.trace_flags & 1 == 0 || cancelled.iter().any(|step| step.task_uuid == plan.task.uuid) {
            read.push(plan.task.uuid);
        } else {
            slices.push(slice(loaded, plan, done.began_at, at));
        }
    }
    exporter.hand_over(Batch { batch_id: export.batch_id, at, slices, read });
}

/// The slice of the log that this settle made final: its moves, and those of the attempts it closed.
fn slice(loaded: &LoadedTask, plan: &Plan, began_at: DateTime<Utc>, at: DateTime<Utc>) -> TaskLog {
    let mut transitions: Vec<Transition> = Vec::with_capacity(plan.moves.len() + plan.closed.len() * 3);
    let mut attempts = Vec::with_capacity(plan.closed.len());
    for (step, _) in &plan.closed {
        let Some((_, row)) = loaded.step(*step) else {
            continue;
        };
        let attempt = loaded.attempts.get(step);
        transitions.extend(history(row, attempt));
        attempts.extend(attempt.cloned());
    }
    transitions.extend(plan.moves.iter().map(|made| Transition::of(made.clone(), began_at, at)));
    let definition = &loaded.template.definition;
    let touched = plan.steps.iter().map(|(step, _)| step).chain(&plan.new_steps);
    let info = |step: &Step| {
        let defined = &definition.steps[step.index as usize];
        StepInfo {
            index: step.index,
            item: step.item,
            name: defined.name.clone(),
            handler: defined.handler.clone(),
            queue: defined.queue.clone(),
            max_attempts: defined.retry.max_attempts,
        }
    };
    TaskLog {
        head: head(loaded, plan, began_at),
        transitions,
        attempts,
        steps: touched.filter(|step| step.version > 0).map(|step| (step.uuid, info(step))).collect(),
    }
}

/// The history of a closed attempt, made from its rows: the moves before the one that closed it.
fn history(step: &Step, attempt: Option<&Attempt>) -> impl Iterator<Item = Transition> + use<> {
    let claimed = attempt.map(|attempt| Claimed {
        worker: &attempt.worker,
        began_at: attempt.claim_began_at,
        at: attempt.claimed_at,
        reported: attempt.report_began_at.zip(attempt.reported_at),
    });
    attempt_history(step, claimed).into_iter().map(|(made, began_at, at)| Transition::of(made, began_at, at))
}

fn head(loaded: &LoadedTask, plan: &Plan, began_at: DateTime<Utc>) -> Head {
    let (row, task, definition) = (&loaded.row, loaded.task(), &loaded.template.definition);
    let same = plan.task.generation == task.generation;
    Head {
        task_uuid: plan.task.uuid,
        namespace: definition.namespace.clone(),
        task_name: definition.name.clone(),
        template_version: definition.version.clone(),
        correlation_id: row.correlation_id.clone(),
        parent_correlation_id: row.parent_correlation_id.clone(),
        parent_task_uuid: row.parent_task_uuid,
        priority: task.priority,
        generation: plan.task.generation,
        generation_began_at: if same { task.generation_began_at } else { began_at },
        created_at: row.created_at,
        trace_id: row.trace_id,
        remote_span_id: row.remote_span_id,
        root_link: row.root_link.clone(),
        trace_flags: row.trace_flags,
        tracestate: row.tracestate.clone(),
    }
}
