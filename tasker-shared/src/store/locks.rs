//! Locks of others: how long a transaction waits for them, and who holds them.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::Error;

/// Gives up waiting for a lock after a moment, until the transaction ends: somebody else is known to
/// hold one of what it is about.
pub async fn wait_briefly(conn: &mut PgConnection) -> Result<(), Error> {
    sqlx::query!("set local lock_timeout = '50ms'").execute(conn).await?;
    Ok(())
}

/// A session that holds locks on tables of ours: see `tasker.lock_holders`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "columns of the function")]
pub struct Holder {
    pub pid: i32,
    pub user_name: Option<String>,
    pub application_name: Option<String>,
    pub client: Option<String>,
    pub since: Option<DateTime<Utc>>,
    pub state: Option<String>,
    pub only_reads: bool,
    pub tables: Vec<String>,
    /// Names its transaction.
    pub transaction: String,
}

/// Who holds locks on tables of ours for longer than a second; those who only read hold up nothing but
/// changes of the tables.
pub async fn holders(conn: &mut PgConnection) -> Result<Vec<Holder>, Error> {
    Ok(sqlx::query_as!(
        Holder,
        r#"select pid as "pid!", user_name, application_name, client, since, state, only_reads as "only_reads!",
             tables as "tables!", transaction as "transaction!"
           from tasker.lock_holders()"#
    )
    .fetch_all(conn)
    .await?)
}
