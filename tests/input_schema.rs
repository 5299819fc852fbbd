//! What breaks a template's schema ends with its reason, and only itself.

use serde_json::json;

use crate::harness::{Setup, World, assert_tree};

const TEMPLATE: &str = "
input_schema: {type: object, required: [order_id], properties: {order_id: {type: integer}}}
steps:
  - {name: a, handler: ok, input: {id: '${input.order_id}', deep: '${input.a.b}'}}
";

#[tokio::test(flavor = "multi_thread")]
async fn input_that_breaks_the_schema_ends_the_task_with_the_reason() {
    let world = World::start(Setup::default()).await;
    world.register("strict", TEMPLATE).await;
    let bad = world.submit_with(json!({"template": "strict", "input": {"order_id": "x"}})).await.expect("a task");
    assert_eq!(world.finish(&[bad]).await, ["error"]);
    assert_eq!(world.of_task(bad, "error_type").await.as_deref(), Some("invalid_input"));
    let reason = world.of_task(bad, "reason").await.expect("a reason");
    assert!(reason.contains("order_id") && reason.contains("integer"), "{reason}");
    assert_eq!(world.steps(bad).await, [""; 0]);
    world.assert_complete().await;
    assert_tree(
        &world.spans_of(bad),
        &["event", "to_state", "status", "outcome", "error.type"],
        "
        task.orchestration status=ERROR outcome=failure error.type=invalid_input
          task.state_transition event=Start to_state=initializing
          task.state_transition event=InvalidInput to_state=error status=ERROR error.type=invalid_input
        ",
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_input_path_fails_its_step_and_says_which() {
    let world = World::start(Setup::default()).await;
    world.register("strict", TEMPLATE).await;
    let fine = world
        .submit_with(json!({"template": "strict", "input": {"order_id": 1, "a": {"b": 2}}}))
        .await
        .expect("a task");
    let bad = world.submit_with(json!({"template": "strict", "input": {"order_id": 1}})).await.expect("a task");
    assert_eq!(world.finish(&[fine, bad]).await, ["complete", "error"]);
    assert_eq!(world.of_task(bad, "error_type").await.as_deref(), Some("missing_input"));
    let reason = world.of_task(bad, "reason").await.expect("a reason");
    assert!(reason.contains("input.a"), "{reason}");
    assert_eq!(world.steps(bad).await, ["a: error"]);
    world.assert_complete().await;
    world.end().await;
}
