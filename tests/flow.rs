//! Flow control: what is paused or limited waits, nothing is lost by it, and the trace says why.

use serde_json::json;
use tasker_shared::client::Client;
use tasker_shared::store::flow::SetLimit;
use tasker_tests::worker::{self, Claim, HANDLERS};
use uuid::Uuid;

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
    world.report(&failing, &worker::answer(&failing)).await;

    // What runs runs on, what it makes ready is held, and a new task too.
    world.succeed(&claim).await;
    let late = world.submit("chain").await;
    eventually("everything that can move has moved", async || {
        (held(&world, "paused").await == 3 && world.number(in_queue).await == 1).then_some(())
    })
    .await;
    let mut conn = world.pool.acquire().await.expect("a connection");
    let none = worker::claim(&mut conn, "hand", None, &HANDLERS, 10).await.expect("claimed");
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
        let input = json!({"customer": format!("c{}", n % 3)});
        let request = json!({"template": "limited", "input": input});
        tasks.push(world.submit_with(request).await.expect("submitted"));
    }
    assert_eq!(world.finish(&tasks).await, ["complete"; 60]);
    world.queues_drained().await;
    world.assert_complete().await;
    let most = most_at_once(&world).await;
    assert_eq!(most, 2, "the limit is used, and kept");
    let spans = world.spans_of(tasks[0]);
    let waits: Vec<_> = spans.iter().filter_map(|span| span.text("wait.reason")).collect();
    assert_eq!(
        waits.iter().filter(|reason| **reason == "limit").count(),
        2,
        "its first attempt and its retry: {waits:?}"
    );
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    // Rows of keys that nobody uses any more go, with what was left of their places.
    let forgotten = "select tasker.forget_limits(1000, interval '0')::bigint";
    assert_eq!((world.number(forgotten).await, world.number(forgotten).await), (3, 0));
    assert_eq!(world.number("select count(*) from tasker.places").await, 0);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_attempt_gives_its_place_to_the_next() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::by_hand() }).await;
    world.register("single", "concurrency: {limit: 1}\nsteps: [{name: a, handler: ok}]").await;
    let client = Client::from_pool(world.pool.clone());
    let mut open = submit_many(&world, "single", 4, json!({})).await;
    let mut claims = Vec::new();
    for _ in 0..2 {
        let claim = world.claim().await;
        all_held(&world, i64::try_from(open.len()).expect("few") - 1).await;
        client.cancel(claim.task, Some("ana"), None).await.expect("cancelled");
        open.retain(|task| *task != claim.task);
        claims.push(claim);
    }
    for _ in 0..2 {
        let claim = world.claim().await;
        world.succeed(&claim).await;
    }
    assert_eq!(world.finish(&open).await, ["complete"; 2]);
    // Whoever worked on what was cancelled comes too late to change anything.
    let late = worker::answer(&claims[0]);
    assert_eq!(world.report(&claims[0], &late).await, (false, true));
    world.assert_complete().await;
    world.end().await;
}

/// What the log says is exact: the most first steps of one customer that were in flight together.
async fn most_at_once(world: &World) -> i64 {
    world
        .number(
            "with span as (
               select coalesce(t.input->>'customer', '') as customer, r.entity_uuid as step, r.at as began,
                 coalesce((select min(e.at) from tasker.transitions e where e.task_uuid = r.task_uuid and e.entity_uuid = r.entity_uuid
                    and e.version > r.version and e.to_state in ('complete', 'waiting_for_retry', 'error', 'cancelled')), 'infinity') as ended
               from tasker.transitions r join tasker.steps s on s.step_uuid = r.entity_uuid and s.step_index = 0
               join tasker.tasks t on t.task_uuid = r.task_uuid where r.to_state = 'enqueued' and r.event <> 'LeaseExpired')
             select max(n) from (select count(*) as n from span a join span b
               on a.customer = b.customer and b.began <= a.began and a.began < b.ended group by a.step, a.began) s",
        )
        .await
}

/// Submits many tasks of a template at once.
async fn submit_many(world: &World, template: &str, count: usize, input: serde_json::Value) -> Vec<Uuid> {
    let request = json!({"namespace": "tests", "template": template, "input": input});
    let requests = vec![request; count];
    let mut conn = world.pool.acquire().await.expect("a connection");
    let answers = tasker_shared::store::tasks::submit(&mut conn, &requests).await.expect("submitted");
    answers.into_iter().map(|answer| answer.task_uuid.expect("accepted")).collect()
}

async fn all_held(world: &World, count: i64) {
    let held = "select count(*) from tasker.steps where held_by is not null";
    eventually("they are held", async || (world.number(held).await == count).then_some(())).await;
}

/// Claims and finishes one step for a worker with one slot.
async fn next(world: &World) -> Claim {
    let claim = eventually("a step is let in", async || {
        world.hello("hand", None, &HANDLERS, 1).await;
        let mut conn = world.pool.acquire().await.expect("a connection");
        worker::claim(&mut conn, "hand", None, &HANDLERS, 1).await.expect("claimed").pop()
    })
    .await;
    world.succeed(&claim).await;
    claim
}

