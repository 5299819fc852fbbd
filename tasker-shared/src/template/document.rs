//! The format of a template, declared once: what a file may hold and what the database stores.
//!
//! Each type names a part of the document. Its doc comments are what editors show, its attributes
//! are the rules, and the published JSON Schema, the reader of files and the stored JSON all follow
//! from it. It never parses text and never looks at two fields together; `expressions.rs` and
//! `cross_checks.rs` do.
//!
//! Durations, `wait` and `on_item_failure` are written in one way in a file and stored in another;
//! their types read both.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::state_machine::definition::{Join, MAX_PARALLEL, OnItemFailure};
use crate::state_machine::graph::MAX_STEPS;
use crate::state_machine::kinds::{
    Anything, Handler, InputSchemaText, Key, Lease, LimitCount, Milliseconds, Name, OptionalMilliseconds, QueuePart,
    Version,
};
use crate::state_machine::retry::RetryPolicy;
use crate::state_machine::wait::{ChildTask, WaitFor, Work};

/// The definition of a workflow, immutable once registered under its version.
// Serialized, it is the canonical JSON that the database stores: durations are whole milliseconds,
// and whatever has its default value is left out, so that a file which spells a default out is the
// same definition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// The team or domain that owns the template and its queues.
    #[schemars(with = "QueuePart")]
    pub namespace: String,
    /// The name of the workflow, unique in the namespace.
    #[schemars(with = "Name")]
    pub name: String,
    /// The version, in quotes: 1 to 64 printable ASCII characters, compared as text.
    #[schemars(with = "Version")]
    pub version: String,
    /// For people; at most 1,000 characters.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 1000))]
    pub description: String,
    /// JSON Schema 2020-12 of a task's input; without it any object is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "InputSchemaText")]
    pub input_schema: Option<Value>,
    /// What becomes of a task when a step has failed for good; `fail` by default.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_failure: OnFailure,
    /// Time limits of a whole task.
    #[serde(default, skip_serializing_if = "is_default")]
    pub timeouts: TaskTimeouts,
    /// How tasks appear in traces.
    #[serde(default, skip_serializing_if = "is_default")]
    pub trace: Trace,
    /// How many attempts of all its steps together may be in flight at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
    /// How many attempts of all its steps together may be sent in a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// Held steps of equal priority take turns by this key, such as `${input.tenant}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Key")]
    pub fair_key: Option<String>,
    /// The steps, in any order; at most 20,000.
    // A step's index in this list is its identity in the graph and in the database.
    #[schemars(length(max = MAX_STEPS), extend("format" = "tasker-steps"))]
    pub steps: Vec<Step>,
}

/// What becomes of a task when a step has failed for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// The task ends in error and its open steps are cancelled.
    #[default]
    Fail,
    /// The task waits in `blocked_by_failures` for an operator.
    Block,
}

/// Time limits of a whole task.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskTimeouts {
    /// From submission to the end of the task; none by default.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "OptionalMilliseconds")]
    pub total: Option<Duration>,
}

/// How many attempts may be in flight at once, over all tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Concurrency {
    /// Which tasks share the limit, such as `${input.customer_id}`; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Key")]
    pub key: Option<String>,
    /// How many; 1 to 1,000,000.
    #[schemars(with = "LimitCount")]
    pub limit: i32,
}

/// How many attempts may be sent in a time, over all tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Which tasks share the limit, such as `${input.customer_id}`; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Key")]
    pub key: Option<String>,
    /// How many; 1 to 1,000,000. It is also the most that are sent at once.
    #[schemars(with = "LimitCount")]
    pub limit: i32,
    /// In which time, such as `1s`.
    #[serde(with = "Milliseconds")]
    pub per: Duration,
}

/// How tasks of a template appear in traces.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    /// What a caller's `traceparent` means; `join` by default.
    #[serde(default, skip_serializing_if = "is_default")]
    pub incoming: Incoming,
    /// Outcomes whose trace is exported although sampling did not choose it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keep: Vec<Keep>,
}

/// What a caller's `traceparent` means to a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Incoming {
    /// The task continues the caller's trace.
    #[default]
    Join,
    /// The task begins its own trace, linked to the caller's.
    Link,
}

