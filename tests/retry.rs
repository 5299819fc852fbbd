//! A failure that a retry heals leaves its mark in the trace and nowhere else.

use tasker_testing::{Rules, assert_trace, span};
use tasker_tests::worker::Answer;

use crate::harness::{Setup, World, trace};

#[tokio::test(flavor = "multi_thread")]
async fn failed_attempt_is_a_sibling_and_the_task_succeeds() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: flaky").await;
    let task = world.submit("one").await;
    let first = world.claim().await;
    assert_eq!(world.report(&first, &Answer::Error("Hiccup", true)).await, (true, false));
    let second = world.claim().await;
    assert_eq!((second.step, second.attempt), (first.step, 2));
    assert_ne!(second.token, first.token);
    assert_ne!(second.traceparent, first.traceparent, "each attempt has a span of its own");
    world.succeed(&second).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    let trace = trace(&world.spans_of(task));
    assert_trace!(trace, {
        "task.orchestration" [outcome = "success"] {
            "task.state_transition" [event = "Start", to_state = "initializing"] {},
            "task.state_transition" [event = "ReadyStepsFound"] { "step.discovery" [ready_steps = 1] },
            "task.state_transition" * 2 [event = "StepsEnqueued"] { "step.enqueuing" {} },
            "step.execution" [step_name = "a", attempt_number = 1, outcome = "error", status = "ERROR", "error.type" = "Hiccup"] {
                "handler.execution" [status = "ERROR", "error.type" = "Hiccup"] {},
                "result.submission" {},
                "step.state_transition" [event = "Enqueue"],
                "step.state_transition" [event = "Claim"],
                "step.state_transition" [event = "Report", to_state = "enqueued_as_error_for_orchestration"],
                "step.state_transition" [event = "ScheduleRetry", to_state = "waiting_for_retry"],
                "step.wait" ["wait.reason" = "queue"],
            },
            "task.state_transition" [event = "StepFailed"] { "result.evaluation" [links = 1, results = 1] },
            "task.state_transition" [event = "RetryScheduled", to_state = "waiting_for_retry"],
            "step.wait" ["wait.reason" = "retry"] {},
            "task.state_transition" [event = "RetryReady"] {},
            "step.execution" [attempt_number = 2, outcome = "success", links = 2] {
                "handler.execution" {},
                "result.submission" {},
                "step.state_transition" [event = "RetryReady"],
                "step.state_transition" [event = "Claim"],
                "step.state_transition" [event = "Report"],
                "step.state_transition" [event = "Complete"],
                "step.wait" ["wait.reason" = "queue"],
            },
            "task.state_transition" [event = "AllStepsCompleted"] { "result.evaluation" [links = 1] },
            "task.state_transition" [event = "AllStepsSuccessful"],
        }
    });
    let attempt = |number: i64| span("step.execution").with("attempt_number", number);
    let wait = || span("step.wait").with("wait.reason", "retry");
    Rules::new()
        .before(attempt(1), wait())
        .before(wait(), attempt(2))
        .linked(attempt(2), attempt(1))
        .inside(span("handler.execution"), span("step.execution"))
        .assert(&trace);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exhausted_retries_fail_the_task_with_the_last_error() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: flaky").await;
    let task = world.submit("one").await;
    for attempt in 1..=3 {
        let claim = world.claim().await;
        assert_eq!(claim.attempt, attempt);
        world.report(&claim, &Answer::Error("Hiccup", true)).await;
    }
    assert_eq!(world.finish(&[task]).await, ["error"]);
    assert_eq!(world.of_task(task, "error_type").await.as_deref(), Some("Hiccup"));
    assert_eq!(world.of_task(task, "reason").await.as_deref(), Some("step a failed: flaky said Hiccup"));
    world.assert_complete().await;
    let spans = world.spans_of(task);
    let outcomes: Vec<_> = spans
        .iter()
        .filter(|span| span.span.name == "step.execution")
        .map(|span| span.text("outcome").unwrap_or(""))
        .collect();
    assert_eq!(outcomes.len(), 3);
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == "failure").count(), 1, "{outcomes:?}");
    world.end().await;
}
