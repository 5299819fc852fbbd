//! What a decision needs, read after the locks: the steps the hints are about, those behind them,
//! and the outputs they will read. This file must never decide anything itself.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use tasker_shared::state_machine::StepState;
use tasker_shared::state_machine::definition::MAX_ITEMS;
use tasker_shared::state_machine::plan::{Lacks, Map, Outcome, Plan, Signal};
use tasker_shared::store;
use tasker_shared::store::maps::{self, Window};
use tasker_shared::store::nested::ChildEnd;
use tasker_shared::store::steps::{self, Output, Place, StepRow};
use tasker_shared::store::tasks::TaskRow;
use tasker_shared::store::templates::Loaded;
use uuid::Uuid;

use super::locks::Wait;
use super::{Act, Error, Hint, Look, Shared, nested, waits};

/// One task of the batch, as it was loaded.
#[derive(Debug)]
pub(super) struct Work {
    pub row: TaskRow,
    pub template: Arc<Loaded>,
    pub steps: HashMap<Uuid, StepRow>,
    /// Outputs of steps that are not loaded, by index.
    pub outputs: HashMap<u32, Value>,
    /// Steps that were asked for an output and have none to come, or none yet.
    pub absent: HashSet<u32>,
    /// How far the maps among the loaded steps have come, by index.
    pub maps: HashMap<u32, Map>,
    /// Items to create, by index of their map.
    pub windows: HashMap<u32, (u32, Vec<Value>)>,
    /// What maps came to whose items are all done.
    pub collected: HashMap<u32, Result<Value, String>>,
    /// What decisions lacked and was asked for: what is still lacking does not exist.
    pub asked: Lacks,
    /// Every step is loaded, because an operator's act is about all of it.
    whole: bool,
    /// What became of tasks that its attempts started, where a hint asks.
    pub children: HashMap<(Uuid, i32), ChildEnd>,
    /// When steps must have ended, where a hint says that they are late.
    pub deadlines: HashMap<Uuid, DateTime<Utc>>,
    /// Signals that were kept; read only where the template waits for any.
    pub signals: Vec<Signal>,
}

impl Work {
    /// The place of a step in the template.
    pub fn index(&self, name: &str) -> Option<u32> {
        self.template.definition.by_name.get(name).copied()
    }

    pub fn key(&self, row: &StepRow) -> u32 {
        self.template.definition.key(row.step.index, row.step.item)
    }

    /// The loaded step of a map.
    pub fn map_step(&self, index: u32) -> Option<Uuid> {
        let is_map = |row: &&StepRow| row.step.index == index && row.step.item.is_none();
        self.steps.values().find(is_map).map(|row| row.step.uuid)
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
                "the template has {steps} steps and no such place ({:?})",
                (row.step.index, row.step.item)
            ),
        })
    }

    /// What the plan lacks that was not asked for yet.
    pub fn lacking(&self, plan: &Plan) -> Lacks {
        Lacks {
            steps: plan.lacks.steps.difference(&self.asked.steps).copied().collect(),
            outputs: plan.lacks.outputs.difference(&self.asked.outputs).copied().collect(),
            collected: plan.lacks.collected.difference(&self.asked.collected).copied().collect(),
            items: plan
                .lacks
                .items
                .iter()
                .filter(|(map, window)| self.asked.items.get(map) != Some(window))
                .map(|(map, window)| (*map, *window))
                .collect(),
        }
    }
}

/// What was loaded.
#[derive(Debug)]
pub(super) struct Batch {
    pub works: Vec<Work>,
    pub now: DateTime<Utc>,
    /// Tasks that were left out, because somebody else holds a step of theirs.
    pub held: HashSet<Uuid>,
}

