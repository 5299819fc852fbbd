//! The template file: YAML text -> a checked definition, and the JSON form
//! that the database stores.
//!
//! It reads text and never a file, a clock or a database. Every mistake in a
//! template is reported with file, line, column and key; `docs/templates.md`
//! is the reference of the format, and a test compares the two.

pub mod diff;
mod duration;
mod read;
mod schema;
#[cfg(test)]
mod tests;
mod yaml;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::duration::{format_duration, parse_duration};
pub use self::schema::InputSchema;
use crate::state_machine::condition::Condition;
use crate::state_machine::definition::ForEach;
pub use crate::state_machine::definition::{Join, MAX_PARALLEL, OnItemFailure};
use crate::state_machine::flow::{Allows, Rule};
pub use crate::state_machine::graph::MAX_STEPS;
use crate::state_machine::graph::{Graph, GraphError};
pub use crate::state_machine::input::MAX_DEPTH;
use crate::state_machine::input::{InputError, InputTemplate, Reference};
use crate::state_machine::retry::milliseconds;
pub use crate::state_machine::retry::{OnExhausted, RetryPolicy};
use crate::state_machine::wait::Work;
pub use crate::state_machine::wait::{ChildTask, OnTimeout, SignalWait, WaitFor};

/// The most bytes a definition may have in its JSON form.
pub const MAX_DEFINITION_BYTES: usize = 1024 * 1024;

/// The most bytes of a template file. Comments and indentation cost nothing in
/// the definition, so this is larger; it bounds what the parser has to hold.
pub const MAX_FILE_BYTES: usize = 4 * MAX_DEFINITION_BYTES;

/// The definition of a workflow, immutable once registered under its version.
///
/// Serialized, it is the canonical JSON that the database stores: durations
/// are whole milliseconds, and whatever has its default value is left out, so
/// that a file which spells a default out is the same definition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// The team or domain that owns the template and its step queues.
    pub namespace: String,
    /// Unique in the namespace.
    pub name: String,
    /// 1 to 64 printable ASCII characters; compared as text, never as a number.
    pub version: String,
    /// For people; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// JSON Schema 2020-12 of a task's input; see [`InputSchema`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_schema: Option<Value>,
    /// What becomes of a task when a step has failed for good.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_failure: OnFailure,
    /// Time limits of a whole task.
    #[serde(default, skip_serializing_if = "is_default")]
    pub timeouts: TaskTimeouts,
    /// How tasks appear in traces.
    #[serde(default, skip_serializing_if = "is_default")]
    pub trace: Trace,
    /// Limits how many attempts of all its steps together are in flight at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
    /// Limits how many attempts of all its steps together are sent in a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// Held steps of equal priority take turns by this key of their task's input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fair_key: Option<String>,
    /// The steps, in file order; a step's index in this list is its identity in
    /// the [`Graph`].
    pub steps: Vec<StepDefinition>,
}

/// What becomes of a task when a step has failed for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// The task ends in error and its open steps are cancelled.
    #[default]
    Fail,
    /// The task waits in `blocked_by_failures` for an operator.
    Block,
}

/// Time limits of a whole task.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskTimeouts {
    /// From submission to the end of the task; none by default.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "milliseconds::optional")]
    pub total: Option<Duration>,
}

/// How many attempts may be in flight at once, over all tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concurrency {
    /// Which tasks share the limit, such as `${input.customer_id}`; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// How many, at least 1.
    pub limit: i32,
}

/// How many attempts may be sent in a time, over all tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Which tasks share the limit, such as `${input.customer_id}`; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// How many, at least 1: also the most that are sent at once.
    pub limit: i32,
    /// In which time.
    #[serde(with = "milliseconds")]
    pub per: Duration,
}

/// How tasks of a template appear in traces.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    /// What a caller's `traceparent` means.
    #[serde(default, skip_serializing_if = "is_default")]
    pub incoming: Incoming,
    /// Outcomes whose trace is exported although sampling did not choose it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keep: Vec<Keep>,
}

/// What a caller's `traceparent` means to a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Incoming {
    /// The task continues the caller's trace.
    #[default]
    Join,
    /// The task begins its own trace, linked to the caller's.
    Link,
}

/// An outcome that makes a trace worth keeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The task did not complete.
    Failed,
    /// An attempt was retried.
    Retried,
    /// The task took longer than this.
    SlowerThan(#[serde(with = "milliseconds")] Duration),
}

