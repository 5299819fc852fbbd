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
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::definition::{Definition, StepDefinition};
use super::plan::{ChildEnd, Detail, Lacks, Map, Move, Outcome, Plan, Room, Signal, Step, Task, Wait};
use super::states::{Change, StepEvent, StepState, TaskEvent, TaskState, step_move_is_legal, task_move_is_legal};

/// How often an attempt may be lost before the step fails; a loss spends no retry.
pub const MAX_LOST: i32 = 10;

/// What is known of a task when it is settled: its row, the steps the events are about,
/// their direct dependents, and the outputs that newly ready steps need.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The task's row.
    pub task: Task,
    /// Its template.
    pub definition: Arc<Definition>,
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
    /// Items of lists: the index of the first one, and the values from there on.
    pub windows: HashMap<u32, (u32, Vec<Value>)>,
    /// The outputs of the items of maps that are done, or why they cannot be kept.
    pub collected: HashMap<u32, Result<Value, String>>,
    /// When steps that an event says are late must have ended, by key.
    pub deadlines: HashMap<u32, DateTime<Utc>>,
    /// Signals that were kept, oldest first; of a template that waits for any.
    pub signals: Vec<Signal>,
    /// What became of the tasks that attempts started, by step and attempt, where an event asks.
    pub child_ends: HashMap<(Uuid, i32), ChildEnd>,
    /// For a task that has no steps yet and begins: one uuid per step of the template.
    pub new_step_uuids: Vec<Uuid>,
    /// Of such a task: what is wrong with its input, by the template's schema.
    pub invalid_input: Option<String>,
}

impl Snapshot {
    /// Of a task of which nothing but its row was loaded.
    pub fn of_row(task: Task, definition: Arc<Definition>) -> Self {
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
            child_ends: HashMap::new(),
            new_step_uuids: Vec::new(),
            invalid_input: None,
        }
    }
}

