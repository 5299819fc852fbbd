//! Brings a database to the schema of this build: PGMQ, then our numbered SQL
//! files, each once, in order, in a transaction of its own.
//!
//! It never changes what has been applied: a file that differs from what a
//! database has seen is an error, not a second run. What was applied is kept
//! in `tasker.migrations`, in our own schema, because the database may belong
//! to an application that has migrations of its own.

pub(crate) mod installed;

pub use installed::Pgmq;

use chrono::{DateTime, Utc};
use installed::{Action, PGMQ_VERSION};
use pgmq::PgmqError;
use sqlx::migrate::{Migration, Migrator};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Executor, PgConnection, PgPool, Postgres, Transaction};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::server::{LEAST_PGMQ, missing};
use crate::{server, store::tx};

static FILES: Migrator = sqlx::migrate!("./migrations");

/// Key of the advisory lock: "tasker" and a 1 in ASCII. Whoever migrates this database holds it,
/// never longer than a transaction: so whatever becomes of the connection, or of a pooler behind
/// it, nobody is left with the lock.
const LOCK: i64 = 0x0074_6173_6b65_7201;
/// How long the lock is waited for.
const PATIENCE: Duration = Duration::from_mins(10);
/// Between two tries, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How often it is said again who holds it.
const SAY_AGAIN: Duration = Duration::from_secs(30);

/// What our files take for granted beside what [`tx::pool`] sets.
const SETTINGS: [(&str, &str); 4] = [
    ("application_name", "tasker-migrate"),
    ("search_path", "pg_catalog,pg_temp"),
    ("check_function_bodies", "on"),
    // It holds the lock in a transaction while PGMQ is installed on another connection.
    ("idle_in_transaction_session_timeout", "0"),
];

/// Must give the same result however often it runs.
const BOOKKEEPING: &str = "\
create schema if not exists tasker;
create table if not exists tasker.migrations (
  version bigint primary key,
  name text not null,
  checksum bytea not null,
  applied_at timestamptz not null default clock_timestamp()
);";

/// What a migration did and found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Names of the files that were applied just now; empty if none was due.
    pub applied: Vec<String>,
    /// How PGMQ is installed.
    pub pgmq: Pgmq,
}

