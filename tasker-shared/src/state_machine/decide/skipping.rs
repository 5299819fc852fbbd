//! Who runs at all: branches, conditions, joins, and what a skipped step means for those behind it.
//!
//! Each step is skipped once and each edge counted once in a generation, so that the cost of
//! skipping is that of the graph, however the skips are spread over settles.

use serde_json::Value;

use super::super::definition::Join;
use super::super::input::Scope;
use super::super::plan::{Detail, Wait};
use super::super::states::{StepEvent, StepState};
use super::{Pass, Ready};

/// What a step's dependencies mean for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Waits,
    Ready,
    Skipped,
}

impl Pass<'_, '_> {
    /// What the two counts say: dependencies that are still open, and those that were skipped.
    pub(super) fn standing(&self, key: u32) -> Standing {
        let step = &self.steps[&key];
        let all = if step.item.is_some() { 0 } else { self.definition.graph.parents(step.index).len() };
        let (open, skipped) = (step.remaining_dependencies, step.skipped_dependencies);
        let done = i32::try_from(all).unwrap_or(i32::MAX) - open - skipped;
        match self.defined(key).join {
            _ if all == 0 => Standing::Ready,
            Join::All if skipped > 0 => Standing::Skipped,
            Join::Any if done > 0 => Standing::Ready,
            Join::Taken if open == 0 && done > 0 => Standing::Ready,
            Join::All if open == 0 => Standing::Ready,
            _ if open == 0 => Standing::Skipped,
            _ => Standing::Waits,
        }
    }

    /// A step is done; those behind it may have become ready.
    pub(super) fn dependency_done(&mut self, index: u32) {
        if self.steps[&index].item.is_some() {
            return self.item_ended(index, None);
        }
        self.count_ended(index, false);
        self.skip_what_follows();
    }

    /// Skips a step that has not begun, and whatever that decides for those behind it.
    pub(super) fn skip(&mut self, index: u32, why: String) {
        self.skips.push((index, why));
        self.skip_what_follows();
    }

    /// Of a decision's dependents, those that its output did not choose.
    pub(super) fn not_chosen(&self, index: u32, output: &Value) -> Result<Vec<u32>, String> {
        let definition = self.defined(index);
        if definition.branches.is_empty() {
            return Ok(Vec::new());
        }
        let name_of = |branch: &u32| &*self.definition.steps[*branch as usize].name;
        let chosen: Option<Vec<&str>> = match (output.get("branch"), output.get("branches")) {
            (Some(Value::String(one)), None) => Some(vec![one]),
            (None, Some(Value::Array(some))) => some.iter().map(Value::as_str).collect(),
            _ => None,
        };
        let Some(chosen) = chosen else {
            return Err(format!(
                "the output of decision {} must be {{\"branch\": name}} or {{\"branches\": [names]}}, which may be empty",
                definition.name
            ));
        };
        if let Some(unknown) = chosen.iter().find(|name| !definition.branches.iter().any(|b| name_of(b) == **name)) {
            let known: Vec<&str> = definition.branches.iter().map(name_of).collect();
            let unknown: String = unknown.chars().take(60).collect();
            return Err(format!(
                "decision {} chose {unknown:?}, which is not one of its branches: {}",
                definition.name,
                known.join(", ")
            ));
        }
        Ok(definition.branches.iter().filter(|branch| !chosen.contains(&name_of(branch))).copied().collect())
    }

    pub(super) fn skip_branches(&mut self, decision: u32, not_chosen: &[u32]) {
        let name = &self.defined(decision).name;
        for branch in not_chosen {
            self.skips.push((*branch, format!("decision {name} did not choose it")));
        }
        self.skip_what_follows();
    }

    /// Whether the condition of a step that is ready lets it run; `None` without one.
    pub(super) fn condition_holds(&self, index: u32) -> Option<Result<bool, String>> {
        let condition = self.defined(index).when.as_ref()?;
        let outputs = |name: &str| self.output_named(name);
        let absent = |name: &str| self.is_absent(name);
        Some(condition.holds(Scope { input: &self.plan.task.input, outputs: &outputs, absent: &absent, item: None }))
    }

    pub(super) fn output_named(&self, name: &str) -> Option<&Value> {
        self.outputs.get(self.definition.by_name.get(name)?)
    }

    /// Whether a step has no output because it was skipped, or is not done yet: a step behind a
    /// `join` reads null of it.
    pub(super) fn is_absent(&self, name: &str) -> bool {
        let Some(index) = self.definition.by_name.get(name) else {
            return false;
        };
        let not_done = |state: StepState| state == StepState::Skipped || !state.is_terminal();
        self.snapshot.absent.contains(index) || self.steps.get(index).is_some_and(|step| not_done(step.state))
    }

    /// Notes which outputs a ready step reads that are not here. Where nothing can be skipped, all
    /// that exist were loaded with its dependencies.
    pub(super) fn note_lacking_outputs(&mut self, index: u32) {
        if !self.definition.reaches_far {
            return;
        }
        let definition = self.defined(index);
        let needs = match &definition.for_each {
            Some(for_each) if self.steps[&index].item.is_some() => &for_each.needs,
            _ => &definition.needs,
        };
        for need in needs {
            let known = self.outputs.contains_key(need)
                || self.snapshot.absent.contains(need)
                || self
                    .steps
                    .get(need)
                    .is_some_and(|step| !matches!(step.state, StepState::Complete | StepState::ResolvedManually));
            if !known {
                self.plan.lacks.outputs.insert(*need);
            }
        }
    }

    /// Counts a step that ended for each of those behind it.
    fn count_ended(&mut self, index: u32, skipped: bool) {
        for &child in self.children(index) {
            let Some(step) = self.steps.get(&child) else {
                self.plan.lacks.steps.insert(child);
                continue;
            };
            if step.state != StepState::Pending {
                continue;
            }
            let before = self.standing(child);
            let step = self.touch(child);
            step.remaining_dependencies -= 1;
            if skipped {
                step.skipped_dependencies += 1;
                self.skip_counted.insert(child);
            }
            match self.standing(child) {
                // A join that runs at the first of its dependencies was ready before.
                Standing::Ready if before != Standing::Ready => {
                    self.ready.push(Ready { step: child, event: StepEvent::Enqueue, waits: Vec::new() });
                }
                Standing::Skipped => {
                    let why = match self.defined(child).join {
                        Join::All => format!("step {} was skipped", self.defined(index).name),
                        Join::Taken | Join::Any => "every step it depends on was skipped".to_owned(),
                    };
                    self.skips.push((child, why));
                }
                _ => {}
            }
        }
    }

    /// A list, not a recursion: a chain may have 20,000 steps.
    pub(super) fn skip_what_follows(&mut self) {
        while let Some((key, why)) = self.skips.pop() {
            let Some(step) = self.steps.get(&key) else {
                self.plan.lacks.steps.insert(key);
                continue;
            };
            if step.state != StepState::Pending {
                continue;
            }
            let mut detail = Detail { reason: Some(why), ..Detail::default() };
            if let Some(held) = step.held_by {
                let (since, ordinal) = (step.ready_at.unwrap_or(step.last_at), step.version + 1);
                detail.waits.push(Wait::new(held.as_str(), since, None, ordinal));
                let step = self.touch(key);
                (step.held_by, step.ready_at) = (None, None);
                self.plan.task.held_steps -= 1;
            }
            self.move_step(key, StepEvent::Skip, StepState::Skipped, Some(detail));
            self.count_ended(key, true);
        }
    }
}
