//! A test kit for users: one task in memory, real decisions, handlers as mocks, time that passes
//! by itself.
//!
//! [`Harness`] reads a template as `tasker template lint` does, decides with the same pure core
//! as an orchestrator, and calls closures instead of workers. Nothing waits: when nothing can run
//! the clock goes on to what is due next, so a retry three days ahead comes in microseconds. After
//! every decision it recounts what the rows claim, and panics if a promise is broken.
//!
//! ```
//! use std::time::Duration;
//! use serde_json::json;
//! use tasker_testing::{Harness, MockError};
//!
//! let mut order = Harness::from_yaml(r#"
//! namespace: shop
//! name: order
//! version: "1"
//! input_schema: {type: object, required: [order_id]}
//! steps:
//!   - {name: charge, handler: payments.charge, input: {id: "${input.order_id}"}, retry: {initial_interval: 3d, max_interval: 3d, jitter: 0}}
//!   - {name: ship, handler: orders.ship, depends_on: [charge], input: {receipt: "${steps.charge.output.receipt}"}}
//! "#).unwrap();
//! order.handler("payments.charge", |call| match call.attempt {
//!     1 => Err(MockError::retry("Unavailable", "the bank sleeps")),
//!     _ => Ok(json!({"receipt": format!("r-{}", call.input["id"].as_str().unwrap())})),
//! });
//! order.answers("orders.ship", json!({"parcel": 1}));
//!
//! let run = order.run(json!({"order_id": "4711"}));
//! assert_eq!(run.status(), "completed");
//! assert_eq!(run.output("charge"), Some(&json!({"receipt": "r-4711"})));
//! assert_eq!(run.calls("ship")[0].input, json!({"receipt": "r-4711"}));
//! assert!(run.took() >= Duration::from_hours(3 * 24));
//! ```
//!
//! [`Harness::start`] hands over the controls instead: time passes when it is told to, signals and
//! operators come when they are called.
//!
//! ```
//! # use std::time::Duration;
//! # use serde_json::json;
//! # use tasker_testing::Harness;
//! let mut refund = Harness::from_yaml(r#"
//! namespace: shop
//! name: refund
//! version: "1"
//! steps:
//!   - {name: approval, wait: {signal: approved, allowed: [yes_please, no_thanks], timeout: 3d}}
//!   - {name: pay, handler: payments.pay, depends_on: [approval], for_each: "${input.parts}", input: {part: "${item}"}}
//! "#).unwrap();
//! refund.handler("payments.pay", |call| Ok(json!({"paid": call.input["part"]})));
//!
//! let mut task = refund.start(json!({"parts": [10, 20]}));
//! task.advance(Duration::from_hours(71));
//! assert_eq!(task.status(), "waiting");
//! task.signal("approved", json!({"answer": "yes_please"}));
//! let run = task.finish();
//! assert_eq!(run.output("pay"), Some(&json!([{"paid": 10}, {"paid": 20}])));
//! ```

mod run;
mod started;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

pub use self::run::Run;
#[cfg(test)]
pub(crate) use self::run::{log, transition};
pub use self::started::Started;
use crate::simulation::World;
use tasker_shared::state_machine::decide::Event;
use tasker_shared::state_machine::input::BY_REFERENCE;
use tasker_shared::state_machine::plan::{ChildEnd, Failure, Outcome};
use tasker_shared::template::{self, Compiled};

/// One attempt, as a mock sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The step's name.
    pub step: String,
    /// The handler's name, or the template of the task that the step starts.
    pub handler: String,
    /// Its place in the list that its map runs over; `None` of every other step.
    pub item: Option<u32>,
    /// From 1.
    pub attempt: i32,
    /// The input, with every `${…}` resolved.
    pub input: Value,
    /// When it began, in the time of the test.
    pub at: DateTime<Utc>,
}

