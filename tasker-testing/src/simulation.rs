//! A task in memory, for tests: the rows, the queues and the clock that `decide` is proved on.
//!
//! It applies a plan as `store/apply.sql` and `cancel_open_steps.sql` do, moves steps as the
//! worker protocol does, and after every settle recounts what the rows claim. It decides
//! nothing itself, and a rule that it checks is written here a second time on purpose.

mod apply;
mod checks;
mod snapshot;
#[cfg(test)]
mod templates;

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

#[cfg(test)]
pub(crate) use self::templates::{
    signal_wait, template, with, with_branches, with_input, with_join, with_map, with_task, with_wait, with_when,
};
use tasker_shared::state_machine::decide::{Event, Operator, decide};
use tasker_shared::state_machine::definition::Definition;
use tasker_shared::state_machine::plan::{
    ChildEnd, Failure, HeldBy, Map, Move, Outcome, Plan, QueueRoom, Room, Signal, Step, Task,
};
use tasker_shared::state_machine::states::{Change, StepEvent, StepState, TaskState, step_move_is_legal};
use tasker_shared::state_machine::wait::ChildTask;

pub(crate) const QUEUE: &str = "worker_shop";
pub(crate) const LEASE: Duration = Duration::from_secs(10);

/// One row of `tasker.transitions`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub made: Move,
    pub began_at: DateTime<Utc>,
    pub at: DateTime<Utc>,
}

/// One row of `tasker.attempts`.
#[derive(Debug, Clone)]
pub(crate) struct AttemptRow {
    pub step: Uuid,
    pub attempt: i32,
    pub token: Uuid,
    pub worker: String,
    pub message_id: i64,
    pub claim_began_at: DateTime<Utc>,
    pub claimed_at: DateTime<Utc>,
    pub report: Option<ReportRow>,
}

/// The columns of an attempt that its report fills.
#[derive(Debug, Clone)]
pub(crate) struct ReportRow {
    pub began_at: DateTime<Utc>,
    pub at: DateTime<Utc>,
    pub message_id: i64,
    pub start_offset_ms: f64,
    pub run_ms: f64,
    pub outcome: Outcome,
}

/// One committed settle.
#[derive(Debug, Clone)]
pub(crate) struct Settled {
    pub at: DateTime<Utc>,
    /// Its rows in the log.
    pub rows: Range<usize>,
    /// Attempts that it closed, and the earlier moves of each, rebuilt from the columns of the
    /// step's and the attempt's rows as an orchestrator rebuilds them.
    pub closed: Vec<(Uuid, i32)>,
    pub rebuilt: Vec<Row>,
    /// The task's row afterwards.
    pub generation: i32,
    pub generation_began_at: DateTime<Utc>,
}

/// What is running somewhere.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Claim {
    pub step: u32,
    pub attempt: i32,
    pub token: Uuid,
}

/// A step message in a worker queue.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Message {
    pub id: i64,
    pub step: u32,
    pub attempt: i32,
}

/// The database, as far as one task is concerned.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pub definition: Arc<Definition>,
    pub clock: DateTime<Utc>,
    pub task: Task,
    pub created_at: DateTime<Utc>,
    pub generation_began_at: DateTime<Utc>,
    pub finished_at: Option<DateTime<Utc>>,
    /// Those of the template by index, empty until the task has begun; then the items of maps, as they came.
    pub steps: Vec<Step>,
    /// Where the items of maps stand in `steps`, by key.
    items: HashMap<u32, usize>,
    /// The tables `maps` and `map_items`, by the index of the map's step.
    pub maps: HashMap<u32, (Map, Vec<Value>)>,
    pub log: Vec<Row>,
    pub attempts: Vec<AttemptRow>,
    /// The worker queue.
    pub messages: Vec<Message>,
    /// The queue `step_results`.
    pub results: Vec<(u32, i32)>,
    /// The table `due`; the step by index, `None` is the task.
    pub due: Vec<(&'static str, DateTime<Utc>, Option<u32>)>,
    pub settled: Vec<Settled>,
    /// The table `signals`.
    pub signals: Vec<Signal>,
    /// A message says that there are signals to look at.
    pub sent_signal: bool,
    /// The table `step_deadlines`, by the step's index.
    pub deadlines: HashMap<u32, DateTime<Utc>>,
    /// The table `children`, without those that have ended: the step, its attempt, and what it started.
    pub children: Vec<(u32, i32, ChildTask)>,
    /// What steps without a handler came to, by step and attempt.
    pub answers: HashMap<(Uuid, i32), Outcome>,
    /// Every message ever sent, to find an attempt that is dispatched twice.
    sent: BTreeSet<(u32, i32)>,
    /// Outputs that operators gave, by step and attempt.
    given: HashMap<(Uuid, i32), Value>,
    /// What became of the tasks that attempts started.
    pub child_ends: HashMap<(Uuid, i32), ChildEnd>,
    /// What is wrong with the task's input.
    pub invalid_input: Option<String>,
    ids: u128,
}

