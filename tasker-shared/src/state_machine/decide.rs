//! `(snapshot, events, room, now) -> Plan`: everything that moves a task, decided without I/O.
//!
//! One call is one settle of one task, whatever the number of events: the steps' moves
//! come first, then the task passes at most once through `evaluating_results`. The cost is
//! that of the events and of the steps directly behind them, never of the whole task.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::definition::Definition;
use super::input::default_input;
use super::plan::{
    Detail, Due, Failure, HeldBy, Move, Outcome, Plan, Room, Send, Step, Task, Wait, step_words,
    task_words,
};
use super::retry::{OnExhausted, Verdict, verdict};
use super::states::{
    StepEvent, StepState, TaskEvent, TaskState, step_move_is_legal, task_move_is_legal,
};

/// How often an attempt may be lost before the step fails; a loss spends no retry.
pub const MAX_LOST: i32 = 10;

/// What is known of a task when it is settled: its row, the steps the events are about,
/// their direct dependents, and the outputs that newly ready steps need.
#[derive(Debug, Clone)]
pub struct Snapshot<'a> {
    /// The task's row.
    pub task: Task,
    /// Its template.
    pub definition: &'a Definition,
    /// Steps by index. Of an operator's retry: every failed, cancelled or pending one, its
    /// `remaining_dependencies` recounted from the edges.
    pub steps: HashMap<u32, Step>,
    /// What the workers reported of the steps the events are about.
    pub outcomes: HashMap<u32, Outcome>,
    /// Outputs of finished steps, by index.
    pub outputs: HashMap<u32, Value>,
}

/// Something that happened, or is due. Steps are named by index.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The task is to begin; its steps get these uuids. `invalid` says why its input breaks the template's schema.
    Start {
        /// One per step of the template.
        step_uuids: Vec<Uuid>,
        /// What is wrong with the input.
        invalid: Option<String>,
    },
    /// A result of this claim was reported.
    Result {
        /// Index of the step.
        step: u32,
        /// The attempt reported.
        attempt: i32,
    },
    /// The result's message failed again and again for a reason of its own and was quarantined.
    Quarantined {
        /// Index of the step.
        step: u32,
        /// The attempt reported.
        attempt: i32,
        /// What failed.
        reason: String,
    },
    /// The lease of the step's claim may have expired.
    LeaseDue {
        /// Index of the step.
        step: u32,
    },
    /// The step's retry may be due.
    RetryDue {
        /// Index of the step.
        step: u32,
    },
    /// The step may have lain in its queue for too long.
    QueueDue {
        /// Index of the step.
        step: u32,
        /// The attempt that was enqueued.
        attempt: i32,
    },
    /// The task may have taken longer than its template allows.
    TotalDue,
    /// A held step may find room now.
    Admit {
        /// Index of the step.
        step: u32,
    },
    /// End it; running handlers are asked to stop.
    Cancel(Operator),
    /// End it; running handlers are dropped.
    Terminate(Operator),
    /// Try again what failed. `step_uuids` serve a task that ended before it had steps.
    Retry {
        /// Who and why.
        operator: Operator,
        /// One per step of the template, or none if the steps exist.
        step_uuids: Vec<Uuid>,
        /// What is wrong with the input of a task that never had steps.
        invalid: Option<String>,
    },
}

impl Event {
    /// Its place within one settle. A retry is about the task as it was loaded, so it stands
    /// before anything that may end the task; what was reported counts before the end does.
    fn order(&self) -> (u8, u32, i32) {
        match self {
            Self::Start { .. } => (0, 0, 0),
            Self::Retry { .. } => (1, 0, 0),
            Self::Result { step, attempt } => (2, *step, *attempt),
            Self::Quarantined { step, attempt, .. } => (3, *step, *attempt),
            Self::LeaseDue { step } => (4, *step, 0),
            Self::RetryDue { step } => (5, *step, 0),
            Self::QueueDue { step, attempt } => (6, *step, *attempt),
            Self::Admit { step } => (7, *step, 0),
            Self::TotalDue => (8, 0, 0),
            Self::Cancel(_) | Self::Terminate(_) => (9, 0, 0),
        }
    }
}

/// Who acts, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    /// A person or a service.
    pub actor: String,
    /// In their words.
    pub reason: Option<String>,
}

