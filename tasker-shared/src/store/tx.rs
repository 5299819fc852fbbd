//! The only place that begins a transaction, and the pool it begins it on.
//!
//! It must never let a connection with an open transaction back into the pool,
//! whatever is cancelled or panics, and it costs two round trips: BEGIN and
//! COMMIT.
//!
//! Why it is not `pool.begin()`: sqlx 0.9 counts a transaction as begun only
//! when the answer to BEGIN has arrived. A `begin()` future that is dropped
//! before has BEGIN on its way, queues no ROLLBACK, and returns the connection
//! to the pool, where the next user works inside a transaction that it does
//! not know of and nobody commits.

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool, Postgres, Row};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::outage::{Outage, is_lost};

/// Connections that were made before this are not used again: one of that age knew a schema that has
/// changed since. Of the process, since all its pools speak of the same schema.
static RETIRED: RwLock<Option<Instant>> = RwLock::new(None);

/// Lets every connection of this process be replaced before it is used again.
pub(crate) fn retire() {
    *RETIRED.write().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
}

fn is_retired(since: Instant) -> bool {
    RETIRED.read().unwrap_or_else(PoisonError::into_inner).is_some_and(|at| since < at)
}

/// What our statements take for granted, whatever a role or a database sets for its sessions. Dates,
/// the time zone and the encoding are set by sqlx itself.
pub(crate) const SETTINGS: [(&str, &str); 5] = [
    // A backslash in a literal of ours is a backslash.
    ("standard_conforming_strings", "on"),
    // `for update skip locked` and reading what others have just committed.
    ("default_transaction_isolation", "read committed"),
    // What is cut off would be tried again and cut off again.
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    // The session of a worker holds its lock while it is idle, and so do those that listen.
    ("idle_session_timeout", "0"),
];

/// A connection that was idle for so long is asked whether it still lives before it is used: a
/// server that was restarted takes longer than that to be back.
const TESTED_WHEN_IDLE: Duration = Duration::from_secs(1);
/// A connection that does not answer within this time is dead: nothing reports a machine that vanished.
const LONGEST_TEST: Duration = Duration::from_secs(2);

/// What a pool is made with. `Default` suits a small process.
#[derive(Debug, Clone, Copy)]
pub struct PoolOptions<'a> {
    /// Connections at most.
    pub max_connections: u32,
    /// How long to wait for a free connection, or for the server to answer.
    pub acquire_timeout: Duration,
    /// Seen in `pg_stat_activity`.
    pub application_name: &'a str,
    /// Server settings of every session, such as `("synchronous_commit", "off")`.
    pub settings: &'a [(&'a str, &'a str)],
}

impl Default for PoolOptions<'_> {
    fn default() -> Self {
        Self { max_connections: 8, acquire_timeout: Duration::from_secs(10), application_name: "tasker", settings: &[] }
    }
}

/// Opens a pool whose connections are checked when they are released, and before they are used if
/// there is a reason to doubt them.
///
/// Errors if the URL does not parse or the server does not answer within
/// `acquire_timeout`.
pub async fn pool(url: &str, options: &PoolOptions<'_>) -> Result<PgPool, sqlx::Error> {
    let connect = PgConnectOptions::from_str(url)?
        .application_name(options.application_name)
        .options(SETTINGS)
        .options([
            // The backstop for a process that hangs while it holds locks.
            ("idle_in_transaction_session_timeout", "60s"),
            // Our statements are short; compiling them costs more than they do.
            ("jit", "off"),
        ])
        .options(options.settings.iter().copied())
        // For `telemetry::live`, if anybody wants it; SQL text never stands in a log line. None is slow:
        // a slow one is logged at another level, which is off.
        .log_statements("debug".parse().expect("a level of logs"))
        .log_slow_statements("off".parse().expect("a level of logs"), Duration::MAX);
    let outage = Outage::at(&connect);
    PgPoolOptions::new()
        .max_connections(options.max_connections)
        .acquire_timeout(options.acquire_timeout)
        // The pool pings a connection when it is released; a second ping at
        // every acquire would be a third round trip per transaction. `in_tx`
        // and `live` cope with a connection that died in between.
        .test_before_acquire(false)
        .before_acquire(move |conn, meta| {
            let outage = Arc::clone(&outage);
            Box::pin(async move {
                // Whether a connection is too old is known without asking the server.
                if Instant::now().checked_sub(meta.age).is_some_and(is_retired) {
                    return Ok(false);
                }
                let passes = if outage.is_doubted(meta.age) {
                    is_usable(conn).await
                } else {
                    meta.idle_for < TESTED_WHEN_IDLE || answers(conn.ping()).await.is_some()
                };
                if !passes {
                    outage.doubt();
                }
                Ok(passes)
            })
        })
        // An error would be logged, for each connection of a server that was restarted.
        .after_release(|conn, _| Box::pin(async { Ok(in_transaction(conn).await.is_ok_and(|open| !open)) }))
        .connect_with(connect)
        .await
}

