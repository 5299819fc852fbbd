//! Batches of hints: done together, and by halves where that fails.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use rand::RngExt;
use rand::seq::SliceRandom as _;
use tasker_shared::state_machine::Event;
use tasker_shared::store::Fault;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::faults::{failed_alone, leave_locked, messages, put_back, put_off, quarantine};
use super::locks::{BUDGET, Subject, Wait};
use super::queue::STEP_RESULTS;
use super::settle::{self, Settled};
use super::{About, Error, Hint, Request, Shared, Source, initialize};

/// A message read this often is dealt with by itself, so that it cannot take others down with it.
const SUSPECT_READS: i32 = 5;

/// What came of the hints that name a task.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Tally {
    /// Tasks that changed in any way.
    pub moved: usize,
    /// Events of tasks that another process settles right now.
    pub deferred: usize,
}

/// Deals with hints of one kind; the suspicious ones each by itself. What was lately put off for a
/// lock comes last, each task by itself, in another order each time: however much of it there is,
/// some has its turn before the time for locks is up.
pub(super) async fn run(shared: &Shared, queue: &'static str, hints: Vec<Hint>) -> Result<Tally, Error> {
    let (locked, hints): (Vec<Hint>, Vec<Hint>) =
        hints.into_iter().partition(|hint| shared.locks.remembers(hint.subject()));
    let is_suspect = |hint: &Hint| hint.message().is_some_and(|(_, reads)| reads > SUSPECT_READS);
    let (suspects, others): (Vec<_>, Vec<_>) = hints.into_iter().partition(is_suspect);
    let mut tally = Tally::default();
    let began = Instant::now();
    bisect(shared, queue, (others.iter().collect(), Wait::Once), began, &mut tally).await?;
    for suspect in &suspects {
        let wait = if began.elapsed() > BUDGET { Wait::Briefly } else { Wait::Once };
        bisect(shared, queue, (vec![suspect], wait), began, &mut tally).await?;
    }
    let mut locked = by_subject(&locked.iter().collect::<Vec<_>>());
    locked.shuffle(&mut rand::rng());
    for part in locked {
        bisect(shared, queue, (part, Wait::InTurn), began, &mut tally).await?;
    }
    Ok(tally)
}

fn by_subject<'a>(hints: &[&'a Hint]) -> Vec<Vec<&'a Hint>> {
    let mut parts: HashMap<Subject, Vec<&Hint>> = HashMap::new();
    for hint in hints {
        parts.entry(hint.subject()).or_default().push(hint);
    }
    parts.into_values().collect()
}

/// Settles events that no message brought, each with its timer if it has one. What is of a task that a
/// settler of this process holds is left with that one, which settles it next: beside a wide task under
/// load its row is hardly ever free, and who only asked for it would wait until the load is over. Ends
/// when all of it is done.
pub(super) async fn run_found(
    shared: &Shared,
    found: impl Iterator<Item = (Uuid, Event, Option<i64>)>,
) -> Result<Tally, Error> {
    let open = TaskTracker::new();
    open.close();
    let hint = |(task, event, due_id)| Hint {
        request: Request::Event(task, event),
        source: Source::Found { due_id, open: open.token() },
    };
    let mut mine: Vec<Hint> = found.map(hint).collect();
    let left = shared.busy.leave(&mut mine);
    let mut tally = run(shared, STEP_RESULTS, mine).await?;
    open.wait().await;
    tally.moved += left;
    Ok(tally)
}

/// Gives back to its queue what was deferred, and quarantines what is unknown.
async fn after_settle(
    shared: &Shared,
    queue: &'static str,
    part: &[&Hint],
    settled: &mut Settled<'_>,
) -> Result<(), Error> {
    let locked = take_locked(shared, &mut settled.deferred, part);
    if !locked.is_empty() {
        leave_locked(shared, queue, &locked).await?;
    }
    if !settled.deferred.is_empty() {
        let delay = rand::rng().random_range(5..20);
        let ids = settled.deferred.iter().filter_map(|about| about.msg_id).collect();
        put_back(shared, queue, ids, delay).await?;
        if settled.deferred.len() * 2 > part.len() {
            // Most of what there is belongs to tasks that are settled elsewhere: reading the rest
            // of it now would only put that back too.
            tokio::time::sleep(Duration::from_millis(delay.unsigned_abs().into())).await;
        }
    }
    let bad: Vec<_> =
        settled.unknown.iter().filter_map(|(about, reason)| Some((about.msg_id?, (*reason).to_owned()))).collect();
    if bad.is_empty() { Ok(()) } else { quarantine(shared, queue, bad).await }
}

