//! What operators do: end, suspend, resume, give up, resolve, try again, run again, settle by hand.
//!
//! Each act leaves one row in the audit. Acts come over one queue, and stand in the order in
//! which they came. Those about the whole task are given every step of it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::super::plan::{Audit, Detail, Due, ManualOutput, Send, Step, Wait};
use super::super::retry::OnExhausted;
use super::super::states::{StepEvent, StepState, TaskEvent, TaskState};
use super::events::retry_wait;
use super::skipping::Standing;
use super::{ByHand, Operator, Pass, Ready};

/// Step names that one audit row lists at most; the count is always there.
const LISTED: usize = 100;

impl Pass<'_, '_> {
    pub(super) fn end(&mut self, event: TaskEvent, operator: Operator) -> bool {
        if self.plan.task.state.is_terminal() {
            return false;
        }
        let (action, ended) =
            if event == TaskEvent::Cancel { ("cancel", "cancelled") } else { ("terminate", "terminated") };
        self.plan.task.ended_by = Some(action);
        let reason = operator.reason.clone().unwrap_or_else(|| format!("{ended} by {}", operator.actor));
        self.plan.task.reason = Some(reason);
        self.end_by(event, TaskState::Cancelled, action, operator, None);
        true
    }

    /// The failures of a blocked task are final.
    pub(super) fn give_up(&mut self, operator: Operator) -> bool {
        if self.plan.task.state != TaskState::BlockedByFailures {
            return false;
        }
        let failure = self.plan.task.reason.take().map_or_else(String::new, |reason| format!(": {reason}"));
        self.plan.task.reason = Some(format!("{}{failure}", said("given up", &operator)));
        let kind = self.plan.task.error_type.clone();
        self.end_by(TaskEvent::GiveUp, TaskState::Error, "give_up", operator, kind);
        true
    }

    /// The failures of a blocked task were settled outside, and with them the task.
    pub(super) fn resolve_task(&mut self, operator: Operator) -> bool {
        if self.plan.task.state != TaskState::BlockedByFailures {
            return false;
        }
        self.plan.task.reason = Some(said("resolved", &operator));
        self.plan.task.error_type = None;
        self.end_by(TaskEvent::ResolveManually, TaskState::ResolvedManually, "resolve", operator, None);
        true
    }

    fn end_by(
        &mut self,
        event: TaskEvent,
        to: TaskState,
        action: &'static str,
        operator: Operator,
        kind: Option<String>,
    ) {
        // An end that is an error tells the whole story in the trace; the others say what the operator said.
        let reason = if to == TaskState::Error { self.plan.task.reason.clone() } else { operator.reason.clone() };
        let detail = Detail { reason, error_type: kind, ..Detail::default() };
        self.ready.clear();
        self.plan.task.suspended_from = None;
        self.move_task_by(event, to, Some(detail), Some(operator.actor.clone()));
        self.audit(action, operator, None);
        self.plan.cancel_open_steps = true;
    }

    pub(super) fn suspend(&mut self, operator: Operator) -> bool {
        let from = self.plan.task.state;
        if from.is_terminal() || from == TaskState::Suspended || self.fatal.is_some() {
            return false;
        }
        // What never rests in the row would have become this.
        self.plan.task.suspended_from = Some(if from.is_passing() { TaskState::StepsInProcess } else { from });
        let detail = Detail { reason: operator.reason.clone(), ..Detail::default() };
        self.move_task_by(TaskEvent::Suspend, TaskState::Suspended, Some(detail), Some(operator.actor.clone()));
        self.audit("suspend", operator, None);
        true
    }

