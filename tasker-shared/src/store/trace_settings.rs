//! Stored trace settings, and what the running processes make of them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use crate::trace::config::Stored;

/// What is stored: by scope, which is `*` or a namespace.
pub type ByScope = BTreeMap<String, Stored>;

/// One stored setting, and who set it.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "columns of tasker.trace_settings")]
pub struct StoredSetting {
    pub scope: String,
    pub key: String,
    pub value: String,
    pub set_at: DateTime<Utc>,
    pub set_by: String,
}

/// A process that exports, and how it does.
#[derive(Debug, Clone)]
pub struct Process {
    /// Made when it started.
    pub process: Uuid,
    /// `orchestrator`, `worker` or `api`.
    pub kind: String,
    /// Its name for people.
    pub name: String,
    /// Of the program.
    pub version: String,
    /// Database time.
    pub started_at: DateTime<Utc>,
    /// Seconds since it last said so.
    pub seen_seconds: f64,
    /// See `telemetry::settings`.
    pub state: Value,
}

/// Merges values into a scope; `None` forgets a key. Audited; every process is told.
pub async fn set(conn: &mut PgConnection, scope: &str, values: &BTreeMap<&str, Option<String>>) -> Result<(), Error> {
    let values = serde_json::json!(values);
    sqlx::query!("select tasker.set_trace_settings($1, $2)", values, scope).fetch_one(conn).await?;
    Ok(())
}

/// Everything that is stored.
pub async fn all(conn: &mut PgConnection) -> Result<Vec<StoredSetting>, Error> {
    Ok(sqlx::query_as!(
        StoredSetting,
        "select scope, key, value, set_at, set_by from tasker.trace_settings order by scope, key"
    )
    .fetch_all(conn)
    .await?)
}

/// The same, by scope.
pub async fn by_scope(conn: &mut PgConnection) -> Result<ByScope, Error> {
    let mut scopes = ByScope::new();
    for row in all(conn).await? {
        scopes.entry(row.scope).or_default().insert(row.key, row.value);
    }
    Ok(scopes)
}

/// Says how a process exports at this moment.
pub async fn report(
    conn: &mut PgConnection,
    process: Uuid,
    kind: &str,
    name: &str,
    version: &str,
    state: &Value,
) -> Result<(), Error> {
    sqlx::query!(
        "insert into tasker.trace_processes (process, kind, name, version, state) values ($1, $2, $3, $4, $5)
         on conflict (process) do update set seen_at = clock_timestamp(), state = excluded.state",
        process,
        kind,
        name,
        version,
        state
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Says that a process has ended, and forgets those that were not heard of for a day.
pub async fn ended(conn: &mut PgConnection, process: Uuid) -> Result<(), Error> {
    sqlx::query!(
        "delete from tasker.trace_processes where process = $1 or seen_at < clock_timestamp() - interval '1 day'",
        process
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Processes that were heard of within the last minute, the oldest first.
pub async fn processes(conn: &mut PgConnection) -> Result<Vec<Process>, Error> {
    Ok(sqlx::query_as!(
        Process,
        r#"select process, kind, name, version, started_at, state,
                  extract(epoch from clock_timestamp() - seen_at)::float8 as "seen_seconds!"
           from tasker.trace_processes where seen_at > clock_timestamp() - interval '1 minute'
           order by started_at, process"#
    )
    .fetch_all(conn)
    .await?)
}
