//! Locks that others hold, in transactions that they leave open. Whatever is about one of them is put
//! off, counted, and shown with its holder; nobody waits for it.
//!
//! This file remembers in memory only, and decides how long to wait: what is forgotten here costs one
//! more wait of a second.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::metrics::{OfSource, metrics};
use tasker_shared::store::Error;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Shared;

/// How long a session of an orchestrator waits for any one lock; see `Options` of its pools.
pub(crate) const LOCK_TIMEOUT: (&str, &str) = ("lock_timeout", "1s");
/// How much of one turn of a loop may go into finding out what is locked; what is not found by then is
/// put off together with what is.
pub(super) const BUDGET: Duration = Duration::from_secs(2);
/// How long what was put off is dealt with apart from the rest: longer than it is put off for.
const REMEMBERED: Duration = Duration::from_secs(15);
/// A task that others settle for so long without a pause is locked, and not busy.
const BUSY: Duration = Duration::from_secs(5);
/// A holder is named again after so long, if it still is one.
const NAMED_AGAIN: Duration = Duration::from_mins(5);

/// How a settle deals with the locks of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Leaves out each task of which a step is held; any other lock is waited for for [`LOCK_TIMEOUT`].
    Once,
    /// The same, after a lock was met: any other is waited for for a blink.
    Briefly,
    /// Waits for a blink for each lock in its turn, so that of a task whose many steps are moved all the
    /// time by workers each is had in the end.
    InTurn,
}

/// What a lock was met for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    Task(Uuid),
    /// A message that names no task.
    Message(i64),
}

/// What was lately put off.
#[derive(Debug, Default)]
pub struct Locks {
    put_off: Mutex<HashMap<Subject, Instant>>,
    /// Since when, and until when, each task was found to be settled by others.
    busy: Mutex<HashMap<Uuid, (Instant, Instant)>>,
    met: Notify,
    /// It was a change of tables that was put off, so that readers may be in the way.
    tables: AtomicBool,
}

fn known<K, V>(map: &Mutex<HashMap<K, V>>) -> MutexGuard<'_, HashMap<K, V>> {
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Locks {
    /// A week of the log has no table yet.
    pub fn met_for_tables(&self) {
        self.tables.store(true, Ordering::Relaxed);
        self.met("partitions", 1);
    }

    /// Counts what a loop has put off, and has its holder named.
    pub fn met(&self, source: &'static str, count: usize) {
        metrics().lock_put_offs.of(&OfSource { source }).inc_by(u64::try_from(count).unwrap_or(u64::MAX));
        self.met.notify_one();
    }

    /// Remembers that these are put off.
    pub(super) fn remember(&self, subjects: impl Iterator<Item = Subject>) {
        let now = Instant::now();
        let mut put_off = known(&self.put_off);
        put_off.retain(|_, at| now - *at < REMEMBERED);
        put_off.extend(subjects.map(|subject| (subject, now)));
    }

    /// Whether a lock was met for it lately.
    pub(super) fn remembers(&self, subject: Subject) -> bool {
        let put_off = known(&self.put_off);
        !put_off.is_empty() && put_off.get(&subject).is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    /// Notes that a task is settled by others, and says whether it has been for so long that it is
    /// rather somebody's lock.
    pub(super) fn is_no_settle(&self, task: Uuid) -> bool {
        let now = Instant::now();
        let mut busy = known(&self.busy);
        busy.retain(|_, (_, last)| now - *last < REMEMBERED);
        let (first, last) = busy.entry(task).or_insert((now, now));
        *last = now;
        now - *first > BUSY
    }

    /// Notes that a task was ours.
    pub(super) fn had(&self, tasks: impl Iterator<Item = Uuid>) {
        let mut busy = known(&self.busy);
        if !busy.is_empty() {
            for task in tasks {
                busy.remove(&task);
            }
        }
    }
}

/// Gives up waiting for a lock after a moment, until the transaction ends: somebody else is known to
/// hold one of what it is about.
pub(crate) async fn wait_briefly(conn: &mut PgConnection) -> Result<(), Error> {
    sqlx::query!("set local lock_timeout = '50ms'").execute(conn).await?;
    Ok(())
}

/// A session that holds locks on tables of ours: see `tasker.lock_holders`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder {
    pid: i32,
    user_name: Option<String>,
    application_name: Option<String>,
    client: Option<String>,
    since: Option<DateTime<Utc>>,
    state: Option<String>,
    only_reads: bool,
    tables: Vec<String>,
    /// Names its transaction.
    transaction: String,
}

