//! What a settle reads and writes beside the plain rows for steps that start tasks, and for the
//! tasks that they start. No statement where there is neither.

use std::collections::HashMap;

use serde_json::{Value, json};
use sqlx::PgConnection;
use tasker_shared::state_machine::plan::{Outcome, StartChild};
use tasker_shared::state_machine::{Plan, StepState};
use tasker_shared::store::nested::{self, ChildEnd};
use tasker_shared::trace::context::Traceparent;
use tasker_shared::trace::ids::{SpanKey, span_id};
use uuid::Uuid;

use super::load::Work;
use super::{Error, Hint, Look};

/// Reads what became of the tasks that hints tell of.
pub(super) async fn load(conn: &mut PgConnection, works: &mut [Work], hints: &[Hint]) -> Result<(), Error> {
    let told = hints.iter().filter_map(|hint| match hint.look {
        Look::Child(step, attempt) => Some((hint.task, step, attempt)),
        _ => None,
    });
    let told: Vec<(Uuid, Uuid, i32)> = told.collect();
    if told.is_empty() {
        return Ok(());
    }
    let tasks: HashMap<Uuid, Uuid> = told.iter().map(|(task, step, _)| (*step, *task)).collect();
    let mut works: HashMap<Uuid, &mut Work> = works.iter_mut().map(|work| (work.row.task.uuid, work)).collect();
    for end in nested::ends(conn, &told).await? {
        if let Some(work) = tasks.get(&end.step).and_then(|task| works.get_mut(task)) {
            work.children.insert((end.step, end.attempt), end);
        }
    }
    Ok(())
}

/// The outputs of a map's items, by place, that end by what was read here: they are not written yet.
pub(super) fn item_outputs(work: &Work, map: u32) -> Vec<(u32, Value)> {
    let output = |end: &ChildEnd| {
        let step = &work.steps.get(&end.step)?.step;
        let waits = step.index == map && step.state == StepState::Waiting && step.attempt == end.attempt;
        match &end.outcome {
            Outcome::Success(output) if waits => Some((step.item?, output.clone())),
            _ => None,
        }
    };
    work.children.values().filter_map(output).collect()
}

/// Starts the tasks that plans ask for, tells the parents of those that ended, and ends those
/// that are awaited no more: by messages, because each is another task.
pub(super) async fn record(conn: &mut PgConnection, works: &[Work], plans: &[Plan]) -> Result<(), Error> {
    let (mut started, mut ended) = (Vec::new(), Vec::new());
    let (mut tasks, mut steps) = (Vec::new(), Vec::new());
    for (work, plan) in works.iter().zip(plans) {
        started.extend(plan.children.iter().map(|child| request(work, child)));
        if work.row.parent_task_uuid.is_some() && plan.task_changed && plan.task.state.is_terminal() {
            ended.push(plan.task.uuid);
        }
        if plan.cancel_open_steps && work.template.starts_tasks {
            tasks.push(plan.task.uuid);
        } else if !plan.left_children.is_empty() {
            steps.push((plan.task.uuid, &*plan.left_children));
        }
    }
    if !started.is_empty() {
        nested::start(conn, started).await?;
    }
    if !ended.is_empty() {
        nested::tell_parents(conn, &ended).await?;
    }
    if !tasks.is_empty() {
        nested::cancel(conn, &tasks, None).await?;
    }
    for (task, left) in steps {
        nested::cancel(conn, &[task], Some(left)).await?;
    }
    Ok(())
}

/// The request for a task: an awaited one is a part of its parent's trace, below the attempt
/// that waits for it; another begins a trace of its own.
fn request(work: &Work, child: &StartChild) -> Value {
    let row = &work.row;
    let StartChild { step, attempt, task, .. } = child;
    let mut request = json!({
        "task": row.task.uuid,
        "step": step,
        "attempt": attempt,
        "awaited": task.awaited,
        "namespace": task.namespace.as_ref().unwrap_or(&row.namespace),
        "template": task.template,
        "version": task.version,
        "correlation_id": row.correlation_id,
        "priority": child.priority.clamp(-9999, 9999),
    });
    let attempt = u64::from(attempt.unsigned_abs());
    let span_id = span_id(&row.trace_id, *step, 0, attempt, SpanKey::StepExecution, 0);
    let execution = Traceparent { trace_id: row.trace_id, span_id, flags: row.trace_flags }.to_string();
    if task.awaited {
        request["may_be_kept"] = may_be_kept(work).into();
        request["traceparent"] = execution.into();
        request["tracestate"] = row.tracestate.clone().into();
    } else {
        request["link"] = execution.into();
    }
    request
}

/// Whether the trace of this task was not sampled, and may be exported for the end of the topmost
/// one: then those that it awaits must say when they end.
fn may_be_kept(work: &Work) -> bool {
    let row = &work.row;
    let is_topmost = row.parent_task_uuid.is_none() || row.remote_span_id.is_none();
    row.trace_flags & 1 == 0 && (row.may_be_kept || (is_topmost && !work.template.keep.is_empty()))
}
