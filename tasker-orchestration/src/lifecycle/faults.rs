//! What becomes of hints that fail, or that a lock of somebody else keeps waiting: put back for a
//! moment, put off, quarantined.
//!
//! A message is quarantined only after repeated failures that are its own fault (`Fault::Message`).
//! What the system is to blame for costs a delay: of everything while everything fails alike, of one
//! message while others succeed.

use tasker_shared::metrics::metrics;
use tasker_shared::state_machine::Event;
use tasker_shared::store::Fault;
use tasker_shared::store::tx::in_tx;

use super::breaker::Alone;
use super::locks::Wait;
use super::{About, Error, Hint, Request, Shared, Source, queue, settle};

/// Failures of its own after which a message is quarantined.
const MAX_FAILURES: i32 = 3;

/// The messages of a part.
pub(super) fn messages(part: &[&Hint]) -> impl Iterator<Item = i64> {
    part.iter().filter_map(|hint| Some(hint.message()?.0))
}

/// Leaves hints for a later time, because somebody else holds a lock: messages are put off in their
/// queue, and what is due was, when it was taken.
pub(super) async fn leave_locked(shared: &Shared, queue: &'static str, hints: &[&Hint]) -> Result<(), Error> {
    let is_due = hints.iter().all(|hint| hint.message().is_none());
    shared.locks.remember(hints.iter().map(|hint| hint.subject()));
    shared.locks.met(if is_due { "due" } else { queue }, hints.len());
    let ids: Vec<i64> = messages(hints).collect();
    if !ids.is_empty() {
        queue::put_off(&mut *shared.reads.acquire().await?, queue, &ids).await?;
    }
    Ok(())
}

/// Lets messages be read again after so many milliseconds.
pub(super) async fn put_back(shared: &Shared, queue: &str, msg_ids: Vec<i64>, delay_ms: i32) -> Result<(), Error> {
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

/// Lets one that fails while others do not come back later, each time later than before.
pub(super) async fn put_off(shared: &Shared, queue: &'static str, lone: &Hint, error: &Error) -> Result<(), Error> {
    let id = match lone.source {
        Source::Message { id, .. } => id,
        Source::Found { due_id, .. } => {
            tracing::warn!(%error, task_uuid = ?lone.task(), "what is due of a task cannot be settled; it is tried again");
            // For a moment it was put off when it was taken, which is enough if nothing is wrong with it.
            if let Some(due_id) = due_id.filter(|_| error.fault() == Fault::Message) {
                queue::put_off_timer(&mut *shared.reads.acquire().await?, due_id).await?;
            }
            return Ok(());
        }
    };
    let delay = match shared.breaker.failed_alone(queue, id, error) {
        Alone::Yes(delay) => {
            tracing::warn!(queue, msg_id = id, %error, ?delay, "a message fails while others do not; it is put off");
            metrics().messages_put_off.inc();
            delay
        }
        Alone::NotSure(delay) => {
            tracing::debug!(queue, msg_id = id, %error, ?delay, "a message failed; it is put off");
            delay
        }
        Alone::GiveUp => return give_up(shared, queue, lone, id, error).await,
    };
    put_back(shared, queue, vec![id], i32::try_from(delay.as_millis()).unwrap_or(i32::MAX)).await
}

/// Notes that a message failed by its own fault, and gives it up when it has failed often enough.
pub(super) async fn failed_alone(
    shared: &Shared,
    queue: &'static str,
    lone: &Hint,
    error: &Error,
) -> Result<(), Error> {
    let Some((id, _)) = lone.message() else {
        return put_off(shared, queue, lone, error).await;
    };
    let reason: String = error.to_string().chars().take(300).collect();
    let failures = queue::note_failure(&mut *shared.pool.acquire().await?, queue, id, &reason).await?;
    tracing::warn!(queue, msg_id = id, failures, %error, "a message failed by itself");
    if failures < MAX_FAILURES {
        return put_back(shared, queue, vec![id], 200).await;
    }
    give_up(shared, queue, lone, id, error).await
}

/// Quarantines a message for its failures.
async fn give_up(shared: &Shared, queue: &'static str, lone: &Hint, id: i64, error: &Error) -> Result<(), Error> {
    let reason: String = error.to_string().chars().take(300).collect();
    quarantine(shared, queue, vec![(id, reason.clone())]).await?;
    // The attempt that it reported ends as an error, so that its task does not wait for ever.
    if let Request::Event(task, Event::Result { step, attempt }) = lone.request {
        let event = Event::Quarantined { step, attempt, reason };
        let about = About { task, event: &event, msg_id: None, due_id: None };
        if let Err(error) = settle::settle(shared, queue, vec![about], Wait::Once).await {
            tracing::error!(%error, task_uuid = %task, "the attempt of a quarantined result could not be ended");
        }
    }
    Ok(())
}
