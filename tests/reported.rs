//! What a handler tells of itself (milestones, timings, artifacts, usage) is kept with its attempt,
//! adds up, and stands in the task's tree, whatever language its worker is written in.

use std::time::Duration;

use serde_json::{Value, json};
use tasker_shared::store::views;
use tasker_testing::Span;
use tasker_tests::receiver::Received;
use tasker_tests::worker::{self, Answer};
use tasker_worker::{Artifact, Capture, StepContext, StepError, Worker};
use tokio_util::sync::CancellationToken;

use crate::harness::{Setup, World};

async fn invoice(ctx: StepContext, _: Value) -> Result<Value, StepError> {
    ctx.milestone("basket_loaded", [("items", json!(3)), ("password", json!("hunter2"))]);
    ctx.timing("render", Duration::from_millis(1500));
    ctx.add_usage("gen_ai.usage.input_tokens", 100.0);
    ctx.add_usage("gen_ai.usage.output_tokens", 7.0);
    ctx.add_usage("pages", 1.5);
    if ctx.attempt() == 1 {
        return Err(StepError::retry("Printer", "no paper"));
    }
    ctx.artifact(Artifact {
        name: "invoice".into(),
        uri: "https://me:hunter2@files/4711.pdf".into(),
        size: Some(48_211),
        digest: None,
    });
    Ok(json!({"pdf": "4711.pdf", "api_key": "hunter2"}))
}

fn handlers(spans: &[Received]) -> Vec<Span> {
    let mut spans: Vec<Span> =
        spans.iter().map(|received| Span::from_proto(&received.service, &received.span)).collect();
    spans.retain(|span| span.name == "handler.execution");
    spans.sort_by_key(|span| span.attributes["attempt_number"].as_i64());
    spans
}

#[tokio::test(flavor = "multi_thread")]
async fn milestones_are_events_of_the_tree_and_usage_adds_up() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world.register_steps("told", "print: invoice\nhand: ok <- print").await;
    let stop = CancellationToken::new();
    let worker = Worker::builder(&world.url)
        .namespace(worker::NAMESPACE)
        .capture(Capture { input: true, output: true })
        .handler("invoice", invoice)
        .build()
        .expect("a worker");
    let running = tokio::spawn(worker.run(stop.clone()));
    world.hello("hand", None, &["ok"], 1).await;
    let input = json!({"order": 4711, "card": "4111 1111 1111 1111"});
    let task = world.submit_with(json!({"template": "told", "input": input})).await.expect("submitted");

    // A worker in another language tells what it likes.
    let claim = world.claim().await;
    let mut result = worker::result(&claim, &Answer::Success(json!({}))).expect("a result");
    result["usage"] = json!({"gen_ai.usage.input_tokens": 11, "odd": "many", "pages": 2});
    result["milestones"] =
        json!([{"name": "asked", "at_ms": 0.15, "attributes": {"token": "hunter2", "list": [1]}}, {"at_ms": 3}, 5]);
    assert_eq!(world.report_raw(&[result]).await, [(true, false)]);
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    stop.cancel();
    running.await.expect("no panic").expect("it drained");
    world.assert_complete().await;

    let mut conn = world.pool.acquire().await.expect("a connection");
    let usage = views::usage(&mut conn, task).await.expect("usage");
    let total = [("gen_ai.usage.input_tokens", 211.0), ("gen_ai.usage.output_tokens", 14.0), ("pages", 5.0)];
    assert_eq!(usage.total, total.map(|(name, amount)| (name.to_owned(), amount)).into());
    assert_eq!(usage.steps["hand"]["gen_ai.usage.input_tokens"].to_string(), "11");
    assert_eq!(usage.steps["print"]["pages"].to_string(), "3");
    let told = views::reported(&mut conn, task).await.expect("told");
    let attempts: Vec<_> = told.iter().map(|told| (told.step.as_str(), told.attempt)).collect();
    assert_eq!(attempts, [("print", 1), ("print", 2), ("hand", 1)]);

    let spans = handlers(&world.spans_of(task));
    let events = |span: &Span| span.events.iter().map(|event| event.name.clone()).collect::<Vec<_>>();
    let printed: Vec<&Span> = spans.iter().filter(|span| span.attributes["handler_name"] == "invoice").collect();
    assert_eq!(events(printed[0]), ["handler.input", "basket_loaded", "render", "usage", "exception"]);
    assert_eq!(events(printed[1]), ["handler.input", "basket_loaded", "render", "artifact", "handler.output", "usage"]);
    let artifact = &printed[1].events[3].attributes;
    assert_eq!(artifact["artifact.uri"], "https://[redacted]@files/4711.pdf");
    assert_eq!(artifact["artifact.size"], 48_211);
    assert_eq!(printed[1].events[2].attributes["duration_ms"].as_f64(), Some(1500.0));
    assert_eq!(printed[1].events[4].attributes["payload"], r#"{"api_key":"[redacted]","pdf":"4711.pdf"}"#);
    assert_eq!(printed[1].attributes["gen_ai.usage.input_tokens"], 100);
    let hand = spans.iter().find(|span| span.attributes["handler_name"] == "ok").expect("the other worker's");
    assert_eq!(events(hand), ["asked", "usage"]);
    assert_eq!(hand.events[0].attributes["list"], "[1]");
    let all = format!("{spans:?}");
    assert!(!all.contains("hunter2") && !all.contains("4111 1111"), "{all}");
    drop(conn);
    world.end().await;
}
