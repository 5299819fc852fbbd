//! Batches: whose they are, and what becomes of those that fail, by bisection and quarantine.
//!
//! A message is quarantined only after repeated *deterministic* failures of its own; losing a
//! connection, a deadlock or a killed process never counts against it.

use std::time::Duration;

use rand::RngExt;
use serde_json::Value;
use tasker_shared::message::{ResultHint, SendSignal};
use tasker_shared::metrics::metrics;
use tasker_shared::queue::{self, Message, STEP_RESULTS};
use tasker_shared::store::tx::in_tx;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use uuid::Uuid;

use super::{Error, Hint, Look, Shared, initialize, settle};

/// Deterministic failures after which a message is quarantined.
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

/// Deals with items of one kind, or such that name a task; the suspicious ones each by itself.
pub(super) async fn run(shared: &Shared, queue: &'static str, items: Vec<Item>) -> Result<Tally, Error> {
    let is_suspect = |item: &Item| item.message().is_some_and(|message| message.read_ct > SUSPECT_READS);
    let (suspects, others): (Vec<_>, Vec<_>) = items.into_iter().partition(is_suspect);
    let mut tally = Tally::default();
    bisect(shared, queue, &others, &mut tally).await?;
    for suspect in &suspects {
        bisect(shared, queue, std::slice::from_ref(suspect), &mut tally).await?;
    }
    Ok(tally)
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

async fn work(shared: &Shared, queue: &'static str, items: &[Item]) -> Result<Tally, Error> {
    match items.first() {
        Some(Item::Submit(..)) => initialize::create(shared, items).await?,
        Some(Item::Signal(..)) => initialize::keep_signals(shared, items).await?,
        Some(Item::Settle(..) | Item::Due(..)) => return settle_items(shared, queue, items).await,
        None => {}
    }
    Ok(Tally::default())
}

async fn settle_items(shared: &Shared, queue: &'static str, items: &[Item]) -> Result<Tally, Error> {
    let hints = items
        .iter()
        .filter_map(|item| match item {
            Item::Settle(hint, _) | Item::Due(hint, _) => Some(hint.clone()),
            Item::Submit(..) | Item::Signal(..) => None,
        })
        .collect();
    let settled = settle::settle(shared, queue, hints).await?;
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
    Ok(Tally { moved: settled.moved, deferred: settled.deferred.len() })
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
/// What still fails alone is noted, and quarantined when it has failed often enough.
async fn bisect(shared: &Shared, queue: &'static str, items: &[Item], tally: &mut Tally) -> Result<(), Error> {
    let mut open: Vec<&[Item]> = vec![items];
    while let Some(part) = open.pop() {
        match work(shared, queue, part).await {
            Ok(Tally { moved, deferred }) => {
                tally.moved += moved;
                tally.deferred += deferred;
            }
            Err(error) if error.is_transient() => {
                // The messages come back by themselves when their reading times out; soon is better.
                tracing::debug!(%error, "a batch will be tried again");
                tokio::time::sleep(Duration::from_millis(50)).await;
                let ids = part.iter().filter_map(|item| Some(item.message()?.msg_id)).collect();
                put_back(shared, queue, ids, 0).await?;
                tally.deferred += part.len();
            }
            Err(_) if part.len() > 1 => {
                let (left, right) = part.split_at(part.len() / 2);
                open.extend([right, left]);
            }
            Err(error) => match &part[0] {
                Item::Submit(_, message) | Item::Signal(_, message) | Item::Settle(_, message) => {
                    failed_alone(shared, queue, message, &error).await?;
                }
                Item::Due(hint, _) => {
                    tracing::warn!(%error, task_uuid = %hint.task, "what is due of a task cannot be settled; it is tried again");
                    if let Some(due_id) = hint.due_id {
                        queue::put_off_due(&mut *shared.reads.acquire().await?, due_id).await?;
                    }
                }
            },
        }
    }
    Ok(())
}

async fn failed_alone(shared: &Shared, queue: &'static str, message: &Message, error: &Error) -> Result<(), Error> {
    let reason: String = error.to_string().chars().take(300).collect();
    let failures = queue::note_failure(&mut *shared.pool.acquire().await?, queue, message.msg_id, &reason).await?;
    tracing::warn!(queue, msg_id = message.msg_id, failures, %error, "a message failed by itself");
    if failures < MAX_FAILURES {
        return put_back(shared, queue, vec![message.msg_id], 200).await;
    }
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