    /// Sends again for every enqueued step, whether or not its old message is still there (a claim
    /// drops duplicates), fires what came due meanwhile, and evaluates what finished.
    pub(super) fn resume(&mut self, operator: Operator) -> bool {
        if self.plan.task.state != TaskState::Suspended {
            return false;
        }
        let from = self.plan.task.suspended_from.take();
        let to = if from == Some(TaskState::Pending) { TaskState::Pending } else { TaskState::EvaluatingResults };
        let detail = Detail { reason: operator.reason.clone(), ..Detail::default() };
        self.move_task_by(TaskEvent::Resume, to, Some(detail), Some(operator.actor.clone()));
        self.audit("resume", operator, None);
        if to == TaskState::Pending {
            // Its Start may have come and gone.
            let at = self.plan.task.run_at.map_or(self.now, |at| at.max(self.now));
            self.plan.due.push(Due { kind: "start", at, step: None });
            return true;
        }
        let mut open: Vec<u32> = self.steps.keys().copied().collect();
        open.sort_unstable();
        for index in open {
            self.resume_step(index);
        }
        // Nothing was created meanwhile.
        self.touched_maps.extend(self.maps.keys().copied());
        // A failure that ends the task was noted, but a suspended task does not end by itself.
        if self.plan.task.failed_steps > 0 && !self.definition.block_on_failure && self.any_failure_is_fatal() {
            let task = &self.plan.task;
            let kind = task.error_type.clone().unwrap_or_else(|| "error".into());
            self.fatal = Some((kind, task.reason.clone().unwrap_or_else(|| "a step failed".into())));
        }
        true
    }

    fn resume_step(&mut self, index: u32) {
        let step = &self.steps[&index];
        match step.state {
            StepState::Enqueued => self.send_again(index),
            _ if step.held_by.is_some() => {
                // What came due meanwhile was not counted.
                let (uuid, at) = (step.uuid, self.now);
                let due = |timeout| Due { kind: "queue_timeout", at: at + timeout, step: Some(uuid) };
                self.plan.due.extend(self.defined(index).queue_timeout.map(due));
            }
            StepState::WaitingForRetry if step.held_by.is_none() && step.due_at.is_some_and(|due| due <= self.now) => {
                let waits = vec![retry_wait(step)];
                self.ready.push(Ready { step: index, event: StepEvent::RetryReady, waits });
            }
            StepState::Pending if step.held_by.is_none() && self.standing(index) == Standing::Ready => {
                self.ready.push(Ready { step: index, event: StepEvent::Enqueue, waits: Vec::new() });
            }
            _ => {}
        }
    }

    fn any_failure_is_fatal(&self) -> bool {
        let policy = |step: &Step| self.definition.steps[step.index as usize].retry.on_exhausted;
        let failed: Vec<OnExhausted> = self
            .steps
            .values()
            .filter(|step| step.state == StepState::Error && step.item.is_none())
            .map(policy)
            .collect();
        let by_policy = failed.iter().filter(|policy| **policy != OnExhausted::Continue).count();
        // What is counted beyond the policies was a failure that no policy passes over.
        failed.contains(&OnExhausted::Fail)
            || i32::try_from(by_policy).is_ok_and(|count| count < self.plan.task.failed_steps)
    }

    /// The same attempt, a new message.
    fn send_again(&mut self, index: u32) {
        let step = &self.steps[&index];
        let defined = self.defined(index);
        if let Some(timeout) = defined.queue_timeout {
            self.plan.due.push(Due { kind: "queue_timeout", at: self.now + timeout, step: Some(step.uuid) });
        }
        self.plan.sends.push(Send {
            priority: step.priority,
            queue: defined.queue.clone(),
            handler: defined.handler.clone(),
            step: step.uuid,
            generation: step.generation,
            attempt: step.attempt,
            task_version: step.enqueued_task_version,
        });
    }

    /// Tries again what failed or was cancelled, or only `only` (of a blocked task).
    pub(super) fn retry(&mut self, operator: &Operator, only: &[String]) -> bool {
        let from = self.plan.task.state;
        if !matches!(from, TaskState::Error | TaskState::Cancelled | TaskState::BlockedByFailures) {
            return false;
        }
        let mut again = self.unfinished();
        let chosen: Vec<u32> = only.iter().filter_map(|name| self.definition.by_name.get(&**name).copied()).collect();
        again.retain(|key, _| only.is_empty() || chosen.contains(&self.steps[key].index));
        if !only.is_empty() && (from.is_terminal() || again.is_empty()) {
            return false;
        }
        self.begin_again(TaskEvent::OperatorRetry, operator);
        self.audit("retry", operator.clone(), Some(again.keys().copied().collect()));
        if let Some(reason) = &self.snapshot.invalid_input {
            self.fatal = Some(("invalid_input".into(), reason.clone()));
            return true;
        }
        if self.steps.is_empty() {
            self.create_steps();
            return true;
        }
        self.steps_again(again, &operator.actor);
        true
    }

