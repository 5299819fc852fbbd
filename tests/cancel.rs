//! Cancelling and terminating end a task at once, whatever it is doing.

use serde_json::json;
use sqlx::Row;
use tasker_tests::worker::{Claim, answer};
use uuid::Uuid;

use crate::harness::{Setup, World, assert_tree};

async fn end(world: &World, task: Uuid, terminate: bool) -> String {
    sqlx::query_scalar("select tasker.cancel_task($1, 'wrong order', $2, 'ann')")
        .bind(task)
        .bind(terminate)
        .fetch_one(&world.pool)
        .await
        .expect("asked")
}

/// `(still_yours, cancel_requested)`.
async fn heartbeat(world: &World, claim: &Claim) -> (bool, bool) {
    let row = sqlx::query("select still_yours, cancel_requested from tasker.heartbeat($1)")
        .bind(json!([{"step": claim.step, "token": claim.token}]))
        .fetch_one(&world.pool)
        .await
        .expect("a heartbeat");
    (row.get(0), row.get(1))
}

#[tokio::test(flavor = "multi_thread")]
async fn running_handler_is_told_of_cancel_but_not_of_terminate() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("two", "a: ok\nb: ok <- a").await;
    for terminate in [false, true] {
        let task = world.submit("two").await;
        let claim = world.claim().await;
        assert_eq!(heartbeat(&world, &claim).await, (true, false));
        assert_eq!(end(&world, task, terminate).await, "accepted");
        assert_eq!(world.finish(&[task]).await, ["cancelled"]);
        assert_eq!(heartbeat(&world, &claim).await, (false, !terminate));
        assert_eq!(world.report(&claim, &answer(&claim)).await, (false, true));
        assert_eq!(world.steps(task).await, ["a: cancelled", "b: cancelled"]);
        assert_eq!(end(&world, task, terminate).await, "the task has already ended (cancelled)");
        world.assert_complete().await;
        assert_tree(
            &world.spans_of(task),
            &["step_name", "outcome", "status", "event", "actor", "error.type", "wait.reason"],
            &format!(
                "
                task.orchestration outcome=cancellation
                  task.state_transition event=Start
                  task.state_transition event=ReadyStepsFound
                    step.discovery
                  task.state_transition event=StepsEnqueued
                    step.enqueuing
                  step.execution step_name=a outcome=cancellation status=ERROR error.type=cancelled
                    handler.execution status=ERROR error.type=cancelled
                    step.state_transition event=Enqueue
                    step.state_transition event=Claim actor=hand
                    step.state_transition event=Cancel
                    step.wait wait.reason=queue
                  step.state_transition event=Cancel
                  task.state_transition event={} actor=ann
                ",
                if terminate { "Terminate" } else { "Cancel" }
            ),
        );
    }
    let audit =
        world.words("select action || ' by ' || actor || ': ' || reason from tasker.audit order by audit_id").await;
    assert_eq!(audit, ["cancel by ann: wrong order", "terminate by ann: wrong order"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queued_step_of_a_cancelled_task_is_never_handed_out() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let cancelled = world.submit("one").await;
    let step: Uuid = {
        crate::harness::eventually("its step is enqueued", async || {
            let query =
                sqlx::query_scalar("select step_uuid from tasker.steps where task_uuid = $1 and state = 'enqueued'");
            query.bind(cancelled).fetch_optional(&world.pool).await.expect("steps")
        })
        .await
    };
    end(&world, cancelled, false).await;
    world.finish(&[cancelled]).await;
    let other = world.submit("one").await;
    let claim = world.claim().await;
    assert_eq!(claim.task, other, "the message of the cancelled one was dropped");
    assert_ne!(claim.step, step);
    world.succeed(&claim).await;
    world.finish(&[other]).await;
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn task_that_waits_for_a_retry_is_cancelled_with_its_wait() {
    let world = World::start(Setup::by_hand()).await;
    world.register("slow", "steps: [{name: a, handler: flaky, retry: {initial_interval: 1m}}]").await;
    let task = world.submit("slow").await;
    let claim = world.claim().await;
    world.report(&claim, &answer(&claim)).await;
    world.until_step(claim.step, &["waiting_for_retry"]).await;
    end(&world, task, false).await;
    assert_eq!(world.finish(&[task]).await, ["cancelled"]);
    world.assert_complete().await;
    let spans = world.spans_of(task);
    assert!(spans.iter().any(|span| span.text("wait.reason") == Some("retry")), "the wait is in the trace");
    world.end().await;
}
