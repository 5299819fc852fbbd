//! `(snapshot, events, room, now) -> Plan`: everything that moves a task, decided without I/O.
//!
//! One call is one settle of one task, whatever the number of events: the steps' moves
//! come first, then the task passes at most once through `evaluating_results`. The cost is
//! that of the events and of the steps directly behind them, never of the whole task.
//!
//! `events` says what each event does to its step, `operators` what people do, `sending` how a
//! ready step goes out, `task` what the task itself makes of it all, `skipping` who runs at all,
//! `mapping` what a list becomes.

mod events;
mod mapping;
mod operators;
mod sending;
mod skipping;
mod task;
mod waits;

pub use events::NEVER_PASSED;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::definition::{Definition, StepDefinition};
use super::plan::{Detail, Lacks, Map, Move, Outcome, Plan, Room, Signal, Step, Task, Wait, step_words, task_words};
use super::states::{StepEvent, StepState, TaskEvent, TaskState, step_move_is_legal, task_move_is_legal};

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
    /// Steps by [`Definition::key`]; every one of them if an operator's act is about the whole task.
    pub steps: HashMap<u32, Step>,
    /// Of the whole task: steps in `skipped` or `error` that those behind them may take for done, by key.
    pub passed: HashSet<u32>,
    /// What the workers reported of the steps the events are about, by key.
    pub outcomes: HashMap<u32, Outcome>,
    /// Outputs of finished steps, by index.
    pub outputs: HashMap<u32, Value>,
    /// Steps that were asked for an output and have none, because they were skipped or are still
    /// open: whatever is read of it is null.
    pub absent: HashSet<u32>,
    /// How far maps have come, of those steps that began as one.
    pub maps: HashMap<u32, Map>,
    /// Items of lists: the first one's place, and the values from there on.
    pub windows: HashMap<u32, (u32, Vec<Value>)>,
    /// The outputs of the items of maps that are done, or why they cannot be kept.
    pub collected: HashMap<u32, Result<Value, String>>,
    /// When steps that an event says are late must have ended, by key.
    pub deadlines: HashMap<u32, DateTime<Utc>>,
    /// Signals that were kept, oldest first; of a template that waits for any.
    pub signals: Vec<Signal>,
}

impl<'a> Snapshot<'a> {
    /// Of a task of which nothing but its row was loaded.
    pub fn of_row(task: Task, definition: &'a Definition) -> Self {
        Self {
            task,
            definition,
            steps: HashMap::new(),
            passed: HashSet::new(),
            outcomes: HashMap::new(),
            outputs: HashMap::new(),
            absent: HashSet::new(),
            maps: HashMap::new(),
            windows: HashMap::new(),
            collected: HashMap::new(),
            deadlines: HashMap::new(),
            signals: Vec::new(),
        }
    }
}

/// Something that happened, or is due. Steps are named by their key in the snapshot.
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
        /// Key of the step.
        step: u32,
        /// The attempt reported.
        attempt: i32,
    },
    /// The result's message failed again and again for a reason of its own and was quarantined.
    Quarantined {
        /// Key of the step.
        step: u32,
        /// The attempt reported.
        attempt: i32,
        /// What failed.
        reason: String,
    },
    /// The lease of the step's claim may have expired.
    LeaseDue {
        /// Key of the step.
        step: u32,
    },
    /// The step's retry may be due.
    RetryDue {
        /// Key of the step.
        step: u32,
    },
    /// The step may have lain in its queue for too long.
    QueueDue {
        /// Key of the step.
        step: u32,
        /// The attempt that was enqueued.
        attempt: i32,
    },
    /// The wait of the step may be over.
    TimerDue {
        /// Index of the step.
        step: u32,
    },
    /// The task that an attempt started has ended, was not to be awaited, or could not be started.
    ChildEnded {
        /// Key of the step.
        step: u32,
        /// The attempt that started it.
        attempt: i32,
        /// What that is for the step.
        outcome: Outcome,
        /// The `traceparent` of a task with a trace of its own.
        link: Option<String>,
    },
    /// The step may have taken longer than its template allows.
    StepTotalDue {
        /// Key of the step.
        step: u32,
    },
    /// A signal came, or was kept when a step began to wait for it.
    SignalDue,
    /// The task may have taken longer than its template allows.
    TotalDue,
    /// A held step may find room now.
    Admit {
        /// Key of the step.
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
        /// These only, of a blocked task; all if empty.
        only: Vec<u32>,
        /// One per step of the template, or none if the steps exist.
        step_uuids: Vec<Uuid>,
        /// What is wrong with the input of a task that never had steps.
        invalid: Option<String>,
    },
    /// Run these steps of a finished task again, and all that follow from them.
    Rerun {
        /// Who and why.
        operator: Operator,
        /// Indexes of the steps.
        from: Vec<u32>,
    },
    /// Send nothing until it is resumed.
    Suspend(Operator),
    /// Go on where it was suspended.
    Resume(Operator),
    /// The failures of a blocked task are final.
    GiveUp(Operator),
    /// A blocked task was settled outside.
    ResolveTask(Operator),
    /// Settle a step by hand.
    ByHand {
        /// Who and why.
        operator: Operator,
        /// Index of the step.
        step: u32,
        /// How.
        act: ByHand,
        /// What the steps behind it read as its output.
        output: Option<Value>,
    },
}

