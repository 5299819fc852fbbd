//! Tells a random story on a task in memory, and counts a second time what its limits allow.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use serde_json::json;
use uuid::Uuid;

use crate::simulation::{Claim, QUEUE, World, failure, operator, permanent, room_for, success};
use tasker_shared::state_machine::decide::{ByHand, Event, decide};
use tasker_shared::state_machine::flow::{Allows, Free, Limit, LimitSlots, namespace_limit};
use tasker_shared::state_machine::plan::{ChildEnd, HeldBy, Outcome, Plan, Room, Step};
use tasker_shared::state_machine::states::{StepState, TaskState};

use super::story::{Behaviour, SIGNALS, Story};

/// Runs a story: its choices in order, then whatever is left to do until nothing is.
pub(crate) struct Driver {
    pub world: World,
    story: Story,
    running: Vec<Claim>,
    /// Claims whose worker is gone or was told to stop, and who may still report.
    ghosts: Vec<Claim>,
    /// Operators have had their say; from now on every handler succeeds.
    pub(super) healed: bool,
    flow: Flow,
}

/// The limits of a story: what they allow is counted here a second time, from the rows and the log.
#[derive(Default)]
struct Flow {
    /// By the step's index.
    of_step: Vec<Vec<String>>,
    allows: BTreeMap<String, Allows>,
    /// By name: what was taken out of the bucket and is not refilled yet, and when that was so.
    spent: BTreeMap<String, (f64, DateTime<Utc>)>,
    /// By name: when the rate let one through.
    began: BTreeMap<String, Vec<DateTime<Utc>>>,
    /// In which hold group each step was last held.
    hold_groups: HashMap<Uuid, String>,
}

/// What was before a settle.
struct Before {
    log: usize,
    in_flight: BTreeSet<Uuid>,
}

impl Flow {
    fn new(world: &World, of_namespace: Option<i32>) -> Self {
        let mut flow = Self::default();
        for index in 0..u32::try_from(world.definition.steps.len()).unwrap() {
            let mut limits = world.definition.limits(index, &world.task.input).unwrap_or_default();
            limits
                .extend(of_namespace.map(|most| Limit { name: namespace_limit("shop"), allows: Allows::AtOnce(most) }));
            flow.of_step.push(limits.iter().map(|limit| limit.name.clone()).collect());
            flow.allows.extend(limits.into_iter().map(|limit| (limit.name, limit.allows)));
        }
        flow
    }

    /// What a limit has left.
    fn free(&self, name: &str, world: &World) -> Free {
        let limit_id = 1;
        match self.allows[name] {
            Allows::AtOnce(most) => {
                let counts = |step: &&Step| {
                    step.state.is_in_flight() && self.of_step[step.index as usize].iter().any(|of| of == name)
                };
                let used = i64::try_from(world.steps.iter().filter(counts).count()).unwrap();
                Free { limit_id, slots: Some(i64::from(most) - used), tokens: None }
            }
            Allows::Rate(times, _) => {
                Free { limit_id, slots: None, tokens: Some(f64::from(times) - self.spent_at(name, world.clock)) }
            }
        }
    }

    fn spent_at(&self, name: &str, now: DateTime<Utc>) -> f64 {
        self.spent.get(name).map_or(0.0, |(spent, at)| (spent - self.refilled(name, *at, now)).max(0.0))
    }

    fn refilled(&self, name: &str, from: DateTime<Utc>, to: DateTime<Utc>) -> f64 {
        let Allows::Rate(times, per) = self.allows[name] else { unreachable!() };
        (to - from).as_seconds_f64() * f64::from(times) / per.as_secs_f64()
    }

    /// Whether a step's limits let it through.
    fn lets(&self, step: &Step, world: &World) -> bool {
        self.of_step[step.index as usize].iter().all(|name| self.free(name, world).left() > 0)
    }

