//! Claims attempts of one queue: one statement for as many as there are free
//! slots, so that no claim ever waits in this process for its turn.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use sqlx::PgPool;
use tasker_shared::store::Error;
use tasker_shared::store::outage::Outage;
use tasker_shared::telemetry::live::{self, Area};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::{Connection, backoff, jittered};
use crate::executor::Executor;
use crate::measure;
use crate::protocol::{self, Claim};

/// In one call; a longer transaction would keep the first of its attempts waiting.
const MAX_BATCH: usize = 500;
/// After a claim that found less than there was room for, the next steps need at least two
/// commits to arrive: looking sooner would only find less.
const PACE: Duration = Duration::from_millis(2);
const FIRST_POLL: Duration = Duration::from_millis(10);
const LAST_POLL: Duration = Duration::from_secs(5);
/// While the queue does not exist yet nobody can wake its readers.
const MISSING_POLL: Duration = Duration::from_secs(1);

/// The loop of one queue.
pub(crate) struct Claimer {
    pub(crate) executor: Arc<Executor>,
    pub(crate) worker: String,
    pub(crate) queue: Option<String>,
    pub(crate) handlers: Vec<String>,
    pub(crate) slots: Arc<Semaphore>,
    pub(crate) slot_count: usize,
    pub(crate) attempts: TaskTracker,
    /// Fires when the queue is said to hold something.
    pub(crate) wake: Arc<Notify>,
}

impl Claimer {
    /// Claims until `stop` fires; a call that is under way then still counts.
    pub(crate) async fn run(self, pool: PgPool, stop: CancellationToken) {
        let outage = Outage::of(&pool);
        let mut connection = Connection::new(pool);
        let (mut empty, mut failures, mut logged, mut more, mut asleep) = (0, 0, false, false, false);
        loop {
            let room = async {
                self.executor.results.room().await;
                self.free_slots(more).await
            };
            let mut slots = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                slots = room => slots,
            };
            let asked = slots.num_permits();
            let wait = match self.claim(&mut connection, asked).await {
                Ok(claims) => {
                    outage.answered();
                    (failures, logged) = (0, false);
                    empty = if claims.is_empty() { empty + 1 } else { 0 };
                    more = claims.len() == asked;
                    // As the database has marked us: behind a lone step there is hardly another.
                    asleep = claims.len() < asked.min(2);
                    self.start(claims, &mut slots);
                    match empty {
                        0 if more => continue,
                        0 if asleep => poll_delay(0),
                        0 => PACE,
                        _ => poll_delay(empty - 1),
                    }
                }
                Err(error) => {
                    connection.broken();
                    measure::call_failed("claim");
                    let missing = is_missing(&error);
                    if !outage.handles(&error) && !std::mem::replace(&mut logged, true) {
                        self.complain(&error, missing);
                    }
                    failures += 1;
                    if missing { MISSING_POLL } else { backoff(failures - 1) }
                }
            };
            drop(slots);
            let pause = async {
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = self.wake.notified(), if asleep => {}
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = pause => {}
            }
        }
    }

    #[tracing::instrument(name = "claim", skip_all, fields(namespace = &*self.executor.namespace, queue = self.queue, max))]
    async fn claim(&self, connection: &mut Connection, max: usize) -> Result<Vec<Claim>, Error> {
        let max = i32::try_from(max).unwrap_or(i32::MAX);
        let (namespace, queue) = (&*self.executor.namespace, self.queue.as_deref());
        let began = SystemTime::now();
        let claims =
            protocol::claim_steps(connection.get().await?, namespace, queue, &self.worker, &self.handlers, max).await?;
        if live::is_on(Area::Messaging, Some(namespace)) {
            let queue =
                queue.map_or_else(|| format!("worker_{namespace}"), |name| format!("worker_{namespace}__{name}"));
            let received = live::Received { queue: &queue, namespace: Some(namespace), began, count: claims.len() };
            // The claim settles its messages, too: both are one statement.
            live::batch(received, claims.iter().filter_map(|claim| claim.traceparent.as_deref()));
        }
        Ok(claims)
    }

    fn start(&self, mut claims: Vec<Claim>, slots: &mut OwnedSemaphorePermit) {
        let received = Instant::now();
        let asked = slots.num_permits();
        if claims.len() > asked {
            // There is no slot for them. Nobody keeps their leases, so others get their steps.
            tracing::warn!(asked, came = claims.len(), "the database gave more claims than were asked for");
            claims.truncate(asked);
        }
        self.executor.numbers.claimed(claims.len());
        let stops = self.executor.held.insert(&claims, received);
        for (claim, stop) in claims.into_iter().zip(stops) {
            let Some(slot) = slots.split(1) else { break };
            self.attempts.spawn(Arc::clone(&self.executor).run(claim, stop, received, slot));
        }
    }

    /// All free slots, at least one.
    async fn free_slots(&self, more: bool) -> OwnedSemaphorePermit {
        let mut slots = Arc::clone(&self.slots).acquire_owned().await.expect("never closed");
        // With every slot in use and more to do, the first slot to become free would fetch one
        // step alone; a moment later there are others, and one statement serves them all.
        if more && self.slots.available_permits() < self.slot_count / 4 {
            tokio::time::sleep(PACE).await;
        }
        let others = self.slots.available_permits().min(MAX_BATCH - 1);
        if let Ok(others) = Arc::clone(&self.slots).try_acquire_many_owned(u32::try_from(others).unwrap_or(0)) {
            slots.merge(others);
        }
        slots
    }

    fn complain(&self, error: &Error, missing: bool) {
        let (namespace, queue) = (&*self.executor.namespace, self.queue.as_deref());
        if missing {
            tracing::warn!(
                namespace,
                queue,
                "the queue does not exist yet; it is made when a template that uses it is registered"
            );
        } else {
            tracing::warn!(namespace, queue, %error, "nothing can be claimed; it is tried until the database answers");
        }
    }
}

/// The table of a queue that no template has asked for.
fn is_missing(error: &Error) -> bool {
    matches!(error, Error::Database(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01"))
}

fn poll_delay(empty: u32) -> Duration {
    jittered(FIRST_POLL.saturating_mul(1 << empty.min(16)).min(LAST_POLL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_backs_off_from_ten_milliseconds_to_five_seconds() {
        for (empty, whole) in [(0, 10), (1, 20), (5, 320), (9, 5_000), (1_000_000, 5_000)] {
            let (least, most) = (Duration::from_millis(whole * 3 / 4), Duration::from_millis(whole));
            let delay = poll_delay(empty);
            assert!(least <= delay && delay <= most, "{empty}: {delay:?}");
        }
    }
}
