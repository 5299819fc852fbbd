//! What a settle loads of the world before it decides, and no more.

use std::collections::{BTreeSet, HashMap, HashSet};

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::{World, id, leaves};
use tasker_shared::state_machine::decide::{Event, NEVER_PASSED, Snapshot, decide};
use tasker_shared::state_machine::plan::{Lacks, Outcome, Room, Step};
use tasker_shared::state_machine::states::StepState;

impl World {
    /// Loads what an orchestrator loads for these events, and then what deciding them lacked, and no more.
    pub fn snapshot(&self, events: &[&Event], now: DateTime<Utc>) -> Snapshot {
        let mut snapshot = self.first_snapshot(events);
        let mut asked = Lacks::default();
        loop {
            let lacks = decide(&snapshot, events, &mut Room::unlimited(), now).lacks;
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
    pub(super) fn parents(&self, index: u32) -> (i32, i32, i32) {
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
    pub(super) fn window(&self, map: u32, from: u32, count: u32) -> (u32, Vec<Value>) {
        const PIECE: u32 = 3;
        let list = &self.maps[&map].1;
        let start = from - from % PIECE;
        let end = ((from + count).div_ceil(PIECE) * PIECE).min(u32::try_from(list.len()).unwrap());
        (start, list[start as usize..end as usize].to_vec())
    }

    /// The outputs of a map's items in the order of its list, those that end by these events among them.
    pub(super) fn collect(&self, map: u32, events: &[&Event]) -> Value {
        let ends = |key: u32| {
            let (of, current) = (self.uuid(key), self.at(key).attempt);
            let told = |event: &&&Event| **event == &Event::ChildEnded { step: of, attempt: current };
            events.iter().find(told).and_then(|_| self.child_ends.get(&(of, current))).map(|end| &end.outcome)
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

    pub(super) fn first_snapshot(&self, events: &[&Event]) -> Snapshot {
        let graph = &self.definition.graph;
        let whole = events.iter().any(|event| event.is_about_all());
        let mut about: BTreeSet<u32> = events.iter().filter_map(|event| self.event_key(event)).collect();
        if events.contains(&&Event::SignalDue) {
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
        let left: BTreeSet<u32> =
            events.iter().filter(|event| leaves(event)).filter_map(|event| self.event_key(event)).collect();
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
        let again = again.filter_map(|name| self.definition.by_name.get(&**name).copied()).collect();
        let outputs = self.outputs(&steps, &about, whole.then_some(&again));
        let (absent, signals) = (HashSet::new(), self.signals.clone());
        let begins = self.steps.is_empty();
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
            definition: self.definition.clone(),
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
            child_ends: self.child_ends.clone(),
            new_step_uuids: if begins {
                (0..self.definition.steps.len()).map(|n| id(u32::try_from(n).unwrap())).collect()
            } else {
                Vec::new()
            },
            invalid_input: self.invalid_input.clone().filter(|_| begins),
        }
    }

    /// Whether the steps behind a skipped or failed one may take it for done, as the log tells it.
    pub(super) fn is_passed(&self, step: &Step) -> bool {
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
    pub(super) fn outputs(
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
    pub(super) fn outcome(&self, step: &Step) -> Option<&Outcome> {
        let reported = || Some(&self.attempt(step.uuid, step.attempt)?.report.as_ref()?.outcome);
        self.answers.get(&(step.uuid, step.attempt)).or_else(reported)
    }
}

/// `decide` is never given the input of a loaded row.
fn loaded(step: &Step) -> Step {
    Step { input: None, ..step.clone() }
}
