//! Rows that no code of ours writes, as a careless hand in the database leaves them: they cost
//! their own task only, and the reason names the table, the column and the row.

use serde_json::json;
use tasker_tests::worker::{self, Answer};
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

/// Two tasks whose retries lie in the future; `bad` changes the step of the first, then both come due
/// at once, so that they are settled together.
async fn the_retry_of_a_sound_task_is_sent_beside(bad: &'static str) {
    let world = World::start(Setup::by_hand()).await;
    world
        .register("later", "steps:\n  - {name: a, handler: ok, retry: {initial_interval: 1h, max_interval: 1h}}")
        .await;
    let (first, sound) = (world.submit("later").await, world.submit("later").await);
    for _ in [first, sound] {
        let claim = world.claim().await;
        world.report(&claim, &Answer::Error("Hiccup", true)).await;
        world.until_step(claim.step, &["waiting_for_retry"]).await;
    }
    change(&world, bad, first).await;
    let mut tx = world.pool.begin().await.expect("a transaction");
    for statement in [
        "update tasker.steps set due_at = clock_timestamp()",
        "update tasker.due set due_at = clock_timestamp() where kind = 'retry'",
        "select pg_notify('tasker', 'due')",
    ] {
        sqlx::query(statement).execute(&mut *tx).await.expect("due");
    }
    tx.commit().await.expect("committed");
    let again = world.claim().await;
    assert_eq!((again.task, again.attempt), (sound, 2));
    world.succeed(&again).await;
    assert_eq!(world.finish(&[sound]).await, ["complete"]);
    eventually("the bad one is put off, and not for ever", async || {
        let put_off = "select count(*) from tasker.due where kind = 'retry'
                       and due_at between clock_timestamp() + interval '10 s' and clock_timestamp() + interval '1 min'";
        (world.number(put_off).await == 1).then_some(())
    })
    .await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_row_among_what_is_due_costs_its_own_task_only() {
    the_retry_of_a_sound_task_is_sent_beside("update tasker.steps set step_index = 7 where task_uuid = $1").await;
}

/// Counting on from the highest number is what panics where overflows are checked.
#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "nothing panics: overflows are not checked")]
async fn a_panic_costs_its_own_task_only() {
    the_retry_of_a_sound_task_is_sent_beside("update tasker.steps set version = 2147483647 where task_uuid = $1").await;
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "nothing panics: overflows are not checked")]
async fn a_panic_over_a_held_step_holds_up_nobody_else() {
    let world = World::start(Setup::by_hand()).await;
    world.register("rare", "steps:\n  - {name: a, handler: rare}").await;
    let (first, sound) = (world.submit("rare").await, world.submit("rare").await);
    eventually("both are held", async || {
        (world.number("select count(*) from tasker.steps where held_by = 'worker'").await == 2).then_some(())
    })
    .await;
    change(&world, "update tasker.steps set version = 2147483647 where task_uuid = $1", first).await;
    let claim = eventually("the sound one is sent", async || {
        world.hello("late", None, &["rare"], 10).await;
        let mut conn = world.pool.acquire().await.expect("a connection");
        worker::claim(&mut conn, "late", None, &["rare"], 10).await.expect("claimed").pop()
    })
    .await;
    assert_eq!(claim.task, sound);
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[sound]).await, ["complete"]);
    world.end().await;
}