    /// When the next of the rates that hold steps back lets one through.
    fn next(&self, world: &World) -> Option<DateTime<Utc>> {
        let held = world.steps.iter().filter(|step| step.held_by.is_some());
        let names = held.flat_map(|step| &self.of_step[step.index as usize]);
        let empty = names.filter_map(|name| match self.allows[name] {
            Allows::Rate(times, per) => {
                let lacks = 1.0 - (f64::from(times) - self.spent_at(name, world.clock));
                (lacks > 0.0).then(|| per.mul_f64(lacks / f64::from(times)))
            }
            Allows::AtOnce(_) => None,
        });
        empty.min().map(|time| world.clock + time + TimeDelta::milliseconds(1))
    }

    /// What one settle sent and held, against what it may.
    fn check(&mut self, before: &Before, world: &World, plan: &Plan, is_paused: bool) -> TestCaseResult {
        for row in &world.log[before.log..] {
            let begins =
                row.made.change.to() == "enqueued" && matches!(row.made.change.event(), "Enqueue" | "RetryReady");
            let Some(step) = world.steps.iter().find(|step| begins && step.uuid == row.made.entity) else {
                continue;
            };
            for name in self.of_step[step.index as usize].clone() {
                let Allows::Rate(times, _) = self.allows[&name] else { continue };
                let spent = self.spent_at(&name, row.at) + 1.0;
                self.spent.insert(name.clone(), (spent, row.at));
                let began = self.began.entry(name.clone()).or_default();
                began.push(row.at);
                let began = self.began[&name].clone();
                for (count, from) in (1..).zip(began.iter().rev()) {
                    // A full bucket, and what is refilled while it lasts.
                    let most = f64::from(times) + self.refilled(&name, *from, row.at) + 1e-6;
                    prop_assert!(f64::from(count) <= most, "{count} of {name} from {from} to {}", row.at);
                }
            }
        }
        for name in self.allows.keys() {
            prop_assert!(self.free(name, world).slots.is_none_or(|left| left >= 0), "more than {name} allows");
        }
        self.hold_groups.extend(plan.hold_groups.iter().cloned());
        for step in world.steps.iter().filter(|step| step.held_by.is_some()) {
            if world.definition.has_hold_group(step.index) || step.held_by == Some(HeldBy::Limit) {
                let group = world.definition.hold_group(step.index, &world.task.input).unwrap();
                prop_assert_eq!(self.hold_groups.get(&step.uuid), Some(&group), "nobody would find it: {:?}", step);
            }
        }
        for send in &plan.sends {
            let step = world.steps.iter().find(|step| step.uuid == send.step).unwrap();
            let priority = world.task.priority + world.definition.steps[step.index as usize].priority;
            prop_assert_eq!((send.priority, step.priority), (priority, priority));
            prop_assert!(before.in_flight.contains(&step.uuid) || !is_paused, "a paused queue is given {:?}", step);
        }
        Ok(())
    }
}

impl Driver {
    pub fn new(story: &Story) -> Self {
        let mut world = World::new(story.definition());
        world.task.input = json!({
            "total": 7, "at": "2026-01-05T12:01:00Z",
            "tenant": "t1", "none": [], "one": [{"a": 1}], "three": ["x", null, 3], "seven": [0, 1, 2, 3, 4, 5, 6],
        });
        world.task.priority = story.priority;
        world.invalid_input = story.invalid.then(|| "total: must be a number".to_owned());
        let flow = Flow::new(&world, story.limit);
        Self { world, story: story.clone(), running: Vec::new(), ghosts: Vec::new(), healed: false, flow }
    }

    pub fn run(&mut self) -> TestCaseResult {
        for choice in self.story.choices.clone() {
            self.choose(choice % 16, usize::from(choice / 16))?;
        }
        self.drain()
    }

