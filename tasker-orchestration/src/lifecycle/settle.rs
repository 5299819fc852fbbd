//! THE transaction: lock, load, decide, apply, send, delete, commit; then the actions.
//!
//! A batch of hints settles in one transaction with set-based statements, so the cost of a
//! step falls as the load rises. This file must never decide anything itself.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::PgConnection;
use tasker_shared::queue::{self, Outbox, Traffic};
use tasker_shared::state_machine::decide::Operator;
use tasker_shared::state_machine::flow::Places;
use tasker_shared::state_machine::plan::{Lacks, Map, Outcome, Plan, Room, Signal};
use tasker_shared::state_machine::{Event, Snapshot, StepState, TaskState, decide};
use tasker_shared::store::apply::{Applied, ExportBatch, apply};
use tasker_shared::store::flow::{self, Wanted};
use tasker_shared::store::maps::{self, Window};
use tasker_shared::store::nested::ChildEnd;
use tasker_shared::store::steps::{self, Output, StepRow};
use tasker_shared::store::tasks::{self, TaskRow};
use tasker_shared::store::templates::Loaded;
use tasker_shared::store::tx::in_tx;
use tasker_shared::template::Keep;
use tasker_shared::trace::context::{Baggage, Traceparent, pass_on};
use tasker_shared::trace::ids::{SpanKey, span_id};
use tracing::instrument;
use uuid::Uuid;

use super::{Act, Error, Hint, Look, Shared, actions, measure, nested, waits};
use tasker_shared::message::step_message;

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Settled {
    /// Hints of tasks that somebody else settles right now: to be put back for a moment.
    pub deferred: Vec<Hint>,
    /// Messages about tasks or steps that do not exist, and what is wrong with them.
    pub unknown: Vec<(Hint, &'static str)>,
    /// Tasks that ended.
    pub finished: usize,
    /// Tasks that changed in any way.
    pub moved: usize,
}

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
    maps: HashMap<u32, Map>,
    /// Items to create, by index of their map.
    windows: HashMap<u32, (u32, Vec<Value>)>,
    /// What maps came to whose items are all done.
    collected: HashMap<u32, Result<Value, String>>,
    /// What decisions lacked and was asked for: what is still lacking does not exist.
    asked: Lacks,
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
    fn index(&self, name: &str) -> Option<u32> {
        self.template.definition.by_name.get(name).copied()
    }

    fn key(&self, row: &StepRow) -> u32 {
        self.template.definition.key(row.step.index, row.step.item)
    }
}

impl Work {
    /// The loaded step of a map.
    fn map_step(&self, index: u32) -> Option<Uuid> {
        let is_map = |row: &&StepRow| row.step.index == index && row.step.item.is_none();
        self.steps.values().find(is_map).map(|row| row.step.uuid)
    }

