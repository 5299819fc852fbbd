//! What a task came to, and its log.

use std::time::Duration;

use serde_json::{Value, json};

use super::Call;
use crate::simulation::{AttemptRow, Row, World};
use tasker_shared::state_machine::plan::Outcome;
use tasker_shared::state_machine::states::{StepState, TaskState};
use tasker_shared::trace::log::{Attempt, Head, StepInfo, TaskLog, Transition};

/// What became of a task.
#[derive(Debug, Clone)]
pub struct Run {
    pub(super) world: World,
    pub(super) calls: Vec<Call>,
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

    /// The states of a map's items that were created, by their index in its list.
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
    /// `Trace::of_log` reads it.
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

    pub(super) fn waits_for(&self) -> String {
        let steps = &self.world.definition.steps;
        let named = |step: u32| &steps[self.world.definition.position(step).0 as usize];
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

    pub(super) fn index(&self, step: &str) -> u32 {
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
    let mut made = row.made.clone();
    // Times of the detail go through the database as JSON.
    made.detail = made.detail.map(|detail| serde_json::from_value(json!(detail)).unwrap_or_default());
    Transition::of(made, row.began_at, row.at)
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
