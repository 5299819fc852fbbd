//! Plans against real rows: what the simulated world of `state_machine` takes for granted.

use std::sync::Arc;

use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use super::apply;
use crate::postgres::testing::TestDatabase;
use crate::queue::QueueChanges;
use crate::state_machine::decide::Operator;
use crate::state_machine::plan::{Plan, Room};
use crate::state_machine::{Event, Snapshot, decide};
use crate::store::steps::load_all;
use crate::store::tasks;
use crate::store::templates::{self, Loaded};
use crate::store::tx::in_tx;
use crate::template;

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

async fn submitted(conn: &mut PgConnection) -> Result<(Uuid, Arc<Loaded>), Failure> {
    let checked = template::parse("order.yaml", TEMPLATE).expect("the template is good");
    let id = templates::register(conn, &checked.template).await?.template_id;
    let request = json!({"namespace": "shop", "template": "order", "input": {}});
    let task = tasks::submit(conn, &[request]).await?[0].task_uuid.expect("the request is good");
    Ok((task, templates::load(conn, &[id]).await?.remove(0)))
}

/// Decides on the task's row alone and applies the plan.
async fn settle(conn: &mut PgConnection, task: Uuid, template: &Loaded, events: Vec<Event>) -> Result<Plan, Failure> {
    let (task, row) = tasks::lock(conn, &[task]).await?.remove(0);
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
            load_all(conn, &[task]).await?.iter().map(|row| (row.step.index, row.passed)).collect();
        passed.sort_unstable();
        assert_eq!(passed, [(0, true), (1, false), (2, false)]);
        Ok::<_, Failure>(())
    })
    .await
    .unwrap();
}
