//! What must be true of every plan and after every settle, counted anew from the rows.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::World;
use tasker_shared::state_machine::definition::Join;
use tasker_shared::state_machine::plan::{Map, Plan, Step};
use tasker_shared::state_machine::retry::OnExhausted;
use tasker_shared::state_machine::states::{
    Change, StepEvent, StepState, TaskState, step_move_is_legal, task_move_is_legal,
};

impl World {
    /// Every move is legal, follows the one before it, and leaves a terminal state only by an operator.
    pub(super) fn check_moves(&self, plan: &Plan) {
        let mut now: BTreeMap<Uuid, (&str, i32)> = BTreeMap::new();
        now.insert(self.task.uuid, (self.task.state.as_str(), self.task.version));
        now.extend(self.steps.iter().map(|step| (step.uuid, (step.state.as_str(), step.version))));
        let mut generation = self.task.generation;
        let was_open = !self.task.state.is_terminal();
        for made in &plan.moves {
            let (state, version) = now.get(&made.entity).copied().unwrap_or(("pending", 0));
            assert_eq!((made.change.from(), made.version), (state, version + 1), "{made:?}");
            now.insert(made.entity, (made.change.to(), made.version));
            let repairs = ["OperatorRetry", "Rerun", "Skip", "ResolveManually", "CompleteManually"];
            let by_operator = repairs.contains(&made.change.event()) && made.actor.is_some();
            if made.entity == self.task.uuid {
                let Change::Task((from, event, to)) = made.change else { panic!("a task's move: {made:?}") };
                assert!(task_move_is_legal(from, event, to), "{from} –{event}→ {to}");
                if from.is_terminal() {
                    assert!(by_operator, "{from} is final: {made:?}");
                    generation += 1;
                }
            } else {
                let Change::Step((from, event, to)) = made.change else { panic!("a step's move: {made:?}") };
                assert!(step_move_is_legal(from, event, to), "{from} –{event}→ {to}");
                if from.is_terminal() {
                    // Items of a map that begins anew follow it; those that it stopped are tried again with it.
                    let is_item = self.steps.iter().any(|step| step.uuid == made.entity && step.item.is_some());
                    let repaired = was_open && from == StepState::Error;
                    assert!(by_operator || (is_item && made.change.event() == "Rerun"), "{from} is final: {made:?}");
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
    pub(super) fn check_rows(&self) {
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
    pub(super) fn check_map(&self, index: u32, map: Map, list: &[Value]) {
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

    pub(super) fn ended_by_its_items(&self, map: &Step) -> bool {
        let last = self.log.iter().rfind(|row| row.made.entity == map.uuid);
        last.is_some_and(|last| last.made.change.event() == StepEvent::ItemsDone.as_str())
    }

    pub(super) fn check_step(&self, step: &Step) {
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
            for mut row in self.attempt_history(step) {
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
    pub(super) fn counts_as_done(&self, step: &Step) -> bool {
        let policy = self.definition.steps[step.index as usize].retry.on_exhausted;
        match step.state {
            StepState::Complete | StepState::ResolvedManually => true,
            StepState::Skipped => self.is_passed(step),
            StepState::Error => policy == OnExhausted::Continue && self.is_passed(step),
            _ => false,
        }
    }

    /// Versions are consecutive, times never go back, attempts are 1..n.
    pub(super) fn check_log(&self) {
        let mut last: BTreeMap<Uuid, (i32, DateTime<Utc>, &str)> = BTreeMap::new();
        let mut attempts: BTreeMap<Uuid, i32> = BTreeMap::new();
        for row in &self.log {
            let made = &row.made;
            let before = last.insert(made.entity, (made.version, row.at, made.change.to()));
            let (version, at, state) = before.unwrap_or((0, self.created_at, "pending"));
            assert_eq!((made.version, made.change.from()), (version + 1, state), "{made:?}");
            assert!(row.began_at <= row.at && row.at >= at, "{row:?}");
            let waits_for_items = made.detail.as_ref().is_some_and(|detail| detail.waiting.as_deref() == Some("items"));
            let opens = made.change.to() == "enqueued" || (made.change.to() == "waiting" && !waits_for_items);
            if made.entity != self.task.uuid && opens {
                let attempt = attempts.entry(made.entity).or_default();
                *attempt += 1;
                let opened = made.attempt.unwrap() + i32::from(made.change.event() == "LeaseExpired");
                assert_eq!(opened, *attempt, "attempts are 1..n: {made:?}");
            }
        }
        for step in &self.steps {
            assert_eq!(step.attempt, attempts.get(&step.uuid).copied().unwrap_or(0));
            let (version, _, state) = last.get(&step.uuid).copied().unwrap_or((0, self.clock, "pending"));
            assert_eq!((step.version, step.state.as_str()), (version, state));
        }
    }
}