    /// What the plan lacks that was not asked for yet.
    fn lacking(&self, plan: &Plan) -> Lacks {
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

/// Settles hints that came from one queue (or from none: then `queue` only names the table
/// that no message is deleted from).
#[instrument(level = "debug", skip_all, fields(queue, hints = hints.len()))]
pub async fn settle(shared: &Shared, queue: &str, hints: Vec<Hint>) -> Result<Settled, Error> {
    let (source, count, began) = (measure::source(queue, &hints), hints.len(), Instant::now());
    let (settled, done) = in_tx(&shared.pool, async |conn| {
        let uuids: Vec<Uuid> = hints.iter().map(|hint| hint.task).collect::<HashSet<_>>().into_iter().collect();
        let rows = tasks::lock(conn, &uuids).await?;
        let (hints, mut settled) = sort_out(conn, hints, &rows, uuids.len()).await?;
        let (mut works, now) = load(shared, conn, rows, &hints).await?;
        let hints = without_strangers(hints, &works, &mut settled);
        load_outputs(conn, &mut works, &hints).await?;
        let places = lock_limits(shared, conn, &works, &hints).await?;
        let (plans, places) = decide_with_all_it_needs(shared, conn, (&mut works, &hints), &places, now).await?;

        let moved: Vec<(&TaskRow, &Plan)> =
            works.iter().map(|work| &work.row).zip(&plans).filter(|(_, plan)| !plan.is_empty()).collect();
        let export = export_batch(shared, &works, &plans, now);
        let done: Vec<i64> = hints.iter().filter_map(|hint| hint.msg_id).collect();
        let due: Vec<i64> = hints.iter().filter_map(|hint| hint.due_id).collect();
        let traffic = Traffic { queue, done: &done, due: &due, outbox: outbox(&works, &plans) };
        let applied = if moved.is_empty() {
            queue::conclude(conn, &traffic).await?;
            Applied { at: now, cancelled: Vec::new() }
        } else {
            apply(conn, &moved, now, export.as_ref(), &traffic).await?
        };
        record_flow(conn, &plans, &places).await?;
        waits::record(conn, &works, &plans, applied.at).await?;
        nested::record(conn, &works, &plans).await?;
        tell_workers(conn, &applied, &plans).await?;
        settled.moved = moved.len();
        settled.finished = plans.iter().filter(|plan| plan.task_changed && plan.task.state.is_terminal()).count();
        Ok::<_, Error>((settled, actions::Committed { works, plans, applied, began_at: now, export }))
    })
    .await
    .inspect_err(|error| {
        measure::failed(&source);
        // The answer to COMMIT may be what was lost: then the spans are still owed.
        if let Some(exporter) = shared.exporter().filter(|_| error.is_transient()) {
            exporter.doubt();
        }
    })?;
    measure::settled(&source, count, began.elapsed());
    actions::run(shared, done);
    Ok(settled)
}

/// Keeps the hints of the tasks that were locked; the others are deferred or unknown.
async fn sort_out(
    conn: &mut PgConnection,
    hints: Vec<Hint>,
    rows: &[TaskRow],
    wanted: usize,
) -> Result<(Vec<Hint>, Settled), Error> {
    if rows.len() == wanted {
        return Ok((hints, Settled::default()));
    }
    let locked: HashSet<Uuid> = rows.iter().map(|row| row.task.uuid).collect();
    let (kept, others): (Vec<Hint>, Vec<Hint>) = hints.into_iter().partition(|hint| locked.contains(&hint.task));
    let ids: Vec<Uuid> = others.iter().map(|hint| hint.task).collect();
    let existing: HashSet<Uuid> = tasks::existing(conn, &ids).await?.into_iter().collect();
    let (deferred, unknown): (_, Vec<Hint>) = others.into_iter().partition(|hint| existing.contains(&hint.task));
    let unknown = unknown
        .into_iter()
        .map(|hint| (hint, "task: no such task; it was never created here, or retention removed it"))
        .collect();
    Ok((kept, Settled { deferred, unknown, ..Settled::default() }))
}

/// Takes out the messages that name a step which their task does not have.
fn without_strangers(hints: Vec<Hint>, works: &[Work], settled: &mut Settled) -> Vec<Hint> {
    let works: HashMap<Uuid, &Work> = works.iter().map(|work| (work.row.task.uuid, work)).collect();
    let known = |hint: &Hint| {
        let has = |step| works.get(&hint.task).is_some_and(|work| work.steps.contains_key(&step));
        let knows = |name: &String| works.get(&hint.task).is_some_and(|work| work.index(name).is_some());
        let names: &[String] = if let Look::Operate(_, act) = &hint.look { act.names() } else { &[] };
        hint.msg_id.is_none() || (hint.look.step().is_none_or(has) && names.iter().all(knows))
    };
    let (known, strangers): (Vec<Hint>, Vec<Hint>) = hints.into_iter().partition(known);
    settled.unknown.extend(strangers.into_iter().map(|hint| (hint, "step: no such step of this task")));
    known
}

/// Loads what the decisions need, after the locks: a statement of its own sees what they protect.
async fn load(
    shared: &Shared,
    conn: &mut PgConnection,
    rows: Vec<TaskRow>,
    hints: &[Hint],
) -> Result<(Vec<Work>, DateTime<Utc>), Error> {
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
    if !claimable.is_empty() {
        steps::lock_claimable(conn, &claimable).await?;
    }
    let about: Vec<Uuid> = hints.iter().filter_map(|hint| hint.look.step()).chain(items).collect();
    let mut loaded = if about.is_empty() { Vec::new() } else { steps::load(conn, &about).await? };
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
        let template = templates.get(&row.template_id).cloned().ok_or_else(|| tasker_shared::store::Error::BadRow {
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
    let put = |works: &mut Vec<Work>, rows: Vec<StepRow>| {
        for mut row in rows {
            if let Some(place) = places.get(&row.task_uuid) {
                // A row that knows more of the attempt takes the place of one that knew what it counts for.
                row.passed |= works[*place].steps.get(&row.step.uuid).is_some_and(|before| before.passed);
                works[*place].steps.insert(row.step.uuid, row);
            }
        }
    };
    put(&mut works, loaded);
    if !whole.is_empty() {
        let mut by_hand = by_hand(&works, hints);
        if !by_hand.is_empty() {
            by_hand.extend(maps::open_items(conn, &by_hand).await?);
            steps::lock_claimable(conn, &by_hand).await?;
            let rows = steps::load(conn, &by_hand).await?;
            now = rows.iter().map(|row| row.read_at).max().map_or(now, |at| at.max(now));
            put(&mut works, rows);
        }
    }
    nested::load(conn, &mut works, hints).await?;
    waits::load_deadlines(conn, &mut works, hints).await?;
    let signalled = waits::load_signals(conn, &mut works, hints).await?;
    if !signalled.is_empty() {
        let loaded = steps::load(conn, &signalled).await?;
        now = loaded.iter().map(|row| row.read_at).max().map_or(now, |at| at.max(now));
        put(&mut works, loaded);
    }
    let behind = behind(&works);
    if !behind.is_empty() {
        put(&mut works, steps::load_behind(conn, &behind).await?);
    }
    load_maps(conn, &mut works).await?;
    Ok((works, now))
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
fn behind(works: &[Work]) -> Vec<(Uuid, u32)> {
    let mut places = BTreeSet::new();
    for work in works {
        let (items, others): (Vec<&StepRow>, Vec<&StepRow>) =
            work.steps.values().partition(|row| row.step.item.is_some());
        let loaded: HashSet<u32> = others.iter().map(|row| row.step.index).collect();
        let graph = &work.template.definition.graph;
        let children = loaded.iter().flat_map(|index| graph.children(*index)).copied();
        // Behind an item stands its map.
        let behind = children.chain(items.iter().map(|row| row.step.index)).filter(|index| !loaded.contains(index));
        places.extend(behind.map(|index| (work.row.task.uuid, index)));
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

async fn read_items(conn: &mut PgConnection, works: &mut [Work], windows: &[Window]) -> Result<(), Error> {
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
async fn load_outputs(conn: &mut PgConnection, works: &mut [Work], hints: &[Hint]) -> Result<(), Error> {
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

async fn read_outputs(conn: &mut PgConnection, works: &mut [Work], wanted: &[(Uuid, u32)]) -> Result<(), Error> {
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

/// Takes the locks of the limits that apply to the held steps these hints admit: none to lock
/// costs nothing. After the tasks and steps, before any queue.
async fn lock_limits(
    shared: &Shared,
    conn: &mut PgConnection,
    works: &[Work],
    hints: &[Hint],
) -> Result<Places, Error> {
    let admitted: Vec<(Uuid, Uuid)> = hints
        .iter()
        .filter_map(|hint| match hint.look {
            Look::Admit(step) => Some((hint.task, step)),
            _ => None,
        })
        .collect();
    if admitted.is_empty() {
        return Ok(Places::default());
    }
    let works: HashMap<Uuid, &Work> = works.iter().map(|work| (work.row.task.uuid, work)).collect();
    let mut wanted: BTreeMap<String, Wanted> = BTreeMap::new();
    for (task, step) in admitted {
        let Some((work, row)) = works.get(&task).and_then(|work| Some((work, work.steps.get(&step)?))) else {
            continue;
        };
        let definition = &work.template.definition;
        // A key that leads nowhere failed its step when it became ready.
        let limits = definition.limits(row.step.index, &work.row.task.input).unwrap_or_default();
        let handler = &definition.steps[row.step.index as usize].handler;
        let set = shared.admission.with_room(|room| room.limits_of(&definition.namespace, handler));
        let limits = limits.into_iter().map(|limit| (limit.name, Some(limit.allows)));
        for (name, allows) in limits.chain(set.into_iter().map(|name| (name, None))) {
            let namespace = definition.namespace.clone();
            wanted.entry(name.clone()).or_insert(Wanted { namespace, name, allows });
        }
    }
    if wanted.is_empty() {
        return Ok(Places::default());
    }
    let wanted: Vec<Wanted> = wanted.into_values().collect();
    Ok(flow::lock(conn, &wanted).await?)
}

/// Writes what only held and limited steps have: their lanes, and the places that were taken.
async fn record_flow(conn: &mut PgConnection, plans: &[Plan], places: &Places) -> Result<(), Error> {
    let lanes: Vec<(Uuid, String)> = plans.iter().flat_map(|plan| plan.lanes.iter().cloned()).collect();
    if !lanes.is_empty() {
        flow::set_lanes(conn, &lanes).await?;
    }
    Ok(flow::record(conn, places).await?)
}

/// Decides, and where a skipped step reaches further than what was loaded, loads that and decides
/// again. Each time it loads twice as far ahead, so that a long chain of skipped steps is decided a
/// few times and not once a step; a batch whose templates skip nothing decides once.
async fn decide_with_all_it_needs(
    shared: &Shared,
    conn: &mut PgConnection,
    (works, hints): (&mut [Work], &[Hint]),
    places: &Places,
    now: DateTime<Utc>,
) -> Result<(Vec<Plan>, Places), Error> {
    let reaches_far = works.iter().any(|work| work.template.definition.reaches_far);
    let by_task: HashMap<Uuid, usize> =
        works.iter().enumerate().map(|(place, work)| (work.row.task.uuid, place)).collect();
    let mut ahead = 1;
    loop {
        let (plans, places, lacking) = shared.admission.with_room(|room| {
            let before = reaches_far.then(|| room.clone());
            room.set_places(places.clone());
            let plans = decide_all(works, hints, room, now);
            let places = room.set_places(Places::default());
            let lacking: Vec<Lacks> = works.iter().zip(&plans).map(|(work, plan)| work.lacking(plan)).collect();
            if let Some(before) = before.filter(|_| lacking.iter().any(|lacks| *lacks != Lacks::default())) {
                *room = before;
            }
            (plans, places, lacking)
        });
        if lacking.iter().all(|lacks| *lacks == Lacks::default()) {
            return Ok((plans, places));
        }
        let (mut places, mut wanted, mut windows) = (Vec::new(), Vec::new(), Vec::new());
        for (work, lacks) in works.iter_mut().zip(lacking) {
            let task = work.row.task.uuid;
            places.extend(reach(work, &lacks.steps, ahead).into_iter().map(|step| (task, step)));
            wanted.extend(lacks.outputs.iter().map(|step| (task, *step)));
            for map in &lacks.collected {
                if let Some(step) = work.map_step(*map) {
                    let ended = nested::item_outputs(work, *map);
                    work.collected.insert(*map, maps::collect(conn, step, &ended).await?);
                }
            }
            let items = lacks.items.iter().filter_map(|(map, window)| Some((work.map_step(*map)?, *window)));
            windows.extend(items.map(|(step, (from, count))| Window { task, step, from, count }));
            work.asked.steps.extend(lacks.steps);
            work.asked.outputs.extend(lacks.outputs);
            work.asked.collected.extend(lacks.collected);
            work.asked.items.extend(lacks.items);
        }
        read_items(conn, works, &windows).await?;
        if !places.is_empty() {
            for row in steps::load_behind(conn, &places).await? {
                if let Some(place) = by_task.get(&row.task_uuid) {
                    works[*place].steps.entry(row.step.uuid).or_insert(row);
                }
            }
            ahead *= 2;
        }
        if !wanted.is_empty() {
            read_outputs(conn, works, &wanted).await?;
        }
    }
}

/// The most steps of one task that are loaded ahead at a time.
const AHEAD: usize = 10_000;

/// These steps, and those that follow from them, so many levels ahead.
fn reach(work: &Work, steps: &BTreeSet<u32>, levels: usize) -> BTreeSet<u32> {
    let mut found = steps.clone();
    let mut level: Vec<u32> = steps.iter().copied().collect();
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

/// One plan per task, in the same order.
fn decide_all(works: &[Work], hints: &[Hint], room: &mut Room, now: DateTime<Utc>) -> Vec<Plan> {
    let mut by_task: HashMap<Uuid, Vec<&Look>> = HashMap::new();
    for hint in hints {
        by_task.entry(hint.task).or_default().push(&hint.look);
    }
    works
        .iter()
        .map(|work| decide_task(work, by_task.remove(&work.row.task.uuid).unwrap_or_default(), room, now))
        .collect()
}

/// Decides one task; its log lines bear the task's ids.
#[instrument(skip_all, fields(correlation_id = work.row.correlation_id, task_uuid = %work.row.task.uuid))]
fn decide_task(work: &Work, looks: Vec<&Look>, room: &mut Room, now: DateTime<Utc>) -> Plan {
    let events = looks.into_iter().filter_map(|look| event(work, look)).collect();
    let snapshot = Snapshot {
        task: work.row.task.clone(),
        definition: &work.template.definition,
        steps: work.steps.values().map(|row| (work.key(row), row.step.clone())).collect(),
        outcomes: work.steps.values().filter_map(|row| Some((work.key(row), row.outcome.clone()?))).collect(),
        passed: work.steps.values().filter(|row| row.passed).map(|row| work.key(row)).collect(),
        outputs: work.outputs.clone(),
        absent: work.absent.clone(),
        maps: work.maps.clone(),
        windows: work.windows.clone(),
        collected: work.collected.clone(),
        deadlines: work
            .deadlines
            .iter()
            .filter_map(|(step, at)| Some((work.key(work.steps.get(step)?), *at)))
            .collect(),
        signals: work.signals.clone(),
    };
    let plan = decide(snapshot, events, room, now);
    if plan.ignored > 0 {
        tracing::debug!(events = plan.ignored, "events that came late, twice or out of order changed nothing");
    }
    plan
}

/// Names the step by its key. A hint about a step that does not exist has nothing to say.
fn event(work: &Work, look: &Look) -> Option<Event> {
    let key = |step: &Uuid| work.steps.get(step).map(|row| work.key(row));
    Some(match look {
        Look::Start => Event::Start { step_uuids: new_step_uuids(work), invalid: invalid_input(work) },
        Look::Result(step, attempt) => Event::Result { step: key(step)?, attempt: *attempt },
        Look::Quarantined(step, attempt, reason) => {
            Event::Quarantined { step: key(step)?, attempt: *attempt, reason: reason.clone() }
        }
        Look::Lease(step) => Event::LeaseDue { step: key(step)? },
        Look::Retry(step) => Event::RetryDue { step: key(step)? },
        Look::Queue(step) => {
            let row = work.steps.get(step)?;
            Event::QueueDue { step: work.key(row), attempt: row.step.attempt }
        }
        Look::Timer(step) => Event::TimerDue { step: key(step)? },
        Look::Child(step, attempt) => {
            let end = work.children.get(&(*step, *attempt))?;
            let (outcome, link) = (end.outcome.clone(), end.link.clone());
            Event::ChildEnded { step: key(step)?, attempt: *attempt, outcome, link }
        }
        Look::StepTotal(step) => Event::StepTotalDue { step: key(step)? },
        Look::Signal => Event::SignalDue,
        Look::Total => Event::TotalDue,
        Look::Admit(step) => Event::Admit { step: key(step)? },
        Look::Cancel(operator) => Event::Cancel(operator.clone()),
        Look::Terminate(operator) => Event::Terminate(operator.clone()),
        Look::Suspend(operator) => Event::Suspend(operator.clone()),
        Look::GiveUp(operator) => Event::GiveUp(operator.clone()),
        Look::ResolveTask(operator) => Event::ResolveTask(operator.clone()),
        Look::Operate(operator, act) => operate(work, operator.clone(), act)?,
    })
}

fn operate(work: &Work, operator: Operator, act: &Act) -> Option<Event> {
    let indexes = |names: &[String]| names.iter().filter_map(|name| work.index(name)).collect();
    Some(match act {
        Act::Resume => Event::Resume(operator),
        Act::Retry(only) if work.steps.is_empty() => Event::Retry {
            operator,
            only: indexes(only),
            step_uuids: new_step_uuids(work),
            invalid: invalid_input(work),
        },
        Act::Retry(only) => Event::Retry { operator, only: indexes(only), step_uuids: Vec::new(), invalid: None },
        Act::Rerun(from) => Event::Rerun { operator, from: indexes(from) },
        Act::ByHand(name, act, output) => {
            Event::ByHand { operator, step: work.index(name)?, act: *act, output: output.clone() }
        }
    })
}

/// Time-ordered uuids that share the milliseconds of their task's, so by the database's clock.
fn new_step_uuids(work: &Work) -> Vec<Uuid> {
    let milliseconds = &work.row.task.uuid.as_bytes()[..6];
    let mut bytes = [0_u8; 16];
    bytes[..6].copy_from_slice(milliseconds);
    (0..work.template.definition.steps.len())
        .map(|_| {
            rand::fill(&mut bytes[6..]);
            uuid::Builder::from_bytes(bytes)
                .with_variant(uuid::Variant::RFC4122)
                .with_version(uuid::Version::SortRand)
                .into_uuid()
        })
        .collect()
}

fn invalid_input(work: &Work) -> Option<String> {
    let problems = work.template.schema.as_ref()?.check(&work.row.task.input).err()?;
    Some(problems.join("; ").chars().take(1000).collect())
}

/// The export batch of this transaction, if any of its tasks is sampled.
fn export_batch(shared: &Shared, works: &[Work], plans: &[Plan], now: DateTime<Utc>) -> Option<ExportBatch> {
    let exporter = shared.exporter()?;
    let task_uuids: Vec<Uuid> = works
        .iter()
        .zip(plans)
        .filter(|(_, plan)| !plan.moves.is_empty())
        .filter(|(work, plan)| work.row.trace_flags & 1 == 1 || may_be_kept(work, plan, now))
        .map(|(work, _)| work.row.task.uuid)
        .collect();
    (!task_uuids.is_empty()).then(|| ExportBatch { batch_id: Uuid::new_v4(), instance: exporter.instance, task_uuids })
}

/// Whether a task that was not sampled ends in a way that its template wants to see. The exporter
/// looks at the whole log and has the last word.
fn may_be_kept(work: &Work, plan: &Plan, now: DateTime<Utc>) -> bool {
    let (keep, task) = (&work.template.keep, &plan.task);
    // A nested task in its parent's trace goes with that; one with a trace of its own does not.
    let is_within = work.row.parent_task_uuid.is_some() && work.row.remote_span_id.is_some();
    if keep.is_empty() || !plan.task_changed || !task.state.is_terminal() || is_within {
        return false;
    }
    keep.iter().any(|keep| match keep {
        Keep::Failed => task.state != TaskState::Complete,
        Keep::Retried => true,
        // The commit is a little later than now.
        Keep::SlowerThan(limit) => {
            (now - work.row.task.generation_began_at).to_std().is_ok_and(|took| took + Duration::from_secs(1) > *limit)
        }
    })
}

/// A message with its priority and destination.
type Letter<'a> = (i32, &'a str, Value, Value);

/// The messages of the steps that became ready.
fn outbox(works: &[Work], plans: &[Plan]) -> Outbox {
    let mut letters: Vec<Letter<'_>> = Vec::new();
    for (work, plan) in works.iter().zip(plans).filter(|(_, plan)| !plan.sends.is_empty()) {
        enqueue_steps(work, plan, &mut letters);
    }
    // A queue is read in the order it was written in, so the urgent are written first.
    letters.sort_by_key(|(priority, ..)| std::cmp::Reverse(*priority));
    let mut outbox = Outbox::default();
    for (_, queue, body, headers) in letters {
        outbox.queues.push(queue.to_owned());
        outbox.bodies.push(body);
        outbox.headers.push(headers);
    }
    outbox
}

/// Writes the messages of one task's steps, with the context that their attempts will continue.
#[instrument(skip_all, fields(correlation_id = work.row.correlation_id, task_uuid = %work.row.task.uuid))]
fn enqueue_steps<'a>(work: &Work, plan: &'a Plan, letters: &mut Vec<Letter<'a>>) {
    let row = &work.row;
    let baggage = baggage(row);
    for sent in &plan.sends {
        // The attempt's handler.execution is known before it runs: it is what the worker continues.
        let handler = span_id(&row.trace_id, sent.step, 0, u64::from(sent.attempt.unsigned_abs()), SpanKey::Handler, 0);
        let parent = Traceparent { trace_id: row.trace_id, span_id: handler, flags: row.trace_flags };
        let mut headers = json!({
            "traceparent": parent.to_string(),
            "baggage": baggage,
        });
        if let Some(version) = sent.task_version {
            let ordinal = u64::from(version.unsigned_abs());
            let sender = span_id(&row.trace_id, row.task.uuid, 0, 0, SpanKey::Enqueuing, ordinal);
            headers["x-tasker-sender"] = tasker_shared::trace::otlp::hex(&sender).into();
        }
        if let Some(state) = &row.tracestate {
            headers["tracestate"] = state.clone().into();
        }
        let body = step_message(row.task.uuid, sent.step, sent.generation, sent.attempt, &sent.handler);
        letters.push((sent.priority, &sent.queue, body, headers));
    }
}

fn baggage(row: &TaskRow) -> String {
    let mut baggage = Baggage::default();
    baggage.insert("correlation_id", &row.correlation_id);
    baggage.insert("task_uuid", &row.task.uuid.to_string());
    baggage.insert("namespace", &row.namespace);
    if let Some(callers) = &row.baggage {
        pass_on(&mut baggage, callers);
    }
    baggage.to_string()
}

async fn tell_workers(conn: &mut PgConnection, applied: &Applied, plans: &[Plan]) -> Result<(), Error> {
    let cancelled = applied.cancelled.iter().filter_map(|step| step.claimed_by.as_ref());
    let workers: BTreeSet<&String> = cancelled.chain(plans.iter().flat_map(|plan| &plan.tell)).collect();
    if !workers.is_empty() {
        queue::notify_cancelled(conn, &workers.into_iter().cloned().collect::<Vec<_>>()).await?;
    }
    Ok(())
}
