//! What the two queues bring: each message becomes an event. A message is a hint to
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
    let hints =
        read(shared, STEP_RESULTS, messages, |message| result_of(message.body.as_ref().map_err(Clone::clone)?)).await?;
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
    let request =
        |message: &Message| request_of(message.body.as_ref().map_err(Clone::clone)?, message.headers.as_ref());
    let hints = read(shared, TASK_REQUESTS, messages, request).await?;
    let (submits, others): (Vec<_>, Vec<_>) =
        hints.into_iter().partition(|hint| matches!(hint.request, Request::Submit(_)));
    let (signals, events): (Vec<_>, Vec<_>) =
        others.into_iter().partition(|hint| matches!(hint.request, Request::Signal(_)));
    for hints in [submits, signals, events] {
        batch::run(shared, TASK_REQUESTS, hints).await?;
    }
    Ok(())
}

/// Reads each message, and quarantines those that cannot be read.
async fn read(
    shared: &Shared,
    queue: &'static str,
    messages: Vec<Message>,
    read: impl Fn(&Message) -> Result<Request, String>,
) -> Result<Vec<Hint>, Error> {
    let (mut hints, mut bad) = (Vec::with_capacity(messages.len()), Vec::new());
    for message in messages {
        match read(&message) {
            Ok(request) => hints.push(Hint::of(&message, request)),
            Err(reason) => bad.push((message.msg_id, reason)),
        }
    }
    if !bad.is_empty() {
        quarantine(shared, queue, bad).await?;
    }
    Ok(hints)
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