    /// The world goes on by itself until nothing is left to do.
    pub fn drain(&mut self) -> TestCaseResult {
        for _ in 0..5000 {
            let finishes = !self.world.results.is_empty() || self.running.iter().any(|claim| self.will_report(*claim));
            if self.world.task.state == TaskState::Suspended && !finishes {
                self.settle(vec![Event::Resume(operator("rita"))], Room::unlimited())?;
            } else if self.world.task.state == TaskState::Pending {
                self.start(Room::unlimited())?;
            } else if !self.world.messages.is_empty() {
                self.claim(0);
            } else if let Some(place) = self.running.iter().position(|claim| self.will_report(*claim)) {
                self.finish(place);
            } else if !self.world.results.is_empty() {
                let results = std::mem::take(&mut self.world.results);
                let results = results.into_iter().map(|reported| self.result(reported)).collect();
                self.settle(results, Room::unlimited())?;
            } else if !self.world.children.is_empty() {
                self.end_child(0)?;
            } else if self.world.steps.iter().any(|step| step.held_by.is_some() && self.flow.lets(step, &self.world)) {
                self.admit(usize::MAX, Room::unlimited())?;
            } else if self.world.sent_signal {
                self.signal_due()?;
            } else if let Some(at) =
                self.world.due.iter().map(|(_, at, _)| *at).chain(self.flow.next(&self.world)).min()
            {
                for claim in self.running.clone() {
                    if self.behaviour(claim) == Behaviour::Hangs {
                        self.world.heartbeat(claim);
                    }
                }
                self.world.clock = self.world.clock.max(at);
                self.sweep(usize::MAX)?;
            } else if self.world.steps.iter().any(|step| step.state == StepState::Waiting) {
                // Nothing but a signal can help now.
                self.world.signal(SIGNALS[0], json!({"n": 1, "list": []}));
                self.world.signal(SIGNALS[1], json!({"n": 2, "answer": "yes", "list": [1]}));
            } else {
                let state = self.world.task.state;
                prop_assert!(
                    state.is_terminal() || state == TaskState::BlockedByFailures,
                    "stuck: {:?}",
                    self.world.task
                );
                return Ok(());
            }
        }
        Err(TestCaseError::fail("it goes on for ever"))
    }

    /// An operator retries what failed, and nothing fails any more.
    pub fn heal(&mut self) -> TestCaseResult {
        self.healed = true;
        let retry = World::retry_event();
        self.settle(vec![retry], Room::unlimited())?;
        self.drain()
    }

    fn behaviour(&self, claim: Claim) -> Behaviour {
        self.behaves(claim.step, claim.attempt)
    }

    fn behaves(&self, key: u32, attempt: i32) -> Behaviour {
        let (index, item) = self.world.definition.position(key);
        if self.healed { Behaviour::Succeeds } else { self.story.behaviour(index, item, attempt) }
    }

    fn will_report(&self, claim: Claim) -> bool {
        !matches!(self.behaviour(claim), Behaviour::IsLost | Behaviour::IsLate | Behaviour::Hangs)
    }

    fn choose(&mut self, action: u16, argument: usize) -> TestCaseResult {
        match action {
            0 => self.start(self.room(argument))?,
            1 | 2 if !self.world.messages.is_empty() => {
                self.claim(argument % self.world.messages.len());
            }
            3 | 4 if !self.running.is_empty() => self.finish(argument % self.running.len()),
            5..=7 => {
                let count = self.world.results.len().min(1 + argument % 6);
                let mut events: Vec<Event> = self
                    .world
                    .results
                    .drain(..count)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .map(|reported| self.result(reported))
                    .collect();
                // Redelivered hints come along with new ones.
                let done = self.world.steps.iter().filter(|step| step.state == StepState::Complete);
                let done: Vec<_> = done.map(|step| (self.world.key(step), step.attempt)).collect();
                if !done.is_empty() && argument.is_multiple_of(3) {
                    events.push(self.result(done[argument / 3 % done.len()]));
                }
                self.settle(events, self.room(argument / 6))?;
            }
            8 => self.sweep(1 + argument % 8)?,
            9 => self.world.pass([1, 800, 3_000, 12_000, 70_000, 3_000_000].map(Duration::from_millis)[argument % 6]),
            10 => self.admit(1 + argument % 4, self.room(argument / 4))?,
            11 if !self.running.is_empty() => {
                self.world.heartbeat(self.running[argument % self.running.len()]);
            }
            12 => self.deliver_again(argument),
            13 if !self.ghosts.is_empty() => {
                // Whatever it says: if its claim is gone, nothing comes of it.
                self.world.report(self.ghosts[argument % self.ghosts.len()], permanent("Late"));
            }
            14 => self.nonsense(argument)?,
            15 if argument % 8 == 3 && !self.world.children.is_empty() => {
                self.end_child(argument / 8 % self.world.children.len())?;
            }
            15 if argument % 8 == 1 => {
                let answer = ["yes", "no", "perhaps"][argument / 8 % 3];
                self.world.signal(SIGNALS[argument / 24 % 2], json!({"n": 3, "answer": answer}));
                if (argument / 48).is_multiple_of(2) {
                    self.signal_due()?;
                }
            }
            // Operators act seldom, or nothing would ever be finished.
            15 if argument.is_multiple_of(4) => self.operate(argument / 4)?,
            _ => {}
        }
        Ok(())
    }

