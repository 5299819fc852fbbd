//! Plans against real rows: what the simulated world of `state_machine` takes for granted.

use std::sync::Arc;

use serde::Serialize;
use sqlx::{AssertSqlSafe, Encode, PgPool, Type, TypeInfo as _};
use tasker_shared::state_machine::decide::Operator;
use tasker_shared::state_machine::plan::Room;
use tasker_shared::state_machine::{Event, Snapshot, decide};
use tasker_shared::store::tasks;
use tasker_shared::store::templates;
use tasker_shared::store::tx::in_tx;
use tasker_shared::template::{self, Compiled};
use tasker_testing::TestDatabase;

use super::*;
use crate::lifecycle::read::{load_all_steps, lock_tasks};

const TEMPLATE: &str = r#"
namespace: shop
name: order
version: "1.0.0"
steps:
  - {name: a, handler: do.a}
  - {name: b, handler: do.b}
  - {name: c, handler: do.c, depends_on: [a, b]}
"#;

type Failure = Box<dyn std::error::Error>;

async fn submitted(conn: &mut PgConnection) -> Result<(Uuid, Arc<Compiled>), Failure> {
    let checked = template::parse("order.yaml", TEMPLATE).expect("the template is good");
    let id = templates::register(conn, &checked).await?.template_id;
    let request = json!({"namespace": "shop", "template": "order", "input": {}});
    let task = tasks::submit(conn, &[request]).await?[0].task_uuid.expect("the request is good");
    Ok((task, templates::load(conn, &[id]).await?.remove(0)))
}

/// Decides on the task's row alone and applies the plan.
async fn settle(conn: &mut PgConnection, task: Uuid, template: &Compiled, events: Vec<Event>) -> Result<Plan, Failure> {
    let (task, row) = lock_tasks(conn, &[task]).await?.remove(0);
    let new_step_uuids = (0..3).map(|_| Uuid::new_v4()).collect();
    let snapshot = Snapshot { new_step_uuids, ..Snapshot::of_row(task.clone(), template.definition.clone()) };
    let plan = decide(&snapshot, &events.iter().collect::<Vec<_>>(), &mut Room::unlimited(), row.read_at);
    apply(conn, &[(&task, &plan)], row.read_at, None, &QueueChanges::default()).await?;
    Ok(plan)
}

#[tokio::test]
async fn a_task_that_ends_as_it_begins_leaves_no_open_step() {
    let database = TestDatabase::fresh().await;
    in_tx(&database.pool().await, async |conn| {
        let (task, template) = submitted(conn).await?;
        let operator = Operator { actor: "carl".into(), reason: None };
        settle(conn, task, &template, vec![Event::Start, Event::Cancel(operator)]).await?;
        let states: Vec<String> = sqlx::query_scalar("select state from tasker.steps where task_uuid = $1")
            .bind(task)
            .fetch_all(&mut *conn)
            .await?;
        assert_eq!(states, ["cancelled", "cancelled", "cancelled"]);
        let logged: i64 =
            sqlx::query_scalar("select count(*) from tasker.transitions where task_uuid = $1 and event = 'Cancel'")
                .bind(task)
                .fetch_one(&mut *conn)
                .await?;
        assert_eq!(logged, 4, "the task's and each step's");
        Ok::<_, Failure>(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn what_the_steps_behind_take_for_done_is_read_from_the_log() {
    let database = TestDatabase::fresh().await;
    in_tx(&database.pool().await, async |conn| {
        let (task, template) = submitted(conn).await?;
        settle(conn, task, &template, vec![Event::Start]).await?;
        // One failed because its handler did, one because its input could not be made.
        sqlx::query(
            "with failed as (
               update tasker.steps set state = 'error', version = version + 1 where task_uuid = $1 and step_index < 2 returning *)
             insert into tasker.transitions (task_uuid, entity_uuid, version, generation, from_state, to_state, event, began_at, at, detail)
             select task_uuid, step_uuid, version, 1, 'enqueued', 'error', 'Fail', clock_timestamp(), clock_timestamp(),
               jsonb_build_object('error_type', case step_index when 0 then 'CardDeclined' else 'missing_input' end)
             from failed",
        )
        .bind(task)
        .execute(&mut *conn)
        .await?;
        let mut passed: Vec<(u32, bool)> =
            load_all_steps(conn, &[task]).await?.iter().map(|row| (row.step.index, row.passed)).collect();
        passed.sort_unstable();
        assert_eq!(passed, [(0, true), (1, false), (2, false)]);
        Ok::<_, Failure>(())
    })
    .await
    .unwrap();
}

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
