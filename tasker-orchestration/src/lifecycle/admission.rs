//! Admission before send: how much each queue may still be given, and who waits for room.
//!
//! An estimate in memory, refreshed beside the hot path and never on it: a settle takes from
//! it without a statement. What finds no room is held in the database, so a wrong estimate
//! costs a little delay or a slightly longer queue, never a step.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::state_machine::Event;
use tasker_shared::state_machine::plan::{QueueRoom, Room};
use tasker_shared::store::{Error, flow};
use tokio::sync::Notify;
use tracing::instrument;
use uuid::Uuid;

use super::Shared;
use super::batch::{self, Tally};
use super::limits::{self, HoldGroup};
use super::turns::{self, Candidate, Left, Turns};

/// Steps admitted in one pass, at most.
const PASS: usize = 1000;
/// Hold groups looked at in one pass, at most: see `tasker.held_lanes`.
const GROUPS: i32 = 2000;
/// When all of them are blocked and there are more: the pause before the others are looked at.
const UNLOOKED: Duration = Duration::from_millis(100);
/// The same when a held step's task was being settled by somebody else, who may wake nobody.
const BUSY: Duration = Duration::from_millis(20);

/// Who waits for a turn in one queue.
#[derive(Debug, Default)]
struct Waiting {
    turns: Turns,
    /// Where the last pass stopped looking, if there are more hold groups than one pass looks at.
    after: String,
}

/// The room of every queue.
#[derive(Debug, Default)]
pub struct Admission {
    room: Mutex<Room>,
    /// By queue: who waits for a turn, so that each fair key has its own.
    turns: Mutex<HashMap<String, Waiting>>,
    /// Wakes the admit loop.
    pub wake: Notify,
}

