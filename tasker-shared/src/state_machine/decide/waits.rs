//! Steps without a handler: how a wait begins, and what ends it.
//!
//! A waiting step holds no claim and no message. Its attempt is numbered like any other, so
//! that what it came to stands where a handler's result would stand.

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};

use super::super::duration::LONGEST;
use super::super::plan::{Answer, ChildEnd, Detail, Due, Failure, Outcome, StartChild, Step, Wait};
use super::super::states::{StepEvent, StepState};
use super::super::wait::{OnTimeout, WaitFor, Work};
use super::Pass;

impl Pass<'_, '_> {
    /// The step is ready: from now on it waits. `waits` are those that this ends.
    pub(super) fn begin_wait(&mut self, index: u32, waits: Vec<Wait>) {
        let definition = self.defined(index);
        let due = match &definition.work {
            Work::Wait(WaitFor::Sleep(time)) => Some(self.now + *time),
            Work::Wait(WaitFor::Until(_)) => match self.until(index) {
                Ok(at) => Some(at),
                Err(reason) => return self.fail_by_definition(index, "invalid_until", &reason),
            },
            Work::Wait(WaitFor::Signal(signal)) => signal.timeout.map(|timeout| self.now + timeout),
            Work::Task(_) | Work::Handler => None,
        };
        self.touch(index).attempt += 1;
        let detail = Detail {
            waits,
            waiting: definition.work.wait_reason().map(str::to_owned),
            until: due,
            ..Detail::default()
        };
        self.move_step(index, StepEvent::BeginWait, StepState::Waiting, Some(detail));
        self.opened(index, StepEvent::BeginWait, None);
        let step = self.touch(index);
        step.due_at = due;
        let (uuid, attempt, priority) = (step.uuid, step.attempt, step.priority);
        if let Work::Task(task) = &definition.work {
            self.plan.children.push(StartChild { step: uuid, attempt, task: task.clone(), priority });
        }
        if let Some(at) = due {
            self.plan.due.push(Due { kind: "timer", at, step: Some(uuid) });
        }
        if let Some(wanted) = definition.work.signal()
            && self.signals.iter().any(|signal| signal.name == wanted.name)
        {
            // It came early. The steps behind this one are not loaded now, so look again at once.
            self.plan.due.push(Due { kind: "signal", at: self.now, step: None });
        }
    }

    /// The time that the input's `until` names.
    fn until(&self, index: u32) -> Result<DateTime<Utc>, String> {
        let value = self.steps[&index].input.as_ref().and_then(|input| input.get("until"));
        let text = value.and_then(Value::as_str);
        let at = text.and_then(|text| DateTime::parse_from_rfc3339(text).ok()).map(|at| at.to_utc());
        match at {
            Some(at) if at <= self.now + LONGEST => Ok(at),
            Some(_) => Err("wait.until is more than ten years ahead; give an earlier time".into()),
            None => Err("wait.until must come to a time with its offset, such as 2030-01-31T12:00:00Z".into()),
        }
    }

    pub(super) fn timer_due(&mut self, index: u32) -> bool {
        let Some(step) = self.steps.get(&index).filter(|step| step.state == StepState::Waiting) else {
            return false;
        };
        let Some(due) = step.due_at else {
            return false;
        };
        if due > self.now {
            self.plan.due.push(Due { kind: "timer", at: due, step: Some(step.uuid) });
            return true;
        }
        let wait = self.waited(index);
        match &self.defined(index).work {
            Work::Wait(WaitFor::Sleep(_) | WaitFor::Until(_)) => {
                let fired_at = self.now.to_rfc3339_opts(SecondsFormat::Micros, true);
                self.wait_done(index, StepEvent::TimerFired, json!({"fired_at": fired_at}), wait);
            }
            Work::Wait(WaitFor::Signal(signal)) if signal.on_timeout == OnTimeout::Continue => {
                self.wait_done(index, StepEvent::TimerFired, json!({"timed_out": true}), wait);
            }
            Work::Wait(WaitFor::Signal(signal)) => {
                let within = signal.timeout.unwrap_or_default();
                let message = format!("no signal {} came within {within:?}", signal.name);
                self.wait_failed(index, "timeout", &message, wait);
            }
            Work::Handler | Work::Task(_) => return false,
        }
        true
    }

