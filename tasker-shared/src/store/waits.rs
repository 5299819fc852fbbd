//! Signals that were sent, the steps that wait for them, and what waits came to. Statements of
//! their own: a task whose template has no wait never pays for one.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use crate::state_machine::plan::{Answer, Outcome, Signal};

/// Signals of one task that are looked at in one settle; more wait for the next.
const SIGNALS: i64 = 1000;

/// The kept signals of these tasks, oldest first.
pub async fn kept_signals(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<(Uuid, Signal)>, Error> {
    let rows = sqlx::query!(
        "select s.task_uuid, s.signal_id, s.name, s.payload, s.actor, s.traceparent
         from unnest($1::uuid[]) t(task_uuid)
         cross join lateral (select * from tasker.signals k where k.task_uuid = t.task_uuid order by k.signal_id limit $2) s
         order by s.signal_id",
        task_uuids,
        SIGNALS
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let signal = Signal {
                id: row.signal_id,
                name: row.name,
                payload: row.payload,
                actor: row.actor,
                traceparent: row.traceparent,
            };
            (row.task_uuid, signal)
        })
        .collect())
}

/// Those of these places, `(task, step index)`, where a step waits now; by task, in file order.
pub async fn waiting(conn: &mut PgConnection, places: &[(Uuid, u32)]) -> Result<Vec<(Uuid, u32, Uuid)>, Error> {
    let tasks: Vec<Uuid> = places.iter().map(|(task, _)| *task).collect();
    let indexes: Vec<i32> = places.iter().map(|(_, index)| i32::try_from(*index).unwrap_or(-1)).collect();
    let rows = sqlx::query!(
        "select s.task_uuid, s.step_index, s.step_uuid
         from unnest($1::uuid[], $2::int[]) w(task_uuid, step_index)
         join tasker.steps s on s.task_uuid = w.task_uuid and s.step_index = w.step_index and s.state = 'waiting'
         order by s.task_uuid, s.step_index",
        &tasks,
        &indexes
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (row.task_uuid, u32::try_from(row.step_index).unwrap_or_default(), row.step_uuid))
        .collect())
}

