//! A permanent failure ends its task or blocks it, as the template says, and takes the open
//! siblings with it.

use tasker_tests::worker::{Answer, answer};

use crate::harness::{Setup, World, assert_tree};

const KEYS: [&str; 8] = ["step_name", "outcome", "status", "event", "to_state", "error.type", "wait.reason", "results"];

#[tokio::test(flavor = "multi_thread")]
async fn permanent_failure_ends_the_task_and_cancels_its_siblings() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("fan", "b: broken\nc: ok\nd: ok\ne: ok <- b c d").await;
    let task = world.submit("fan").await;
    let mut claims = Vec::new();
    let broken = world.claim_named(&mut claims, "b").await;
    let running = world.claim_named(&mut claims, "c").await;
    assert_eq!(world.report(&broken, &Answer::Error("Broken", false)).await, (true, false));
    assert_eq!(world.finish(&[task]).await, ["error"]);
    assert_eq!(world.steps(task).await, ["b: error", "c: cancelled", "d: cancelled", "e: cancelled"]);
    assert_eq!(world.report(&running, &answer(&running)).await, (false, true), "what comes after the end is stale");
    world.assert_complete().await;
    let spans = world.spans_of(task);
    // Of d it depends on chance whether it was claimed; the others are certain.
    let d: Vec<_> =
        spans.iter().filter(|span| span.text("step_name") == Some("d")).map(|span| span.span.span_id.clone()).collect();
    let spans: Vec<_> = spans
        .into_iter()
        .filter(|span| !d.contains(&span.span.span_id) && !d.contains(&span.span.parent_span_id))
        .collect();
    assert_tree(
        &spans,
        &KEYS,
        "
        task.orchestration outcome=failure status=ERROR error.type=Broken
          task.state_transition event=Start to_state=initializing
          task.state_transition event=ReadyStepsFound to_state=enqueuing_steps
            step.discovery
          task.state_transition event=StepsEnqueued to_state=steps_in_process
            step.enqueuing
          step.execution step_name=b outcome=failure status=ERROR error.type=Broken
            handler.execution status=ERROR error.type=Broken
            result.submission
            step.state_transition event=Enqueue to_state=enqueued
            step.state_transition event=Claim to_state=in_progress
            step.state_transition event=Report to_state=enqueued_as_error_for_orchestration
            step.state_transition status=ERROR event=Fail to_state=error error.type=Broken
            step.wait wait.reason=queue
          step.execution step_name=c outcome=cancellation status=ERROR error.type=cancelled
            handler.execution status=ERROR error.type=cancelled
            step.state_transition event=Enqueue to_state=enqueued
            step.state_transition event=Claim to_state=in_progress
            step.state_transition event=Cancel to_state=cancelled
            step.wait wait.reason=queue
          step.state_transition event=Cancel to_state=cancelled
          task.state_transition event=StepFailed to_state=evaluating_results
            result.evaluation results=1
          task.state_transition status=ERROR event=PermanentFailure to_state=error error.type=Broken
        ",
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocking_template_lets_siblings_finish_and_waits_for_a_person() {
    let world = World::start(Setup::by_hand()).await;
    let steps = "on_failure: block\nsteps:\n  - {name: b, handler: broken}\n  - {name: c, handler: ok}\n  - {name: d, handler: ok, depends_on: [b, c]}\n";
    world.register("blocking", steps).await;
    let task = world.submit("blocking").await;
    let mut claims = Vec::new();
    let (broken, fine) = (world.claim_named(&mut claims, "b").await, world.claim_named(&mut claims, "c").await);
    world.report(&broken, &Answer::Error("Broken", false)).await;
    world.until_step(broken.step, &["error"]).await;
    assert_eq!(world.of_task(task, "state").await.as_deref(), Some("steps_in_process"), "while a sibling runs");
    world.succeed(&fine).await;
    assert_eq!(world.finish(&[task]).await, ["blocked_by_failures"]);
    assert_eq!(world.steps(task).await, ["b: error", "c: complete", "d: pending"]);
    assert_eq!(world.of_task(task, "reason").await.as_deref(), Some("step b failed: broken said Broken"));
    world.assert_sound().await;

    let answered: String = sqlx::query_scalar("select tasker.retry_task($1, 'fixed it', 'ann')")
        .bind(task)
        .fetch_one(&world.pool)
        .await
        .expect("asked");
    assert_eq!(answered, "accepted");
    for step in ["b", "d"] {
        let claim = world.claim().await;
        assert_eq!(claim.step_name, step);
        world.report(&claim, &Answer::Success("done".into())).await;
    }
    world.until_step(broken.step, &["complete"]).await;
    assert_eq!(world.finish(&[task]).await[..], ["complete"]);
    assert_eq!(world.of_task(task, "generation").await.as_deref(), Some("1"), "it had not ended");
    world.assert_complete().await;
    world.end().await;
}
