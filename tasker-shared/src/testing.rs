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
//! use tasker_shared::testing::{Harness, MockError};
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

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::state_machine::decide::Event;
use crate::state_machine::input::BY_REFERENCE;
use crate::state_machine::plan::{Failure, Outcome, Room};
use crate::state_machine::simulation::World;
use crate::state_machine::states::{StepState, TaskState};
use crate::store::templates::{self, Loaded, TemplateError};
use crate::template;

/// More decisions than this mean that a task never ends.
const MOST_DECISIONS: usize = 1_000_000;

/// One attempt, as a mock sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The step's name.
    pub step: String,
    /// The handler's name, or the template of the task that the step starts.
    pub handler: String,
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
    loaded: Loaded,
    mocks: HashMap<String, Mock>,
    tasks: HashMap<String, Mock>,
}

impl fmt::Debug for Harness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").field("template", &self.loaded.definition.name).finish_non_exhaustive()
    }
}

/// The template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// What `tasker template lint` would say, a line each.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Template(Vec<template::Problem>),
    /// It passes the checks of a file, but cannot be loaded.
    #[error(transparent)]
    Load(#[from] TemplateError),
}

impl Harness {
    /// Reads a template file's text. Errors with everything that is wrong with it.
    pub fn from_yaml(text: &str) -> Result<Self, HarnessError> {
        let checked = template::parse("template.yaml", text).map_err(HarnessError::Template)?;
        let loaded = templates::loaded(1, template::to_json(&checked.template))?;
        Ok(Self { loaded, mocks: HashMap::new(), tasks: HashMap::new() })
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

    /// Runs a task with this input until it ends or waits for a person.
    ///
    /// # Panics
    /// If a step needs a handler that has no mock, if the task would never end, or if a rule of the
    /// state machine is broken.
    pub fn run(&mut self, input: Value) -> Run {
        let schema = self.loaded.schema.as_ref();
        let invalid = schema.and_then(|schema| schema.check(&input).err()).map(|problems| problems.join("; "));
        let mut world = World::new(self.loaded.definition.clone());
        world.task.input = input;
        let (mut calls, mut room) = (Vec::new(), Room::unlimited());
        let Event::Start { step_uuids, .. } = world.start_event() else { unreachable!("it makes a Start") };
        world.settle(vec![Event::Start { step_uuids, invalid }], &mut room);
        for _ in 0..MOST_DECISIONS {
            if world.task.state.is_terminal() || world.task.state == TaskState::BlockedByFailures {
                return Run { world, calls };
            }
            let reported: Vec<Event> = std::mem::take(&mut world.results)
                .into_iter()
                .map(|(step, attempt)| Event::Result { step, attempt })
                .collect();
            if !reported.is_empty() {
                world.settle(reported, &mut room);
            } else if !world.messages.is_empty() {
                self.work(&mut world, &mut calls);
            } else if !world.children.is_empty() {
                let event = self.end_child(&mut world, &mut calls);
                world.settle(vec![event], &mut room);
            } else {
                let event = next_due(&mut world);
                world.settle(vec![event], &mut room);
            }
        }
        panic!("the task has not ended after {MOST_DECISIONS} decisions, it is {}", world.task.state);
    }

    /// Takes the next message and calls its mock.
    fn work(&mut self, world: &mut World, calls: &mut Vec<Call>) {
        let Some(claim) = world.claim(0) else { return };
        let row = &world.steps[claim.step as usize];
        let defined = &world.definition.steps[row.index as usize];
        let call = Call {
            step: defined.name.to_string(),
            handler: defined.handler.to_string(),
            attempt: claim.attempt,
            input: whole_input(world, row.input.as_ref()),
            at: world.clock,
        };
        let mock = self.mocks.get_mut(&call.handler);
        let mock =
            mock.unwrap_or_else(|| panic!("step {} needs handler {}, which has no mock", call.step, call.handler));
        let outcome = outcome(mock(&call));
        calls.push(call);
        if let Some(outcome) = outcome {
            world.report(claim, outcome);
        }
    }

    /// Takes the task that a step started first, and ends it as its mock says.
    fn end_child(&mut self, world: &mut World, calls: &mut Vec<Call>) -> Event {
        let (step, attempt, task) = world.children.remove(0);
        let row = &world.steps[step as usize];
        let call = Call {
            step: world.definition.steps[row.index as usize].name.to_string(),
            handler: task.template,
            attempt,
            input: whole_input(world, row.input.as_ref()),
            at: world.clock,
        };
        let mock = self.tasks.get_mut(&call.handler);
        let mock =
            mock.unwrap_or_else(|| panic!("step {} starts a task of {}, which has no mock", call.step, call.handler));
        let outcome = match outcome(mock(&call)).unwrap_or_else(|| panic!("a task cannot be lost")) {
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
        Event::ChildEnded { step, attempt, outcome, link: None }
    }
}

/// What a mock's answer is as a report; `None` if nothing is ever reported.
fn outcome(answer: Result<Value, MockError>) -> Option<Outcome> {
    match answer {
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

/// Lets time pass until something is due.
fn next_due(world: &mut World) -> Event {
    let earliest = world.due.iter().enumerate().min_by_key(|(_, (_, at, _))| *at).map(|(place, _)| place);
    let Some(place) = earliest else {
        panic!("nothing can happen any more, and the task is {}", world.task.state);
    };
    let (kind, at, step) = world.due.remove(place);
    world.clock = world.clock.max(at);
    match (kind, step) {
        ("lease", Some(step)) => Event::LeaseDue { step },
        ("retry", Some(step)) => Event::RetryDue { step },
        ("timer", Some(step)) => Event::TimerDue { step },
        ("step_timeout", Some(step)) => Event::StepTotalDue { step },
        ("signal", None) => Event::SignalDue,
        ("queue_timeout", Some(step)) => Event::QueueDue { step, attempt: world.steps[step as usize].attempt },
        ("total_timeout", None) => Event::TotalDue,
        other => panic!("the test kit does not know what is due here: {other:?}"),
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
                world.steps.iter().find(|row| row.index == index).and_then(|row| world.output_of(row))
            }
        };
        let value = source.and_then(|source| source.pointer(&pointer(&left["path"])));
        if let (Some(place), Some(value)) = (input.pointer_mut(&pointer(&left["at"])), value) {
            *place = value.clone();
        }
    }
    input
}

/// What became of a task.
#[derive(Debug, Clone)]
pub struct Run {
    world: World,
    calls: Vec<Call>,
}

impl Run {
    /// Its state in the table of states.
    pub fn state(&self) -> TaskState {
        self.world.task.state
    }

    /// What people see: completed, failed, cancelled, or waiting for a person.
    pub fn status(&self) -> &'static str {
        self.world.task.state.public_status()
    }

    /// Why it failed or waits for a person.
    pub fn reason(&self) -> Option<&str> {
        self.world.task.reason.as_deref()
    }

    /// The state of a step; `None` if the task ended before it had steps.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn step_state(&self, step: &str) -> Option<StepState> {
        let index = self.index(step);
        self.world.steps.iter().find(|row| row.index == index).map(|row| row.state)
    }

