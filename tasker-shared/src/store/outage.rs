//! A database that is away, as all loops of a process see it together.
//!
//! It decides what is said of it, how long a loop waits before its next try, and whether a
//! connection is tested before it is used. It never decides whether something is tried again:
//! every loop does that for itself.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;

/// One connection may be lost alone: an outage is logged when something fails so long after that.
const ONE_MORE: Duration = Duration::from_millis(100);
/// The same while others are answered: each loop may hold a connection that died long ago.
const PARTLY: Duration = Duration::from_secs(3);
/// Between the first two lines about an outage; each further pause is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Between two lines about an outage that goes on.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// Nothing may have failed for so long before the outage counts as over: while some connections
/// still work and others do not, it is one outage and not many.
const CALM: Duration = Duration::from_secs(1);
/// Between two tries of one loop.
const SHORTEST_TRY: Duration = Duration::from_millis(100);
/// The same when the outage has lasted a while: how long a loop sleeps at most after its end.
const LONGEST_TRY: Duration = Duration::from_secs(1);
/// For so long after a connection was lost, all that are older are tested before they are used.
const DOUBT: Duration = Duration::from_secs(5);

/// Which database: host, port, socket, name.
type Address = (String, u16, Option<PathBuf>, Option<String>);

/// Whether the database of this process is away, and what was said of it.
#[derive(Debug, Default)]
pub struct Outage {
    /// The same as in `now`, for those who find that all is well.
    is_away: AtomicBool,
    now: Mutex<Option<Away>>,
    /// When a connection was last lost.
    lost_at: Mutex<Option<Instant>>,
}

/// An outage that is not over.
#[derive(Debug, Clone, Copy)]
struct Away {
    since: Instant,
    failed_at: Instant,
    /// The first answer after the last failure.
    answered_at: Option<Instant>,
    /// Whether there was a log line about it.
    is_logged: bool,
    say_at: Instant,
    pause: Duration,
}

/// What is worth a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LogLine {
    Began,
    Lasts(Duration),
    Over(Duration),
}

impl Outage {
    /// The one of the database that a pool leads to. All pools of this process that lead to the
    /// same database share it, whoever made them.
    pub fn of(pool: &PgPool) -> Arc<Self> {
        Self::at(&pool.connect_options())
    }

    /// The same, of a pool that is about to be made.
    pub(super) fn at(to: &PgConnectOptions) -> Arc<Self> {
        static ALL: Mutex<BTreeMap<Address, Arc<Outage>>> = Mutex::new(BTreeMap::new());
        let address =
            (to.get_host().into(), to.get_port(), to.get_socket().cloned(), to.get_database().map(str::to_owned));
        Arc::clone(ALL.lock().unwrap_or_else(PoisonError::into_inner).entry(address).or_default())
    }

