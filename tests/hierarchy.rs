//! The trace of a task that goes well: every span of the contract, where it belongs.

use serde_json::json;
use tasker_shared::trace::otlp::hex;
use tasker_tests::receiver::Received;

use crate::harness::{Setup, World, assert_tree};

/// Everything that the contract's table says of a span, but ids and times.
const KEYS: [&str; 22] = [
    "kind",
    "service",
    "status",
    "links",
    "from_state",
    "to_state",
    "event",
    "actor",
    "task_name",
    "template_version",
    "priority",
    "generation",
    "step_name",
    "handler_name",
    "attempt_number",
    "max_attempts",
    "outcome",
    "ready_steps",
    "results",
    "wait.reason",
    "messaging.destination.name",
    "messaging.batch.message_count",
];

const DIAMOND: &str = "
task.orchestration kind=INTERNAL service=tasker-orchestration task_name=diamond template_version=1 priority=0 generation=1 outcome=success
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=pending to_state=initializing event=Start
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=initializing to_state=enqueuing_steps event=ReadyStepsFound
    step.discovery kind=INTERNAL service=tasker-orchestration ready_steps=1
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueuing_steps to_state=steps_in_process event=StepsEnqueued
    step.enqueuing kind=PRODUCER service=tasker-orchestration messaging.destination.name=worker_tests messaging.batch.message_count=1
  step.execution kind=INTERNAL service=tasker-orchestration links=1 step_name=a handler_name=ok attempt_number=1 max_attempts=3 outcome=success
    handler.execution kind=CONSUMER service=tasker-worker handler_name=ok attempt_number=1
    result.submission kind=PRODUCER service=tasker-worker messaging.destination.name=step_results
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=pending to_state=enqueued event=Enqueue
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueued to_state=in_progress event=Claim actor=hand
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=in_progress to_state=enqueued_for_orchestration event=Report actor=hand
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueued_for_orchestration to_state=complete event=Complete
    step.wait kind=INTERNAL service=tasker-orchestration wait.reason=queue
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=steps_in_process to_state=evaluating_results event=StepCompleted
    result.evaluation kind=INTERNAL service=tasker-orchestration links=1 results=1
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=evaluating_results to_state=enqueuing_steps event=ReadyStepsFound
    step.discovery kind=INTERNAL service=tasker-orchestration ready_steps=2
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueuing_steps to_state=steps_in_process event=StepsEnqueued
    step.enqueuing kind=PRODUCER service=tasker-orchestration messaging.destination.name=worker_tests messaging.batch.message_count=2
  step.execution kind=INTERNAL service=tasker-orchestration links=1 step_name=b handler_name=ok attempt_number=1 max_attempts=3 outcome=success
    handler.execution kind=CONSUMER service=tasker-worker handler_name=ok attempt_number=1
    result.submission kind=PRODUCER service=tasker-worker messaging.destination.name=step_results
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=pending to_state=enqueued event=Enqueue
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueued to_state=in_progress event=Claim actor=hand
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=in_progress to_state=enqueued_for_orchestration event=Report actor=hand
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueued_for_orchestration to_state=complete event=Complete
    step.wait kind=INTERNAL service=tasker-orchestration wait.reason=queue
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=steps_in_process to_state=evaluating_results event=StepCompleted
    result.evaluation kind=INTERNAL service=tasker-orchestration links=1 results=1
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=evaluating_results to_state=steps_in_process event=StepsStillRunning
  step.execution kind=INTERNAL service=tasker-orchestration links=1 step_name=c handler_name=ok attempt_number=1 max_attempts=3 outcome=success
    handler.execution kind=CONSUMER service=tasker-worker handler_name=ok attempt_number=1
    result.submission kind=PRODUCER service=tasker-worker messaging.destination.name=step_results
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=pending to_state=enqueued event=Enqueue
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueued to_state=in_progress event=Claim actor=hand
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=in_progress to_state=enqueued_for_orchestration event=Report actor=hand
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueued_for_orchestration to_state=complete event=Complete
    step.wait kind=INTERNAL service=tasker-orchestration wait.reason=queue
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=steps_in_process to_state=evaluating_results event=StepCompleted
    result.evaluation kind=INTERNAL service=tasker-orchestration links=1 results=1
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=evaluating_results to_state=enqueuing_steps event=ReadyStepsFound
    step.discovery kind=INTERNAL service=tasker-orchestration ready_steps=1
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueuing_steps to_state=steps_in_process event=StepsEnqueued
    step.enqueuing kind=PRODUCER service=tasker-orchestration messaging.destination.name=worker_tests messaging.batch.message_count=1
  step.execution kind=INTERNAL service=tasker-orchestration links=1 step_name=d handler_name=ok attempt_number=1 max_attempts=3 outcome=success
    handler.execution kind=CONSUMER service=tasker-worker handler_name=ok attempt_number=1
    result.submission kind=PRODUCER service=tasker-worker messaging.destination.name=step_results
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=pending to_state=enqueued event=Enqueue
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueued to_state=in_progress event=Claim actor=hand
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=in_progress to_state=enqueued_for_orchestration event=Report actor=hand
    step.state_transition kind=INTERNAL service=tasker-orchestration from_state=enqueued_for_orchestration to_state=complete event=Complete
    step.wait kind=INTERNAL service=tasker-orchestration wait.reason=queue
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=steps_in_process to_state=evaluating_results event=AllStepsCompleted
    result.evaluation kind=INTERNAL service=tasker-orchestration links=1 results=1
  task.state_transition kind=INTERNAL service=tasker-orchestration from_state=evaluating_results to_state=complete event=AllStepsSuccessful