/// An outcome that makes a trace worth keeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The task did not complete.
    Failed,
    /// An attempt was retried.
    Retried,
    /// The task took longer than this.
    SlowerThan(#[serde(with = "Milliseconds")] Duration),
}

/// One step of a template: it runs a handler, waits, or starts a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(
    title = "step",
    extend("oneOf" = [{"required": ["handler"]}, {"required": ["wait"]}, {"required": ["task"]}]),
    extend("dependentRequired" = {"max_parallel": ["for_each"], "on_item_failure": ["for_each"]})
)]
pub struct Step {
    /// The step's name, unique in the template.
    #[schemars(with = "Name")]
    pub name: String,
    /// The name under which a worker registered the code to run. A step that waits or starts a task
    /// has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(with = "Handler")]
    pub handler: String,
    /// What the step waits for, instead of running a handler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<WaitFor>,
    /// The task that the step starts, instead of running a handler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<ChildTask>,
    /// Names of the steps that must be done first, each once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("uniqueItems" = true))]
    pub depends_on: Vec<String>,
    /// Which of its dependencies must be done; `all` by default.
    #[serde(default, skip_serializing_if = "is_default")]
    pub join: Join,
    /// What must hold once its dependencies are done, or the step is skipped: `${input.total} > 100`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// Makes the step a decision: the direct dependents among which its output chooses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    pub branches: Vec<String>,
    /// Makes the step a map: a `${…}` that leads to a list, for each of whose items the step is run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_each: Option<String>,
    /// Of a map: the most items that are open at once; 1 to 1,000, 1000 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_PARALLEL))]
    pub max_parallel: Option<u32>,
    /// Of a map: what items that have failed for good mean for it; `fail` by default.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_item_failure: OnItemFailure,
    /// What the handler, or the task that the step starts, is given, with `${…}` references. Without
    /// it: the task's input and the outputs of its dependencies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Anything")]
    pub input: Option<Value>,
    /// A queue of its own within the namespace; both names together at most 38 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "QueuePart")]
    pub queue: Option<String>,
    /// Among ready steps of one queue the highest goes first; added to the task's, 0 by default.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(range(min = i32::MIN, max = i32::MAX))]
    pub priority: i32,
    /// How many of its attempts may be in flight at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
    /// How many of its attempts may be sent in a time.
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StepTimeouts {
    /// How long an attempt may wait for a worker; none by default.
    #[serde(skip_serializing_if = "Option::is_none", with = "OptionalMilliseconds")]
    pub queue: Option<Duration>,
    /// How long one attempt's handler may run; 30s by default.
    #[serde(with = "Milliseconds")]
    pub run: Duration,
    /// From the step's first readiness to its end, retries and waits included; none by default.
    #[serde(skip_serializing_if = "Option::is_none", with = "OptionalMilliseconds")]
    pub total: Option<Duration>,
    /// How long a silent worker keeps the attempt; at least 1s, 10s by default.
    #[serde(with = "Milliseconds")]
    #[schemars(with = "Lease")]
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

impl Template {
    /// The other namespaces in which its steps start tasks.
    pub fn crossings(&self) -> impl Iterator<Item = &str> {
        let named = self.steps.iter().filter_map(|step| step.task.as_ref()?.namespace.as_deref());
        named.filter(|namespace| *namespace != self.namespace)
    }
}

impl Step {
    /// What the step does once it is ready.
    pub fn work(&self) -> Work {
        match (&self.wait, &self.task) {
            (Some(wait), _) => Work::Wait(wait.clone()),
            (None, Some(task)) => Work::Task(task.clone()),
            (None, None) => Work::Handler,
        }
    }
}

/// The PGMQ queue that a step's attempts are sent to: `worker_<namespace>`, or
/// `worker_<namespace>__<queue>` for a step with `queue:`.
pub fn step_queue(namespace: &str, step: &Step) -> String {
    match &step.queue {
        Some(queue) => format!("worker_{namespace}__{queue}"),
        None => format!("worker_{namespace}"),
    }
}