impl World {
    /// A task that was just accepted.
    pub fn new(definition: impl Into<Arc<Definition>>) -> Self {
        let definition = definition.into();
        let created: DateTime<Utc> = "2026-01-05T12:00:00Z".parse().unwrap();
        let steps = definition.steps.len() as u128;
        Self {
            definition,
            clock: created,
            task: Task {
                uuid: Uuid::from_u128(0xAAAA),
                state: TaskState::Pending,
                version: 0,
                generation: 1,
                priority: 0,
                input: json!({"total": 7}),
                open_steps: 0,
                in_flight_steps: 0,
                retrying_steps: 0,
                held_steps: 0,
                failed_steps: 0,
                error_type: None,
                reason: None,
                ended_by: None,
                suspended_from: None,
                run_at: None,
                generation_began_at: created,
                last_at: created,
            },
            created_at: created,
            generation_began_at: created,
            finished_at: None,
            steps: Vec::new(),
            items: HashMap::new(),
            maps: HashMap::new(),
            log: Vec::new(),
            attempts: Vec::new(),
            messages: Vec::new(),
            results: Vec::new(),
            due: Vec::new(),
            settled: Vec::new(),
            signals: Vec::new(),
            sent_signal: false,
            children: Vec::new(),
            deadlines: HashMap::new(),
            answers: HashMap::new(),
            sent: BTreeSet::new(),
            given: HashMap::new(),
            child_ends: HashMap::new(),
            invalid_input: None,
            ids: FIRST_ID + steps,
        }
    }

    /// `clock_timestamp()`: it always goes on.
    pub fn tick(&mut self) -> DateTime<Utc> {
        self.clock += TimeDelta::milliseconds(1);
        self.clock
    }

    pub fn pass(&mut self, time: Duration) {
        self.clock += time;
    }

    pub fn new_uuid(&mut self) -> Uuid {
        self.ids += 1;
        Uuid::from_u128(self.ids)
    }

    pub fn step(&self, name: &str) -> &Step {
        &self.steps[self.definition.by_name[name] as usize]
    }

    /// What events and messages name a step by.
    pub fn key(&self, step: &Step) -> u32 {
        self.definition.key(step.index, step.item)
    }

    /// The step of a key.
    pub fn get(&self, key: u32) -> Option<&Step> {
        let place = self.items.get(&key).copied().unwrap_or(key as usize);
        self.steps.get(place).filter(|step| self.key(step) == key)
    }

    /// The step of a key that is known to exist.
    pub fn at(&self, key: u32) -> &Step {
        self.get(key).expect("keys name steps that exist")
    }

    fn at_mut(&mut self, key: u32) -> &mut Step {
        let place = self.items.get(&key).copied().unwrap_or(key as usize);
        &mut self.steps[place]
    }

    /// Whether it is the step of a map itself.
    pub fn is_map(&self, step: &Step) -> bool {
        step.item.is_none() && self.definition.steps[step.index as usize].for_each.is_some()
    }

