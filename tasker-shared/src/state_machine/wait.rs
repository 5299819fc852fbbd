//! What a step may do instead of running a handler: wait, or start another task.
//!
//! Plain data, read from the template and by `decide`. In JSON durations are whole milliseconds.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::kinds::{AnswerText, Milliseconds, Name, OptionalMilliseconds, QueuePart, Time, Version};

/// What a step does once it is ready.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// A worker runs its handler.
    Handler,
    /// It waits, at the cost of its row.
    Wait(WaitFor),
    /// It starts a task of another template.
    Task(ChildTask),
}

/// What a step waits for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", from = "WaitForm")]
pub enum WaitFor {
    /// A time to pass, from the moment the step is ready.
    Sleep(#[serde(with = "Milliseconds")] Duration),
    /// A point in time: a reference to a text such as `2030-01-31T12:00:00Z`.
    Until(String),
    /// A signal.
    Signal(SignalWait),
}

/// A signal that a step waits for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SignalWait {
    /// Its name.
    pub name: String,
    /// The answers that count, in the payload's `answer`; empty accepts any payload.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed: Vec<String>,
    /// How long to wait; for ever by default.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "OptionalMilliseconds")]
    pub timeout: Option<Duration>,
    /// What becomes of the step when nobody has sent it in time.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_timeout: OnTimeout,
}

/// What a step waits for, as it is written: in a file, or where it is stored.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged, deny_unknown_fields)]
enum WaitForm {
    /// A time to pass.
    Sleep {
        /// How long to wait, from the moment the step is ready. The output is `{"fired_at": …}`.
        #[serde(with = "Milliseconds")]
        sleep: Duration,
    },
    /// A point in time.
    Until {
        /// A time with its offset, usually a reference. One that has passed ends the wait at once.
        #[schemars(with = "Time")]
        until: String,
    },
    /// A signal.
    #[schemars(title = "wait", extend("dependentRequired" = {"on_timeout": ["timeout"]}))]
    Signal {
        /// The name of the signal; its payload is the output.
        #[schemars(with = "Name")]
        signal: String,
        /// The answers that count, in the payload's `answer`; 1 to 100, any payload by default.
        #[serde(default)]
        #[schemars(with = "Vec<AnswerText>", length(min = 1, max = 100))]
        allowed: Vec<String>,
        /// How long to wait; for ever by default.
        #[serde(default, with = "OptionalMilliseconds")]
        timeout: Option<Duration>,
        /// What becomes of the step when the signal did not come in time; `fail` by default.
        #[serde(default)]
        on_timeout: OnTimeout,
    },
    #[schemars(skip)]
    Stored { signal: SignalWait },
}

impl From<WaitForm> for WaitFor {
    fn from(form: WaitForm) -> Self {
        match form {
            WaitForm::Sleep { sleep } => Self::Sleep(sleep),
            WaitForm::Until { until } => Self::Until(until),
            WaitForm::Signal { signal, allowed, timeout, on_timeout } => {
                Self::Signal(SignalWait { name: signal, allowed, timeout, on_timeout })
            }
            WaitForm::Stored { signal } => Self::Signal(signal),
        }
    }
}

impl SignalWait {
    /// Whether this payload is one of the allowed answers.
    pub fn allows(&self, payload: &Value) -> bool {
        let answer = payload.get("answer").and_then(Value::as_str);
        self.allowed.is_empty() || answer.is_some_and(|answer| self.allowed.iter().any(|allowed| allowed == answer))
    }
}

/// What becomes of a step that waited in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It fails, with an error of type `timeout`.
    #[default]
    Fail,
    /// It completes with `{"timed_out": true}`.
    Continue,
}

/// A task that a step starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChildTask {
    /// The name of its template; not the one that the step stands in.
    #[schemars(with = "Name")]
    pub template: String,
    /// The version; the one registered last by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Version")]
    pub version: Option<String>,
    /// The namespace that owns the template; the parent's by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "QueuePart")]
    pub namespace: Option<String>,
    /// Whether the step waits for the task's end, or only starts it; true by default.
    #[serde(rename = "await", default = "yes", skip_serializing_if = "is_true")]
    pub awaited: bool,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks with a reference")]
fn is_true(value: &bool) -> bool {
    *value
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Work {
    /// Whether the step has an input: a reference to resolve, or parents' outputs to hand over.
    pub const fn takes_input(&self) -> bool {
        !matches!(self, Self::Wait(WaitFor::Sleep(_) | WaitFor::Signal(_)))
    }

    /// The word in `wait.reason`; `None` for a handler.
    pub const fn wait_reason(&self) -> Option<&'static str> {
        match self {
            Self::Handler => None,
            Self::Wait(WaitFor::Sleep(_) | WaitFor::Until(_)) => Some("timer"),
            Self::Wait(WaitFor::Signal(_)) => Some("signal"),
            Self::Task(_) => Some(CHILD),
        }
    }

    /// The signal it waits for.
    pub const fn signal(&self) -> Option<&SignalWait> {
        match self {
            Self::Wait(WaitFor::Signal(signal)) => Some(signal),
            _ => None,
        }
    }
}

/// The reason of a wait for a task: the only wait that is an attempt of its own in the trace.
pub const CHILD: &str = "child";