/// One step of a template.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepDefinition {
    /// Unique in the template.
    pub name: String,
    /// The name under which a worker registered the code to run; empty for a
    /// step that waits or starts a task instead.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub handler: String,
    /// What the step waits for, instead of running a handler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<WaitFor>,
    /// The task that the step starts, instead of running a handler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<ChildTask>,
    /// Names of the steps this one waits for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub depends_on: Vec<String>,
    /// Which of them must be done before it runs.
    #[serde(default, skip_serializing_if = "is_default")]
    pub join: Join,
    /// What must hold once they are done, or the step is skipped; see [`Condition`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// Of a decision: names of direct dependents among which its output chooses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub branches: Vec<String>,
    /// Makes the step a map: a `${…}` that leads to a list, for each of whose items it is run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_each: Option<String>,
    /// Of a map: the most items that are open at once; [`MAX_PARALLEL`] by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_parallel: Option<u32>,
    /// Of a map: what items that have failed for good mean for it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_item_failure: OnItemFailure,
    /// The input of the handler, or of the task it starts, with `${…}` references; see [`InputTemplate`].
    /// Without it, [`crate::state_machine::input::default_input`] applies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Value>,
    /// A queue of its own within the namespace; see [`step_queue`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    /// Higher is admitted first among ready steps of one queue; 0 by default.
    #[serde(default, skip_serializing_if = "is_default")]
    pub priority: i32,
    /// Limits how many of its attempts are in flight at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
    /// Limits how many of its attempts are sent in a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// How failed attempts are retried.
    #[serde(default, skip_serializing_if = "is_default")]
    pub retry: RetryPolicy,
    /// Time limits of the step.
    #[serde(default, skip_serializing_if = "is_default")]
    pub timeouts: StepTimeouts,
}

/// Time limits of one step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StepTimeouts {
    /// How long an attempt may wait for a worker; none by default.
    #[serde(skip_serializing_if = "Option::is_none", with = "milliseconds::optional")]
    pub queue: Option<Duration>,
    /// How long one attempt's handler may run; 30 s by default.
    #[serde(with = "milliseconds")]
    pub run: Duration,
    /// From the step's first readiness to its end, retries included; none by
    /// default.
    #[serde(skip_serializing_if = "Option::is_none", with = "milliseconds::optional")]
    pub total: Option<Duration>,
    /// The lease of a claim, at least 1 s: how long a silent worker keeps the
    /// attempt; 10 s by default.
    #[serde(with = "milliseconds")]
    pub heartbeat: Duration,
}

impl Default for StepTimeouts {
    fn default() -> Self {
        Self { queue: None, run: Duration::from_secs(30), total: None, heartbeat: Duration::from_secs(10) }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A template that passed every check, with the graph of its steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    /// The definition.
    pub template: Template,
    /// Its steps as a DAG, by index.
    pub graph: Graph,
}

/// One thing wrong with a template file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The name the caller gave the file.
    pub file: String,
    /// From 1; 0 when the problem has no place in the file.
    pub line: u64,
    /// From 1, in characters; 0 when the problem has no place in the file.
    pub column: u64,
    /// The path of the key, such as `steps[2].retry.max_attempts`; empty for
    /// the file as a whole.
    pub key: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}", self.file)?;
        if self.line > 0 {
            write!(to, ":{}:{}", self.line, self.column)?;
        }
        if !self.key.is_empty() {
            write!(to, ": {}", self.key)?;
        }
        write!(to, ": {}", self.message)
    }
}

impl std::error::Error for Problem {}

