//! Tasks that steps start: the rows that tie them together. Statements of their own: a task that
//! neither starts one nor was started by one never pays for one.

use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;
use crate::state_machine::plan::{ChildEnd, Failure, Outcome};

/// Starts tasks; see `tasker.start_children` for the keys of a request.
pub async fn start(conn: &mut PgConnection, requests: Vec<Value>) -> Result<(), Error> {
    sqlx::query!("select tasker.start_children($1)::text as done", Value::Array(requests)).fetch_one(conn).await?;
    Ok(())
}

/// Tells those who wait for these tasks.
pub async fn tell_parents(conn: &mut PgConnection, children: &[Uuid]) -> Result<(), Error> {
    sqlx::query!("select tasker.tell_parents($1)::text as done", children).fetch_one(conn).await?;
    Ok(())
}

/// Asks for the end of what these tasks awaited, or only these steps of theirs.
pub async fn cancel(conn: &mut PgConnection, tasks: &[Uuid], steps: Option<&[Uuid]>) -> Result<(), Error> {
    sqlx::query!("select tasker.cancel_children($1, $2)::text as done", tasks, steps).fetch_one(conn).await?;
    Ok(())
}

/// What became of the tasks that these attempts, `(task, step, attempt)`, started, by step and attempt;
/// of those that are still awaited there is no answer.
pub async fn ends(
    conn: &mut PgConnection,
    attempts: &[(Uuid, Uuid, i32)],
) -> Result<Vec<((Uuid, i32), ChildEnd)>, Error> {
    let tasks: Vec<Uuid> = attempts.iter().map(|(task, ..)| *task).collect();
    let steps: Vec<Uuid> = attempts.iter().map(|(_, step, _)| *step).collect();
    let numbers: Vec<i32> = attempts.iter().map(|(.., attempt)| *attempt).collect();
    let rows = sqlx::query!(
        r#"select step_uuid as "step_uuid!", attempt as "attempt!", output, error_type, error, link
           from tasker.child_ends($1, $2, $3)"#,
        &tasks,
        &steps,
        &numbers
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let outcome = match row.error_type {
                None => Outcome::Success(row.output.unwrap_or_default()),
                // What could not be started or kept cannot be another time.
                Some(kind) => Outcome::Failure(Failure {
                    retryable: kind == "child_failed",
                    kind,
                    message: row.error.unwrap_or_default(),
                    retry_after_ms: None,
                }),
            };
            ((row.step_uuid, row.attempt), ChildEnd { outcome, link: row.link })
        })
        .collect())
}
