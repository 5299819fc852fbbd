//! Brings a database to the schema of this build: PGMQ, then our numbered SQL
//! files, each once, in order, in a transaction of its own.
//!
//! It never changes what has been applied: a file that differs from what a
//! database has seen is an error, not a second run. What was applied is kept
//! in `tasker.migrations`, in our own schema, because the database may belong
//! to an application that has migrations of its own.

use pgmq::PgmqError;
use sqlx::migrate::{Migration, Migrator};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, Executor, PgConnection, PgPool};
use std::collections::BTreeMap;
use std::fmt::Write as _;

static FILES: Migrator = sqlx::migrate!("../migrations");

/// The version of PGMQ's SQL inside the `pgmq` crate.
const PGMQ_VERSION: &str = "1.13.0";

/// Key of the session advisory lock: "tasker" and a 1 in ASCII. Whoever
/// migrates this database holds it.
const LOCK: i64 = 0x0074_6173_6b65_7201;

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

/// How PGMQ is installed, with its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pgmq {
    /// As an extension of the server; its upgrade is the operator's.
    Extension(String),
    /// As plain SQL from the `pgmq` crate, upgraded with it.
    Sql(String),
}

/// Why a database could not be migrated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
    /// PGMQ could not be installed or upgraded.
    #[error("PGMQ could not be installed: {0}")]
    Pgmq(#[from] PgmqError),
    /// The bookkeeping itself failed.
    #[error("could not migrate the database: {0}")]
    Database(#[from] sqlx::Error),
}

/// Migrates the database of `pool`, if anything is to do.
///
/// Any number of processes may call it at once: one works, the others wait for
/// it. Nothing is locked when nothing is to do. It works on connections of its
/// own, so the pool may be of any size, and a cancelled call leaves no lock.
pub async fn migrate(pool: &PgPool) -> Result<Report, Error> {
    run(pool, &FILES).await
}

async fn run(pool: &PgPool, files: &Migrator) -> Result<Report, Error> {
    let own = PgPoolOptions::new()
        // One holds the lock, one is for PGMQ's installer.
        .max_connections(2)
        .connect_lazy_with(pool.connect_options().as_ref().clone());
    let result = run_on(&own, files).await;
    own.close().await;
    result
}

async fn run_on(own: &PgPool, files: &Migrator) -> Result<Report, Error> {
    let mut conn = own.acquire().await?;
    let found = pgmq_installed(&mut conn).await?;
    if let Some(pgmq) = found.clone().filter(Pgmq::is_current)
        && due(&mut conn, files).await?.is_empty()
    {
        return Ok(Report { applied: Vec::new(), pgmq });
    }

    sqlx::query("select pg_advisory_lock($1)").bind(LOCK).execute(&mut *conn).await?;
    let pgmq = install_pgmq(own, &mut conn).await?;
    conn.execute(BOOKKEEPING).await?;
    let mut applied = Vec::new();
    for file in due(&mut conn, files).await? {
        let name = name(file);
        apply(&mut conn, file).await.map_err(|source| Error::File { name: name.clone(), source })?;
        applied.push(name);
    }
    sqlx::query("select pg_advisory_unlock($1)").bind(LOCK).execute(&mut *conn).await?;
    Ok(Report { applied, pgmq })
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

async fn apply(conn: &mut PgConnection, file: &Migration) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
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

impl Pgmq {
    fn is_current(&self) -> bool {
        match self {
            Self::Extension(_) => true,
            Self::Sql(version) => version == PGMQ_VERSION,
        }
    }
}

async fn pgmq_installed(conn: &mut PgConnection) -> Result<Option<Pgmq>, Error> {
    let extension: Option<String> = sqlx::query_scalar("select extversion from pg_extension where extname = 'pgmq'")
        .fetch_optional(&mut *conn)
        .await?;
    if let Some(version) = extension {
        return Ok(Some(Pgmq::Extension(version)));
    }
    let by_crate: bool =
        sqlx::query_scalar("select to_regclass('pgmq.__pgmq_migrations') is not null").fetch_one(&mut *conn).await?;
    if !by_crate {
        return Ok(None);
    }
    let version: Option<String> = sqlx::query_scalar(
        "select version from pgmq.__pgmq_migrations \
         order by string_to_array(version, '.')::int[] desc limit 1",
    )
    .fetch_optional(&mut *conn)
    .await?;
    Ok(version.map(Pgmq::Sql))
}

/// The extension if the server offers it and lets us, else the crate's SQL.
/// What is installed already stays what it is.
async fn install_pgmq(own: &PgPool, conn: &mut PgConnection) -> Result<Pgmq, Error> {
    let mut found = pgmq_installed(conn).await?;
    if found.is_none() {
        let offered: bool =
            sqlx::query_scalar("select exists (select from pg_available_extensions where name = 'pgmq')")
                .fetch_one(&mut *conn)
                .await?;
        if offered {
            match conn.execute("create extension pgmq").await {
                Ok(_) => found = pgmq_installed(conn).await?,
                Err(error) => tracing::warn!(
                    %error,
                    "the extension pgmq is there but could not be created; installing its SQL"
                ),
            }
        }
    }
    if let Some(pgmq) = found.filter(Pgmq::is_current) {
        return Ok(pgmq);
    }
    pgmq::install::install_sql_from_embedded(own).await?;
    Ok(pgmq_installed(conn).await?.unwrap_or_else(|| Pgmq::Sql(PGMQ_VERSION.to_owned())))
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
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fingerprint() -> String {
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
    use crate::postgres::testing::TestDatabase;
    use sqlx::migrate::MigrationType;
    use sqlx::{AssertSqlSafe, SqlSafeStr};

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
        let one = (1, "one thing", "create table a(); create table b()");
        let two = (2, "two", "create table c()");
        let report = run(&pool, &files(&[one])).await.expect("applied");
        assert_eq!(report.applied, ["0001_one_thing.sql"]);

        let broken = (2, "two", "create table c(); create table c()");
        let error = run(&pool, &files(&[one, broken])).await.expect_err("fails").to_string();
        assert!(error.contains("0002_two.sql") && error.contains("\"c\""), "{error}");
        let report = run(&pool, &files(&[one, two])).await.expect("nothing of it remained");
        assert_eq!(report.applied, ["0002_two.sql"]);

        let tampered = (1, "one thing", "create table a()");
        let error = run(&pool, &files(&[tampered, two])).await.expect_err("changed");
        assert!(matches!(&error, Error::Changed { name } if name == "0001_one_thing.sql"), "{error}");
        let error = run(&pool, &files(&[one])).await.expect_err("older program");
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
}
