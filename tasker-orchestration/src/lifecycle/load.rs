//! What a decision needs, read after the locks: the steps the events are about, those behind them,
//! and the outputs they will read. Decides, and loads what deciding lacked, until nothing is lacking.
//!
//! This file must never say what a task does next: `decide` does, which it calls.

use std::collections::{BTreeSet, HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::state_machine::flow::LimitSlots;
use tasker_shared::state_machine::plan::{Lacks, Map, Outcome, Plan, Room, Step, Task};
use tasker_shared::state_machine::{Event, StepState, TaskState, decide};
use tasker_shared::store;
use tracing::instrument;
use uuid::Uuid;

use super::loaded::{LoadedTask, by_uuid};
use super::locks::Wait;
use super::maps::{self, Window};
use super::read::{self, Output, Position, StepRow, TaskRow};
use super::{About, Error, Shared, nested, waits};

/// What was loaded.
#[derive(Debug)]
pub(super) struct Batch {
    pub tasks: Vec<LoadedTask>,
    pub now: DateTime<Utc>,
    /// Tasks that were left out, because somebody else holds a step of theirs.
    pub held: HashSet<Uuid>,
}

/// Loads what the decisions need, after the locks: a statement of its own sees what they protect.
pub(super) async fn load(
    shared: &Shared,
    conn: &mut PgConnection,
    mut rows: Vec<(Task, TaskRow)>,
    events: &[About<'_>],
    wait: Wait,
) -> Result<Batch, Error> {
    // Times of an entity never go back, even if the database's clock does.
    let mut now = rows.iter().map(|(task, row)| row.read_at.max(task.last_at)).max().unwrap_or_default();
    let steps_of = |wanted: fn(&Event) -> bool| {
        events.iter().filter(move |about| wanted(about.event)).filter_map(|about| about.event.step())
    };
    let late: Vec<Uuid> = steps_of(|event| matches!(event, Event::StepTotalDue { .. })).collect();
    // A map that has taken too long takes its items with it.
    let items = if late.is_empty() { Vec::new() } else { maps::open_items(conn, &late).await? };
    let claimable: Vec<Uuid> = steps_of(|event| matches!(event, Event::LeaseDue { .. } | Event::QueueDue { .. }))
        .chain(late)
        .chain(items.iter().copied())
        .collect();
    let unlocked = lock_claimable(conn, &claimable, wait).await?;
    let about: Vec<Uuid> = steps_of(|_| true).chain(items).collect();
    let mut loaded = if about.is_empty() { Vec::new() } else { read::load_steps(conn, &about).await? };
    let mut held = held(&loaded, &unlocked);
    rows.retain(|(task, _)| !held.contains(&task.uuid));
    let whole: HashSet<Uuid> =
        events.iter().filter(|about| about.event.is_about_all()).map(|about| about.task).collect();
    if !whole.is_empty() {
        let mut all = read::load_all_steps(conn, &whole.iter().copied().collect::<Vec<_>>()).await?;
        // Of those that other events are about, more is known.
        all.append(&mut loaded);
        loaded = all;
    }
    now = loaded.iter().map(|row| row.read_at).max().map_or(now, |at| at.max(now));

    let ids: Vec<i32> = rows.iter().map(|(_, row)| row.template_id).collect();
    let templates = shared.templates(conn, &ids).await?;
    let mut tasks: Vec<LoadedTask> = Vec::with_capacity(rows.len());
    for (task, row) in rows {
        let template = templates.get(&row.template_id).cloned().ok_or_else(|| store::Error::BadRow {
            table: "tasks",
            column: "template_id",
            id: task.uuid.to_string(),
            problem: "no such template".into(),
        })?;
        let whole = whole.contains(&task.uuid);
        tasks.push(LoadedTask::new(task, row, template, whole));
    }
    let positions: HashMap<Uuid, usize> =
        tasks.iter().enumerate().map(|(position, task)| (task.task().uuid, position)).collect();
    let put = |tasks: &mut Vec<LoadedTask>, rows: Vec<StepRow>| -> Result<(), Error> {
        for row in rows {
            if let Some(position) = positions.get(&row.task_uuid) {
                tasks[*position].put(row)?;
            }
        }
        Ok(())
    };
    put(&mut tasks, loaded)?;
    let mut by_hand_held = HashSet::new();
    if !whole.is_empty() {
        let mut by_hand = by_hand(&tasks, events);
        if !by_hand.is_empty() {
            by_hand.extend(maps::open_items(conn, &by_hand).await?);
            let unlocked = lock_claimable(conn, &by_hand, wait).await?;
            let rows = read::load_steps(conn, &by_hand).await?;
            by_hand_held = self::held(&rows, &unlocked);
            now = rows.iter().map(|row| row.read_at).max().map_or(now, |at| at.max(now));
            put(&mut tasks, rows)?;
        }
    }
    nested::load(conn, &mut tasks, events).await?;
    waits::load_deadlines(conn, &mut tasks, events).await?;
    let signalled = waits::load_signals(conn, &mut tasks, events).await?;
    if !signalled.is_empty() {
        let loaded = read::load_steps(conn, &signalled).await?;
        now = loaded.iter().map(|row| row.read_at).max().map_or(now, |at| at.max(now));
        put(&mut tasks, loaded)?;
    }
    let behind = behind(&tasks);
    if !behind.is_empty() {
        put(&mut tasks, read::load_steps_behind(conn, &behind).await?)?;
    }
    load_maps(conn, &mut tasks).await?;
    if !by_hand_held.is_empty() {
        tasks.retain(|task| !by_hand_held.contains(&task.task().uuid));
        held.extend(by_hand_held);
    }
    for about in events {
        let begins = |task: &LoadedTask| match about.event {
            Event::Start => task.task().state == TaskState::Pending,
            Event::Retry { .. } => task.keys.is_empty(),
            _ => false,
        };
        let task = positions.get(&about.task).and_then(|position| tasks.get_mut(*position));
        if let Some(task) = task.filter(|task| task.task().uuid == about.task && begins(task)) {
            task.prepare_start();
        }
    }
    Ok(Batch { tasks, now, held })
}

/// Locks the steps that a worker may move at this moment; answers those that it did not lock. Who waits
/// for them in turn has all of them.
async fn lock_claimable(conn: &mut PgConnection, steps: &[Uuid], wait: Wait) -> Result<HashSet<Uuid>, Error> {
    if steps.is_empty() {
        return Ok(HashSet::new());
    }
    if wait == Wait::InTurn {
        read::lock_claimable(conn, steps).await?;
        return Ok(HashSet::new());
    }
    let locked = read::try_lock_claimable(conn, steps).await?;
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
fn by_hand(tasks: &[LoadedTask], events: &[About<'_>]) -> Vec<Uuid> {
    let tasks: HashMap<Uuid, &LoadedTask> = tasks.iter().map(|task| (task.task().uuid, task)).collect();
    let of = |about: &About<'_>| {
        let Event::ByHand { step, .. } = about.event else {
            return None;
        };
        let task = tasks.get(&about.task)?;
        task.step_of(task.index(step)?)
    };
    events.iter().filter_map(of).collect()
}

/// The direct dependents that are not loaded yet.
fn behind(tasks: &[LoadedTask]) -> Vec<Position> {
    let mut positions = BTreeSet::new();
    for task in tasks {
        let steps = task.snapshot.steps.values();
        let (items, others): (Vec<&Step>, Vec<&Step>) = steps.partition(|step| step.item.is_some());
        let loaded: HashSet<u32> = others.iter().map(|step| step.index).collect();
        let graph = &task.template.definition.graph;
        let children = loaded.iter().flat_map(|index| graph.children(*index)).copied();
        // Behind an item stands its map.
        let behind = children.chain(items.iter().map(|step| step.index)).filter(|index| !loaded.contains(index));
        positions.extend(behind.map(|index| (task.task().uuid, index, None)));
    }
    positions.into_iter().collect()
}

/// Reads how far the maps among the loaded steps have come, and the items that take the place of
/// those that ended. No statement where there is no map.
async fn load_maps(conn: &mut PgConnection, tasks: &mut [LoadedTask]) -> Result<(), Error> {
    let is_map = |task: &LoadedTask, step: &Step| {
        step.item.is_none() && task.template.definition.steps[step.index as usize].for_each.is_some()
    };
    let of = |task: &LoadedTask| -> Vec<(Uuid, Uuid)> {
        let maps = task.snapshot.steps.values().filter(|step| is_map(task, step));
        maps.map(|step| (task.task().uuid, step.uuid)).collect()
    };
    let wanted: Vec<(Uuid, Uuid)> = tasks.iter().flat_map(of).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let maps = maps::load(conn, &wanted).await?;
    let mut windows = Vec::new();
    for task in tasks.iter_mut() {
        let mut reported: HashMap<u32, u32> = HashMap::new();
        for step in task.about.iter().filter_map(|key| task.snapshot.steps.get(key)).filter(|step| step.item.is_some())
        {
            *reported.entry(step.index).or_default() += 1;
        }
        let steps = task.snapshot.steps.values();
        let loaded: Vec<(u32, Uuid, Map)> =
            steps.filter_map(|step| Some((step.index, step.uuid, *maps.get(&step.uuid)?))).collect();
        // A map that waits for its items has counted them.
        let uncounted =
            |step: &&Step| is_map(task, step) && step.state == StepState::Waiting && !maps.contains_key(&step.uuid);
        if let Some(step) = task.snapshot.steps.values().find(uncounted) {
            return Err(Error::Store(store::Error::BadRow {
                table: "maps",
                column: "step_uuid",
                id: step.uuid.to_string(),
                problem: "the step waits for its items, and this row is missing".into(),
            }));
        }
        for (index, step, map) in loaded {
            let count = reported.get(&index).copied().unwrap_or_default().min(map.items - map.next_item);
            if count > 0 {
                windows.push(Window { task: task.task().uuid, step, from: map.next_item, count });
            }
            task.snapshot.maps.insert(index, map);
        }
    }
    read_items(conn, tasks, &windows).await
}

async fn read_items(conn: &mut PgConnection, tasks: &mut [LoadedTask], windows: &[Window]) -> Result<(), Error> {
    if windows.is_empty() {
        return Ok(());
    }
    let mut items = maps::load_items(conn, windows).await?;
    for task in tasks {
        let maps: Vec<(u32, Uuid)> =
            task.snapshot.maps.keys().filter_map(|index| Some((*index, task.step_of(*index)?))).collect();
        for (index, step) in maps {
            if let Some(window) = items.remove(&step) {
                task.snapshot.windows.insert(index, window);
            }
        }
    }
    Ok(())
}

/// Reads the outputs that steps about to become ready need and the batch does not hold: none
/// for a chain, one statement for a join.
pub(super) async fn load_outputs(
    conn: &mut PgConnection,
    tasks: &mut [LoadedTask],
    events: &[About<'_>],
) -> Result<(), Error> {
    let mut wanted: BTreeSet<(Uuid, u32)> = BTreeSet::new();
    for task in tasks.iter() {
        let (uuid, definition) = (task.task().uuid, &task.template.definition);
        let is_about = |step: &Step| task.about.contains(&definition.key(step.index, step.item));
        let steps = task.snapshot.steps.values();
        let (items, others): (Vec<&Step>, Vec<&Step>) = steps.partition(|step| step.item.is_some());
        let succeeded = |step: &&&Step| {
            is_about(step) && matches!(task.snapshot.outcomes.get(&step.index), Some(Outcome::Success(_)))
        };
        let ended: HashSet<u32> = others.iter().filter(succeeded).map(|step| step.index).collect();
        let reported: HashSet<u32> = others.iter().filter(|step| is_about(step)).map(|step| step.index).collect();
        // What an operator's act may send: what it depends on has ended, in whatever way, or is
        // settled now. Rather too many than too few: it only costs reading an output in vain.
        let again = run_again(task, events);
        let over = |step: &&&Step| task.whole && (is_about(step) || step.state.is_terminal());
        let over: HashSet<u32> = others.iter().filter(over).map(|step| step.index).collect();
        // Each item that ended makes room for another one of its map.
        for index in items.iter().filter(|step| is_about(step)).map(|step| step.index).collect::<BTreeSet<u32>>() {
            let needs = definition.steps[index as usize].for_each.iter().flat_map(|for_each| &for_each.needs);
            wanted.extend(needs.map(|need| (uuid, *need)));
        }
        for step in others {
            let parents = definition.graph.parents(step.index);
            let may_become_ready = if task.whole {
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
                wanted.extend(needed.map(|need| (uuid, *need)));
            }
        }
    }
    if wanted.is_empty() {
        return Ok(());
    }
    read_outputs(conn, tasks, &wanted.into_iter().collect::<Vec<_>>()).await
}

async fn read_outputs(conn: &mut PgConnection, tasks: &mut [LoadedTask], wanted: &[(Uuid, u32)]) -> Result<(), Error> {
    let mut outputs = read::outputs(conn, wanted).await?;
    for task in tasks {
        let uuid = task.task().uuid;
        for (_, index) in wanted.iter().filter(|(of, _)| *of == uuid) {
            match outputs.remove(&(uuid, *index)) {
                Some(Output::Given(output)) => drop(task.snapshot.outputs.insert(*index, output)),
                Some(Output::Absent) => drop(task.snapshot.absent.insert(*index)),
                None => {}
            }
        }
    }
    Ok(())
}

/// The steps that an operator names to be run again.
fn run_again(task: &LoadedTask, events: &[About<'_>]) -> HashSet<u32> {
    if !task.whole {
        return HashSet::new();
    }
    let of_task = events.iter().filter(|about| about.task == task.task().uuid);
    let named = of_task.filter_map(|about| match about.event {
        Event::Rerun { from, .. } => Some(from),
        _ => None,
    });
    named.flatten().filter_map(|name| task.index(name)).collect()
}

/// Decides, and where a skipped step reaches further than what was loaded, loads that and decides
/// again: one plan a task, in the same order. Each time it loads twice as far ahead, so that a long
/// chain of skipped steps is decided a few times and not once a step; a batch whose templates skip
/// nothing decides once.
pub(super) async fn decide_all(
    shared: &Shared,
    conn: &mut PgConnection,
    (tasks, events): (&mut [LoadedTask], &[About<'_>]),
    limits: &LimitSlots,
    now: DateTime<Utc>,
) -> Result<(Vec<Plan>, LimitSlots), Error> {
    let reaches_far = tasks.iter().any(|task| task.template.definition.reaches_far);
    let mut of_task: HashMap<Uuid, Vec<&Event>> = HashMap::new();
    for about in events {
        of_task.entry(about.task).or_default().push(about.event);
    }
    let mut ahead = 1;
    loop {
        let (plans, limits, lacking) = shared.admission.with_room(|room| {
            let before = reaches_far.then(|| room.clone());
            room.set_limit_slots(limits.clone());
            let events = |task: &LoadedTask| of_task.get(&task.task().uuid).map_or(&[][..], Vec::as_slice);
            let plans: Vec<Plan> = tasks.iter().map(|task| decide_one(task, events(task), room, now)).collect();
            let limits = room.set_limit_slots(LimitSlots::default());
            let lacking: Vec<Lacks> = tasks.iter().zip(&plans).map(|(task, plan)| task.lacking(plan)).collect();
            if let Some(before) = before.filter(|_| lacking.iter().any(|lacks| *lacks != Lacks::default())) {
                *room = before;
            }
            (plans, limits, lacking)
        });
        if lacking.iter().all(|lacks| *lacks == Lacks::default()) {
            return Ok((plans, limits));
        }
        if load_lacking(conn, tasks, lacking, ahead).await? {
            ahead *= 2;
        }
    }
}

/// Decides one task; its log lines bear the task's ids.
#[instrument(skip_all, fields(correlation_id = task.row.correlation_id, task_uuid = %task.task().uuid))]
fn decide_one(task: &LoadedTask, events: &[&Event], room: &mut Room, now: DateTime<Utc>) -> Plan {
    let plan = decide(&task.snapshot, events, room, now);
    if plan.ignored > 0 {
        tracing::debug!(events = plan.ignored, "events that came late, twice or out of order changed nothing");
    }
    plan
}

/// Loads what decisions lacked; answers whether steps were among it.
async fn load_lacking(
    conn: &mut PgConnection,
    tasks: &mut [LoadedTask],
    lacking: Vec<Lacks>,
    ahead: usize,
) -> Result<bool, Error> {
    let (mut positions, mut wanted, mut windows) = (Vec::new(), Vec::new(), Vec::new());
    for (task, lacks) in tasks.iter_mut().zip(lacking) {
        let uuid = task.task().uuid;
        let position = |key| {
            let (index, item) = task.template.definition.position(key);
            (uuid, index, item)
        };
        positions.extend(reach(task, &lacks.steps, ahead).into_iter().map(position));
        wanted.extend(lacks.outputs.iter().map(|step| (uuid, *step)));
        for map in &lacks.collected {
            if let Some(step) = task.step_of(*map) {
                let ended = nested::item_outputs(task, *map);
                task.snapshot.collected.insert(*map, maps::collect(conn, step, &ended).await?);
            }
        }
        let items = lacks.items.iter().filter_map(|(map, window)| Some((task.step_of(*map)?, *window)));
        windows.extend(items.map(|(step, (from, count))| Window { task: uuid, step, from, count }));
        task.asked.steps.extend(lacks.steps);
        task.asked.outputs.extend(lacks.outputs);
        task.asked.collected.extend(lacks.collected);
        task.asked.items.extend(lacks.items);
    }
    read_items(conn, tasks, &windows).await?;
    if !positions.is_empty() {
        let rows = read::load_steps_behind(conn, &positions).await?;
        let mut tasks = by_uuid(tasks);
        for row in rows {
            if let Some(task) = tasks.get_mut(&row.task_uuid) {
                task.defines(&row)?;
                if task.step(row.step.uuid).is_none() {
                    task.put(row)?;
                }
            }
        }
    }
    if !wanted.is_empty() {
        read_outputs(conn, tasks, &wanted).await?;
    }
    Ok(!positions.is_empty())
}

/// The most steps of one task that are loaded ahead at a time.
const AHEAD: usize = 10_000;

/// These steps, and those that follow from them, so many levels ahead.
fn reach(task: &LoadedTask, steps: &BTreeSet<u32>, levels: usize) -> BTreeSet<u32> {
    let mut found = steps.clone();
    // Nothing stands behind an item.
    let is_step = |key: &u32| task.template.definition.position(*key).1.is_none();
    let mut level: Vec<u32> = steps.iter().copied().filter(is_step).collect();
    for _ in 1..levels {
        let graph = &task.template.definition.graph;
        let next: Vec<u32> = level.iter().flat_map(|step| graph.children(*step)).copied().collect();
        level = next.into_iter().filter(|step| found.len() < AHEAD && found.insert(*step)).collect();
        if level.is_empty() {
            break;
        }
    }
    found
}