/// Loads what the decisions need, after the locks: a statement of its own sees what they protect.
pub(super) async fn load(
    shared: &Shared,
    conn: &mut PgConnection,
    mut rows: Vec<TaskRow>,
    hints: &[Hint],
    wait: Wait,
) -> Result<Batch, Error> {
    // Times of an entity never go back, even if the database's clock does.
    let mut now = rows.iter().map(|row| row.read_at.max(row.task.last_at)).max().unwrap_or_default();
    let late: Vec<Uuid> = hints
        .iter()
        .filter(|hint| matches!(hint.look, Look::StepTotal(_)))
        .filter_map(|hint| hint.look.step())
        .collect();
    // A map that has taken too long takes its items with it.
    let items = if late.is_empty() { Vec::new() } else { maps::open_items(conn, &late).await? };
    let claimable: Vec<Uuid> = hints
        .iter()
        .filter(|hint| matches!(hint.look, Look::Lease(_) | Look::Queue(_)))
        .filter_map(|hint| hint.look.step())
        .chain(late)
        .chain(items.iter().copied())
        .collect();
    let unlocked = lock_claimable(conn, &claimable, wait).await?;
    let about: Vec<Uuid> = hints.iter().filter_map(|hint| hint.look.step()).chain(items).collect();
    let mut loaded = if about.is_empty() { Vec::new() } else { steps::load(conn, &about).await? };
    let mut held = held(&loaded, &unlocked);
    rows.retain(|row| !held.contains(&row.task.uuid));
    let whole: HashSet<Uuid> =
        hints.iter().filter(|hint| matches!(hint.look, Look::Operate(..))).map(|hint| hint.task).collect();
    if !whole.is_empty() {
        let mut all = steps::load_all(conn, &whole.iter().copied().collect::<Vec<_>>()).await?;
        // Of those that other events are about, more is known.
        all.append(&mut loaded);
        loaded = all;
    }
    now = loaded.iter().map(|row| row.read_at).max().map_or(now, |at| at.max(now));

    let ids: Vec<i32> = rows.iter().map(|row| row.template_id).collect();
    let templates = shared.templates(conn, &ids).await?;
    let mut works: Vec<Work> = Vec::with_capacity(rows.len());
    for row in rows {
        let template = templates.get(&row.template_id).cloned().ok_or_else(|| store::Error::BadRow {
            table: "tasks",
            column: "template_id",
            id: row.task.uuid.to_string(),
            problem: "no such template".into(),
        })?;
        let whole = whole.contains(&row.task.uuid);
        works.push(Work {
            row,
            template,
            steps: HashMap::new(),
            outputs: HashMap::new(),
            absent: HashSet::new(),
            maps: HashMap::new(),
            windows: HashMap::new(),
            collected: HashMap::new(),
            asked: Lacks::default(),
            whole,
            children: HashMap::new(),
            deadlines: HashMap::new(),
            signals: Vec::new(),
        });
    }
    let places: HashMap<Uuid, usize> =
        works.iter().enumerate().map(|(place, work)| (work.row.task.uuid, place)).collect();
    let put = |works: &mut Vec<Work>, rows: Vec<StepRow>| -> Result<(), Error> {
        for mut row in rows {
            if let Some(place) = places.get(&row.task_uuid) {
                works[*place].defines(&row)?;
                // A row that knows more of the attempt takes the place of one that knew what it counts for.
                row.passed |= works[*place].steps.get(&row.step.uuid).is_some_and(|before| before.passed);
                works[*place].steps.insert(row.step.uuid, row);
            }
        }
        Ok(())
    };
    put(&mut works, loaded)?;
    let mut by_hand_held = HashSet::new();
    if !whole.is_empty() {
        let mut by_hand = by_hand(&works, hints);
        if !by_hand.is_empty() {
            by_hand.extend(maps::open_items(conn, &by_hand).await?);
            let unlocked = lock_claimable(conn, &by_hand, wait).await?;
            let rows = steps::load(conn, &by_hand).await?;
            by_hand_held = self::held(&rows, &unlocked);
            now = rows.iter().map(|row| row.read_at).max().map_or(now, |at| at.max(now));
            put(&mut works, rows)?;
        }
    }
    nested::load(conn, &mut works, hints).await?;
    waits::load_deadlines(conn, &mut works, hints).await?;
    let signalled = waits::load_signals(conn, &mut works, hints).await?;
    if !signalled.is_empty() {
        let loaded = steps::load(conn, &signalled).await?;
        now = loaded.iter().map(|row| row.read_at).max().map_or(now, |at| at.max(now));
        put(&mut works, loaded)?;
    }
    let behind = behind(&works);
    if !behind.is_empty() {
        put(&mut works, steps::load_behind(conn, &behind).await?)?;
    }
    load_maps(conn, &mut works).await?;
    if !by_hand_held.is_empty() {
        works.retain(|work| !by_hand_held.contains(&work.row.task.uuid));
        held.extend(by_hand_held);
    }
    Ok(Batch { works, now, held })
}

/// Locks the steps that a worker may move at this moment; answers those that it did not lock. Who waits
/// for them in turn has all of them.
async fn lock_claimable(conn: &mut PgConnection, steps: &[Uuid], wait: Wait) -> Result<HashSet<Uuid>, Error> {
    if steps.is_empty() {
        return Ok(HashSet::new());
    }
    if wait == Wait::InTurn {
        steps::lock_claimable(conn, steps).await?;
        return Ok(HashSet::new());
    }
    let locked = steps::try_lock_claimable(conn, steps).await?;
    let mut unlocked: HashSet<Uuid> = steps.iter().copied().collect();
    for step in locked {
        unlocked.remove(&step);
    }
    Ok(unlocked)
}

