//! What a settle writes, one struct for each composite type of the same name in
//! `migrations/0001_tasks.sql`; fields stand in the order of the type's columns.
//!
//! Rows, not one array a column: `unnest` of a list of arrays keeps a store for each of them, and
//! the sixty-six of a settle took a third of the time of a small one.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::Postgres;
use sqlx::postgres::{PgHasArrayType, PgTypeInfo};
use uuid::Uuid;

use crate::state_machine::flow::LANE_SEPARATOR;
use crate::state_machine::plan::{Due, Move, Plan, Step};
use crate::state_machine::{StepEvent, StepState};

macro_rules! composite {
    ($row:ident, $name:literal) => {
        impl sqlx::Type<Postgres> for $row<'_> {
            fn type_info() -> PgTypeInfo {
                PgTypeInfo::with_name($name)
            }
        }

        impl PgHasArrayType for $row<'_> {
            fn array_type_info() -> PgTypeInfo {
                PgTypeInfo::array_of($name)
            }
        }
    };
}

composite!(TaskChange, "tasker.task_change");
composite!(StepChange, "tasker.step_change");
composite!(NewStep, "tasker.new_step");
composite!(LogRow, "tasker.log_row");
composite!(DueRow, "tasker.due_row");

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
pub(super) struct TaskChange<'a> {
    task_uuid: Uuid,
    state: &'a str,
    version: i32,
    version_before: i32,
    generation: i32,
    open_steps: i32,
    in_flight_steps: i32,
    retrying_steps: i32,
    held_steps: i32,
    failed_steps: i32,
    error_type: Option<&'a str>,
    reason: Option<&'a str>,
    ended_by: Option<&'a str>,
}

impl<'a> TaskChange<'a> {
    /// `None` where the plan leaves the task as it is.
    pub fn of(plan: &'a Plan) -> Option<Self> {
        let task = &plan.task;
        plan.task_changed.then(|| Self {
            task_uuid: task.uuid,
            state: task.state.as_str(),
            version: task.version,
            version_before: plan.task_version_before,
            generation: task.generation,
            open_steps: task.open_steps,
            in_flight_steps: task.in_flight_steps,
            retrying_steps: task.retrying_steps,
            held_steps: task.held_steps,
            failed_steps: task.failed_steps,
            error_type: task.error_type.as_deref(),
            reason: task.reason.as_deref(),
            ended_by: task.ended_by,
        })
    }
}

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
pub(super) struct StepChange<'a> {
    step_uuid: Uuid,
    state: &'a str,
    version: i32,
    version_before: i32,
    generation: i32,
    attempt: i32,
    failures: i32,
    losses: i32,
    remaining_dependencies: i32,
    input: Option<&'a Value>,
    due_at: Option<DateTime<Utc>>,
    ready_at: Option<DateTime<Utc>>,
    held_by: Option<String>,
    enqueued: bool,
    enqueued_version: Option<i32>,
    enqueued_task_version: Option<i32>,
    enqueued_event: Option<&'a str>,
}

impl<'a> StepChange<'a> {
    pub fn of(plan: &Plan, step: &'a Step, version_before: i32) -> Self {
        Self {
            step_uuid: step.uuid,
            state: step.state.as_str(),
            version: step.version,
            version_before,
            generation: step.generation,
            attempt: step.attempt,
            failures: step.failures,
            losses: step.losses,
            remaining_dependencies: step.remaining_dependencies,
            input: step.input.as_ref(),
            due_at: step.due_at,
            ready_at: step.ready_at,
            held_by: held_by(plan, step),
            enqueued: is_enqueued_now(step),
            enqueued_version: step.enqueued_version,
            enqueued_task_version: step.enqueued_task_version,
            enqueued_event: step.enqueued_event.map(StepEvent::as_str),
        }
    }
}

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
pub(super) struct NewStep<'a> {
    step_uuid: Uuid,
    task_uuid: Uuid,
    step_index: i32,
    item: Option<i32>,
    queue: &'a str,
    priority: i32,
    state: &'a str,
    version: i32,
    generation: i32,
    attempt: i32,
    remaining_dependencies: i32,
    input: Option<&'a Value>,
    ready_at: Option<DateTime<Utc>>,
    held_by: Option<String>,
    enqueued: bool,
    enqueued_version: Option<i32>,
    enqueued_task_version: Option<i32>,
    enqueued_event: Option<&'a str>,
}

impl<'a> NewStep<'a> {
    pub fn of(plan: &Plan, step: &'a Step, queue: &'a str) -> Self {
        let place = |place| i32::try_from(place).unwrap_or(i32::MAX);
        Self {
            step_uuid: step.uuid,
            task_uuid: plan.task.uuid,
            step_index: place(step.index),
            item: step.item.map(place),
            queue,
            priority: step.priority,
            state: step.state.as_str(),
            version: step.version,
            generation: step.generation,
            attempt: step.attempt,
            remaining_dependencies: step.remaining_dependencies,
            input: step.input.as_ref(),
            ready_at: step.ready_at,
            held_by: held_by(plan, step),
            enqueued: is_enqueued_now(step),
            enqueued_version: step.enqueued_version,
            enqueued_task_version: step.enqueued_task_version,
            enqueued_event: step.enqueued_event.map(StepEvent::as_str),
        }
    }
}