    /// Runs these steps and all that follow from them once more, in a new generation. The others
    /// keep what they came to; what failed or was cancelled is tried again, as by a retry.
    pub(super) fn rerun(&mut self, operator: &Operator, names: &[String]) -> bool {
        let from: Vec<u32> = names.iter().filter_map(|name| self.definition.by_name.get(&**name).copied()).collect();
        let all_exist = from.len() == names.len() && from.iter().all(|of| self.steps.contains_key(of));
        if !self.plan.task.state.is_terminal() || from.is_empty() || !all_exist {
            return false;
        }
        let mut chosen: BTreeSet<u32> = BTreeSet::new();
        let mut open: Vec<u32> = from.clone();
        while let Some(index) = open.pop() {
            if chosen.insert(index) {
                open.extend(self.definition.graph.children(index));
            }
        }
        // What a decision that keeps its output did not choose stays skipped, unless it is named.
        let decided = |step: &u32| {
            let parents = self.definition.graph.parents(*step).iter().filter(|parent| !chosen.contains(parent));
            let mut decisions = parents.filter(|parent| self.defined(**parent).branches.contains(step));
            self.steps[step].state == StepState::Skipped && decisions.next().is_some()
        };
        let rerun = chosen.iter().filter(|step| from.contains(step) || !decided(step));
        let mut again = self.unfinished();
        again.extend(rerun.map(|index| (*index, StepEvent::Rerun)));
        self.begin_again(TaskEvent::Rerun, operator);
        self.audit("rerun", operator.clone(), Some(from));
        self.steps_again(again, &operator.actor);
        true
    }

    /// What failed or was cancelled, by key.
    fn unfinished(&self) -> BTreeMap<u32, StepEvent> {
        let failed = |step: &Step| matches!(step.state, StepState::Error | StepState::Cancelled);
        // An item that failed under a map that passed over it stays as it is.
        let passed_over = |step: &Step| {
            let map = step.item.and_then(|_| self.steps.get(&step.index));
            map.is_some_and(|map| map.state.is_terminal() && !failed(map))
        };
        let counts = |step: &Step| step.item.is_none() || (self.is_current_item(step) && !passed_over(step));
        let failed = self.steps.iter().filter(|(_, step)| failed(step) && counts(step));
        failed.map(|(key, _)| (*key, StepEvent::OperatorRetry)).collect()
    }

    /// A finished task begins its next generation, a blocked one goes on in its own.
    fn begin_again(&mut self, event: TaskEvent, operator: &Operator) {
        if self.plan.task.state.is_terminal() {
            self.plan.task.generation += 1;
            self.plan.task.generation_began_at = self.now;
            self.limit_total();
        }
        self.plan.task.failed_steps = 0;
        self.plan.task.error_type = None;
        self.plan.task.reason = None;
        self.plan.task.ended_by = None;
        let detail = Detail { reason: operator.reason.clone(), ..Detail::default() };
        self.move_task_by(event, TaskState::EvaluatingResults, Some(detail), Some(operator.actor.clone()));
    }