    /// Anything from no room at all to room for everything.
    fn room(&self, argument: usize) -> Room {
        if argument.is_multiple_of(3) {
            return Room::unlimited();
        }
        let handlers: Vec<String> = self.world.definition.steps.iter().map(|step| step.handler.to_string()).collect();
        let mut offered: Vec<&str> = handlers.iter().map(String::as_str).collect();
        if argument.is_multiple_of(5) {
            offered.remove(argument % offered.len());
        }
        let held = self.world.steps.iter().any(|step| step.held_by.is_some());
        let mut room = room_for(i64::try_from(argument % 4).unwrap(), &offered, held);
        if argument.is_multiple_of(7) {
            room.set_paused([QUEUE.to_owned()].into());
        }
        room
    }

    /// The same room under the story's limits, with what they have left: as who admits knows them.
    fn limited(&self, room: Room) -> Room {
        if self.flow.allows.is_empty() {
            return room;
        }
        let handlers: Vec<String> = self.world.definition.steps.iter().map(|step| step.handler.to_string()).collect();
        let handlers: Vec<&str> = handlers.iter().map(String::as_str).collect();
        let mut room = if room.is_unlimited() { room_for(1000, &handlers, false) } else { room };
        if self.story.limit.is_some() {
            room.set_limits([namespace_limit("shop")].into());
        }
        let mut slots = LimitSlots::default();
        for name in self.flow.allows.keys() {
            slots.set(name.clone(), self.flow.free(name, &self.world));
        }
        room.set_limit_slots(slots);
        room
    }

    fn start(&mut self, room: Room) -> TestCaseResult {
        self.settle(vec![Event::Start], room)
    }

    fn claim(&mut self, place: usize) {
        if let Some(claim) = self.world.claim(place) {
            self.running.push(claim);
        }
    }

    fn finish(&mut self, place: usize) {
        let claim = self.running.remove(place);
        self.world.pass(Duration::from_millis(3));
        let outcome = match self.behaviour(claim) {
            Behaviour::Succeeds => {
                let (index, item) = self.world.definition.position(claim.step);
                Outcome::Success(self.story.output(index, item, claim.attempt, self.healed))
            }
            Behaviour::Fails => failure("Flaky"),
            Behaviour::FailsForGood => permanent("Broken"),
            Behaviour::AsksForNow => match failure("Busy") {
                Outcome::Failure(mut failure) => {
                    failure.retry_after_ms = Some(0.0);
                    Outcome::Failure(failure)
                }
                Outcome::Success(_) => unreachable!(),
            },
            Behaviour::IsLost | Behaviour::IsLate => return self.ghosts.push(claim),
            Behaviour::Hangs => {
                self.world.heartbeat(claim);
                return self.running.push(claim);
            }
        };
        self.world.report(claim, outcome);
        self.ghosts.push(claim);
    }

