//! A caller's trace goes on in the task's, however the task was asked for.

use serde_json::json;
use tasker_shared::trace::otlp::hex;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

async fn one(setup: Setup) -> World {
    let world = World::start(setup).await;
    world.register_steps("one", "a: ok").await;
    world
}

async fn by_correlation(world: &World, correlation_id: &'static str) -> Uuid {
    eventually("the message became a task", async || {
        let query = sqlx::query_scalar("select task_uuid from tasker.tasks where correlation_id = $1");
        query.bind(correlation_id).fetch_optional(&world.pool).await.expect("tasks")
    })
    .await
}

/// Trace id, parent id and tracestate of the task's root.
async fn root(world: &World, task: Uuid) -> (String, String, String) {
    world.finish(&[task]).await;
    world.assert_complete().await;
    let spans = world.spans_of(task);
    let root = &spans.iter().find(|span| span.span.name == "task.orchestration").expect("a root").span;
    (hex(&root.trace_id), hex(&root.parent_span_id), root.trace_state.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn task_submitted_by_sql_with_a_traceparent_joins_the_callers_trace() {
    let world = one(Setup::default()).await;
    let request =
        json!({"template": "one", "traceparent": format!("00-{TRACE}-{PARENT}-01"), "tracestate": "vendor=x"});
    let task = world.submit_with(request).await.expect("submitted");
    assert_eq!(root(&world, task).await, (TRACE.to_owned(), PARENT.to_owned(), "vendor=x".to_owned()));
    assert_eq!(world.counter("invalid_traceparent").await, 0);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_message_joins_through_its_headers() {
    let world = one(Setup::default()).await;
    let message = json!({"v": 1, "type": "submit", "namespace": "tests", "template": "one", "correlation_id": "raw-1"});
    let headers = json!({"traceparent": format!("00-{TRACE}-{PARENT}-01")});
    world.send("task_requests", &message, Some(headers)).await;
    let task = by_correlation(&world, "raw-1").await;
    assert_eq!(root(&world, task).await, (TRACE.to_owned(), PARENT.to_owned(), String::new()));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_traceparent_is_ignored_and_counted() {
    let world = one(Setup::default()).await;
    let bad = [
        "",
        "nonsense",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ];
    for traceparent in bad {
        let task = world
            .submit_with(json!({"template": "one", "traceparent": traceparent}))
            .await
            .expect("submitted all the same");
        let (trace, parent, _) = root(&world, task).await;
        assert_ne!(trace, TRACE);
        assert_eq!(parent, "", "a root of its own");
    }
    let message = json!({"v": 1, "type": "submit", "namespace": "tests", "template": "one", "correlation_id": "raw-2"});
    world.send("task_requests", &message, Some(json!({"traceparent": "00-xyz"}))).await;
    let task = by_correlation(&world, "raw-2").await;
    root(&world, task).await;
    assert_eq!(world.counter("invalid_traceparent").await, 5);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_that_does_not_sample_gets_work_without_spans() {
    let world = one(Setup::default()).await;
    let quiet = world
        .submit_with(json!({"template": "one", "traceparent": format!("00-{TRACE}-{PARENT}-00")}))
        .await
        .expect("submitted");
    let loud = world.submit("one").await;
    assert_eq!(world.finish(&[quiet, loud]).await, ["complete", "complete"]);
    world.assert_complete().await;
    assert_eq!(world.spans_of(quiet), []);
    assert!(!world.spans_of(loud).is_empty());
    world.end().await;
}
