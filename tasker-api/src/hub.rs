//! One look at the database for everybody who watches: at most three statements a second in all,
//! however many there are, and none while nobody does.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgPool;
use tasker_shared::store::views::TaskView;
use tasker_shared::store::{details, views};
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::guard::{Credential, Known};
use crate::problem::Problem;

/// How often it looks.
const EVERY: Duration = Duration::from_secs(1);
/// How often while many watch.
const EVERY_IN_A_CROWD: Duration = Duration::from_millis(1_250);
/// So many are many.
const CROWD: usize = 20;
/// A row of the log carries the time of its writing, and is seen when it is committed: this much
/// later at most, or with the next move of its task.
const OVERLAP: TimeDelta = TimeDelta::seconds(2);
/// More tasks than this in one look are not named one by one.
const MOST: i64 = 500;

/// What every viewer is sent.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// These tasks moved, or one of their steps did.
    Tasks(Arc<Vec<TaskView>>),
    /// So many did that they are not named.
    Many,
    /// These credentials are not valid any more.
    Ended(Arc<HashSet<Arc<Credential>>>),
}

/// The viewers, and what they are sent.
#[derive(Debug)]
pub struct Hub {
    changes: broadcast::Sender<Change>,
    /// How many watch with each credential.
    watching: Mutex<HashMap<Arc<Credential>, usize>>,
    begun: Notify,
}

impl Default for Hub {
    fn default() -> Self {
        Self { changes: broadcast::Sender::new(64), watching: Mutex::default(), begun: Notify::new() }
    }
}

/// Somebody who watches, until this is dropped.
#[derive(Debug)]
pub(crate) struct Watching {
    hub: Arc<Hub>,
    credential: Arc<Credential>,
    changes: broadcast::Receiver<Change>,
}

impl Watching {
    /// The next change; `None` when what it watches with is not valid any more.
    pub async fn next(&mut self) -> Option<Change> {
        loop {
            match self.changes.recv().await {
                Ok(Change::Ended(ended)) if ended.contains(&self.credential) => return None,
                Ok(Change::Ended(_)) => {}
                Ok(change) => return Some(change),
                // Too slow for what happens: all that is known is that much did.
                Err(broadcast::error::RecvError::Lagged(_)) => return Some(Change::Many),
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut watching = self.hub.watching.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = watching.get_mut(&self.credential) {
            *count -= 1;
            if *count == 0 {
                watching.remove(&self.credential);
            }
        }
    }
}

impl Hub {
    /// Watches from now on.
    pub(crate) fn watch(self: &Arc<Self>, credential: &Arc<Credential>) -> Watching {
        let mut watching = self.watching.lock().unwrap_or_else(PoisonError::into_inner);
        *watching.entry(Arc::clone(credential)).or_default() += 1;
        self.begun.notify_one();
        Watching { hub: Arc::clone(self), credential: Arc::clone(credential), changes: self.changes.subscribe() }
    }

    fn credentials(&self) -> Vec<Arc<Credential>> {
        self.watching.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Whether so many watch that what they look at is read less often, and shared.
    pub(crate) fn is_crowded(&self) -> bool {
        self.changes.receiver_count() >= CROWD
    }

    /// Looks, while anybody watches, until `stop` fires.
    pub(crate) async fn run(&self, pool: PgPool, known: &Known, stop: CancellationToken) {
        let work = async {
            loop {
                let mut looks = Looks::default();
                while !self.credentials().is_empty() {
                    let began = tokio::time::Instant::now();
                    if let Err(problem) = looks.look(self, &pool, known).await {
                        tracing::debug!(
                            problem = problem.detail(),
                            "a look at what moved failed; the next one sees the same"
                        );
                    }
                    let every = if self.is_crowded() { EVERY_IN_A_CROWD } else { EVERY };
                    // A look that takes long is a sign of load: never more than a tenth of the time.
                    tokio::time::sleep(every.max(began.elapsed() * 9)).await;
                }
                self.begun.notified().await;
            }
        };
        tokio::select! { () = work => {}, () = stop.cancelled() => {} }
    }
}

/// What the looks have seen.
#[derive(Default)]
struct Looks {
    since: Option<DateTime<Utc>>,
    announced: HashMap<Uuid, DateTime<Utc>>,
}

impl Looks {
    async fn look(&mut self, hub: &Hub, pool: &PgPool, known: &Known) -> Result<(), Problem> {
        let asked = hub.credentials();
        let valid = known.check(pool, &asked).await?;
        let mut conn = pool.acquire().await?;
        let ended: HashSet<Arc<Credential>> = asked
            .into_iter()
            .zip(valid)
            .filter(|(_, valid)| valid.is_none())
            .map(|(credential, _)| credential)
            .collect();
        if !ended.is_empty() {
            let _ = hub.changes.send(Change::Ended(Arc::new(ended)));
        }
        let moved = details::moved_since(&mut conn, self.since, MOST + 1).await?;
        let many = i64::try_from(moved.tasks.len()).is_ok_and(|count| count > MOST);
        let since = moved.now - OVERLAP;
        let news: Vec<Uuid> = moved
            .tasks
            .iter()
            .filter(|(task, at)| self.announced.get(task) != Some(at))
            .map(|(task, _)| *task)
            .collect();
        if many {
            let _ = hub.changes.send(Change::Many);
        } else if !news.is_empty() {
            let tasks = views::these(&mut conn, &news).await?;
            let _ = hub.changes.send(Change::Tasks(Arc::new(tasks)));
        }
        // Only now: what was not announced is looked for again.
        self.announced = moved.tasks.into_iter().filter(|(_, at)| *at > since).collect();
        self.since = Some(since);
        Ok(())
    }
}
