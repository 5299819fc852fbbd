//! Batches: whose they are, and what becomes of those that fail, by bisection and quarantine.
//!
//! A message is quarantined only after repeated failures that are its own fault (`Fault::Message`).
//! What the system is to blame for costs a delay: of everything while everything fails alike, of one
//! message while others succeed.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use rand::RngExt;
use rand::seq::SliceRandom as _;
use serde_json::Value;
use tasker_shared::message::{ResultHint, SendSignal};
use tasker_shared::metrics::metrics;
use tasker_shared::queue::{self, Message, STEP_RESULTS};
use tasker_shared::store::Fault;
use tasker_shared::store::tx::in_tx;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use uuid::Uuid;

use super::breaker::Alone;
use super::locks::{BUDGET, Subject, Wait};
use super::{Error, Hint, Look, Shared, initialize, settle};

/// Failures of its own after which a message is quarantined.
const MAX_FAILURES: i32 = 3;
/// A message read this often is dealt with by itself, so that it cannot take others down with it.
const SUSPECT_READS: i32 = 5;

/// What somebody asks for, and the message that brought it.
#[derive(Debug)]
pub(super) enum Item {
    /// A task to create: the request.
    Submit(Value, Message),
    /// A signal to keep.
    Signal(SendSignal, Message),
    /// A task to look at.
    Settle(Hint, Message),
    /// A task to look at that no message names: something of it is due or held, and if this comes
    /// to nothing it is found again. Whoever waits for it is told by the end of the token.
    Due(Hint, #[expect(dead_code, reason = "its end is what it says")] TaskTrackerToken),
}

impl Item {
    /// The task it is about, if there is one yet.
    pub(super) fn task(&self) -> Option<Uuid> {
        match self {
            Self::Submit(..) => None,
            Self::Signal(signal, _) => Some(signal.task),
            Self::Settle(hint, _) | Self::Due(hint, _) => Some(hint.task),
        }
    }

    /// What a lock is met for.
    fn subject(&self) -> Subject {
        match self {
            Self::Submit(_, message) => Subject::Message(message.msg_id),
            Self::Signal(signal, _) => Subject::Task(signal.task),
            Self::Settle(hint, _) | Self::Due(hint, _) => Subject::Task(hint.task),
        }
    }

    fn message(&self) -> Option<&Message> {
        match self {
            Self::Submit(_, message) | Self::Signal(_, message) | Self::Settle(_, message) => Some(message),
            Self::Due(..) => None,
        }
    }
}

/// What came of the items that name a task.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Tally {
    /// Tasks that changed in any way.
    pub moved: usize,
    /// Hints of tasks that another process settles right now.
    pub deferred: usize,
}

/// Deals with items of one kind, or such that name a task; the suspicious ones each by itself. What
/// was lately put off for a lock comes last, each task by itself, in another order each time: however
/// much of it there is, some has its turn before the time for locks is up.
pub(super) async fn run(shared: &Shared, queue: &'static str, items: Vec<Item>) -> Result<Tally, Error> {
    let (locked, items): (Vec<Item>, Vec<Item>) =
        items.into_iter().partition(|item| shared.locks.remembers(item.subject()));
    let is_suspect = |item: &Item| item.message().is_some_and(|message| message.read_ct > SUSPECT_READS);
    let (suspects, others): (Vec<_>, Vec<_>) = items.into_iter().partition(is_suspect);
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

fn by_subject<'a>(items: &[&'a Item]) -> Vec<Vec<&'a Item>> {
    let mut parts: HashMap<Subject, Vec<&Item>> = HashMap::new();
    for item in items {
        parts.entry(item.subject()).or_default().push(item);
    }
    parts.into_values().collect()
}

/// Settles hints that no message brought. What is of a task that a settler of this process holds is
/// left with that one, which settles it next: beside a wide task under load its row is hardly ever
/// free, and who only asked for it would wait until the load is over. Ends when all of it is done.
pub(super) async fn run_due(shared: &Shared, hints: Vec<Hint>) -> Result<Tally, Error> {
    let open = TaskTracker::new();
    open.close();
    let mut mine: Vec<Item> = hints.into_iter().map(|hint| Item::Due(hint, open.token())).collect();
    let left = shared.busy.leave(&mut mine);
    let mut tally = run(shared, STEP_RESULTS, mine).await?;
    open.wait().await;
    tally.moved += left;
    Ok(tally)
}