/// Why a database could not be migrated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server, the database or the way to it is not as it must be.
    #[error(transparent)]
    Server(server::Error),
    /// A file that was applied is not what it was.
    #[error(
        "migration {name} was changed after it had been applied to this database: put the file back \
         as it was, and make the change in a new file with the next number"
    )]
    Changed {
        /// The file.
        name: String,
    },
    /// The database has seen a file that this build does not know.
    #[error(
        "this database has migration {name}, which this program does not know: the database was \
         migrated by a newer program; use that one (or a newer one)"
    )]
    Unknown {
        /// The file.
        name: String,
    },
    /// A file failed; nothing of it remains.
    #[error("migration {name} failed and was rolled back: {source}")]
    File {
        /// The file.
        name: String,
        /// The server's reason.
        source: sqlx::Error,
    },
    /// Somebody else holds the lock for too long.
    #[error(
        "somebody else has been migrating this database for {} s: {holder} holds the lock; wait until it is done, or, if \
         it does nothing, end it with `select pg_terminate_backend({})`, and try again",
        .waited.as_secs(), .holder.pid
    )]
    Locked {
        /// Who.
        holder: Holder,
        /// For how long we have waited.
        waited: Duration,
    },
    /// There is a PGMQ that our statements cannot use.
    #[error("{}", unusable(.found.as_ref(), .why, .offered.as_deref()))]
    Unusable {
        /// What is installed.
        found: Option<Pgmq>,
        /// What is wrong with it.
        why: String,
        /// The version of the extension that the server offers.
        offered: Option<String>,
    },
    /// PGMQ could not be installed or upgraded.
    #[error("PGMQ could not be installed: {0}")]
    Pgmq(#[from] PgmqError),
    /// The bookkeeping itself failed.
    #[error("could not migrate the database: {0}")]
    Database(#[source] sqlx::Error),
}

fn unusable(found: Option<&Pgmq>, why: &str, offered: Option<&str>) -> String {
    let what = found.map_or_else(|| "the PGMQ that was to be installed".to_owned(), ToString::to_string);
    let offered = offered.map_or_else(
        || "the server offers no extension pgmq".to_owned(),
        |version| format!("the server offers {version}"),
    );
    let remedy = match found {
        Some(Pgmq::Extension(_)) => {
            "have a newer pgmq installed on the server, if it offers none, and run `alter extension pgmq update` as the \
             owner of the extension"
        }
        _ => "bring the schema pgmq to that version",
    };
    format!(
        "this database has {what}, which Tasker cannot use: {why}; Tasker needs PGMQ {LEAST_PGMQ} or newer, {offered}: \
         {remedy}, or use a database without PGMQ; nothing was changed"
    )
}

impl From<server::Error> for Error {
    fn from(error: server::Error) -> Self {
        match error {
            server::Error::Database(error) => Self::Database(error),
            other => Self::Server(other),
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        server::Error::from(error).into()
    }
}

/// Who holds the lock of the migrations.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Holder {
    /// The server's process.
    pub pid: i32,
    /// What it calls itself.
    pub application_name: Option<String>,
    /// When its transaction began, or else its connection; not every role may know.
    pub since: Option<DateTime<Utc>>,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = self.application_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("without a name");
        write!(f, "process {} of the server ({name}", self.pid)?;
        if let Some(since) = self.since {
            write!(f, ", since {}", since.format("%F %T UTC"))?;
        }
        f.write_str(")")
    }
}

/// Migrates the database of `pool`, if anything is to do.
///
/// Any number of processes may call it at once: one works, the others wait for it, for ten
/// minutes at most, and say so. Nothing is locked when nothing is to do. It works on connections
/// of its own, so the pool may be of any size, and a cancelled call leaves no lock.
pub async fn migrate(pool: &PgPool) -> Result<Report, Error> {
    run(pool, &FILES, PATIENCE).await
}

async fn run(pool: &PgPool, files: &Migrator, patience: Duration) -> Result<Report, Error> {
    let options = pool.connect_options().as_ref().clone().options(tx::SETTINGS).options(SETTINGS);
    let own = PgPoolOptions::new()
        // One holds the lock, one is for PGMQ's installer; and two are needed to know a pooler.
        .max_connections(2)
        .connect_lazy_with(options);
    let result = run_on(&own, files, patience).await;
    own.close().await;
    result
}

async fn run_on(own: &PgPool, files: &Migrator, patience: Duration) -> Result<Report, Error> {
    let server = server::check(own).await?;
    if let Some(pgmq) = nothing_to_do(&mut *own.acquire().await?, files).await? {
        return Ok(Report { applied: Vec::new(), pgmq });
    }
    server.writable()?;

    let mut tx = locked(own, patience).await?;
    let pgmq = installed::install(own, &mut tx).await?;
    tx.execute(BOOKKEEPING).await?;
    tx.commit().await?;
    let mut applied = Vec::new();
    loop {
        // What is due is asked under the lock: another process may have been quicker.
        let mut tx = locked(own, patience).await?;
        let Some(file) = due(&mut tx, files).await?.into_iter().next() else {
            tx.rollback().await?;
            return Ok(Report { applied, pgmq });
        };
        let name = name(file);
        apply(tx, file).await.map_err(|source| Error::File { name: name.clone(), source })?;
        applied.push(name);
    }
}

/// The PGMQ of a database that is as it should be.
async fn nothing_to_do(conn: &mut PgConnection, files: &Migrator) -> Result<Option<Pgmq>, Error> {
    let Some(pgmq) = installed::installed(conn).await? else {
        return Ok(None);
    };
    let lacks = missing(conn).await?.is_some();
    let done = installed::decide(Some(&pgmq), lacks, None) == Action::Keep && due(conn, files).await?.is_empty();
    Ok(done.then_some(pgmq))
}

