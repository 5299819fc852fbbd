//! Policies of retention: how long a namespace keeps what has ended. Nothing is removed here.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;

use super::Error;

/// The policy of a namespace; `*` stands for all that have none of their own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "RetentionPolicy")]
pub struct Policy {
    /// The namespace, or `*`.
    pub namespace: String,
    /// How long a finished task is kept; for ever if not given.
    pub keep_s: Option<i64>,
    /// How long a quarantined message is kept; for ever if not given.
    pub keep_quarantine_s: Option<i64>,
    /// Whether only somebody who writes an archive may remove.
    pub archive: bool,
}

/// Sets the policy of a namespace; with neither time it is removed.
pub async fn set(
    conn: &mut PgConnection,
    namespace: &str,
    keep: Option<Duration>,
    keep_quarantine: Option<Duration>,
    archive: bool,
    actor: Option<&str>,
) -> Result<(), Error> {
    let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
    sqlx::query!(
        "select tasker.set_retention($1, make_interval(secs => $2), make_interval(secs => $3), $4,
           coalesce($5, session_user::text))::text as done",
        namespace,
        seconds(keep),
        seconds(keep_quarantine),
        archive,
        actor
    )
    .fetch_one(conn)
    .await?;
    Ok(())
}

/// Every policy, by namespace.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<Policy>, Error> {
    Ok(sqlx::query_as!(
        Policy,
        r#"select namespace, extract(epoch from keep)::bigint as keep_s,
             extract(epoch from keep_quarantine)::bigint as keep_quarantine_s, archive
           from tasker.retention order by namespace"#
    )
    .fetch_all(conn)
    .await?)
}