#[tokio::test(flavor = "multi_thread")]
async fn the_urgent_overtake_a_thousand_that_wait() {
    let world = World::start(Setup { orchestrators: 2, workers: 0, ..Setup::default() }).await;
    world.register_steps("low", "a: ok").await;
    world.register("raised", "steps: [{name: a, handler: ok, priority: 5}]").await;
    submit_many(&world, "low", 1000, json!({})).await;
    let raised = world.submit("raised").await;
    let urgent = world.submit_with(json!({"template": "low", "priority": 9})).await.expect("submitted");
    all_held(&world, 1002).await;
    assert_eq!(next(&world).await.task, urgent);
    assert_eq!(next(&world).await.task, raised);
    // One that comes late waits for what is in the queue already, and for nothing else.
    let late = world.submit_with(json!({"template": "raised", "priority": 4})).await.expect("submitted");
    eventually("it is held or sent", async || {
        let ready = "select count(*) from tasker.steps s join tasker.tasks t using (task_uuid)
                     where t.priority = 4 and (s.held_by is not null or s.state = 'enqueued')";
        (world.number(ready).await == 1).then_some(())
    })
    .await;
    let mut before = 0;
    while next(&world).await.task != late {
        before += 1;
        assert!(before <= 4, "at most the room of the queue, which is twice its slots, and what was being let in");
    }
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_with_hundreds_does_not_starve_one_with_five() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world.register("fair", "fair_key: '${input.tenant}'\nsteps: [{name: a, handler: ok}]").await;
    submit_many(&world, "fair", 400, json!({"tenant": "big"})).await;
    let small = submit_many(&world, "fair", 5, json!({"tenant": "small"})).await;
    all_held(&world, 405).await;
    let mut served = 0;
    for _ in 0..14 {
        served += usize::from(small.contains(&next(&world).await.task));
    }
    assert_eq!(served, 5, "they take turns");
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_leaks_no_place_of_a_limit() {
    let world = World::start(Setup { orchestrators: 2, workers: 0, ..Setup::default() }).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 1s}}]").await;
    let client = Client::from_pool(world.pool.clone());
    let limit = SetLimit { namespace: "tests".into(), handler: Some("ok".into()), concurrency: Some(1), rate: None };
    client.set_limit(&limit, Some("ana"), Some("it is slow")).await.expect("set");
    for wrong in [SetLimit { concurrency: Some(0), ..limit.clone() }, SetLimit { concurrency: None, ..limit.clone() }] {
        client.set_limit(&wrong, None, None).await.expect_err("refused");
    }
    let mut doomed = world.worker_process("doomed", "a").await;
    let tasks = submit_many(&world, "leased", 6, json!({})).await;
    doomed.line().await;
    all_held(&world, 5).await;
    let waits = world.words("select task_uuid::text from tasker.steps where held_by = 'limit'").await;
    let why = client.why(waits[0].parse().expect("a uuid")).await.expect("a task").sentence();
    assert!(why.contains("limit tests:ok has 1 of 1 in use"), "{why}");
    let uses = client.limits(Some("tests")).await.expect("limits");
    assert_eq!((uses.len(), uses[0].in_use), (1, 1));
    doomed.kill().await;
    let other = world.worker_process("other", "none").await;
    // One ends otherwise, and one is cancelled while it waits: both leave their places.
    client.cancel(tasks[5], Some("ana"), None).await.expect("cancelled");
    let states = world.finish(&tasks).await;
    assert!(states.iter().filter(|state| *state == "complete").count() >= 5, "{states:?}");
    assert_eq!(most_at_once(&world).await, 1);
    assert_eq!(client.limits(Some("tests")).await.expect("limits")[0].in_use, 0);
    world.queues_drained().await;
    world.assert_complete().await;
    client.remove_limit(("tests", Some("ok")), Some("ana"), None).await.expect("removed");
    client.remove_limit(("tests", Some("ok")), Some("ana"), None).await.expect_err("there is none");
    other.end().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_begin_in_a_time_than_the_rate_allows() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::default() }).await;
    world.register("rated", "steps: [{name: a, handler: ok, rate: {limit: 5, per: 400ms}}]").await;
    let tasks = submit_many(&world, "rated", 20, json!({})).await;
    assert_eq!(world.finish(&tasks).await, ["complete"; 20]);
    let most = world
        .number(
            "select max(n) from (select count(*) as n from tasker.transitions a join tasker.transitions b
               on b.event = 'Enqueue' and b.at >= a.at and b.at < a.at + interval '380 ms'
             where a.event = 'Enqueue' group by a.entity_uuid) s",
        )
        .await;
    // A full bucket, and what is refilled meanwhile.
    assert!(most <= 10, "{most} began within one period");
    world.queues_drained().await;
    world.assert_complete().await;
    let spans = world.spans_of(tasks[19]);
    assert!(spans.iter().any(|span| span.text("wait.reason") == Some("limit")), "it waited for a token");
    world.end().await;
}