/// A stored definition that this version of the program cannot use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The JSON is not a definition.
    #[error(
        "the stored template definition is not one this version reads: {0}; \
         upgrade this process, or register the template again"
    )]
    ReadStored(#[from] serde_json::Error),
    /// Its steps are not a DAG.
    #[error("the stored template definition has broken dependencies: {0}; register it again")]
    CheckStoredGraph(#[from] GraphError),
    /// The key of a limit, or the fair key, holds a broken reference.
    #[error("a key in the stored definition of {of} is broken: {error}; register the template again")]
    ReadStoredKey {
        /// The step, or the template.
        of: String,
        /// What is wrong with the key.
        error: String,
    },
    /// An `input` holds a broken reference.
    #[error("the stored template definition of step {step} is broken: {error}; register it again")]
    ReadStoredInput {
        /// The step's name.
        step: String,
        /// The first broken reference.
        error: InputError,
    },
    /// A `when` or a `for_each` cannot be read.
    #[error("the stored template definition of step {step} is broken: {key} {error}; register it again")]
    ReadStoredReference {
        /// The key.
        key: &'static str,
        /// The step's name.
        step: String,
        /// What is wrong with it.
        error: String,
    },
}

/// Reads and checks a template file; JSON text is accepted too, as YAML is a
/// superset of it. `file_name` is only used in messages.
///
/// The error lists every problem found, in file order and at most 100; never
/// empty. Text that is not YAML, or a mapping with a key twice, ends the
/// reading at that place.
pub fn parse(file_name: &str, yaml: &str) -> Result<Checked, Vec<Problem>> {
    read::read(file_name, yaml)
}

/// Reads a definition as the database stores it. It was checked when it was
/// registered, so only its shape is checked again.
pub fn from_json(value: Value) -> Result<Template, Error> {
    Ok(serde_json::from_value(value)?)
}

/// The canonical JSON of a definition, as the database stores it.
pub fn to_json(template: &Template) -> Value {
    serde_json::to_value(template).expect("every key of a template is a string")
}

impl Template {
    /// The limits of each step, in order: its own, and those that all steps share.
    pub fn limits(&self) -> Result<Vec<Vec<Rule>>, Error> {
        let shared = rules(&format!("{}/{}", self.namespace, self.name), self.concurrency.as_ref(), self.rate.as_ref());
        let shared = shared.map_err(|error| Error::ReadStoredKey { of: "the template".into(), error })?;
        let of_step = |step: &StepDefinition| {
            let scope = format!("{}/{}.{}", self.namespace, self.name, step.name);
            let own = rules(&scope, step.concurrency.as_ref(), step.rate.as_ref());
            let own = own.map_err(|error| Error::ReadStoredKey { of: format!("step {}", step.name), error })?;
            Ok(own.into_iter().chain(shared.iter().cloned()).collect())
        };
        self.steps.iter().map(of_step).collect()
    }

    /// The parsed `fair_key:`; `None` without one.
    pub fn fair_key_template(&self) -> Result<Option<InputTemplate>, Error> {
        let parsed = self.fair_key.as_deref().map(key_template).transpose();
        parsed.map_err(|error| Error::ReadStoredKey { of: "the template".into(), error })
    }

    /// The other namespaces in which its steps start tasks.
    pub fn crossings(&self) -> impl Iterator<Item = &str> {
        let named = self.steps.iter().filter_map(|step| step.task.as_ref()?.namespace.as_deref());
        named.filter(|namespace| *namespace != self.namespace)
    }

    /// The steps as a DAG.
    pub fn graph(&self) -> Result<Graph, Error> {
        let steps = self.steps.iter().map(|step| (step.name.as_str(), step.depends_on.as_slice()));
        Ok(Graph::new(steps)?)
    }
}

impl StepDefinition {
    /// What the step does once it is ready.
    pub fn work(&self) -> Work {
        match (&self.wait, &self.task) {
            (Some(wait), _) => Work::Wait(wait.clone()),
            (None, Some(task)) => Work::Task(task.clone()),
            (None, None) => Work::Handler,
        }
    }

    /// Whatever may hold references: the `input:`, or the time that a wait ends, as `until`.
    fn referring(&self) -> Option<Value> {
        match &self.wait {
            Some(WaitFor::Until(until)) => Some(serde_json::json!({ "until": until })),
            _ => self.input.clone(),
        }
    }

    /// The parsed `input:`; `None` without one.
    pub fn input_template(&self) -> Result<Option<InputTemplate>, Error> {
        let parsed = self.referring().as_ref().map(InputTemplate::parse).transpose();
        parsed.map_err(|mut errors| Error::ReadStoredInput { step: self.name.clone(), error: errors.swap_remove(0) })
    }
}

impl StepDefinition {
    /// The parsed `when:`; `None` without one.
    pub fn condition(&self) -> Result<Option<Condition>, Error> {
        let parsed = self.when.as_deref().map(Condition::parse).transpose();
        parsed.map_err(|error| Error::ReadStoredReference { key: "when", step: self.name.clone(), error })
    }

    /// What a map runs over; `None` without `for_each:`. `needs` are the steps whose outputs the
    /// input of each item reads.
    pub fn map(&self, needs: Vec<u32>) -> Result<Option<ForEach>, Error> {
        let Some(text) = &self.for_each else {
            return Ok(None);
        };
        let reference = Reference::parse_whole(text).map_err(|error| Error::ReadStoredReference {
            key: "for_each",
            step: self.name.clone(),
            error,
        })?;
        let max_parallel = self.max_parallel.unwrap_or(MAX_PARALLEL);
        Ok(Some(ForEach { reference, max_parallel, on_item_failure: self.on_item_failure, needs }))
    }
}

fn rules(scope: &str, concurrency: Option<&Concurrency>, rate: Option<&Rate>) -> Result<Vec<Rule>, String> {
    let scope: Arc<str> = scope.into();
    let rule = |key: Option<&String>, allows| {
        let key = key.map(|key| key_template(key)).transpose()?;
        Ok(Rule { scope: scope.clone(), key, allows })
    };
    let at_once = concurrency.map(|limit| rule(limit.key.as_ref(), Allows::AtOnce(limit.limit)));
    let rate = rate.map(|limit| rule(limit.key.as_ref(), Allows::Rate(limit.limit, limit.per)));
    at_once.into_iter().chain(rate).collect()
}

/// A key is a text with references to the task's input: it is known before any step has run.
pub(crate) fn key_template(key: &str) -> Result<InputTemplate, String> {
    let template =
        InputTemplate::parse(&Value::String(key.to_owned())).map_err(|mut errors| errors.swap_remove(0).message)?;
    if template.references().next().is_some() || template.reads_item().is_some() {
        return Err("reads the output of a step; a key may read the task's input only, as ${input.…}".into());
    }
    Ok(template)
}

/// The PGMQ queue that a step's attempts are sent to: `worker_<namespace>`, or
/// `worker_<namespace>__<queue>` for a step with `queue:`.
pub fn step_queue(namespace: &str, step: &StepDefinition) -> String {
    match &step.queue {
        Some(queue) => format!("worker_{namespace}__{queue}"),
        None => format!("worker_{namespace}"),
    }
}