impl Admission {
    /// Lets a settle take from the room.
    pub fn with_room<T>(&self, work: impl FnOnce(&mut Room) -> T) -> T {
        // An estimate, which is made anew every few seconds, whatever a panic left of it.
        work(&mut self.room.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A settle committed: where room runs low or steps are held, the estimate is made anew.
    pub fn settled(&self) {
        if self.with_room(|room| room.queues().any(|(_, queue)| queue.is_low())) {
            self.wake.notify_one();
        }
    }

    fn waiting<T>(&self, queue: &str, work: impl FnOnce(&mut Waiting) -> T) -> T {
        let mut queues = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        work(queues.entry(queue.to_owned()).or_default())
    }
}

/// Reads the room anew; answers the queues that hold steps back and have room for some.
///
/// Whether new steps queue behind held ones stays as it was: that is for [`admit`] to say,
/// which knows whether the held ones all fit. Else a single held step under load would make
/// every later one wait behind it for ever.
#[instrument(level = "debug", skip_all)]
pub async fn refresh(shared: &Shared) -> Result<Vec<RoomRow>, Error> {
    let mut conn = shared.reads.acquire().await?;
    let rows = self::room(&mut conn).await?;
    let rules = limits::rules(&mut conn).await?;
    drop(conn);
    shared.admission.with_room(|room| {
        let mut fresh = Room::default();
        for row in &rows {
            let held_before = room.is_paused(&row.queue) || room.queue(&row.queue).is_none_or(|queue| queue.holding);
            let queue = QueueRoom {
                left: row.room,
                capacity: row.capacity,
                handlers: row.handlers.iter().cloned().collect(),
                holding: row.holding && held_before,
            };
            fresh.set(row.queue.as_str().into(), queue);
        }
        fresh.set_paused(rules.paused.clone());
        fresh.set_limits(rules.limits);
        *room = fresh;
    });
    Ok(rows.into_iter().filter(|row| row.holding && row.room > 0 && !rules.paused.contains(&row.queue)).collect())
}

/// What a pass of the admission found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Something, so a next pass may find more.
    More,
    /// Nothing; after this time a next pass may find something, whoever wakes it or not.
    Nothing(Option<Duration>),
}

/// Sends held steps for which there is room now: priority first, then fair keys in turn.
#[instrument(level = "debug", skip_all)]
pub async fn admit(shared: &Shared) -> Result<Found, super::Error> {
    let (mut more, mut next) = (false, None);
    for row in refresh(shared).await? {
        let max = usize::try_from(row.room).unwrap_or(PASS).min(PASS);
        let turn = choose(shared, &row, max).await.map_err(super::Error::from)?;
        // What limits hold back makes nobody else wait.
        shared.admission.with_room(|room| room.set_holding(&row.queue, turn.more));
        next = [next, turn.next].into_iter().flatten().min();
        if turn.steps.is_empty() {
            continue;
        }
        let steps = turn.steps.into_iter();
        let held = steps.map(|candidate| (candidate.task, Event::Admit { step: candidate.step }, None));
        // What could not be moved (its task is settled elsewhere, or a limit was full under its lock)
        // is no reason to look again at once.
        let Tally { moved, deferred } = batch::run_found(shared, held).await?;
        more |= moved > 0;
        if deferred > 0 {
            next = Some(next.map_or(BUSY, |next: Duration| next.min(BUSY)));
        }
    }
    Ok(if more { Found::More } else { Found::Nothing(next) })
}

/// Whose turn it is in one queue.
struct Turn {
    steps: Vec<Candidate>,
    /// There may be others that could have gone too.
    more: bool,
    /// When to look again, whatever happens: when a rate lets the next through, or soon, if there
    /// are more hold groups than one pass looks at.
    next: Option<Duration>,
}

/// Reads what is held, without locks: those who are chosen are looked at again under them.
/// The cost is that of the pass and of the groups that are blocked, never of what waits in them.
async fn choose(shared: &Shared, row: &RoomRow, max: usize) -> Result<Turn, Error> {
    let mut conn = shared.reads.acquire().await?;
    let after = shared.admission.waiting(&row.queue, |waiting| waiting.after.clone());
    let most = i32::try_from(max).unwrap_or(i32::MAX);
    let plain = held_steps(&mut conn, &row.queue, &row.handlers, most).await?;
    let found = limits::hold_groups(&mut conn, &row.queue, &after, GROUPS).await?;
    let unlooked = found.len() >= usize::try_from(GROUPS).unwrap_or(usize::MAX);
    // Those that were not looked at come first next time.
    let last = found.last().filter(|_| unlooked).map(|group| group.lane.clone());

    let namespace = row.queue.trim_start_matches("worker_").split("__").next().unwrap_or_default();
    let limits_of = |handler: &str| shared.admission.with_room(|room| room.limits_of(namespace, handler));
    let groups: Vec<(HoldGroup, Vec<String>)> = found
        .into_iter()
        .filter_map(|group| {
            let (_, handler, limits) = turns::parts(&group.lane);
            row.handlers.iter().any(|offered| offered == handler).then_some(())?;
            let limits = limits.map(str::to_owned).chain(limits_of(handler)).collect();
            Some((group, limits))
        })
        .collect();
    let plain: Vec<Candidate> = plain
        .into_iter()
        .map(|held| Candidate {
            task: held.task_uuid,
            step: held.step_uuid,
            priority: held.priority,
            fair: String::new(),
            ready_at: held.ready_at,
            limits: limits_of(&held.handler),
            quota: None,
        })
        .collect();

    let names: BTreeSet<&String> =
        groups.iter().flat_map(|(_, names)| names).chain(plain.iter().flat_map(|held| &held.limits)).collect();
    let names: Vec<String> = names.into_iter().cloned().collect();
    let uses = if names.is_empty() { Vec::new() } else { flow::limit_use(&mut conn, &names).await? };
    let next = uses.iter().filter_map(|limit| limit.next_ms).min_by(f64::total_cmp);
    let mut limits: Left = uses.iter().map(|limit| (limit.name.clone(), limit.free())).collect();

    let quotas = turns::quotas(&groups, &limits, max);
    let mut candidates = plain;
    if !quotas.is_empty() {
        let asked: Vec<(&HoldGroup, i32)> = quotas.iter().map(|quota| (&groups[quota.group].0, quota.most)).collect();
        for first in limits::first_in_groups(&mut conn, &row.queue, &asked).await? {
            let index = usize::try_from(first.place - 1).unwrap_or_default();
            let Some((group, names)) = quotas.get(index).map(|quota| &groups[quota.group]) else {
                continue;
            };
            candidates.push(Candidate {
                task: first.task_uuid,
                step: first.step_uuid,
                priority: group.priority,
                fair: turns::parts(&group.lane).0.to_owned(),
                ready_at: first.ready_at,
                limits: names.clone(),
                quota: Some(index),
            });
        }
    }
    let taken = shared.admission.waiting(&row.queue, |waiting| {
        let in_groups = groups.iter().map(|(group, _)| (group.priority, turns::parts(&group.lane).0));
        let plain = candidates.iter().filter(|held| held.quota.is_none()).map(|held| (held.priority, ""));
        waiting.turns.note(in_groups.chain(plain), !unlooked);
        waiting.after = last.unwrap_or_default();
        turns::take(candidates, &quotas, &mut limits, &mut waiting.turns, max)
    });
    let next = next.map(|ms| Duration::from_secs_f64(ms.clamp(1.0, 1e6) / 1000.0));
    let soon = (unlooked && taken.steps.is_empty()).then_some(UNLOOKED);
    Ok(Turn { steps: taken.steps, more: taken.more, next: next.into_iter().chain(soon).min() })
}

// The statements.

/// What is known of a queue's room: see `tasker.room`.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "explained beside the SQL function")]
pub struct RoomRow {
    pub queue: String,
    pub capacity: i64,
    pub room: i64,
    pub handlers: Vec<String>,
    pub holding: bool,
}

/// Estimates the room of every queue that a live worker reads.
pub async fn room(conn: &mut PgConnection) -> Result<Vec<RoomRow>, Error> {
    Ok(sqlx::query_as!(
        RoomRow,
        r#"select queue as "queue!", capacity as "capacity!", room as "room!", handlers as "handlers!", holding as "holding!" from tasker.room()"#
    )
    .fetch_all(conn)
    .await?)
}

/// A held step that waits in no hold group.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "columns of tasker.steps, explained there")]
pub struct HeldStep {
    pub task_uuid: Uuid,
    pub step_uuid: Uuid,
    pub priority: i32,
    pub ready_at: DateTime<Utc>,
    pub handler: String,
}

/// Held steps of a queue whose turn it is, but for those that wait in hold groups.
pub async fn held_steps(
    conn: &mut PgConnection,
    queue: &str,
    handlers: &[String],
    max: i32,
) -> Result<Vec<HeldStep>, Error> {
    Ok(sqlx::query_as!(
        HeldStep,
        r#"select task_uuid as "task_uuid!", step_uuid as "step_uuid!", priority as "priority!", ready_at as "ready_at!",
             handler as "handler!" from tasker.held_steps($1, $2, $3)"#,
        queue,
        handlers,
        max
    )
    .fetch_all(conn)
    .await?)
}
