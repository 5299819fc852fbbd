//! What a server, and the way to it, must be for us: looked at before anything is changed, and
//! whenever an orchestrator, a worker or the API starts.
//!
//! What is not as it must be is reported in one sentence, with what to do. It costs two
//! connections and a dozen small statements, once.

use sqlx::{Executor, PgConnection, PgPool, Row, raw_sql};

use crate::store::tx;

/// The oldest server that has what our SQL needs.
const LEAST_SERVER: i32 = 14;
/// The oldest PGMQ that our statements can use: with headers of messages, and with the number of
/// visible messages among its metrics.
pub(crate) const LEAST_PGMQ: &str = "1.5.0";

/// How often each of two connections is asked for its session, so that a pooler that serves
/// others at the same time is seen, too.
const LOOKS: usize = 3;

/// Why a database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Between us and the server stands something that does not keep sessions apart.
    #[error(
        "the database's URL leads to a pooler ({0}), but Tasker needs a direct connection, for it keeps locks, LISTEN, \
         prepared statements and settings in its sessions: give the host and the port of the PostgreSQL server itself \
         (its port is 5432 unless it was changed; 6432 is PgBouncer's)"
    )]
    Pooler(String),
    /// An old server.
    #[error("the server is PostgreSQL {0}, but Tasker needs PostgreSQL {LEAST_SERVER} or newer: upgrade the server")]
    TooOld(String),
    /// A database that cannot hold every text.
    #[error(
        "the database {database} has the encoding {encoding}, but Tasker needs UTF8: make another one, \
         `create database NAME encoding 'UTF8' template template0`, and use its URL"
    )]
    Encoding {
        /// The database.
        database: String,
        /// Its encoding.
        encoding: String,
    },
    /// A standby.
    #[error("the server is a standby, which can only be read: give the URL of the primary server")]
    Standby,
    /// Somebody has made the database or the role read only.
    #[error(
        "the sessions of role {role} in database {database} are read only, by default_transaction_read_only: once the \
         reason for it is gone (a full disk, maintenance), `alter database` or `alter role … reset \
         default_transaction_read_only`"
    )]
    ReadOnly {
        /// The role.
        role: String,
        /// The database.
        database: String,
    },
    /// There is no PGMQ, or it is not as our statements need it.
    #[error(
        "PGMQ in this database cannot be used ({0} is missing), Tasker needs PGMQ {LEAST_PGMQ} or newer: run `tasker migrate`"
    )]
    Pgmq(String),
    /// The database, or the way to it.
    #[error("{0}")]
    Database(#[source] sqlx::Error),
}

impl From<sqlx::Error> for Error {
    /// Knows the errors by which a pooler, or an old server, shows itself.
    fn from(error: sqlx::Error) -> Self {
        let Some(refusal) = error.as_database_error() else {
            return Self::Database(error);
        };
        let why = match (refusal.code().as_deref(), refusal.message()) {
            (Some("08P01"), text) if text.contains("startup parameter") => text.to_owned(),
            (Some("42P05"), _) => "it mixes the prepared statements of different connections".to_owned(),
            (Some("26000"), _) => "it loses prepared statements".to_owned(),
            (Some("42704"), text) if text.contains("idle_session_timeout") => {
                return Self::TooOld(format!("older than {LEAST_SERVER}"));
            }
            _ => return Self::Database(error),
        };
        Self::Pooler(why)
    }
}

/// What was found about a server that may be used for reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Server {
    role: String,
    database: String,
    standby: bool,
    read_only: bool,
}

impl Server {
    /// Errors if nothing can be written.
    pub(crate) fn writable(&self) -> Result<(), Error> {
        if self.standby {
            return Err(Error::Standby);
        }
        if self.read_only {
            return Err(Error::ReadOnly { role: self.role.clone(), database: self.database.clone() });
        }
        Ok(())
    }
}

/// Looks at everything that an orchestrator, a worker or the API needs; `pool` has two connections at least.
pub async fn ready(pool: &PgPool) -> Result<(), Error> {
    check(pool).await?.writable()?;
    let mut conn = pool.acquire().await?;
    missing(&mut conn).await?.map_or(Ok(()), |what| Err(Error::Pgmq(what)))
}

/// Looks at the way to the server, at the server and at the database. `pool` is made with the
/// settings of [`tx::pool`] and has two connections at least.
pub(crate) async fn check(pool: &PgPool) -> Result<Server, Error> {
    let (mut one, mut other) = (pool.acquire().await?, pool.acquire().await?);
    // One after the other on purpose: a pooler gives the session that was used last, or the one
    // that was not used for longest. So either two connections get one session, or one gets two.
    let (first, second) = (session(&mut one).await?, session(&mut other).await?);
    let mut steady = first != second;
    for _ in 1..LOOKS {
        steady &= session(&mut one).await? == first && session(&mut one).await? == first;
        steady &= session(&mut other).await? == second;
    }
    if !steady {
        return Err(Error::Pooler("it shares the server's sessions among connections".to_owned()));
    }
    look(&mut one).await
}

