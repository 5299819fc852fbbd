//! What operators' acts write beyond the moves: the audit, where a suspended task came from, and
//! outputs given by hand.
//!
//! Statements of their own, run only when a plan has something for them.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use tasker_shared::state_machine::TaskState;
use tasker_shared::state_machine::plan::{Plan, Task};
use tasker_shared::store::Error;
use uuid::Uuid;

/// Records what the plans owe to operators, in the transaction that applies them.
pub(super) async fn record(conn: &mut PgConnection, batch: &[(&Task, &Plan)], at: DateTime<Utc>) -> Result<(), Error> {
    if batch.iter().any(|(_, plan)| !plan.audit.is_empty()) {
        audit(conn, batch, at).await?;
    }
    let moved = |(before, plan): &&(&Task, &Plan)| before.suspended_from != plan.task.suspended_from;
    if batch.iter().any(|entry| moved(&entry)) {
        suspended_from(conn, batch.iter().filter(moved)).await?;
    }
    if batch.iter().any(|(_, plan)| !plan.outputs.is_empty()) {
        outputs(conn, batch, at).await?;
    }
    Ok(())
}

async fn audit(conn: &mut PgConnection, batch: &[(&Task, &Plan)], at: DateTime<Utc>) -> Result<(), Error> {
    let (mut task, mut action, mut actor) = (Vec::new(), Vec::new(), Vec::new());
    let (mut reason, mut details): (Vec<Option<&str>>, Vec<Option<Value>>) = (Vec::new(), Vec::new());
    for (_, plan) in batch {
        for act in &plan.audit {
            task.push(plan.task.uuid);
            action.push(act.action);
            actor.push(&*act.actor);
            reason.push(act.reason.as_deref());
            details.push(act.details.clone());
        }
    }
    sqlx::query!(
        "insert into tasker.audit (task_uuid, action, actor, reason, details, at)
         select n.task_uuid, n.action, n.actor, n.reason, n.details, $6
         from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::jsonb[]) with ordinality
           as n(task_uuid, action, actor, reason, details, ordinality)
         order by n.ordinality",
        &task,
        &action as &[&str],
        &actor as &[&str],
        &reason as &[Option<&str>],
        &details as &[Option<Value>],
        at
    )
    .execute(conn)
    .await?;
    Ok(())
}

async fn suspended_from<'a>(
    conn: &mut PgConnection,
    moved: impl Iterator<Item = &'a (&'a Task, &'a Plan)>,
) -> Result<(), Error> {
    let (tasks, states): (Vec<Uuid>, Vec<Option<&str>>) =
        moved.map(|(_, plan)| (plan.task.uuid, plan.task.suspended_from.map(TaskState::as_str))).unzip();
    sqlx::query!(
        "update tasker.tasks t set suspended_from = n.state
         from unnest($1::uuid[], $2::text[]) as n(task_uuid, state) where t.task_uuid = n.task_uuid",
        &tasks,
        &states as &[Option<&str>]
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Keeps an output where every reader looks for it: with the step's latest attempt. A step that
/// was never tried gets an attempt 0, which no worker ever had.
async fn outputs(conn: &mut PgConnection, batch: &[(&Task, &Plan)], at: DateTime<Utc>) -> Result<(), Error> {
    for (_, plan) in batch {
        for given in &plan.outputs {
            sqlx::query!(
                "insert into tasker.attempts as a (task_uuid, step_uuid, attempt, generation, claim_token, worker,
                   claim_began_at, claimed_at, report_began_at, reported_at, outcome, output)
                 values ($1, $2, $3, $4, gen_random_uuid(), $5, $6, $6, $6, $6, 'success', $7)
                 on conflict (task_uuid, step_uuid, attempt) do update set output = excluded.output",
                plan.task.uuid,
                given.step,
                given.attempt,
                given.generation,
                given.actor,
                at,
                given.output
            )
            .execute(&mut *conn)
            .await?;
        }
    }
    Ok(())
}
