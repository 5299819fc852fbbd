//! What the two queues bring: each message becomes the event that it tells of. A message is a hint to
//! look: the row is the truth.
//!
//! `docs/reference/messages.md` is written against this. Unknown fields are ignored; a message that cannot be read
//! is quarantined with the reason given here, never a crash.

use std::time::Duration;

use serde_json::{Map, Value};
use tasker_shared::state_machine::decide::{ByHand, Event, Operator};
use tracing::instrument;
use uuid::Uuid;

use super::faults::quarantine;
use super::queue::{Message, STEP_RESULTS, TASK_REQUESTS};
use super::{Error, Hint, Request, SendSignal, Shared, batch};

/// A settler whose results all wait with others looks again after this, at the latest.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Settles one batch of results.
#[instrument(level = "debug", skip_all, fields(messages = messages.len()))]
pub async fn settle_results(shared: &Shared, messages: Vec<Message>) -> Result<(), Error> {
    let (mut hints, mut bad) = (Vec::with_capacity(messages.len()), Vec::new());
    for message in messages {
        match message.body.as_ref().map_err(Clone::clone).and_then(result_of) {
            Ok(result) => hints.push(Hint::of(&message, result)),
            Err(reason) => bad.push((message.msg_id, reason)),
        }
    }
    if !bad.is_empty() {
        quarantine(shared, STEP_RESULTS, bad).await?;
    }
    let (mut entered, mut mine) = shared.busy.enter(hints);
    if mine.is_empty() {
        // All of it waits with others: reading more would only make their next batch longer.
        let _ = tokio::time::timeout(LONGEST_WAIT, shared.busy.left()).await;
    }
    while !mine.is_empty() {
        batch::run(shared, STEP_RESULTS, mine).await?;
        mine = entered.next();
    }
    Ok(())
}

/// Deals with one batch of requests.
#[instrument(level = "debug", skip_all, fields(messages = messages.len()))]
pub async fn settle_requests(shared: &Shared, messages: Vec<Message>) -> Result<(), Error> {
    let (mut events, mut submits, mut signals, mut bad) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for message in messages {
        let request =
            message.body.as_ref().map_err(Clone::clone).and_then(|body| request_of(body, message.headers.as_ref()));
        match request {
            Ok(request) => {
                let kind = match request {
                    Request::Submit(_) => &mut submits,
                    Request::Signal(_) => &mut signals,
                    Request::Event(..) => &mut events,
                };
                kind.push(Hint::of(&message, request));
            }
            Err(reason) => bad.push((message.msg_id, reason)),
        }
    }
    if !bad.is_empty() {
        quarantine(shared, TASK_REQUESTS, bad).await?;
    }
    batch::run(shared, TASK_REQUESTS, submits).await?;
    batch::run(shared, TASK_REQUESTS, signals).await?;
    batch::run(shared, TASK_REQUESTS, events).await?;
    Ok(())
}

/// What `type` may say; `start` is ours alone.
const TYPES: &str = "submit, cancel, terminate, suspend, resume, retry, rerun, give_up, resolve, skip_step, resolve_step or complete_step";

/// Reads a message of `step_results`. Errors as [`request_of`] does.
fn result_of(message: &Value) -> Result<Request, String> {
    let object = versioned(message)?;
    let event = Event::Result { step: uuid(object, "step")?, attempt: attempt(object)? };
    Ok(Request::Event(uuid(object, "task")?, event))
}

