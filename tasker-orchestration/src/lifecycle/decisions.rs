//! Hints become events, and events become plans: the call of `decide`, once a task and again where
//! it lacked something.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::state_machine::decide::Operator;
use tasker_shared::state_machine::flow::Places;
use tasker_shared::state_machine::plan::{Lacks, Plan, Room};
use tasker_shared::state_machine::{Event, Snapshot, decide};
use tasker_shared::store::flow::{self, Wanted};
use tasker_shared::store::maps::{self, Window};
use tasker_shared::store::steps;
use tracing::instrument;
use uuid::Uuid;

use super::load::{Work, reach, read_items, read_outputs};
use super::{Act, Error, Hint, Look, Shared, nested};

/// Decides, and where a skipped step reaches further than what was loaded, loads that and decides
/// again. Each time it loads twice as far ahead, so that a long chain of skipped steps is decided a
/// few times and not once a step; a batch whose templates skip nothing decides once.
pub(super) async fn decide_with_all_it_needs(
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
            let place = |key| {
                let (index, item) = work.template.definition.place(key);
                (task, index, item)
            };
            places.extend(reach(work, &lacks.steps, ahead).into_iter().map(place));
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
                    works[*place].defines(&row)?;
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

/// Takes the locks of the limits that apply to the held steps these hints admit: none to lock
/// costs nothing. After the tasks and steps, before any queue.
pub(super) async fn lock_limits(
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
pub(super) async fn record_flow(conn: &mut PgConnection, plans: &[Plan], places: &Places) -> Result<(), Error> {
    let lanes: Vec<(Uuid, String)> = plans.iter().flat_map(|plan| plan.lanes.iter().cloned()).collect();
    if !lanes.is_empty() {
        flow::set_lanes(conn, &lanes).await?;
    }
    Ok(flow::record(conn, places).await?)
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
