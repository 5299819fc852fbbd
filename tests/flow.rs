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

#[tokio::test(flavor = "multi_thread")]
async fn never_more_than_the_limit_of_a_key_are_in_flight_and_all_end() {
    let world = World::start(Setup { orchestrators: 2, workers: 1, rust_workers: 1, ..Setup::default() }).await;
    world
        .register(
            "limited",
            "steps:
  - {name: a, handler: flaky, concurrency: {key: '${input.customer}', limit: 2}, retry: {initial_interval: 10ms}}
  - {name: b, handler: ok, depends_on: [a]}",
        )
        .await;
    let mut tasks = Vec::new();
    for n in 0..60 {
        let input = serde_json::json!({"customer": format!("c{}", n % 3)});
        let request = serde_json::json!({"template": "limited", "input": input});
        tasks.push(world.submit_with(request).await.expect("submitted"));
    }
    assert_eq!(world.finish(&tasks).await, ["complete"; 60]);
    world.queues_drained().await;
    world.assert_complete().await;
    // What the log says is exact: attempts of one key that were open at the same time.
    let most = world
        .number(
            "with span as (
               select t.input->>'customer' as customer, r.entity_uuid as step, r.at as began,
                 (select min(e.at) from tasker.transitions e where e.task_uuid = r.task_uuid and e.entity_uuid = r.entity_uuid
                    and e.version > r.version and e.to_state in ('complete', 'waiting_for_retry', 'error', 'cancelled')) as ended
               from tasker.transitions r join tasker.steps s on s.step_uuid = r.entity_uuid and s.step_index = 0
               join tasker.tasks t on t.task_uuid = r.task_uuid where r.to_state = 'enqueued')
             select max(n) from (select count(*) as n from span a join span b
               on a.customer = b.customer and b.began <= a.began and a.began < b.ended group by a.step, a.began) s",
        )
        .await;
    assert_eq!(most, 2, "the limit is used, and kept");
    let spans = world.spans_of(tasks[0]);
    let waits: Vec<_> = spans.iter().filter_map(|span| span.text("wait.reason")).collect();
    assert_eq!(
        waits.iter().filter(|reason| **reason == "limit").count(),
        2,
        "its first attempt and its retry: {waits:?}"
    );
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.end().await;
}
