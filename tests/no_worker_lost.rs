//! A worker that is killed inside a handler loses nothing but time.

use tasker_trace_testing::assert_trace;

use crate::harness::{Setup, World, trace};

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