    /// Why it waits, if it waits.
    fn wait_reason(&self, step: &Step) -> &'static str {
        if self.is_map(step) {
            return "items";
        }
        self.definition.steps[step.index as usize].work.wait_reason().expect("only steps without a handler wait")
    }

    /// An operator tries again what failed.
    pub fn retry_event() -> Event {
        Event::Retry { operator: operator("olga"), only: Vec::new() }
    }

    /// The step that an event names, by its key.
    pub fn event_key(&self, event: &Event) -> Option<u32> {
        if let Event::ByHand { step, .. } = event {
            return self.definition.by_name.get(&**step).copied();
        }
        let uuid = event.step()?;
        self.steps.iter().find(|step| step.uuid == uuid).map(|step| self.key(step))
    }

    /// The uuid of the step of a key that is known to exist.
    pub fn uuid(&self, key: u32) -> Uuid {
        self.at(key).uuid
    }

    // The worker protocol, migrations/0004.

    /// Takes a message; `None` when its step has moved on.
    pub fn claim(&mut self, place: usize) -> Option<Claim> {
        let message = self.messages.remove(place);
        let (began, at) = (self.tick(), self.tick());
        if self.task.state.is_terminal() || self.task.state == TaskState::Suspended {
            return None;
        }
        let token = self.new_uuid();
        let step = self.at_mut(message.step);
        if step.state != StepState::Enqueued || step.attempt != message.attempt {
            return None;
        }
        step.last_at = at.max(step.last_at + TimeDelta::microseconds(1));
        let (began_at, at) = (began.min(step.last_at), step.last_at);
        step.claim_token = Some(token);
        step.claimed_by = Some("w1".into());
        step.lease_expires_at = Some(at + LEASE);
        step.last_heartbeat_at = None;
        let uuid = step.uuid;
        self.attempts.push(AttemptRow {
            step: uuid,
            attempt: message.attempt,
            token,
            worker: "w1".into(),
            message_id: message.id,
            claim_began_at: began_at,
            claimed_at: at,
            report: None,
        });
        self.worker_move(message.step, StepEvent::Claim, StepState::InProgress, began_at, at);
        self.due.push(("lease", at + LEASE, Some(message.step)));
        Some(Claim { step: message.step, attempt: message.attempt, token })
    }

    /// Renews a lease; answers `still_yours`.
    pub fn heartbeat(&mut self, claim: Claim) -> bool {
        let at = self.tick();
        let step = self.at_mut(claim.step);
        if step.state != StepState::InProgress || step.claim_token != Some(claim.token) {
            return false;
        }
        step.lease_expires_at = Some(at + LEASE);
        step.last_heartbeat_at = Some(at);
        true
    }

    /// Reports a result; answers whether it was accepted (now or before).
    pub fn report(&mut self, claim: Claim, outcome: Outcome) -> bool {
        let (began, at) = (self.tick(), self.tick());
        let message_id = i64::try_from(self.ids).unwrap();
        let place = self.items.get(&claim.step).copied().unwrap_or(claim.step as usize);
        let step = &mut self.steps[place];
        let attempt =
            self.attempts.iter_mut().find(|attempt| attempt.token == claim.token).expect("a token comes from a claim");
        if step.state != StepState::InProgress || step.claim_token != Some(claim.token) {
            return attempt.report.is_some();
        }
        step.last_at = at.max(step.last_at + TimeDelta::microseconds(1));
        let (began_at, at) = (began.min(step.last_at), step.last_at);
        let to = match &outcome {
            Outcome::Success(_) => StepState::EnqueuedForOrchestration,
            Outcome::Failure(_) => StepState::EnqueuedAsErrorForOrchestration,
        };
        attempt.report = Some(ReportRow { began_at, at, message_id, start_offset_ms: 0.5, run_ms: 1.0, outcome });
        self.ids += 1;
        self.worker_move(claim.step, StepEvent::Report, to, began_at, at);
        self.results.push((claim.step, claim.attempt));
        true
    }

    fn worker_move(&mut self, index: u32, event: StepEvent, to: StepState, began_at: DateTime<Utc>, at: DateTime<Utc>) {
        let step = self.at_mut(index);
        assert!(step_move_is_legal(step.state, event, to), "{} –{event}→ {to}", step.state);
        step.version += 1;
        let made = Move {
            entity: step.uuid,
            version: step.version,
            task_version: None,
            generation: step.generation,
            attempt: Some(step.attempt),
            change: Change::Step((step.state, event, to)),
            actor: step.claimed_by.clone(),
            claim_token: step.claim_token,
            detail: None,
        };
        step.state = to;
        self.log.push(Row { made, began_at, at });
    }

    /// `tasker.signal_task`.
    pub fn signal(&mut self, name: &str, payload: Value) {
        self.ids += 1;
        self.signals.push(Signal {
            id: i64::try_from(self.ids).unwrap(),
            name: name.into(),
            payload,
            actor: "sam".into(),
            traceparent: None,
        });
        self.sent_signal = true;
    }

    // Settling.

    pub fn attempt(&self, step: Uuid, attempt: i32) -> Option<&AttemptRow> {
        self.attempts.iter().find(|row| row.step == step && row.attempt == attempt)
    }

    /// One settle: decide, apply, check every rule.
    #[expect(clippy::needless_pass_by_value, reason = "a test says in one expression what happens")]
    pub fn settle(&mut self, events: Vec<Event>, room: &mut Room) -> Plan {
        let began_at = self.tick();
        let events: Vec<&Event> = events.iter().collect();
        let plan = decide(&self.snapshot(&events, began_at), &events, &mut room.clone(), began_at);
        let again = decide(&self.snapshot(&events, began_at), &events, room, began_at);
        assert_eq!(format!("{plan:?}"), format!("{again:?}"), "deciding twice gives two plans");
        if plan.is_empty() {
            return plan;
        }
        self.check_moves(&plan);
        self.apply(&plan, began_at);
        self.check_rows();
        plan
    }

    // Short ways for tests that tell a story.

    /// Begins the task with room for everything.
    pub fn started(definition: impl Into<Arc<Definition>>) -> Self {
        let mut world = Self::new(definition);
        world.settle(vec![Event::Start], &mut Room::unlimited());
        world
    }

    pub fn index(&self, name: &str) -> u32 {
        self.definition.by_name[name]
    }

    /// Claims the message of a step.
    pub fn claim_step(&mut self, name: &str) -> Claim {
        self.claim_key(self.index(name))
    }

    fn claim_key(&mut self, key: u32) -> Claim {
        let attempt = self.at(key).attempt;
        let place = self.messages.iter().position(|message| (message.step, message.attempt) == (key, attempt));
        self.claim(place.expect("the step was sent")).expect("the step can be claimed")
    }

    /// Claims and reports; answers the event that tells of it.
    pub fn run_step(&mut self, name: &str, outcome: Outcome) -> Event {
        self.run_key(self.index(name), outcome)
    }

    /// The same of an item of a map.
    pub fn run_item(&mut self, map: &str, item: u32, outcome: Outcome) -> Event {
        self.run_key(self.definition.key(self.index(map), Some(item)), outcome)
    }

    fn run_key(&mut self, key: u32, outcome: Outcome) -> Event {
        let claim = self.claim_key(key);
        self.pass(Duration::from_millis(5));
        assert!(self.report(claim, outcome));
        Event::Result { step: self.uuid(claim.step), attempt: claim.attempt }
    }

    /// Runs an item of a map and settles its result, with room for everything.
    pub fn finish_item(&mut self, map: &str, item: u32, outcome: Outcome) -> Plan {
        let event = self.run_item(map, item, outcome);
        let key = self.event_key(&event);
        self.results.retain(|(step, _)| Some(*step) != key);
        self.settle(vec![event], &mut Room::unlimited())
    }

    /// Runs a step and settles its result, with room for everything.
    pub fn finish_step(&mut self, name: &str, outcome: Outcome) -> Plan {
        let event = self.run_step(name, outcome);
        let key = self.event_key(&event);
        self.results.retain(|(step, _)| Some(*step) != key);
        self.settle(vec![event], &mut Room::unlimited())
    }
}