/// How a mock ends without an output.
#[derive(Debug, Clone, PartialEq)]
pub enum MockError {
    /// An error that may pass: the step's retry policy decides.
    Retry {
        /// A short class such as `Unavailable`; `non_retryable_errors` names it.
        kind: String,
        /// For a person.
        message: String,
        /// When the handler knows better than the policy.
        after: Option<Duration>,
    },
    /// An error that trying again does not help.
    Fail {
        /// A short class such as `CardDeclined`.
        kind: String,
        /// For a person.
        message: String,
    },
    /// The worker dies: nothing is reported, and its lease runs out.
    Lost,
    /// The handler runs for as long as `timeouts.run` lets it: an error of type `timeout`, which is retried.
    Hangs,
}

impl MockError {
    /// An error that may pass.
    pub fn retry(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Retry { kind: kind.into(), message: message.into(), after: None }
    }

    /// An error that trying again does not help.
    pub fn fail(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Fail { kind: kind.into(), message: message.into() }
    }
}

type Mock = Box<dyn FnMut(&Call) -> Result<Value, MockError>>;

/// A template and the mocks of its handlers.
pub struct Harness {
    template: Compiled,
    mocks: HashMap<String, Mock>,
    tasks: HashMap<String, Mock>,
    unoffered: HashSet<String>,
}

impl fmt::Debug for Harness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").field("template", &self.template.definition.name).finish_non_exhaustive()
    }
}

/// The template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// What `tasker template lint` would say, a line each.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Template(Vec<template::Problem>),
}

impl Harness {
    /// Reads a template file's text.
    ///
    /// # Errors
    /// [`HarnessError::Template`] with everything that is wrong with it.
    pub fn from_yaml(text: &str) -> Result<Self, HarnessError> {
        let checked = template::parse("template.yaml", text).map_err(HarnessError::Template)?;
        Ok(Self { template: checked.compiled, mocks: HashMap::new(), tasks: HashMap::new(), unoffered: HashSet::new() })
    }

    /// What a handler does; the latest mock of a name counts.
    pub fn handler(&mut self, name: &str, mock: impl FnMut(&Call) -> Result<Value, MockError> + 'static) -> &mut Self {
        self.mocks.insert(name.to_owned(), Box::new(mock));
        self
    }

    /// A handler that always answers this.
    pub fn answers(&mut self, name: &str, output: Value) -> &mut Self {
        self.handler(name, move |_| Ok(output.clone()))
    }

    /// What becomes of a task of another template that a step starts: an output, or an error, after
    /// which the step's retry policy decides about starting another one.
    pub fn task(&mut self, template: &str, mock: impl FnMut(&Call) -> Result<Value, MockError> + 'static) -> &mut Self {
        self.tasks.insert(template.to_owned(), Box::new(mock));
        self
    }

    /// No worker takes the steps of this handler: they lie in their queue.
    pub fn nobody_offers(&mut self, handler: &str) -> &mut Self {
        self.unoffered.insert(handler.to_owned());
        self
    }

    /// Runs a task with this input until it ends or waits for a person.
    ///
    /// # Panics
    /// If a step needs a handler that has no mock, if the task would never end, or if a rule of the
    /// state machine is broken.
    pub fn run(&mut self, input: Value) -> Run {
        self.start(input).finish()
    }

