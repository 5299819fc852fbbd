//! Versions live side by side, and a worker takes only what it has the code for.

use serde_json::json;
use tasker_shared::client::Client;
use tasker_shared::store::templates;
use tasker_shared::template;
use tasker_tests::worker::{self, HANDLERS, NAMESPACE};

use crate::harness::{Setup, World, eventually};

async fn register(world: &World, version: &str, steps: &str) {
    let yaml = format!("namespace: {NAMESPACE}\nname: order\nversion: \"{version}\"\nsteps: [{steps}]\n");
    let checked = template::parse("order.yaml", &yaml).expect("a template");
    let mut conn = world.pool.acquire().await.expect("a connection");
    templates::register(&mut conn, &checked).await.expect("registered");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_task_stays_on_its_version() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::by_hand() }).await;
    register(&world, "1", "{name: a, handler: ok}, {name: old, handler: ok, depends_on: [a]}").await;
    let running = world.submit("order").await;
    let first = world.claim().await;
    register(&world, "2", "{name: a, handler: ok}, {name: new, handler: ok, depends_on: [a]}").await;
    world.succeed(&first).await;
    let second = world.claim().await;
    assert_eq!((second.task, &*second.step_name), (running, "old"));
    world.succeed(&second).await;

    // Without a version the one registered last; with one, that.
    for (version, last) in [(None, "new"), (Some("1"), "old"), (Some("2"), "new")] {
        let task: uuid::Uuid = sqlx::query_scalar("select tasker.submit_task($1, 'order', version => $2)")
            .bind(NAMESPACE)
            .bind(version)
            .fetch_one(&world.pool)
            .await
            .expect("submitted");
        for name in ["a", last] {
            let claim = world.claim().await;
            assert_eq!((claim.task, &*claim.step_name), (task, name));
            world.succeed(&claim).await;
        }
        assert_eq!(world.finish(&[task]).await, ["complete"]);
    }
    assert_eq!(world.finish(&[running]).await, ["complete"]);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_the_handler_leaves_the_step_and_why_says_so() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::by_hand() }).await;
    world.register("strange", "steps: [{name: a, handler: cards.charge}]").await;
    let client = Client::connect(&world.url).await.expect("a client");
    let task = world.submit("strange").await;
    let wanted = "waiting: a needs handler cards.charge, and no worker offers it on queue worker_tests";
    eventually("why says which handler is missing", async || {
        (client.why(task).await.expect("a situation").sentence() == wanted).then_some(())
    })
    .await;
    let mut conn = world.pool.acquire().await.expect("a connection");
    assert!(worker::claim(&mut conn, "hand", None, &HANDLERS, 10).await.expect("claimed").is_empty());
    // One that has it: the step is sent and this one takes it, while the other still does not.
    let has_it = ["cards.charge"];
    worker::hello(&mut conn, "new", None, &has_it, 4).await.expect("hello");
    let claim = eventually("the step can be claimed", async || {
        assert!(worker::claim(&mut conn, "hand", None, &HANDLERS, 10).await.expect("claimed").is_empty());
        worker::claim(&mut conn, "new", None, &has_it, 10).await.expect("claimed").pop()
    })
    .await;
    assert_eq!((claim.task, claim.input), (task, json!({"input": {}, "steps": {}})));
    drop(conn);
    world.end().await;
}
