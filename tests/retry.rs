//! A failure that a retry heals leaves its mark in the trace and nowhere else.

use tasker_tests::worker::Answer;

use crate::harness::{Setup, World, assert_tree};

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
    let keys = [
        "step_name",
        "attempt_number",
        "outcome",
        "status",
        "links",
        "event",
        "to_state",
        "error.type",
        "wait.reason",
        "results",
        "ready_steps",
    ];
    assert_tree(
        &world.spans_of(task),
        &keys,
        "
        task.orchestration outcome=success
          task.state_transition event=Start to_state=initializing
          task.state_transition event=ReadyStepsFound to_state=enqueuing_steps
            step.discovery ready_steps=1
          task.state_transition event=StepsEnqueued to_state=steps_in_process
            step.enqueuing
          step.execution step_name=a attempt_number=1 outcome=error status=ERROR links=1 error.type=Hiccup
            handler.execution attempt_number=1 status=ERROR error.type=Hiccup
            result.submission
            step.state_transition event=Enqueue to_state=enqueued
            step.state_transition event=Claim to_state=in_progress
            step.state_transition event=Report to_state=enqueued_as_error_for_orchestration
            step.state_transition event=ScheduleRetry to_state=waiting_for_retry
            step.wait wait.reason=queue
          task.state_transition event=StepFailed to_state=evaluating_results
            result.evaluation links=1 results=1
          task.state_transition event=RetryScheduled to_state=waiting_for_retry
          step.wait wait.reason=retry
          task.state_transition event=RetryReady to_state=enqueuing_steps
          task.state_transition event=StepsEnqueued to_state=steps_in_process
            step.enqueuing
          step.execution step_name=a attempt_number=2 outcome=success links=2
            handler.execution attempt_number=2
            result.submission
            step.state_transition event=RetryReady to_state=enqueued
            step.state_transition event=Claim to_state=in_progress
            step.state_transition event=Report to_state=enqueued_for_orchestration
            step.state_transition event=Complete to_state=complete
            step.wait wait.reason=queue
          task.state_transition event=AllStepsCompleted to_state=evaluating_results
            result.evaluation links=1 results=1
          task.state_transition event=AllStepsSuccessful to_state=complete
        ",
    );
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
