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
//!
//! [`Harness::start`] hands over the controls instead: time passes when it is told to, signals and
//! operators come when they are called.
//!
//! ```
//! # use std::time::Duration;
//! # use serde_json::json;
//! # use tasker_shared::testing::Harness;
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

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::state_machine::decide::{ByHand, Event, Operator};
use crate::state_machine::input::BY_REFERENCE;
use crate::state_machine::plan::{Failure, Outcome, Room};
use crate::state_machine::simulation::{AttemptRow, Row, World};
use crate::state_machine::states::{StepState, TaskState};
use crate::store::templates::{self, Loaded, TemplateError};
use crate::template;
use crate::trace::log::{Attempt, Head, StepInfo, TaskLog, Transition};

/// More decisions than this mean that a task never ends.
const MOST_DECISIONS: usize = 1_000_000;

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
    loaded: Loaded,
    mocks: HashMap<String, Mock>,
    tasks: HashMap<String, Mock>,
    unoffered: HashSet<String>,
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
        Ok(Self { loaded, mocks: HashMap::new(), tasks: HashMap::new(), unoffered: HashSet::new() })
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
        let schema = self.loaded.schema.as_ref();
        let invalid = schema.and_then(|schema| schema.check(&input).err()).map(|problems| problems.join("; "));
        let mut world = World::new(self.loaded.definition.clone());
        world.task.input = input;
        let mut started = Started { harness: self, run: Run { world, calls: Vec::new() } };
        let Event::Start { step_uuids, .. } = started.run.world.start_event() else { unreachable!("it makes a Start") };
        started.settle(vec![Event::Start { step_uuids, invalid }]);
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
        Event::ChildEnded { step, attempt, outcome, link: None }
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

/// A task under the control of a test. It can be asked whatever a [`Run`] can be asked.
#[derive(Debug)]
pub struct Started<'a> {
    harness: &'a mut Harness,
    run: Run,
}

impl Deref for Started<'_> {
    type Target = Run;

    fn deref(&self) -> &Run {
        &self.run
    }
}