    /// Moves the steps back to pending, and counts anew what everything pending still waits for:
    /// what others took for done may not be done any more.
    fn steps_again(&mut self, mut again: BTreeMap<u32, StepEvent>, actor: &str) {
        let maps: Vec<u32> = again.keys().copied().filter(|key| self.maps.contains_key(key)).collect();
        for key in maps {
            let waits_again = self.definition.graph.parents(key).iter().any(|parent| again.contains_key(parent));
            if waits_again || again[&key] == StepEvent::Rerun {
                self.forget_map(key);
                again.retain(|other, _| self.definition.position(*other).1.is_none() || self.steps[other].index != key);
            }
        }
        for (&index, &event) in &again {
            self.item_again(index);
            let generation = self.plan.task.generation;
            let step = self.touch(index);
            step.generation = generation;
            step.failures = 0;
            step.losses = 0;
            step.due_at = None;
            self.move_step_by(index, event, StepState::Pending, None, Some(actor.to_owned()));
            self.plan.task.open_steps += 1;
        }
        let mut pending: Vec<u32> =
            self.steps.iter().filter(|(_, step)| step.state == StepState::Pending).map(|(key, _)| *key).collect();
        pending.sort_unstable();
        let mut skipped = Vec::new();
        for index in pending {
            self.count_again(index);
            match self.standing(index) {
                Standing::Ready if again.contains_key(&index) => {
                    self.ready.push(Ready { step: index, event: StepEvent::Enqueue, waits: Vec::new() });
                }
                Standing::Skipped => skipped.push((index, "what it depends on was skipped".to_owned())),
                _ => {}
            }
        }
        self.skips.extend(skipped);
        self.skip_what_follows();
        self.plan.task.failed_steps = i32::try_from(self.failed().count()).unwrap_or(i32::MAX);
        self.blame();
    }

    /// Counts from the edges what a pending step still waits for, and what of it was skipped.
    fn count_again(&mut self, key: u32) {
        if self.steps[&key].item.is_some() {
            return;
        }
        let (mut open, mut skipped) = (0, 0);
        for parent in self.definition.graph.parents(self.steps[&key].index) {
            match self.steps.get(parent).map(|step| step.state) {
                _ if self.counts_as_done(*parent) => {}
                Some(StepState::Skipped) => skipped += 1,
                _ => open += 1,
            }
        }
        let step = &self.steps[&key];
        if step.remaining_dependencies != open {
            self.touch(key).remaining_dependencies = open;
        }
        if self.steps[&key].skipped_dependencies != skipped {
            self.touch(key).skipped_dependencies = skipped;
            self.skip_counted.insert(key);
        }
    }

    /// Failed steps that nobody passed over, by key.
    fn failed(&self) -> impl Iterator<Item = u32> {
        // What a failed item means is for its map to say.
        let failed = self.steps.iter().filter(|(_, step)| step.state == StepState::Error && step.item.is_none());
        let failed = failed.map(|(key, _)| *key);
        failed.filter(|key| !self.counts_as_done(*key))
    }

    /// Whether the steps behind it take it for done. Only known where every step is loaded.
    fn counts_as_done(&self, key: u32) -> bool {
        let passed = self.snapshot.passed.contains(&key);
        self.steps.get(&key).is_some_and(|step| match step.state {
            StepState::Complete | StepState::ResolvedManually => true,
            StepState::Skipped => passed,
            StepState::Error => passed && self.defined(key).retry.on_exhausted == OnExhausted::Continue,
            _ => false,
        })
    }