/// The server's process behind a connection. Here and below nothing is prepared: a pooler would
/// answer that with an error of its own.
async fn session(conn: &mut PgConnection) -> Result<i32, Error> {
    Ok(conn.fetch_one(raw_sql("select pg_backend_pid()")).await?.try_get(0)?)
}

async fn look(conn: &mut PgConnection) -> Result<Server, Error> {
    let row = conn
        .fetch_one(raw_sql(
            "select current_setting('server_version_num')::int, current_setting('server_version'), \
             pg_encoding_to_char(d.encoding)::text, d.datname::text, current_user::text, pg_is_in_recovery(), \
             current_setting('default_transaction_read_only')::bool, \
             current_setting('standard_conforming_strings'), current_setting('default_transaction_isolation') \
             from pg_catalog.pg_database d where d.datname = current_database()",
        ))
        .await?;
    let number: i32 = row.try_get(0)?;
    if number < LEAST_SERVER * 10_000 {
        return Err(Error::TooOld(row.try_get(1)?));
    }
    let (encoding, database): (String, String) = (row.try_get(2)?, row.try_get(3)?);
    if encoding != "UTF8" {
        return Err(Error::Encoding { database, encoding });
    }
    // What a session asks for when it begins goes before what a role or a database sets.
    for (column, name) in [(7, "standard_conforming_strings"), (8, "default_transaction_isolation")] {
        let value: String = row.try_get(column)?;
        if tx::SETTINGS.contains(&(name, value.as_str())) {
            continue;
        }
        return Err(Error::Pooler(format!("it drops the settings of sessions: {name} is {value}")));
    }
    Ok(Server { role: row.try_get(4)?, database, standby: row.try_get(5)?, read_only: row.try_get(6)? })
}

/// What the catalog shows to be missing: a function, or a column of one of our queues. Reads the
/// catalog alone, so that every role may ask.
pub(crate) async fn missing(conn: &mut PgConnection) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar(
        "with of_pgmq as (
           select c.oid, c.relname from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
           where n.nspname = 'pgmq' and c.relkind in ('r', 'p')
         ), queues as (
           select relname from of_pgmq where relname ~ '^q_(task_requests|step_results|worker_.*)$'
           -- Our two are there once our tables are.
           union select q from unnest('{q_task_requests,q_step_results}'::name[]) q
           where exists (select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                         where n.nspname = 'tasker' and c.relname = 'readers')
         )
         select what from (
           select 1 as place, 'function pgmq.' || f as what from unnest('{create,send,metrics_all}'::text[]) f
           where not exists (select from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
                             where n.nspname = 'pgmq' and p.proname = f)
           union all
           select 2, 'column ' || a || ' of pgmq.' || q.relname
           from queues q, unnest('{msg_id,read_ct,enqueued_at,vt,message,headers}'::text[]) a
           where not exists (select from of_pgmq o join pg_catalog.pg_attribute t on t.attrelid = o.oid
                             where o.relname = q.relname and t.attname = a and not t.attisdropped)
         ) m order by place, what limit 1",
    )
    .fetch_optional(conn)
    .await
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Connection as _};

    use super::*;
    use tasker_testing::TestDatabase;

    async fn set(database: &TestDatabase, setting: &str) {
        let mut conn = PgConnection::connect(&database.url()).await.expect("connected");
        let name: String =
            sqlx::query_scalar("select current_database()").fetch_one(&mut conn).await.expect("its name");
        conn.execute(AssertSqlSafe(format!("alter database {name} set {setting}"))).await.expect("set");
    }

    #[tokio::test]
    async fn migrated_database_is_ready() {
        let database = TestDatabase::fresh().await;
        ready(&database.pool().await).await.expect("ready");
    }

    #[tokio::test]
    async fn read_only_database_is_told_and_nothing_of_its_setting_is_undone() {
        let database = TestDatabase::fresh().await;
        set(&database, "default_transaction_read_only = on").await;
        let error = ready(&database.pool().await).await.expect_err("read only").to_string();
        assert!(error.contains("are read only, by default_transaction_read_only"), "{error}");
    }

    #[tokio::test]
    async fn pgmq_that_was_changed_later_is_told() {
        let database = TestDatabase::fresh().await;
        let pool = database.pool().await;
        pool.execute("alter table pgmq.q_step_results drop column headers").await.expect("changed");
        let error = ready(&pool).await.expect_err("unusable").to_string();
        assert_eq!(
            error,
            "PGMQ in this database cannot be used (column headers of pgmq.q_step_results is missing), Tasker needs \
             PGMQ 1.5.0 or newer: run `tasker migrate`"
        );
        pool.execute("drop schema pgmq cascade").await.expect("dropped");
        let error = ready(&pool).await.expect_err("gone").to_string();
        assert!(error.contains("(function pgmq.create is missing)"), "{error}");
    }
}