/// The tasks of those of these steps that a worker may move, and that are not ours: somebody else holds
/// them. (What was moved meanwhile is guarded by the lock of its task again.)
fn held(loaded: &[StepRow], unlocked: &HashSet<Uuid>) -> HashSet<Uuid> {
    let is_claimable = |row: &&StepRow| matches!(row.step.state, StepState::Enqueued | StepState::InProgress);
    let is_held = |row: &&StepRow| unlocked.contains(&row.step.uuid) && is_claimable(row);
    loaded.iter().filter(is_held).map(|row| row.task_uuid).collect()
}

/// The steps that operators settle by hand: their attempts may be open.
fn by_hand(works: &[Work], hints: &[Hint]) -> Vec<Uuid> {
    let works: HashMap<Uuid, &Work> = works.iter().map(|work| (work.row.task.uuid, work)).collect();
    let of = |hint: &Hint| {
        let Look::Operate(_, Act::ByHand(name, ..)) = &hint.look else {
            return None;
        };
        let work = works.get(&hint.task)?;
        let index = work.index(name)?;
        work.steps.values().find(|row| row.step.index == index && row.step.item.is_none()).map(|row| row.step.uuid)
    };
    hints.iter().filter_map(of).collect()
}

/// The places of the direct dependents that are not loaded yet.
fn behind(works: &[Work]) -> Vec<Place> {
    let mut places = BTreeSet::new();
    for work in works {
        let (items, others): (Vec<&StepRow>, Vec<&StepRow>) =
            work.steps.values().partition(|row| row.step.item.is_some());
        let loaded: HashSet<u32> = others.iter().map(|row| row.step.index).collect();
        let graph = &work.template.definition.graph;
        let children = loaded.iter().flat_map(|index| graph.children(*index)).copied();
        // Behind an item stands its map.
        let behind = children.chain(items.iter().map(|row| row.step.index)).filter(|index| !loaded.contains(index));
        places.extend(behind.map(|index| (work.row.task.uuid, index, None)));
    }
    places.into_iter().collect()
}

/// Reads how far the maps among the loaded steps have come, and the items that take the places of
/// those that ended. No statement where there is no map.
async fn load_maps(conn: &mut PgConnection, works: &mut [Work]) -> Result<(), Error> {
    let is_map = |work: &Work, row: &StepRow| {
        row.step.item.is_none() && work.template.definition.steps[row.step.index as usize].for_each.is_some()
    };
    let of = |work: &Work| -> Vec<(Uuid, Uuid)> {
        let maps = work.steps.values().filter(|row| is_map(work, row));
        maps.map(|row| (row.task_uuid, row.step.uuid)).collect()
    };
    let wanted: Vec<(Uuid, Uuid)> = works.iter().flat_map(of).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let maps = maps::load(conn, &wanted).await?;
    let mut windows = Vec::new();
    for work in works.iter_mut() {
        let mut reported: HashMap<u32, u32> = HashMap::new();
        for row in work.steps.values().filter(|row| row.reported && row.step.item.is_some()) {
            *reported.entry(row.step.index).or_default() += 1;
        }
        let loaded =
            work.steps.values().filter_map(|row| Some((row.step.index, row.step.uuid, *maps.get(&row.step.uuid)?)));
        let loaded: Vec<(u32, Uuid, Map)> = loaded.collect();
        // A map that waits for its items has counted them.
        let uncounted = |row: &&StepRow| {
            is_map(work, row) && row.step.state == StepState::Waiting && !maps.contains_key(&row.step.uuid)
        };
        if let Some(row) = work.steps.values().find(uncounted) {
            return Err(Error::Store(store::Error::BadRow {
                table: "maps",
                column: "step_uuid",
                id: row.step.uuid.to_string(),
                problem: "the step waits for its items, and this row is missing".into(),
            }));
        }
        for (index, step, map) in loaded {
            let count = reported.get(&index).copied().unwrap_or_default().min(map.items - map.next_item);
            if count > 0 {
                windows.push(Window { task: work.row.task.uuid, step, from: map.next_item, count });
            }
            work.maps.insert(index, map);
        }
    }
    read_items(conn, works, &windows).await
}

pub(super) async fn read_items(conn: &mut PgConnection, works: &mut [Work], windows: &[Window]) -> Result<(), Error> {
    if windows.is_empty() {
        return Ok(());
    }
    let mut items = maps::load_items(conn, windows).await?;
    for work in works {
        let maps: Vec<(u32, Uuid)> =
            work.maps.keys().filter_map(|index| Some((*index, work.map_step(*index)?))).collect();
        for (index, step) in maps {
            if let Some(window) = items.remove(&step) {
                work.windows.insert(index, window);
            }
        }
    }
    Ok(())
}