    /// The output of a finished step; `None` if it has none.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn output(&self, step: &str) -> Option<&Value> {
        let index = self.index(step);
        let row = self.world.steps.iter().find(|row| row.index == index)?;
        self.world.output_of(row)
    }

    /// Every attempt of a step, in order.
    pub fn calls(&self, step: &str) -> Vec<&Call> {
        self.calls.iter().filter(|call| call.step == step).collect()
    }

    /// Every attempt of every step, in order.
    pub fn all_calls(&self) -> &[Call] {
        &self.calls
    }

    /// How long it took, in the time of the test.
    pub fn took(&self) -> Duration {
        (self.world.clock - self.world.created_at).to_std().unwrap_or_default()
    }

    fn index(&self, step: &str) -> u32 {
        let index = self.world.definition.by_name.get(step);
        *index.unwrap_or_else(|| panic!("the template has no step {step}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIAMOND: &str = r#"
namespace: shop
name: order
version: "1"
on_failure: block
input_schema: {type: object, required: [id]}
steps:
  - {name: a, handler: a, input: {id: "${input.id}"}}
  - {name: b, handler: b, depends_on: [a]}
  - {name: c, handler: c, depends_on: [a], timeouts: {run: 30s}}
  - {name: d, handler: d, depends_on: [b, c], input: {b: "${steps.b.output}", c: "${steps.c.output}"}}
"#;

    fn diamond() -> Harness {
        let mut harness = Harness::from_yaml(DIAMOND).unwrap();
        for name in ["a", "b", "c", "d"] {
            harness.handler(name, |call| Ok(json!({"did": call.step})));
        }
        harness
    }

    #[test]
    fn a_task_runs_to_its_end_and_inputs_are_resolved() {
        let run = diamond().run(json!({"id": 7}));
        assert_eq!((run.status(), run.reason()), ("completed", None));
        assert_eq!(run.calls("a")[0].input, json!({"id": 7}));
        assert_eq!(run.calls("b")[0].input, json!({"input": {"id": 7}, "steps": {"a": {"did": "a"}}}));
        assert_eq!(run.calls("d")[0].input, json!({"b": {"did": "b"}, "c": {"did": "c"}}));
        assert_eq!(run.all_calls().len(), 4);
    }

    #[test]
    fn bad_input_fails_the_task_and_calls_nobody() {
        let run = diamond().run(json!({}));
        assert_eq!((run.status(), run.all_calls().len(), run.step_state("a")), ("failed", 0, None));
        assert!(run.reason().is_some_and(|reason| reason.contains("id")), "{:?}", run.reason());
    }

    #[test]
    fn a_lost_worker_costs_its_lease_and_no_retry() {
        let mut harness = diamond();
        harness.handler("c", |call| if call.attempt == 1 { Err(MockError::Lost) } else { Ok(json!(1)) });
        let run = harness.run(json!({"id": 7}));
        assert_eq!((run.status(), run.calls("c").len()), ("completed", 2));
        assert!(run.took() >= Duration::from_secs(10));
    }

    #[test]
    fn a_failure_for_good_waits_for_a_person() {
        let mut harness = diamond();
        harness.handler("b", |_| Err(MockError::fail("CardDeclined", "no money")));
        let run = harness.run(json!({"id": 7}));
        assert_eq!((run.state(), run.status()), (TaskState::BlockedByFailures, "waiting"));
        assert_eq!((run.step_state("b"), run.step_state("c")), (Some(StepState::Error), Some(StepState::Complete)));
        assert_eq!((run.output("b"), run.calls("b").len()), (None, 1));
    }

    #[test]
    fn a_task_that_a_step_starts_is_a_mock_too() {
        let yaml = DIAMOND.replace("{name: b, handler: b,", "{name: b, task: {template: refund},");
        let mut harness = Harness::from_yaml(&yaml).unwrap();
        for name in ["a", "c", "d"] {
            harness.answers(name, json!(name));
        }
        harness.task("refund", |call| match call.attempt {
            1 => Err(MockError::fail("Broken", "no")),
            _ => Ok(json!({"paid": call.input["steps"]["a"]})),
        });
        let run = harness.run(json!({"id": 7}));
        assert_eq!((run.status(), run.output("b")), ("completed", Some(&json!({"paid": "a"}))));
        assert_eq!((run.calls("b").len(), &*run.calls("b")[0].handler), (2, "refund"));
    }

    #[test]
    fn large_values_reach_the_mock_whole() {
        let mut harness = diamond();
        let big = json!({"text": "x".repeat(200_000), "a/b~c": 1});
        harness.answers("b", big.clone());
        let run = harness.run(json!({"id": 7}));
        assert!(run.calls("d")[0].input == json!({"b": big, "c": {"did": "c"}}));
    }

    #[test]
    #[should_panic(expected = "step a needs handler a, which has no mock")]
    fn a_missing_mock_is_named() {
        Harness::from_yaml(DIAMOND).unwrap().run(json!({"id": 7}));
    }

    #[test]
    fn a_bad_template_says_where() {
        let error = Harness::from_yaml(&DIAMOND.replace("[b, c]", "[b, x]")).unwrap_err().to_string();
        assert!(error.starts_with("template.yaml:"), "{error}");
    }
}
