//! What `decide` reads and what it answers: plain data, no behaviour but bookkeeping.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::flow::{self, LimitSlots};
pub use super::states::HeldBy;
use super::states::{Change, StepEvent, StepState, TaskState};
use super::wait::ChildTask;

/// A task's row, as far as decisions depend on it.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "columns of tasker.tasks, explained there")]
pub struct Task {
    pub uuid: Uuid,
    pub state: TaskState,
    pub version: i32,
    pub generation: i32,
    pub priority: i32,
    pub input: Value,
    pub open_steps: i32,
    pub in_flight_steps: i32,
    pub retrying_steps: i32,
    pub held_steps: i32,
    pub failed_steps: i32,
    pub error_type: Option<String>,
    pub reason: Option<String>,
    pub ended_by: Option<&'static str>,
    pub suspended_from: Option<TaskState>,
    pub run_at: Option<DateTime<Utc>>,
    pub generation_began_at: DateTime<Utc>,
    pub last_at: DateTime<Utc>,
}

/// A step's row, as far as decisions depend on it.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "columns of tasker.steps, explained there")]
pub struct Step {
    pub uuid: Uuid,
    /// Its position in the template; all items of a map share it.
    pub index: u32,
    /// Its index in the list that a map runs over; `None` of every other step.
    pub item: Option<u32>,
    pub state: StepState,
    pub version: i32,
    pub generation: i32,
    pub attempt: i32,
    pub failures: i32,
    pub losses: i32,
    /// Dependencies that are neither done nor skipped.
    pub remaining_dependencies: i32,
    pub skipped_dependencies: i32,
    pub priority: i32,
    pub claim_token: Option<Uuid>,
    pub claimed_by: Option<String>,
    pub lease_expires_at: Option<DateTime<Utc>>,
    pub last_heartbeat_at: Option<DateTime<Utc>>,
    pub enqueued_version: Option<i32>,
    pub enqueued_task_version: Option<i32>,
    pub enqueued_event: Option<StepEvent>,
    pub enqueued_began_at: Option<DateTime<Utc>>,
    pub enqueued_at: Option<DateTime<Utc>>,
    pub due_at: Option<DateTime<Utc>>,
    pub ready_at: Option<DateTime<Utc>>,
    pub held_by: Option<HeldBy>,
    pub last_at: DateTime<Utc>,
    /// The step's input, when this plan resolved it; `None` keeps what the row has.
    pub input: Option<Value>,
}

impl Step {
    /// A step as it is created: nothing has happened to it yet.
    pub fn new(uuid: Uuid, index: u32, generation: i32, dependencies: i32, priority: i32, at: DateTime<Utc>) -> Self {
        Self {
            uuid,
            index,
            item: None,
            state: StepState::Pending,
            version: 0,
            generation,
            attempt: 0,
            failures: 0,
            losses: 0,
            remaining_dependencies: dependencies,
            skipped_dependencies: 0,
            priority,
            claim_token: None,
            claimed_by: None,
            lease_expires_at: None,
            last_heartbeat_at: None,
            enqueued_version: None,
            enqueued_task_version: None,
            enqueued_event: None,
            enqueued_began_at: None,
            enqueued_at: None,
            due_at: None,
            ready_at: None,
            held_by: None,
            last_at: at,
            input: None,
        }
    }
}

/// What the worker said of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Its output.
    Success(Value),
    /// Its error.
    Failure(Failure),
}

/// An attempt's error as the log keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// A short class such as `CardDeclined`; retry policies and searches name it.
    #[serde(rename = "type")]
    pub kind: String,
    /// For a person; at most 1 KiB.
    pub message: String,
    /// False when the handler knows that trying again is useless.
    #[serde(default = "yes")]
    pub retryable: bool,
    /// When the handler knows better than the policy.
    #[serde(default)]
    pub retry_after_ms: Option<f64>,
}

fn yes() -> bool {
    true
}

impl HeldBy {
    /// For a person.
    pub const fn in_words(self) -> &'static str {
        match self {
            Self::Room => "its queue had no room",
            Self::Worker => "no worker offers its handler",
            Self::Limit => "a limit held it back",
            Self::Paused => "its queue is paused",
        }
    }
}

