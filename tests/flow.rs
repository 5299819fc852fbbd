//! Flow control: what is paused or limited waits, nothing is lost by it, and the trace says why.

use tasker_shared::client::Client;

use crate::harness::{Setup, World, eventually};

async fn held(world: &World, reason: &'static str) -> i64 {
    let query = sqlx::query_scalar("select count(*) from tasker.steps where held_by = $1");
    query.bind(reason).fetch_one(&world.pool).await.expect("steps")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_queue_is_neither_fed_nor_claimed_and_loses_nothing() {
    let world = World::start(Setup { orchestrators: 2, workers: 0, rust_workers: 0, ..Setup::by_hand() }).await;
    world.register_steps("chain", "a: ok\nb: ok <- a").await;
    world.register_steps("flaky", "a: flaky").await;
    let client = Client::from_pool(world.pool.clone());
    let queue = "worker_tests";

    // One runs, one lies in the queue, one waits for its retry; then the queue is paused.
    let running = world.submit("chain").await;
    let claim = world.claim().await;
    let retrying = world.submit("flaky").await;
    let failing = world.claim().await;
    let lying = world.submit("chain").await;
    let in_queue = "select count(*) from pgmq.q_worker_tests";
    eventually("it lies in the queue", async || (world.number(in_queue).await == 1).then_some(())).await;
    client.pause_queue(queue, Some("ana"), Some("the bank is down")).await.expect("paused");
    client.pause_queue("worker_nowhere", None, None).await.expect_err("no such queue");
    client.pause_queue("task_requests", None, None).await.expect_err("no queue of steps");
    world.report(&failing, &tasker_tests::worker::answer(&failing)).await;

    // What runs runs on, what it makes ready is held, and a new task too.
    world.succeed(&claim).await;
    let late = world.submit("chain").await;
    eventually("everything that can move has moved", async || {
        (held(&world, "paused").await == 3 && world.number(in_queue).await == 1).then_some(())
    })
    .await;
    let mut conn = world.pool.acquire().await.expect("a connection");
    let handlers = tasker_tests::worker::HANDLERS;
    let none = tasker_tests::worker::claim(&mut conn, "hand", None, &handlers, 10).await.expect("claimed");
    assert!(none.is_empty(), "a paused queue gives nothing: {none:?}");
    drop(conn);
    let why = client.why(late).await.expect("a task").sentence();
    assert!(why.contains("queue worker_tests is paused by ana: the bank is down"), "{why}");
    world.assert_sound().await;

    client.resume_queue(queue, Some("ana"), None).await.expect("resumed");
    client.resume_queue(queue, Some("ana"), None).await.expect_err("it is not paused");
    let tasks = [running, lying, retrying, late];
    let work = async {
        loop {
            let claim = world.claim().await;
            world.succeed(&claim).await;
        }
    };
    tokio::select! {
        () = work => {}
        states = world.finish(&tasks) => assert_eq!(states, ["complete"; 4]),
    }
    world.queues_drained().await;
    world.assert_complete().await;
    let waits: Vec<String> = world
        .receiver
        .spans()
        .iter()
        .filter(|span| span.span.name == "step.wait")
        .filter_map(|span| span.text("wait.reason").map(str::to_owned))
        .collect();
    assert!(waits.iter().any(|reason| reason == "paused"), "{waits:?}");
    let audit = world
        .words("select format('%s %s by %s: %s', action, subject, actor, reason) from tasker.audit order by audit_id")
        .await;
    assert_eq!(audit, ["pause queue worker_tests by ana: the bank is down", "resume queue worker_tests by ana: "]);
    world.end().await;
}
