//! Signals: what people and services send to tasks that wait for them.

use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;

/// Sends a signal to a task; `accepted`, or why not.
pub async fn send(
    conn: &mut PgConnection,
    task: Uuid,
    name: &str,
    payload: &Value,
    actor: Option<&str>,
    traceparent: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.signal_task(task => $1, name => $2, payload => $3, actor => coalesce($4, session_user::text), traceparent => $5) as "answer!""#,
        task,
        name,
        payload,
        actor,
        traceparent
    )
    .fetch_one(conn)
    .await?)
}
