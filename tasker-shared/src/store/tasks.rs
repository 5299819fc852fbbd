//! Task rows: ask for new ones, and read what they hold.

use serde::Serialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use super::Error;

/// The flags that others know of.
pub fn w3c_flags(stored: i16) -> u8 {
    u8::from(stored & 1 == 1)
}

/// The bytes of an id, if there are as many as it has.
pub fn bytes<const N: usize>(slice: &[u8]) -> Option<[u8; N]> {
    slice.try_into().ok()
}

/// Which of these tasks exist; to tell an unknown task from one that is locked elsewhere.
pub async fn existing(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!("select task_uuid from tasker.tasks where task_uuid = any($1)", task_uuids)
        .fetch_all(conn)
        .await?)
}

/// The answer to one request to submit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submitted {
    /// The new task, or the one that had the idempotency key first.
    pub task_uuid: Option<Uuid>,
    /// False when the idempotency key was known.
    pub is_new: bool,
    /// What was wrong with the request.
    pub error: Option<String>,
}

/// Submits requests (each with the keys of a `submit` message and its trace context); one answer each, in order.
pub async fn submit<T: Serialize + Sync>(conn: &mut PgConnection, requests: &[T]) -> Result<Vec<Submitted>, Error> {
    let rows = sqlx::query!(
        r#"select task_uuid, is_new as "is_new!", error from tasker.submit_tasks($1) order by ordinal"#,
        Json(requests) as _
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Submitted { task_uuid: row.task_uuid, is_new: row.is_new, error: row.error })
        .collect())
}