/// How much may still be sent to each queue: an estimate, read without a lock.
#[derive(Debug, Clone, Default)]
pub struct Room {
    queues: HashMap<Arc<str>, QueueRoom>,
    /// Queues that an operator has paused, known to have room or not.
    paused: HashSet<String>,
    /// Limits of namespaces and handlers, by name; those of templates are in the templates.
    limits: HashSet<String>,
    /// What limits have left, while held steps are admitted.
    slots: LimitSlots,
    unlimited: bool,
}

/// The room of one queue.
#[derive(Debug, Clone, Default)]
pub struct QueueRoom {
    /// Steps that may still be sent.
    pub left: i64,
    /// Steps that may be sent to an empty queue.
    pub capacity: i64,
    /// Handlers that a live worker of this queue offers.
    pub handlers: HashSet<String>,
    /// Others already wait their turn: new ready steps queue behind them.
    pub holding: bool,
}

impl QueueRoom {
    /// Worth a fresh look: half of it is taken, or others wait.
    pub fn is_low(&self) -> bool {
        self.holding || self.left * 2 < self.capacity
    }
}

impl Room {
    /// Everything may be sent.
    pub fn unlimited() -> Self {
        Self { unlimited: true, ..Self::default() }
    }

    /// Sets which queues are paused, all others are not.
    pub fn set_paused(&mut self, queues: HashSet<String>) {
        self.paused = queues;
    }

    /// Sets the limits of namespaces and handlers, by name.
    pub fn set_limits(&mut self, names: HashSet<String>) {
        self.limits = names;
    }

    /// The limits that apply to a step beside those of its template, by name.
    pub fn limits_of(&self, namespace: &str, handler: &str) -> Vec<String> {
        if self.limits.is_empty() && self.slots.is_empty() {
            return Vec::new();
        }
        let mut names = vec![flow::namespace_limit(namespace), flow::handler_limit(namespace, handler)];
        // One that was set a moment ago may be known to those who admit, and to nobody else yet.
        names.retain(|name| self.limits.contains(name) || self.slots.knows(name));
        names
    }

    /// Sets what limits have left, and takes what was there before.
    pub fn set_limit_slots(&mut self, slots: LimitSlots) -> LimitSlots {
        std::mem::replace(&mut self.slots, slots)
    }

    /// Takes a slot under each of these limits, or none at all.
    pub fn take_limit_slots(&mut self, step: Uuid, names: &[String]) -> bool {
        self.unlimited || self.slots.take(step, names)
    }

    /// Whether everything may be sent.
    pub fn is_unlimited(&self) -> bool {
        self.unlimited
    }

    /// Whether any namespace or handler is limited.
    pub fn has_limits(&self) -> bool {
        !self.limits.is_empty()
    }

    /// Whether an operator has paused the queue.
    pub fn is_paused(&self, queue: &str) -> bool {
        self.paused.contains(queue)
    }

    /// Sets what is known of one queue.
    pub fn set(&mut self, queue: Arc<str>, room: QueueRoom) {
        self.queues.insert(queue, room);
    }

    /// What is known of one queue.
    pub fn queue(&self, queue: &str) -> Option<&QueueRoom> {
        self.queues.get(queue)
    }

    /// Every queue that is known.
    pub fn queues(&self) -> impl Iterator<Item = (&Arc<str>, &QueueRoom)> {
        self.queues.iter()
    }

    /// Takes room for one, or says why there is none. `admitting` lets a step that already waited pass those that wait.
    pub fn take(&mut self, queue: &str, handler: &str, admitting: bool) -> Result<(), HeldBy> {
        if self.is_paused(queue) {
            return Err(HeldBy::Paused);
        }
        if self.unlimited {
            return Ok(());
        }
        let Some(room) = self.queues.get_mut(queue) else {
            return Err(HeldBy::Worker);
        };
        if !room.handlers.contains(handler) {
            return Err(HeldBy::Worker);
        }
        if room.left <= 0 || (room.holding && !admitting) {
            room.holding = true;
            return Err(HeldBy::Room);
        }
        room.left -= 1;
        Ok(())
    }

    /// Says whether new ready steps queue behind held ones.
    pub fn set_holding(&mut self, queue: &str, holding: bool) {
        if let Some(room) = self.queues.get_mut(queue) {
            room.holding = holding;
        }
    }

    /// An attempt ended: its worker has a free slot again.
    pub fn give_back(&mut self, queue: &str) {
        if let Some(room) = self.queues.get_mut(queue) {
            room.left = (room.left + 1).min(room.capacity);
        }
    }
}

