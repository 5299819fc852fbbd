//! What many viewers look at is read once: answers that are a moment old, and one reader at a time.
//!
//! It holds what the database said, never what a viewer may see beyond the key it is kept under:
//! every key names the namespaces of who asked.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use tasker_shared::store::views;
use uuid::Uuid;

use super::rows::{QueueTotals, Rates, Tally, TaskDetail, TaskFilter};
use super::tasks::Listing;
use crate::State;
use crate::problem::Problem;

/// Keys that are remembered at once.
const MOST_KEYS: usize = 500;
/// How long an answer is kept that nobody asks for.
const KEPT: Duration = Duration::from_mins(1);
/// While many watch, an answer is good for so long for each statement that it takes to make.
const PER_STATEMENT: Duration = Duration::from_millis(650);

type Slot<V> = Arc<tokio::sync::Mutex<Option<(Instant, V)>>>;

/// Answers by what was asked.
#[derive(Debug)]
pub(super) struct Memo<K, V>(Mutex<HashMap<K, Slot<V>>>);

impl<K, V> Default for Memo<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V: Clone> Memo<K, V> {
    /// The answer, if it is no older than `good_for`; else `ask` is asked, by one caller, while the
    /// others wait for it.
    pub async fn get(
        &self,
        key: K,
        good_for: Duration,
        ask: impl AsyncFnOnce() -> Result<V, Problem>,
    ) -> Result<V, Problem> {
        let slot = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if !all.contains_key(&key) {
                // What nobody asks for any more may be large. Who waits for a slot keeps it.
                all.retain(|_, slot| {
                    slot.try_lock().is_ok_and(|held| held.as_ref().is_some_and(|(at, _)| at.elapsed() < KEPT))
                });
                if all.len() >= MOST_KEYS {
                    all.clear();
                }
            }
            Arc::clone(all.entry(key).or_default())
        };
        let mut held = slot.lock().await;
        if let Some((at, value)) = held.as_ref().filter(|(at, _)| at.elapsed() < good_for) {
            let _ = at;
            return Ok(value.clone());
        }
        let value = ask().await?;
        *held = Some((Instant::now(), value.clone()));
        Ok(value)
    }
}

impl<K: Eq + Hash, V> Memo<K, V> {
    /// The next one asks anew: something was just changed.
    pub fn forget(&self, key: &K) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// The namespaces that an answer was made for.
pub(super) type Visible = Option<Vec<String>>;

/// What the pages of one server remember.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub listings: Memo<(Visible, TaskFilter), Arc<Listing>>,
    pub tallies: Memo<(Visible, Option<String>), Arc<Vec<Tally>>>,
    pub names: Memo<Visible, Arc<Vec<(String, String)>>>,
    pub queues: Memo<Visible, Arc<super::queues::Overview>>,
    pub tasks: Memo<Uuid, Option<Arc<super::task_data::TaskData>>>,
    pub details: Memo<Uuid, Option<Arc<TaskDetail>>>,
    pub steps: Memo<(Uuid, Uuid), Option<Arc<super::step::Detail>>>,
    /// With what errors say, and without.
    pub traces: Memo<(Uuid, bool), Option<Arc<super::task_timeline::TaskTimeline>>>,
    /// The same of tasks that have ended, as they were when they last moved.
    pub ended_traces: Memo<(Uuid, bool, DateTime<Utc>), Option<Arc<super::task_timeline::TaskTimeline>>>,
    /// The namespace of a task, which never changes.
    pub homes: Memo<Uuid, Option<String>>,
    skew: Memo<(), TimeDelta>,
    totals: Mutex<HashMap<String, Sample>>,
}

/// How long an answer is good that is made by so many statements: `alone` while few watch.
pub(super) fn good_for(state: &State, alone: Duration, statements: u32) -> Duration {
    if state.hub().is_crowded() { alone.max(PER_STATEMENT * statements) } else { alone }
}

/// The first of two samples of a queue, taken some seconds apart.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    sent: i64,
    depth: i64,
    rates: Option<Rates>,
}

impl Memory {
    /// The database's time, by this machine's clock and their difference, which is asked once a minute.
    pub async fn now(&self, state: &State) -> Result<DateTime<Utc>, Problem> {
        let skew = self.skew.get((), Duration::from_mins(1), async || {
            let before = Utc::now();
            let theirs = views::now(&mut *state.pool().acquire().await?).await?;
            Ok(theirs - (before + (Utc::now() - before) / 2))
        });
        Ok(Utc::now() + skew.await?)
    }

    /// What passes through each queue, from this sample and the one before.
    pub fn rates(&self, totals: &[QueueTotals]) -> HashMap<String, Rates> {
        let mut samples = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let at = Instant::now();
        let mut rates = HashMap::new();
        for QueueTotals { queue, sent, depth } in totals {
            let sample = samples.entry(queue.clone()).or_insert(Sample { at, sent: *sent, depth: *depth, rates: None });
            let s = at.duration_since(sample.at).as_secs_f64();
            if s >= 2.0 {
                #[expect(clippy::cast_precision_loss, reason = "a rate for the eye")]
                let per_second = |n: i64| (n.max(0) as f64) / s;
                let (sent_since, more) = (sent - sample.sent, depth - sample.depth);
                // A sample from long ago says nothing of now.
                let known = s < 120.0;
                let found = Rates { into: per_second(sent_since), out: per_second(sent_since - more) };
                *sample = Sample { at, sent: *sent, depth: *depth, rates: known.then_some(found) };
            }
            if let Some(found) = sample.rates {
                rates.insert(queue.clone(), found);
            }
        }
        rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn two_hundred_viewers_ask_once() {
        let memo = Arc::new(Memo::<&str, u32>::default());
        let asked = Arc::new(AtomicU32::new(0));
        let viewers: Vec<_> = (0..200)
            .map(|_| {
                let (memo, asked) = (Arc::clone(&memo), Arc::clone(&asked));
                tokio::spawn(async move {
                    let ask = async || {
                        tokio::task::yield_now().await;
                        Ok(asked.fetch_add(1, Ordering::Relaxed))
                    };
                    memo.get("tasks", Duration::from_mins(1), ask).await.unwrap()
                })
            })
            .collect();
        for viewer in viewers {
            assert_eq!(viewer.await.unwrap(), 0);
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}