/// Decides. `now` is the database's time after the locks were taken.
pub fn decide(
    snapshot: Snapshot<'_>,
    events: Vec<Event>,
    room: &mut Room,
    now: DateTime<Utc>,
) -> Plan {
    let mut events = events;
    // They came over several queues in no order; now their order cannot matter.
    events.sort_by_key(Event::order);
    let mut pass = Pass::new(snapshot, room, now);
    for event in events {
        pass.apply(event);
    }
    pass.finish()
}

/// A step to send: where it stands, and by which move.
struct Ready {
    step: u32,
    event: StepEvent,
    waits: Vec<Wait>,
}

#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one fact about the pass"
)]
struct Pass<'a, 'r> {
    definition: &'a Definition,
    room: &'r mut Room,
    now: DateTime<Utc>,
    steps: HashMap<u32, Step>,
    versions_before: HashMap<u32, i32>,
    touched: BTreeSet<u32>,
    outcomes: HashMap<u32, Outcome>,
    outputs: HashMap<u32, Value>,
    ready: Vec<Ready>,
    creating: bool,
    /// Something ended, so the task passes through `evaluating_results`.
    evaluated: bool,
    any_failed: bool,
    only_lost: bool,
    /// What wakes the task when nothing is evaluated.
    wake: Option<TaskEvent>,
    /// A failure that ends the task: class and words.
    fatal: Option<(String, String)>,
    plan: Plan,
}

impl<'a, 'r> Pass<'a, 'r> {
    fn new(snapshot: Snapshot<'a>, room: &'r mut Room, now: DateTime<Utc>) -> Self {
        let Snapshot {
            task,
            definition,
            steps,
            outcomes,
            mut outputs,
        } = snapshot;
        // An event may name a step that is complete already (a hint that came twice, or late):
        // its output is here and nowhere else, and the steps behind it may need it now.
        for (index, outcome) in &outcomes {
            if let Outcome::Success(output) = outcome
                && steps
                    .get(index)
                    .is_some_and(|step| step.state == StepState::Complete)
            {
                outputs.insert(*index, output.clone());
            }
        }
        Self {
            definition,
            room,
            now,
            versions_before: steps
                .iter()
                .map(|(index, step)| (*index, step.version))
                .collect(),
            steps,
            touched: BTreeSet::new(),
            outcomes,
            outputs,
            ready: Vec::new(),
            creating: false,
            evaluated: false,
            any_failed: false,
            only_lost: true,
            wake: None,
            fatal: None,
            plan: Plan {
                task_version_before: task.version,
                task,
                task_changed: false,
                moves: Vec::new(),
                steps: Vec::new(),
                new_steps: Vec::new(),
                new_step_queues: Vec::new(),
                sends: Vec::new(),
                due: Vec::new(),
                cancel_open_steps: false,
                closed: Vec::new(),
                audit: None,
                ignored: 0,
            },
        }
    }

    fn apply(&mut self, event: Event) {
        let changed = match event {
            Event::Start {
                step_uuids,
                invalid,
            } => self.start(step_uuids, invalid),
            Event::Retry {
                operator,
                step_uuids,
                invalid,
            } => self.retry(operator, step_uuids, invalid),
            Event::Cancel(operator) => self.end(TaskEvent::Cancel, operator),
            Event::Terminate(operator) => self.end(TaskEvent::Terminate, operator),
            Event::TotalDue => self.total_timeout(),
            _ if self.plan.task.state.is_terminal() => false,
            Event::Result { step, attempt } => self.result(step, attempt),
            Event::Quarantined {
                step,
                attempt,
                reason,
            } => self.quarantined(step, attempt, &reason),
            Event::LeaseDue { step } => self.lease_due(step),
            Event::RetryDue { step } => self.retry_due(step),
            Event::QueueDue { step, attempt } => self.queue_due(step, attempt),
            Event::Admit { step } => self.admit(step),
        };
        if !changed {
            self.plan.ignored += 1;
        }
    }

    // Events. Each answers whether it changed anything; one that comes late, twice or out of order does not.

    fn start(&mut self, step_uuids: Vec<Uuid>, invalid: Option<String>) -> bool {
        if self.plan.task.state != TaskState::Pending {
            return false;
        }
        self.move_task(TaskEvent::Start, TaskState::Initializing, None);
        if let Some(reason) = invalid {
            self.fatal = Some(("invalid_input".into(), reason));
            return true;
        }
        self.limit_total();
        self.create_steps(step_uuids);
        true
    }

    /// The total timeout counts from the beginning of the generation.
    fn limit_total(&mut self) {
        if let Some(total) = self.definition.total {
            let at = self.plan.task.generation_began_at + total;
            self.plan.due.push(Due {
                kind: "total_timeout",
                at,
                step: None,
            });
        }
    }

