//! One method per event: what it does to the steps it is about and to those behind them.
//!
//! Each answers whether it changed anything; an event that comes late, twice or out of order does not.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::super::plan::{Detail, Due, Failure, Outcome, Step, Wait};
use super::super::retry::{OnExhausted, Verdict, verdict};
use super::super::states::{StepEvent, StepState, TaskEvent, TaskState};
use super::{MAX_LOST, Pass, Ready, seed};

/// Failures that `on_exhausted: continue` does not pass over: the steps behind them wait for a repair.
pub const NEVER_PASSED: [&str; 7] = [
    "missing_input",
    "quarantined",
    "unknown_branch",
    "invalid_condition",
    "invalid_until",
    "not_a_list",
    "too_many_items",
];

impl Pass<'_, '_> {
    pub(super) fn start(&mut self) -> bool {
        if self.plan.task.state != TaskState::Pending {
            return false;
        }
        self.move_task(TaskEvent::Start, TaskState::Initializing, None);
        if let Some(reason) = &self.snapshot.invalid_input {
            self.fatal = Some(("invalid_input".into(), reason.clone()));
            return true;
        }
        self.limit_total();
        self.create_steps();
        true
    }

    /// The total timeout counts from the beginning of the generation.
    pub(super) fn limit_total(&mut self) {
        if let Some(total) = self.definition.total {
            let at = self.plan.task.generation_began_at + total;
            self.plan.due.push(Due { kind: "total_timeout", at, step: None });
        }
    }

    pub(super) fn create_steps(&mut self) {
        let step_uuids = &self.snapshot.new_step_uuids;
        self.creating = true;
        self.plan.task.open_steps = i32::try_from(step_uuids.len()).unwrap_or(i32::MAX);
        self.plan.task_changed = true;
        for (index, uuid) in (0_u32..).zip(step_uuids.iter().copied()) {
            let dependencies = self.definition.graph.parents(index).len();
            let priority = self.plan.task.priority.saturating_add(self.definition.steps[index as usize].priority);
            let dependencies = i32::try_from(dependencies).unwrap_or(i32::MAX);
            let step = Step::new(uuid, index, self.plan.task.generation, dependencies, priority, self.now);
            self.steps.insert(index, step);
            if dependencies == 0 {
                self.ready.push(Ready { step: index, event: StepEvent::Enqueue, waits: Vec::new() });
            }
        }
    }

    pub(super) fn result(&mut self, index: u32, attempt: i32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        if step.attempt != attempt {
            return false;
        }
        match (step.state, self.snapshot.outcomes.get(&index).cloned()) {
            (StepState::EnqueuedForOrchestration, Some(Outcome::Success(output))) => {
                self.close(index);
                let not_chosen = match self.not_chosen(index, &output) {
                    Ok(not_chosen) => not_chosen,
                    Err(reason) => {
                        self.fail_by_definition(index, "unknown_branch", &reason);
                        return true;
                    }
                };
                self.move_step(index, StepEvent::Complete, StepState::Complete, None);
                self.outputs.insert(index, output);
                self.evaluated = true;
                self.only_lost = false;
                self.skip_branches(index, &not_chosen);
                self.dependency_done(index);
                true
            }
            (StepState::EnqueuedAsErrorForOrchestration, Some(Outcome::Failure(failure))) => {
                self.close(index);
                self.attempt_failed(index, &failure, StepEvent::ScheduleRetry, StepEvent::Fail);
                true
            }
            _ => false,
        }
    }