    /// Whether an error is one of a database that is away. Then it is dealt with: a line is written
    /// for the first one and after growing pauses, and connections that were made before are tested
    /// before they are used. Any other error is the caller's to log.
    pub fn handles(&self, error: &(dyn StdError + 'static)) -> bool {
        let away = is_away(error);
        if away {
            self.failed(error);
        }
        away
    }

    /// The same, of an error that is known to be one of a database that is away.
    pub fn failed(&self, error: &(impl std::fmt::Display + ?Sized)) {
        self.doubt();
        let line = self.note_failure(Instant::now());
        match line {
            Some(LogLine::Began) => {
                tracing::warn!(%error, "the database does not answer; it is tried until it does");
            }
            Some(LogLine::Lasts(since)) => {
                tracing::warn!(%error, "the database has not answered for {} s", seconds(since));
            }
            Some(LogLine::Over(_)) | None => {}
        }
    }

    /// The database has answered. Costs nothing while all is well.
    pub fn answered(&self) {
        if !self.is_away.load(Ordering::Relaxed) {
            return;
        }
        if let Some(LogLine::Over(lasted)) = self.note_answer(Instant::now()) {
            tracing::info!("the database is back after {} s", seconds(lasted));
        }
    }

    /// Notes that a connection was lost, or is one to a server that only reads: the others may be, too.
    pub(super) fn doubt(&self) {
        *self.lost_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether a connection of this age was made before the last loss, and that was a moment ago.
    pub(super) fn is_doubted(&self, age: Duration) -> bool {
        let lost_at = *self.lost_at.lock().unwrap_or_else(PoisonError::into_inner);
        lost_at.is_some_and(|at| at.elapsed() < DOUBT.min(age))
    }

    /// How long a loop waits after a failure: longer each time while the outage lasts, never in step
    /// with others, and never so long that work waits for it when the database is back.
    pub fn pause(&self) -> Duration {
        let lasted = self.now().map_or(Duration::ZERO, |away| away.since.elapsed());
        let pause = (lasted / 4).clamp(SHORTEST_TRY, LONGEST_TRY);
        pause.mul_f64(rand::random_range(0.75..=1.0))
    }

    fn now(&self) -> MutexGuard<'_, Option<Away>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_failure(&self, at: Instant) -> Option<LogLine> {
        let mut now = self.now();
        let away = now.get_or_insert_with(|| {
            self.is_away.store(true, Ordering::Relaxed);
            let (say_at, pause) = (at + ONE_MORE, FIRST_PAUSE);
            Away { since: at, failed_at: at, answered_at: None, is_logged: false, say_at, pause }
        });
        if away.answered_at.is_some() && !away.is_logged {
            away.say_at = away.since + PARTLY;
        }
        (away.failed_at, away.answered_at) = (at, None);
        if at < away.say_at {
            return None;
        }
        if !std::mem::replace(&mut away.is_logged, true) {
            away.say_at = at + away.pause;
            return Some(LogLine::Began);
        }
        away.pause = (away.pause * 2).min(LONGEST_PAUSE);
        away.say_at = at + away.pause;
        Some(LogLine::Lasts(at.duration_since(away.since)))
    }

    fn note_answer(&self, at: Instant) -> Option<LogLine> {
        let mut now = self.now();
        let away = now.as_mut()?;
        let answered_at = *away.answered_at.get_or_insert(at);
        if at.duration_since(away.failed_at) < CALM {
            return None;
        }
        let over = LogLine::Over(answered_at.duration_since(away.since));
        let was_logged = away.is_logged;
        *now = None;
        self.is_away.store(false, Ordering::Relaxed);
        was_logged.then_some(over)
    }
}

/// Rounded, and never none.
fn seconds(duration: Duration) -> u64 {
    (duration + Duration::from_millis(500)).as_secs().max(1)
}

/// Whether an error says that the database cannot be asked at all: it is not reached, starts, ends,
/// has no connection left, lets nobody in, or only reads.
pub fn is_away(error: &(dyn StdError + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| (*error).source());
    match causes.find_map(<dyn StdError>::downcast_ref::<sqlx::Error>) {
        Some(sqlx::Error::Database(answer)) => {
            let code = answer.code().unwrap_or_default();
            // Connection exceptions, authorization, no such database; too many connections, shutdown,
            // crash, start, a session that was idle too long; a server that was demoted.
            ["08", "28", "3D", "53300", "57P", "25006"].iter().any(|class| code.starts_with(class))
        }
        Some(error) => is_lost(error) || matches!(error, sqlx::Error::PoolTimedOut),
        None => false,
    }
}

/// Whether a connection was lost, or is one to a server that only reads: another one may do. What
/// the statement did is not known.
pub fn is_lost(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(answer) => {
            let code = answer.code().unwrap_or_default();
            ["08", "57P", "25006"].iter().any(|class| code.starts_with(class))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_told_at_growing_intervals_and_its_end_once() {
        let (outage, began) = (Outage::default(), Instant::now());
        let at = |ms| began + Duration::from_millis(ms);
        let mut lines = Vec::new();
        // A dozen loops that try five times a second, for 17 s.
        for ms in (0..17_000).step_by(16) {
            lines.extend(outage.note_failure(at(ms)).map(|line| (ms / 1000, line)));
        }
        let told: Vec<u64> = lines.iter().map(|(second, _)| *second).collect();
        assert_eq!(told, [0, 1, 3, 7, 15]);
        assert_eq!(lines[0].1, LogLine::Began);
        // One loop is through while another still fails: that is the same outage.
        assert_eq!(outage.note_answer(at(17_000)), None);
        assert_eq!(outage.note_failure(at(17_100)), None);
        assert_eq!(outage.note_answer(at(17_200)), None);
        assert_eq!(outage.note_answer(at(18_100)), Some(LogLine::Over(Duration::from_millis(17_200))));
        assert_eq!(outage.note_answer(at(18_101)), None);
        // A loop that slept meets its dead connection later; the next one it gets works.
        assert_eq!(outage.note_failure(at(20_000)), None);
        assert_eq!(outage.note_answer(at(20_050)), None);
        assert_eq!(outage.note_failure(at(20_200)), None, "another one does, too");
        assert_eq!(outage.note_answer(at(21_300)), None, "what was not told has no end");
        // Some are answered, and others fail all the time.
        let partly: Vec<u64> = (22_000..26_000)
            .step_by(50)
            .filter(|ms| outage.note_answer(at(*ms)).is_none() && outage.note_failure(at(*ms)).is_some())
            .collect();
        assert_eq!(partly, [25_000]);
        assert_eq!(outage.note_answer(at(28_000)), Some(LogLine::Over(Duration::from_secs(6))));
        // A day of it is a line a minute.
        let day = (31_000..86_431_000).step_by(1000).filter(|ms| outage.note_failure(at(*ms)).is_some()).count();
        assert!((1440..1450).contains(&day), "{day}");
    }

    #[test]
    fn only_what_says_that_nothing_can_be_asked_is_an_outage() {
        let gone = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        assert!(is_away(&gone()) && is_lost(&gone()));
        assert!(is_away(&super::super::Error::from(gone())), "whatever it is wrapped in");
        assert!(is_away(&sqlx::Error::PoolTimedOut) && !is_lost(&sqlx::Error::PoolTimedOut));
        assert!(!is_away(&sqlx::Error::RowNotFound) && !is_lost(&sqlx::Error::RowNotFound));
    }
}