    fn create_steps(&mut self, step_uuids: Vec<Uuid>) {
        self.creating = true;
        self.plan.task.open_steps = i32::try_from(step_uuids.len()).unwrap_or(i32::MAX);
        self.plan.task_changed = true;
        for (index, uuid) in (0_u32..).zip(step_uuids) {
            let dependencies = self.definition.graph.parents(index).len();
            let priority = self.plan.task.priority + self.definition.steps[index as usize].priority;
            let dependencies = i32::try_from(dependencies).unwrap_or(i32::MAX);
            let step = Step::new(
                uuid,
                index,
                self.plan.task.generation,
                dependencies,
                priority,
                self.now,
            );
            self.steps.insert(index, step);
            if dependencies == 0 {
                self.ready.push(Ready {
                    step: index,
                    event: StepEvent::Enqueue,
                    waits: Vec::new(),
                });
            }
        }
    }

    fn result(&mut self, index: u32, attempt: i32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        if step.attempt != attempt {
            return false;
        }
        match (step.state, self.outcomes.remove(&index)) {
            (StepState::EnqueuedForOrchestration, Some(Outcome::Success(output))) => {
                self.close(index);
                self.move_step(index, StepEvent::Complete, StepState::Complete, None);
                self.outputs.insert(index, output);
                self.evaluated = true;
                self.only_lost = false;
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

    fn quarantined(&mut self, index: u32, attempt: i32, reason: &str) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        let reported = matches!(
            step.state,
            StepState::EnqueuedForOrchestration | StepState::EnqueuedAsErrorForOrchestration
        );
        if step.attempt != attempt || !reported {
            return false;
        }
        let detail = Detail {
            reason: Some(reason.to_owned()),
            error_type: Some("quarantined".into()),
            ..Detail::default()
        };
        self.close(index);
        self.move_step(index, StepEvent::Fail, StepState::Error, Some(detail));
        self.step_gave_up(index, "quarantined", reason, OnExhausted::Fail);
        true
    }

    /// An attempt ended in an error: schedule the next one, or give the step up.
    fn attempt_failed(
        &mut self,
        index: u32,
        failure: &Failure,
        again: StepEvent,
        give_up: StepEvent,
    ) {
        self.evaluated = true;
        self.any_failed = true;
        self.only_lost = false;
        let definition = &self.definition.steps[index as usize];
        let step = self.touch(index);
        step.failures += 1;
        let after = failure
            .retry_after_ms
            .map(|ms| Duration::from_secs_f64(ms.clamp(0.0, 1e11) / 1000.0));
        let failures = u32::try_from(step.failures).unwrap_or(u32::MAX);
        let verdict = verdict(
            &definition.retry,
            failures,
            &failure.kind,
            failure.retryable,
            after,
            seed(step),
        );
        match verdict {
            Verdict::Retry(delay) => {
                let at = self.now + delay;
                let step = self.touch(index);
                step.due_at = Some(at);
                let uuid = step.uuid;
                self.plan.due.push(Due {
                    kind: "retry",
                    at,
                    step: Some(uuid),
                });
                let detail = Detail {
                    until: Some(at),
                    ..Detail::default()
                };
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
    fn step_failed(&mut self, index: u32, kind: &str, message: &str) {
        self.step_gave_up(
            index,
            kind,
            message,
            self.definition.steps[index as usize].retry.on_exhausted,
        );
    }

    fn step_gave_up(&mut self, index: u32, kind: &str, message: &str, policy: OnExhausted) {
        self.evaluated = true;
        self.any_failed = true;
        self.only_lost = false;
        let definition = &self.definition.steps[index as usize];
        match policy {
            OnExhausted::Continue => return self.dependency_done(index),
            OnExhausted::Fail if !self.definition.block_on_failure => {
                self.fatal.get_or_insert_with(|| {
                    (
                        kind.to_owned(),
                        format!("step {} failed: {message}", definition.name),
                    )
                });
            }
            OnExhausted::Fail | OnExhausted::Block => {}
        }
        self.plan.task.failed_steps += 1;
        self.plan.task.error_type = Some(kind.to_owned());
        self.plan.task.reason = Some(format!("step {} failed: {message}", definition.name));
        self.plan.task_changed = true;
    }

    fn dependency_done(&mut self, index: u32) {
        for &child in self.definition.graph.children(index) {
            let Some(step) = self.steps.get(&child) else {
                continue;
            };
            if step.state != StepState::Pending {
                continue;
            }
            let step = self.touch(child);
            step.remaining_dependencies -= 1;
            if step.remaining_dependencies == 0 {
                self.ready.push(Ready {
                    step: child,
                    event: StepEvent::Enqueue,
                    waits: Vec::new(),
                });
            }
        }
    }

    fn lease_due(&mut self, index: u32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        let Some(expires) = step
            .lease_expires_at
            .filter(|_| step.state == StepState::InProgress)
        else {
            return false;
        };
        if expires > self.now {
            return self.lease_renewed(index, expires);
        }
        let detail = Detail {
            last_heartbeat_at: step.last_heartbeat_at,
            ..Detail::default()
        };
        self.evaluated = true;
        self.close(index);
        let step = self.touch(index);
        step.losses += 1;
        if step.losses > MAX_LOST {
            let reason = format!(
                "{MAX_LOST} attempts in a row lost their worker; the last one was silent for its whole lease"
            );
            let detail = Detail {
                reason: Some(reason.clone()),
                error_type: Some("lease_expired".into()),
                ..detail
            };
            self.move_step(
                index,
                StepEvent::LeaseExpired,
                StepState::Error,
                Some(detail),
            );
            self.step_failed(index, "lease_expired", &reason);
        } else {
            self.move_step(
                index,
                StepEvent::LeaseExpired,
                StepState::Enqueued,
                Some(detail),
            );
            // The move itself is the Enqueue of the next attempt.
            self.touch(index).attempt += 1;
            self.opened(index, StepEvent::LeaseExpired, None);
            self.ready.push(Ready {
                step: index,
                event: StepEvent::LeaseExpired,
                waits: Vec::new(),
            });
        }
        true
    }

    /// The claim lives; look again when its lease ends. A worker that renews its lease for ever
    /// but never reports its own timeout is stopped here.
    fn lease_renewed(&mut self, index: u32, expires: DateTime<Utc>) -> bool {
        let step = &self.steps[&index];
        let lease = expires - step.last_heartbeat_at.unwrap_or(step.last_at);
        let Some(run) = self.definition.steps[index as usize]
            .run_timeout
            .filter(|run| step.last_at + *run + lease <= self.now)
        else {
            self.plan.due.push(Due {
                kind: "lease",
                at: expires,
                step: Some(step.uuid),
            });
            return true;
        };
        let failure = Failure {
            kind: "timeout".into(),
            message: format!("it ran longer than {run:?} and its worker never said so"),
            retryable: true,
            retry_after_ms: None,
        };
        self.close(index);
        self.attempt_failed(
            index,
            &failure,
            StepEvent::RunTimeout,
            StepEvent::RunTimeout,
        );
        true
    }

    fn retry_due(&mut self, index: u32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        let Some(due) = step
            .due_at
            .filter(|_| step.state == StepState::WaitingForRetry)
        else {
            return false;
        };
        if due > self.now {
            self.plan.due.push(Due {
                kind: "retry",
                at: due,
                step: Some(step.uuid),
            });
            return true;
        }
        let wait = Wait {
            reason: "retry".into(),
            since: step.last_at,
            until: Some(due),
            ended: None,
            ordinal: step.version,
        };
        self.wake = Some(TaskEvent::RetryReady);
        self.ready.push(Ready {
            step: index,
            event: StepEvent::RetryReady,
            waits: vec![wait],
        });
        true
    }

    fn queue_due(&mut self, index: u32, attempt: i32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        let Some(timeout) = self.definition.steps[index as usize].queue_timeout else {
            return false;
        };
        let Some(enqueued) = step
            .enqueued_at
            .filter(|_| step.state == StepState::Enqueued && step.attempt == attempt)
        else {
            return false;
        };
        let at = enqueued + timeout;
        if at > self.now {
            self.plan.due.push(Due {
                kind: "queue_timeout",
                at,
                step: Some(step.uuid),
            });
            return true;
        }
        let reason = format!("no worker claimed it within {timeout:?}");
        let detail = Detail {
            reason: Some(reason.clone()),
            error_type: Some("queue_timeout".into()),
            ..Detail::default()
        };
        self.close(index);
        self.move_step(
            index,
            StepEvent::QueueTimeout,
            StepState::Error,
            Some(detail),
        );
        self.step_failed(index, "queue_timeout", &reason);
        true
    }

    fn admit(&mut self, index: u32) -> bool {
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        if step.state != StepState::Pending || step.held_by.is_none() {
            return false;
        }
        self.wake.get_or_insert(TaskEvent::StepsAdmitted);
        self.ready.push(Ready {
            step: index,
            event: StepEvent::Enqueue,
            waits: Vec::new(),
        });
        true
    }

    fn end(&mut self, event: TaskEvent, operator: Operator) -> bool {
        if self.plan.task.state.is_terminal() {
            return false;
        }
        let (action, reason) = (
            if event == TaskEvent::Cancel {
                "cancel"
            } else {
                "terminate"
            },
            operator.reason,
        );
        self.plan.task.ended_by = Some(action);
        self.plan.task.reason = Some(
            reason
                .clone()
                .unwrap_or_else(|| format!("{action} by {}", operator.actor)),
        );
        let detail = Detail {
            reason: reason.clone(),
            ..Detail::default()
        };
        self.ready.clear();
        self.move_task_by(
            event,
            TaskState::Cancelled,
            Some(detail),
            Some(operator.actor.clone()),
        );
        self.plan.audit = Some((action, operator.actor, reason));
        self.plan.cancel_open_steps = true;
        true
    }

    fn total_timeout(&mut self) -> bool {
        let Some(total) = self
            .definition
            .total
            .filter(|_| !self.plan.task.state.is_terminal())
        else {
            return false;
        };
        let at = self.plan.task.generation_began_at + total;
        if at > self.now {
            self.plan.due.push(Due {
                kind: "total_timeout",
                at,
                step: None,
            });
            return true;
        }
        let reason = format!("it took longer than the {total:?} its template allows");
        self.plan.task.error_type = Some("timeout".into());
        self.plan.task.reason = Some(reason.clone());
        let detail = Detail {
            reason: Some(reason),
            error_type: Some("timeout".into()),
            ..Detail::default()
        };
        self.ready.clear();
        self.move_task(TaskEvent::TotalTimeout, TaskState::Error, Some(detail));
        self.plan.cancel_open_steps = true;
        true
    }

    fn retry(
        &mut self,
        operator: Operator,
        step_uuids: Vec<Uuid>,
        invalid: Option<String>,
    ) -> bool {
        let from = self.plan.task.state;
        if !matches!(
            from,
            TaskState::Error | TaskState::Cancelled | TaskState::BlockedByFailures
        ) {
            return false;
        }
        if from.is_terminal() {
            self.plan.task.generation += 1;
            self.plan.task.generation_began_at = self.now;
            self.limit_total();
        }
        self.plan.task.failed_steps = 0;
        self.plan.task.error_type = None;
        self.plan.task.reason = None;
        self.plan.task.ended_by = None;
        let detail = Detail {
            reason: operator.reason.clone(),
            ..Detail::default()
        };
        self.move_task_by(
            TaskEvent::OperatorRetry,
            TaskState::EvaluatingResults,
            Some(detail),
            Some(operator.actor.clone()),
        );
        self.plan.audit = Some(("retry", operator.actor.clone(), operator.reason));
        if let Some(reason) = invalid {
            self.fatal = Some(("invalid_input".into(), reason));
            return true;
        }
        if !step_uuids.is_empty() {
            self.create_steps(step_uuids);
            return true;
        }
        // A failure that `continue` passed over is tried again too, so it is no longer done for
        // the steps that still wait behind it: they take the recount.
        let pending: Vec<u32> = self
            .steps
            .values()
            .filter(|step| step.state == StepState::Pending)
            .map(|step| step.index)
            .collect();
        self.touched.extend(pending);
        let mut again: Vec<u32> = self
            .steps
            .values()
            .filter(|step| matches!(step.state, StepState::Error | StepState::Cancelled))
            .map(|step| step.index)
            .collect();
        again.sort_unstable();
        for index in again {
            let generation = self.plan.task.generation;
            let step = self.touch(index);
            step.generation = generation;
            step.failures = 0;
            step.losses = 0;
            self.move_step_by(
                index,
                StepEvent::OperatorRetry,
                StepState::Pending,
                None,
                Some(operator.actor.clone()),
            );
            self.plan.task.open_steps += 1;
            if self.steps[&index].remaining_dependencies == 0 {
                self.ready.push(Ready {
                    step: index,
                    event: StepEvent::Enqueue,
                    waits: Vec::new(),
                });
            }
        }
        true
    }

    // Sending what is ready.

    /// Resolves a ready step's input from the task's input and the outputs of earlier steps.
    fn resolve(&self, index: u32) -> Result<Value, String> {
        let outputs = |name: &str| {
            let parent = self.definition.by_name.get(name)?;
            self.outputs.get(parent)
        };
        if let Some(template) = &self.definition.steps[index as usize].input {
            return template
                .resolve(&self.plan.task.input, &outputs)
                .map_err(|missing| missing.to_string());
        }
        let parents = self.definition.graph.parents(index);
        let parents = parents.iter().filter_map(|parent| {
            let name = &*self.definition.steps[*parent as usize].name;
            Some((name, self.outputs.get(parent)?))
        });
        Ok(default_input(&self.plan.task.input, parents))
    }

    /// Sends what finds room, holds the rest; answers how many were sent.
    fn send_ready(&mut self, task_version: i32) -> usize {
        let mut sent = 0;
        // In file order, so that a plan does not depend on the order of the results.
        self.ready.sort_by_key(|ready| ready.step);
        // Hints come twice: a step that is due twice is sent once.
        self.ready.dedup_by_key(|ready| ready.step);
        for Ready {
            step: index,
            event,
            mut waits,
        } in std::mem::take(&mut self.ready)
        {
            let held = self.steps[&index].held_by;
            let has_input = held.is_some() || event != StepEvent::Enqueue;
            if !has_input {
                match self.resolve(index) {
                    Ok(input) => self.touch(index).input = Some(input),
                    Err(reason) => {
                        let detail = Detail {
                            reason: Some(reason.clone()),
                            error_type: Some("missing_input".into()),
                            ..Detail::default()
                        };
                        self.move_step(index, StepEvent::Fail, StepState::Error, Some(detail));
                        // Nothing was tried, so `on_exhausted` has no say: its dependents are not loaded either.
                        self.step_gave_up(index, "missing_input", &reason, OnExhausted::Fail);
                        continue;
                    }
                }
            }
            // A retry or a lost attempt goes out at once: its place was its own a moment ago.
            let definition = &self.definition.steps[index as usize];
            if event == StepEvent::Enqueue
                && let Err(reason) =
                    self.room
                        .take(&definition.queue, &definition.handler, held.is_some())
            {
                self.hold(index, reason);
                continue;
            }
            if let Some(reason) = held {
                let step = self.touch(index);
                let since = step.ready_at.take().unwrap_or(step.last_at);
                step.held_by = None;
                let ordinal = step.version + 1;
                waits.push(Wait {
                    reason: reason.as_str().into(),
                    since,
                    until: None,
                    ended: None,
                    ordinal,
                });
                self.plan.task.held_steps -= 1;
            }
            self.send(index, event, waits, task_version);
            sent += 1;
        }
        sent
    }

    fn hold(&mut self, index: u32, reason: HeldBy) {
        let now = self.now;
        let step = self.touch(index);
        if step.held_by.is_none() {
            step.ready_at = Some(now);
            self.plan.task.held_steps += 1;
            self.plan.task_changed = true;
        }
        self.touch(index).held_by = Some(reason);
    }

    fn send(&mut self, index: u32, event: StepEvent, waits: Vec<Wait>, task_version: i32) {
        let definition = &self.definition.steps[index as usize];
        if event != StepEvent::LeaseExpired {
            self.touch(index).attempt += 1;
            let detail = (!waits.is_empty()).then(|| Detail {
                waits,
                ..Detail::default()
            });
            self.move_step(index, event, StepState::Enqueued, detail);
        }
        let uuid = self.steps[&index].uuid;
        if let Some(enqueue) = self.plan.moves.iter_mut().rfind(|made| made.entity == uuid) {
            enqueue.task_version = Some(task_version);
        }
        self.opened(index, event, Some(task_version));
        let step = &self.steps[&index];
        let (attempt, generation, priority) = (step.attempt, step.generation, step.priority);
        if let Some(timeout) = definition.queue_timeout {
            self.plan.due.push(Due {
                kind: "queue_timeout",
                at: self.now + timeout,
                step: Some(uuid),
            });
        }
        self.plan.sends.push(Send {
            priority,
            queue: definition.queue.clone(),
            handler: definition.handler.clone(),
            step: uuid,
            generation,
            attempt,
            task_version,
        });
    }

    /// Where the new attempt's Enqueue stands in the log; `task_version` is the task's move that sends it.
    fn opened(&mut self, index: u32, event: StepEvent, task_version: Option<i32>) {
        let step = self.touch(index);
        step.due_at = None;
        step.claim_token = None;
        step.claimed_by = None;
        step.lease_expires_at = None;
        step.enqueued_version = Some(step.version);
        step.enqueued_task_version = task_version;
        step.enqueued_event = Some(event.as_str());
        // The database writes the times of the move itself; `None` asks for it.
        step.enqueued_began_at = None;
        step.enqueued_at = None;
    }

    // The task's own moves, once per settle.

    fn finish(mut self) -> Plan {
        match self.plan.task.state {
            TaskState::Initializing => self.finish_initializing(),
            TaskState::EvaluatingResults => self.finish_evaluating(),
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
            (
                task.open_steps,
                task.in_flight_steps,
                task.retrying_steps,
                task.held_steps,
            ) = (0, 0, 0, 0);
            self.plan.sends.clear();
        }
        self.plan.task_changed |= self.plan.task.version != self.plan.task_version_before;
        self.collect_steps();
        self.plan
    }

    fn begin_evaluating(&mut self) {
        let event = if self.only_lost {
            TaskEvent::AttemptLost
        } else if self.plan.task.open_steps == 0 {
            TaskEvent::AllStepsCompleted
        } else if self.any_failed {
            TaskEvent::StepFailed
        } else {
            TaskEvent::StepCompleted
        };
        self.move_task(event, TaskState::EvaluatingResults, None);
    }

    fn finish_initializing(&mut self) {
        if self.fatal.is_none() && self.definition.steps.is_empty() {
            return self.move_task(TaskEvent::NoStepsFound, TaskState::Complete, None);
        }
        let sent = if self.fatal.is_none() {
            self.send_ready(self.plan.task.version + 2)
        } else {
            0
        };
        if let Some((kind, reason)) = self.fatal.take() {
            return self.fail_task(TaskEvent::InvalidInput, kind, reason);
        }
        if sent > 0 {
            self.move_task(TaskEvent::ReadyStepsFound, TaskState::EnqueuingSteps, None);
            self.move_task(TaskEvent::StepsEnqueued, TaskState::StepsInProcess, None);
        } else {
            self.move_task(
                TaskEvent::NoDependenciesReady,
                TaskState::WaitingForDependencies,
                None,
            );
            if self.any_failed && self.plan.task.held_steps == 0 {
                self.move_task(TaskEvent::StepFailed, TaskState::EvaluatingResults, None);
                self.move_task(
                    TaskEvent::PermanentFailure,
                    TaskState::BlockedByFailures,
                    None,
                );
            }
        }
    }

    fn finish_evaluating(&mut self) {
        let sent = if self.fatal.is_none() {
            self.send_ready(self.plan.task.version + 2)
        } else {
            0
        };
        if let Some((kind, reason)) = self.fatal.take() {
            return self.fail_task(TaskEvent::PermanentFailure, kind, reason);
        }
        let task = &self.plan.task;
        if sent > 0 {
            self.move_task(TaskEvent::ReadyStepsFound, TaskState::EnqueuingSteps, None);
            self.move_task(TaskEvent::StepsEnqueued, TaskState::StepsInProcess, None);
        } else if task.in_flight_steps > 0 {
            self.move_task(
                TaskEvent::StepsStillRunning,
                TaskState::StepsInProcess,
                None,
            );
        } else if task.retrying_steps > 0 {
            self.move_task(TaskEvent::RetryScheduled, TaskState::WaitingForRetry, None);
        } else if task.held_steps > 0 {
            self.move_task(
                TaskEvent::NoDependenciesReady,
                TaskState::WaitingForDependencies,
                None,
            );
        } else if task.failed_steps > 0 {
            let detail = Detail {
                reason: task.reason.clone(),
                error_type: task.error_type.clone(),
                ..Detail::default()
            };
            self.move_task(
                TaskEvent::PermanentFailure,
                TaskState::BlockedByFailures,
                Some(detail),
            );
        } else {
            self.move_task(TaskEvent::AllStepsSuccessful, TaskState::Complete, None);
        }
    }

    /// A retry came due or a held step found room: nothing ended, so nothing is evaluated.
    fn finish_woken(&mut self) {
        let event = self.wake.unwrap_or(TaskEvent::StepsAdmitted);
        if self.send_ready(self.plan.task.version + 2) > 0 {
            self.move_task(event, TaskState::EnqueuingSteps, None);
            self.move_task(TaskEvent::StepsEnqueued, TaskState::StepsInProcess, None);
        }
    }

    fn fail_task(&mut self, event: TaskEvent, kind: String, reason: String) {
        self.plan.task.error_type = Some(kind.clone());
        self.plan.task.reason = Some(reason.clone());
        self.plan.cancel_open_steps = true;
        // What was about to be sent is cancelled instead; the move that would have sent it never was.
        for made in &mut self.plan.moves {
            made.task_version = None;
        }
        for index in &self.touched {
            if let Some(step) = self
                .steps
                .get_mut(index)
                .filter(|step| step.enqueued_at.is_none())
            {
                step.enqueued_task_version = None;
            }
        }
        let detail = Detail {
            reason: Some(reason),
            error_type: Some(kind),
            ..Detail::default()
        };
        self.move_task(event, TaskState::Error, Some(detail));
    }

    // Bookkeeping.

    fn touch(&mut self, index: u32) -> &mut Step {
        self.touched.insert(index);
        self.steps
            .get_mut(&index)
            .expect("events and edges name loaded steps")
    }

    fn close(&mut self, index: u32) {
        let step = &self.steps[&index];
        self.plan.closed.push((step.uuid, step.attempt));
        self.room
            .give_back(&self.definition.steps[index as usize].queue);
    }

    fn move_step(&mut self, index: u32, event: StepEvent, to: StepState, detail: Option<Detail>) {
        self.move_step_by(index, event, to, detail, None);
    }

    fn move_step_by(
        &mut self,
        index: u32,
        event: StepEvent,
        to: StepState,
        detail: Option<Detail>,
        actor: Option<String>,
    ) {
        let step = self.touch(index);
        let from = step.state;
        debug_assert!(step_move_is_legal(from, event, to), "{from} –{event}→ {to}");
        step.version += 1;
        step.state = to;
        let (from_word, event_word, to_word) = step_words(from, event, to);
        let made = Move {
            entity: step.uuid,
            version: step.version,
            task_version: None,
            generation: step.generation,
            attempt: (step.attempt > 0).then_some(step.attempt),
            from: from_word,
            to: to_word,
            event: event_word,
            actor,
            claim_token: step.claim_token,
            detail,
        };
        self.plan.moves.push(made);
        self.count(from, to);
    }

    fn count(&mut self, from: StepState, to: StepState) {
        let task = &mut self.plan.task;
        task.in_flight_steps += i32::from(to.is_in_flight()) - i32::from(from.is_in_flight());
        task.retrying_steps += i32::from(to == StepState::WaitingForRetry)
            - i32::from(from == StepState::WaitingForRetry);
        if to.is_terminal() && !from.is_terminal() {
            task.open_steps -= 1;
        }
        self.plan.task_changed = true;
    }

    fn move_task(&mut self, event: TaskEvent, to: TaskState, detail: Option<Detail>) {
        self.move_task_by(event, to, detail, None);
    }

    fn move_task_by(
        &mut self,
        event: TaskEvent,
        to: TaskState,
        detail: Option<Detail>,
        actor: Option<String>,
    ) {
        let task = &mut self.plan.task;
        debug_assert!(
            task_move_is_legal(task.state, event, to),
            "{} –{event}→ {to}",
            task.state
        );
        let (from, event, to_word) = task_words(task.state, event, to);
        task.version += 1;
        task.state = to;
        self.plan.moves.push(Move {
            entity: task.uuid,
            version: task.version,
            task_version: None,
            generation: task.generation,
            attempt: None,
            from,
            to: to_word,
            event,
            actor,
            claim_token: None,
            detail,
        });
    }

    fn collect_steps(&mut self) {
        if self.creating {
            let mut created: Vec<Step> = self.steps.drain().map(|(_, step)| step).collect();
            created.sort_unstable_by_key(|step| step.index);
            self.plan.new_step_queues = created
                .iter()
                .map(|step| self.definition.steps[step.index as usize].queue.clone())
                .collect();
            self.plan.new_steps = created;
            return;
        }
        for index in std::mem::take(&mut self.touched) {
            if let (Some(step), Some(before)) =
                (self.steps.remove(&index), self.versions_before.get(&index))
            {
                self.plan.steps.push((step, *before));
            }
        }
    }
}

/// Jitter is derived from the attempt, so that deciding stays pure.
fn seed(step: &Step) -> u64 {
    let (high, low) = step.uuid.as_u64_pair();
    high ^ low ^ u64::from(step.attempt.unsigned_abs())
}

#[cfg(test)]
pub(crate) mod properties;
#[cfg(test)]
mod tests;