/// Ids count from here: first those of the template's steps.
const FIRST_ID: u128 = 0xB000;

/// The uuid that the step of this index gets when its task begins.
pub(crate) fn id(index: u32) -> Uuid {
    Uuid::from_u128(FIRST_ID + 1 + u128::from(index))
}

/// Whether it may end the wait of a map for its items.
fn leaves(event: &Event) -> bool {
    matches!(event, Event::StepTotalDue { .. } | Event::ByHand { .. })
}

pub(crate) fn operator(actor: &str) -> Operator {
    Operator { actor: actor.into(), reason: Some("because".into()) }
}

pub(crate) fn success() -> Outcome {
    Outcome::Success(json!({"n": 1}))
}

pub(crate) fn failure(kind: &str) -> Outcome {
    Outcome::Failure(Failure {
        kind: kind.into(),
        message: format!("it was {kind}"),
        retryable: true,
        retry_after_ms: None,
    })
}

pub(crate) fn permanent(kind: &str) -> Outcome {
    Outcome::Failure(Failure {
        kind: kind.into(),
        message: format!("it was {kind}"),
        retryable: false,
        retry_after_ms: None,
    })
}

/// Room for so many steps in the one queue.
pub(crate) fn room_for(left: i64, handlers: &[&str], holding: bool) -> Room {
    let mut room = Room::default();
    let handlers = handlers.iter().map(|handler| (*handler).to_owned()).collect();
    room.set(QUEUE.into(), QueueRoom { left, capacity: left, handlers, holding });
    room
}

/// Whether any step is held for this reason.
pub(crate) fn is_held(world: &World, reason: HeldBy) -> bool {
    world.steps.iter().any(|step| step.held_by == Some(reason))
}