/// A transaction that holds the lock. No transaction is open while it waits for it.
async fn locked(own: &PgPool, patience: Duration) -> Result<Transaction<'static, Postgres>, Error> {
    let began = Instant::now();
    let mut said = None::<Instant>;
    let mut pause = Duration::from_millis(20);
    loop {
        let mut tx = own.begin().await?;
        if sqlx::query_scalar("select pg_try_advisory_xact_lock($1)").bind(LOCK).fetch_one(&mut *tx).await? {
            return Ok(tx);
        }
        let holder = holder(&mut tx).await?;
        tx.rollback().await?;
        let waited = began.elapsed();
        match holder {
            Some(holder) if waited >= patience => return Err(Error::Locked { holder, waited }),
            Some(holder) if said.is_none_or(|at| at.elapsed() >= SAY_AGAIN) => {
                said = Some(Instant::now());
                tracing::warn!("waiting for the lock of the migrations: it is held by {holder}");
            }
            // It was given back just now, or that was said.
            _ => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn holder(conn: &mut PgConnection) -> Result<Option<Holder>, sqlx::Error> {
    sqlx::query_as(
        "select coalesce(l.pid, 0) as pid, a.application_name, coalesce(a.xact_start, a.backend_start) as since
         from pg_locks l left join pg_stat_activity a on a.pid = l.pid
         where l.locktype = 'advisory' and l.granted and l.objsubid = 1
           and l.classid = ($1 >> 32)::oid and l.objid = ($1 & 4294967295)::oid
           and l.database = (select oid from pg_database where datname = current_database())",
    )
    .bind(LOCK)
    .fetch_optional(conn)
    .await
}

/// The files that this database has not seen, in order.
async fn due<'f>(conn: &mut PgConnection, files: &'f Migrator) -> Result<Vec<&'f Migration>, Error> {
    let known: bool =
        sqlx::query_scalar("select to_regclass('tasker.migrations') is not null").fetch_one(&mut *conn).await?;
    let mut seen: BTreeMap<i64, (String, Vec<u8>)> = BTreeMap::new();
    if known {
        let rows: Vec<(i64, String, Vec<u8>)> =
            sqlx::query_as("select version, name, checksum from tasker.migrations").fetch_all(&mut *conn).await?;
        seen.extend(rows.into_iter().map(|(version, name, sum)| (version, (name, sum))));
    }
    let mut due = Vec::new();
    for file in files.iter() {
        match seen.remove(&file.version) {
            None => due.push(file),
            Some((_, checksum)) if *checksum == *file.checksum => {}
            Some(_) => return Err(Error::Changed { name: name(file) }),
        }
    }
    match seen.into_values().next() {
        None => Ok(due),
        Some((name, _)) => Err(Error::Unknown { name }),
    }
}

async fn apply(mut tx: Transaction<'_, Postgres>, file: &Migration) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(file.sql.clone()).execute(&mut *tx).await?;
    sqlx::query("insert into tasker.migrations (version, name, checksum) values ($1, $2, $3)")
        .bind(file.version)
        .bind(name(file))
        .bind(&*file.checksum)
        .execute(&mut *tx)
        .await?;
    tx.commit().await
}

/// The file's name, as far as sqlx keeps it.
fn name(file: &Migration) -> String {
    format!("{:04}_{}.sql", file.version, file.description.replace(' ', "_"))
}