/// What came of a part of a batch, and the tasks in it of which somebody else holds a step.
async fn work(
    shared: &Shared,
    queue: &'static str,
    items: &[&Item],
    wait: Wait,
) -> Result<(Tally, HashSet<Uuid>), Error> {
    match items.first() {
        Some(Item::Submit(..)) => initialize::create(shared, items, wait).await?,
        Some(Item::Signal(..)) => initialize::keep_signals(shared, items, wait).await?,
        Some(Item::Settle(..) | Item::Due(..)) => return settle_items(shared, queue, items, wait).await,
        None => {}
    }
    Ok(Default::default())
}

async fn settle_items(
    shared: &Shared,
    queue: &'static str,
    items: &[&Item],
    wait: Wait,
) -> Result<(Tally, HashSet<Uuid>), Error> {
    let hints = items
        .iter()
        .filter_map(|item| match item {
            Item::Settle(hint, _) | Item::Due(hint, _) => Some(hint.clone()),
            Item::Submit(..) | Item::Signal(..) => None,
        })
        .collect();
    let mut settled = settle::settle_waiting(shared, queue, hints, wait).await?;
    let (locked, deferred) = sort_deferred(shared, std::mem::take(&mut settled.deferred), items);
    settled.deferred = deferred;
    if !locked.is_empty() {
        leave_locked(shared, queue, &locked).await?;
    }
    let ids = |hints: &[Hint]| hints.iter().filter_map(|hint| hint.msg_id).collect::<Vec<i64>>();
    if !settled.deferred.is_empty() {
        let delay = rand::rng().random_range(5..20);
        put_back(shared, queue, ids(&settled.deferred), delay).await?;
        if settled.deferred.len() * 2 > items.len() {
            // Most of what there is belongs to tasks that are settled elsewhere: reading the rest
            // of it now would only put that back too.
            tokio::time::sleep(Duration::from_millis(delay.unsigned_abs().into())).await;
        }
    }
    let bad: Vec<_> =
        settled.unknown.iter().filter_map(|(hint, reason)| Some((hint.msg_id?, (*reason).to_owned()))).collect();
    if !bad.is_empty() {
        quarantine(shared, queue, bad).await?;
    }
    Ok((Tally { moved: settled.moved, deferred: settled.deferred.len() }, settled.locked))
}

/// Of what is deferred, the items about tasks that have been settled by others for so long that somebody
/// rather holds their locks; and the other hints.
fn sort_deferred<'a>(shared: &Shared, deferred: Vec<Hint>, items: &[&'a Item]) -> (Vec<&'a Item>, Vec<Hint>) {
    let tasks: HashSet<Uuid> = deferred.iter().map(|hint| hint.task).collect();
    shared.locks.had(items.iter().filter_map(|item| item.task()).filter(|task| !tasks.contains(task)));
    let locked: HashSet<Uuid> = tasks.into_iter().filter(|task| shared.locks.is_no_settle(*task)).collect();
    let of_locked = |item: &&&Item| item.task().is_some_and(|task| locked.contains(&task));
    let others = deferred.into_iter().filter(|hint| !locked.contains(&hint.task)).collect();
    (items.iter().filter(of_locked).copied().collect(), others)
}

/// Leaves items for a later time, because somebody else holds a lock: messages are put off in their
/// queue, and what is due was, when it was taken.
async fn leave_locked(shared: &Shared, queue: &'static str, items: &[&Item]) -> Result<(), Error> {
    let is_due = items.iter().all(|item| item.message().is_none());
    shared.locks.remember(items.iter().map(|item| item.subject()));
    shared.locks.met(if is_due { "due" } else { queue }, items.len());
    let ids: Vec<i64> = messages(items).collect();
    if !ids.is_empty() {
        queue::put_off(&mut *shared.reads.acquire().await?, queue, &ids).await?;
    }
    Ok(())
}

/// Lets messages be read again after so many milliseconds.
async fn put_back(shared: &Shared, queue: &str, msg_ids: Vec<i64>, delay_ms: i32) -> Result<(), Error> {
    if !msg_ids.is_empty() {
        queue::put_back(&mut *shared.reads.acquire().await?, queue, &msg_ids, delay_ms).await?;
    }
    Ok(())
}

