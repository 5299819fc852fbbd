//! What people and clients ask for. Nothing here decides: it sends a wish to the
//! orchestrators, or moves a message that nobody could use.

use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;

/// Asks for a task to end; `accepted`, or why not.
pub async fn cancel(
    conn: &mut PgConnection,
    task: Uuid,
    terminate: bool,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.cancel_task(task => $1, reason => $2, terminate => $3, actor => coalesce($4, session_user::text)) as "answer!""#,
        task,
        reason,
        terminate,
        actor
    )
    .fetch_one(conn)
    .await?)
}

/// Asks for a failed, cancelled or blocked task to be tried again; `accepted`, or why not.
pub async fn retry(
    conn: &mut PgConnection,
    task: Uuid,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.retry_task(task => $1, reason => $2, actor => coalesce($3, session_user::text)) as "answer!""#,
        task,
        reason,
        actor
    )
    .fetch_one(conn)
    .await?)
}

/// Says that somebody waits for tasks to finish: settle sends `tasker_finished` only then. It
/// counts for 60 s, so it is repeated while waiting. Whoever left without a word an hour ago is forgotten.
pub async fn await_finished(conn: &mut PgConnection, reader: &str) -> Result<(), Error> {
    sqlx::query!(
        "with forgotten as (
           delete from tasker.readers where queue = 'finished' and reader <> $1 and seen_at < clock_timestamp() - interval '1 h'
         )
         insert into tasker.readers (queue, reader) values ('finished', $1)
         on conflict (queue, reader) do update set seen_at = clock_timestamp()",
        reader
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Puts a quarantined message back into its queue as a new message, with its headers, and
/// wakes a reader; answers the queue, or `None` if there is no such message.
pub async fn requeue(conn: &mut PgConnection, quarantine_id: i64) -> Result<Option<String>, Error> {
    let row = sqlx::query!(
        r#"with taken as (delete from tasker.quarantine where quarantine_id = $1 returning queue, message, headers),
           sent as materialized (
             select t.queue, (select max(id) from pgmq.send(t.queue, coalesce(t.message, 'null'), coalesce(t.headers, 'null')) id) as id
             from taken t)
           select queue as "queue!", tasker.wake(queue)::text as woken from sent where id is not null"#,
        quarantine_id
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| row.queue))
}

/// Deletes a quarantined message; false if there is none.
pub async fn discard(conn: &mut PgConnection, quarantine_id: i64) -> Result<bool, Error> {
    let done =
        sqlx::query!("delete from tasker.quarantine where quarantine_id = $1", quarantine_id).execute(conn).await?;
    Ok(done.rows_affected() > 0)
}
