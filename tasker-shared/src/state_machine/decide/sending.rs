//! Sending what is ready: its input, its room in the queue, its message.

use std::cmp::Reverse;

use serde_json::{Value, json};

use super::super::definition::StepDefinition;
use super::super::input::{Scope, default_input, stored_input};
use super::super::plan::{Detail, Due, HeldBy, Send, Wait};
use super::super::states::{StepEvent, StepState};
use super::super::wait::Work;
use super::{Pass, Ready};

impl Pass<'_, '_> {
    /// Resolves a ready step's input from the task's input and the outputs of earlier steps.
    pub(super) fn resolve(&self, index: u32) -> Result<Value, String> {
        if let Some(template) = &self.defined(index).input {
            let outputs = |name: &str| self.output_named(name);
            let absent = |name: &str| self.is_absent(name);
            let item_index = Value::from(self.steps[&index].item.unwrap_or_default());
            let item = self.item_values.get(&index).map(|value| (value, &item_index));
            let scope = Scope { input: &self.plan.task.input, outputs: &outputs, absent: &absent, item };
            return template.resolve_in(scope).map_err(|missing| missing.to_string());
        }
        if let (Some(item), Some(item_index)) = (self.item_values.get(&index), self.steps[&index].item) {
            return Ok(json!({"item": item, "item_index": item_index}));
        }
        let parents = self.definition.graph.parents(self.steps[&index].index);
        let parents = parents.iter().filter_map(|parent| {
            let name = &*self.definition.steps[*parent as usize].name;
            Some((name, self.outputs.get(parent)?))
        });
        default_input(&self.plan.task.input, parents)
    }

    /// Sends what finds room, holds the rest; answers how many were sent.
    pub(super) fn send_ready(&mut self, task_version: i32) -> usize {
        let mut sent = 0;
        // A step whose condition does not hold is skipped, and others may become ready by that.
        while !self.ready.is_empty() {
            sent += self.send_these(task_version);
            self.advance_maps();
        }
        sent
    }

    fn send_these(&mut self, task_version: i32) -> usize {
        let mut sent = 0;
        // The urgent first, for there may be room for some only; else in file order, so that a
        // plan does not depend on the order of the results.
        let steps = &self.steps;
        self.ready.sort_by_key(|ready| (Reverse(steps[&ready.step].priority), ready.step));
        // Hints come twice: a step that is due twice is sent once.
        self.ready.dedup_by_key(|ready| ready.step);
        for Ready { step: index, event, mut waits } in std::mem::take(&mut self.ready) {
            if event == StepEvent::Enqueue && self.steps[&index].state != StepState::Pending {
                continue;
            }
            let held = self.steps[&index].held_by;
            let work = &self.defined(index).work;
            // An item that is tried again keeps the input it had.
            let step = &self.steps[&index];
            let was_sent = step.item.is_none() || step.attempt > 0 || self.item_values.contains_key(&index);
            if !was_sent && held.is_none() && !self.read_item_again(index) {
                continue;
            }
            let is_old_item = self.steps[&index].item.is_some() && !self.item_values.contains_key(&index);
            let has_input = held.is_some() || event != StepEvent::Enqueue || is_old_item;
            if !has_input {
                self.note_lacking_outputs(index);
                let is_item = self.steps[&index].item.is_some();
                match self.condition_holds(index).filter(|_| !is_item) {
                    None | Some(Ok(true)) => {}
                    Some(Ok(false)) => {
                        let when = self.defined(index).when.as_ref().map_or("", |when| when.text());
                        self.skip(index, format!("its condition does not hold: {when}"));
                        continue;
                    }
                    Some(Err(reason)) => {
                        self.fail_by_definition(index, "invalid_condition", &reason);
                        continue;
                    }
                }
                if !is_item {
                    self.set_deadline(index);
                }
                if let Some(for_each) = self.defined(index).for_each.as_ref().filter(|_| !is_item) {
                    self.begin_map(index, for_each);
                    continue;
                }
                let resolve = || self.check_hold_group(index).and_then(|()| self.resolve(index));
                match work.takes_input().then(resolve) {
                    None => {}
                    Some(Ok(input)) => self.touch(index).input = Some(input),
                    Some(Err(reason)) => {
                        self.fail_by_definition(index, "missing_input", &reason);
                        continue;
                    }
                }
            }
            if *work != Work::Handler {
                self.begin_wait(index, waits);
                continue;
            }
            let admitted = self.admission(index, event, held.is_some());
            // Only now, and only for a handler: whoever reads an input before it is sent needs it whole.
            if !has_input && let Some(input) = self.touch(index).input.take() {
                let stored = stored_input(self.defined(index).input.as_ref(), input);
                self.touch(index).input = Some(stored);
            }
            if let Err(reason) = admitted {
                self.hold(index, reason);
                continue;
            }
            let step = self.touch(index);
            // A step that is ready but neither sent nor held became so while its task was suspended.
            if let Some(since) = step.ready_at.take().or_else(|| held.map(|_| step.last_at)) {
                step.held_by = None;
                let ordinal = step.version + 1;
                let reason = held.map_or("suspended", HeldBy::as_str);
                waits.push(Wait::new(reason, since, None, ordinal));
                self.plan.task.held_steps -= i32::from(held.is_some());
            }
            self.send(index, event, waits, task_version);
            sent += 1;
        }
        sent
    }