/// All of our SQL as one script for psql, with the bookkeeping that makes
/// [`migrate`] find it applied. PGMQ has to be there before.
pub fn print() -> String {
    let mut script = format!(
        "-- Tasker's schema. Run it with `psql -v ON_ERROR_STOP=1 -f` on a database that has none.\n\
         --\n\
         -- PGMQ has to be installed first: `create extension pgmq`, or, where the server does not\n\
         -- have the extension, PGMQ's own pgmq.sql, version {PGMQ_VERSION}.\n\n\
         {BOOKKEEPING}\n"
    );
    for file in FILES.iter() {
        let name = name(file);
        let mut checksum = String::new();
        for byte in &*file.checksum {
            let _ = write!(checksum, "{byte:02x}");
        }
        let _ = write!(
            script,
            "\n-- {name} {line}\n\nbegin;\n\n{sql}\n\n\
             insert into tasker.migrations (version, name, checksum)\n\
             values ({version}, '{name}', '\\x{checksum}');\n\ncommit;\n",
            line = "-".repeat(70_usize.saturating_sub(name.len())),
            sql = file.sql.as_str().trim_end(),
            version = file.version,
        );
    }
    script
}

/// Differs whenever the schema that [`migrate`] makes may differ.
pub fn fingerprint() -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    hash.update(PGMQ_VERSION);
    hash.update(BOOKKEEPING);
    for file in FILES.iter() {
        hash.update(file.version.to_be_bytes());
        hash.update(&*file.checksum);
    }
    let mut text = String::new();
    for byte in &hash.finalize()[..8] {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use sqlx::migrate::MigrationType;
    use sqlx::{AssertSqlSafe, Connection as _, SqlSafeStr};
    use tasker_testing::TestDatabase;

    fn files(sql: &[(i64, &'static str, &'static str)]) -> Migrator {
        Migrator::with_migrations(
            sql.iter()
                .map(|&(version, name, sql)| {
                    let kind = MigrationType::Simple;
                    Migration::new(version, name.into(), kind, sql.into_sql_str(), false)
                })
                .collect(),
        )
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn eight_at_once_apply_each_file_once() {
        let database = TestDatabase::empty().await;
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let url = database.url();
                tokio::spawn(async move {
                    // A pool each, as in eight processes.
                    let pool = PgPoolOptions::new().max_connections(1).connect(&url).await?;
                    migrate(&pool).await
                })
            })
            .collect();
        let mut applied = Vec::new();
        for task in tasks {
            let report = task.await.expect("no panic").expect("migrated");
            assert_eq!(report.pgmq, Pgmq::Sql(PGMQ_VERSION.to_owned()), "update PGMQ_VERSION");
            applied.extend(report.applied);
        }
        // Each file has its own turn at the lock, whoever gets it.
        applied.sort();
        let expected: Vec<String> = FILES.iter().map(name).collect();
        assert_eq!(applied, expected);

        let pool = database.pool().await;
        assert_eq!(migrate(&pool).await.expect("nothing to do").applied, Vec::<String>::new());
        let left: i64 = sqlx::query_scalar(
            "select count(*) from pg_locks where locktype = 'advisory' \
             and database = (select oid from pg_database where datname = current_database())",
        )
        .fetch_one(&pool)
        .await
        .expect("locks");
        assert_eq!(left, 0);
        sqlx::query("select pgmq.create('q'), pgmq.send('q', '{}')").execute(&pool).await.expect("PGMQ works");
    }

    #[tokio::test]
    async fn changed_unknown_and_failing_files_are_named() {
        let database = TestDatabase::empty().await;
        let pool = database.pool().await;
        let one = (1, "one thing", "create table tasker.a(); create table tasker.b()");
        let two = (2, "two", "create table tasker.c()");
        let report = run(&pool, &files(&[one]), PATIENCE).await.expect("applied");
        assert_eq!(report.applied, ["0001_one_thing.sql"]);

        let broken = (2, "two", "create table tasker.c(); create table tasker.c()");
        let error = run(&pool, &files(&[one, broken]), PATIENCE).await.expect_err("fails").to_string();
        assert!(error.contains("0002_two.sql") && error.contains("\"c\""), "{error}");
        let report = run(&pool, &files(&[one, two]), PATIENCE).await.expect("nothing of it remained");
        assert_eq!(report.applied, ["0002_two.sql"]);

        let tampered = (1, "one thing", "create table tasker.a()");
        let error = run(&pool, &files(&[tampered, two]), PATIENCE).await.expect_err("changed");
        assert!(matches!(&error, Error::Changed { name } if name == "0001_one_thing.sql"), "{error}");
        let error = run(&pool, &files(&[one]), PATIENCE).await.expect_err("older program");
        assert!(matches!(&error, Error::Unknown { name } if name == "0002_two.sql"), "{error}");
    }

    #[tokio::test]
    async fn printed_script_leaves_nothing_to_do() {
        let database = TestDatabase::empty().await;
        let pool = database.pool().await;
        pgmq::install::install_sql_from_embedded(&pool).await.expect("PGMQ");
        sqlx::raw_sql(AssertSqlSafe(print())).execute(&pool).await.expect("the script runs");
        assert_eq!(migrate(&pool).await.expect("migrated").applied, Vec::<String>::new());
    }

    /// A PGMQ from before 1.5.0, as far as it matters here: without headers.
    const OLD_PGMQ: &str = "\
create schema pgmq;
create table pgmq.meta (queue_name varchar unique not null, is_partitioned boolean not null, is_unlogged boolean not null,
  created_at timestamptz not null default now());
