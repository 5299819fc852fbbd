//! The messages of the steps that became ready, with the context that their attempts continue.

use serde_json::{Value, json};
use tasker_shared::message::step_message;
use tasker_shared::queue::Outbox;
use tasker_shared::state_machine::plan::Plan;
use tasker_shared::trace::context::{Baggage, Traceparent, pass_on};
use tasker_shared::trace::ids::{SpanKey, span_id};
use tracing::instrument;

use super::load::LoadedTask;

/// A message with its priority and destination.
type Letter<'a> = (i32, &'a str, Value, Value);

/// The messages of the steps that became ready.
pub(super) fn outbox(tasks: &[LoadedTask], plans: &[Plan]) -> Outbox {
    let mut letters: Vec<Letter<'_>> = Vec::new();
    for (loaded, plan) in tasks.iter().zip(plans).filter(|(_, plan)| !plan.sends.is_empty()) {
        enqueue_steps(loaded, plan, &mut letters);
    }
    // A queue is read in the order it was written in, so the urgent are written first.
    letters.sort_by_key(|(priority, ..)| std::cmp::Reverse(*priority));
    let mut outbox = Outbox::default();
    for (_, queue, body, headers) in letters {
        outbox.queues.push(queue.to_owned());
        outbox.bodies.push(body);
        outbox.headers.push(headers);
    }
    outbox
}

/// Writes the messages of one task's steps, with the context that their attempts will continue.
#[instrument(skip_all, fields(correlation_id = loaded.row.correlation_id, task_uuid = %loaded.task().uuid))]
fn enqueue_steps<'a>(loaded: &LoadedTask, plan: &'a Plan, letters: &mut Vec<Letter<'a>>) {
    let row = &loaded.row;
    let baggage = baggage(loaded);
    for sent in &plan.sends {
        // The attempt's handler.execution is known before it runs: it is what the worker continues.
        let handler = span_id(&row.trace_id, sent.step, 0, u64::from(sent.attempt.unsigned_abs()), SpanKey::Handler, 0);
        let parent = Traceparent { trace_id: row.trace_id, span_id: handler, flags: row.trace_flags };
        let mut headers = json!({
            "traceparent": parent.to_string(),
            "baggage": baggage,
        });
        if let Some(version) = sent.task_version {
            let ordinal = u64::from(version.unsigned_abs());
            let sender = span_id(&row.trace_id, loaded.task().uuid, 0, 0, SpanKey::Enqueuing, ordinal);
            headers["x-tasker-sender"] = tasker_shared::trace::otlp::hex(&sender).into();
        }
        if let Some(state) = &row.tracestate {
            headers["tracestate"] = state.clone().into();
        }
        let body = step_message(loaded.task().uuid, sent.step, sent.generation, sent.attempt, &sent.handler);
        letters.push((sent.priority, &sent.queue, body, headers));
    }
}

fn baggage(loaded: &LoadedTask) -> String {
    let row = &loaded.row;
    let mut baggage = Baggage::default();
    baggage.insert("correlation_id", &row.correlation_id);
    baggage.insert("task_uuid", &loaded.task().uuid.to_string());
    baggage.insert("namespace", &row.namespace);
    if let Some(callers) = &row.baggage {
        pass_on(&mut baggage, callers);
    }
    baggage.to_string()
}