impl Started<'_> {
    /// Lets this much time pass, and what is due meanwhile happen.
    ///
    /// # Panics
    /// As [`Harness::run`].
    pub fn advance(&mut self, time: Duration) -> &mut Self {
        let until = self.run.world.clock + time;
        while let Some(event) = self.take_due(Some(until)) {
            self.settle(vec![event]);
        }
        self.run.world.clock = self.run.world.clock.max(until);
        self
    }

    /// Lets time pass until the task ends or waits for a person.
    ///
    /// # Panics
    /// As [`Harness::run`]; also if it waits for something that only the test can bring, such as a
    /// signal or a resume.
    pub fn finish(mut self) -> Run {
        for _ in 0..MOST_DECISIONS {
            if self.rests() {
                return self.run;
            }
            let Some(event) = self.take_due(None) else {
                panic!("nothing can happen any more, and {}", self.run.waits_for());
            };
            self.settle(vec![event]);
        }
        panic!("the task has not ended after {MOST_DECISIONS} decisions, it is {}", self.run.world.task.state);
    }

    /// Sends a signal, as `tasker task signal` does.
    ///
    /// # Panics
    /// If it would be refused: no step waits for its name, or the answer is not allowed.
    pub fn signal(&mut self, name: &str, payload: Value) -> &mut Self {
        let waits = self.run.world.definition.steps.iter().filter_map(|step| step.work.signal());
        let named: Vec<_> = waits.filter(|signal| signal.name == name).collect();
        assert!(!named.is_empty(), "no step of the template waits for a signal {name}");
        let answers: Vec<&String> = named.iter().flat_map(|signal| &signal.allowed).collect();
        let is_allowed = named.iter().any(|signal| signal.allows(&payload));
        assert!(is_allowed, "the payload of {name} needs an answer that is one of {answers:?}");
        assert!(!self.run.state().is_terminal(), "the task has ended: it is {}", self.run.status());
        self.run.world.signal(name, payload);
        self.idle();
        self
    }

    /// Cancels the task; what it had begun is cancelled with it.
    pub fn cancel(&mut self) -> &mut Self {
        self.ask(&Event::Cancel(operator()))
    }

    /// Sends nothing new until it is resumed.
    pub fn suspend(&mut self) -> &mut Self {
        self.ask(&Event::Suspend(operator()))
    }

    /// Goes on where it was suspended.
    pub fn resume(&mut self) -> &mut Self {
        self.ask(&Event::Resume(operator()))
    }

    /// Tries again what failed.
    pub fn retry(&mut self) -> &mut Self {
        let mut retry = self.run.world.retry_event();
        let Event::Retry { operator: by, .. } = &mut retry else { unreachable!("it makes a Retry") };
        *by = operator();
        self.ask(&retry)
    }

    /// Runs a step of a finished task again, and all that follow from it.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn rerun(&mut self, step: &str) -> &mut Self {
        let from = vec![self.run.index(step)];
        self.ask(&Event::Rerun { operator: operator(), from })
    }

    /// Settles a step by hand: those behind it go on and read this output.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn complete_step(&mut self, step: &str, output: Value) -> &mut Self {
        let step = self.run.index(step);
        self.ask(&Event::ByHand { operator: operator(), step, act: ByHand::Complete, output: Some(output) })
    }

    /// Skips a step by hand: those behind it go on without its output.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn skip_step(&mut self, step: &str) -> &mut Self {
        let step = self.run.index(step);
        self.ask(&Event::ByHand { operator: operator(), step, act: ByHand::Skip, output: None })
    }

    /// The failures of a blocked task are final.
    pub fn give_up(&mut self) -> &mut Self {
        self.ask(&Event::GiveUp(operator()))
    }

    fn ask(&mut self, act: &Event) -> &mut Self {
        let plan = self.run.world.settle(vec![act.clone()], &mut Room::unlimited());
        assert!(plan.ignored == 0, "it cannot be asked of a task that is {}: {act:?}", self.run.world.task.state);
        self.idle();
        self
    }

    fn settle(&mut self, events: Vec<Event>) {
        self.run.world.settle(events, &mut Room::unlimited());
        self.idle();
    }

    /// Whether nothing goes on by itself any more.
    fn rests(&self) -> bool {
        let state = self.run.world.task.state;
        state.is_terminal() || state == TaskState::BlockedByFailures
    }

    /// Does everything that takes no time.
    fn idle(&mut self) {
        for _ in 0..MOST_DECISIONS {
            let world = &mut self.run.world;
            let event = if !world.results.is_empty() {
                let reported = std::mem::take(&mut world.results).into_iter();
                reported.map(|(step, attempt)| Event::Result { step, attempt }).collect()
            } else if let Some(message) = self.offered() {
                self.harness.work(&mut self.run.world, &mut self.run.calls, message);
                continue;
            } else if !self.run.world.children.is_empty() {
                vec![self.harness.end_child(&mut self.run.world, &mut self.run.calls)]
            } else if std::mem::take(&mut self.run.world.sent_signal) {
                vec![Event::SignalDue]
            } else {
                return;
            };
            self.run.world.settle(event, &mut Room::unlimited());
        }
        panic!("the task goes on for ever: {MOST_DECISIONS} decisions, and it is {}", self.run.world.task.state);
    }

    /// The first message that somebody takes.
    fn offered(&self) -> Option<usize> {
        let world = &self.run.world;
        let handler = |step| &*world.definition.steps[world.definition.place(step).0 as usize].handler;
        world.messages.iter().position(|message| !self.harness.unoffered.contains(handler(message.step)))
    }

    /// Lets time pass until something is due, but not beyond `until`.
    fn take_due(&mut self, until: Option<DateTime<Utc>>) -> Option<Event> {
        let world = &mut self.run.world;
        let due = world.due.iter().enumerate().min_by_key(|(_, (_, at, _))| *at);
        let (place, at) = due.map(|(place, (_, at, _))| (place, *at))?;
        if until.is_some_and(|until| at > until) {
            return None;
        }
        let (kind, at, step) = world.due.remove(place);
        world.clock = world.clock.max(at);
        Some(match (kind, step) {
            ("lease", Some(step)) => Event::LeaseDue { step },
            ("retry", Some(step)) => Event::RetryDue { step },
            ("timer", Some(step)) => Event::TimerDue { step },
            ("step_timeout", Some(step)) => Event::StepTotalDue { step },
            ("signal", None) => Event::SignalDue,
            ("queue_timeout", Some(step)) => Event::QueueDue { step, attempt: world.at(step).attempt },
            ("total_timeout", None) => Event::TotalDue,
            other => panic!("the test kit does not know what is due here: {other:?}"),
        })
    }
}