/// Something that happened, is due, or is asked for: what messages, timers and operators say. Workers and
/// timers name a step by its uuid, operators by its name in the template.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The task is to begin.
    Start,
    /// A result of this attempt was reported.
    Result {
        /// The step.
        step: Uuid,
        /// The attempt reported.
        attempt: i32,
    },
    /// The result's message failed again and again for a reason of its own and was quarantined.
    Quarantined {
        /// The step.
        step: Uuid,
        /// The attempt reported.
        attempt: i32,
        /// What failed.
        reason: String,
    },
    /// The lease of the step's claim may have expired.
    LeaseDue {
        /// The step.
        step: Uuid,
    },
    /// The step's retry may be due.
    RetryDue {
        /// The step.
        step: Uuid,
    },
    /// The step may have been in its queue for too long.
    QueueDue {
        /// The step.
        step: Uuid,
    },
    /// The wait of the step may be over.
    TimerDue {
        /// The step.
        step: Uuid,
    },
    /// The task that an attempt started has ended, was not to be awaited, or could not be started.
    ChildEnded {
        /// The step.
        step: Uuid,
        /// The attempt that started it.
        attempt: i32,
    },
    /// The step may have taken longer than its template allows.
    StepTotalDue {
        /// The step.
        step: Uuid,
    },
    /// A signal came, or was kept when a step began to wait for it.
    SignalDue,
    /// The task may have taken longer than its template allows.
    TotalDue,
    /// A held step may find room now.
    Admit {
        /// The step.
        step: Uuid,
    },
    /// End it; running handlers are asked to stop.
    Cancel(Operator),
    /// End it; running handlers are dropped.
    Terminate(Operator),
    /// Try again what failed.
    Retry {
        /// Who and why.
        operator: Operator,
        /// These steps only, of a blocked task; all if empty.
        only: Vec<String>,
    },
    /// Run these steps of a finished task again, and all that follow from them.
    Rerun {
        /// Who and why.
        operator: Operator,
        /// Names of the steps.
        from: Vec<String>,
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
        /// Name of the step.
        step: String,
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
    /// The step that it names by uuid: its row must be loaded.
    pub fn step(&self) -> Option<Uuid> {
        match self {
            Self::Result { step, .. }
            | Self::Quarantined { step, .. }
            | Self::LeaseDue { step }
            | Self::RetryDue { step }
            | Self::QueueDue { step }
            | Self::TimerDue { step }
            | Self::ChildEnded { step, .. }
            | Self::StepTotalDue { step }
            | Self::Admit { step } => Some(*step),
            _ => None,
        }
    }

    /// The steps that it names by their names in the template.
    pub fn names(&self) -> &[String] {
        match self {
            Self::Retry { only: names, .. } | Self::Rerun { from: names, .. } => names,
            Self::ByHand { step, .. } => std::slice::from_ref(step),
            _ => &[],
        }
    }

    /// Whether it is about the whole task, so that every step must be loaded.
    pub fn is_about_all(&self) -> bool {
        matches!(self, Self::Resume(_) | Self::Retry { .. } | Self::Rerun { .. } | Self::ByHand { .. })
    }

    /// Whether an operator asks for it: what was asked for once must not be done twice.
    pub fn is_request(&self) -> bool {
        matches!(self, Self::Cancel(_) | Self::Terminate(_) | Self::Suspend(_) | Self::GiveUp(_) | Self::ResolveTask(_))
            || self.is_about_all()
    }

    /// Its rank within one settle. What operators do is about the task as it was loaded, so it
    /// stands before anything that may end the task, and in the order in which it came (over one
    /// queue, and the sort is stable); what was reported counts before the end does. Events of one
    /// rank stand in the order of their steps.
    fn rank(&self) -> (u8, i32) {
        match self {
            Self::Start => (0, 0),
            Self::Retry { .. }
            | Self::Rerun { .. }
            | Self::Suspend(_)
            | Self::Resume(_)
            | Self::GiveUp(_)
            | Self::ResolveTask(_)
            | Self::ByHand { .. } => (1, 0),
            Self::Result { attempt, .. } => (2, *attempt),
            Self::Quarantined { attempt, .. } => (3, *attempt),
            Self::LeaseDue { .. } => (4, 0),
            Self::RetryDue { .. } => (5, 0),
            Self::QueueDue { .. } => (6, 0),
            Self::Admit { .. } => (7, 0),
            // A signal that came before the end of its timeout counts.
            Self::SignalDue => (8, 0),
            Self::ChildEnded { attempt, .. } => (8, *attempt),
            Self::TimerDue { .. } => (9, 0),
            Self::StepTotalDue { .. } => (9, 1),
            Self::TotalDue => (10, 0),
            Self::Cancel(_) | Self::Terminate(_) => (11, 0),
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

/// Decides. `now` is the database's time after the locks were taken. An event about a step that was
/// not loaded has nothing to say.
pub fn decide(snapshot: &Snapshot, events: &[&Event], room: &mut Room, now: DateTime<Utc>) -> Plan {
    let keys: HashMap<Uuid, u32> = snapshot.steps.iter().map(|(key, step)| (step.uuid, *key)).collect();
    let known = |event: &&'_ Event| match event.step() {
        Some(step) => keys.get(&step).copied(),
        None => Some(0),
    };
    let mut events: Vec<(u32, &Event)> = events.iter().filter_map(|event| Some((known(event)?, *event))).collect();
    // They came over several queues in no order; now their order cannot matter.
    events.sort_by_key(|(key, event)| {
        let (rank, within) = event.rank();
        (rank, *key, within)
    });
    let mut pass = Pass::new(snapshot, room, now);
    for (key, event) in events {
        pass.apply(key, event);
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
    snapshot: &'a Snapshot,
    definition: &'a Definition,
    room: &'r mut Room,
    now: DateTime<Utc>,
    steps: HashMap<u32, Step>,
    touched: BTreeSet<u32>,
    outputs: HashMap<u32, Value>,
    signals: Vec<Signal>,
    ready: Vec<Ready>,
    /// To be skipped, and why.
    skips: Vec<(u32, String)>,
    /// Steps whose count of skipped dependencies changed.
    skip_counted: BTreeSet<u32>,
    maps: HashMap<u32, Map>,
    touched_maps: BTreeSet<u32>,
    windows: HashMap<u32, (u32, Vec<Value>)>,
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
    fn new(snapshot: &'a Snapshot, room: &'r mut Room, now: DateTime<Utc>) -> Self {
        let Snapshot { task, steps, outcomes, .. } = snapshot;
        let mut outputs = snapshot.outputs.clone();
        // An event may name a step that is complete already (a hint that came twice, or late):
        // its output is here and nowhere else, and the steps behind it may need it now.
        for (index, outcome) in outcomes {
            if let Outcome::Success(output) = outcome
                && steps
                    .get(index)
                    .is_some_and(|step| matches!(step.state, StepState::Complete | StepState::ResolvedManually))
            {
                outputs.insert(*index, output.clone());
            }
        }
        Self {
            snapshot,
            definition: &snapshot.definition,
            room,
            now,
            steps: steps.clone(),
            touched: BTreeSet::new(),
            outputs,
            signals: snapshot.signals.clone(),
            ready: Vec::new(),
            skips: Vec::new(),
            skip_counted: BTreeSet::new(),
            maps: snapshot.maps.clone(),
            touched_maps: BTreeSet::new(),
            windows: snapshot.windows.clone(),
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
                task: task.clone(),
                task_changed: false,
                moves: Vec::new(),
                steps: Vec::new(),
                new_steps: Vec::new(),
                new_step_queues: Vec::new(),
                sends: Vec::new(),
                due: Vec::new(),
                hold_groups: Vec::new(),
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

    /// `key` is that of the step that the event names, if it names one by uuid.
    fn apply(&mut self, key: u32, event: &Event) {
        let changed = match event {
            Event::Start => self.start(),
            Event::Retry { operator, only } => self.retry(operator, only),
            Event::Rerun { operator, from } => self.rerun(operator, from),
            Event::Suspend(operator) => self.suspend(operator.clone()),
            Event::Resume(operator) => self.resume(operator.clone()),
            Event::GiveUp(operator) => self.give_up(operator.clone()),
            Event::ResolveTask(operator) => self.resolve_task(operator.clone()),
            Event::ByHand { operator, step, act, output } => self.by_hand(operator.clone(), step, *act, output.clone()),
            Event::Cancel(operator) => self.end(TaskEvent::Cancel, operator.clone()),
            Event::Terminate(operator) => self.end(TaskEvent::Terminate, operator.clone()),
            Event::TotalDue => self.total_timeout(),
            _ if self.plan.task.state.is_terminal() => false,
            Event::Result { attempt, .. } => self.result(key, *attempt),
            Event::Quarantined { attempt, reason, .. } => self.quarantined(key, *attempt, reason),
            Event::LeaseDue { .. } => self.lease_due(key),
            Event::RetryDue { .. } => self.retry_due(key),
            Event::QueueDue { .. } => self.queue_due(key),
            Event::Admit { .. } => self.admit(key),
            Event::TimerDue { .. } => self.timer_due(key),
            Event::StepTotalDue { .. } => self.step_total_due(key),
            Event::SignalDue => self.signal_due(),
            Event::ChildEnded { attempt, .. } => self.child_ended(key, *attempt),
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
        let made = Move {
            entity: step.uuid,
            version: step.version,
            task_version: None,
            generation: step.generation,
            attempt: (step.attempt > 0).then_some(step.attempt),
            change: Change::Step((from, event, to)),
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
        let change = Change::Task((task.state, event, to));
        task.version += 1;
        task.state = to;
        self.plan.moves.push(Move {
            entity: task.uuid,
            version: task.version,
            task_version: None,
            generation: task.generation,
            attempt: None,
            change,
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
            if let (Some(step), Some(before)) = (self.steps.remove(&index), self.snapshot.steps.get(&index)) {
                self.plan.steps.push((step, before.version));
            }
        }
    }
}

/// Jitter is derived from the attempt, so that deciding stays pure.
fn seed(step: &Step) -> u64 {
    let (high, low) = step.uuid.as_u64_pair();
    high ^ low ^ u64::from(step.attempt.unsigned_abs())
}