    /// Begins a task with this input and does what can be done before any time passes.
    ///
    /// # Panics
    /// If a step needs a handler that has no mock, or if a rule of the state machine is broken.
    pub fn start(&mut self, input: Value) -> Started<'_> {
        let schema = self.template.schema.as_ref();
        let invalid = schema.and_then(|schema| schema.check(&input).err()).map(|problems| problems.join("; "));
        let mut world = World::new(self.template.definition.clone());
        world.task.input = input;
        world.invalid_input = invalid;
        let mut started = Started { harness: self, run: Run { world, calls: Vec::new() } };
        started.settle(vec![Event::Start]);
        started
    }

    /// Takes the next message and calls its mock.
    fn work(&mut self, world: &mut World, calls: &mut Vec<Call>, message: usize) {
        let Some(claim) = world.claim(message) else { return };
        let row = world.at(claim.step);
        let defined = &world.definition.steps[row.index as usize];
        let call = Call {
            step: defined.name.to_string(),
            handler: defined.handler.to_string(),
            item: row.item,
            attempt: claim.attempt,
            input: whole_input(world, row.input.as_ref()),
            at: world.clock,
        };
        let mock = self.mocks.get_mut(&call.handler);
        let mock =
            mock.unwrap_or_else(|| panic!("step {} needs handler {}, which has no mock", call.step, call.handler));
        let limit = defined.run_timeout.unwrap_or_default();
        let answer = mock(&call);
        if answer == Err(MockError::Hangs) {
            world.pass(limit);
            world.heartbeat(claim);
        }
        calls.push(call);
        if let Some(outcome) = outcome(answer, limit) {
            world.report(claim, outcome);
        }
    }

    /// Takes the task that a step started first, and ends it as its mock says.
    fn end_child(&mut self, world: &mut World, calls: &mut Vec<Call>) -> Event {
        let (step, attempt, task) = world.children.remove(0);
        let row = world.at(step);
        let call = Call {
            step: world.definition.steps[row.index as usize].name.to_string(),
            handler: task.template,
            item: row.item,
            attempt,
            input: whole_input(world, row.input.as_ref()),
            at: world.clock,
        };
        let mock = self.tasks.get_mut(&call.handler);
        let mock =
            mock.unwrap_or_else(|| panic!("step {} starts a task of {}, which has no mock", call.step, call.handler));
        let outcome = match outcome(mock(&call), Duration::ZERO).unwrap_or_else(|| panic!("a task cannot be lost")) {
            Outcome::Success(_) if !task.awaited => Outcome::Success(json!({"task": Uuid::nil()})),
            Outcome::Failure(failure) => Outcome::Failure(Failure {
                message: format!("{}: {}", failure.kind, failure.message),
                kind: "child_failed".into(),
                retryable: true,
                retry_after_ms: None,
            }),
            output @ Outcome::Success(_) => output,
        };
        calls.push(call);
        world.tick();
        let step = world.uuid(step);
        world.child_ends.insert((step, attempt), ChildEnd { outcome, link: None });
        Event::ChildEnded { step, attempt }
    }
}

/// What a mock's answer is as a report; `None` if nothing is ever reported.
fn outcome(answer: Result<Value, MockError>, limit: Duration) -> Option<Outcome> {
    match answer {
        Err(MockError::Hangs) => Some(Outcome::Failure(Failure {
            kind: "timeout".into(),
            message: format!("it ran longer than {limit:?}"),
            retryable: true,
            retry_after_ms: None,
        })),
        Ok(output) => Some(Outcome::Success(output)),
        Err(MockError::Retry { kind, message, after }) => Some(Outcome::Failure(Failure {
            kind,
            message,
            retryable: true,
            retry_after_ms: after.map(|after| after.as_secs_f64() * 1000.0),
        })),
        Err(MockError::Fail { kind, message }) => {
            Some(Outcome::Failure(Failure { kind, message, retryable: false, retry_after_ms: None }))
        }
        Err(MockError::Lost) => None,
    }
}

/// A stored input with its large values, as `tasker.resolve_input` puts them back.
fn whole_input(world: &World, stored: Option<&Value>) -> Value {
    let Some(stored) = stored else { return Value::Null };
    let Some(Value::Array(left_out)) = stored.get(BY_REFERENCE) else { return stored.clone() };
    let pointer = |path: &Value| -> String {
        let keys = path.as_array().into_iter().flatten().filter_map(Value::as_str);
        keys.fold(String::new(), |path, key| path + "/" + &key.replace('~', "~0").replace('/', "~1"))
    };
    let mut input = stored["input"].clone();
    for left in left_out {
        let source = match left["step"].as_str() {
            None => Some(&world.task.input),
            Some(step) => {
                let index = world.definition.by_name[step];
                world.get(index).and_then(|row| world.output_of(row))
            }
        };
        let value = source.and_then(|source| source.pointer(&pointer(&left["path"])));
        if let (Some(place), Some(value)) = (input.pointer_mut(&pointer(&left["at"])), value) {
            *place = value.clone();
        }
    }
    input
}

#[cfg(test)]
mod tests;