/// One row of the log, but for its times, which the database gives.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "columns of tasker.transitions, explained there")]
pub struct Move {
    pub entity: Uuid,
    pub version: i32,
    pub task_version: Option<i32>,
    pub generation: i32,
    pub attempt: Option<i32>,
    pub change: Change,
    pub actor: Option<String>,
    pub claim_token: Option<Uuid>,
    pub detail: Option<Detail>,
}

/// What a log row says beyond its move; stored as JSON, empty fields left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Detail {
    /// Waits that this move ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits: Vec<Wait>,
    /// Why: of a failure, a cancellation, an operator's move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The class of a failure that no attempt carries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_type: Option<String>,
    /// When the wait that this move began is due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<DateTime<Utc>>,
    /// Why the wait that this move began is waited: timer, signal, child or items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
    /// Of a lost attempt: the last sign of life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_heartbeat_at: Option<DateTime<Utc>>,
}

/// A wait that ended: `step.wait` is derived from it alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Wait {
    /// retry, room, worker …
    pub reason: String,
    /// When it began.
    pub since: DateTime<Utc>,
    /// When it was to end, where that was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<DateTime<Utc>>,
    /// When it ended, where that is not the move's own beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<DateTime<Utc>>,
    /// The version of the row that began it.
    pub ordinal: i32,
    /// Who ended it, where somebody did: the sender of a signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    /// The `traceparent` of whoever ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
}

impl Wait {
    /// A wait for this reason, of the step whose row has this version.
    pub fn new(reason: &str, since: DateTime<Utc>, until: Option<DateTime<Utc>>, ordinal: i32) -> Self {
        Self { reason: reason.to_owned(), since, until, ended: None, ordinal, actor: None, link: None }
    }
}

/// A signal that was sent and not used yet.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "columns of tasker.signals, explained there")]
pub struct Signal {
    pub id: i64,
    pub name: String,
    pub payload: Value,
    pub actor: String,
    pub traceparent: Option<String>,
}

/// What a step without a handler came to: kept on the row of its attempt, as a handler's result is.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The step.
    pub step: Uuid,
    /// Its attempt.
    pub attempt: i32,
    /// The generation of both.
    pub generation: i32,
    /// When it began.
    pub since: DateTime<Utc>,
    /// Its output or its error.
    pub outcome: Outcome,
}

/// What became of a task for the attempt that started it.
#[derive(Debug, Clone, PartialEq)]
pub struct ChildEnd {
    /// The step's output, or why the attempt failed.
    pub outcome: Outcome,
    /// The `traceparent` of a task with a trace of its own.
    pub link: Option<String>,
}

/// A task to start, for the attempt of a step that waits for it from now on.
#[derive(Debug, Clone, PartialEq)]
pub struct StartChild {
    /// The step; its input is the task's.
    pub step: Uuid,
    /// Its attempt.
    pub attempt: i32,
    /// What to start.
    pub task: ChildTask,
    /// The step's own, which is the task's from now on.
    pub priority: i32,
}

/// A step message to send.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the fields of the message, see docs/reference/messages.md")]
pub struct Send {
    pub priority: i32,
    pub queue: Arc<str>,
    pub handler: Arc<str>,
    pub step: Uuid,
    pub generation: i32,
    pub attempt: i32,
    /// The ordinal of the task's move that sends it: it names the step.enqueuing span. `None`
    /// if no move did: the attempt took over from a lost one while its task was suspended.
    pub task_version: Option<i32>,
}

/// "Look at it then."
#[derive(Debug, Clone, PartialEq)]
pub struct Due {
    /// retry, lease, timer, signal, `queue_timeout`, `step_timeout`, `total_timeout`.
    pub kind: &'static str,
    /// When.
    pub at: DateTime<Utc>,
    /// `None`: the task itself.
    pub step: Option<Uuid>,
}

/// What an operator did, as `tasker.audit` keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct Audit {
    /// cancel, retry, suspend …
    pub action: &'static str,
    /// A person or a service.
    pub actor: String,
    /// In their words.
    pub reason: Option<String>,
    /// What the act was about beyond the task itself, such as `{"steps": [...]}`.
    pub details: Option<Value>,
}

/// An output that an operator gave to a step; it is kept with the step's latest attempt.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "columns of tasker.attempts, explained there")]
pub struct ManualOutput {
    pub step: Uuid,
    pub attempt: i32,
    pub generation: i32,
    pub actor: String,
    pub output: Value,
}