/// Reads a request; `headers` carry the trace context of a raw `submit`.
///
/// Errors with the field, what is wrong with it and what to do.
fn request_of(message: &Value, headers: Option<&Value>) -> Result<Request, String> {
    let object = versioned(message)?;
    let kind = object.get("type").and_then(Value::as_str).ok_or_else(|| format!("type: is missing; use {TYPES}"))?;
    let about = |event| Ok(Request::Event(uuid(object, "task")?, event));
    let operator = operator(object);
    match kind {
        "submit" => {
            let mut request = object.clone();
            for key in ["traceparent", "tracestate", "baggage"] {
                if let Some(value) = headers.and_then(|headers| headers.get(key)).filter(|value| value.is_string()) {
                    request.entry(key).or_insert_with(|| value.clone());
                }
            }
            Ok(Request::Submit(Value::Object(request)))
        }
        "start" => about(Event::Start),
        "cancel" => about(Event::Cancel(operator)),
        "terminate" => about(Event::Terminate(operator)),
        "suspend" => about(Event::Suspend(operator)),
        "resume" => about(Event::Resume(operator)),
        "retry" => about(Event::Retry { operator, only: names(object)? }),
        "rerun" => match names(object)? {
            from if from.is_empty() => Err("steps: is missing; name the steps to run again".into()),
            from => about(Event::Rerun { operator, from }),
        },
        "give_up" => about(Event::GiveUp(operator)),
        "resolve" => about(Event::ResolveTask(operator)),
        "skip_step" | "resolve_step" | "complete_step" => {
            let step = object.get("step").and_then(Value::as_str).ok_or("step: must be the name of a step")?;
            let act = match kind {
                "skip_step" => ByHand::Skip,
                "resolve_step" => ByHand::Resolve,
                _ => ByHand::Complete,
            };
            let output = object.get("output").filter(|_| act != ByHand::Skip).cloned();
            // What its handler would have come to is at least null.
            let output = output.or((act == ByHand::Complete).then_some(Value::Null));
            about(Event::ByHand { operator, step: step.to_owned(), act, output })
        }
        "child" => about(Event::ChildEnded { step: uuid(object, "step")?, attempt: attempt(object)? }),
        "signal" => match object.get("name") {
            None => about(Event::SignalDue),
            Some(name) => Ok(Request::Signal(SendSignal {
                task: uuid(object, "task")?,
                name: name.as_str().ok_or("name: must be the name of a signal")?.to_owned(),
                payload: object.get("payload").cloned().unwrap_or_default(),
                actor: operator.actor,
                traceparent: headers
                    .and_then(|headers| headers.get("traceparent"))
                    .and_then(Value::as_str)
                    .map(str::to_owned),
            })),
        },
        other => Err(format!("type: {:?} is not known; use {TYPES}", clip(other))),
    }
}

fn versioned(message: &Value) -> Result<&Map<String, Value>, String> {
    let object = message.as_object().ok_or("message: must be a JSON object")?;
    match object.get("v") {
        Some(v) if v == 1 => Ok(object),
        Some(_) => Err("v: only version 1 is understood".into()),
        None => Err("v: is missing; add \"v\": 1".into()),
    }
}

fn uuid(object: &Map<String, Value>, key: &str) -> Result<Uuid, String> {
    object
        .get(key)
        .and_then(Value::as_str)
        .and_then(|text| Uuid::try_parse(text).ok())
        .ok_or_else(|| format!("{key}: must be a uuid in text form"))
}

fn attempt(object: &Map<String, Value>) -> Result<i32, String> {
    let attempt = object.get("attempt").and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok());
    attempt.filter(|n| *n > 0).ok_or_else(|| "attempt: must be a positive whole number".to_owned())
}

/// The names in `steps`; none if it is not there.
fn names(object: &Map<String, Value>) -> Result<Vec<String>, String> {
    let wrong = || "steps: must be a list of step names".to_owned();
    match object.get("steps") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(names)) => {
            names.iter().map(|name| name.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
        }
        Some(_) => Err(wrong()),
    }
}

fn operator(object: &Map<String, Value>) -> Operator {
    let text = |key: &str, limit: usize| {
        object.get(key).and_then(Value::as_str).map(|text| text.chars().take(limit).collect::<String>())
    };
    Operator { actor: text("actor", 100).unwrap_or_else(|| "unknown".into()), reason: text("reason", 1000) }
}

fn clip(text: &str) -> String {
    text.chars().take(40).collect()
}
