//! Maps: one step of the template run once for each item of a list that is known only at run time.
//!
//! The map's own step waits while its items run as steps of their own. Only so many items exist
//! unfinished at a time, so that a list of 100,000 costs neither more memory nor more per item
//! than one of 100.

use std::collections::BTreeSet;

use serde_json::Value;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::super::definition::{ForEach, MAX_ITEMS, OnItemFailure};
use super::super::input::{Scope, kind};
use super::super::plan::{Detail, MapOutput, Step, Wait};
use super::super::retry::OnExhausted;
use super::super::states::{StepEvent, StepState, TaskState};
use super::{Pass, Ready};

impl ForEach {
    /// Whether so many failed items mean that the map has failed.
    fn has_failed(&self, failed: u32, items: u32) -> bool {
        match self.on_item_failure {
            OnItemFailure::Fail => failed > 0,
            OnItemFailure::Continue => false,
            OnItemFailure::Count(most) => failed > most,
            // In hundredths, so that nothing is rounded.
            OnItemFailure::Percent(most) => u64::from(failed) * 100 > u64::from(most) * u64::from(items),
        }
    }
}

impl<'a> Pass<'a, '_> {
    /// A map's dependencies are done: read its list and create the first items.
    pub(super) fn begin_map(&mut self, key: u32, for_each: &ForEach) {
        if !self.maps.contains_key(&key) {
            let values = match self.list(for_each) {
                Ok(values) => values,
                Err((kind, reason)) => return self.fail_by_definition(key, kind, &reason),
            };
            let items = u32::try_from(values.len()).unwrap_or(u32::MAX);
            self.maps.insert(key, super::super::plan::Map::new(items));
            self.plan.lists.push((self.steps[&key].uuid, values.clone()));
            self.windows.insert(key, (0, values));
        }
        let detail = Detail { waiting: Some("items".into()), ..Detail::default() };
        self.move_step(key, StepEvent::BeginWait, StepState::Waiting, Some(detail));
        self.touched_maps.insert(key);
    }

    fn list(&self, for_each: &ForEach) -> Result<Vec<Value>, (&'static str, String)> {
        let outputs = |name: &str| self.output_named(name);
        let absent = |name: &str| self.is_absent(name);
        let scope = Scope { input: &self.plan.task.input, outputs: &outputs, absent: &absent, item: None };
        let reference = &for_each.reference;
        match reference.read(scope) {
            Ok(Value::Array(values)) if values.len() > MAX_ITEMS as usize => Err((
                "too_many_items",
                format!(
                    "for_each reads ${{{reference}}}, which has {} items; {MAX_ITEMS} is the most, split the list",
                    values.len()
                ),
            )),
            Ok(Value::Array(values)) => Ok(values.clone()),
            Ok(other) => {
                Err(("not_a_list", format!("for_each reads ${{{reference}}}, but it is {}, not a list", kind(other))))
            }
            Err(found) => Err(("missing_input", format!("for_each reads ${{{reference}}}, but {found}"))),
        }
    }

    /// An item has ended, and so has its attempt.
    pub(super) fn item_ended(&mut self, key: u32, failure: Option<&str>) {
        let step = &self.steps[&key];
        let (index, item) = (step.index, step.item.unwrap_or_default());
        let Some(map) = self.maps.get_mut(&index) else {
            return;
        };
        map.remaining_items -= 1;
        if let Some(message) = failure {
            map.failed_items += 1;
            self.item_failures.entry(index).or_insert_with(|| format!("; item {item} failed: {message}"));
        }
        self.touched_maps.insert(index);
    }

    /// A map that is run again, or that waits once more for what is run again, has another list to
    /// read. What it had come to is forgotten, and its items wait until it gets to them.
    pub(super) fn forget_map(&mut self, key: u32) {
        if self.maps.remove(&key).is_some() {
            self.touched_maps.remove(&key);
            self.plan.forgotten_maps.push(self.steps[&key].uuid);
        }
    }

    /// Whether it is an item that its map has come to, since it last began.
    pub(super) fn is_current_item(&self, step: &Step) -> bool {
        let map = self.maps.get(&step.index);
        step.item.is_some_and(|item| map.is_some_and(|map| item < map.next_item))
    }

    /// An item that had ended is run again. (One that was cancelled had not ended for its map.)
    pub(super) fn item_again(&mut self, key: u32) {
        let step = &self.steps[&key];
        let ended = matches!(step.state, StepState::Error | StepState::Complete);
        let map = step.item.and_then(|_| self.maps.get_mut(&step.index));
        if let Some(map) = map.filter(|_| ended) {
            map.remaining_items += 1;
            map.failed_items -= u32::from(step.state == StepState::Error);
            self.touched_maps.insert(step.index);
        }
    }

    /// Brings every map whose items have moved forward: its end, or more items. The ends come first,
    /// because one of them may end the task, and then no item is created that nobody would send.
    pub(super) fn advance_maps(&mut self) {
        let mut touched: BTreeSet<u32> = BTreeSet::new();
        while touched != self.touched_maps {
            touched.clone_from(&self.touched_maps);
            for key in &touched {
                if let Some(for_each) = self.waits_for_items(*key) {
                    self.end_finished_map(*key, for_each);
                }
            }
            for key in &touched {
                if let Some(for_each) = self.waits_for_items(*key).filter(|_| self.fatal.is_none()) {
                    self.create_items(*key, for_each);
                }
            }
        }
    }

    fn waits_for_items(&self, key: u32) -> Option<&'a ForEach> {
        self.defined(key).for_each.as_ref().filter(|_| self.steps[&key].state == StepState::Waiting)
    }

    fn end_finished_map(&mut self, key: u32, for_each: &ForEach) {
        let definition = self.defined(key);
        let map = self.maps[&key];
        if for_each.has_failed(map.failed_items, map.items) {
            // A task that ends takes the other items with it; else those that run are let finish, as
            // while it is suspended, because then it does not end.
            let ends_task = definition.retry.on_exhausted == OnExhausted::Fail
                && !self.definition.block_on_failure
                && self.plan.task.state != TaskState::Suspended;
            if ends_task || map.open_items() == 0 {
                let first = self.item_failures.get(&key).cloned().unwrap_or_default();
                let reason = format!("{} of {} items failed{first}", map.failed_items, map.items);
                self.end_map(key, Err(("items_failed", reason)));
            }
        } else if map.items == 0 {
            self.end_map(key, Ok(Value::Array(Vec::new())));
        } else if map.remaining_items == 0 {
            match self.snapshot.collected.get(&key).cloned() {
                Some(Ok(output)) => {
                    let output = self.whole_output(key, output);
                    self.end_map(key, Ok(output));
                }
                Some(Err(problem)) => {
                    let reason = format!("the list of its items' outputs {problem}");
                    self.end_map(key, Err(("invalid_output", reason)));
                }
                None => drop(self.plan.lacks.collected.insert(key)),
            }
        }
    }

    /// The outputs as they were read are from before this pass: an item that failed in it, or was
    /// only created in it, has none.
    fn whole_output(&self, key: u32, read: Value) -> Value {
        let Value::Array(mut outputs) = read else {
            return read;
        };
        let items = self.maps[&key].items;
        outputs.resize(items as usize, Value::Null);
        for (item, output) in (0..items).zip(&mut outputs) {
            let step = self.steps.get(&self.definition.key(key, Some(item)));
            if step.is_some_and(|step| step.state != StepState::Complete) {
                *output = Value::Null;
            }
        }
        Value::Array(outputs)
    }

    fn end_map(&mut self, key: u32, outcome: Result<Value, (&'static str, String)>) {
        let step = &self.steps[&key];
        let waits = vec![Wait::new("items", step.last_at, None, step.version)];
        // A list without items is waited for in the move that ends the wait.
        let waits = if step.version > self.snapshot.steps.get(&key).map_or(0, |before| before.version) {
            Vec::new()
        } else {
            waits
        };
        self.evaluated = true;
        self.only_lost = false;
        match outcome {
            Ok(output) => {
                let detail = Detail { waits, ..Detail::default() };
                self.move_step(key, StepEvent::ItemsDone, StepState::Complete, Some(detail));
                let step = &self.steps[&key];
                let (step, generation) = (step.uuid, step.generation);
                self.plan.map_outputs.push(MapOutput { step, generation, output: output.clone() });
                self.outputs.insert(key, output);
                self.dependency_done(key);
            }
            Err((kind, reason)) => {
                let detail =
                    Detail { waits, reason: Some(reason.clone()), error_type: Some(kind.into()), ..Detail::default() };
                self.move_step(key, StepEvent::ItemsDone, StepState::Error, Some(detail));
                self.step_failed(key, kind, &reason);
            }
        }
    }

    /// An item of a list that was there before: no budget of it is spent yet.
    fn item_from_the_beginning(&mut self, key: u32) {
        let step = self.touch(key);
        (step.failures, step.losses, step.due_at) = (0, 0, None);
        self.move_step(key, StepEvent::Rerun, StepState::Pending, None);
    }

    /// A part of a map's list; `None` if it has to be read first.
    fn values(&mut self, map: u32, from: u32, count: u32) -> Option<Vec<Value>> {
        let held = self.windows.get(&map).and_then(|(start, values)| {
            let skip = usize::try_from(from.checked_sub(*start)?).ok()?;
            values.get(skip..skip + count as usize).map(<[Value]>::to_vec)
        });
        if held.is_none() {
            // One part is read of each map, so it must hold whatever is asked for.
            let window = self.plan.lacks.items.entry(map).or_insert((from, count));
            let (start, end) = (window.0.min(from), (window.0 + window.1).max(from + count));
            *window = (start, end - start);
        }
        held
    }

    /// An item that was never sent, because the task ended or its input led nowhere, has no input:
    /// it needs its value once more. Answers whether it is here.
    pub(super) fn read_item_again(&mut self, key: u32) -> bool {
        let step = &self.steps[&key];
        let (index, item) = (step.index, step.item.unwrap_or_default());
        let value = self.values(index, item, 1).and_then(|mut values| values.pop());
        let is_here = value.is_some();
        self.item_values.extend(value.map(|value| (key, value)));
        is_here
    }

    /// As many as may be open at once, in the order of the list.
    fn create_items(&mut self, key: u32, for_each: &ForEach) {
        let map = self.maps[&key];
        let (from, open) = (map.next_item, map.open_items());
        let count = for_each.max_parallel.saturating_sub(open).min(map.items - from);
        // A suspended task starts nothing; its maps go on when it is resumed. One that has failed
        // starts no more.
        let stops = self.plan.task.state == TaskState::Suspended || for_each.has_failed(map.failed_items, map.items);
        if count == 0 || stops {
            return;
        }
        let Some(values) = self.values(key, from, count) else {
            return;
        };
        let map_step = &self.steps[&key];
        let (map_uuid, generation, priority) = (map_step.uuid, map_step.generation, map_step.priority);
        // One that began before may have left items behind, which are run again then.
        let began_before = map_step.version > 1;
        for (item, value) in (from..).zip(values) {
            let item_key = self.definition.key(key, Some(item));
            if self.steps.contains_key(&item_key) {
                self.touch(item_key).generation = generation;
                self.item_from_the_beginning(item_key);
            } else {
                if began_before {
                    self.plan.lacks.steps.insert(item_key);
                }
                let mut step = Step::new(item_uuid(map_uuid, item), key, generation, 0, priority, self.now);
                step.item = Some(item);
                self.steps.insert(item_key, step);
                self.created_items.insert(item_key);
            }
            self.item_values.insert(item_key, value);
            self.ready.push(Ready { step: item_key, event: StepEvent::Enqueue, waits: Vec::new() });
        }
        self.plan.task.open_steps += i32::try_from(count).unwrap_or(i32::MAX);
        self.plan.task_changed = true;
        self.maps.entry(key).and_modify(|map| map.next_item += count);
    }
}

/// An item's uuid follows from its map's: time-ordered like it, and the same however often it is decided.
fn item_uuid(map: Uuid, item: u32) -> Uuid {
    let hash =
        Sha256::new().chain_update(b"tasker-item-v1").chain_update(map.as_bytes()).chain_update(item.to_be_bytes());
    let mut bytes = [0_u8; 16];
    bytes[..6].copy_from_slice(&map.as_bytes()[..6]);
    bytes[6..].copy_from_slice(&hash.finalize()[..10]);
    uuid::Builder::from_bytes(bytes)
        .with_variant(uuid::Variant::RFC4122)
        .with_version(uuid::Version::SortRand)
        .into_uuid()
}
