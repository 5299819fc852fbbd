//! A result is applied once: late, repeated and reordered ones change nothing but a counter.

use serde_json::{Value, json};
use tasker_tests::worker::{self, answer};
use uuid::Uuid;

use crate::harness::{Setup, World};

/// Everything that is known of a task but its log's times, for "nothing changed".
async fn picture(world: &World, task: Uuid) -> Vec<String> {
    sqlx::query_scalar(
        "select to_jsonb(t)::text from tasker.tasks t where task_uuid = $1
         union all select to_jsonb(s)::text from tasker.steps s where task_uuid = $1
         union all select to_jsonb(a)::text from tasker.attempts a where task_uuid = $1
         union all select to_jsonb(r)::text from tasker.transitions r where task_uuid = $1
         order by 1",
    )
    .bind(task)
    .fetch_all(&world.pool)
    .await
    .expect("rows")
}

fn hint(claim: &worker::Claim) -> Value {
    json!({"v": 1, "task": claim.task, "step": claim.step, "generation": 1, "attempt": claim.attempt, "token": claim.token, "outcome": "success"})
}

#[tokio::test(flavor = "multi_thread")]
async fn result_of_a_lost_claim_is_stale_and_changes_nothing() {
    let world = World::start(Setup::by_hand()).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 1s}}]").await;
    let task = world.submit("leased").await;
    let lost = world.claim_as("slow").await;
    // Its lease runs out, and the next attempt goes to somebody else.
    let next = world.claim().await;
    assert_eq!((next.step, next.attempt), (lost.step, 2));
    let before = picture(&world, task).await;
    assert_eq!(world.report(&lost, &answer(&lost)).await, (false, true));
    assert_eq!(picture(&world, task).await, before);
    assert_eq!(world.counter("unmatched_reports").await, 1);

    world.succeed(&next).await;
    world.finish(&[task]).await;
    let before = picture(&world, task).await;
    assert_eq!(world.report(&next, &answer(&next)).await, (true, false), "the same token again is accepted");
    assert_eq!(world.report(&lost, &answer(&lost)).await, (false, true));
    assert_eq!(picture(&world, task).await, before);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn report_after_the_lease_but_before_anyone_noticed_still_counts() {
    let mut world = World::start(Setup { orchestrators: 1, ..Setup::by_hand() }).await;
    world.register("leased", "steps: [{name: a, handler: ok, timeouts: {heartbeat: 1s}}]").await;
    let task = world.submit("leased").await;
    let claim = world.claim().await;
    // Nobody sweeps while no orchestrator runs.
    for orchestrator in world.orchestrators.drain(..) {
        orchestrator.shutdown(crate::harness::DEADLINE).await;
    }
    crate::harness::eventually("the lease has run out", async || {
        let query =
            sqlx::query_scalar("select lease_expires_at < clock_timestamp() from tasker.steps where step_uuid = $1");
        let expired: bool = query.bind(claim.step).fetch_one(&world.pool).await.expect("a step");
        expired.then_some(())
    })
    .await;
    assert_eq!(world.report(&claim, &answer(&claim)).await, (true, false), "expiry is permission, not loss");
    world.add_orchestrator().await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_and_reordered_hints_are_one_result_each() {
    let mut world = World::start(Setup::by_hand()).await;
    world.register_steps("fan", "a: ok\nb: ok\nc: ok\nd: ok <- a b c").await;
    let task = world.submit("fan").await;
    let mut claims = Vec::new();
    let mut reported = Vec::new();
    for step in ["a", "b", "c"] {
        reported.push(world.claim_named(&mut claims, step).await);
    }
    for orchestrator in world.orchestrators.drain(..) {
        orchestrator.shutdown(crate::harness::DEADLINE).await;
    }
    for claim in &reported {
        world.report(claim, &answer(claim)).await;
    }
    // Hints again, the last first, three times over, also of attempts that never were.
    for _ in 0..3 {
        for claim in reported.iter().rev() {
            world.send("step_results", &hint(claim), None).await;
            let mut never = hint(claim);
            never["attempt"] = json!(7);
            world.send("step_results", &never, None).await;
        }
    }
    world.add_orchestrator().await;
    world.add_orchestrator().await;
    let last = world.claim().await;
    assert_eq!(last.step_name, "d");
    for claim in &reported {
        world.send("step_results", &hint(claim), None).await;
    }
    world.succeed(&last).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.send("step_results", &hint(&last), None).await;
    world.queues_drained().await;
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn step_message_that_is_there_twice_is_claimed_once() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    let claim = world.claim().await;
    let message = json!({"v": 1, "task": task, "step": claim.step, "generation": 1, "attempt": 1, "handler": "ok"});
    for _ in 0..3 {
        world.send("worker_tests", &message, None).await;
    }
    let other = world.submit("one").await;
    let next = world.claim().await;
    assert_eq!(next.task, other, "the copies of the first are dropped");
    world.succeed(&claim).await;
    world.succeed(&next).await;
    world.finish(&[task, other]).await;
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_item_never_fails_the_report_of_the_others() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    let claim = world.claim().await;
    let good = worker::result(&claim, &answer(&claim)).expect("a result");
    let stranger = json!({"step": Uuid::nil(), "token": Uuid::nil(), "outcome": "success"});
    let items = [
        json!(null),
        json!(17),
        json!("text"),
        json!({}),
        json!({"step": "x", "token": "y"}),
        stranger,
        good.clone(),
        good,
    ];
    let answers = world.report_raw(&items).await;
    assert_eq!(answers[..6], [(false, true); 6]);
    assert_eq!(answers[6..], [(true, false); 2]);
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}
