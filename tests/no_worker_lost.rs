//! A worker that is killed inside a handler loses nothing but time.

use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use tasker_testing::assert_trace;
use tasker_tests::worker::{self, HANDLERS};
use uuid::Uuid;

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
    // Which of them the sweep happened to be awake for does not matter: most are noticed at once.
    let noticed =
        "select percentile_disc(0.5) within group (order by extract(epoch from r.at - a.claimed_at) * 1000)::bigint
        from tasker.transitions r join tasker.attempts a on a.step_uuid = r.entity_uuid and a.attempt = r.attempt
        where r.event = 'LeaseExpired'";
    let noticed = world.number(noticed).await;
    assert!(noticed < 3000, "a lease of 1 s was noticed after {noticed} ms");
    assert_eq!(world.of_task(task, "error_type").await.as_deref(), Some("lease_expired"));
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_claimed_together_are_lost_each_for_itself() {
    let world = World::start(Setup::by_hand()).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 2s}}]").await;
    let busy = world.submit("leased").await;
    let free = world.submit("leased").await;
    world.hello("hand", None, &HANDLERS, 100).await;
    eventually("both steps wait in the queue", async || {
        (world.number("select count(*) from pgmq.q_worker_tests").await == 2).then_some(())
    })
    .await;
    // Whoever settles the lost claims finds one of the tasks in somebody else's hands.
    let mut holder = world.pool.begin().await.expect("a transaction");
    let claims = {
        let mut conn = world.pool.acquire().await.expect("a connection");
        worker::claim(&mut conn, "hand", None, &HANDLERS, 2).await.expect("claimed")
    };
    let of = |task: Uuid| claims.iter().find(|claim| claim.task == task).expect("a claim of this task").step;
    sqlx::query("select from tasker.tasks where task_uuid = $1 for update")
        .bind(busy)
        .execute(&mut *holder)
        .await
        .expect("held");
    world.until_step(of(free), &["enqueued"]).await;
    world.until_step(of(busy), &["in_progress"]).await;
    holder.rollback().await.expect("let go");
    world.until_step(of(busy), &["enqueued"]).await;
    for _ in 0..2 {
        let again = world.claim().await;
        assert_eq!(again.attempt, 2);
        world.succeed(&again).await;
    }
    assert_eq!(world.finish(&[busy, free]).await, ["complete", "complete"]);
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
    // Half of its lease, so that a slow machine passes and the lease alone never does.
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    let noticed = "select extract(milliseconds from max(r.at) - max(a.claimed_at))::bigint from tasker.transitions r
        join tasker.attempts a on a.step_uuid = r.entity_uuid and a.attempt = 1 where r.event = 'LeaseExpired'";
    println!("it was noticed after {} ms", world.number(noticed).await);
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

/// Ends the session whose lock says that this worker lives; how many there were.
async fn cut_session(world: &World, worker: &str) -> i64 {
    sqlx::query_scalar(
        "select count(pg_terminate_backend(l.pid)) from tasker.workers w join pg_locks l
           on l.locktype = 'advisory' and l.mode = 'ExclusiveLock' and l.database = (select oid from pg_database where datname = current_database())
           and (l.classid::bigint << 32 | l.objid::bigint) = w.lock_key
         where w.worker = $1",
    )
    .bind(worker)
    .fetch_one(&world.pool)
    .await
    .expect("a session")
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_whose_session_is_cut_keeps_what_it_runs() {
    let world = World::start(Setup { orchestrators: 2, workers: 0, ..Setup::default() }).await;
    world.register("steady", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 20s}}]").await;
    world.register("doomed", "steps: [{name: b, handler: ok, timeouts: {heartbeat: 20s}}]").await;
    let mut steady = world.worker_process("steady", "a").await;
    let kept = world.submit("steady").await;
    assert_eq!(steady.line().await, "inside a 1");
    let mut doomed = world.worker_process("doomed", "b").await;
    let lost = world.submit("doomed").await;
    assert_eq!(doomed.line().await, "inside b 1");
    let other = world.worker_process("other", "none").await;
    // While the death of one is noticed, the other loses its session more than once.
    assert_eq!(cut_session(&world, "steady").await, 1);
    doomed.kill().await;
    eventually("it has its lock again", async || (cut_session(&world, "steady").await == 1).then_some(())).await;
    assert_eq!(world.finish(&[lost]).await, ["complete"]);
    let of_kept = "select s.state || ' ' || s.attempt || ' by ' || s.claimed_by from tasker.steps s
        join tasker.tasks t using (task_uuid) where t.finished_at is null";
    assert_eq!(world.words(of_kept).await, ["in_progress 1 by steady"]);
    steady.kill().await;
    assert_eq!(world.finish(&[kept]).await, ["complete"]);
    world.assert_complete().await;
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
