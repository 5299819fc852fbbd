//! A worker that is killed inside a handler loses nothing but time.

use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use tasker_tests::worker::{self, HANDLERS};
use tasker_trace_testing::assert_trace;

use crate::harness::{Setup, World, eventually, trace};

#[tokio::test(flavor = "multi_thread")]
async fn attempt_of_a_killed_worker_is_lost_and_the_next_runs_elsewhere() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world
        .register(
            "leased",
            "steps: [{name: a, handler: ok, timeouts: {heartbeat: 1s}}, {name: b, handler: ok, depends_on: [a]}]",
        )
        .await;
    let mut doomed = world.worker_process("doomed", "a").await;
    let task = world.submit("leased").await;
    assert_eq!(doomed.line().await, "inside a 1");
    doomed.kill().await;
    let other = world.worker_process("other", "none").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    assert_trace!(trace(&world.spans_of(task)), {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "a", attempt_number = 1, outcome = "lost", status = "ERROR", links = 1, "error.type" = "lease_expired"] {
                "handler.execution" [worker = "doomed", status = "ERROR", "error.type" = "lease_expired"],
                "step.state_transition" [event = "Enqueue"],
                "step.state_transition" [event = "Claim", actor = "doomed"],
                "step.state_transition" [event = "LeaseExpired"],
                "step.wait" ["wait.reason" = "queue"],
            },
            "step.execution" [step_name = "a", attempt_number = 2, outcome = "success", links = 2] {
                "handler.execution" [worker = "other"],
                "result.submission",
                "step.state_transition" [event = "Claim", actor = "other"],
                "step.state_transition" [event = "Report", actor = "other"],
                "step.state_transition" [event = "Complete"],
                "step.wait" ["wait.reason" = "queue"],
            },
            "step.execution" [step_name = "b", attempt_number = 1, outcome = "success", links = 1] {
                "handler.execution" [worker = "other"],
                "result.submission",
                "step.state_transition" * 4,
                "step.wait",
            },
            ..
        }
    });
    other.end().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attempt_that_loses_its_worker_again_and_again_fails_its_step() {
    let world = World::start(Setup::by_hand()).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 1s}}]").await;
    let task = world.submit("leased").await;
    for attempt in 1..=11 {
        assert_eq!(world.claim().await.attempt, attempt);
    }
    assert_eq!(world.finish(&[task]).await, ["error"]);
    assert_eq!(world.of_task(task, "error_type").await.as_deref(), Some("lease_expired"));
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn death_of_a_worker_is_noticed_long_before_its_lease_ends() {
    let world = World::start(Setup { orchestrators: 2, workers: 0, ..Setup::default() }).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 10s}}]").await;
    let mut doomed = world.worker_process("doomed", "a").await;
    let task = world.submit("leased").await;
    assert_eq!(doomed.line().await, "inside a 1");
    let other = world.worker_process("other", "none").await;
    let killed = Instant::now();
    doomed.kill().await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    assert!(killed.elapsed() < Duration::from_secs(6), "{:?}", killed.elapsed());
    assert_eq!(world.words("select worker from tasker.workers").await, ["other"]);
    world.assert_complete().await;
    assert_trace!(trace(&world.spans_of(task)), {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "a", attempt_number = 1, outcome = "lost", status = "ERROR", "error.type" = "lease_expired"] {
                "handler.execution" [worker = "doomed", status = "ERROR", "error.type" = "lease_expired"],
                ..
            },
            "step.execution" [step_name = "a", attempt_number = 2, outcome = "success", links = 2] {
                "handler.execution" [worker = "other"],
                ..
            },
            ..
        }
    });
    other.end().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_worker_keeps_its_claim_for_its_lease_while_it_holds_its_lock() {
    let world = World::start(Setup::by_hand()).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 4s}}]").await;
    let mut session = PgConnection::connect(&world.url).await.expect("a session");
    sqlx::query("select pg_advisory_lock(77)").execute(&mut session).await.expect("locked");
    sqlx::query("select tasker.worker_hello('quiet', 'tests', array['worker_tests'], array['ok'], 1, 77)")
        .execute(&world.pool)
        .await
        .expect("hello");
    let task = world.submit("leased").await;
    let claim = async || {
        eventually("a claim for quiet", async || {
            let mut conn = world.pool.acquire().await.expect("a connection");
            worker::claim(&mut conn, "quiet", None, &HANDLERS, 1).await.expect("claimed").pop()
        })
        .await
    };
    assert_eq!(claim().await.attempt, 1);
    assert_eq!(claim().await.attempt, 2);
    let early = "select (min(l.at) < min(a.claimed_at) + interval '4 s')::int::bigint from tasker.transitions l
        join tasker.attempts a on a.step_uuid = l.entity_uuid and a.attempt = 1 where l.event = 'LeaseExpired'";
    assert_eq!(world.number(early).await, 0, "the lease of a worker that holds its lock is its own");
    session.close().await.expect("closed");
    eventually("its session is gone, so it counts as dead", async || {
        (world.number("select count(*) from tasker.workers where worker = 'quiet'").await == 0).then_some(())
    })
    .await;
    let last = world.claim().await;
    assert_eq!(last.attempt, 3);
    world.succeed(&last).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}