/// Moves messages that say nothing we can act on out of the way.
pub(super) async fn quarantine(shared: &Shared, queue: &'static str, bad: Vec<(i64, String)>) -> Result<(), Error> {
    for (msg_id, reason) in &bad {
        tracing::warn!(queue, msg_id, reason, "message quarantined");
    }
    in_tx(&shared.pool, async |conn| Ok::<_, Error>(queue::quarantine(conn, queue, &bad).await?)).await?;
    metrics().messages_quarantined.inc_by(u64::try_from(bad.len()).unwrap_or(u64::MAX));
    Ok(())
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
    first: (Vec<&Item>, Wait),
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
        let error = match work(shared, queue, &part, wait).await {
            Ok((Tally { moved, deferred }, locked)) => {
                tally.moved += moved;
                tally.deferred += deferred;
                shared.breaker.succeeded();
                if !locked.is_empty() {
                    let is_locked = |item: &&&Item| item.task().is_some_and(|task| locked.contains(&task));
                    let items: Vec<&Item> = part.iter().filter(is_locked).copied().collect();
                    open.extend(by_subject(&items).into_iter().map(|part| (part, Wait::InTurn)));
                }
                continue;
            }
            Err(error) => error,
        };
        match error.fault() {
            Fault::Locked => {
                let is_one = part.iter().all(|item| item.subject() == part[0].subject());
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
                let is_away = shared.outage.tells_of(&error);
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
                [lone] => match lone.message() {
                    Some(message) => failed_alone(shared, queue, message, &error).await?,
                    None => put_off(shared, queue, lone, &error).await?,
                },
                _ => open.extend(halves(&part, wait)),
            },
        }
    }
    Ok(())
}

/// The right half of a part, and the left one, which is done first.
fn halves<'a>(part: &[&'a Item], wait: Wait) -> [(Vec<&'a Item>, Wait); 2] {
    let (left, right) = part.split_at(part.len() / 2);
    [right, left].map(|half| (half.to_vec(), wait))
}

fn messages(part: &[&Item]) -> impl Iterator<Item = i64> {
    part.iter().filter_map(|item| Some(item.message()?.msg_id))
}

/// Lets one that fails while others do not come back later, each time later than before.
async fn put_off(shared: &Shared, queue: &'static str, lone: &Item, error: &Error) -> Result<(), Error> {
    match lone {
        Item::Submit(_, message) | Item::Signal(_, message) | Item::Settle(_, message) => {
            let delay = match shared.breaker.failed_alone(queue, message.msg_id, error) {
                Alone::Yes(delay) => {
                    tracing::warn!(queue, msg_id = message.msg_id, %error, ?delay, "a message fails while others do not; it is put off");
                    metrics().messages_put_off.inc();
                    delay
                }
                Alone::NotSure(delay) => {
                    tracing::debug!(queue, msg_id = message.msg_id, %error, ?delay, "a message failed; it is put off");
                    delay
                }
                Alone::GiveUp => return give_up(shared, queue, message, error).await,
            };
            let delay = i32::try_from(delay.as_millis()).unwrap_or(i32::MAX);
            put_back(shared, queue, vec![message.msg_id], delay).await
        }
        Item::Due(hint, _) => {
            tracing::warn!(%error, task_uuid = %hint.task, "what is due of a task cannot be settled; it is tried again");
            // For a moment it was put off when it was taken, which is enough if nothing is wrong with it.
            if let Some(due_id) = hint.due_id.filter(|_| error.fault() == Fault::Message) {
                queue::put_off_due(&mut *shared.reads.acquire().await?, due_id).await?;
            }
            Ok(())
        }
    }
}

async fn failed_alone(shared: &Shared, queue: &'static str, message: &Message, error: &Error) -> Result<(), Error> {
    let reason: String = error.to_string().chars().take(300).collect();
    let failures = queue::note_failure(&mut *shared.pool.acquire().await?, queue, message.msg_id, &reason).await?;
    tracing::warn!(queue, msg_id = message.msg_id, failures, %error, "a message failed by itself");
    if failures < MAX_FAILURES {
        return put_back(shared, queue, vec![message.msg_id], 200).await;
    }
    give_up(shared, queue, message, error).await
}

/// Quarantines a message for its failures.
async fn give_up(shared: &Shared, queue: &'static str, message: &Message, error: &Error) -> Result<(), Error> {
    let reason: String = error.to_string().chars().take(300).collect();
    quarantine(shared, queue, vec![(message.msg_id, reason.clone())]).await?;
    // The attempt it told of ends as an error, so that its task does not wait for ever.
    if let Ok(Ok(result)) = message.body.as_ref().map(ResultHint::parse) {
        let look = Look::Quarantined(result.step, result.attempt, reason);
        let hint = Hint { task: result.task, look, msg_id: None, due_id: None };
        if let Err(error) = settle::settle(shared, queue, vec![hint]).await {
            tracing::error!(%error, task_uuid = %result.task, "the attempt of a quarantined result could not be ended");
        }
    }
    Ok(())
}
