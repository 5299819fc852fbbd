//! Whether everything fails alike, and what fails alone.
//!
//! An estimate of one process, in memory: it decides how long to wait, and whether one message is
//! the odd one out. Whatever it gets wrong costs a delay.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rand::RngExt;
use tasker_shared::metrics::metrics;
use tasker_shared::store;

use super::Error;

/// Failures one after another, without a success between, by which everything is taken to fail alike.
/// To find the one bad message of a batch of 500 takes ten.
const ALIKE: u32 = 12;
/// The shortest and the longest wait while everything fails alike.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
/// The shortest and the longest time that a message is put off which fails alone.
const SHORTEST_ALONE: Duration = Duration::from_millis(200);
const LONGEST_ALONE: Duration = Duration::from_mins(1);
/// Such failures of one message, with its delays most of an hour, after which it is given up; if no
/// other message failed in the same way.
const MOST_ALONE: u32 = 50;
/// Messages that are remembered for having failed alone, and for how long.
const REMEMBERED: usize = 1000;
const MEMORY: Duration = Duration::from_hours(2);
/// Between two lines of the log that say that everything waits.
const SAY_EVERY: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// What got through, ever.
    successes: u64,
    /// Failures since the last of them.
    in_a_row: u32,
    /// The next wait.
    pause: Duration,
    /// Since when everything has failed alike.
    since: Option<Instant>,
    /// Whether the log says so, and when it last began to.
    is_said: bool,
    said_at: Option<Instant>,
    alone: HashMap<(&'static str, i64), Lone>,
}

#[derive(Debug)]
struct Lone {
    /// How often it was tried.
    tries: u32,
    /// How often it failed while others got through.
    times: u32,
    sort: String,
    last_at: Instant,
    /// What had got through by then.
    successes: u64,
}

/// Whether a message that failed by itself is alone with that.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Alone {
    /// It is: it is tried again after this time.
    Yes(Duration),
    /// Nobody else has got through since it failed before; the same.
    NotSure(Duration),
    /// It is the only one, and was tried often enough.
    GiveUp,
}

impl Breaker {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something got through.
    pub(super) fn succeeded(&self) {
        let mut state = self.state();
        state.successes += 1;
        state.in_a_row = 0;
        state.pause = SHORTEST;
        if let Some(since) = state.since.take() {
            metrics().settling_paused.dec();
            if std::mem::take(&mut state.is_said) {
                tracing::info!(after_ms = since.elapsed().as_millis(), "settling goes on");
            }
        }
    }

    /// The system failed, though the database answers. Says how long to wait if everything fails alike.
    pub(super) fn failed(&self, error: &Error) -> Option<Duration> {
        let mut state = self.state();
        state.in_a_row = state.in_a_row.saturating_add(1);
        if state.in_a_row < ALIKE {
            return None;
        }
        // After the wait it is counted anew: the cause may be one message that the next batch begins with.
        state.in_a_row = 0;
        if state.since.is_none() {
            state.since = Some(Instant::now());
            metrics().settling_paused.inc();
        }
        if !state.is_said && state.said_at.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
            (state.is_said, state.said_at) = (true, Some(Instant::now()));
            tracing::warn!(%error, "everything that is settled fails alike; messages wait, and none is blamed");
        }
        let pause = state.pause.max(SHORTEST);
        state.pause = (pause * 2).min(LONGEST);
        Some(pause.mul_f64(rand::rng().random_range(0.75..1.0)))
    }

    /// A message failed by itself for a reason that blames nobody.
    pub(super) fn failed_alone(&self, queue: &'static str, msg_id: i64, error: &Error) -> Alone {
        let (sort, now) = (sort(error), Instant::now());
        let mut state = self.state();
        let successes = state.successes;
        state.alone.retain(|_, lone| now - lone.last_at < MEMORY);
        if state.alone.len() >= REMEMBERED && !state.alone.contains_key(&(queue, msg_id)) {
            return Alone::NotSure(LONGEST);
        }
        let lone = state.alone.entry((queue, msg_id)).or_insert(Lone {
            tries: 0,
            times: 0,
            sort: String::new(),
            last_at: now,
            successes,
        });
        // While nobody else gets through, nobody fails alone.
        let others = lone.successes != successes;
        lone.tries += 1;
        lone.times += u32::from(others);
        (lone.sort, lone.last_at, lone.successes) = (sort.clone(), now, successes);
        let (tries, times) = (lone.tries, lone.times);
        if times >= MOST_ALONE && state.alone.values().filter(|lone| lone.sort == sort).count() == 1 {
            state.alone.remove(&(queue, msg_id));
            return Alone::GiveUp;
        }
        let delay = SHORTEST_ALONE * 2_u32.pow((tries - 1).min(10));
        if others { Alone::Yes(delay.min(LONGEST_ALONE)) } else { Alone::NotSure(delay.min(LONGEST)) }
    }
}

/// What the database answered, by its code.
fn sort(error: &Error) -> String {
    let answer = match error {
        Error::Store(store::Error::Database(error)) => error.as_database_error(),
        _ => None,
    };
    answer
        .and_then(sqlx::error::DatabaseError::code)
        .map_or_else(|| "no answer".to_owned(), std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error() -> Error {
        Error::from(sqlx::Error::WorkerCrashed)
    }

    #[test]
    fn a_bad_message_of_a_batch_is_found_before_everything_is_taken_to_fail() {
        let breaker = Breaker::default();
        for _ in 0..3 {
            for _ in 0..ALIKE - 1 {
                assert_eq!(breaker.failed(&error()), None);
            }
            breaker.succeeded();
        }
    }

    #[test]
    fn waits_grow_while_everything_fails_and_end_with_the_first_success() {
        let breaker = Breaker::default();
        let wait = || std::iter::repeat_with(|| breaker.failed(&error())).flatten().next().expect("a wait");
        let waits: Vec<Duration> = std::iter::repeat_with(wait).take(10).collect();
        assert!(waits[0] <= SHORTEST && waits[9] > LONGEST / 2 && waits[9] <= LONGEST, "{waits:?}");
        assert!(breaker.state().since.is_some());
        breaker.succeeded();
        assert!(breaker.state().since.is_none());
        assert!(wait() <= SHORTEST);
    }

    #[test]
    fn a_message_is_given_up_only_if_others_get_through_and_none_fails_in_the_same_way() {
        let breaker = Breaker::default();
        let fail = |msg_id| breaker.failed_alone("step_results", msg_id, &error());
        assert_eq!(fail(1), Alone::NotSure(SHORTEST_ALONE));
        assert_eq!(fail(1), Alone::NotSure(SHORTEST_ALONE * 2));
        for _ in 0..2 * MOST_ALONE {
            assert!(matches!(fail(1), Alone::NotSure(delay) if delay <= LONGEST), "nobody gets through");
        }
        let fail = |msg_id| {
            breaker.succeeded();
            fail(msg_id)
        };
        for _ in 1..MOST_ALONE {
            assert_eq!(fail(1), Alone::Yes(LONGEST_ALONE));
        }
        assert_eq!(fail(1), Alone::GiveUp);
        fail(2);
        for _ in 0..2 * MOST_ALONE {
            assert_ne!(fail(1), Alone::GiveUp, "another fails as it does");
        }
    }
}
