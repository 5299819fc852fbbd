//! A task in memory, for tests: the rows, the queues and the clock that `decide` is proved on.
//!
//! It applies a plan as `store/apply.sql` and `cancel_open_steps.sql` do, moves steps as the
//! worker protocol does, and after every settle recounts what the rows claim. It decides
//! nothing itself, and a rule that it checks is written here a second time on purpose.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

use super::condition::Condition;
use super::decide::{Event, NEVER_PASSED, Operator, Snapshot, decide};
use super::definition::{Definition, ForEach, Join, OnItemFailure, StepDefinition};
use super::graph::Graph;
use super::input::{BY_REFERENCE, InputTemplate, Reference, Scope};
use super::plan::{
    Detail, Due, Failure, HeldBy, Lacks, Map, Move, Outcome, Plan, QueueRoom, Room, Signal, Step, Task, Wait,
};
use super::retry::{OnExhausted, RetryPolicy};
use super::states::{StepEvent, StepState, TaskEvent, TaskState, step_move_is_legal, task_move_is_legal};
use super::wait::{CHILD, ChildTask, OnTimeout, SignalWait, WaitFor, Work};

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
    ids: u128,
}

impl World {
    /// A task that was just accepted.
    pub fn new(definition: Definition) -> Self {
        let created: DateTime<Utc> = "2026-01-05T12:00:00Z".parse().unwrap();
        Self {
            definition: Arc::new(definition),
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
            ids: 0xB000,
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

    /// A Start event for a task whose input is good.
    pub fn start_event(&mut self) -> Event {
        Event::Start { step_uuids: self.new_step_uuids(), invalid: None }
    }

    /// A Retry event as an orchestrator makes it.
    pub fn retry_event(&mut self) -> Event {
        let step_uuids = if self.steps.is_empty() { self.new_step_uuids() } else { Vec::new() };
        Event::Retry { operator: operator("olga"), only: Vec::new(), step_uuids, invalid: None }
    }

    fn new_step_uuids(&mut self) -> Vec<Uuid> {
        (0..self.definition.steps.len()).map(|_| self.new_uuid()).collect()
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
            from: step.state.as_str(),
            to: to.as_str(),
            event: event.as_str(),
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

    /// Loads what an orchestrator loads for these events, and then what deciding them lacked, and no more.
    pub fn snapshot(&self, events: &[Event], now: DateTime<Utc>) -> Snapshot<'_> {
        let mut snapshot = self.first_snapshot(events);
        let mut asked = Lacks::default();
        loop {
            let lacks = decide(snapshot.clone(), events.to_vec(), &mut Room::unlimited(), now).lacks;
            let steps: Vec<u32> = lacks.steps.difference(&asked.steps).copied().collect();
            let outputs: Vec<u32> = lacks.outputs.difference(&asked.outputs).copied().collect();
            let collected: Vec<u32> = lacks.collected.difference(&asked.collected).copied().collect();
            let is_new = |(map, window): &(&u32, &(u32, u32))| asked.items.get(*map) != Some(*window);
            let items: Vec<(u32, (u32, u32))> =
                lacks.items.iter().filter(is_new).map(|(map, window)| (*map, *window)).collect();
            if steps.is_empty() && outputs.is_empty() && collected.is_empty() && items.is_empty() {
                return snapshot;
            }
            assert!(self.definition.reaches_far, "a task that cannot skip needs no second look: {lacks:?}");
            for step in steps {
                // An item of a map that is run again may never have existed.
                if let Some(row) = self.get(step) {
                    snapshot.steps.insert(step, loaded(row));
                }
                asked.steps.insert(step);
            }
            for map in collected {
                snapshot.collected.insert(map, Ok(self.collect(map, events)));
                asked.collected.insert(map);
            }
            for (map, (from, count)) in items {
                snapshot.windows.insert(map, self.window(map, from, count));
                asked.items.insert(map, (from, count));
            }
            for step in outputs {
                match (self.output_of(&self.steps[step as usize]), self.steps[step as usize].state) {
                    (Some(output), _) => drop(snapshot.outputs.insert(step, output.clone())),
                    (None, StepState::Error | StepState::Cancelled | StepState::ResolvedManually) => {}
                    (None, _) => drop(snapshot.absent.insert(step)),
                }
                asked.outputs.insert(step);
            }
        }
    }

    /// The parents of a step by how they stand: open, done, skipped.
    fn parents(&self, index: u32) -> (i32, i32, i32) {
        let mut counts = (0, 0, 0);
        for parent in self.definition.graph.parents(index) {
            let parent = &self.steps[*parent as usize];
            match parent.state {
                _ if self.counts_as_done(parent) => counts.1 += 1,
                StepState::Skipped => counts.2 += 1,
                _ => counts.0 += 1,
            }
        }
        counts
    }

    /// A part of a map's list. Items lie in the table in pieces, so that more than was asked for is read.
    fn window(&self, map: u32, from: u32, count: u32) -> (u32, Vec<Value>) {
        const PIECE: u32 = 3;
        let list = &self.maps[&map].1;
        let start = from - from % PIECE;
        let end = ((from + count).div_ceil(PIECE) * PIECE).min(u32::try_from(list.len()).unwrap());
        (start, list[start as usize..end as usize].to_vec())
    }

    /// The outputs of a map's items in the order of its list, those that end by these events among them.
    fn collect(&self, map: u32, events: &[Event]) -> Value {
        let ends = |key: u32| {
            events.iter().find_map(|event| match event {
                Event::ChildEnded { step, attempt, outcome, .. }
                    if *step == key && self.at(key).attempt == *attempt =>
                {
                    Some(outcome)
                }
                _ => None,
            })
        };
        // A map that has just begun has no rows yet.
        let items = 0..self.maps.get(&map).map_or(0, |(map, _)| map.next_item);
        let output = |item| {
            let step = self.at(self.definition.key(map, Some(item)));
            let outcome = match step.state {
                StepState::Waiting => ends(self.key(step)),
                StepState::Complete | StepState::EnqueuedForOrchestration => self.outcome(step),
                _ => None,
            };
            match outcome {
                Some(Outcome::Success(output)) => output.clone(),
                _ => Value::Null,
            }
        };
        items.map(output).collect()
    }

    fn first_snapshot(&self, events: &[Event]) -> Snapshot<'_> {
        let graph = &self.definition.graph;
        let whole = events.iter().any(is_whole);
        let mut about: BTreeSet<u32> = events.iter().filter_map(event_step).collect();
        if events.contains(&Event::SignalDue) {
            // Of many steps that wait for a signal, as many as there are signals.
            let mut left: HashMap<&str, usize> = HashMap::new();
            for signal in &self.signals {
                *left.entry(&signal.name).or_default() += 1;
            }
            for step in self.steps.iter().filter(|step| step.state == StepState::Waiting) {
                let signal = self.definition.steps[step.index as usize].work.signal();
                if let Some(left) = signal.and_then(|signal| left.get_mut(&*signal.name)).filter(|left| **left > 0) {
                    *left -= 1;
                    about.insert(step.index);
                }
            }
        }
        // A map that is left takes its open items with it.
        let left: BTreeSet<u32> = events.iter().filter(|event| leaves(event)).filter_map(event_step).collect();
        let items = self.steps.iter().filter(|step| step.item.is_some() && left.contains(&step.index));
        about.extend(items.filter(|step| !step.state.is_terminal()).map(|step| self.key(step)));
        let mut steps: HashMap<u32, Step> = HashMap::new();
        let mut passed = HashSet::new();
        if whole {
            steps.extend(self.steps.iter().map(|step| (self.key(step), loaded(step))));
            passed.extend(self.steps.iter().filter(|step| self.is_passed(step)).map(|step| self.key(step)));
        } else {
            for step in about.iter().filter_map(|key| self.get(*key)) {
                steps.insert(self.key(step), loaded(step));
                // Behind an item stands its map.
                let behind = if step.item.is_some() { &[step.index][..] } else { graph.children(step.index) };
                for step in behind.iter().filter_map(|key| self.get(*key)) {
                    steps.entry(step.index).or_insert_with(|| loaded(step));
                }
            }
        }
        let outcomes = about.iter().filter_map(|index| {
            let step = self.get(*index)?;
            let reported = self.outcome(step)?;
            // An output given by hand takes the place of the one that was reported.
            let given = self.given.get(&(step.uuid, step.attempt));
            let given = given.filter(|_| matches!(reported, Outcome::Success(_)));
            Some((*index, given.map_or_else(|| reported.clone(), |given| Outcome::Success(given.clone()))))
        });
        let outcomes = outcomes.collect();
        let again = events.iter().flat_map(|event| match event {
            Event::Rerun { from, .. } => &**from,
            _ => &[],
        });
        let again = again.copied().collect();
        let outputs = self.outputs(&steps, &about, whole.then_some(&again));
        let (absent, signals) = (HashSet::new(), self.signals.clone());
        let mut maps = HashMap::new();
        let mut windows = HashMap::new();
        for index in steps.values().filter(|step| step.item.is_none()).map(|step| step.index) {
            let Some((map, _)) = self.maps.get(&index) else {
                continue;
            };
            maps.insert(index, *map);
            // Each of its items that an event is about makes room for another one.
            let items = about.iter().filter_map(|key| self.get(*key)).filter(|step| step.item.is_some());
            let ended = items.filter(|step| step.index == index).count();
            let count = u32::try_from(ended).unwrap().min(map.items - map.next_item);
            if count > 0 {
                windows.insert(index, self.window(index, map.next_item, count));
            }
        }
        Snapshot {
            task: self.task.clone(),
            definition: &self.definition,
            steps,
            passed,
            outcomes,
            outputs,
            absent,
            deadlines: self.deadlines.clone(),
            signals,
            maps,
            windows,
            collected: HashMap::new(),
        }
    }

    /// Whether the steps behind a skipped or failed one may take it for done, as the log tells it.
    fn is_passed(&self, step: &Step) -> bool {
        let last = self.log.iter().rfind(|row| row.made.entity == step.uuid);
        last.is_some_and(|last| match step.state {
            StepState::Skipped => last.made.actor.is_some(),
            StepState::Error => {
                let kind = last.made.detail.as_ref().and_then(|detail| detail.error_type.as_deref());
                !kind.is_some_and(|kind| NEVER_PASSED.contains(&kind))
            }
            _ => false,
        })
    }

    /// What the step came to: by an operator's hand, or its handler's.
    pub fn output_of(&self, step: &Step) -> Option<&Value> {
        if !matches!(step.state, StepState::Complete | StepState::ResolvedManually) {
            return None;
        }
        if let Some(given) = self.given.get(&(step.uuid, step.attempt)) {
            return Some(given);
        }
        match self.outcome(step)? {
            Outcome::Success(output) => Some(output),
            Outcome::Failure(_) => None,
        }
    }

    /// The outputs that an orchestrator reads: those which steps about to become ready need and
    /// the events' own steps do not bring.
    fn outputs(
        &self,
        steps: &HashMap<u32, Step>,
        about: &BTreeSet<u32>,
        whole: Option<&BTreeSet<u32>>,
    ) -> HashMap<u32, Value> {
        let mut outputs = HashMap::new();
        // An event may be about a step whose attempt did not succeed.
        let succeeded = |index: &u32| {
            let step = &self.steps[*index as usize];
            about.contains(index) && matches!(self.outcome(step), Some(Outcome::Success(_)))
        };
        let read = |outputs: &mut HashMap<u32, Value>, needs: &mut dyn Iterator<Item = &u32>| {
            for need in needs {
                if let Some(output) = self.output_of(&self.steps[*need as usize]) {
                    outputs.insert(*need, output.clone());
                }
            }
        };
        for step in about.iter().filter_map(|key| self.get(*key)).filter(|step| step.item.is_some()) {
            let for_each = self.definition.steps[step.index as usize].for_each.as_ref();
            read(&mut outputs, &mut for_each.iter().flat_map(|for_each| &for_each.needs));
        }
        for step in steps.values().filter(|step| step.item.is_none()) {
            let parents = self.definition.graph.parents(step.index);
            let may_become_ready = if let Some(again) = whole {
                let over = |parent: &u32| about.contains(parent) || self.steps[*parent as usize].state.is_terminal();
                let open = matches!(step.state, StepState::Pending | StepState::Error | StepState::Cancelled);
                again.contains(&step.index) || (open && step.held_by.is_none() && parents.iter().all(over))
            } else {
                let here = i32::try_from(parents.iter().filter(|parent| about.contains(parent)).count()).unwrap();
                step.held_by.is_none() && (1..=here).contains(&step.remaining_dependencies)
            };
            if !may_become_ready {
                continue;
            }
            let needs = &self.definition.steps[step.index as usize].needs;
            read(&mut outputs, &mut needs.iter().filter(|need| !succeeded(need)));
        }
        outputs
    }

    /// What was reported of the step's current attempt, or what its wait came to.
    fn outcome(&self, step: &Step) -> Option<&Outcome> {
        let reported = || Some(&self.attempt(step.uuid, step.attempt)?.report.as_ref()?.outcome);
        self.answers.get(&(step.uuid, step.attempt)).or_else(reported)
    }

    pub fn attempt(&self, step: Uuid, attempt: i32) -> Option<&AttemptRow> {
        self.attempts.iter().find(|row| row.step == step && row.attempt == attempt)
    }

    /// One settle: decide, apply, check every rule.
    pub fn settle(&mut self, events: Vec<Event>, room: &mut Room) -> Plan {
        let began_at = self.tick();
        let plan = decide(self.snapshot(&events, began_at), events.clone(), &mut room.clone(), began_at);
        let again = decide(self.snapshot(&events, began_at), events, room, began_at);
        assert_eq!(format!("{plan:?}"), format!("{again:?}"), "deciding twice gives two plans");
        if plan.is_empty() {
            return plan;
        }
        self.check_moves(&plan);
        self.apply(&plan, began_at);
        self.check_rows();
        plan
    }

    /// `store/apply.rs`.
    fn apply(&mut self, plan: &Plan, began_at: DateTime<Utc>) {
        let before = self.steps.clone();
        let first_row = self.log.len();
        let mut floor = plan.steps.iter().map(|(step, _)| step.last_at).chain([plan.task.last_at]).max().unwrap();
        if plan.cancel_open_steps {
            let open = self.steps.iter().filter(|step| !step.state.is_terminal());
            floor = floor.max(open.map(|step| step.last_at).max().unwrap_or(floor));
        }
        let at = self.tick().max((floor + TimeDelta::microseconds(1)).max(began_at));
        self.clock = self.clock.max(at);

        assert_eq!(self.task.version, plan.task_version_before, "compare-and-set of the task");
        if plan.task_changed {
            if plan.task.generation != self.task.generation {
                self.generation_began_at = began_at;
            }
            self.task = Task { last_at: at, input: self.task.input.clone(), ..plan.task.clone() };
            self.finished_at = plan.task.state.is_terminal().then_some(at);
        } else {
            assert_eq!(plan.task, self.task, "the task changed, but the plan says it did not");
        }
        for answer in &plan.answers {
            let twice = self.answers.insert((answer.step, answer.attempt), answer.outcome.clone());
            assert!(twice.is_none(), "attempt {} of {} comes to two things", answer.attempt, answer.step);
        }
        self.write_children(plan);
        let kept = self.signals.len();
        self.signals.retain(|signal| !plan.used_signals.contains(&signal.id));
        assert_eq!(kept - self.signals.len(), plan.used_signals.len(), "a signal is used once");
        self.write_steps(plan, began_at, at);
        let mut closed = plan.closed.clone();
        if plan.cancel_open_steps {
            closed.extend(self.cancel_open_steps(began_at, at));
        }
        for given in &plan.outputs {
            self.given.insert((given.step, given.attempt), given.output.clone());
        }
        // A map's output stands where one that is given by hand would.
        for came in &plan.map_outputs {
            self.given.insert((came.step, 0), came.output.clone());
        }
        let started = plan.children.iter().map(|child| (child.step, child.attempt));
        for (step, attempt) in started.collect::<Vec<_>>() {
            let row = self.at(self.index_of(step, plan));
            assert_eq!((row.state, row.attempt), (StepState::Waiting, attempt), "a task that nobody waits for");
            if row.failures == 0 && row.losses == 0 {
                assert!(row.input.is_some(), "a task without its input");
            }
        }
        let resumed = plan.moves.iter().any(|made| made.event == TaskEvent::Resume.as_str());
        for send in &plan.sends {
            let step = self.index_of(send.step, plan);
            let first = self.sent.insert((step, send.attempt));
            assert!(first || resumed, "attempt {} of {step} is dispatched twice", send.attempt);
            let row = self.at(step);
            assert_eq!((row.state, row.attempt), (StepState::Enqueued, send.attempt), "a message without its state");
            // A step that runs at the first of its dependencies may have been held since, while
            // others were done; and one that was held keeps the input it was given when it became ready.
            let joins_any = self.definition.steps[row.index as usize].join == Join::Any;
            let was_held = before.iter().any(|before| before.uuid == row.uuid && before.held_by.is_some());
            let left_out = row.input.as_ref().is_some_and(|input| input.get(BY_REFERENCE).is_some());
            if row.enqueued_event == Some("Enqueue") && first && !was_held && !joins_any && !left_out {
                assert_eq!(row.input.as_ref(), self.expected_input(step).as_ref(), "the input of step {step}");
            }
            self.ids += 1;
            self.messages.push(Message { id: i64::try_from(self.ids).unwrap(), step, attempt: send.attempt });
        }
        let rebuilt = closed.iter().flat_map(|(step, attempt)| {
            let row = before.iter().find(|row| row.uuid == *step && row.attempt == *attempt && self.has_attempt(row));
            row.map(|row| self.earlier_moves(row)).unwrap_or_default()
        });
        let rebuilt = rebuilt.collect();
        self.settled.push(Settled {
            at,
            rows: first_row..self.log.len(),
            closed,
            rebuilt,
            generation: self.task.generation,
            generation_began_at: self.generation_began_at,
        });
    }

    /// The rows of steps, the log and the due hints.
    fn write_steps(&mut self, plan: &Plan, began_at: DateTime<Utc>, at: DateTime<Utc>) {
        for (new, version_before) in &plan.steps {
            let row = self.at_mut(self.definition.key(new.index, new.item));
            assert_eq!((row.uuid, row.version), (new.uuid, *version_before), "compare-and-set of step {}", new.index);
            update(row, new, began_at, at);
        }
        for (uuid, skipped) in &plan.skip_counts {
            if let Some(row) = self.steps.iter_mut().find(|row| row.uuid == *uuid) {
                row.skipped_dependencies = *skipped;
            }
        }
        for made in &plan.moves {
            self.log.push(Row { made: made.clone(), began_at, at });
        }
        for Due { kind, at, step } in &plan.due {
            let step = step.map(|step| self.index_of(step, plan));
            self.due.push((kind, *at, step));
        }
        for (step, at) in &plan.deadlines {
            self.deadlines.insert(self.index_of(*step, plan), *at);
        }
        assert_eq!(plan.new_steps.len(), plan.new_step_queues.len());
        // Items come after the steps of the template.
        let (items, others): (Vec<&Step>, Vec<&Step>) = plan.new_steps.iter().partition(|new| new.item.is_some());
        for new in others.into_iter().chain(items) {
            if new.item.is_some() {
                let first = self.items.insert(self.key(new), self.steps.len()).is_none();
                assert!(first, "an item is created once: {new:?}");
            } else {
                assert_eq!(self.steps.len(), new.index as usize, "new steps come in order, once");
            }
            let enqueued = opens_attempt(new);
            let times = enqueued.then_some((began_at, at)).unzip();
            self.steps.push(Step { enqueued_began_at: times.0, enqueued_at: times.1, last_at: at, ..new.clone() });
        }
        self.write_maps(plan);
    }

    /// `store/maps.rs`.
    fn write_maps(&mut self, plan: &Plan) {
        for step in &plan.forgotten_maps {
            let index = self.index_of(*step, plan);
            assert!(self.maps.remove(&index).is_some(), "a map that never began is forgotten");
        }
        for (step, list) in &plan.lists {
            let index = self.index_of(*step, plan);
            let twice = self.maps.insert(index, (Map::new(0), list.clone()));
            assert!(twice.is_none(), "the list of a map is read once");
        }
        for (step, map) in &plan.maps {
            let index = self.index_of(*step, plan);
            self.maps.get_mut(&index).expect("its list was read").0 = *map;
        }
        let mut grown: BTreeSet<u32> =
            plan.new_steps.iter().filter(|new| new.item.is_some()).map(|new| new.index).collect();
        for index in std::mem::take(&mut grown) {
            let most = self.definition.steps[index as usize].for_each.as_ref().expect("items are a map's").max_parallel;
            assert!(self.maps[&index].0.open_items() <= most, "more than max_parallel items are open");
        }
    }

    /// `lifecycle/nested.rs`.
    fn write_children(&mut self, plan: &Plan) {
        for child in &plan.children {
            let step = self.index_of(child.step, plan);
            self.children.push((step, child.attempt, child.task.clone()));
        }
        let left: Vec<u32> = plan.left_children.iter().map(|step| self.index_of(*step, plan)).collect();
        let ended = plan.task.state.is_terminal();
        self.children.retain(|(step, ..)| !ended && !left.contains(step));
    }

    /// Whether an attempt of it is open: its message, its claim, its report, or the task it waits for.
    fn has_attempt(&self, step: &Step) -> bool {
        let waits_for_child =
            || !self.is_map(step) && matches!(self.definition.steps[step.index as usize].work, Work::Task(_));
        step.state.is_in_flight() || (step.state == StepState::Waiting && waits_for_child())
    }

    /// A step's input, out of every output there is; `None` if it reads one that is not there.
    fn expected_input(&self, index: u32) -> Option<Value> {
        let output = |index: u32| self.output_of(self.steps.get(index as usize)?);
        let step = self.at(index);
        let defined = &self.definition.steps[step.index as usize];
        let item = step.item.map(|item| (self.maps[&step.index].1[item as usize].clone(), json!(item)));
        if let Some(template) = &defined.input {
            let absent = |name: &str| {
                let state = self.steps[self.definition.by_name[name] as usize].state;
                state == StepState::Skipped || !state.is_terminal()
            };
            let outputs = |name: &str| output(self.definition.by_name[name]);
            let item = item.as_ref().map(|(value, place)| (value, place));
            let scope = Scope { input: &self.task.input, outputs: &outputs, absent: &absent, item };
            return template.resolve_in(scope).ok();
        }
        if let Some((value, place)) = item {
            return Some(json!({"item": value, "item_index": place}));
        }
        let parents = self.definition.graph.parents(index).iter();
        let steps: serde_json::Map<String, Value> = parents
            .filter_map(|parent| {
                Some((self.definition.steps[*parent as usize].name.to_string(), output(*parent)?.clone()))
            })
            .collect();
        Some(json!({"input": self.task.input, "steps": steps}))
    }

    fn index_of(&self, step: Uuid, plan: &Plan) -> u32 {
        let mut rows = self.steps.iter().chain(&plan.new_steps);
        self.key(rows.find(|row| row.uuid == step).expect("it is one of the task's steps"))
    }

    /// `store/cancel_open_steps.sql`; answers the attempts it closed.
    fn cancel_open_steps(&mut self, began_at: DateTime<Utc>, at: DateTime<Utc>) -> Vec<(Uuid, i32)> {
        let mut closed = Vec::new();
        for place in 0..self.steps.len() {
            let step = &self.steps[place];
            if step.state.is_terminal() {
                continue;
            }
            let has_attempt = step.state.is_in_flight();
            let retry = (step.state == StepState::WaitingForRetry)
                .then(|| Wait { ended: step.ready_at, ..Wait::new("retry", step.last_at, step.due_at, step.version) });
            let held =
                step.held_by.map(|held| Wait::new(held.as_str(), step.ready_at.unwrap(), None, step.version + 1));
            let waited = (step.state == StepState::Waiting)
                .then(|| Wait::new(self.wait_reason(step), step.last_at, step.due_at, step.version));
            let waited_now = waited.is_some();
            let has_number = has_attempt || waited_now;
            let detail = Detail {
                reason: self.task.reason.clone(),
                error_type: Some("cancelled".into()),
                waits: retry.into_iter().chain(waited).chain(held).collect(),
                ..Detail::default()
            };
            if self.has_attempt(step) {
                closed.push((step.uuid, step.attempt));
            }
            let made = Move {
                entity: step.uuid,
                version: step.version + 1,
                task_version: None,
                generation: step.generation,
                attempt: has_number.then_some(step.attempt),
                from: step.state.as_str(),
                to: StepState::Cancelled.as_str(),
                event: StepEvent::Cancel.as_str(),
                actor: None,
                claim_token: step.claim_token.filter(|_| has_attempt),
                detail: Some(detail),
            };
            let step = &mut self.steps[place];
            step.state = StepState::Cancelled;
            step.version += 1;
            step.last_at = at.max(step.last_at + TimeDelta::microseconds(1));
            (step.due_at, step.ready_at, step.held_by) = (None, None, None);
            self.log.push(Row { made, began_at, at });
        }
        closed
    }

    /// The open attempt's moves as the columns tell them: what an orchestrator hands to the
    /// exporter without reading the log.
    fn earlier_moves(&self, step: &Step) -> Vec<Row> {
        let event = step.enqueued_event.expect("an open attempt has its Enqueue");
        let version = step.enqueued_version.expect("an open attempt has its Enqueue");
        let lost = event == StepEvent::LeaseExpired.as_str();
        let from = match event {
            "RetryReady" => "waiting_for_retry",
            "LeaseExpired" => "in_progress",
            _ => "pending",
        };
        let row = |version, from, to, event, began_at, at| Row {
            made: Move {
                entity: step.uuid,
                version,
                task_version: None,
                generation: step.generation,
                attempt: Some(step.attempt),
                from,
                to,
                event,
                actor: None,
                claim_token: None,
                detail: None,
            },
            began_at,
            at,
        };
        if event == StepEvent::BeginWait.as_str() {
            let from = if step.failures > 0 { "waiting_for_retry" } else { "pending" };
            let times = (step.enqueued_began_at.unwrap(), step.enqueued_at.unwrap());
            let mut opening = row(version, from, "waiting", event, times.0, times.1);
            opening.made.detail = Some(Detail { waiting: Some(CHILD.into()), ..Detail::default() });
            return vec![opening];
        }
        let mut opening =
            row(version, from, "enqueued", event, step.enqueued_began_at.unwrap(), step.enqueued_at.unwrap());
        opening.made.task_version = step.enqueued_task_version;
        opening.made.attempt = Some(if lost { step.attempt - 1 } else { step.attempt });
        let mut rows = vec![opening];
        if let Some(attempt) = self.attempt(step.uuid, step.attempt) {
            let mut claim =
                row(version + 1, "enqueued", "in_progress", "Claim", attempt.claim_began_at, attempt.claimed_at);
            claim.made.actor = Some(attempt.worker.clone());
            rows.push(claim);
            if let Some(report) = &attempt.report {
                let to = step.state.as_str();
                let mut reported = row(version + 2, "in_progress", to, "Report", report.began_at, report.at);
                reported.made.actor = Some(attempt.worker.clone());
                rows.push(reported);
            }
        }
        rows
    }

    // What must be true of every plan and after every settle.

    /// Every move is legal, follows the one before it, and leaves a terminal state only by an operator.
    fn check_moves(&self, plan: &Plan) {
        let mut now: BTreeMap<Uuid, (&str, i32)> = BTreeMap::new();
        now.insert(self.task.uuid, (self.task.state.as_str(), self.task.version));
        now.extend(self.steps.iter().map(|step| (step.uuid, (step.state.as_str(), step.version))));
        let mut generation = self.task.generation;
        let was_open = !self.task.state.is_terminal();
        for made in &plan.moves {
            let (state, version) = now.get(&made.entity).copied().unwrap_or(("pending", 0));
            assert_eq!((made.from, made.version), (state, version + 1), "{made:?}");
            now.insert(made.entity, (made.to, made.version));
            let repairs = ["OperatorRetry", "Rerun", "Skip", "ResolveManually", "CompleteManually"];
            let by_operator = repairs.contains(&made.event) && made.actor.is_some();
            if made.entity == self.task.uuid {
                let from: TaskState = made.from.parse().unwrap();
                let (event, to) = (made.event.parse::<TaskEvent>().unwrap(), made.to.parse().unwrap());
                assert!(task_move_is_legal(from, event, to), "{from} –{event}→ {to}");
                if from.is_terminal() {
                    assert!(by_operator, "{from} is final: {made:?}");
                    generation += 1;
                }
            } else {
                let from: StepState = made.from.parse().unwrap();
                let (event, to) = (made.event.parse::<StepEvent>().unwrap(), made.to.parse().unwrap());
                assert!(step_move_is_legal(from, event, to), "{from} –{event}→ {to}");
                if from.is_terminal() {
                    // Items of a map that begins anew follow it; those that it stopped are tried again with it.
                    let is_item = self.steps.iter().any(|step| step.uuid == made.entity && step.item.is_some());
                    let repaired = was_open && from == StepState::Error;
                    assert!(by_operator || (is_item && made.event == "Rerun"), "{from} is final: {made:?}");
                    assert!(
                        repaired || is_item || generation > self.task.generation,
                        "{from} is final for its generation: {made:?}"
                    );
                }
            }
            assert_eq!(made.generation, generation, "{made:?}");
        }
        assert_eq!(plan.task.generation, generation);
        assert_eq!(now[&plan.task.uuid], (plan.task.state.as_str(), plan.task.version));
        for (step, _) in &plan.steps {
            assert_eq!(now[&step.uuid], (step.state.as_str(), step.version));
        }
    }

    /// The constraints of migrations/0001, the counts, and a progress token for whatever is open.
    fn check_rows(&self) {
        let task = &self.task;
        let count =
            |wanted: fn(&Step) -> bool| i32::try_from(self.steps.iter().filter(|step| wanted(step)).count()).unwrap();
        assert!(!task.state.is_passing(), "{} never rests in the row", task.state);
        assert_eq!(task.state.is_terminal(), self.finished_at.is_some());
        let recounted = (
            count(|step| !step.state.is_terminal()),
            count(|step| step.state.is_in_flight()),
            count(|step| step.state == StepState::WaitingForRetry),
            count(|step| step.held_by.is_some() || step.state == StepState::Waiting),
        );
        let counted = (task.open_steps, task.in_flight_steps, task.retrying_steps, task.held_steps);
        assert_eq!(counted, recounted, "open, in flight, retrying, held");
        assert_eq!(task.suspended_from.is_some(), task.state == TaskState::Suspended);
        let failed = |step: &&Step| step.state == StepState::Error && step.item.is_none() && !self.counts_as_done(step);
        let failed = self.steps.iter().filter(failed);
        assert_eq!(task.failed_steps, i32::try_from(failed.count()).unwrap(), "failed");
        let rests = match task.state {
            TaskState::StepsInProcess => task.in_flight_steps > 0,
            TaskState::WaitingForRetry => task.in_flight_steps == 0 && task.retrying_steps > 0,
            TaskState::WaitingForDependencies => task.in_flight_steps + task.retrying_steps == 0 && task.held_steps > 0,
            TaskState::BlockedByFailures => {
                (task.in_flight_steps, task.retrying_steps, task.held_steps) == (0, 0, 0) && task.failed_steps > 0
            }
            TaskState::Complete => self.steps.len() >= self.definition.steps.len() && task.failed_steps == 0,
            _ => true,
        };
        assert!(rests, "{task:?}");
        for step in &self.steps {
            self.check_step(step);
        }
        for (index, (map, list)) in &self.maps {
            self.check_map(*index, *map, list);
        }
        for (step, attempt, task) in &self.children {
            let step = self.at(*step);
            let waits = step.state == StepState::Waiting && step.attempt == *attempt;
            assert!(waits, "nobody waits for {task:?} any more, and it goes on: {step:?}");
        }
        self.check_log();
    }

    /// What a map's row counts is what its items say.
    fn check_map(&self, index: u32, map: Map, list: &[Value]) {
        let items = (0..map.next_item).map(|item| self.at(self.definition.key(index, Some(item))).state);
        let items: Vec<StepState> = items.collect();
        let ended = items.iter().filter(|state| matches!(state, StepState::Complete | StepState::Error)).count();
        let failed = items.iter().filter(|state| **state == StepState::Error).count();
        let counted = (map.items as usize, (map.items - map.remaining_items) as usize, map.failed_items as usize);
        assert_eq!(counted, (list.len(), ended, failed), "items, ended, failed of the map {index}");
        let step = &self.steps[index as usize];
        let runs = step.state == StepState::Waiting;
        let open = items.iter().filter(|state| !state.is_terminal()).count();
        assert!(runs || open == 0, "items of a map that does not wait for them: {step:?}, {map:?}");
        if runs {
            assert!(open > 0 || self.task.state == TaskState::Suspended, "a map that waits for nothing: {map:?}");
        }
        if step.state == StepState::Complete && step.attempt == 0 && map.remaining_items == 0 {
            let output = self.output_of(step).and_then(Value::as_array);
            if let Some(output) = output.filter(|_| self.ended_by_its_items(step)) {
                let told = |item: usize| {
                    let row = self.at(self.definition.key(index, Some(u32::try_from(item).unwrap())));
                    self.output_of(row).cloned().unwrap_or_default()
                };
                let wanted: Vec<Value> = (0..list.len()).map(told).collect();
                assert_eq!(*output, wanted, "the outputs of a map stand in the order of its list");
            }
        }
    }

    fn ended_by_its_items(&self, map: &Step) -> bool {
        let last = self.log.iter().rfind(|row| row.made.entity == map.uuid);
        last.is_some_and(|last| last.made.event == StepEvent::ItemsDone.as_str())
    }

    fn check_step(&self, step: &Step) {
        let key = self.key(step);
        assert!(step.remaining_dependencies >= 0, "steps_dependencies_are_not_negative: {step:?}");
        if step.state == StepState::InProgress {
            assert!(
                step.claim_token.is_some() && step.lease_expires_at.is_some(),
                "steps_in_progress_is_claimed: {step:?}"
            );
        }
        if step.held_by.is_some() {
            let is_due = matches!(step.state, StepState::Pending | StepState::WaitingForRetry);
            assert!(is_due && step.ready_at.is_some(), "steps_held_is_due: {step:?}");
        }
        let due = |kind: &str| self.due.iter().any(|(of, _, whose)| *of == kind && *whose == Some(key));
        // Resume looks at all of these again.
        let suspended = self.task.state == TaskState::Suspended;
        let token = match step.state {
            StepState::Enqueued | StepState::WaitingForRetry if suspended => true,
            StepState::Enqueued => {
                self.messages.iter().any(|message| (message.step, message.attempt) == (key, step.attempt))
            }
            StepState::InProgress => due("lease"),
            StepState::EnqueuedForOrchestration | StepState::EnqueuedAsErrorForOrchestration => {
                self.results.contains(&(key, step.attempt))
            }
            StepState::WaitingForRetry => step.due_at.is_some() && (due("retry") || step.held_by.is_some()),
            StepState::Waiting if self.is_map(step) => true,
            StepState::Waiting => match self.definition.steps[step.index as usize].work.signal() {
                Some(signal) => {
                    let kept = self.signals.iter().any(|kept| kept.name == signal.name && signal.allows(&kept.payload));
                    let hint = self.due.iter().any(|(of, ..)| *of == "signal");
                    (step.due_at.is_none() || due("timer")) && (!kept || hint || self.sent_signal)
                }
                None if self.has_attempt(step) => {
                    self.children.iter().any(|(of, attempt, _)| (*of, *attempt) == (key, step.attempt))
                }
                None => step.due_at.is_some() && due("timer"),
            },
            StepState::Pending if step.item.is_some() => step.held_by.is_some() || suspended,
            StepState::Pending => {
                let (open, done, skipped) = self.parents(step.index);
                assert_eq!((step.remaining_dependencies, step.skipped_dependencies), (open, skipped), "{step:?}");
                let waits = match self.definition.steps[step.index as usize].join {
                    Join::All => skipped == 0 && open > 0,
                    Join::Taken => open > 0,
                    Join::Any => open > 0 && done == 0,
                };
                waits || step.held_by.is_some() || suspended
            }
            _ => true,
        };
        assert!(token, "nothing will ever move it: {step:?}");
        if self.has_attempt(step) {
            // The columns tell of the open attempt what the log tells.
            for mut row in self.earlier_moves(step) {
                row.made.detail = None;
                let logged = self
                    .log
                    .iter()
                    .find(|logged| (logged.made.entity, logged.made.version) == (row.made.entity, row.made.version));
                let mut logged = logged.expect("it is in the log").clone();
                (logged.made.detail, logged.made.claim_token) = (None, None);
                assert_eq!(row, logged);
            }
        }
    }

    /// Done, or its dependents run as if it were: an operator skipped it, or its policy lets them.
    fn counts_as_done(&self, step: &Step) -> bool {
        let policy = self.definition.steps[step.index as usize].retry.on_exhausted;
        match step.state {
            StepState::Complete | StepState::ResolvedManually => true,
            StepState::Skipped => self.is_passed(step),
            StepState::Error => policy == OnExhausted::Continue && self.is_passed(step),
            _ => false,
        }
    }

    /// Versions are consecutive, times never go back, attempts are 1..n.
    fn check_log(&self) {
        let mut last: BTreeMap<Uuid, (i32, DateTime<Utc>, &str)> = BTreeMap::new();
        let mut attempts: BTreeMap<Uuid, i32> = BTreeMap::new();
        for row in &self.log {
            let made = &row.made;
            let before = last.insert(made.entity, (made.version, row.at, made.to));
            let (version, at, state) = before.unwrap_or((0, self.created_at, "pending"));
            assert_eq!((made.version, made.from), (version + 1, state), "{made:?}");
            assert!(row.began_at <= row.at && row.at >= at, "{row:?}");
            let waits_for_items = made.detail.as_ref().is_some_and(|detail| detail.waiting.as_deref() == Some("items"));
            let opens = made.to == "enqueued" || (made.to == "waiting" && !waits_for_items);
            if made.entity != self.task.uuid && opens {
                let attempt = attempts.entry(made.entity).or_default();
                *attempt += 1;
                let opened = made.attempt.unwrap() + i32::from(made.event == "LeaseExpired");
                assert_eq!(opened, *attempt, "attempts are 1..n: {made:?}");
            }
        }
        for step in &self.steps {
            assert_eq!(step.attempt, attempts.get(&step.uuid).copied().unwrap_or(0));
            let (version, _, state) = last.get(&step.uuid).copied().unwrap_or((0, self.clock, "pending"));
            assert_eq!((step.version, step.state.as_str()), (version, state));
        }
    }

    // Short ways for tests that tell a story.

    /// Begins the task with room for everything.
    pub fn started(definition: Definition) -> Self {
        let mut world = Self::new(definition);
        let start = world.start_event();
        world.settle(vec![start], &mut Room::unlimited());
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
        Event::Result { step: claim.step, attempt: claim.attempt }
    }

    /// Runs an item of a map and settles its result, with room for everything.
    pub fn finish_item(&mut self, map: &str, item: u32, outcome: Outcome) -> Plan {
        let event = self.run_item(map, item, outcome);
        self.results.retain(|(step, _)| Some(*step) != event_step(&event));
        self.settle(vec![event], &mut Room::unlimited())
    }

    /// Runs a step and settles its result, with room for everything.
    pub fn finish_step(&mut self, name: &str, outcome: Outcome) -> Plan {
        let event = self.run_step(name, outcome);
        self.results.retain(|(step, _)| Some(*step) != event_step(&event));
        self.settle(vec![event], &mut Room::unlimited())
    }
}

/// `decide` is never given the input of a loaded row.
fn loaded(step: &Step) -> Step {
    Step { input: None, ..step.clone() }
}

/// The columns that `apply.sql` writes, and no others.
fn update(row: &mut Step, new: &Step, began_at: DateTime<Utc>, at: DateTime<Utc>) {
    if new.version != row.version {
        row.last_at = at;
    }
    row.state = new.state;
    row.version = new.version;
    row.generation = new.generation;
    row.attempt = new.attempt;
    row.failures = new.failures;
    row.losses = new.losses;
    row.remaining_dependencies = new.remaining_dependencies;
    row.input = new.input.clone().or(row.input.take());
    row.due_at = new.due_at;
    row.ready_at = new.ready_at;
    row.held_by = new.held_by;
    if opens_attempt(new) {
        row.claim_token = None;
        row.claimed_by = None;
        row.lease_expires_at = None;
        row.enqueued_version = new.enqueued_version;
        row.enqueued_task_version = new.enqueued_task_version;
        row.enqueued_event = new.enqueued_event;
        row.enqueued_began_at = Some(began_at);
        row.enqueued_at = Some(at);
    }
}

/// `decide` leaves the times of the move that opens an attempt to the database.
fn opens_attempt(step: &Step) -> bool {
    matches!(step.state, StepState::Enqueued | StepState::Waiting) && step.enqueued_at.is_none()
}

/// The step an event is about.
pub(crate) fn event_step(event: &Event) -> Option<u32> {
    match event {
        Event::Result { step, .. }
        | Event::Quarantined { step, .. }
        | Event::LeaseDue { step }
        | Event::RetryDue { step }
        | Event::QueueDue { step, .. }
        | Event::TimerDue { step }
        | Event::ChildEnded { step, .. }
        | Event::StepTotalDue { step }
        | Event::Admit { step }
        | Event::ByHand { step, .. } => Some(*step),
        _ => None,
    }
}

/// Whether it may end the wait of a map for its items.
fn leaves(event: &Event) -> bool {
    matches!(event, Event::StepTotalDue { .. } | Event::ByHand { .. })
}

/// Whether an orchestrator loads every step for it.
pub(crate) fn is_whole(event: &Event) -> bool {
    matches!(event, Event::Retry { .. } | Event::Rerun { .. } | Event::Resume(_) | Event::ByHand { .. })
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

/// Builds a template out of `name` or `name<parent,parent` words.
pub(crate) fn template(words: &str) -> Definition {
    let steps: Vec<(String, Vec<String>)> = words
        .split_whitespace()
        .map(|word| {
            let (name, parents) = word.split_once('<').unwrap_or((word, ""));
            (name.to_owned(), parents.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
        })
        .collect();
    let graph = Graph::new(steps.iter().map(|(name, parents)| (&**name, &**parents))).unwrap();
    let by_name = (0_u32..).zip(&steps).map(|(index, (name, _))| (Arc::from(&**name), index)).collect();
    let steps = (0_u32..).zip(&steps).map(|(index, (name, _))| StepDefinition {
        name: Arc::from(&**name),
        work: Work::Handler,
        handler: Arc::from(format!("do.{name}")),
        queue: QUEUE.into(),
        priority: 0,
        retry: RetryPolicy { jitter: 0.0, ..RetryPolicy::default() },
        queue_timeout: None,
        total: None,
        run_timeout: Some(Duration::from_secs(30)),
        input: None,
        needs: graph.parents(index).to_vec(),
        when: None,
        branches: Vec::new(),
        join: Join::All,
        limits: Vec::new(),
        for_each: None,
    });
    Definition {
        template_id: 1,
        namespace: "shop".into(),
        name: "order".into(),
        version: "1.0.0".into(),
        block_on_failure: false,
        total: None,
        steps: steps.collect(),
        by_name,
        graph,
        fair_key: None,
        reaches_far: false,
    }
}

/// Changes one step of a template.
pub(crate) fn with(mut definition: Definition, step: &str, change: impl FnOnce(&mut StepDefinition)) -> Definition {
    let index = definition.by_name[step] as usize;
    change(&mut definition.steps[index]);
    definition
}

/// Makes a step a decision among its dependents of these names.
pub(crate) fn with_branches(mut definition: Definition, step: &str, branches: &[&str]) -> Definition {
    definition.reaches_far = true;
    let branches = branches.iter().map(|name| definition.by_name[*name]).collect();
    with(definition, step, |step| step.branches = branches)
}

/// Gives a step a condition.
pub(crate) fn with_when(mut definition: Definition, step: &str, when: &str) -> Definition {
    definition.reaches_far = true;
    let when = Condition::parse(when).unwrap();
    let need = when.reference().step().map(|name| definition.by_name[name]);
    with(definition, step, |step| {
        let new = need.filter(|need| !step.needs.contains(need));
        step.needs.extend(new);
        step.when = Some(when);
    })
}

/// Lets a step join its dependencies in another way.
pub(crate) fn with_join(mut definition: Definition, step: &str, join: Join) -> Definition {
    definition.reaches_far |= join == Join::Any;
    with(definition, step, |step| step.join = join)
}

/// Gives a step an explicit input.
pub(crate) fn with_input(definition: Definition, step: &str, input: &Value) -> Definition {
    let template = InputTemplate::parse(input).unwrap();
    let needs = template.references().map(|name| definition.by_name[name]).collect();
    with(definition, step, |step| {
        step.needs = needs;
        step.input = Some(template);
    })
}

/// Makes a step wait instead of running a handler.
pub(crate) fn with_wait(definition: Definition, step: &str, wait: WaitFor) -> Definition {
    with(definition, step, |step| {
        step.work = Work::Wait(wait);
        step.needs.clear();
    })
}

/// Makes a step start a task instead of running a handler.
pub(crate) fn with_task(definition: Definition, step: &str, awaited: bool) -> Definition {
    let task = ChildTask { template: "child".into(), version: None, namespace: None, awaited };
    with(definition, step, |step| {
        step.work = Work::Task(task);
        step.handler = "".into();
    })
}

/// Makes a step a map over the list that this reference leads to.
pub(crate) fn with_map(
    mut definition: Definition,
    step: &str,
    list: &str,
    max_parallel: u32,
    on_item_failure: OnItemFailure,
) -> Definition {
    definition.reaches_far = true;
    let reference = Reference::parse_whole(list).unwrap();
    let list = reference.step().map(|name| definition.by_name[name]);
    with(definition, step, |step| {
        // What its items read, its step does not; it reads the list.
        let needs = if step.input.is_some() { step.needs.clone() } else { Vec::new() };
        step.needs = needs.iter().copied().chain(list).collect();
        step.for_each = Some(ForEach { reference, max_parallel, on_item_failure, needs });
    })
}

/// A wait for a signal.
pub(crate) fn signal_wait(name: &str, allowed: &[&str], timeout: Option<Duration>, on_timeout: OnTimeout) -> WaitFor {
    let allowed = allowed.iter().map(|answer| (*answer).to_owned()).collect();
    WaitFor::Signal(SignalWait { name: name.into(), allowed, timeout, on_timeout })
}

/// Whether any step is held for this reason.
pub(crate) fn is_held(world: &World, reason: HeldBy) -> bool {
    world.steps.iter().any(|step| step.held_by == Some(reason))
}