/// What one settle does to one task.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The task's row afterwards.
    pub task: Task,
    /// Its version before, for compare-and-set.
    pub task_version_before: i32,
    /// Whether any column of the task changed.
    pub task_changed: bool,
    /// Log rows, the task's and the steps', in order.
    pub moves: Vec<Move>,
    /// Step rows to update: the row afterwards, and the version before.
    pub steps: Vec<(Step, i32)>,
    /// Step rows to insert.
    pub new_steps: Vec<Step>,
    /// The queue of each of them.
    pub new_step_queues: Vec<Arc<str>>,
    /// Messages.
    pub sends: Vec<Send>,
    /// Hints to look later.
    pub due: Vec<Due>,
    /// The hold groups in which held steps wait: see [`super::definition::Definition::hold_group`].
    pub hold_groups: Vec<(Uuid, String)>,
    /// The handlers of the steps that it begins to hold: admission finds them by it.
    pub held_handlers: BTreeMap<Uuid, Arc<str>>,
    /// Move every other open step to cancelled.
    pub cancel_open_steps: bool,
    /// Attempts that this plan closes: `(step, attempt)`.
    pub closed: Vec<(Uuid, i32)>,
    /// What steps without a handler came to.
    pub answers: Vec<Answer>,
    /// When steps must have ended: `(step, when)`.
    pub deadlines: Vec<(Uuid, DateTime<Utc>)>,
    /// Tasks to start.
    pub children: Vec<StartChild>,
    /// Steps that wait no more for a task that they started and that may not have ended.
    pub left_children: Vec<Uuid>,
    /// Kept signals that a step used, by id.
    pub used_signals: Vec<i64>,
    /// What operators did, one each.
    pub audit: Vec<Audit>,
    /// Outputs that operators gave to steps.
    pub outputs: Vec<ManualOutput>,
    /// Workers whose claims were taken from them: they look at once what is still theirs.
    pub tell: Vec<String>,
    /// Events that changed nothing: duplicates, late or stale ones.
    pub ignored: u32,
    /// Steps of which a dependency was skipped, and how many are now.
    pub skip_counts: Vec<(Uuid, i32)>,
    /// The items of maps that began: the map's step and its list.
    pub lists: Vec<(Uuid, Vec<Value>)>,
    /// Maps that begin anew: their lists are read again, and what they had come to is no more.
    pub forgotten_maps: Vec<Uuid>,
    /// How far maps have come.
    pub maps: Vec<(Uuid, Map)>,
    /// What maps came to.
    pub map_outputs: Vec<MapOutput>,
    /// What the snapshot did not hold. Load it and decide again; what was asked for before and is
    /// still lacking does not exist.
    pub lacks: Lacks,
}

/// What decisions lacked, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lacks {
    /// Steps that a skipped one is followed by, and items that a map had before it began anew.
    pub steps: BTreeSet<u32>,
    /// Outputs that a step which became ready reads.
    pub outputs: BTreeSet<u32>,
    /// Maps whose items are all done: the list of their outputs.
    pub collected: BTreeSet<u32>,
    /// Items to create: the index of the first one in the list, and how many.
    pub items: BTreeMap<u32, (u32, u32)>,
}

/// How far a map has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Map {
    /// How many items its list has.
    pub items: u32,
    /// The first that was not created yet.
    pub next_item: u32,
    /// Those that have not ended.
    pub remaining_items: u32,
    /// Those that failed for good.
    pub failed_items: u32,
}

impl Map {
    /// As it begins.
    pub fn new(items: u32) -> Self {
        Self { items, next_item: 0, remaining_items: items, failed_items: 0 }
    }

    /// Items that were created and have not ended.
    pub fn open_items(&self) -> u32 {
        self.next_item - (self.items - self.remaining_items)
    }
}

/// What a map came to; kept where a handler's result would stand.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "columns of tasker.attempts, explained there")]
pub struct MapOutput {
    pub step: Uuid,
    pub generation: i32,
    pub output: Value,
}

impl Plan {
    /// Whether it changes nothing at all.
    pub fn is_empty(&self) -> bool {
        !self.task_changed
            && self.moves.is_empty()
            && self.steps.is_empty()
            && self.new_steps.is_empty()
            && self.due.is_empty()
    }
}
