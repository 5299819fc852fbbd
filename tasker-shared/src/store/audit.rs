//! The audit: what people did.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;

/// A row of the audit.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[expect(missing_docs, reason = "columns of tasker.audit, explained there")]
pub struct AuditRow {
    pub audit_id: i64,
    pub task_uuid: Option<Uuid>,
    pub subject: Option<String>,
    pub action: String,
    pub actor: String,
    pub reason: Option<String>,
    pub details: Option<Value>,
    pub at: DateTime<Utc>,
}

/// The latest acts, newest first; of one task if it is named.
pub async fn audit_list(conn: &mut PgConnection, task: Option<Uuid>, limit: i64) -> Result<Vec<AuditRow>, Error> {
    Ok(sqlx::query_as!(
        AuditRow,
        "select audit_id, task_uuid, subject, action, actor, reason, details, at from tasker.audit
         where $1::uuid is null or task_uuid = $1 order by audit_id desc limit $2",
        task,
        limit
    )
    .fetch_all(conn)
    .await?)
}
