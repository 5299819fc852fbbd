//! One look at the database for everybody who watches: two or three statements a second in all,
//! however many there are, and none while nobody does.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgPool;
use tasker_shared::store::views::TaskView;
use tasker_shared::store::{self, details, keys, views};
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often it looks.
const EVERY: Duration = Duration::from_secs(1);
/// A row of the log carries the time of its writing, and is seen when it is committed: this much
/// later at most, or with the next move of its task.
const OVERLAP: TimeDelta = TimeDelta::seconds(2);
/// More tasks than this in one look are not named one by one.
const MOST: i64 = 500;

/// What everybody who watches is told.
#[derive(Debug, Clone)]
pub enum Change {
    /// These tasks moved, or one of their steps did.
    Tasks(Arc<Vec<TaskView>>),
    /// So many did that they are not named.
    Many,
    /// These keys are not valid any more.
    Ended(Arc<HashSet<String>>),
}

/// Who watches, and what they are told.
#[derive(Debug)]
pub struct Hub {
    changes: broadcast::Sender<Change>,
    /// How many watch with each key.
    watching: Mutex<HashMap<String, usize>>,
    begun: Notify,
}

impl Default for Hub {
    fn default() -> Self {
        Self { changes: broadcast::Sender::new(64), watching: Mutex::default(), begun: Notify::new() }
    }
}

/// Somebody who watches, until this is dropped.
#[derive(Debug)]
pub struct Watching {
    hub: Arc<Hub>,
    key_id: String,
    changes: broadcast::Receiver<Change>,
}

impl Watching {
    /// The next change; `None` when the key that watches is not valid any more.
    pub async fn next(&mut self) -> Option<Change> {
        loop {
            match self.changes.recv().await {
                Ok(Change::Ended(keys)) if keys.contains(&self.key_id) => return None,
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
        if let Some(count) = watching.get_mut(&self.key_id) {
            *count -= 1;
            if *count == 0 {
                watching.remove(&self.key_id);
            }
        }
    }
}

impl Hub {
    /// Watches from now on.
    pub fn watch(self: &Arc<Self>, key_id: &str) -> Watching {
        let mut watching = self.watching.lock().unwrap_or_else(PoisonError::into_inner);
        *watching.entry(key_id.to_owned()).or_default() += 1;
        self.begun.notify_one();
        Watching { hub: Arc::clone(self), key_id: key_id.to_owned(), changes: self.changes.subscribe() }
    }

    fn keys(&self) -> Vec<String> {
        self.watching.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Looks, while anybody watches, until `stop` fires.
    pub(crate) async fn run(&self, pool: PgPool, stop: CancellationToken) {
        let work = async {
            loop {
                let mut looks = Looks::default();
                while !self.keys().is_empty() {
                    let began = tokio::time::Instant::now();
                    if let Err(error) = looks.look(self, &pool).await {
                        tracing::debug!(%error, "a look at what moved failed; the next one sees the same");
                    }
                    // A look that takes long is a sign of load: never more than a tenth of the time.
                    tokio::time::sleep(EVERY.max(began.elapsed() * 9)).await;
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
    told: HashMap<Uuid, DateTime<Utc>>,
}

impl Looks {
    async fn look(&mut self, hub: &Hub, pool: &PgPool) -> Result<(), store::Error> {
        let mut conn = pool.acquire().await?;
        let asked = hub.keys();
        let valid: HashSet<String> = keys::still_valid(&mut conn, &asked).await?.into_iter().collect();
        let ended: HashSet<String> = asked.into_iter().filter(|key| !valid.contains(key)).collect();
        if !ended.is_empty() {
            let _ = hub.changes.send(Change::Ended(Arc::new(ended)));
        }
        let moved = details::moved_since(&mut conn, self.since, MOST + 1).await?;
        let many = i64::try_from(moved.tasks.len()).is_ok_and(|count| count > MOST);
        let since = moved.now - OVERLAP;
        let news: Vec<Uuid> =
            moved.tasks.iter().filter(|(task, at)| self.told.get(task) != Some(at)).map(|(task, _)| *task).collect();
        if many {
            let _ = hub.changes.send(Change::Many);
        } else if !news.is_empty() {
            let tasks = views::these(&mut conn, &news).await?;
            let _ = hub.changes.send(Change::Tasks(Arc::new(tasks)));
        }
        // Only now: what was not told is looked for again.
        self.told = moved.tasks.into_iter().filter(|(_, at)| *at > since).collect();
        self.since = Some(since);
        Ok(())
    }
}
