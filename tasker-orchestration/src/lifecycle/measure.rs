//! The metrics of a settle, counted once it has committed: numbers of this process only.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tasker_shared::metrics::{
    AttemptEnd, Exemplar, OfHandler, OfNamespace, OfSource, OfTemplate, StepEnd, TaskEnd, metrics,
};
use tasker_shared::state_machine::plan::{Outcome, Plan};
use tasker_shared::state_machine::states::Change;
use tasker_shared::state_machine::{StepEvent, StepState, TaskEvent};
use tasker_shared::trace::tree;
use uuid::Uuid;

use super::About;
use super::loaded::LoadedTask;
use super::queue::{STEP_RESULTS, TASK_REQUESTS};
use super::write::Committed;

/// Where these hints came from: their queue, or `due` if no message brought them.
pub(super) fn source(queue: &str, events: &[About<'_>]) -> OfSource {
    let by_message = events.iter().any(|about| about.msg_id.is_some());
    let source = if queue == TASK_REQUESTS { TASK_REQUESTS } else { STEP_RESULTS };
    OfSource { source: if by_message { source } else { "due" } }
}

/// A settle of so many hints took so long.
pub(super) fn settled(source: &OfSource, hints: usize, took: Duration) {
    #[expect(clippy::cast_precision_loss, reason = "a batch has thousands of hints at most")]
    metrics().settle_batch.of(source).observe(hints as f64, None, None);
    metrics().settle_duration.of(source).observe(took.as_secs_f64(), None, None);
}

/// Counts what has committed.
pub(super) fn committed(done: &Committed) {
    for (loaded, plan) in done.tasks.iter().zip(&done.plans) {
        if plan.ignored > 0 {
            metrics().hints_ignored.inc_by(plan.ignored.into());
        }
        if !plan.is_empty() {
            measure(loaded, plan, done.applied.at);
        }
    }
    if done.applied.cancelled.is_empty() {
        return;
    }
    let tasks: HashMap<Uuid, &LoadedTask> = done.tasks.iter().map(|loaded| (loaded.task().uuid, loaded)).collect();
    for loaded in done.applied.cancelled.iter().filter_map(|step| tasks.get(&step.task_uuid)) {
        let namespace = loaded.template.definition.namespace.clone();
        metrics().steps_ended.of(&StepEnd { namespace, state: StepState::Cancelled.as_str() }).inc();
    }
}

fn measure(loaded: &LoadedTask, plan: &Plan, at: DateTime<Utc>) {
    let (m, row, definition) = (metrics(), &loaded.row, &loaded.template.definition);
    let (namespace, template) = (&definition.namespace, &definition.name);
    let exemplar = Exemplar::of(row.trace_id, row.trace_flags);
    let of_template = || OfTemplate { namespace: namespace.clone(), template: template.clone() };
    if !plan.sends.is_empty() {
        let sent = u64::try_from(plan.sends.len()).unwrap_or(u64::MAX);
        m.steps_enqueued.of(&OfNamespace { namespace: namespace.clone() }).inc_by(sent);
    }
    let closed: HashSet<(Uuid, i32)> = plan.closed.iter().copied().collect();
    for made in &plan.moves {
        let (_, event, to) = match made.change {
            Change::Task((_, event, _)) => {
                if event == TaskEvent::Start {
                    m.tasks_started.of(&of_template()).inc();
                }
                continue;
            }
            Change::Step(change) => change,
        };
        if to.is_terminal() {
            m.steps_ended.of(&StepEnd { namespace: namespace.clone(), state: to.as_str() }).inc();
        }
        if made.attempt.is_some_and(|attempt| closed.contains(&(made.entity, attempt))) && tree::closes(event, to) {
            attempt_ended(loaded, (made.entity, event, to), exemplar, at);
        }
    }
    if plan.task_changed && plan.task.state.is_terminal() {
        let outcome = plan.task.state.public_status();
        let ended = TaskEnd { namespace: namespace.clone(), template: template.clone(), outcome };
        m.tasks_ended.of(&ended).inc();
        m.task_duration.of(&of_template()).observe(seconds(row.created_at, at), exemplar, None);
    }
}

/// `closing` is the step, and the move that closed its attempt.
fn attempt_ended(
    loaded: &LoadedTask,
    closing: (Uuid, StepEvent, StepState),
    exemplar: Option<Exemplar>,
    at: DateTime<Utc>,
) {
    let (step, event, to) = closing;
    let (m, definition) = (metrics(), &loaded.template.definition);
    let Some((key, step)) = loaded.step(step) else {
        return;
    };
    let (namespace, handler) = (&definition.namespace, &definition.steps[step.index as usize].handler);
    // A step that starts a task has none, and its attempt is that task's whole life.
    if handler.is_empty() {
        return;
    }
    let kind = match loaded.snapshot.outcomes.get(&key) {
        Some(Outcome::Failure(failure)) => Some(&*failure.kind),
        _ => None,
    };
    let outcome = tree::outcome(event, to, kind);
    m.attempts.of(&AttemptEnd { namespace: namespace.clone(), handler: handler.clone(), outcome }).inc();
    let Some(attempt) = loaded.attempts.get(&step.uuid) else {
        return;
    };
    let of_namespace = OfNamespace { namespace: Arc::clone(namespace) };
    if let Some(sent_at) = step.enqueued_at {
        m.queue_wait.of(&of_namespace).observe(seconds(sent_at, attempt.claimed_at), exemplar, None);
    }
    if let Some(run_ms) = attempt.run_ms {
        let of_handler = OfHandler { namespace: namespace.clone(), handler: handler.clone() };
        m.handler_duration.of(&of_handler).observe(run_ms / 1000.0, exemplar, None);
    }
    if let Some(reported_at) = attempt.reported_at {
        m.result_wait.of(&of_namespace).observe(seconds(reported_at, at), exemplar, None);
    }
}

fn seconds(from: DateTime<Utc>, to: DateTime<Utc>) -> f64 {
    (to - from).as_seconds_f64().max(0.0)
}