/// Takes out of what is deferred the hints about tasks that have been settled by others for so long that
/// somebody rather holds their locks.
fn take_locked<'a>(shared: &Shared, deferred: &mut Vec<About<'_>>, part: &[&'a Hint]) -> Vec<&'a Hint> {
    let tasks: HashSet<Uuid> = deferred.iter().map(|about| about.task).collect();
    shared.locks.had(part.iter().filter_map(|hint| hint.task()).filter(|task| !tasks.contains(task)));
    let locked: HashSet<Uuid> = tasks.into_iter().filter(|task| shared.locks.is_no_settle(*task)).collect();
    deferred.retain(|about| !locked.contains(&about.task));
    let is_locked = |hint: &&&Hint| hint.task().is_some_and(|task| locked.contains(&task));
    part.iter().filter(is_locked).copied().collect()
}

/// Does the work for the whole batch; if that fails for a reason of its own, for each half.
/// What still fails alone is noted, and quarantined when it has failed often enough. If the system
/// is to blame and everything fails alike, all that is left is put back until later.
///
/// A task that somebody else has locked is tried once more by itself, and then put off; so is, without
/// a try, whatever meets a lock after the time for locks is up.
async fn bisect(
    shared: &Shared,
    queue: &'static str,
    first: (Vec<&Hint>, Wait),
    began: Instant,
    tally: &mut Tally,
) -> Result<(), Error> {
    // Nothing to do is no success.
    let mut open = if first.0.is_empty() { Vec::new() } else { vec![first] };
    while let Some((part, wait)) = open.pop() {
        if wait == Wait::InTurn && began.elapsed() > BUDGET {
            leave_locked(shared, queue, &part).await?;
            continue;
        }
        let done = async {
            match &part[0].request {
                Request::Submit(_) => initialize::create(shared, &part, wait).await?,
                Request::Signal(_) => initialize::keep_signals(shared, &part, wait).await?,
                Request::Event(..) => {
                    let events = part.iter().filter_map(|hint| hint.about()).collect();
                    let mut settled = settle::settle(shared, queue, events, wait).await?;
                    after_settle(shared, queue, &part, &mut settled).await?;
                    return Ok(settled);
                }
            }
            Ok::<_, Error>(Settled::default())
        };
        let error = match done.await {
            Ok(settled) => {
                tally.moved += settled.moved;
                tally.deferred += settled.deferred.len();
                shared.breaker.succeeded();
                if !settled.locked.is_empty() {
                    let is_locked = |hint: &&&Hint| hint.task().is_some_and(|task| settled.locked.contains(&task));
                    let locked: Vec<&Hint> = part.iter().filter(is_locked).copied().collect();
                    open.extend(by_subject(&locked).into_iter().map(|part| (part, Wait::InTurn)));
                }
                continue;
            }
            Err(error) => error,
        };
        match error.fault() {
            Fault::Locked => {
                let is_one = part.iter().all(|hint| hint.subject() == part[0].subject());
                if is_one || began.elapsed() > BUDGET {
                    leave_locked(shared, queue, &part).await?;
                } else {
                    open.extend(halves(&part, Wait::Briefly));
                }
            }
            Fault::Collision => {
                // The messages come back by themselves when their reading times out; soon is better.
                tracing::debug!(%error, "a batch will be tried again");
                tokio::time::sleep(Duration::from_millis(50)).await;
                put_back(shared, queue, messages(&part).collect(), 0).await?;
                tally.deferred += part.len();
            }
            Fault::System => {
                // While the database is away there is nothing to be found out.
                let is_away = shared.outage.handles(&error);
                let pause = if is_away { Some(shared.outage.pause()) } else { shared.breaker.failed(&error) };
                if let Some(pause) = pause {
                    let rest = open.iter().flat_map(|(part, _)| messages(part)).chain(messages(&part)).collect();
                    // If that fails too, they come back when their reading times out.
                    let delay = if is_away { 0 } else { i32::try_from(pause.as_millis()).unwrap_or(i32::MAX) };
                    let _ = tokio::time::timeout(pause, put_back(shared, queue, rest, delay)).await;
                    tokio::time::sleep(pause).await;
                    tally.deferred += part.len();
                    return Ok(());
                }
                match part[..] {
                    [lone] => put_off(shared, queue, lone, &error).await?,
                    _ => open.extend(halves(&part, wait)),
                }
            }
            Fault::Message => match part[..] {
                [lone] => failed_alone(shared, queue, lone, &error).await?,
                _ => open.extend(halves(&part, wait)),
            },
        }
    }
    Ok(())
}

/// The right half of a part, and the left one, which is done first.
fn halves<'a>(part: &[&'a Hint], wait: Wait) -> [(Vec<&'a Hint>, Wait); 2] {
    let (left, right) = part.split_at(part.len() / 2);
    [right, left].map(|half| (half.to_vec(), wait))
}
