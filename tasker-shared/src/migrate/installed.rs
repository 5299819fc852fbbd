//! Which PGMQ a database has, whether it has what our statements need, and what is done about it.
//!
//! It must never write over a PGMQ that somebody else put there.

use sqlx::{Connection as _, Executor as _, PgConnection, PgPool, raw_sql};

use super::Error;
use crate::server::{LEAST_PGMQ, missing};

/// The version of PGMQ's SQL inside the `pgmq` crate.
pub(super) const PGMQ_VERSION: &str = "1.13.0";

/// How PGMQ is installed, with its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pgmq {
    /// As an extension of the server; its upgrade is the operator's.
    Extension(String),
    /// As plain SQL from the `pgmq` crate, upgraded with it.
    Sql(String),
    /// As plain SQL that somebody else put there: nobody knows its version, and we leave it alone.
    Foreign,
}

impl std::fmt::Display for Pgmq {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Extension(version) => write!(f, "PGMQ {version}, an extension of the server"),
            Self::Sql(version) => write!(f, "PGMQ {version}, as plain SQL"),
            Self::Foreign => f.write_str("a PGMQ in plain SQL that Tasker did not install"),
        }
    }
}

/// What is done about what was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// It is used as it is.
    Keep,
    /// `create extension`, or the crate's SQL if that is not allowed.
    Create,
    /// `alter extension … update`.
    Update,
    /// The crate's SQL, anew or as an upgrade.
    Sql,
    /// Nothing can be done from here.
    Refuse,
}

/// `lacks` says that the catalog shows something missing, `offered` is what `create extension` would make.
pub(super) fn decide(found: Option<&Pgmq>, lacks: bool, offered: Option<&str>) -> Action {
    let recent = |version| numbers(version) >= numbers(LEAST_PGMQ);
    match found {
        None if offered.is_some_and(recent) => Action::Create,
        None => Action::Sql,
        Some(Pgmq::Extension(version)) if recent(version) && !lacks => Action::Keep,
        Some(Pgmq::Extension(version)) => match offered {
            Some(offered) if recent(offered) && numbers(offered) > numbers(version) => Action::Update,
            _ => Action::Refuse,
        },
        Some(Pgmq::Sql(version)) if numbers(version) < numbers(PGMQ_VERSION) => Action::Sql,
        Some(Pgmq::Sql(_) | Pgmq::Foreign) if lacks => Action::Refuse,
        Some(Pgmq::Sql(_) | Pgmq::Foreign) => Action::Keep,
    }
}

/// A version's numbers; what is no number, such as the end of `1.10.0-rc1`, counts as zero.
fn numbers(version: &str) -> [u32; 3] {
    let mut parts = version.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    std::array::from_fn(|_| parts.next().unwrap_or(0))
}

/// Which PGMQ is there.
pub(super) async fn installed(conn: &mut PgConnection) -> Result<Option<Pgmq>, sqlx::Error> {
    let extension: Option<String> = sqlx::query_scalar("select extversion from pg_extension where extname = 'pgmq'")
        .fetch_optional(&mut *conn)
        .await?;
    if let Some(version) = extension {
        return Ok(Some(Pgmq::Extension(version)));
    }
    let (by_crate, by_somebody): (bool, bool) = sqlx::query_as(
        "select exists (select from pg_class c where c.relnamespace = n.oid and c.relname = '__pgmq_migrations'),
                exists (select from pg_proc p where p.pronamespace = n.oid and p.proname in ('create', 'send', 'read'))
         from pg_namespace n where n.nspname = 'pgmq'",
    )
    .fetch_optional(&mut *conn)
    .await?
    .unwrap_or_default();
    if by_crate {
        let version: Option<String> = sqlx::query_scalar(
            "select version from pgmq.__pgmq_migrations \
             order by string_to_array(version, '.')::int[] desc limit 1",
        )
        .fetch_optional(&mut *conn)
        .await?;
        if let Some(version) = version {
            return Ok(Some(Pgmq::Sql(version)));
        }
    }
    Ok(by_somebody.then_some(Pgmq::Foreign))
}

