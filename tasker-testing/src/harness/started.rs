//! A task that was started: time and people at the test's command.

use std::ops::Deref;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::{Harness, Run};
use tasker_shared::state_machine::decide::{ByHand, Event, Operator};
use tasker_shared::state_machine::plan::Room;
use tasker_shared::state_machine::states::TaskState;

/// More decisions than this mean that a task never ends.
const MOST_DECISIONS: usize = 1_000_000;

/// A task under the control of a test. It can be asked whatever a [`Run`] can be asked.
#[derive(Debug)]
pub struct Started<'a> {
    pub(super) harness: &'a mut Harness,
    pub(super) run: Run,
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
        self.ask(&Event::Retry { operator: operator(), only: Vec::new() })
    }

    /// Runs a step of a finished task again, and all that follow from it.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn rerun(&mut self, step: &str) -> &mut Self {
        self.run.index(step);
        let from = vec![step.to_owned()];
        self.ask(&Event::Rerun { operator: operator(), from })
    }

    /// Settles a step by hand: those behind it go on and read this output.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn complete_step(&mut self, step: &str, output: Value) -> &mut Self {
        self.run.index(step);
        let step = step.to_owned();
        self.ask(&Event::ByHand { operator: operator(), step, act: ByHand::Complete, output: Some(output) })
    }

    /// Skips a step by hand: those behind it go on without its output.
    ///
    /// # Panics
    /// If the template has no such step.
    pub fn skip_step(&mut self, step: &str) -> &mut Self {
        self.run.index(step);
        let step = step.to_owned();
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

    pub(super) fn settle(&mut self, events: Vec<Event>) {
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
                reported.map(|(key, attempt)| Event::Result { step: world.uuid(key), attempt }).collect()
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
        let handler = |step| &*world.definition.steps[world.definition.position(step).0 as usize].handler;
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
        Some(match (kind, step.map(|key| world.uuid(key))) {
            ("lease", Some(step)) => Event::LeaseDue { step },
            ("retry", Some(step)) => Event::RetryDue { step },
            ("timer", Some(step)) => Event::TimerDue { step },
            ("step_timeout", Some(step)) => Event::StepTotalDue { step },
            ("signal", None) => Event::SignalDue,
            ("queue_timeout", Some(step)) => Event::QueueDue { step },
            ("total_timeout", None) => Event::TotalDue,
            other => panic!("the test kit does not know what is due here: {other:?}"),
        })
    }
}

fn operator() -> Operator {
    Operator { actor: "test".into(), reason: Some("the test asks for it".into()) }
}
