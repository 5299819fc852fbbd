//! Schedules whose time has come: their tasks are submitted and their next ticks planned.
//!
//! A `schedule` hint says only that some schedule is due; the rows say which. A tick runs once,
//! because submitting it and moving `next_at` on are one transaction under the row's lock.

use tasker_shared::store::Fault;
use tasker_shared::store::tx::in_tx;
use tracing::instrument;
use uuid::Uuid;

use super::queue::{self, QueueChanges};
use super::{Error, Shared, locks};
use crate::schedules::{self, Fired};

/// Fires what is due, and forgets the hints that said so; not if some of it was left, because somebody
/// else holds it.
#[instrument(level = "debug", skip_all)]
pub async fn run(shared: &Shared, hints: &[i64]) -> Result<(), Error> {
    let mut left = false;
    loop {
        match fire(shared, None).await {
            Ok(fired) => {
                left |= fired.left;
                if !fired.is_full() {
                    break;
                }
            }
            // A key of one of them is somebody else's for now, and nothing says of which.
            Err(error) if error.fault() == Fault::Locked => {
                left = true;
                let due = schedules::due(&mut *shared.reads.acquire().await?).await?;
                for schedule in due {
                    match fire(shared, Some(schedule)).await {
                        Ok(_) => {}
                        Err(error) if error.fault() == Fault::Locked => shared.locks.met("schedules", 1),
                        Err(error) => return Err(error),
                    }
                }
                break;
            }
            Err(error) => return Err(error),
        }
    }
    if left {
        // The hint comes back.
        return Ok(());
    }
    // Only now: a hint that nobody could deal with comes back.
    queue::conclude(&mut *shared.pool.acquire().await?, &QueueChanges { due: hints, ..QueueChanges::default() })
        .await?;
    Ok(())
}

async fn fire(shared: &Shared, only: Option<Uuid>) -> Result<Fired, Error> {
    let fired = in_tx(&shared.pool, async |conn| {
        locks::wait_briefly(conn).await?;
        Ok::<Fired, Error>(schedules::fire_due(conn, only).await?)
    })
    .await?;
    for problem in &fired.problems {
        tracing::warn!(problem, "a schedule's tick brought no task");
    }
    if !fired.tasks.is_empty() {
        tracing::debug!(tasks = fired.tasks.len(), "schedules submitted tasks");
    }
    if fired.left && only.is_none() {
        shared.locks.met("schedules", 1);
    }
    Ok(fired)
}