/// Who holds locks on tables of ours for longer than a second; those who only read hold up nothing but
/// changes of the tables.
async fn holders(conn: &mut PgConnection) -> Result<Vec<Holder>, Error> {
    Ok(sqlx::query_as!(
        Holder,
        r#"select pid as "pid!", user_name, application_name, client, since, state, only_reads as "only_reads!",
             tables as "tables!", transaction as "transaction!"
           from tasker.lock_holders()"#
    )
    .fetch_all(conn)
    .await?)
}

/// Names the holders of locks for which something was put off, each once.
pub(crate) async fn watch(shared: Arc<Shared>, stop: CancellationToken) {
    let mut named: HashMap<String, Instant> = HashMap::new();
    while stop.run_until_cancelled(shared.locks.met.notified()).await.is_some() {
        let looking = async {
            let before = holders(&mut *shared.reads.acquire().await?).await?;
            // A transaction may be young, where its age is not ours to see: it must be there twice.
            tokio::time::sleep(Duration::from_secs(1)).await;
            let now = holders(&mut *shared.reads.acquire().await?).await?;
            Ok::<_, Error>(lasting(&before, now))
        };
        match stop.run_until_cancelled(looking).await {
            Some(Ok(found)) => {
                named.retain(|_, at| at.elapsed() < NAMED_AGAIN);
                let readers = shared.locks.tables.swap(false, Ordering::Relaxed);
                for holder in found {
                    if (readers || !holder.only_reads) && !named.contains_key(&holder.transaction) {
                        log_holder(&holder);
                        named.insert(holder.transaction, Instant::now());
                    }
                }
            }
            Some(Err(error)) => tracing::debug!(%error, "the holders of locks cannot be read"),
            None => return,
        }
    }
}

/// Those that hold locks in the same transaction as before.
fn lasting(before: &[Holder], now: Vec<Holder>) -> Vec<Holder> {
    now.into_iter().filter(|holder| before.iter().any(|old| old.transaction == holder.transaction)).collect()
}

fn log_holder(holder: &Holder) {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".into());
    tracing::warn!(
        pid = holder.pid,
        user = text(&holder.user_name),
        application_name = text(&holder.application_name),
        client = text(&holder.client),
        since = holder.since.map_or_else(|| "unknown".into(), |at| at.to_rfc3339()),
        state = text(&holder.state),
        only_reads = holder.only_reads,
        tables = holder.tables.iter().take(10).cloned().collect::<Vec<_>>().join(" "),
        "a session holds locks in an open transaction; work that needs them is put off until it ends \
         (tasker.lock_holders() lists such sessions)"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(transaction: &str) -> Holder {
        Holder {
            pid: 1,
            user_name: None,
            application_name: None,
            client: None,
            since: None,
            state: None,
            only_reads: false,
            tables: vec![],
            transaction: transaction.into(),
        }
    }

    #[test]
    fn a_session_in_its_next_transaction_holds_nothing_up() {
        let found = lasting(&[holder("3/17"), holder("4/2")], vec![holder("3/18"), holder("4/2"), holder("5/1")]);
        assert_eq!(found, [holder("4/2")]);
    }

    #[test]
    fn a_task_that_was_ours_in_between_is_busy_and_not_locked() {
        let (locks, task) = (Locks::default(), Uuid::from_u128(1));
        let long_ago = Instant::now().checked_sub(BUSY * 2).expect("the machine runs for longer");
        assert!(!locks.is_no_settle(task));
        known(&locks.busy).insert(task, (long_ago, Instant::now()));
        assert!(locks.is_no_settle(task));
        locks.had([task].into_iter());
        assert!(!locks.is_no_settle(task));
    }
}
