//! Schedules whose time has come: their tasks are submitted and their next ticks planned.
//!
//! A `schedule` hint says only that some schedule is due; the rows say which. A tick runs once,
//! because submitting it and moving `next_at` on are one transaction under the row's lock.

use tasker_shared::queue::{self, Traffic};
use tasker_shared::store::schedules::{self, Fired};
use tasker_shared::store::tx::in_tx;
use tracing::instrument;

use super::{Error, Shared};

/// Fires what is due, and forgets the hints that said so.
#[instrument(level = "debug", skip_all)]
pub async fn run(shared: &Shared, hints: &[i64]) -> Result<(), Error> {
    loop {
        let fired = in_tx(&shared.pool, async |conn| Ok::<Fired, Error>(schedules::fire_due(conn).await?)).await?;
        for problem in &fired.problems {
            tracing::warn!(problem, "a schedule's tick brought no task");
        }
        if !fired.tasks.is_empty() {
            tracing::debug!(tasks = fired.tasks.len(), "schedules submitted tasks");
        }
        if !fired.is_full() {
            break;
        }
    }
    // Only now: a hint that nobody could deal with comes back.
    queue::conclude(&mut *shared.pool.acquire().await?, &Traffic { due: hints, ..Traffic::default() }).await?;
    Ok(())
}