fn operator() -> Operator {
    Operator { actor: "test".into(), reason: Some("the test asks for it".into()) }
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
        self.world.get(index).map(|row| row.state)
    }

    /// The output of a finished step; `None` if it has none.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn output(&self, step: &str) -> Option<&Value> {
        let index = self.index(step);
        self.world.output_of(self.world.get(index)?)
    }

    /// Every attempt of a step, in order.
    pub fn calls(&self, step: &str) -> Vec<&Call> {
        self.calls.iter().filter(|call| call.step == step).collect()
    }

    /// Every attempt of every step, in order.
    pub fn all_calls(&self) -> &[Call] {
        &self.calls
    }

    /// The states of a map's items that were created, by their place in its list.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn items(&self, map: &str) -> Vec<StepState> {
        let index = self.index(map);
        let mut items: Vec<_> =
            self.world.steps.iter().filter(|row| row.index == index && row.item.is_some()).collect();
        items.sort_unstable_by_key(|row| row.item);
        items.iter().map(|row| row.state).collect()
    }

    /// The log of its moves, out of which its trace is made: `Trace::of_log` of the crate
    /// `tasker-trace-testing` reads it.
    pub fn log(&self) -> TaskLog {
        let (world, task) = (&self.world, &self.world.task);
        let head = Head {
            task_uuid: task.uuid,
            namespace: world.definition.namespace.clone(),
            task_name: world.definition.name.clone(),
            template_version: world.definition.version.clone(),
            correlation_id: "test".into(),
            parent_correlation_id: None,
            parent_task_uuid: None,
            priority: task.priority,
            generation: task.generation,
            generation_began_at: world.generation_began_at,
            created_at: world.created_at,
            trace_id: [7; 16],
            root_link: None,
            remote_span_id: None,
            trace_flags: 1,
            tracestate: None,
        };
        log(world, head)
    }

    fn waits_for(&self) -> String {
        let steps = &self.world.definition.steps;
        let named = |step: u32| &steps[self.world.definition.place(step).0 as usize];
        if let Some(message) = self.world.messages.first() {
            let step = named(message.step);
            return format!("step {} needs handler {}, which nobody offers", step.name, step.handler);
        }
        let waits = self.world.steps.iter().filter(|row| row.state == StepState::Waiting);
        let signals: Vec<&str> =
            waits.filter_map(|row| Some(&*steps[row.index as usize].work.signal()?.name)).collect();
        match signals.first() {
            Some(_) => format!("it waits for a signal: {}", signals.join(", ")),
            None => format!("the task is {}", self.world.task.state),
        }
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

/// What recovery reads of this world.
pub(crate) fn log(world: &World, head: Head) -> TaskLog {
    let info = |index: u32, item: Option<u32>| {
        let defined = &world.definition.steps[index as usize];
        StepInfo {
            item,
            index,
            name: defined.name.clone(),
            handler: defined.handler.clone(),
            queue: defined.queue.clone(),
            max_attempts: defined.retry.max_attempts,
        }
    };
    TaskLog {
        head,
        transitions: world.log.iter().map(transition).collect(),
        attempts: world.attempts.iter().map(attempt).collect(),
        steps: world.steps.iter().map(|step| (step.uuid, info(step.index, step.item))).collect(),
    }
}

/// A row of the log as it is read back.
pub(crate) fn transition(row: &Row) -> Transition {
    let made = row.made.clone();
    // Times of the detail go through the database as JSON.
    let detail = made.detail.map(|detail| {
        let stored = json!(detail);
        serde_json::from_value(stored).unwrap_or_default()
    });
    Transition {
        entity: made.entity,
        version: made.version,
        task_version: made.task_version,
        generation: made.generation,
        attempt: made.attempt,
        from: made.from,
        to: made.to,
        event: made.event,
        actor: made.actor,
        began_at: row.began_at,
        at: row.at,
        detail,
    }
}

fn attempt(row: &AttemptRow) -> Attempt {
    let report = row.report.as_ref();
    Attempt {
        step: row.step,
        attempt: row.attempt,
        worker: row.worker.clone(),
        worker_version: Some("1.0".into()),
        message_id: Some(row.message_id),
        result_message_id: report.map(|report| report.message_id),
        claim_began_at: row.claim_began_at,
        claimed_at: row.claimed_at,
        report_began_at: report.map(|report| report.began_at),
        reported_at: report.map(|report| report.at),
        start_offset_ms: report.map(|report| report.start_offset_ms),
        run_ms: report.map(|report| report.run_ms),
        failure: report.and_then(|report| match &report.outcome {
            Outcome::Failure(failure) => Some(failure.clone()),
            Outcome::Success(_) => None,
        }),
        usage: None,
        milestones: None,
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

    const EVERYTHING: &str = r#"
namespace: shop
name: everything
version: "1"
timeouts: {total: 30d}
fair_key: "${input.tenant}"
steps:
  - {name: route, handler: route, branches: [left, right]}
  - {name: left, handler: ok, depends_on: [route], concurrency: {key: "${input.tenant}", limit: 2}}
  - {name: right, handler: ok, depends_on: [route]}
  - {name: dear, handler: ok, depends_on: [route], when: "${input.total} > 100"}
  - {name: join, handler: ok, depends_on: [left, right, dear], join: taken, rate: {limit: 1, per: 1h}, priority: 3}
  - {name: nap, wait: {sleep: 3d}, depends_on: [join]}
  - {name: until, wait: {until: "${input.at}"}, depends_on: [join]}
  - {name: approval, wait: {signal: approved, allowed: ["y", "n"]}, depends_on: [nap]}
  - {name: hint, wait: {signal: hint, timeout: 1h, on_timeout: continue}}
  - {name: each, handler: pay, depends_on: [approval], for_each: "${input.parts}", max_parallel: 2, on_item_failure: continue, input: {part: "${item}", place: "${item_index}"}}
  - {name: nested, task: {template: child}, for_each: "${input.parts}", depends_on: [approval], input: {part: "${item}"}}
  - {name: slow, handler: slow, timeouts: {run: 30s, total: 10m}, retry: {max_attempts: 2, on_exhausted: continue}}
  - {name: unheard, handler: unheard, timeouts: {queue: 2m}, retry: {on_exhausted: continue}}
  - {name: sum, handler: ok, depends_on: [each, nested, slow, unheard, until, hint], input: {all: "${steps.each.output}", nested: "${steps.nested.output}", hint: "${steps.hint.output.timed_out}"}}
"#;

    #[test]
    fn every_feature_that_a_template_can_name_runs() {
        let mut harness = Harness::from_yaml(EVERYTHING).unwrap();
        harness.answers("route", json!({"branch": "left"})).answers("ok", json!("ok")).nobody_offers("unheard");
        harness.handler("pay", |call| match call.item {
            Some(1) => Err(MockError::fail("Broke", "no money")),
            item => Ok(json!([item, call.input["part"]])),
        });
        harness.handler("slow", |_| Err(MockError::Hangs));
        harness.task("child", |call| Ok(json!({"got": call.input["part"]})));
        let input = json!({"tenant": "t", "total": 7, "at": "2026-01-08T00:00:00Z", "parts": ["a", "b", "c"]});
        let mut task = harness.start(input);
        task.advance(Duration::from_hours(71));
        assert_eq!(
            (task.step_state("nap"), task.step_state("until")),
            (Some(StepState::Waiting), Some(StepState::Complete))
        );
        task.signal("approved", json!({"answer": "y"}));
        assert_eq!(task.step_state("approval"), Some(StepState::Pending), "the signal is kept");
        task.suspend();
        task.advance(Duration::from_hours(48));
        assert_eq!((task.status(), task.items("each").len()), ("suspended", 0));
        task.resume();
        let run = task.finish();
        assert_eq!((run.status(), run.reason()), ("completed", None));
        assert_eq!(run.step_state("right"), Some(StepState::Skipped));
        assert_eq!(run.step_state("dear"), Some(StepState::Skipped));
        assert_eq!(run.items("each"), [StepState::Complete, StepState::Error, StepState::Complete]);
        assert_eq!((run.calls("slow").len(), run.step_state("slow")), (2, Some(StepState::Error)));
        assert_eq!(run.step_state("unheard"), Some(StepState::Error));
        let sum = &run.calls("sum")[0].input;
        assert_eq!(sum["all"], json!([[0, "a"], null, [2, "c"]]));
        assert_eq!(sum["nested"], json!([{"got": "a"}, {"got": "b"}, {"got": "c"}]));
        assert_eq!(sum["hint"], json!(true));
        assert!(run.took() >= Duration::from_hours(71 + 48));
    }

    #[test]
    fn an_operator_settles_retries_and_runs_again() {
        let mut harness = diamond();
        harness.handler("b", |_| Err(MockError::fail("CardDeclined", "no money")));
        let mut task = harness.start(json!({"id": 7}));
        task.retry();
        assert_eq!((task.status(), task.calls("b").len()), ("waiting", 2));
        task.complete_step("b", json!("by hand"));
        assert_eq!((task.status(), &task.calls("d")[0].input["b"]), ("completed", &json!("by hand")));
        task.rerun("c");
        let run = task.finish();
        assert_eq!(
            (run.status(), run.calls("c").len(), run.calls("d").len(), run.calls("b").len()),
            ("completed", 2, 2, 2)
        );
    }

    #[test]
    #[should_panic(expected = "nothing can happen any more, and it waits for a signal: approved")]
    fn a_signal_that_nobody_sends_is_named() {
        let yaml = DIAMOND.replace("handler: b,", "wait: {signal: approved},");
        let mut harness = Harness::from_yaml(&yaml).unwrap();
        harness.answers("a", json!(1)).answers("c", json!(1)).run(json!({"id": 7}));
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