/// How an operator settles a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByHand {
    /// It is not needed.
    Skip,
    /// It was done outside.
    Resolve,
    /// It counts as done by its handler.
    Complete,
}

impl Event {
    /// Its place within one settle. What operators do is about the task as it was loaded, so it
    /// stands before anything that may end the task, and in the order in which it came (over one
    /// queue, and the sort is stable); what was reported counts before the end does.
    fn order(&self) -> (u8, u32, i32) {
        match self {
            Self::Start { .. } => (0, 0, 0),
            Self::Retry { .. }
            | Self::Rerun { .. }
            | Self::Suspend(_)
            | Self::Resume(_)
            | Self::GiveUp(_)
            | Self::ResolveTask(_)
            | Self::ByHand { .. } => (1, 0, 0),
            Self::Result { step, attempt } => (2, *step, *attempt),
            Self::Quarantined { step, attempt, .. } => (3, *step, *attempt),
            Self::LeaseDue { step } => (4, *step, 0),
            Self::RetryDue { step } => (5, *step, 0),
            Self::QueueDue { step, attempt } => (6, *step, *attempt),
            Self::Admit { step } => (7, *step, 0),
            // A signal that came before the end of its timeout counts.
            Self::SignalDue => (8, 0, 0),
            Self::ChildEnded { step, attempt, .. } => (8, *step, *attempt),
            Self::TimerDue { step } => (9, *step, 0),
            Self::StepTotalDue { step } => (9, *step, 1),
            Self::TotalDue => (10, 0, 0),
            Self::Cancel(_) | Self::Terminate(_) => (11, 0, 0),
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
pub fn decide(snapshot: Snapshot<'_>, events: Vec<Event>, room: &mut Room, now: DateTime<Utc>) -> Plan {
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

#[expect(clippy::struct_excessive_bools, reason = "each is one fact about the pass")]
struct Pass<'a, 'r> {
    definition: &'a Definition,
    room: &'r mut Room,
    now: DateTime<Utc>,
    steps: HashMap<u32, Step>,
    versions_before: HashMap<u32, i32>,
    touched: BTreeSet<u32>,
    outcomes: HashMap<u32, Outcome>,
    outputs: HashMap<u32, Value>,
    absent: HashSet<u32>,
    passed: HashSet<u32>,
    deadlines: HashMap<u32, DateTime<Utc>>,
    signals: Vec<Signal>,
    ready: Vec<Ready>,
    /// To be skipped, and why.
    skips: Vec<(u32, String)>,
    /// Steps whose count of skipped dependencies changed.
    skip_counted: BTreeSet<u32>,
    maps: HashMap<u32, Map>,
    touched_maps: BTreeSet<u32>,
    windows: HashMap<u32, (u32, Vec<Value>)>,
    collected: HashMap<u32, Result<Value, String>>,
    created_items: BTreeSet<u32>,
    item_values: HashMap<u32, Value>,
    item_failures: HashMap<u32, String>,
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
            passed,
            outcomes,
            mut outputs,
            absent,
            maps,
            windows,
            collected,
            deadlines,
            signals,
        } = snapshot;
        // An event may name a step that is complete already (a hint that came twice, or late):
        // its output is here and nowhere else, and the steps behind it may need it now.
        for (index, outcome) in &outcomes {
            if let Outcome::Success(output) = outcome
                && steps
                    .get(index)
                    .is_some_and(|step| matches!(step.state, StepState::Complete | StepState::ResolvedManually))
            {
                outputs.insert(*index, output.clone());
            }
        }
        Self {
            definition,
            room,
            now,
            versions_before: steps.iter().map(|(index, step)| (*index, step.version)).collect(),
            steps,
            touched: BTreeSet::new(),
            outcomes,
            outputs,
            absent,
            passed,
            deadlines,
            signals,
            ready: Vec::new(),
            skips: Vec::new(),
            skip_counted: BTreeSet::new(),
            maps,
            touched_maps: BTreeSet::new(),
            windows,
            collected,
            created_items: BTreeSet::new(),
            item_values: HashMap::new(),
            item_failures: HashMap::new(),
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
                lanes: Vec::new(),
                held_handlers: BTreeMap::new(),
                cancel_open_steps: false,
                closed: Vec::new(),
                answers: Vec::new(),
                deadlines: Vec::new(),
                children: Vec::new(),
                left_children: Vec::new(),
                used_signals: Vec::new(),
                audit: Vec::new(),
                outputs: Vec::new(),
                tell: Vec::new(),
                ignored: 0,
                skip_counts: Vec::new(),
                lists: Vec::new(),
                forgotten_maps: Vec::new(),
                maps: Vec::new(),
                map_outputs: Vec::new(),
                lacks: Lacks::default(),
            },
        }
    }

    fn apply(&mut self, event: Event) {
        let changed = match event {
            Event::Start { step_uuids, invalid } => self.start(step_uuids, invalid),
            Event::Retry { operator, only, step_uuids, invalid } => self.retry(&operator, &only, step_uuids, invalid),
            Event::Rerun { operator, from } => self.rerun(&operator, &from),
            Event::Suspend(operator) => self.suspend(operator),
            Event::Resume(operator) => self.resume(operator),
            Event::GiveUp(operator) => self.give_up(operator),
            Event::ResolveTask(operator) => self.resolve_task(operator),
            Event::ByHand { operator, step, act, output } => self.by_hand(operator, step, act, output),
            Event::Cancel(operator) => self.end(TaskEvent::Cancel, operator),
            Event::Terminate(operator) => self.end(TaskEvent::Terminate, operator),
            Event::TotalDue => self.total_timeout(),
            _ if self.plan.task.state.is_terminal() => false,
            Event::Result { step, attempt } => self.result(step, attempt),
            Event::Quarantined { step, attempt, reason } => self.quarantined(step, attempt, &reason),
            Event::LeaseDue { step } => self.lease_due(step),
            Event::RetryDue { step } => self.retry_due(step),
            Event::QueueDue { step, attempt } => self.queue_due(step, attempt),
            Event::Admit { step } => self.admit(step),
            Event::TimerDue { step } => self.timer_due(step),
            Event::StepTotalDue { step } => self.step_total_due(step),
            Event::SignalDue => self.signal_due(),
            Event::ChildEnded { step, attempt, outcome, link } => self.child_ended(step, attempt, outcome, link),
        };
        if !changed {
            self.plan.ignored += 1;
        }
    }

    // Bookkeeping.

    /// The definition of a loaded step. Its key is not its index: an item of a map has a key of
    /// its own and shares its definition with the others.
    fn defined(&self, key: u32) -> &'a StepDefinition {
        &self.definition.steps[self.steps[&key].index as usize]
    }

