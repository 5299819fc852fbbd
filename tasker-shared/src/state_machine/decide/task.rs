//! The task's own moves, once per settle, whatever the number of events.

use super::super::plan::{Detail, Plan};
use super::super::states::{StepEvent, TaskEvent, TaskState};
use super::{Pass, Ready};

impl Pass<'_, '_> {
    pub(super) fn finish(mut self) -> Plan {
        if !self.plan.task.state.is_terminal() {
            self.advance_maps();
        }
        match self.plan.task.state {
            TaskState::Initializing => self.finish_initializing(),
            TaskState::EvaluatingResults => self.finish_evaluating(),
            TaskState::Suspended => self.finish_suspended(),
            state if state.is_terminal() => {}
            _ if self.evaluated => {
                self.begin_evaluating();
                self.finish_evaluating();
            }
            _ if !self.ready.is_empty() => self.finish_woken(),
            _ => {}
        }
        if self.plan.task.state.is_terminal() {
            let task = &mut self.plan.task;
            (task.open_steps, task.in_flight_steps, task.retrying_steps, task.held_steps) = (0, 0, 0, 0);
            self.plan.sends.clear();
            self.plan.children.clear();
        }
        self.plan.task_changed |= self.plan.task.version != self.plan.task_version_before;
        self.collect_steps();
        self.plan
    }

    pub(super) fn begin_evaluating(&mut self) {
        let event = if self.only_lost {
            TaskEvent::AttemptLost
        } else if self.plan.task.open_steps == 0 && self.plan.task.state == TaskState::StepsInProcess {
            TaskEvent::AllStepsCompleted
        } else if self.any_failed {
            TaskEvent::StepFailed
        } else {
            TaskEvent::StepCompleted
        };
        self.move_task(event, TaskState::EvaluatingResults, None);
    }

    /// Nothing is sent, and nothing is made of what ended: resume does both.
    pub(super) fn finish_suspended(&mut self) {
        self.plan.sends.clear();
        for Ready { step, event, .. } in std::mem::take(&mut self.ready) {
            let held = self.steps[&step].held_by.is_some();
            if event == StepEvent::Enqueue && !held {
                let now = self.now;
                self.touch(step).ready_at.get_or_insert(now);
            }
        }
    }

    pub(super) fn finish_initializing(&mut self) {
        if self.fatal.is_none() && self.definition.steps.is_empty() {
            return self.move_task(TaskEvent::NoStepsFound, TaskState::Complete, None);
        }
        let sent = if self.fatal.is_none() { self.send_ready(self.plan.task.version + 2) } else { 0 };
        if let Some((kind, reason)) = self.fatal.take() {
            return self.fail_task(TaskEvent::InvalidInput, kind, reason);
        }
        if sent > 0 {
            self.move_task(TaskEvent::ReadyStepsFound, TaskState::EnqueuingSteps, None);
            self.move_task(TaskEvent::StepsEnqueued, TaskState::StepsInProcess, None);
        } else if self.plan.task.open_steps == 0 && self.plan.task.failed_steps == 0 {
            // Every step was skipped.
            self.move_task(TaskEvent::NoStepsFound, TaskState::Complete, None);
        } else {
            self.move_task(TaskEvent::NoDependenciesReady, TaskState::WaitingForDependencies, None);
            if self.any_failed && self.plan.task.held_steps == 0 {
                self.move_task(TaskEvent::StepFailed, TaskState::EvaluatingResults, None);
                self.move_task(TaskEvent::PermanentFailure, TaskState::BlockedByFailures, None);
            }
        }
    }

    pub(super) fn finish_evaluating(&mut self) {
        let sent = if self.fatal.is_none() { self.send_ready(self.plan.task.version + 2) } else { 0 };
        if let Some((kind, reason)) = self.fatal.take() {
            return self.fail_task(TaskEvent::PermanentFailure, kind, reason);
        }
        let task = &self.plan.task;
        if sent > 0 {
            self.move_task(TaskEvent::ReadyStepsFound, TaskState::EnqueuingSteps, None);
            self.move_task(TaskEvent::StepsEnqueued, TaskState::StepsInProcess, None);
        } else if task.in_flight_steps > 0 {
            self.move_task(TaskEvent::StepsStillRunning, TaskState::StepsInProcess, None);
        } else if task.retrying_steps > 0 {
            self.move_task(TaskEvent::RetryScheduled, TaskState::WaitingForRetry, None);
        } else if task.held_steps > 0 {
            self.move_task(TaskEvent::NoDependenciesReady, TaskState::WaitingForDependencies, None);
        } else if task.failed_steps > 0 {
            let detail =
                Detail { reason: task.reason.clone(), error_type: task.error_type.clone(), ..Detail::default() };
            self.move_task(TaskEvent::PermanentFailure, TaskState::BlockedByFailures, Some(detail));
        } else {
            self.move_task(TaskEvent::AllStepsSuccessful, TaskState::Complete, None);
        }
    }

    /// A retry came due or a held step found room: nothing ended, so nothing is evaluated.
    pub(super) fn finish_woken(&mut self) {
        let event = self.wake.unwrap_or(TaskEvent::StepsAdmitted);
        if self.send_ready(self.plan.task.version + 2) > 0 {
            self.move_task(event, TaskState::EnqueuingSteps, None);
            self.move_task(TaskEvent::StepsEnqueued, TaskState::StepsInProcess, None);
        } else if self.plan.task.state == TaskState::WaitingForRetry && self.plan.task.retrying_steps == 0 {
            // What came due waits for something else now.
            self.move_task(event, TaskState::EvaluatingResults, None);
            self.finish_evaluating();
        }
    }

    pub(super) fn fail_task(&mut self, event: TaskEvent, kind: String, reason: String) {
        self.plan.task.error_type = Some(kind.clone());
        self.plan.task.reason = Some(reason.clone());
        self.plan.cancel_open_steps = true;
        // What was about to be sent is cancelled instead; the move that would have sent it never was.
        for made in &mut self.plan.moves {
            made.task_version = None;
        }
        for index in &self.touched {
            if let Some(step) = self.steps.get_mut(index).filter(|step| step.enqueued_at.is_none()) {
                step.enqueued_task_version = None;
            }
        }
        let detail = Detail { reason: Some(reason), error_type: Some(kind), ..Detail::default() };
        self.move_task(event, TaskState::Error, Some(detail));
    }
}
