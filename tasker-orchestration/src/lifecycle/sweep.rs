//! What nobody sends a message for: due retries, lost claims, timeouts, delayed starts, schedules.
//!
//! A due hint is read like a message: put off for a moment, settled, deleted in the same
//! transaction. It decides nothing; the rows do.

use tasker_shared::queue::{self, DueHint, LookedAt, Unlocked};
use tasker_shared::state_machine::Event;
use tasker_shared::store::Error as StoreError;
use tracing::instrument;
use uuid::Uuid;

use super::{Error, Shared, batch, schedules};

/// Hints taken in one go.
const TAKE: i32 = 500;

/// Settles what is due; answers how many hints were taken.
#[instrument(level = "debug", skip_all)]
pub async fn sweep(shared: &Shared) -> Result<usize, Error> {
    let due = queue::take_due(&mut *shared.reads.acquire().await.map_err(StoreError::from)?, TAKE).await?;
    let taken = due.len();
    // What is deferred stays put off and comes back.
    batch::run_found(shared, due.iter().filter_map(event)).await?;
    let schedules: Vec<i64> = due.iter().filter(|due| due.kind == "schedule").map(|due| due.due_id).collect();
    if !schedules.is_empty() {
        schedules::run(shared, &schedules).await?;
    }
    Ok(taken)
}

/// Looks at the locks of the workers that hold claims. The claims of those among the suspects that
/// still have none end now; the sweep is woken for them, and for those whose lease has run out.
#[instrument(level = "debug", skip_all)]
pub async fn look_for_dead_workers(shared: &Shared, suspects: &[Unlocked]) -> Result<LookedAt, StoreError> {
    let looked_at = queue::look_for_dead_workers(&mut *shared.reads.acquire().await?, suspects).await?;
    for dead in looked_at.unlocked.iter().filter(|worker| worker.dead) {
        tracing::warn!(worker = dead.worker, "a worker has died: its session is gone; its steps run again elsewhere");
    }
    if looked_at.overdue {
        shared.due.notify_one();
    }
    Ok(looked_at)
}

fn event(due: &DueHint) -> Option<(Uuid, Event, Option<i64>)> {
    let event = match (due.kind.as_str(), due.step_uuid) {
        ("lease", Some(step)) => Event::LeaseDue { step },
        ("retry", Some(step)) => Event::RetryDue { step },
        ("queue_timeout", Some(step)) => Event::QueueDue { step },
        ("timer", Some(step)) => Event::TimerDue { step },
        ("step_timeout", Some(step)) => Event::StepTotalDue { step },
        ("signal", _) => Event::SignalDue,
        ("total_timeout", _) => Event::TotalDue,
        ("start", _) => Event::Start,
        _ => return None,
    };
    Some((due.task_uuid?, event, Some(due.due_id)))
}