    /// It is ready for the first time in its generation: its total timeout begins to count.
    fn set_deadline(&mut self, index: u32) {
        let Some(total) = self.defined(index).total else {
            return;
        };
        let step = &self.steps[&index];
        let (uuid, at) = (step.uuid, step.ready_at.unwrap_or(self.now) + total);
        self.plan.deadlines.push((uuid, at));
        self.plan.due.push(Due { kind: "step_timeout", at, step: Some(uuid) });
    }

    /// Whether a ready step may be sent now, or why not.
    ///
    /// A retry needs no room, since its slot was its own a moment ago; but it heeds a pause. A lost
    /// attempt goes out again at once, whatever holds others: its slot is still its own, and
    /// what lies in a paused queue is not claimed.
    fn admission(&mut self, index: u32, event: StepEvent, admitting: bool) -> Result<(), HeldBy> {
        let definition = self.defined(index);
        if !matches!(event, StepEvent::Enqueue | StepEvent::RetryReady) {
            return Ok(());
        }
        if self.room.is_paused(&definition.queue) {
            return Err(HeldBy::Paused);
        }
        let limited = self.is_limited(definition) && !self.room.is_unlimited();
        if limited && !admitting {
            return Err(HeldBy::Limit);
        }
        if event == StepEvent::Enqueue {
            self.room.take(&definition.queue, &definition.handler, admitting)?;
        }
        if limited && !self.take_limit_slots(index, definition) {
            if event == StepEvent::Enqueue {
                self.room.give_back(&definition.queue);
            }
            return Err(HeldBy::Limit);
        }
        Ok(())
    }

    /// Whether any limit applies to it. Steps that are limited are always held first: only who
    /// admits them has the locks to say what is left.
    pub(super) fn is_limited(&self, definition: &StepDefinition) -> bool {
        !definition.limits.is_empty()
            || !self.room.limits_of(&self.definition.namespace, &definition.handler).is_empty()
    }

    fn take_limit_slots(&mut self, index: u32, definition: &StepDefinition) -> bool {
        let step = &self.steps[&index];
        let Ok(limits) = self.definition.limits(step.index, &self.plan.task.input) else {
            return false;
        };
        let mut names: Vec<String> = limits.into_iter().map(|limit| limit.name).collect();
        names.extend(self.room.limits_of(&self.definition.namespace, &definition.handler));
        self.room.take_limit_slots(step.uuid, &names)
    }

    /// Where its keys lead is known before it is ready; that they lead nowhere fails it.
    fn check_hold_group(&self, index: u32) -> Result<(), String> {
        let index = self.steps[&index].index;
        if self.definition.has_hold_group(index) {
            self.definition.hold_group(index, &self.plan.task.input)?;
        }
        Ok(())
    }

    pub(super) fn hold(&mut self, index: u32, reason: HeldBy) {
        let (now, position) = (self.now, self.steps[&index].index);
        let step = self.touch(index);
        let before = step.held_by.replace(reason);
        let uuid = step.uuid;
        if before.is_none() {
            let ready = *step.ready_at.get_or_insert(now);
            self.plan.task.held_steps += 1;
            self.plan.task_changed = true;
            let timeout = self.defined(index).queue_timeout;
            let due = |timeout| Due { kind: "queue_timeout", at: ready + timeout, step: Some(uuid) };
            self.plan.due.extend(timeout.map(due));
            self.plan.held_handlers.insert(uuid, self.defined(index).handler.clone());
        }
        let in_group = self.definition.has_hold_group(position) || reason == HeldBy::Limit;
        if in_group
            && before.is_none_or(|before| before != reason)
            && let Ok(group) = self.definition.hold_group(position, &self.plan.task.input)
        {
            self.plan.hold_groups.push((uuid, group));
        }
    }

    pub(super) fn send(&mut self, index: u32, event: StepEvent, waits: Vec<Wait>, task_version: i32) {
        let definition = self.defined(index);
        if event != StepEvent::LeaseExpired {
            self.touch(index).attempt += 1;
            let detail = (!waits.is_empty()).then(|| Detail { waits, ..Detail::default() });
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
            self.plan.due.push(Due { kind: "queue_timeout", at: self.now + timeout, step: Some(uuid) });
        }
        self.plan.sends.push(Send {
            priority,
            queue: definition.queue.clone(),
            handler: definition.handler.clone(),
            step: uuid,
            generation,
            attempt,
            task_version: Some(task_version),
        });
    }

    /// Where the new attempt's Enqueue stands in the log; `task_version` is the task's move that sends it.
    pub(super) fn opened(&mut self, index: u32, event: StepEvent, task_version: Option<i32>) {
        let step = self.touch(index);
        step.due_at = None;
        step.claim_token = None;
        step.claimed_by = None;
        step.lease_expires_at = None;
        step.enqueued_version = Some(step.version);
        step.enqueued_task_version = task_version;
        step.enqueued_event = Some(event);
        // The database writes the times of the move itself; `None` asks for it.
        step.enqueued_began_at = None;
        step.enqueued_at = None;
    }
}
