//! Removes what has been kept long enough, slowly and in small transactions.
//!
//! One process at a time, by an advisory lock. It walks the tasks of each template in the order they were
//! created, never touches one that is open, and never makes the hot path wait: it skips what is locked.

pub mod statements;

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tasker_shared::metrics::metrics;
use tasker_shared::store::tx::in_tx;
use tasker_shared::store::{self, Fault};
use tokio_util::sync::CancellationToken;

use crate::lifecycle::Shared;

/// Between passes, when there is nothing to remove: one statement.
pub const IDLE: Duration = Duration::from_mins(1);
/// Between the transactions of a pass.
const PAUSE: Duration = Duration::from_millis(100);

/// Small things are tidied up this often: it looks at every hint, and at messages that lie long.
const TIDY_EVERY: Duration = Duration::from_mins(30);

/// Removal failed; what was committed is removed, the rest stays.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The archive.
    #[error("the archive {path} cannot be written: {source}; nothing was removed that is not in it")]
    Archive {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// What a pass did, or would do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    /// Tasks, with everything that is theirs.
    pub tasks: i64,
    /// Quarantined messages.
    pub messages: i64,
    /// Weeks of the log that were dropped whole.
    pub weeks: i32,
    /// Another process is removing right now, so this one left it.
    pub busy: bool,
    /// Batches of tasks that were left for another pass, because somebody else holds a lock in them.
    pub put_off: usize,
}

/// One pass over the tasks. With an archive each task is written to it, as one line of JSON,
/// before it is removed; after a crash in between it is written a second time.
///
/// `pause` lies between transactions; `stop` ends the pass early.
pub async fn pass(
    pool: &PgPool,
    archive: Option<&Path>,
    pause: Duration,
    stop: &CancellationToken,
) -> Result<Removed, Error> {
    let archiving = archive.is_some();
    let mut removed = Removed::default();
    let mut cursor = statements::START;
    let mut weeks = None;
    while !stop.is_cancelled() {
        let found = statements::find(&mut *pool.acquire().await?, cursor, archiving).await?;
        for tasks in found.tasks.chunks(statements::BATCH) {
            if stop.is_cancelled() {
                break;
            }
            let weeks = match &weeks {
                Some(weeks) => weeks,
                None => weeks.insert(statements::expired_weeks(&mut *pool.acquire().await?, archiving).await?),
            };
            let done = in_tx(pool, async |conn| {
                if !statements::lock(conn).await? {
                    return Ok(None);
                }
                let tasks = statements::lock_tasks(conn, tasks, archiving).await?;
                if let Some(path) = archive {
                    let lines = statements::archive(conn, &tasks).await?;
                    append(path, &lines).map_err(|source| Error::Archive { path: path.to_owned(), source })?;
                }
                Ok::<_, Error>(Some(statements::remove(conn, &tasks, weeks).await?))
            })
            .await;
            match done {
                Ok(Some(tasks)) => removed.tasks += tasks,
                Ok(None) => return Ok(Removed { busy: true, ..removed }),
                Err(Error::Store(error)) if error.fault() == Fault::Locked => removed.put_off += 1,
                Err(error) => return Err(error),
            }
            rest(pause, stop).await;
        }
        let Some(next) = found.next else {
            break;
        };
        cursor = next;
        if found.tasks.is_empty() {
            rest(pause, stop).await;
        }
    }
    Ok(removed)
}

async fn rest(pause: Duration, stop: &CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = tokio::time::sleep(pause) => {}
    }
}

/// Removes old quarantined messages and hints of what has ended, sums counters up, and drops weeks of the
/// log that a pass has emptied.
pub async fn tidy(pool: &PgPool, removed: &mut Removed) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    removed.messages += statements::tidy(&mut conn).await?;
    statements::forget_due(&mut conn).await?;
    removed.weeks += statements::drop_weeks(&mut conn).await?;
    Ok(())
}

/// Looks for tasks that nothing will move, and reports their number in the log and the metric.
pub async fn look_for_stuck(pool: &PgPool) -> Result<i64, Error> {
    let stuck = statements::stuck_tasks(&mut *pool.acquire().await?).await?;
    metrics().tasks_stuck.set(stuck);
    if stuck > 0 {
        tracing::error!(stuck, "tasks are stuck: tasker.stuck_tasks() names them");
    }
    Ok(stuck)
}

/// What a pass would remove: how many tasks have expired.
pub async fn expired(pool: &PgPool, archiving: bool) -> Result<i64, Error> {
    let (mut count, mut cursor) = (0, statements::START);
    loop {
        let found = statements::find(&mut *pool.acquire().await?, cursor, archiving).await?;
        count += i64::try_from(found.tasks.len()).unwrap_or(i64::MAX);
        match found.next {
            Some(next) => cursor = next,
            None => return Ok(count),
        }
    }
}

/// On the disk when it returns: what is removed afterwards is nowhere else.
fn append(path: &Path, lines: &[String]) -> std::io::Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut file: File = OpenOptions::new().create(true).append(true).open(path)?;
    let mut text = lines.join("\n");
    text.push('\n');
    file.write_all(text.as_bytes())?;
    file.sync_data()
}

/// The loop of an orchestrator. With a directory, each day's tasks go to a file of their own there.
pub(crate) async fn run(shared: Arc<Shared>, archive: Option<PathBuf>, stop: CancellationToken) {
    let pool = &shared.pool;
    let mut wait = IDLE;
    let (mut tidied, mut looked) = (None::<Instant>, None::<Instant>);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        let began = Instant::now();
        let file = archive
            .as_ref()
            .map(|folder| folder.join(format!("tasks-{}.jsonl", chrono::Utc::now().format("%Y-%m-%d"))));
        let turn = async {
            let mut removed = pass(pool, file.as_deref(), PAUSE, &stop).await?;
            let is_due = |last: Option<Instant>| last.is_none_or(|at| at.elapsed() > TIDY_EVERY);
            if is_due(looked) {
                looked = Some(Instant::now());
                look_for_stuck(pool).await?;
            }
            if is_due(tidied) {
                tidy(pool, &mut removed).await?;
                tidied = Some(Instant::now());
            } else if removed.tasks > 0 {
                removed.weeks += statements::drop_weeks(&mut *pool.acquire().await?).await?;
            }
            Ok::<_, Error>(removed)
        };
        let turn = turn.await;
        match &turn {
            Ok(Removed { put_off: 1.., .. }) => shared.locks.met("retention", 1),
            Err(Error::Store(error)) if error.fault() == Fault::Locked => shared.locks.met("retention", 1),
            _ => {}
        }
        match turn {
            Ok(Removed { tasks: 0, messages: 0, weeks: 0, .. }) => {}
            Ok(Removed { tasks, messages, weeks, .. }) => {
                tracing::info!(tasks, messages, weeks, "retention removed what was past its time");
            }
            Err(error) if shared.outage.handles(&error) => {}
            Err(error) => tracing::warn!(%error, "retention could not remove what is past its time; trying again"),
        }
        // A pass over very many rows that are all to be kept is not begun again at once.
        wait = IDLE.max(began.elapsed() * 10);
    }
}