    /// Takes timers that are due, as sweep does, some that lease queries would have put off among them.
    fn sweep(&mut self, most: usize) -> TestCaseResult {
        let now = self.world.clock;
        let mut events = Vec::new();
        let uuids: HashMap<u32, Uuid> = self.world.steps.iter().map(|step| (self.world.key(step), step.uuid)).collect();
        self.world.due.retain(|(kind, at, step)| {
            if *at > now || events.len() >= most {
                return true;
            }
            events.push(match (*kind, *step) {
                ("lease", Some(step)) => Event::LeaseDue { step: uuids[&step] },
                ("retry", Some(step)) => Event::RetryDue { step: uuids[&step] },
                ("queue_timeout", Some(step)) => Event::QueueDue { step: uuids[&step] },
                ("timer", Some(step)) => Event::TimerDue { step: uuids[&step] },
                ("step_timeout", Some(step)) => Event::StepTotalDue { step: uuids[&step] },
                ("signal", None) => Event::SignalDue,
                ("total_timeout", None) => Event::TotalDue,
                // Begun by another event already, or here and now.
                ("start", None) => return false,
                other => panic!("no such hint: {other:?}"),
            });
            false
        });
        self.settle(events, self.room(usize::from(now.timestamp_subsec_millis().is_multiple_of(7))))
    }

    /// A task that a step started has ended, was not to be awaited, or could not be started.
    fn end_child(&mut self, place: usize) -> TestCaseResult {
        let (step, attempt, task) = self.world.children.swap_remove(place);
        let behaviour = self.behaves(step, attempt);
        let outcome = match behaviour {
            Behaviour::FailsForGood => permanent("child_not_created"),
            _ if !task.awaited => Outcome::Success(json!({"task": "somewhere", "n": step, "list": [1]})),
            Behaviour::Fails | Behaviour::IsLost | Behaviour::Hangs => failure("child_failed"),
            _ => Outcome::Success(json!({"n": step, "list": [1, 2]})),
        };
        self.world.pass(Duration::from_millis(5));
        let step = self.world.uuid(step);
        self.world.child_ends.insert((step, attempt), ChildEnd { outcome, link: None });
        self.settle(vec![Event::ChildEnded { step, attempt }], Room::unlimited())
    }

    fn signal_due(&mut self) -> TestCaseResult {
        self.world.sent_signal = false;
        self.settle(vec![Event::SignalDue], Room::unlimited())
    }

    fn admit(&mut self, most: usize, room: Room) -> TestCaseResult {
        let held = self.world.steps.iter().filter(|step| step.held_by.is_some()).take(most);
        let events = held.map(|step| Event::Admit { step: step.uuid }).collect();
        self.settle(events, room)
    }

    /// Messages and hints that come twice.
    fn deliver_again(&mut self, argument: usize) {
        let world = &mut self.world;
        match argument % 3 {
            0 if !world.messages.is_empty() => world.messages.push(world.messages[argument % world.messages.len()]),
            1 if !world.results.is_empty() => world.results.push(world.results[argument % world.results.len()]),
            _ if !world.due.is_empty() => world.due.push(world.due[argument % world.due.len()]),
            _ => {}
        }
    }

    /// Events about any step at any time, late, early or wrong.
    fn nonsense(&mut self, argument: usize) -> TestCaseResult {
        if self.world.steps.is_empty() {
            return Ok(());
        }
        let index = (argument / 8) % self.world.steps.len();
        let step = &self.world.steps[index];
        let (key, index, attempt) = (self.world.key(step), step.uuid, step.attempt);
        let events = match argument % 8 {
            0 => vec![Event::Result { step: index, attempt }, Event::Result { step: index, attempt: attempt - 1 }],
            1 => vec![Event::LeaseDue { step: index }],
            2 => vec![Event::RetryDue { step: index }, Event::RetryDue { step: index }],
            3 => vec![Event::QueueDue { step: index }],
            4 => {
                self.world.child_ends.insert((index, attempt - 1), ChildEnd { outcome: success(), link: None });
                let late = Event::ChildEnded { step: index, attempt: attempt - 1 };
                vec![Event::Admit { step: index }, late, Event::Admit { step: index }]
            }
            5 => vec![
                Event::TotalDue,
                Event::StepTotalDue { step: index },
                Event::TimerDue { step: index },
                Event::SignalDue,
            ],
            6 => vec![Event::Start],
            _ if argument.is_multiple_of(3) => {
                vec![Event::Quarantined { step: index, attempt, reason: "it cannot be read".into() }]
            }
            _ => {
                let results = self.world.results.iter().copied().chain([(key, attempt)]);
                results.map(|reported| self.result(reported)).collect()
            }
        };
        // A hint that was not taken out of its queue stays there: it comes again.
        self.settle(events, self.room(argument))
    }

