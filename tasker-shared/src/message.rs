//! The messages that travel over PGMQ. A message is a hint to look: the row is the truth.
//!
//! `docs/messages.md` is written against this. Unknown fields are ignored; a message that
//! cannot be read is quarantined with the reason given here, never a crash.

use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::state_machine::decide::{ByHand, Event, Operator};

/// What a message asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// Create a task; the value has the keys that `tasker.submit_tasks` reads.
    Submit(Value),
    /// Keep a signal for a task, as `tasker.signal_task` does.
    Signal(SendSignal),
    /// Settle an event of a task.
    Event(Uuid, Event),
}

/// A signal that came as a raw message.
#[derive(Debug, Clone, PartialEq)]
pub struct SendSignal {
    /// Whom it is for.
    pub task: Uuid,
    /// Its name.
    pub name: String,
    /// What it says; null counts as `{}`.
    pub payload: Value,
    /// Who sent it.
    pub actor: String,
    /// The trace context of its headers.
    pub traceparent: Option<String>,
}

/// What `type` may say; `start` is ours alone.
const TYPES: &str = "submit, cancel, terminate, suspend, resume, retry, rerun, give_up, resolve, skip_step, resolve_step or complete_step";

impl Request {
    /// Reads a message of `step_results`. Errors as [`Request::parse`] does.
    pub fn parse_result(message: &Value) -> Result<Self, String> {
        let object = versioned(message)?;
        let event = Event::Result { step: uuid(object, "step")?, attempt: attempt(object)? };
        Ok(Self::Event(uuid(object, "task")?, event))
    }

    /// Reads a request; `headers` carry the trace context of a raw `submit`.
    ///
    /// Errors with the field, what is wrong with it and what to do.
    pub fn parse(message: &Value, headers: Option<&Value>) -> Result<Self, String> {
        let object = versioned(message)?;
        let kind =
            object.get("type").and_then(Value::as_str).ok_or_else(|| format!("type: is missing; use {TYPES}"))?;
        let about = |event| Ok(Self::Event(uuid(object, "task")?, event));
        let operator = operator(object);
        match kind {
            "submit" => {
                let mut request = object.clone();
                for key in ["traceparent", "tracestate", "baggage"] {
                    if let Some(value) = headers.and_then(|headers| headers.get(key)).filter(|value| value.is_string())
                    {
                        request.entry(key).or_insert_with(|| value.clone());
                    }
                }
                Ok(Self::Submit(Value::Object(request)))
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
                Some(name) => Ok(Self::Signal(SendSignal {
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
}

/// The message that hands a step to the workers of its queue.
pub fn step_message(task: Uuid, step: Uuid, generation: i32, attempt: i32, handler: &str) -> Value {
    json!({"v": 1, "task": task, "step": step, "generation": generation, "attempt": attempt, "handler": handler})
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
