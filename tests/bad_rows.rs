//! Rows that no code of ours writes, as a careless hand in the database leaves them: they cost
//! their own task only, and the reason names the table, the column and the row.

use serde_json::json;
use tasker_tests::worker::Answer;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

async fn change(world: &World, statement: &'static str, task: Uuid) {
    let changed = sqlx::query(statement).bind(task).execute(&world.pool).await.expect("changed");
    assert_eq!(changed.rows_affected(), 1, "{statement}");
}

/// A result of `task` came beside one of a sound task: it is put aside for a reason that has these words.
async fn only_the_bad_one_is_put_aside(world: &World, reason: &str) {
    world.register_steps("sound", "a: ok").await;
    let sound = world.submit("sound").await;
    let claim = world.claim_named(&mut Vec::new(), "a").await;
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[sound]).await, ["complete"]);
    let found =
        eventually("the result is put aside", async || world.words("select reason from tasker.quarantine").await.pop())
            .await;
    assert!(found.contains(reason), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_its_template_does_not_have_costs_its_own_task_only() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("short", "a: ok\nb: ok <- a").await;
    let task = world.submit("short").await;
    let claim = world.claim().await;
    change(&world, "update tasker.steps set step_index = 7 where task_uuid = $1 and step_index = 0", task).await;
    world.report(&claim, &Answer::Success(json!({}))).await;
    only_the_bad_one_is_put_aside(&world, &format!("row {} of tasker.steps, column step_index", claim.step)).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_map_whose_counts_are_gone_costs_its_own_task_only() {
    let world = World::start(Setup::by_hand()).await;
    let steps = "steps:\n  - {name: list, handler: ok}\n  - {name: each, handler: ok, depends_on: [list], for_each: \"${steps.list.output.items}\"}";
    world.register("mapped", steps).await;
    let task = world.submit("mapped").await;
    let list = world.claim().await;
    world.report(&list, &Answer::Success(json!({"items": [1, 2]}))).await;
    let item = world.claim().await;
    change(&world, "delete from tasker.maps where task_uuid = $1", task).await;
    world.report(&item, &Answer::Success(json!({}))).await;
    only_the_bad_one_is_put_aside(&world, "of tasker.maps, column step_uuid").await;
    world.end().await;
}