    pub(super) fn quarantined(&mut self, index: u32, attempt: i32, reason: &str) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        let reported =
            matches!(step.state, StepState::EnqueuedForOrchestration | StepState::EnqueuedAsErrorForOrchestration);
        if step.attempt != attempt || !reported {
            return false;
        }
        let detail =
            Detail { reason: Some(reason.to_owned()), error_type: Some("quarantined".into()), ..Detail::default() };
        self.close(index);
        self.move_step(index, StepEvent::Fail, StepState::Error, Some(detail));
        self.step_gave_up(index, "quarantined", reason, OnExhausted::Fail);
        true
    }

    /// An attempt ended in an error: schedule the next one, or give the step up.
    pub(super) fn attempt_failed(&mut self, index: u32, failure: &Failure, again: StepEvent, give_up: StepEvent) {
        self.evaluated = true;
        self.any_failed = true;
        self.only_lost = false;
        let definition = self.defined(index);
        let step = self.touch(index);
        step.failures += 1;
        let after = failure.retry_after_ms.map(|ms| Duration::from_secs_f64(ms.clamp(0.0, 1e11) / 1000.0));
        let failures = u32::try_from(step.failures).unwrap_or(u32::MAX);
        let verdict = verdict(&definition.retry, failures, &failure.kind, failure.retryable, after, seed(step));
        match verdict {
            Verdict::Retry(delay) => {
                let at = self.now + delay;
                let step = self.touch(index);
                step.due_at = Some(at);
                let uuid = step.uuid;
                self.plan.due.push(Due { kind: "retry", at, step: Some(uuid) });
                let detail = Detail { until: Some(at), ..Detail::default() };
                self.move_step(index, again, StepState::WaitingForRetry, Some(detail));
            }
            Verdict::GiveUp(reason) => {
                let detail = Detail {
                    reason: Some(reason.to_string()),
                    error_type: Some(failure.kind.clone()),
                    ..Detail::default()
                };
                self.move_step(index, give_up, StepState::Error, Some(detail));
                self.step_failed(index, &failure.kind, &failure.message);
            }
        }
    }

    /// A step has failed for good: its policy says what that means for the task.
    pub(super) fn step_failed(&mut self, index: u32, kind: &str, message: &str) {
        self.step_gave_up(index, kind, message, self.defined(index).retry.on_exhausted);
    }

    pub(super) fn step_gave_up(&mut self, index: u32, kind: &str, message: &str, policy: OnExhausted) {
        self.evaluated = true;
        self.any_failed = true;
        self.only_lost = false;
        if self.steps[&index].item.is_some() {
            // What that means is for its map to say.
            return self.item_ended(index, Some(message));
        }
        let definition = self.defined(index);
        match policy {
            OnExhausted::Continue => return self.dependency_done(index),
            OnExhausted::Fail if !self.definition.block_on_failure => {
                self.fatal
                    .get_or_insert_with(|| (kind.to_owned(), format!("step {} failed: {message}", definition.name)));
            }
            OnExhausted::Fail | OnExhausted::Block => {}
        }
        self.plan.task.failed_steps += 1;
        self.plan.task.error_type = Some(kind.to_owned());
        self.plan.task.reason = Some(format!("step {} failed: {message}", definition.name));
        self.plan.task_changed = true;
    }

    /// What the template and the data say together cannot be done: the step fails for good, and
    /// `on_exhausted` has no say, because trying again or going on without it was never the question.
    pub(super) fn fail_by_definition(&mut self, index: u32, kind: &str, reason: &str) {
        debug_assert!(NEVER_PASSED.contains(&kind), "a retry would take {kind} for done");
        let detail = Detail { reason: Some(reason.to_owned()), error_type: Some(kind.into()), ..Detail::default() };
        self.move_step(index, StepEvent::Fail, StepState::Error, Some(detail));
        self.step_gave_up(index, kind, reason, OnExhausted::Fail);
    }

    pub(super) fn lease_due(&mut self, index: u32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        let Some(expires) = step.lease_expires_at.filter(|_| step.state == StepState::InProgress) else {
            return false;
        };
        if expires > self.now {
            return self.lease_renewed(index, expires);
        }
        let detail = Detail { last_heartbeat_at: step.last_heartbeat_at, ..Detail::default() };
        self.evaluated = true;
        self.close(index);
        let step = self.touch(index);
        step.losses += 1;
        if step.losses > MAX_LOST {
            let reason =
                format!("{MAX_LOST} attempts in a row lost their worker: it died, or was silent for its whole lease");
            let detail = Detail { reason: Some(reason.clone()), error_type: Some("lease_expired".into()), ..detail };
            self.move_step(index, StepEvent::LeaseExpired, StepState::Error, Some(detail));
            self.step_failed(index, "lease_expired", &reason);
        } else {
            self.move_step(index, StepEvent::LeaseExpired, StepState::Enqueued, Some(detail));
            // The move itself is the Enqueue of the next attempt.
            self.touch(index).attempt += 1;
            self.opened(index, StepEvent::LeaseExpired, None);
            self.ready.push(Ready { step: index, event: StepEvent::LeaseExpired, waits: Vec::new() });
        }
        true
    }

    /// The claim lives; look again when its lease ends. A worker that renews its lease for ever
    /// but never reports its own timeout is stopped here.
    pub(super) fn lease_renewed(&mut self, index: u32, expires: DateTime<Utc>) -> bool {
        let step = &self.steps[&index];
        let lease = expires - step.last_heartbeat_at.unwrap_or(step.last_at);
        let Some(run) = self.defined(index).run_timeout.filter(|run| step.last_at + *run + lease <= self.now) else {
            self.plan.due.push(Due { kind: "lease", at: expires, step: Some(step.uuid) });
            return true;
        };
        let failure = Failure {
            kind: "timeout".into(),
            message: format!("it ran longer than {run:?} and its worker never said so"),
            retryable: true,
            retry_after_ms: None,
        };
        self.close(index);
        self.attempt_failed(index, &failure, StepEvent::RunTimeout, StepEvent::RunTimeout);
        true
    }

    pub(super) fn retry_due(&mut self, index: u32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        // One that is due and held is on its way already.
        let waits = step.state == StepState::WaitingForRetry && step.held_by.is_none();
        let Some(due) = step.due_at.filter(|_| waits) else {
            return false;
        };
        if due > self.now {
            self.plan.due.push(Due { kind: "retry", at: due, step: Some(step.uuid) });
            return true;
        }
        let waits = vec![retry_wait(step)];
        self.wake = Some(TaskEvent::RetryReady);
        self.ready.push(Ready { step: index, event: StepEvent::RetryReady, waits });
        true
    }

    pub(super) fn queue_due(&mut self, index: u32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        // Nobody can claim it while its task is suspended; resume begins to count anew.
        let counts = self.plan.task.state != TaskState::Suspended;
        let Some(timeout) = self.defined(index).queue_timeout.filter(|_| counts) else {
            return false;
        };
        // What is held counts from when it was ready: that nobody offers its handler, say, is a wait
        // for a worker too. What was sent counts from then.
        let since = match (step.state, step.held_by) {
            (StepState::Enqueued, _) => step.enqueued_at,
            (StepState::Pending | StepState::WaitingForRetry, Some(_)) => step.ready_at,
            _ => None,
        };
        // An attempt that began in this settle has a timer of its own.
        let began_before = self.snapshot.steps.get(&index).is_some_and(|before| before.attempt == step.attempt);
        let Some(since) = since.filter(|_| began_before) else {
            return false;
        };
        let at = since + timeout;
        if at > self.now {
            self.plan.due.push(Due { kind: "queue_timeout", at, step: Some(step.uuid) });
            return true;
        }
        let reason = match step.held_by {
            None => format!("no worker claimed it within {timeout:?}"),
            Some(held) => format!("it was not sent within {timeout:?}: {}", held.in_words()),
        };
        self.out_of_time(index, StepEvent::QueueTimeout, "queue_timeout", &reason);
        true
    }

    pub(super) fn admit(&mut self, index: u32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        let ready = match step.state {
            _ if step.held_by.is_none() || self.plan.task.state == TaskState::Suspended => return false,
            StepState::Pending => Ready { step: index, event: StepEvent::Enqueue, waits: Vec::new() },
            StepState::WaitingForRetry => {
                Ready { step: index, event: StepEvent::RetryReady, waits: vec![retry_wait(step)] }
            }
            _ => return false,
        };
        self.wake.get_or_insert(TaskEvent::StepsAdmitted);
        self.ready.push(ready);
        true
    }

    pub(super) fn step_total_due(&mut self, index: u32) -> bool {
        let Some(step) = self.steps.get(&index).filter(|step| !step.state.is_terminal()) else {
            return false;
        };
        let (Some(&deadline), Some(total)) = (self.snapshot.deadlines.get(&index), self.defined(index).total) else {
            return false;
        };
        let reported =
            matches!(step.state, StepState::EnqueuedForOrchestration | StepState::EnqueuedAsErrorForOrchestration);
        // A report that was accepted counts; what comes of it is known in a moment.
        let at = if reported { deadline.max(self.now + Duration::from_secs(1)) } else { deadline };
        if at > self.now {
            self.plan.due.push(Due { kind: "step_timeout", at, step: Some(step.uuid) });
            return true;
        }
        let reason = format!("it took longer than the {total:?} its template allows, retries and waits included");
        self.out_of_time(index, StepEvent::TotalTimeout, "step_timeout", &reason);
        true
    }

    fn out_of_time(&mut self, index: u32, event: StepEvent, error_type: &str, reason: &str) {
        let waits = self.leave(index);
        let error = Some(error_type.to_owned());
        let detail = Detail { waits, reason: Some(reason.to_owned()), error_type: error, ..Detail::default() };
        self.move_step(index, event, StepState::Error, Some(detail));
        self.step_failed(index, error_type, reason);
    }

    pub(super) fn total_timeout(&mut self) -> bool {
        let Some(total) = self.definition.total.filter(|_| !self.plan.task.state.is_terminal()) else {
            return false;
        };
        let at = self.plan.task.generation_began_at + total;
        if at > self.now {
            self.plan.due.push(Due { kind: "total_timeout", at, step: None });
            return true;
        }
        let reason = format!("it took longer than the {total:?} its template allows");
        self.plan.task.error_type = Some("timeout".into());
        self.plan.task.reason = Some(reason.clone());
        let detail = Detail { reason: Some(reason), error_type: Some("timeout".into()), ..Detail::default() };
        self.ready.clear();
        self.plan.task.suspended_from = None;
        self.move_task(TaskEvent::TotalTimeout, TaskState::Error, Some(detail));
        self.plan.cancel_open_steps = true;
        true
    }
}

/// The wait for a retry; one that was held when it came due had ended by then.
pub(super) fn retry_wait(step: &Step) -> Wait {
    Wait { ended: step.ready_at, ..Wait::new("retry", step.last_at, step.due_at, step.version) }
}