    fn operate(&mut self, argument: usize) -> TestCaseResult {
        let steps = self.world.definition.steps.len().max(1);
        let some = |of: usize| {
            self.world.definition.steps.get(of % steps).map_or_else(String::new, |step| step.name.to_string())
        };
        let by = operator("hana");
        let event = match argument % 16 {
            0 => Event::Cancel(operator("carl")),
            1 => Event::Terminate(operator("tina")),
            2 | 3 => Event::Suspend(operator("suzy")),
            4 | 5 => Event::Resume(operator("rita")),
            6 => Event::GiveUp(operator("gina")),
            7 => Event::ResolveTask(operator("rosa")),
            8 if self.story.skips => {
                Event::ByHand { operator: by, step: some(argument / 16), act: ByHand::Skip, output: None }
            }
            9 => {
                let output = Some(json!({"n": 1000, "list": [1, 2]}));
                Event::ByHand { operator: by, step: some(argument / 16), act: ByHand::Resolve, output }
            }
            8 | 10 => {
                let output = Some(json!({"n": 1000, "list": [1, 2]}));
                Event::ByHand { operator: by, step: some(argument / 16), act: ByHand::Complete, output }
            }
            11 | 12 => Event::Rerun { operator: by, from: vec![some(argument / 16), some(argument / 64)] },
            13 => Event::Retry { operator: operator("olga"), only: vec![some(argument / 16)] },
            _ => World::retry_event(),
        };
        let mut events: Vec<Event> = match &event {
            // They come with nothing that names a step: that is another queue's messages.
            Event::Retry { .. } | Event::Rerun { .. } => Vec::new(),
            _ => {
                let results = std::mem::take(&mut self.world.results);
                results.into_iter().map(|reported| self.result(reported)).collect()
            }
        };
        events.push(event);
        self.settle(events, Room::unlimited())
    }

    pub(super) fn settle(&mut self, events: Vec<Event>, room: Room) -> TestCaseResult {
        if events.is_empty() {
            return Ok(());
        }
        let mut room = self.limited(room);
        self.check_order(&events, &room)?;
        let in_flight = self.world.steps.iter().filter(|step| step.state.is_in_flight());
        let before = Before { log: self.world.log.len(), in_flight: in_flight.map(|step| step.uuid).collect() };
        let was_terminal = self.world.task.state.is_terminal();
        let plan = self.world.settle(events, &mut room);
        self.flow.check(&before, &self.world, &plan, room.is_paused(QUEUE))?;
        if was_terminal && !self.world.task.state.is_terminal() {
            prop_assert!(!plan.audit.is_empty(), "only an operator begins a generation");
        }
        Ok(())
    }

    /// The events of one settle have no order: the same rows come of them forwards and backwards.
    fn check_order(&self, events: &[Event], room: &Room) -> TestCaseResult {
        let now = self.world.clock + TimeDelta::milliseconds(1);
        let rows = |events: Vec<Event>| {
            let events: Vec<&Event> = events.iter().collect();
            let plan = decide(&self.world.snapshot(&events, now), &events, &mut room.clone(), now);
            (plan.task, plan.steps, plan.new_steps, plan.sends, plan.cancel_open_steps)
        };
        let backwards: Vec<Event> = events.iter().rev().cloned().collect();
        let mut by_halves = events.to_vec();
        by_halves.rotate_left(events.len() / 2);
        prop_assert_eq!(rows(events.to_vec()), rows(backwards));
        prop_assert_eq!(rows(events.to_vec()), rows(by_halves));
        Ok(())
    }

    fn result(&self, (key, attempt): (u32, i32)) -> Event {
        Event::Result { step: self.world.uuid(key), attempt }
    }
}
