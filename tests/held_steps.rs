//! A step that cannot be worked on now is held, not sent: priority decides who goes first, and
//! the trace says what was waited for.

use std::time::Duration;

use serde_json::json;
use tasker_orchestration::lifecycle::Shared;
use tasker_orchestration::lifecycle::admission::{self, Found};
use tasker_tests::worker::{self, HANDLERS};
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

async fn until_held(world: &World, task: Uuid) -> String {
    eventually("its step is held", async || {
        let query = sqlx::query_scalar("select held_by from tasker.steps where task_uuid = $1 and held_by is not null");
        query.bind(task).fetch_optional(&world.pool).await.expect("steps")
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn step_without_a_worker_is_held_until_one_says_hello() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    assert_eq!(until_held(&world, task).await, "worker");
    assert_eq!(world.of_task(task, "state").await.as_deref(), Some("waiting_for_dependencies"));
    world.assert_sound().await;
    let claim = world.claim().await;
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    let spans = world.spans_of(task);
    let waits: Vec<_> = spans.iter().filter_map(|span| span.text("wait.reason")).collect();
    assert!(waits.contains(&"worker") && waits.contains(&"queue") && waits.len() == 2, "{waits:?}");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_that_no_worker_offers_hold_up_nobody_else() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world.register("strange", "steps: [{name: a, handler: nobody.offers.this}]").await;
    world.register_steps("chain", "a: ok\nb: ok <- a").await;
    let stranger = world.submit("strange").await;
    until_held(&world, stranger).await;
    let first = world.submit("chain").await;
    let claim = world.claim().await;
    world.succeed(&claim).await;
    let claim = world.claim().await;
    world.succeed(&claim).await;
    world.finish(&[first]).await;
    // By now everybody knows the worker: what it offers is sent at once.
    let second = world.submit("chain").await;
    for _ in 0..2 {
        let claim = world.claim().await;
        world.succeed(&claim).await;
    }
    world.finish(&[second]).await;
    world.assert_complete().await;
    let spans = world.spans_of(second);
    let waits: Vec<_> = spans.iter().filter_map(|span| span.text("wait.reason")).collect();
    assert_eq!(waits, ["queue", "queue"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn held_step_of_a_task_that_is_being_settled_is_looked_at_again_soon() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    until_held(&world, task).await;
    let mut settling = world.pool.begin().await.expect("a transaction");
    let lock = sqlx::query("select from tasker.tasks where task_uuid = $1 for no key update").bind(task);
    lock.execute(&mut *settling).await.expect("its lock");
    world.hello("hand", None, &HANDLERS, 1).await;
    let shared = Shared::new(world.pool.clone(), world.pool.clone(), Uuid::new_v4(), None);
    let found = admission::admit(&shared).await.expect("a pass");
    assert!(matches!(found, Found::Nothing(Some(pause)) if pause < Duration::from_secs(1)), "{found:?}");
    drop(shared);
    settling.rollback().await.expect("unlocked");
    let claim = world.claim().await;
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn small_room_lets_the_urgent_in_first() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let mut tasks = Vec::new();
    for priority in [0, 5, 1, 9, 3, 7] {
        let task = world.submit_with(json!({"template": "one", "priority": priority})).await.expect("submitted");
        until_held(&world, task).await;
        tasks.push(task);
    }
    // Room for two at a time: whoever is sent is the most urgent of those that wait.
    let mut order = Vec::new();
    while order.len() < tasks.len() {
        world.hello("hand", None, &HANDLERS, 1).await;
        let claim = eventually("a step is let in", async || {
            let mut conn = world.pool.acquire().await.expect("a connection");
            tasker_tests::worker::claim(&mut conn, "hand", None, &HANDLERS, 1).await.expect("claimed").pop()
        })
        .await;
        order.push(world.of_task(claim.task, "priority").await.expect("a priority"));
        world.succeed(&claim).await;
    }
    assert_eq!(order, ["9", "7", "5", "3", "1", "0"]);
    world.finish(&tasks).await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_nobody_takes_and_whose_time_is_over_make_room() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world
        .register("late", "steps: [{name: a, handler: broken, timeouts: {queue: 100ms}, retry: {max_attempts: 1}}]")
        .await;
    world.register_steps("one", "a: ok").await;
    // It offers two handlers, and never asks for steps of the one: two messages fill its queue.
    world.hello("choosy", None, &["broken", "ok"], 1).await;
    let late = [world.submit("late").await, world.submit("late").await, world.submit("late").await];
    assert_eq!(world.finish(&late).await, ["error", "error", "error"]);
    let task = world.submit("one").await;
    let claim = eventually("the step that is offered and asked for is sent", async || {
        let mut conn = world.pool.acquire().await.expect("a connection");
        worker::claim(&mut conn, "choosy", None, &["ok"], 1).await.expect("asked").pop()
    })
    .await;
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}