create function pgmq.create(queue_name text) returns void language plpgsql as $$
begin
  execute format('create table pgmq.%I (msg_id bigint primary key generated always as identity, read_ct int default 0 not null,
    enqueued_at timestamptz default now() not null, vt timestamptz not null, message jsonb)', 'q_' || queue_name);
  insert into pgmq.meta values (queue_name, false, false);
end $$;
create function pgmq.send(queue_name text, msg jsonb, delay int default 0) returns setof bigint language plpgsql as $$
begin
  return query execute format('insert into pgmq.%I (vt, message) values (now(), $1) returning msg_id', 'q_' || queue_name) using msg;
end $$;
create function pgmq.metrics_all(out queue_name text, out queue_length bigint, out newest_msg_age_sec int,
  out oldest_msg_age_sec int, out total_messages bigint) returns setof record language sql as
$$ select queue_name::text, 0, 0, 0, 0 from pgmq.meta $$;";

    async fn relations(pool: &PgPool) -> Vec<String> {
        sqlx::query_scalar(
            "select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname in ('tasker', 'pgmq') order by 1",
        )
        .fetch_all(pool)
        .await
        .expect("the catalog")
    }

    #[tokio::test]
    async fn old_pgmq_of_somebody_else_is_refused_and_left_alone() {
        let database = TestDatabase::empty().await;
        let pool = database.pool().await;
        pool.execute(OLD_PGMQ).await.expect("PGMQ");
        let before = relations(&pool).await;
        let error = migrate(&pool).await.expect_err("refused").to_string();
        assert_eq!(
            error,
            "this database has a PGMQ in plain SQL that Tasker did not install, which Tasker cannot use: column \"headers\" \
             of relation \"q_tasker_tries\" does not exist; Tasker needs PGMQ 1.5.0 or newer, the server offers no \
             extension pgmq: bring the schema pgmq to that version, or use a database without PGMQ; nothing was changed"
        );
        assert_eq!(relations(&pool).await, before);
    }

    #[tokio::test]
    async fn old_extension_is_refused_with_both_versions() {
        let database = TestDatabase::empty().await;
        let pool = database.pool().await;
        pool.execute(OLD_PGMQ).await.expect("PGMQ");
        // As if it had come with `create extension`, for which a test would have to write where the server is installed.
        let mut conn = pool.acquire().await.expect("a connection");
        conn.execute(
            "set allow_system_table_mods = on;
             insert into pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
             values (99999, 'pgmq', 10, 'pgmq'::regnamespace, false, '1.4.4')",
        )
        .await
        .expect("an extension");
        drop(conn);
        let before = relations(&pool).await;
        let error = migrate(&pool).await.expect_err("refused").to_string();
        assert_eq!(
            error,
            "this database has PGMQ 1.4.4, an extension of the server, which Tasker cannot use: it is too old; Tasker needs \
             PGMQ 1.5.0 or newer, the server offers no extension pgmq: have a newer pgmq installed on the server, if it \
             offers none, and run `alter extension pgmq update` as the owner of the extension, or use a database without PGMQ; nothing was changed"
        );
        assert_eq!(relations(&pool).await, before);
    }

    #[tokio::test]
    async fn pgmq_of_somebody_else_is_used_if_it_can_be() {
        let database = TestDatabase::empty().await;
        let pool = database.pool().await;
        pgmq::install::install_sql_from_embedded(&pool).await.expect("PGMQ");
        pool.execute("drop table pgmq.__pgmq_migrations").await.expect("nobody knows by whom");
        let report = migrate(&pool).await.expect("migrated");
        assert_eq!((report.applied.len(), report.pgmq), (FILES.iter().count(), Pgmq::Foreign));
        assert!(!relations(&pool).await.iter().any(|name| name.contains("tries") || name.contains("__pgmq")));
        let report = migrate(&pool).await.expect("nothing to do");
        assert_eq!((report.applied.len(), report.pgmq), (0, Pgmq::Foreign));
    }

    #[tokio::test]
    async fn database_of_another_encoding_is_refused_before_anything_is_changed() {
        let database = TestDatabase::made_with("encoding 'LATIN1' lc_collate 'C' lc_ctype 'C'").await;
        let pool = database.pool().await;
        let error = migrate(&pool).await.expect_err("refused");
        assert!(matches!(&error, Error::Server(server::Error::Encoding { encoding, .. }) if encoding == "LATIN1"));
        let text = error.to_string();
        assert!(text.contains("the encoding LATIN1") && text.contains("encoding 'UTF8' template template0"), "{text}");
        assert_eq!(relations(&pool).await, Vec::<String>::new());
    }

    #[tokio::test]
    async fn settings_of_the_database_do_not_break_the_migrations() {
        let database = TestDatabase::empty().await;
        let pool = database.pool().await;
        let name: String = sqlx::query_scalar("select current_database()").fetch_one(&pool).await.expect("its name");
        for setting in [
            "standard_conforming_strings = off",
            "search_path = nowhere",
            "default_transaction_isolation = serializable",
            "statement_timeout = '1ms'",
            "lock_timeout = '1ms'",
            "idle_in_transaction_session_timeout = '1ms'",
            "check_function_bodies = off",
            "datestyle = 'German'",
            "intervalstyle = 'sql_standard'",
            "timezone = 'Pacific/Auckland'",
            "bytea_output = 'escape'",
            "client_encoding = 'LATIN1'",
        ] {
            pool.execute(AssertSqlSafe(format!("alter database {name} set {setting}"))).await.expect("set");
        }
        // A caller's pool, as it is without our settings.
        let theirs = PgPoolOptions::new().connect(&database.url()).await.expect("a pool");
        assert_eq!(migrate(&theirs).await.expect("migrated").applied.len(), FILES.iter().count());
    }

    #[tokio::test]
    async fn every_function_with_a_backslash_says_how_it_is_read() {
        let database = TestDatabase::fresh().await;
        let open: Vec<String> = sqlx::query_scalar(
            "select p.proname::text from pg_proc p
             where p.pronamespace = 'tasker'::regnamespace and strpos(p.prosrc, chr(92)) > 0
               and not coalesce('standard_conforming_strings=on' = any(p.proconfig), false) order by 1",
        )
        .fetch_all(&database.pool().await)
        .await
        .expect("the catalog");
        // To be inlined they must say nothing, and they mean the same without their backslash.
        assert_eq!(open, ["is_tracestate", "queue_namespace"]);
    }

    /// A session that holds the lock of the migrations, as a former release held it, and its process.
    async fn holder_of_the_lock(database: &TestDatabase) -> (PgConnection, i32) {
        let mut conn = PgConnection::connect(&database.url()).await.expect("connected");
        conn.execute("set application_name = 'a stranger'").await.expect("named");
        let pid = sqlx::query_scalar("select pg_backend_pid() from pg_advisory_lock($1)")
            .bind(LOCK)
            .fetch_one(&mut conn)
            .await
            .expect("the lock");
        (conn, pid)
    }

    #[tokio::test]
    async fn lock_that_is_not_given_back_is_told_with_its_holder() {
        let database = TestDatabase::empty().await;
        let (_held, pid) = holder_of_the_lock(&database).await;
        let error = run(&database.pool().await, &FILES, Duration::ZERO).await.expect_err("locked").to_string();
        assert!(
            error.starts_with("somebody else has been migrating this database for 0 s: ")
                && error.contains(&format!("process {pid} of the server (a stranger, since 20"))
                && error.contains(&format!("`select pg_terminate_backend({pid})`")),
            "{error}"
        );
    }

    #[tokio::test]
    async fn lock_is_waited_for_with_no_transaction_open() {
        let database = TestDatabase::empty().await;
        let (mut held, _) = holder_of_the_lock(&database).await;
        let pool = database.pool().await;
        let waiting = tokio::spawn(async move { migrate(&pool).await });
        let mut before = Vec::new();
        for _ in 0..5 {
            let (idle, began): (i64, Vec<DateTime<Utc>>) = sqlx::query_as(
                "select count(*) filter (where state = 'idle'), coalesce(array_agg(xact_start) filter (where xact_start is not null), '{}')
                 from pg_stat_activity where datname = current_database() and application_name = 'tasker-migrate'",
            )
            .fetch_one(&mut held)
            .await
            .expect("activity");
            assert!(!began.iter().any(|began| before.contains(began)), "a transaction stays open; {idle} are idle");
            before = began;
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        assert!(!waiting.is_finished());
        held.close().await.expect("closed");
        let applied = waiting.await.expect("no panic").expect("migrated").applied;
        assert_eq!(applied.len(), FILES.iter().count());
    }

    /// Migrations 0000 to 0016 have been released; so is every later one as soon as it has landed.
    #[test]
    fn files_that_have_landed_are_never_changed() {
        use sha2::{Digest, Sha256};
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
        let listed = std::fs::read_to_string(folder.join("SHA256SUMS")).expect("the list");
        let mut listed: BTreeMap<&str, &str> = listed
            .lines()
            .map(|line| line.split_once("  ").expect("hash and name"))
            .map(|(sum, name)| (name, sum))
            .collect();
        assert!(listed.len() >= 17, "migrations/SHA256SUMS lost lines");
        for entry in std::fs::read_dir(&folder).expect("the folder") {
            let name = entry.expect("an entry").file_name().into_string().expect("a name");
            if name == "SHA256SUMS" {
                continue;
            }
            let listed = listed.remove(&*name).unwrap_or_else(|| {
                panic!(
                    "migrations/{name} is not in migrations/SHA256SUMS: add it when it lands, in the same commit \
                     (cd migrations && sha256sum {name} >> SHA256SUMS); from then on it is frozen"
                )
            });
            let mut sum = String::new();
            for byte in Sha256::digest(std::fs::read(folder.join(&name)).expect("the file")) {
                let _ = write!(sum, "{byte:02x}");
            }
            assert_eq!(
                sum, listed,
                "migrations/{name} has landed and is frozen: put it back as it was, and make the change in a new file with \
                 the next number"
            );
        }
        assert!(listed.is_empty(), "migrations that have landed are never removed or renamed: {:?}", listed.keys());
    }
}