/// Whether the server holds a transaction open on a connection for which sqlx
/// has counted none.
///
/// An empty statement is what makes the server report its state for less than
/// a statement's work (it is not even counted by `pg_stat_statements`), and a
/// custom BEGIN is the one call through which sqlx passes that state on: it
/// fails exactly when no transaction is open after it.
async fn in_transaction(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    match conn.begin_with("").await {
        Ok(_) => Ok(true),
        Err(sqlx::Error::BeginFailed) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What a test of a connection says; nothing if it failed or took too long.
async fn answers<T>(test: impl Future<Output = Result<T, sqlx::Error>>) -> Option<T> {
    tokio::time::timeout(LONGEST_TEST, test).await.ok()?.ok()
}

/// Whether the server answers, and lets write: one that was demoted keeps its sessions.
async fn is_usable(conn: &mut PgConnection) -> bool {
    let only_reads = async {
        let row = sqlx::raw_sql("show transaction_read_only").fetch_one(conn).await?;
        row.try_get::<String, _>(0)
    };
    answers(only_reads).await.is_some_and(|only_reads| only_reads == "off")
}

/// A connection that has just answered, for a statement that must not be repeated: one that failed
/// on a dead connection may have been executed or not. It costs a round trip.
///
/// Errors if the pool gives no connection.
pub async fn live(pool: &PgPool) -> Result<PoolConnection<Postgres>, sqlx::Error> {
    let mut conn = pool.acquire().await?;
    if is_usable(&mut conn).await {
        return Ok(conn);
    }
    conn.close_on_drop();
    drop(conn);
    // From now on the pool tests what it gives.
    Outage::of(pool).doubt();
    pool.acquire().await
}

/// Whether the connection was lost on which something failed, which is noted for all others. What
/// only reads may be done again on another one.
pub fn was_lost(pool: &PgPool, error: &super::Error) -> bool {
    let lost = matches!(error, super::Error::Database(error) if is_lost(error));
    if lost {
        Outage::of(pool).doubt();
    }
    lost
}

/// A connection that is closed rather than returned to the pool unless it is
/// explicitly given back.
struct Held(Option<PoolConnection<Postgres>>);

impl Held {
    fn conn(&mut self) -> &mut PgConnection {
        self.0.as_mut().expect("held until given back")
    }

    fn give_back(mut self) -> Option<PoolConnection<Postgres>> {
        self.0.take()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(mut conn) = self.0.take() {
            conn.close_on_drop();
        }
    }
}

/// Runs `work` in a transaction: commits if it returns `Ok`, rolls back if it
/// returns `Err`, and closes the connection if it is dropped or panics before
/// either is certain.
///
/// An error of COMMIT itself leaves the outcome open, as it must: the server
/// may have committed and the answer been lost. `work` must not swallow the
/// error of a statement outside a savepoint of its own (`conn.begin()`), since
/// PostgreSQL answers COMMIT of a failed transaction with a silent rollback.
pub async fn in_tx<T, E>(pool: &PgPool, work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>) -> Result<T, E>
where
    E: From<sqlx::Error>,
{
    run(pool, None, work).await
}

/// Connections on which one transaction follows another. Giving one back to the pool costs a
/// round trip beside what the commit has just woken, and is of no use where the server has just
/// said that the transaction is over.
#[derive(Debug)]
pub struct Connections {
    pool: PgPool,
    most: usize,
    outage: Arc<Outage>,
    /// Each since it was taken from the pool.
    kept: Mutex<Vec<(PoolConnection<Postgres>, Instant)>>,
}

impl Connections {
    /// Keeps so many connections of the pool, at most.
    pub fn new(pool: PgPool, most: usize) -> Self {
        Self { outage: Outage::of(&pool), pool, most, kept: Mutex::default() }
    }

    /// As [`in_tx`], on one of the connections that are kept.
    pub async fn in_tx<T, E>(&self, work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>) -> Result<T, E>
    where
        E: From<sqlx::Error>,
    {
        run(&self.pool, Some(self), work).await
    }

    /// Gives all of them back to the pool, which can be closed then.
    pub fn give_back(&self) {
        self.kept().clear();
    }

    fn take(&self) -> Option<(PoolConnection<Postgres>, Instant)> {
        let mut kept = self.kept();
        if self.outage.is_doubted(Duration::MAX) {
            // Those that are good come back through the pool, which tests them.
            kept.clear();
        }
        kept.pop()
    }

    /// One that is too old goes back to the pool, which closes it.
    fn keep(&self, conn: PoolConnection<Postgres>, since: Instant) {
        let mut kept = self.kept();
        if kept.len() < self.most && !is_retired(since) {
            kept.push((conn, since));
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<(PoolConnection<Postgres>, Instant)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn run<T, E>(
    pool: &PgPool,
    connections: Option<&Connections>,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
) -> Result<T, E>
where
    E: From<sqlx::Error>,
{
    let mut dead = 0;
    loop {
        let (conn, since) = match connections.and_then(Connections::take) {
            Some((_, since)) if is_retired(since) => continue,
            Some(kept) => kept,
            None => (pool.acquire().await?, Instant::now()),
        };
        let mut held = Held(Some(conn));
        let mut tx = match held.conn().begin().await {
            Ok(tx) => tx,
            // After the server restarted, every idle connection of the pool is
            // dead. BEGIN has no effect that could be repeated, so the next
            // connection is tried until none of the old ones can be left.
            Err(_) if dead < pool.options().get_max_connections() => {
                dead += 1;
                Outage::of(pool).doubt();
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let result = work(&mut tx).await;
        match &result {
            Ok(_) => tx.commit().await?,
            // The work's own error says more than a failed rollback would, and
            // the connection is closed then.
            Err(_) => {
                if tx.rollback().await.is_err() {
                    return result;
                }
            }
        }
        if let (Some(connections), Some(conn)) = (connections, held.give_back()) {
            connections.keep(conn, since);
        }
        return result;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{Future, poll_fn};
    use std::pin::pin;
    use std::task::Poll;
    use tasker_testing::TestDatabase;

    /// Polls `future` at most `polls` times, each time when it was woken, and
    /// drops it where it then stands. Says whether it finished.
    async fn cut_short(polls: usize, future: impl Future) -> bool {
        let mut future = pin!(future);
        let mut left = polls;
        poll_fn(|cx| {
            if left == 0 {
                return Poll::Ready(false);
            }
            left -= 1;
            match future.as_mut().poll(cx) {
                Poll::Ready(_) => Poll::Ready(true),
                Poll::Pending if left == 0 => Poll::Ready(false),
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    async fn insert(pool: &PgPool) -> Result<(), sqlx::Error> {
        in_tx(pool, async |conn| {
            sqlx::query("insert into tasker.n values (1)").execute(&mut *conn).await?;
            let mut savepoint = conn.begin().await?;
            sqlx::query("insert into tasker.n values (1)").execute(&mut *savepoint).await?;
            savepoint.commit().await
        })
        .await
    }

    async fn insert_one(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query("insert into tasker.n values (1)").execute(conn).await.map(drop)
    }

    async fn count(pool: &PgPool) -> i64 {
        sqlx::query_scalar("select count(*) from tasker.n").fetch_one(pool).await.expect("count")
    }

    async fn table(database: &TestDatabase) -> PgPool {
        let pool = database.pool().await;
        sqlx::query("create table tasker.n (n int)").execute(&pool).await.expect("table");
        pool
    }

    /// A pool of one connection: to acquire it is to wait until whoever had it
    /// before has really given it back, or it was closed. `checked` is our own
    /// kind; the other lacks the check on release.
    async fn pool_of_one(database: &TestDatabase, checked: bool) -> PgPool {
        if checked {
            let options = PoolOptions { max_connections: 1, ..PoolOptions::default() };
            return pool(&database.url(), &options).await.expect("pool");
        }
        PgPoolOptions::new().max_connections(1).test_before_acquire(false).connect(&database.url()).await.expect("pool")
    }

    /// Whether the connection that the pool hands out next is in a transaction.
    async fn next_is_in_transaction(pool: &PgPool) -> bool {
        let mut conn = pool.acquire().await.expect("a connection");
        in_transaction(&mut conn).await.expect("asked")
    }

    /// Fails unless every session of the database soon is out of any
    /// transaction. (The server ends a session a moment after its client did;
    /// a leaked transaction would stay for 60 s and more.)
    async fn expect_no_open_transaction(pool: &PgPool) {
        let all_clean = async {
            loop {
                let open: i64 = sqlx::query_scalar(
                    "select count(*) from pg_stat_activity where datname = current_database() \
                     and pid <> pg_backend_pid() and state <> 'idle'",
                )
                .fetch_one(pool)
                .await
                .expect("activity");
                if open == 0 {
                    break;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), all_clean).await.expect("no session stays in a transaction");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn thousands_of_dropped_futures_leak_no_transaction() {
        let database = TestDatabase::fresh().await;
        let watch = table(&database).await;
        let mut tasks = Vec::new();
        for _ in 0..8 {
            // Without the check on release: `in_tx` must not need it.
            let pool = pool_of_one(&database, false).await;
            tasks.push(tokio::spawn(async move {
                let mut finished = 0;
                for polls in (0..16).cycle().take(320) {
                    finished += i64::from(cut_short(polls, insert(&pool)).await);
                    assert!(!next_is_in_transaction(&pool).await, "cut after {polls} polls");
                }
                finished
            }));
        }
        let mut finished = 0;
        for task in tasks {
            finished += task.await.expect("no leak");
        }
        expect_no_open_transaction(&watch).await;
        assert!(finished > 100, "some must get through for the cuts to reach every point");
        let rows = count(&watch).await;
        // A COMMIT that was on its way when its future was dropped may have
        // happened; half a transaction never.
        assert!(rows >= 2 * finished && rows % 2 == 0, "{rows} rows of {finished} finished");
    }

    #[tokio::test]
    async fn transaction_begun_elsewhere_and_dropped_is_not_returned_to_the_pool() {
        let database = TestDatabase::fresh().await;
        let (plain, ours) = (pool_of_one(&database, false).await, pool_of_one(&database, true).await);
        let mut leaked = 0;
        for (round, polls) in (0..6).cycle().take(6000).enumerate() {
            // Where a poll stands depends on how fast the server answers: it may take a while to meet the hole.
            if round >= 60 && leaked > 0 {
                break;
            }
            cut_short(polls, plain.begin()).await;
            leaked += i32::from(next_is_in_transaction(&plain).await);
            cut_short(polls, ours.begin()).await;
            assert!(!next_is_in_transaction(&ours).await, "cut after {polls} polls");
        }
        // When this fails, sqlx has closed the hole: `in_tx` may become simpler.
        assert!(leaked > 0, "sqlx's own pool leaks, or this test does not cut where it should");
    }

    #[tokio::test]
    async fn kept_connection_is_used_again_and_one_in_doubt_is_not() {
        let database = TestDatabase::fresh().await;
        let pool = table(&database).await;
        let connections = Connections::new(pool.clone(), 1);
        let backend = async || {
            connections
                .in_tx(async |conn| sqlx::query_scalar::<_, i32>("select pg_backend_pid()").fetch_one(conn).await)
                .await
                .expect("a transaction")
        };
        let first = backend().await;
        assert_eq!(backend().await, first);
        let refused: Result<(), sqlx::Error> = connections.in_tx(async |_| Err(sqlx::Error::RowNotFound)).await;
        assert!(refused.is_err());
        assert_eq!(backend().await, first, "a rollback leaves no doubt");
        for polls in 0..6 {
            cut_short(polls, connections.in_tx(async |conn| insert_one(conn).await)).await;
        }
        expect_no_open_transaction(&pool).await;
        // A server that was restarted meanwhile costs nothing but another connection.
        let last = backend().await;
        sqlx::query("select pg_terminate_backend($1, 5000)").bind(last).execute(&pool).await.expect("terminated");
        assert_ne!(backend().await, last);
        connections.give_back();
        tokio::time::timeout(Duration::from_secs(10), pool.close()).await.expect("none is kept");
    }

    #[tokio::test]
    async fn error_rolls_back_and_panic_too() {
        let database = TestDatabase::fresh().await;
        let pool = table(&database).await;
        let refused: Result<(), sqlx::Error> = in_tx(&pool, async |conn| {
            sqlx::query("insert into tasker.n values (1)").execute(conn).await?;
            Err(sqlx::Error::RowNotFound)
        })
        .await;
        assert!(matches!(refused, Err(sqlx::Error::RowNotFound)));
        let doomed = pool.clone();
        let panicked = tokio::spawn(async move {
            in_tx(&doomed, async |conn| {
                sqlx::query("insert into tasker.n values (1)").execute(conn).await?;
                assert!(count(&doomed).await > 0, "in the middle of a transaction");
                Ok::<(), sqlx::Error>(())
            })
            .await
        })
        .await;
        assert!(panicked.is_err_and(|error| error.is_panic()));
        expect_no_open_transaction(&pool).await;
        assert_eq!(count(&pool).await, 0);
    }

    #[tokio::test]
    async fn connections_that_died_while_idle_are_replaced() {
        let database = TestDatabase::fresh().await;
        let pool = table(&database).await;
        let mut held = Vec::new();
        for _ in 0..pool.options().get_max_connections() {
            held.push(pool.acquire().await.expect("a connection"));
        }
        for mut conn in held {
            conn.return_to_pool().await;
        }
        // As after a restart of the server.
        let other = database.pool().await;
        sqlx::query(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity \
             where datname = current_database() and pid <> pg_backend_pid()",
        )
        .execute(&other)
        .await
        .expect("terminated");
        insert(&pool).await.expect("on a new connection");
        assert_eq!(count(&other).await, 2);
    }

    #[tokio::test]
    async fn sessions_have_the_settings_of_the_pool() {
        let database = TestDatabase::fresh().await;
        let options = PoolOptions {
            application_name: "a test",
            settings: &[("enable_seqscan", "off"), ("search_path", "a, \"b c\"")],
            ..PoolOptions::default()
        };
        let pool = pool(&database.url(), &options).await.expect("pool");
        for (name, expected) in [
            ("application_name", "a test"),
            ("enable_seqscan", "off"),
            ("search_path", "a, \"b c\""),
            ("jit", "off"),
            ("idle_in_transaction_session_timeout", "1min"),
        ] {
            let value: String =
                sqlx::query_scalar("select current_setting($1)").bind(name).fetch_one(&pool).await.expect("setting");
            assert_eq!(value, expected, "{name}");
        }
    }
}
