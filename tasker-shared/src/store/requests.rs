//! What people and clients ask for. Nothing here decides: it sends a request to the
//! orchestrators, or moves a message that nobody could use.

use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use crate::state_machine::decide::ByHand;

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

/// Asks for a failed, cancelled or blocked task to be tried again (of a blocked one only `steps`,
/// if there are any); `accepted`, or why not.
pub async fn retry(
    conn: &mut PgConnection,
    task: Uuid,
    steps: &[String],
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.retry_task(task => $1, reason => $2, actor => coalesce($3, session_user::text), steps => $4) as "answer!""#,
        task,
        reason,
        actor,
        steps
    )
    .fetch_one(conn)
    .await?)
}

/// What an operator may ask of a task as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "explained in docs/reference/lifecycle.md")]
pub enum TaskRequest {
    Suspend,
    Resume,
    GiveUp,
    Resolve,
}

/// Sends the request; `accepted`, or why not.
pub async fn act(
    conn: &mut PgConnection,
    task: Uuid,
    request: TaskRequest,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select case $4
             when 'suspend' then tasker.suspend_task($1, $2, coalesce($3, session_user::text))
             when 'resume' then tasker.resume_task($1, $2, coalesce($3, session_user::text))
             when 'give_up' then tasker.give_up_task($1, $2, coalesce($3, session_user::text))
             else tasker.resolve_task($1, $2, coalesce($3, session_user::text)) end as "answer!""#,
        task,
        reason,
        actor,
        match request {
            TaskRequest::Suspend => "suspend",
            TaskRequest::Resume => "resume",
            TaskRequest::GiveUp => "give_up",
            TaskRequest::Resolve => "resolve",
        }
    )
    .fetch_one(conn)
    .await?)
}

/// Asks for a finished task to run again from these steps; `accepted`, or why not.
pub async fn rerun(
    conn: &mut PgConnection,
    task: Uuid,
    from: &[String],
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.rerun_task($1, $2, $3, coalesce($4, session_user::text)) as "answer!""#,
        task,
        from,
        reason,
        actor
    )
    .fetch_one(conn)
    .await?)
}

/// Asks for a step to be settled by hand; `accepted`, or why not.
pub async fn settle_step(
    conn: &mut PgConnection,
    task: Uuid,
    step: &str,
    act: ByHand,
    output: Option<Value>,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select case $3
             when 'skip' then tasker.skip_step($1, $2, $5, coalesce($6, session_user::text))
             when 'resolve' then tasker.resolve_step($1, $2, $4, $5, coalesce($6, session_user::text))
             else tasker.complete_step($1, $2, coalesce($4, 'null'), $5, coalesce($6, session_user::text)) end as "answer!""#,
        task,
        step,
        match act {
            ByHand::Skip => "skip",
            ByHand::Resolve => "resolve",
            ByHand::Complete => "complete",
        },
        output,
        reason,
        actor
    )
    .fetch_one(conn)
    .await?)
}

/// Does one act to a page of the tasks that match; the answer has `matched`, `asked`, `sample` and `next`.
pub async fn act_on_tasks(
    conn: &mut PgConnection,
    filter: &Value,
    action: &str,
    dry_run: bool,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<Value, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.act_on_tasks($1, $2, $3, coalesce($4, session_user::text), $5) as "answer!""#,
        filter,
        action,
        reason,
        actor,
        dry_run
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
/// wakes a reader; answers the queue, or `None` if there is no such message. Audited.
pub async fn requeue(
    conn: &mut PgConnection,
    quarantine_id: i64,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<Option<String>, Error> {
    let row = sqlx::query!(
        r#"with taken as (delete from tasker.quarantine where quarantine_id = $1 returning queue, message, headers),
           sent as materialized (
             select t.queue, (select max(id) from pgmq.send(t.queue, coalesce(t.message, 'null'), coalesce(t.headers, 'null')) id) as id
             from taken t),
           written as (
             insert into tasker.audit (subject, action, actor, reason)
             select format('message %s of queue %s', $1::bigint, t.queue), 'requeue', left(coalesce($2, session_user::text), 100), left($3, 1000)
             from taken t)
           select queue as "queue!", tasker.wake(queue)::text as woken from sent where id is not null"#,
        quarantine_id,
        actor,
        reason
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| row.queue))
}

/// Deletes a quarantined message; false if there is none. Audited.
pub async fn discard(
    conn: &mut PgConnection,
    quarantine_id: i64,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "with gone as (delete from tasker.quarantine where quarantine_id = $1 returning queue)
         insert into tasker.audit (subject, action, actor, reason)
         select format('message %s of queue %s', $1::bigint, g.queue), 'discard', left(coalesce($2, session_user::text), 100), left($3, 1000)
         from gone g",
        quarantine_id,
        actor,
        reason
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Forgets a reader.
pub async fn unregister(conn: &mut PgConnection, reader: &str) -> Result<(), Error> {
    sqlx::query!("delete from tasker.readers where reader = $1", reader).execute(conn).await?;
    Ok(())
}
