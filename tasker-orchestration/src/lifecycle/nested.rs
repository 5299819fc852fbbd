//! What a settle reads and writes beside the plain rows for steps that start tasks, and for the
//! tasks that they start. No statement where there is neither.

use std::collections::HashMap;

use serde_json::{Value, json};
use sqlx::PgConnection;
use tasker_shared::state_machine::plan::{ChildEnd, Failure, Outcome, StartChild};
use tasker_shared::state_machine::{Event, Plan, StepState};
use tasker_shared::store;
use tasker_shared::trace::context::Traceparent;
use tasker_shared::trace::ids::{SpanKey, span_id};
use uuid::Uuid;

use super::loaded::{LoadedTask, by_uuid};
use super::{About, Error};

/// Reads what became of the tasks that hints tell of.
pub(super) async fn load(conn: &mut PgConnection, tasks: &mut [LoadedTask], events: &[About<'_>]) -> Result<(), Error> {
    let reported = events.iter().filter_map(|about| match about.event {
        Event::ChildEnded { step, attempt } => Some((about.task, *step, *attempt)),
        _ => None,
    });
    let reported: Vec<(Uuid, Uuid, i32)> = reported.collect();
    if reported.is_empty() {
        return Ok(());
    }
    let of: HashMap<Uuid, Uuid> = reported.iter().map(|(task, step, _)| (*step, *task)).collect();
    let mut tasks = by_uuid(tasks);
    for (attempt, end) in ends(conn, &reported).await? {
        if let Some(loaded) = of.get(&attempt.0).and_then(|task| tasks.get_mut(task)) {
            loaded.snapshot.child_ends.insert(attempt, end);
        }
    }
    Ok(())
}

/// The outputs of a map's items, by index, that end by what was read here: they are not written yet.
pub(super) fn item_outputs(loaded: &LoadedTask, map: u32) -> Vec<(u32, Value)> {
    let output = |(of, end): (&(Uuid, i32), &ChildEnd)| {
        let (_, step) = loaded.step(of.0)?;
        let waits = step.index == map && step.state == StepState::Waiting && step.attempt == of.1;
        match &end.outcome {
            Outcome::Success(output) if waits => Some((step.item?, output.clone())),
            _ => None,
        }
    };
    loaded.snapshot.child_ends.iter().filter_map(output).collect()
}

/// Starts the tasks that plans ask for, tells the parents of those that ended, and ends those
/// that are awaited no more: by messages, because each is another task.
pub(super) async fn record(conn: &mut PgConnection, tasks: &[LoadedTask], plans: &[Plan]) -> Result<(), Error> {
    let (mut started, mut ended) = (Vec::new(), Vec::new());
    let (mut left, mut left_steps) = (Vec::new(), Vec::new());
    for (loaded, plan) in tasks.iter().zip(plans) {
        started.extend(plan.children.iter().map(|child| request(loaded, child)));
        if loaded.row.parent_task_uuid.is_some() && plan.task_changed && plan.task.state.is_terminal() {
            ended.push(plan.task.uuid);
        }
        if plan.cancel_open_steps && loaded.template.starts_tasks {
            left.push(plan.task.uuid);
        } else if !plan.left_children.is_empty() {
            left_steps.push((plan.task.uuid, &*plan.left_children));
        }
    }
    if !started.is_empty() {
        start(conn, started).await?;
    }
    if !ended.is_empty() {
        tell_parents(conn, &ended).await?;
    }
    if !left.is_empty() {
        cancel(conn, &left, None).await?;
    }
    for (task, steps) in left_steps {
        cancel(conn, &[task], Some(steps)).await?;
    }
    Ok(())
}

/// The request for a task: an awaited one is a part of its parent's trace, below the attempt
/// that waits for it; another begins a trace of its own.
fn request(loaded: &LoadedTask, child: &StartChild) -> Value {
    let row = &loaded.row;
    let StartChild { step, attempt, task, .. } = child;
    let mut request = json!({
        "task": loaded.task().uuid,
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
        request["may_be_kept"] = may_be_kept(loaded).into();
        request["traceparent"] = execution.into();
        request["tracestate"] = row.tracestate.clone().into();
    } else {
        request["link"] = execution.into();
    }
    request
}

/// Whether the trace of this task was not sampled, and may be exported for the end of the topmost
/// one: then those that it awaits must say when they end.
fn may_be_kept(loaded: &LoadedTask) -> bool {
    let row = &loaded.row;
    let is_topmost = row.parent_task_uuid.is_none() || row.remote_span_id.is_none();
    row.trace_flags & 1 == 0 && (row.may_be_kept || (is_topmost && !loaded.template.keep.is_empty()))
}

// The statements.

/// Starts tasks; see `tasker.start_children` for the keys of a request.
async fn start(conn: &mut PgConnection, requests: Vec<Value>) -> Result<(), store::Error> {
    sqlx::query!("select tasker.start_children($1)::text as done", Value::Array(requests)).fetch_one(conn).await?;
    Ok(())
}

/// Tells those who wait for these tasks.
async fn tell_parents(conn: &mut PgConnection, children: &[Uuid]) -> Result<(), store::Error> {
    sqlx::query!("select tasker.tell_parents($1)::text as done", children).fetch_one(conn).await?;
    Ok(())
}

/// Asks for the end of what these tasks awaited, or only these steps of theirs.
async fn cancel(conn: &mut PgConnection, tasks: &[Uuid], steps: Option<&[Uuid]>) -> Result<(), store::Error> {
    sqlx::query!("select tasker.cancel_children($1, $2)::text as done", tasks, steps).fetch_one(conn).await?;
    Ok(())
}

/// What became of the tasks that these attempts, `(task, step, attempt)`, started, by step and attempt;
/// of those that are still awaited there is no answer.
async fn ends(
    conn: &mut PgConnection,
    attempts: &[(Uuid, Uuid, i32)],
) -> Result<Vec<((Uuid, i32), ChildEnd)>, store::Error> {
    let tasks: Vec<Uuid> = attempts.iter().map(|(task, ..)| *task).collect();
    let steps: Vec<Uuid> = attempts.iter().map(|(_, step, _)| *step).collect();
    let numbers: Vec<i32> = attempts.iter().map(|(.., attempt)| *attempt).collect();
    let rows = sqlx::query!(
        r#"select step_uuid as "step_uuid!", attempt as "attempt!", output, error_type, error, link
           from tasker.child_ends($1, $2, $3)"#,
        &tasks,
        &steps,
        &numbers
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let outcome = match row.error_type {
                None => Outcome::Success(row.output.unwrap_or_default()),
                // What could not be started or kept cannot be another time.
                Some(kind) => Outcome::Failure(Failure {
                    retryable: kind == "child_failed",
                    kind,
                    message: row.error.unwrap_or_default(),
                    retry_after_ms: None,
                }),
            };
            ((row.step_uuid, row.attempt), ChildEnd { outcome, link: row.link })
        })
        .collect())
}