/// Reads the outputs that steps about to become ready need and the batch does not hold: none
/// for a chain, one statement for a join.
pub(super) async fn load_outputs(conn: &mut PgConnection, works: &mut [Work], hints: &[Hint]) -> Result<(), Error> {
    let mut wanted: BTreeSet<(Uuid, u32)> = BTreeSet::new();
    for work in works.iter() {
        let definition = &work.template.definition;
        let (items, others): (Vec<&StepRow>, Vec<&StepRow>) =
            work.steps.values().partition(|row| row.step.item.is_some());
        let succeeded = |row: &&StepRow| row.reported && matches!(row.outcome, Some(Outcome::Success(_)));
        let ended: HashSet<u32> = others.iter().copied().filter(succeeded).map(|row| row.step.index).collect();
        let reported: HashSet<u32> = others.iter().filter(|row| row.reported).map(|row| row.step.index).collect();
        // What an operator's act may send: what it depends on has ended, in whatever way, or is
        // settled now. Rather too many than too few: it only costs reading an output in vain.
        let again = run_again(work, hints);
        let over = |row: &&StepRow| row.reported || row.step.state.is_terminal();
        let over: HashSet<u32> = if work.whole {
            others.iter().copied().filter(over).map(|row| row.step.index).collect()
        } else {
            HashSet::new()
        };
        // Each item that ended makes room for another one of its map.
        for index in items.iter().filter(|row| row.reported).map(|row| row.step.index).collect::<BTreeSet<u32>>() {
            let needs = definition.steps[index as usize].for_each.iter().flat_map(|for_each| &for_each.needs);
            wanted.extend(needs.map(|need| (work.row.task.uuid, *need)));
        }
        for row in others {
            let (step, parents) = (&row.step, definition.graph.parents(row.step.index));
            let may_become_ready = if work.whole {
                let open = matches!(step.state, StepState::Pending | StepState::Error | StepState::Cancelled);
                let next = open && step.held_by.is_none() && parents.iter().all(|parent| over.contains(parent));
                next || again.contains(&step.index)
            } else {
                let here = parents.iter().filter(|parent| reported.contains(parent)).count();
                step.held_by.is_none()
                    && usize::try_from(step.remaining_dependencies).is_ok_and(|left| (1..=here).contains(&left))
            };
            if may_become_ready {
                let needed = definition.steps[step.index as usize].needs.iter().filter(|need| !ended.contains(need));
                wanted.extend(needed.map(|need| (work.row.task.uuid, *need)));
            }
        }
    }
    if wanted.is_empty() {
        return Ok(());
    }
    read_outputs(conn, works, &wanted.into_iter().collect::<Vec<_>>()).await
}

pub(super) async fn read_outputs(
    conn: &mut PgConnection,
    works: &mut [Work],
    wanted: &[(Uuid, u32)],
) -> Result<(), Error> {
    let mut outputs = steps::outputs(conn, wanted).await?;
    for work in works {
        let task = work.row.task.uuid;
        for (_, index) in wanted.iter().filter(|(of, _)| *of == task) {
            match outputs.remove(&(task, *index)) {
                Some(Output::Given(output)) => drop(work.outputs.insert(*index, output)),
                Some(Output::Absent) => drop(work.absent.insert(*index)),
                None => {}
            }
        }
    }
    Ok(())
}

/// The most steps of one task that are loaded ahead at a time.
const AHEAD: usize = 10_000;

/// These steps, and those that follow from them, so many levels ahead.
pub(super) fn reach(work: &Work, steps: &BTreeSet<u32>, levels: usize) -> BTreeSet<u32> {
    let mut found = steps.clone();
    // Nothing stands behind an item.
    let is_step = |key: &u32| work.template.definition.place(*key).1.is_none();
    let mut level: Vec<u32> = steps.iter().copied().filter(is_step).collect();
    for _ in 1..levels {
        let graph = &work.template.definition.graph;
        let next: Vec<u32> = level.iter().flat_map(|step| graph.children(*step)).copied().collect();
        level = next.into_iter().filter(|step| found.len() < AHEAD && found.insert(*step)).collect();
        if level.is_empty() {
            break;
        }
    }
    found
}

/// The steps that an operator names to be run again.
fn run_again(work: &Work, hints: &[Hint]) -> HashSet<u32> {
    if !work.whole {
        return HashSet::new();
    }
    let of_task = hints.iter().filter(|hint| hint.task == work.row.task.uuid);
    let named = of_task.filter_map(|hint| match &hint.look {
        Look::Operate(_, Act::Rerun(names)) => Some(names),
        _ => None,
    });
    named.flatten().filter_map(|name| work.index(name)).collect()
}