    /// Skips, resolves or completes a step by hand; the steps behind it go on.
    pub(super) fn by_hand(&mut self, operator: Operator, name: &str, act: ByHand, output: Option<Value>) -> bool {
        if self.plan.task.state.is_terminal() {
            return false;
        }
        let Some(&index) = self.definition.by_name.get(name) else {
            return false;
        };
        let Some(step) = self.steps.get(&index) else {
            return false;
        };
        if step.state.is_terminal() && step.state != StepState::Error {
            return false;
        }
        // A decision is settled by a choice.
        let choice = output.as_ref().filter(|_| act != ByHand::Skip).unwrap_or(&Value::Null);
        let Ok(not_chosen) = self.not_chosen(index, choice) else {
            return false;
        };
        let (uuid, had_failed) = (step.uuid, step.state == StepState::Error);
        let was_passed = had_failed && self.counts_as_done(index);
        let waits = self.leave(index);
        let (event, to, action) = match act {
            ByHand::Skip => (StepEvent::Skip, StepState::Skipped, "skip_step"),
            ByHand::Resolve => (StepEvent::ResolveManually, StepState::ResolvedManually, "resolve_step"),
            ByHand::Complete => (StepEvent::CompleteManually, StepState::Complete, "complete_step"),
        };
        let detail = Detail { reason: operator.reason.clone(), waits, ..Detail::default() };
        self.move_step_by(index, event, to, Some(detail), Some(operator.actor.clone()));
        if let Some(output) = output {
            let step = &self.steps[&index];
            let (attempt, generation) = (step.attempt, step.generation);
            let actor = operator.actor.clone();
            self.plan.outputs.push(ManualOutput { step: uuid, attempt, generation, actor, output: output.clone() });
            self.outputs.insert(index, output);
        }
        if had_failed && !was_passed {
            self.plan.task.failed_steps -= 1;
            self.blame();
        }
        if !was_passed {
            self.skip_branches(index, &not_chosen);
            self.dependency_done(index);
        }
        self.evaluated = true;
        self.only_lost = false;
        self.audit(action, operator, Some(vec![index]));
        true
    }

    /// Takes a step out of whatever it is in, before a move that ends it: its attempt closes, its
    /// slot is given back, its items stop. Answers the waits that end there.
    pub(super) fn leave(&mut self, key: u32) -> Vec<Wait> {
        let step = &self.steps[&key];
        let from = step.state;
        let held = step
            .held_by
            .map(|held| Wait::new(held.as_str(), step.ready_at.unwrap_or(step.last_at), None, step.version + 1));
        let waited = (from == StepState::Waiting).then(|| self.waited(key));
        let retry = (from == StepState::WaitingForRetry).then(|| retry_wait(step));
        let waits: Vec<Wait> = retry.into_iter().chain(waited).chain(held).collect();
        if step.held_by.is_some() {
            self.plan.task.held_steps -= 1;
        }
        if from == StepState::InProgress {
            self.plan.tell.extend(step.claimed_by.clone());
        }
        if from.is_in_flight() {
            self.close(key);
        }
        self.ready.retain(|ready| ready.step != key);
        let step = self.touch(key);
        (step.held_by, step.ready_at, step.due_at) = (None, None, None);
        if from == StepState::Waiting && self.maps.contains_key(&key) {
            self.stop_items(key);
        }
        waits
    }

    /// Ends the open items of a map that will not wait for them any more. All of them are loaded.
    fn stop_items(&mut self, map: u32) {
        let open = |step: &Step| step.index == map && step.item.is_some() && !step.state.is_terminal();
        let mut items: Vec<u32> = self.steps.iter().filter(|(_, step)| open(step)).map(|(key, _)| *key).collect();
        items.sort_unstable();
        for key in items {
            let detail = Detail {
                waits: self.leave(key),
                reason: Some("its map waits for it no more".into()),
                error_type: Some("cancelled".into()),
                ..Detail::default()
            };
            self.move_step(key, StepEvent::Cancel, StepState::Cancelled, Some(detail));
        }
    }

    /// Says whose failure the task's row tells of, after one of them is gone.
    fn blame(&mut self) {
        let left = self.failed().min();
        self.plan.task.error_type = None;
        self.plan.task.reason = left.map(|key| format!("step {} failed", self.defined(key).name));
        self.plan.task_changed = true;
    }

    fn audit(&mut self, action: &'static str, operator: Operator, steps: Option<Vec<u32>>) {
        let details = steps.filter(|steps| !steps.is_empty()).map(|steps| {
            let names: Vec<&str> = steps.iter().take(LISTED).map(|key| &*self.defined(*key).name).collect();
            json!({"steps": names, "count": steps.len()})
        });
        self.plan.audit.push(Audit { action, actor: operator.actor, reason: operator.reason, details });
    }
}

fn said(what: &str, operator: &Operator) -> String {
    let why = operator.reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
    format!("{what} by {}{why}", operator.actor)
}
