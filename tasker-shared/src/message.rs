//! The messages that travel over PGMQ. A message is a hint to look: the row is the truth.
//!
//! `docs/messages.md` is written against this. Unknown fields are ignored; a message that
//! cannot be read is quarantined with the reason given here, never a crash.

use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::state_machine::decide::{ByHand, Operator};

/// What a message of `task_requests` asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// Create a task; the value has the keys that `tasker.submit_tasks` reads.
    Submit(Value),
    /// Begin a task that was created by SQL.
    Start(Uuid),
    /// End a task, asking its handlers to stop.
    Cancel(Uuid, Operator),
    /// End a task, dropping its handlers.
    Terminate(Uuid, Operator),
    /// Try again what failed, or only the steps of these names.
    Retry(Uuid, Operator, Vec<String>),
    /// Run the steps of these names again, and all that follow from them.
    Rerun(Uuid, Operator, Vec<String>),
    /// Send nothing until it is resumed.
    Suspend(Uuid, Operator),
    /// Go on.
    Resume(Uuid, Operator),
    /// The failures of a blocked task are final.
    GiveUp(Uuid, Operator),
    /// A blocked task was settled outside.
    ResolveTask(Uuid, Operator),
    /// Settle the step of this name by hand, with this output.
    ByHand(Uuid, Operator, String, ByHand, Option<Value>),
    /// Look at the signals that were kept for a task.
    Signal(Uuid),
    /// Look at the task that this attempt of a step started.
    Child(Uuid, Uuid, i32),
    /// Keep a signal for a task, as `tasker.signal_task` does.
    SendSignal(SendSignal),
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

/// A message of `step_results`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResultHint {
    /// The task to settle.
    pub task: Uuid,
    /// The step that was reported.
    pub step: Uuid,
    /// The attempt that was reported.
    pub attempt: i32,
}

impl Request {
    /// Reads a request; `headers` carry the trace context of a raw `submit`.
    ///
    /// Errors with the field, what is wrong with it and what to do.
    pub fn parse(message: &Value, headers: Option<&Value>) -> Result<Self, String> {
        let object = versioned(message)?;
        let kind =
            object.get("type").and_then(Value::as_str).ok_or_else(|| format!("type: is missing; use {TYPES}"))?;
        let task = || uuid(object, "task");
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
            "start" => Ok(Self::Start(task()?)),
            "cancel" => Ok(Self::Cancel(task()?, operator(object))),
            "terminate" => Ok(Self::Terminate(task()?, operator(object))),
            "suspend" => Ok(Self::Suspend(task()?, operator(object))),
            "resume" => Ok(Self::Resume(task()?, operator(object))),
            "retry" => Ok(Self::Retry(task()?, operator(object), names(object)?)),
            "rerun" => match names(object)? {
                from if from.is_empty() => Err("steps: is missing; name the steps to run again".into()),
                from => Ok(Self::Rerun(task()?, operator(object), from)),
            },
            "give_up" => Ok(Self::GiveUp(task()?, operator(object))),
            "resolve" => Ok(Self::ResolveTask(task()?, operator(object))),
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
                Ok(Self::ByHand(task()?, operator(object), step.to_owned(), act, output))
            }
            "child" => Ok(Self::Child(task()?, uuid(object, "step")?, attempt(object)?)),
            "signal" => match object.get("name") {
                None => Ok(Self::Signal(uuid(object, "task")?)),
                Some(name) => Ok(Self::SendSignal(SendSignal {
                    task: uuid(object, "task")?,
                    name: name.as_str().ok_or("name: must be the name of a signal")?.to_owned(),
                    payload: object.get("payload").cloned().unwrap_or_default(),
                    actor: operator(object).actor,
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

impl ResultHint {
    /// Reads a result's hint. Errors as [`Request::parse`] does.
    pub fn parse(message: &Value) -> Result<Self, String> {
        let object = versioned(message)?;
        Ok(Self { task: uuid(object, "task")?, step: uuid(object, "step")?, attempt: attempt(object)? })
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