    /// Gives each kept signal to the first step, in file order, that waits for it.
    pub(super) fn signal_due(&mut self) -> bool {
        let waits = self.steps.iter().filter(|(_, step)| step.state == StepState::Waiting);
        let mut waiting: Vec<u32> = waits.map(|(key, _)| *key).collect();
        waiting.sort_unstable();
        let used = self.plan.used_signals.len();
        for index in waiting {
            let Some(wanted) = self.defined(index).work.signal() else {
                continue;
            };
            let fits = self.signals.iter().position(|kept| kept.name == wanted.name && wanted.allows(&kept.payload));
            let Some(oldest) = fits else {
                continue;
            };
            let signal = self.signals.remove(oldest);
            self.plan.used_signals.push(signal.id);
            let wait = Wait { actor: Some(signal.actor), link: signal.traceparent, ..self.waited(index) };
            self.wait_done(index, StepEvent::SignalReceived, signal.payload, wait);
        }
        self.plan.used_signals.len() > used
    }

    /// Whether it waits, if it waits, for a task that it started.
    pub(super) fn waits_for_child(&self, index: u32) -> bool {
        let definition = self.defined(index);
        let is_map = definition.for_each.is_some() && self.steps[&index].item.is_none();
        matches!(definition.work, Work::Task(_)) && !is_map
    }

    /// Its attempt ends with the wait; by anything but the task's own end, the task is to end too.
    pub(super) fn left_child(&mut self, index: u32, event: StepEvent) {
        let step = &self.steps[&index];
        self.plan.closed.push((step.uuid, step.attempt));
        if event != StepEvent::ChildFinished {
            self.plan.left_children.push(step.uuid);
        }
    }

    pub(super) fn child_ended(&mut self, index: u32, attempt: i32) -> bool {
        let end = self.steps.get(&index).and_then(|step| self.snapshot.child_ends.get(&(step.uuid, attempt)));
        let Some(ChildEnd { outcome, link }) = end.cloned() else {
            return false;
        };
        let waits = |step: &Step| step.state == StepState::Waiting && step.attempt == attempt;
        if !self.steps.get(&index).is_some_and(waits) || !self.waits_for_child(index) {
            return false;
        }
        let wait = Wait { link, ..self.waited(index) };
        match outcome {
            Outcome::Success(output) => self.wait_done(index, StepEvent::ChildFinished, output, wait),
            Outcome::Failure(failure) => {
                self.answer(index, &wait, Outcome::Failure(failure.clone()));
                self.attempt_failed(index, &failure, StepEvent::ChildFinished, StepEvent::ChildFinished);
                let uuid = self.steps[&index].uuid;
                if let Some(made) = self.plan.moves.iter_mut().rfind(|made| made.entity == uuid) {
                    let detail = made.detail.get_or_insert_default();
                    detail.waits.push(wait);
                    detail.error_type = Some(failure.kind);
                    detail.reason = Some(failure.message);
                }
            }
        }
        true
    }

    /// The wait of a step that waits now.
    pub(super) fn waited(&self, index: u32) -> Wait {
        let step = &self.steps[&index];
        let definition = self.defined(index);
        let is_map = definition.for_each.is_some() && step.item.is_none();
        let reason = if is_map { "items" } else { definition.work.wait_reason().unwrap_or("timer") };
        Wait::new(reason, step.last_at, step.due_at, step.version)
    }

    pub(super) fn wait_done(&mut self, index: u32, event: StepEvent, output: Value, wait: Wait) {
        self.answer(index, &wait, Outcome::Success(output.clone()));
        let actor = wait.actor.clone();
        let detail = Detail { waits: vec![wait], ..Detail::default() };
        self.move_step_by(index, event, StepState::Complete, Some(detail), actor);
        self.outputs.insert(index, output);
        self.evaluated = true;
        self.only_lost = false;
        self.dependency_done(index);
    }

    fn wait_failed(&mut self, index: u32, kind: &str, message: &str, wait: Wait) {
        let failure =
            Failure { kind: kind.to_owned(), message: message.to_owned(), retryable: false, retry_after_ms: None };
        self.answer(index, &wait, Outcome::Failure(failure));
        let detail = Detail {
            waits: vec![wait],
            reason: Some(message.to_owned()),
            error_type: Some(kind.to_owned()),
            ..Detail::default()
        };
        self.move_step(index, StepEvent::TimerFired, StepState::Error, Some(detail));
        self.step_failed(index, kind, message);
    }

    /// What the step came to goes to the row of its attempt.
    pub(super) fn answer(&mut self, index: u32, wait: &Wait, outcome: Outcome) {
        let step = self.touch(index);
        step.due_at = None;
        let answer =
            Answer { step: step.uuid, attempt: step.attempt, generation: step.generation, since: wait.since, outcome };
        self.plan.answers.push(answer);
    }
}