/// Sees to it that there is a PGMQ that we can use. Inside the transaction of `conn`, but for the
/// crate's SQL, which the crate installs in a transaction of its own on another connection.
pub(super) async fn install(own: &PgPool, conn: &mut PgConnection) -> Result<Pgmq, Error> {
    let found = installed(conn).await?;
    let lacks = missing(conn).await?;
    let offered: Option<String> =
        sqlx::query_scalar("select default_version from pg_available_extensions where name = 'pgmq'")
            .fetch_optional(&mut *conn)
            .await?;
    let refused = |why: String| Error::Unusable { found: found.clone(), why, offered: offered.clone() };
    match decide(found.as_ref(), lacks.is_some() && found.is_some(), offered.as_deref()) {
        Action::Keep => {}
        Action::Create => {
            if let Err(error) = savepoint(conn, "create extension pgmq").await {
                tracing::warn!(
                    %error,
                    "the extension pgmq is there but could not be created; installing its SQL"
                );
                pgmq::install::install_sql_from_embedded(own).await?;
            }
        }
        Action::Update => {
            let updated = savepoint(conn, "alter extension pgmq update").await;
            updated.map_err(|error| refused(format!("it could not be updated ({})", message_of(&error))))?;
        }
        Action::Sql => {
            if let Some(offered) = &offered {
                tracing::warn!(
                    offered,
                    "the extension pgmq of this server is older than {LEAST_PGMQ}; installing the SQL of PGMQ \
                     {PGMQ_VERSION} instead"
                );
            }
            pgmq::install::install_sql_from_embedded(own).await?;
        }
        Action::Refuse => {
            return Err(refused(lacks.map_or_else(|| "it is too old".to_owned(), |what| format!("{what} is missing"))));
        }
    }
    try_out(conn).await.map_err(|error| refused(message_of(&error)))?;
    Ok(installed(conn).await?.unwrap_or(Pgmq::Foreign))
}

/// What the server said, without where it said it.
fn message_of(error: &sqlx::Error) -> String {
    error.as_database_error().map_or_else(|| error.to_string(), |refusal| refusal.message().to_owned())
}

/// Runs a statement; if it fails, the transaction around it goes on.
async fn savepoint(conn: &mut PgConnection, statement: &'static str) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    tx.execute(statement).await?;
    tx.commit().await
}

/// Makes a queue and uses it as our statements do, and leaves nothing of it. A version says less:
/// some are only on paper, and some are changed.
async fn try_out(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    let tried = tx
        .execute(raw_sql(
            "set local client_min_messages = warning;
             select pgmq.create('tasker_tries');
             insert into pgmq.q_tasker_tries (vt, message, headers) values (clock_timestamp(), '{}', '{}');
             select pgmq.send('tasker_tries', '{}'::jsonb), pgmq.send('tasker_tries', '{}'::jsonb, '{}'::jsonb);
             select msg_id, read_ct, enqueued_at, vt, message, headers from pgmq.q_tasker_tries;
             select queue_name from pgmq.meta limit 0;
             select queue_name, total_messages, queue_length, queue_visible_length, oldest_msg_age_sec
             from pgmq.metrics_all() limit 0",
        ))
        .await;
    tx.rollback().await?;
    tried.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_about_each_pgmq() {
        let extension = |version: &str| Some(Pgmq::Extension(version.into()));
        let sql = |version: &str| Some(Pgmq::Sql(version.into()));
        let (whole, lacking) = (false, true);
        for (found, lacks, offered, expected) in [
            (None, whole, None, Action::Sql),
            (None, whole, Some("1.4.4"), Action::Sql),
            (None, whole, Some("1.5.0"), Action::Create),
            (None, whole, Some("1.13.0"), Action::Create),
            (None, whole, Some("2.0"), Action::Create),
            (extension("1.4.4"), whole, Some("1.4.4"), Action::Refuse),
            (extension("1.4.4"), whole, Some("1.4.5"), Action::Refuse),
            (extension("1.4.4"), whole, None, Action::Refuse),
            (extension("1.4.4"), whole, Some("1.5.1"), Action::Update),
            (extension("1.4.4"), lacking, Some("1.10.0"), Action::Update),
            (extension("1.5.1"), whole, Some("1.5.1"), Action::Keep),
            (extension("1.5.1"), whole, Some("1.13.0"), Action::Keep),
            (extension("1.10.0-rc1"), whole, Some("1.4.4"), Action::Keep),
            (extension("1.13.0"), lacking, Some("1.13.0"), Action::Refuse),
            (extension("1.13.0"), lacking, Some("1.14.0"), Action::Update),
            (sql("1.4.4"), lacking, Some("1.4.4"), Action::Sql),
            (sql("1.12.0"), whole, None, Action::Sql),
            (sql(PGMQ_VERSION), whole, Some("1.20.0"), Action::Keep),
            (sql(PGMQ_VERSION), lacking, None, Action::Refuse),
            (sql("1.20.0"), whole, None, Action::Keep),
            (Some(Pgmq::Foreign), whole, Some("1.13.0"), Action::Keep),
            (Some(Pgmq::Foreign), lacking, Some("1.13.0"), Action::Refuse),
        ] {
            assert_eq!(
                decide(found.as_ref(), lacks, offered),
                expected,
                "{found:?}, lacks {lacks}, offered {offered:?}"
            );
        }
    }
}
