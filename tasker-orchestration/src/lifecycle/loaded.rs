//! One task of a batch as its rows say: the snapshot that `decide` reads, and beside it what the messages,
//! the metrics and the trace need.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tasker_shared::state_machine::Snapshot;
use tasker_shared::state_machine::definition::MAX_ITEMS;
use tasker_shared::state_machine::plan::{Lacks, Plan, Step, Task};
use tasker_shared::store;
use tasker_shared::template::Compiled;
use tasker_shared::trace::log::Attempt;
use uuid::Uuid;

use super::read::{StepRow, TaskRow};

/// One task of the batch, as it was loaded.
#[derive(Debug)]
pub(super) struct LoadedTask {
    /// What its trace and its messages say of it.
    pub row: TaskRow,
    pub template: Arc<Compiled>,
    /// What `decide` reads.
    pub snapshot: Snapshot,
    /// The current attempts of the steps that events are about, by step.
    pub attempts: HashMap<Uuid, Attempt>,
    /// The keys of the loaded steps.
    pub keys: HashMap<Uuid, u32>,
    /// The steps that events are about, by key.
    pub about: HashSet<u32>,
    /// What decisions lacked and was loaded: what is still lacking does not exist.
    pub asked: Lacks,
    /// Every step is loaded, because an operator's act is about all of it.
    pub whole: bool,
}

impl LoadedTask {
    /// A task of which nothing but its row was loaded.
    pub fn new(task: Task, row: TaskRow, template: Arc<Compiled>, whole: bool) -> Self {
        Self {
            snapshot: Snapshot::of_row(task, template.definition.clone()),
            row,
            template,
            attempts: HashMap::new(),
            keys: HashMap::new(),
            about: HashSet::new(),
            asked: Lacks::default(),
            whole,
        }
    }

    /// The task's row as it was locked.
    pub fn task(&self) -> &Task {
        &self.snapshot.task
    }

    /// A loaded step, with its key.
    pub fn step(&self, step: Uuid) -> Option<(u32, &Step)> {
        let key = *self.keys.get(&step)?;
        Some((key, self.snapshot.steps.get(&key)?))
    }

    /// The index of a step in the template.
    pub fn index(&self, name: &str) -> Option<u32> {
        self.template.definition.by_name.get(name).copied()
    }

    /// The loaded step of a map, or of any step that is no item.
    pub fn step_of(&self, index: u32) -> Option<Uuid> {
        let step = self.snapshot.steps.get(&self.template.definition.key(index, None))?;
        Some(step.uuid)
    }

    /// Takes in a row; one that knows more of the attempt takes the place of one that knew what it counts for.
    pub fn put(&mut self, row: StepRow) -> Result<(), store::Error> {
        self.defines(&row)?;
        let StepRow { step, reported, passed, outcome, attempt, .. } = row;
        let (key, uuid) = (self.template.definition.key(step.index, step.item), step.uuid);
        self.keys.insert(uuid, key);
        if reported {
            self.about.insert(key);
        }
        if passed {
            self.snapshot.passed.insert(key);
        }
        match outcome {
            Some(outcome) => drop(self.snapshot.outcomes.insert(key, outcome)),
            None => drop(self.snapshot.outcomes.remove(&key)),
        }
        match attempt {
            Some(attempt) => drop(self.attempts.insert(uuid, attempt)),
            None => drop(self.attempts.remove(&uuid)),
        }
        self.snapshot.steps.insert(key, step);
        Ok(())
    }

    /// Refuses a row whose step the template does not have: whatever is decided next looks it up there.
    pub fn defines(&self, row: &StepRow) -> Result<(), store::Error> {
        let steps = self.template.definition.steps.len();
        let is_defined = usize::try_from(row.step.index).is_ok_and(|index| index < steps)
            && row.step.item.is_none_or(|item| item < MAX_ITEMS);
        if is_defined {
            return Ok(());
        }
        Err(store::Error::BadRow {
            table: "steps",
            column: "step_index",
            id: row.step.uuid.to_string(),
            problem: format!(
                "the template has {steps} steps and no such position ({:?})",
                (row.step.index, row.step.item)
            ),
        })
    }

    /// What the plan lacks that was not asked for yet.
    pub fn lacking(&self, plan: &Plan) -> Lacks {
        let Lacks { steps, outputs, collected, items } = &plan.lacks;
        let items = items.iter().filter(|(map, window)| self.asked.items.get(map) != Some(window));
        Lacks {
            steps: steps.difference(&self.asked.steps).copied().collect(),
            outputs: outputs.difference(&self.asked.outputs).copied().collect(),
            collected: collected.difference(&self.asked.collected).copied().collect(),
            items: items.map(|(map, window)| (*map, *window)).collect(),
        }
    }

    /// What a task that begins needs: uuids for its steps, time-ordered and with the milliseconds of its
    /// own, so by the database's clock; and what its schema says of its input.
    pub fn prepare_start(&mut self) {
        let milliseconds = &self.task().uuid.as_bytes()[..6];
        let mut bytes = [0_u8; 16];
        bytes[..6].copy_from_slice(milliseconds);
        self.snapshot.new_step_uuids = (0..self.template.definition.steps.len())
            .map(|_| {
                rand::fill(&mut bytes[6..]);
                uuid::Builder::from_bytes(bytes)
                    .with_variant(uuid::Variant::RFC4122)
                    .with_version(uuid::Version::SortRand)
                    .into_uuid()
            })
            .collect();
        let problems = self.template.schema.as_ref().and_then(|schema| schema.check(&self.task().input).err());
        self.snapshot.invalid_input = problems.map(|problems| problems.join("; ").chars().take(1000).collect());
    }
}

/// The tasks of a batch by their uuid.
pub(super) fn by_uuid(tasks: &mut [LoadedTask]) -> HashMap<Uuid, &mut LoadedTask> {
    tasks.iter_mut().map(|task| (task.task().uuid, task)).collect()
}