    /// Who stands directly behind it: nobody behind an item of a map.
    fn children(&self, key: u32) -> &'a [u32] {
        if self.steps[&key].item.is_some() { &[] } else { self.definition.graph.children(key) }
    }

    fn touch(&mut self, index: u32) -> &mut Step {
        self.touched.insert(index);
        self.steps.get_mut(&index).expect("events and edges name loaded steps")
    }

    fn close(&mut self, index: u32) {
        let step = &self.steps[&index];
        self.plan.closed.push((step.uuid, step.attempt));
        self.room.give_back(&self.defined(index).queue);
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
        if from == StepState::Waiting && self.waits_for_child(index) {
            self.left_child(index, event);
        }
        self.count(from, to);
    }

    fn count(&mut self, from: StepState, to: StepState) {
        let task = &mut self.plan.task;
        task.in_flight_steps += i32::from(to.is_in_flight()) - i32::from(from.is_in_flight());
        task.retrying_steps +=
            i32::from(to == StepState::WaitingForRetry) - i32::from(from == StepState::WaitingForRetry);
        task.held_steps += i32::from(to == StepState::Waiting) - i32::from(from == StepState::Waiting);
        if to.is_terminal() && !from.is_terminal() {
            task.open_steps -= 1;
        }
        self.plan.task_changed = true;
    }

    fn move_task(&mut self, event: TaskEvent, to: TaskState, detail: Option<Detail>) {
        self.move_task_by(event, to, detail, None);
    }

    fn move_task_by(&mut self, event: TaskEvent, to: TaskState, detail: Option<Detail>, actor: Option<String>) {
        let task = &mut self.plan.task;
        debug_assert!(task_move_is_legal(task.state, event, to), "{} –{event}→ {to}", task.state);
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
        let counted = self.skip_counted.iter().map(|key| &self.steps[key]);
        self.plan.skip_counts = counted.map(|step| (step.uuid, step.skipped_dependencies)).collect();
        self.plan.maps = self.touched_maps.iter().map(|key| (self.steps[key].uuid, self.maps[key])).collect();
        if self.creating || !self.created_items.is_empty() {
            let mut created: Vec<Step> = if self.creating {
                self.steps.drain().map(|(_, step)| step).collect()
            } else {
                self.created_items.iter().filter_map(|key| self.steps.remove(key)).collect()
            };
            created.sort_unstable_by_key(|step| (step.index, step.item));
            self.plan.new_step_queues =
                created.iter().map(|step| self.definition.steps[step.index as usize].queue.clone()).collect();
            self.plan.new_steps = created;
        }
        for index in std::mem::take(&mut self.touched) {
            if let (Some(step), Some(before)) = (self.steps.remove(&index), self.versions_before.get(&index)) {
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