/// Writes what steps without a handler came to where a handler's result would stand, and
/// deletes the signals that they used.
pub async fn answer(
    conn: &mut PgConnection,
    answers: &[(Uuid, &Answer)],
    used_signals: &[i64],
    at: DateTime<Utc>,
) -> Result<(), Error> {
    let tasks: Vec<Uuid> = answers.iter().map(|(task, _)| *task).collect();
    let steps: Vec<Uuid> = answers.iter().map(|(_, answer)| answer.step).collect();
    let attempts: Vec<i32> = answers.iter().map(|(_, answer)| answer.attempt).collect();
    let generations: Vec<i32> = answers.iter().map(|(_, answer)| answer.generation).collect();
    let since: Vec<DateTime<Utc>> = answers.iter().map(|(_, answer)| answer.since).collect();
    let (mut outputs, mut errors) = (Vec::new(), Vec::new());
    for (_, answer) in answers {
        match &answer.outcome {
            Outcome::Success(output) => {
                outputs.push(Some(output.clone()));
                errors.push(None);
            }
            Outcome::Failure(failure) => {
                outputs.push(None);
                errors.push(Some(serde_json::json!(failure)));
            }
        }
    }
    sqlx::query!(
        "with used as (delete from tasker.signals where signal_id = any($8))
         insert into tasker.attempts (task_uuid, step_uuid, attempt, generation, claim_token, worker, claim_began_at, claimed_at,
           report_began_at, reported_at, outcome, output, error)
         select n.task_uuid, n.step_uuid, n.attempt, n.generation, gen_random_uuid(), '', n.since, n.since, $9, $9,
           case when n.error is null then 'success' else 'error' end, n.output, n.error
         from unnest($1::uuid[], $2::uuid[], $3::int[], $4::int[], $5::timestamptz[], $6::jsonb[], $7::jsonb[])
           as n(task_uuid, step_uuid, attempt, generation, since, output, error)
         on conflict do nothing",
        &tasks,
        &steps,
        &attempts,
        &generations,
        &since,
        &outputs as &[Option<Value>],
        &errors as &[Option<Value>],
        used_signals,
        at
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Says when the waits of steps that began with their task are due: the statement that creates
/// steps knows no due time, so that tasks without waits pay nothing for it.
pub async fn set_due(conn: &mut PgConnection, waits: &[(Uuid, DateTime<Utc>)]) -> Result<(), Error> {
    let (steps, due): (Vec<Uuid>, Vec<DateTime<Utc>>) = waits.iter().copied().unzip();
    sqlx::query!(
        "update tasker.steps s set due_at = n.due_at
         from unnest($1::uuid[], $2::timestamptz[]) as n(step_uuid, due_at) where s.step_uuid = n.step_uuid",
        &steps,
        &due
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Says when steps must have ended, `(task, step, when)`; what was said before counts no more.
pub async fn set_deadlines(conn: &mut PgConnection, deadlines: &[(Uuid, Uuid, DateTime<Utc>)]) -> Result<(), Error> {
    let tasks: Vec<Uuid> = deadlines.iter().map(|(task, ..)| *task).collect();
    let steps: Vec<Uuid> = deadlines.iter().map(|(_, step, _)| *step).collect();
    let at: Vec<DateTime<Utc>> = deadlines.iter().map(|(.., at)| *at).collect();
    sqlx::query!(
        "insert into tasker.step_deadlines (task_uuid, step_uuid, at)
         select * from unnest($1::uuid[], $2::uuid[], $3::timestamptz[])
         on conflict (task_uuid, step_uuid) do update set at = excluded.at",
        &tasks,
        &steps,
        &at
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What is due for tasks and steps that have ended.
#[derive(Debug, Default)]
pub struct Over {
    /// Tasks: everything but their retries.
    pub tasks: Vec<Uuid>,
    /// Steps of others, `(task, step)`: the same.
    pub steps: Vec<(Uuid, Uuid)>,
    /// Retries, `(task, due)`, which are found by their time.
    pub retries: Vec<(Uuid, DateTime<Utc>)>,
}

/// Forgets what nothing will come of.
pub async fn forget_due(conn: &mut PgConnection, over: &Over) -> Result<(), Error> {
    let (tasks, steps): (Vec<Uuid>, Vec<Uuid>) = over.steps.iter().copied().unzip();
    let (retrying, due): (Vec<Uuid>, Vec<DateTime<Utc>>) = over.retries.iter().copied().unzip();
    sqlx::query!(
        "with of_tasks as (
           delete from tasker.due d where d.task_uuid = any($1) and d.kind <> all ('{lease,retry,schedule}')
         ), of_steps as (
           delete from tasker.due d using unnest($2::uuid[], $3::uuid[]) s(task_uuid, step_uuid)
           where d.task_uuid = s.task_uuid and d.step_uuids = array[s.step_uuid] and d.kind <> all ('{lease,retry,schedule}')
         )
         delete from tasker.due d using unnest($4::uuid[], $5::timestamptz[]) r(task_uuid, due_at)
         where d.due_at = r.due_at and d.kind = 'retry' and d.task_uuid = r.task_uuid",
        &over.tasks,
        &tasks,
        &steps,
        &retrying,
        &due
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// When these steps, `(task, step)`, must have ended.
pub async fn deadlines(
    conn: &mut PgConnection,
    of: &[(Uuid, Uuid)],
) -> Result<Vec<(Uuid, Uuid, DateTime<Utc>)>, Error> {
    let (tasks, steps): (Vec<Uuid>, Vec<Uuid>) = of.iter().copied().unzip();
    let rows = sqlx::query!(
        "select d.task_uuid, d.step_uuid, d.at from unnest($1::uuid[], $2::uuid[]) w(task_uuid, step_uuid)
         join tasker.step_deadlines d on d.task_uuid = w.task_uuid and d.step_uuid = w.step_uuid",
        &tasks,
        &steps
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.task_uuid, row.step_uuid, row.at)).collect())
}

/// Forgets what was sent to tasks that have ended and never used it.
pub async fn forget_signals(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<(), Error> {
    sqlx::query!("delete from tasker.signals where task_uuid = any($1)", task_uuids).execute(conn).await?;
    Ok(())
}

/// Sends a signal to a task; `accepted`, or why not.
pub async fn signal(
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
