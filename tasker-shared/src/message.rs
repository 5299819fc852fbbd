//! The messages that travel over PGMQ. A message is a hint to look: the row is the truth.
//!
//! `docs/messages.md` is written against this. Unknown fields are ignored; a message that
//! cannot be read is quarantined with the reason given here, never a crash.

use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::state_machine::decide::Operator;

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
    /// Try again what failed.
    Retry(Uuid, Operator),
}

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
        let kind = object
            .get("type")
            .and_then(Value::as_str)
            .ok_or("type: is missing; use submit, cancel, terminate or retry")?;
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
            "start" => Ok(Self::Start(uuid(object, "task")?)),
            "cancel" => Ok(Self::Cancel(uuid(object, "task")?, operator(object))),
            "terminate" => Ok(Self::Terminate(uuid(object, "task")?, operator(object))),
            "retry" => Ok(Self::Retry(uuid(object, "task")?, operator(object))),
            other => Err(format!("type: {:?} is not known; use submit, cancel, terminate or retry", clip(other))),
        }
    }
}

impl ResultHint {
    /// Reads a result's hint. Errors as [`Request::parse`] does.
    pub fn parse(message: &Value) -> Result<Self, String> {
        let object = versioned(message)?;
        let attempt = object.get("attempt").and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok());
        Ok(Self {
            task: uuid(object, "task")?,
            step: uuid(object, "step")?,
            attempt: attempt.filter(|n| *n > 0).ok_or("attempt: must be a positive whole number")?,
        })
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

fn operator(object: &Map<String, Value>) -> Operator {
    let text = |key: &str, limit: usize| {
        object.get(key).and_then(Value::as_str).map(|text| text.chars().take(limit).collect::<String>())
    };
    Operator { actor: text("actor", 100).unwrap_or_else(|| "unknown".into()), reason: text("reason", 1000) }
}

fn clip(text: &str) -> String {
    text.chars().take(40).collect()
}