";

async fn diamond(protocol: &'static str) -> Vec<Received> {
    let world = World::start(Setup { protocol, ..Setup::by_hand() }).await;
    world.register_steps("diamond", "a: ok\nb: ok <- a\nc: ok <- a\nd: ok <- b c").await;
    let task = world.submit("diamond").await;
    let mut claims = Vec::new();
    for step in ["a", "b", "c", "d"] {
        let claim = world.claim_named(&mut claims, step).await;
        world.succeed(&claim).await;
    }
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    let spans = world.spans_of(task);
    world.end().await;
    spans
}

#[tokio::test(flavor = "multi_thread")]
async fn diamond_is_one_complete_tree_over_grpc() {
    assert_tree(&diamond("grpc").await, &KEYS, DIAMOND);
}

#[tokio::test(flavor = "multi_thread")]
async fn diamond_is_one_complete_tree_over_http() {
    assert_tree(&diamond("http/protobuf").await, &KEYS, DIAMOND);
}

fn the<'a>(spans: &'a [Received], name: &str, step: &str) -> &'a Received {
    let of_step = |span: &&Received| span.text("step_name") == Some(step);
    let execution = spans.iter().find(of_step).expect("the step's execution");
    spans.iter().find(|span| span.span.name == name && span.span.parent_span_id == execution.span.span_id).expect(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn links_join_sends_attempts_and_evaluations() {
    let spans = diamond("grpc").await;
    for step in ["a", "b", "c", "d"] {
        let execution = spans.iter().find(|span| span.text("step_name") == Some(step)).expect("its execution");
        let link = &execution.span.links[0];
        assert_eq!(link.trace_id, execution.span.trace_id);
        let sent = spans.iter().find(|span| span.span.span_id == link.span_id).expect("the link's end");
        assert_eq!(sent.span.name, "step.enqueuing");
        assert!(sent.span.start_time_unix_nano <= execution.span.end_time_unix_nano);
        let submission = the(&spans, "result.submission", step);
        let evaluated = |span: &&Received| {
            span.span.name == "result.evaluation"
                && span.span.links.iter().any(|link| link.span_id == submission.span.span_id)
        };
        assert_eq!(spans.iter().filter(evaluated).count(), 1, "the result of {step} is evaluated once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn claim_carries_the_handlers_own_span_and_the_callers_words() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let request = json!({"template": "one", "correlation_id": "order-4711", "input": {"n": 1}});
    let task = world.submit_with(request).await.expect("submitted");
    let claim = world.claim().await;
    assert_eq!((&*claim.correlation_id, &claim.input), ("order-4711", &json!({"input": {"n": 1}, "steps": {}})));
    assert_eq!((claim.attempt, claim.max_attempts), (1, 3));
    let baggage = claim.baggage.clone().expect("baggage");
    assert!(
        baggage.contains("correlation_id=order-4711") && baggage.contains(&format!("task_uuid={task}")),
        "{baggage}"
    );
    world.succeed(&claim).await;
    world.finish(&[task]).await;
    world.assert_complete().await;
    let spans = world.spans_of(task);
    let handler = the(&spans, "handler.execution", "a");
    let expected = format!("00-{}-{}-01", hex(&handler.span.trace_id), hex(&handler.span.span_id));
    assert_eq!(claim.traceparent, Some(expected));
    assert_eq!((handler.text("worker"), handler.text("worker_version")), (Some("hand"), Some("1.2.3")));
    assert!(spans.iter().all(|span| span.text("correlation_id") == Some("order-4711")));
    assert!(spans.iter().all(|span| !span.span.name.contains(&*task.to_string())), "no id is part of a name");
    world.end().await;
}
