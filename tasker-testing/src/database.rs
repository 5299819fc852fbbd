//! A database of its own for each test, on the server of [`Database::open`].
//!
//! The schema is migrated once into a template, and each test gets a copy of
//! it. The template's name holds a hash of the migrations, so a changed file
//! never meets an old template. Tests may run in any number of threads and
//! processes.

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, PgPool};
use std::str::FromStr;
use tasker_shared::migrate::{fingerprint, migrate};
use tasker_shared::postgres::Database;
use tasker_shared::store::tx::{self, PoolOptions};
use tokio::sync::OnceCell;

/// Key of the advisory lock under which the template is made: "taskerT" in
/// ASCII.
const LOCK: i64 = 0x0074_6173_6b65_7254;

/// The server, held until this process ends.
static SERVER: OnceCell<Database> = OnceCell::const_new();
/// The name of the template, once it is known to exist.
static TEMPLATE: OnceCell<String> = OnceCell::const_new();

/// A database that is dropped with this value.
#[derive(Debug)]
pub struct TestDatabase {
    server: String,
    name: String,
}

impl TestDatabase {
    /// A migrated database that nobody else uses.
    ///
    /// # Panics
    /// If there is no server, or it refuses: a test cannot go on then.
    pub async fn fresh() -> Self {
        let server = server().await;
        let template = TEMPLATE.get_or_init(|| make_template(&server)).await;
        Self::create(server, &format!("template {template}")).await
    }

    /// A database with nothing in it, for tests of the migrations themselves.
    ///
    /// # Panics
    /// As [`fresh`](Self::fresh).
    pub async fn empty() -> Self {
        Self::made_with("").await
    }

    /// The same, made with more options of `create database`, such as `encoding 'LATIN1'`.
    ///
    /// # Panics
    /// As [`fresh`](Self::fresh).
    pub async fn made_with(options: &str) -> Self {
        Self::create(server().await, &format!("template template0 {options}")).await
    }

    async fn create(server: String, options: &str) -> Self {
        let name = format!("tasker_test_{}", uuid::Uuid::new_v4().simple());
        let mut conn = connect(&server).await;
        conn.execute(AssertSqlSafe(format!("create database {name} {options}")))
            .await
            .expect("a database for the test");
        let _ = conn.close().await;
        Self { server, name }
    }

    /// How to connect to it.
    pub fn url(&self) -> String {
        with_database(&self.server, &self.name)
    }

    /// A pool of the kind that the product uses.
    ///
    /// # Panics
    /// If the server does not answer.
    pub async fn pool(&self) -> PgPool {
        tx::pool(&self.url(), &PoolOptions::default()).await.expect("a pool for the test")
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let (server, name) = (self.server.clone(), self.name.clone());
        // The test's runtime may be ending, so on a thread and runtime of its
        // own. A test has said what it had to say; a failure here is swept up
        // by a later run.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let options = PgConnectOptions::from_str(&server).map_err(std::io::Error::other)?;
                let mut conn = PgConnection::connect_with(&options).await.map_err(std::io::Error::other)?;
                drop_database(&mut conn, &name).await.map_err(std::io::Error::other)
            })
        });
        let _ = dropping.join();
    }
}

async fn server() -> String {
    SERVER
        .get_or_init(|| async {
            tokio::task::spawn_blocking(Database::open)
                .await
                .expect("no panic")
                .unwrap_or_else(|error| panic!("tests need a PostgreSQL: {error}"))
        })
        .await
        .url()
}

async fn connect(url: &str) -> PgConnection {
    PgConnection::connect(url).await.expect("the server answers")
}

async fn drop_database(conn: &mut PgConnection, name: &str) -> Result<(), sqlx::Error> {
    conn.execute(AssertSqlSafe(format!("drop database if exists {name} with (force)"))).await?;
    Ok(())
}

async fn exists(conn: &mut PgConnection, name: &str) -> bool {
    sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(name)
        .fetch_one(conn)
        .await
        .expect("the catalog")
}

async fn make_template(server: &str) -> String {
    let template = format!("tasker_template_{}", fingerprint());
    let mut conn = connect(server).await;
    if exists(&mut conn, &template).await {
        return template;
    }
    // The lock ends with the connection.
    sqlx::query("select pg_advisory_lock($1)").bind(LOCK).execute(&mut conn).await.expect("the lock of the template");
    if exists(&mut conn, &template).await {
        return template;
    }
    sweep(&mut conn).await;
    // Under another name until it is whole: a process killed here leaves no
    // half template.
    let raw = TestDatabase::create(server.to_owned(), "template template0").await;
    let pool = raw.pool().await;
    migrate(&pool).await.unwrap_or_else(|error| panic!("the migrations fail: {error}"));
    pool.close().await;
    conn.execute(AssertSqlSafe(format!("alter database {} rename to {template}", raw.name)))
        .await
        .expect("the template's name");
    template
}

/// Removes what killed tests and older migrations left. The server's own file
/// says when a database was made; where it may not be read, nothing is removed.
async fn sweep(conn: &mut PgConnection) {
    let names: Vec<String> = sqlx::query_scalar(
        r"select datname::text from pg_database
          where (datname like 'tasker\_test\_%' or datname like 'tasker\_template\_%')
            and (pg_stat_file('base/' || oid || '/PG_VERSION', true)).modification
                < clock_timestamp() - case when datname like 'tasker\_test\_%'
                                           then interval '6 hours' else interval '7 days' end",
    )
    .fetch_all(&mut *conn)
    .await
    .unwrap_or_default();
    for name in names {
        let _ = drop_database(conn, &name).await;
    }
}

/// The same server, another database.
fn with_database(url: &str, name: &str) -> String {
    let (place, parameters) = url.split_once('?').map_or((url, None), |(a, b)| (a, Some(b)));
    let authority = place.find("://").map_or(0, |at| at + 3);
    let end = place[authority..].find('/').map_or(place.len(), |at| authority + at);
    let parameters = parameters.map_or_else(String::new, |p| format!("?{p}"));
    format!("{}/{name}{parameters}", &place[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_database_of_a_url_is_replaced() {
        for (url, expected) in [
            ("postgresql:///tasker?host=/a/run&user=u", "postgresql:///t?host=/a/run&user=u"),
            ("postgres://u:p@h:5432/db", "postgres://u:p@h:5432/t"),
            ("postgres://h", "postgres://h/t"),
            ("postgres://h?sslmode=disable", "postgres://h/t?sslmode=disable"),
        ] {
            assert_eq!(with_database(url, "t"), expected);
        }
    }

    #[tokio::test]
    async fn two_tests_do_not_see_each_other() {
        let (one, two) = tokio::join!(TestDatabase::fresh(), TestDatabase::fresh());
        let (first, second) = (one.pool().await, two.pool().await);
        first.execute("create table tasker.mine()").await.expect("created");
        let seen: bool = sqlx::query_scalar("select to_regclass('tasker.mine') is not null")
            .fetch_one(&second)
            .await
            .expect("asked");
        assert!(!seen);
        let name = one.name.clone();
        let server = one.server.clone();
        drop(one);
        assert!(!exists(&mut connect(&server).await, &name).await, "dropped with its value");
    }
}
