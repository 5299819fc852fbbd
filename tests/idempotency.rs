//! The same key is the same task, from whoever and however often.

use serde_json::json;
use std::collections::HashSet;

use crate::harness::{Setup, World, eventually};

async fn one() -> World {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn known_key_answers_the_first_task_and_another_input_is_refused() {
    let world = one().await;
    let request = json!({"template": "one", "idempotency_key": "order-1", "input": {"total": 1}});
    let first = world.submit_with(request.clone()).await.expect("submitted");
    assert_eq!(world.submit_with(request.clone()).await, Ok(first));
    world.finish(&[first]).await;
    assert_eq!(world.submit_with(request).await, Ok(first), "also after its end");
    let conflict =
        world.submit_with(json!({"template": "one", "idempotency_key": "order-1", "input": {"total": 2}})).await;
    let expected =
        format!("idempotency_key: was used for task {first} with another template, version or input; use a new key");
    assert_eq!(conflict, Err(expected.clone()));

    let raw = json!({"v": 1, "type": "submit", "namespace": "tests", "template": "one", "idempotency_key": "order-1", "input": {"total": 3}});
    world.send("task_requests", &raw, None).await;
    let quarantined = eventually("the raw conflict is quarantined", async || {
        world.words("select reason || ' ' || (message->'input')::text from tasker.quarantine").await.pop()
    })
    .await;
    assert_eq!(quarantined, format!("{expected} {{\"total\": 3}}"));
    assert_eq!(world.number("select count(*) from tasker.tasks").await, 1);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_submits_of_one_key_are_one_task() {
    let world = one().await;
    let request = json!({"template": "one", "idempotency_key": "order-1", "input": {"total": 1}});
    let raw = json!({"v": 1, "type": "submit", "namespace": "tests", "template": "one", "idempotency_key": "order-1", "input": {"total": 1}});
    let submits = (0..8).map(|_| world.submit_with(request.clone()));
    let raws = (0..8).map(|_| world.send("task_requests", &raw, None));
    let (tasks, _) = tokio::join!(futures_util::future::join_all(submits), futures_util::future::join_all(raws));
    let tasks: HashSet<_> = tasks.into_iter().map(|task| task.expect("submitted")).collect();
    assert_eq!(tasks.len(), 1);
    world.finish(&Vec::from_iter(tasks)).await;
    world.queues_drained().await;
    assert_eq!(world.number("select count(*) from tasker.tasks").await, 1);
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn submit_that_is_rolled_back_never_was() {
    let world = one().await;
    let mut tx = world.pool.begin().await.expect("begun");
    sqlx::query("select tasker.submit_task('tests', 'one', idempotency_key => 'k')")
        .execute(&mut *tx)
        .await
        .expect("submitted");
    tx.rollback().await.expect("rolled back");
    let kept = world
        .submit_with(json!({"template": "one", "idempotency_key": "k", "input": {"other": true}}))
        .await
        .expect("the key is free");
    assert_eq!(world.finish(&[kept]).await, ["complete"]);
    assert_eq!(world.number("select count(*) from tasker.tasks").await, 1);
    world.assert_complete().await;
    world.end().await;
}
