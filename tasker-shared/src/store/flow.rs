//! Flow control: what an operator pauses and limits, and what that leaves room for.

use std::collections::HashSet;

use sqlx::PgConnection;

use super::Error;

/// Pauses a queue of steps, or with `resume` lets it go on; `accepted`, or why not. Audited.
pub async fn pause(
    conn: &mut PgConnection,
    queue: &str,
    resume: bool,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select case when $4 then tasker.resume_queue($1, $2, coalesce($3, session_user::text))
                  else tasker.pause_queue($1, $2, coalesce($3, session_user::text)) end as "answer!""#,
        queue,
        reason,
        actor,
        resume
    )
    .fetch_one(conn)
    .await?)
}

/// The queues that are paused.
pub async fn paused(conn: &mut PgConnection) -> Result<HashSet<String>, Error> {
    Ok(sqlx::query_scalar!("select queue from tasker.paused_queues").fetch_all(conn).await?.into_iter().collect())
}