/// Why it is held, and from now on: of which handler it is, behind a separator. A column of its own would
/// make the type another one, and older releases encode it by the position of its columns.
fn held_by(plan: &Plan, step: &Step) -> Option<String> {
    let reason = step.held_by?.as_str();
    let handler = plan.held_handlers.get(&step.uuid);
    Some(handler.map_or_else(|| reason.to_owned(), |handler| format!("{reason}{LANE_SEPARATOR}{handler}")))
}

/// `decide` leaves the times of a fresh Enqueue to the database.
fn is_enqueued_now(step: &Step) -> bool {
    matches!(step.state, StepState::Enqueued | StepState::Waiting) && step.enqueued_at.is_none()
}

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
pub(super) struct LogRow<'a> {
    task_uuid: Uuid,
    entity_uuid: Uuid,
    version: i32,
    task_version: Option<i32>,
    generation: i32,
    attempt: Option<i32>,
    from_state: &'a str,
    to_state: &'a str,
    event: &'a str,
    actor: Option<&'a str>,
    claim_token: Option<Uuid>,
    detail: Option<Value>,
}

impl<'a> LogRow<'a> {
    pub fn of(task_uuid: Uuid, made: &'a Move) -> Self {
        Self {
            task_uuid,
            entity_uuid: made.entity,
            version: made.version,
            task_version: made.task_version,
            generation: made.generation,
            attempt: made.attempt,
            from_state: made.change.from(),
            to_state: made.change.to(),
            event: made.change.event(),
            actor: made.actor.as_deref(),
            claim_token: made.claim_token,
            detail: made.detail.as_ref().map(|detail| json!(detail)),
        }
    }
}

#[derive(sqlx::Encode)]
#[cfg_attr(test, derive(serde::Serialize))]
pub(super) struct DueRow<'a> {
    due_at: DateTime<Utc>,
    kind: &'a str,
    task_uuid: Uuid,
    step_uuid: Option<Uuid>,
}

impl<'a> DueRow<'a> {
    pub fn of(task_uuid: Uuid, due: &'a Due) -> Self {
        Self { due_at: due.at, kind: due.kind, task_uuid, step_uuid: due.step }
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;
    use sqlx::{AssertSqlSafe, Encode, PgPool, Type, TypeInfo as _};

    use super::*;
    use crate::postgres::testing::TestDatabase;

    /// What the server takes the row for, by the names of its columns.
    async fn taken_for<T>(pool: &PgPool, row: T) -> Value
    where
        T: for<'q> Encode<'q, Postgres> + Type<Postgres> + PgHasArrayType + Send,
    {
        let statement = format!("select to_jsonb(n) from unnest($1::{}[]) n", T::type_info().name());
        sqlx::query_scalar(AssertSqlSafe(statement)).bind(vec![row]).fetch_one(pool).await.expect("a row")
    }

    fn written(row: impl Serialize) -> Value {
        serde_json::from_str(&json!(row).to_string().replace("Z\"", "+00:00\"")).expect("JSON")
    }

    #[tokio::test]
    async fn every_column_of_a_settle_stands_in_its_place() {
        let database = TestDatabase::fresh().await;
        let pool = database.pool().await;
        let (at, later) = (DateTime::UNIX_EPOCH, DateTime::UNIX_EPOCH + chrono::TimeDelta::days(1));
        let [one, two, three] = [1, 2, 3].map(Uuid::from_u128);
        let value = json!({"n": 1});
        let task = || TaskChange {
            task_uuid: one,
            state: "a",
            version: 1,
            version_before: 2,
            generation: 3,
            open_steps: 4,
            in_flight_steps: 5,
            retrying_steps: 6,
            held_steps: 7,
            failed_steps: 8,
            error_type: Some("b"),
            reason: Some("c"),
            ended_by: Some("d"),
        };
        assert_eq!(taken_for(&pool, task()).await, written(task()));
        let step = || StepChange {
            step_uuid: one,
            state: "a",
            version: 1,
            version_before: 2,
            generation: 3,
            attempt: 4,
            failures: 5,
            losses: 6,
            remaining_dependencies: 7,
            input: Some(&value),
            due_at: Some(at),
            ready_at: Some(later),
            held_by: Some("b".into()),
            enqueued: true,
            enqueued_version: Some(8),
            enqueued_task_version: Some(9),
            enqueued_event: Some("c"),
        };
        assert_eq!(taken_for(&pool, step()).await, written(step()));
        let new = || NewStep {
            step_uuid: one,
            task_uuid: two,
            step_index: 1,
            item: Some(2),
            queue: "a",
            priority: 3,
            state: "b",
            version: 4,
            generation: 5,
            attempt: 6,
            remaining_dependencies: 7,
            input: Some(&value),
            ready_at: Some(at),
            held_by: Some("c".into()),
            enqueued: true,
            enqueued_version: Some(8),
            enqueued_task_version: Some(9),
            enqueued_event: Some("d"),
        };
        assert_eq!(taken_for(&pool, new()).await, written(new()));
        let log = || LogRow {
            task_uuid: one,
            entity_uuid: two,
            version: 1,
            task_version: Some(2),
            generation: 3,
            attempt: Some(4),
            from_state: "a",
            to_state: "b",
            event: "c",
            actor: Some("d"),
            claim_token: Some(three),
            detail: Some(value.clone()),
        };
        assert_eq!(taken_for(&pool, log()).await, written(log()));
        let due = || DueRow { due_at: at, kind: "retry", task_uuid: one, step_uuid: Some(two) };
        assert_eq!(taken_for(&pool, due()).await, written(due()));
    }
}
