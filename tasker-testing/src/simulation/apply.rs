//! What a settle writes: a plan becomes rows and messages, as `store/apply.sql` and
//! `cancel_open_steps.sql` do it.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Message, Row, Settled, World};
use tasker_shared::state_machine::attempt_history::{Claimed, attempt_history};
use tasker_shared::state_machine::definition::Join;
use tasker_shared::state_machine::input::{BY_REFERENCE, Scope};
use tasker_shared::state_machine::plan::{Detail, Due, Map, Move, Plan, Step, Task, Wait};
use tasker_shared::state_machine::states::{Change, StepEvent, StepState, TaskEvent};
use tasker_shared::state_machine::wait::Work;

impl World {
    /// `store/apply.rs`.
    pub(super) fn apply(&mut self, plan: &Plan, began_at: DateTime<Utc>) {
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
        let resumed = plan.moves.iter().any(|made| made.change.event() == TaskEvent::Resume.as_str());
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
            if row.enqueued_event == Some(StepEvent::Enqueue) && first && !was_held && !joins_any && !left_out {
                assert_eq!(row.input.as_ref(), self.expected_input(step).as_ref(), "the input of step {step}");
            }
            self.ids += 1;
            self.messages.push(Message { id: i64::try_from(self.ids).unwrap(), step, attempt: send.attempt });
        }
        let rebuilt = closed.iter().flat_map(|(step, attempt)| {
            let row = before.iter().find(|row| row.uuid == *step && row.attempt == *attempt && self.has_attempt(row));
            row.map(|row| self.attempt_history(row)).unwrap_or_default()
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

    /// The rows of steps, the log and the timers.
    pub(super) fn write_steps(&mut self, plan: &Plan, began_at: DateTime<Utc>, at: DateTime<Utc>) {
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
    pub(super) fn write_maps(&mut self, plan: &Plan) {
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
    pub(super) fn write_children(&mut self, plan: &Plan) {
        for child in &plan.children {
            let step = self.index_of(child.step, plan);
            self.children.push((step, child.attempt, child.task.clone()));
        }
        let left: Vec<u32> = plan.left_children.iter().map(|step| self.index_of(*step, plan)).collect();
        let ended = plan.task.state.is_terminal();
        self.children.retain(|(step, ..)| !ended && !left.contains(step));
    }

    /// Whether an attempt of it is open: its message, its claim, its report, or the task it waits for.
    pub(super) fn has_attempt(&self, step: &Step) -> bool {
        let waits_for_child =
            || !self.is_map(step) && matches!(self.definition.steps[step.index as usize].work, Work::Task(_));
        step.state.is_in_flight() || (step.state == StepState::Waiting && waits_for_child())
    }

    /// A step's input, out of every output there is; `None` if it reads one that is not there.
    pub(super) fn expected_input(&self, index: u32) -> Option<Value> {
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

    pub(super) fn index_of(&self, step: Uuid, plan: &Plan) -> u32 {
        let mut rows = self.steps.iter().chain(&plan.new_steps);
        self.key(rows.find(|row| row.uuid == step).expect("it is one of the task's steps"))
    }

    /// `store/cancel_open_steps.sql`; answers the attempts it closed.
    pub(super) fn cancel_open_steps(&mut self, began_at: DateTime<Utc>, at: DateTime<Utc>) -> Vec<(Uuid, i32)> {
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
                change: Change::Step((step.state, StepEvent::Cancel, StepState::Cancelled)),
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

    /// The open attempt's moves as the columns tell them, and as an orchestrator hands them to the
    /// exporter without reading the log.
    pub(super) fn attempt_history(&self, step: &Step) -> Vec<Row> {
        let claimed = self.attempt(step.uuid, step.attempt).map(|attempt| Claimed {
            worker: &attempt.worker,
            began_at: attempt.claim_began_at,
            at: attempt.claimed_at,
            reported: attempt.report.as_ref().map(|report| (report.began_at, report.at)),
        });
        let moves = attempt_history(step, claimed);
        assert!(!moves.is_empty(), "an open attempt has its Enqueue");
        moves.into_iter().map(|(made, began_at, at)| Row { made, began_at, at }).collect()
    }
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
