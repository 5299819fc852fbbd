//! What bad input gets where traces are concerned: it is ignored, cut or sent again, and counted;
//! never an error to the producer, and never a slow task.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use http::StatusCode;
use serde_json::json;
use tasker_tests::receiver::Behaviour;
use tasker_tests::worker::{self, Answer};
use tonic::Code;

use crate::harness::{Setup, World, eventually};

/// A trace id without its last byte.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e47";

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_collector_answers_work_goes_on_and_every_span_arrives_in_the_end() {
    for protocol in ["grpc", "http/protobuf"] {
        let world = World::start(Setup { protocol, ..Setup::default() }).await;
        world.register_steps("one", "a: ok").await;
        for behaviour in [
            Behaviour::Garbage,
            Behaviour::WebPage,
            Behaviour::GarbageBytes,
            Behaviour::CloseMidStream,
            Behaviour::Hang,
            Behaviour::Refuse(Code::Unauthenticated, StatusCode::UNAUTHORIZED),
        ] {
            world.receiver.behave(behaviour.clone());
            let stats = world.orchestrators[0].export_stats().expect("traced").clone();
            let (failed, began) = (stats.failed_requests.load(Ordering::Relaxed), Instant::now());
            let tasks = [world.submit("one").await, world.submit("one").await];
            assert_eq!(world.finish(&tasks).await, ["complete"; 2], "{protocol} {behaviour:?}");
            // A receiver that hangs is given two seconds a request: far less than these would add up to.
            assert!(began.elapsed() < Duration::from_secs(15), "{protocol} {behaviour:?}: {:?}", began.elapsed());
            eventually(&format!("{protocol} {behaviour:?} is counted"), async || {
                (stats.failed_requests.load(Ordering::Relaxed) > failed).then_some(())
            })
            .await;
        }
        world.receiver.behave(Behaviour::Accept);
        world.assert_complete().await;
        world.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn context_that_is_too_long_or_malformed_is_left_out_and_counted_and_the_task_runs() {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    let traceparent = |n: usize| format!("00-{TRACE}{n:02x}-00f067aa0ba902b7-01");
    let members = (0..65).map(|n| format!("k{n}=v")).collect::<Vec<_>>().join(",");
    let long_state = format!("vendor={}", "x".repeat(506));
    let long_baggage = format!("k={}", "x".repeat(8191));
    let bad = [
        ("tracestate", long_state.as_str()),
        ("tracestate", "vendor=a\nb"),
        ("tracestate", "vendor=\u{7}"),
        ("baggage", &long_baggage),
        ("baggage", &members),
        ("traceparent", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01"),
        ("traceparent", "\u{1b}[31m"),
    ];
    for (n, (key, value)) in bad.into_iter().enumerate() {
        let mut request = json!({"template": "one", "traceparent": traceparent(n)});
        request[key] = value.into();
        let task = world.submit_with(request).await.unwrap_or_else(|error| panic!("{key}: {error}"));
        assert_eq!(world.finish(&[task]).await, ["complete"], "{key}");
        world.assert_complete().await;
        let spans = world.spans_of(task);
        assert!(spans.iter().all(|span| span.span.trace_state.is_empty()), "{key} {value:?}");
    }
    // As a message, where whoever sent it would never see an error.
    for (n, (key, value)) in bad.into_iter().enumerate() {
        let id = format!("raw-{n}");
        let message = json!({"v": 1, "type": "submit", "namespace": "tests", "template": "one", "correlation_id": id});
        let mut headers = json!({"traceparent": traceparent(16 + n)});
        headers[key] = value.into();
        world.send("task_requests", &message, Some(headers)).await;
    }
    eventually("they all ran", async || {
        let ended = "select count(*) from tasker.tasks where correlation_id like 'raw-%' and state = 'complete'";
        (world.number(ended).await == 7).then_some(())
    })
    .await;
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    for (name, times) in [("invalid_tracestate", 6), ("invalid_baggage", 4), ("invalid_traceparent", 4)] {
        assert_eq!(world.counter(name).await, times, "{name}");
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_megabyte_and_control_characters_are_cut_and_cleaned_on_their_way_and_counted() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    let claim = world.claim().await;
    let mut result = worker::result(&claim, &Answer::Success(json!({}))).expect("a result");
    // What is told is kept up to 64 KiB; a megabyte of it is left out, and the report counts all the same.
    result["milestones"] = json!([{"name": "x".repeat(1 << 20)}]);
    assert_eq!(world.report_raw(&[result]).await, [(true, false)]);
    assert_eq!(world.finish(&[task]).await, ["complete"]);

    let next = world.submit("one").await;
    let claim = world.claim().await;
    let mut result = worker::result(&claim, &Answer::Success(json!({}))).expect("a result");
    let name = "bell \u{7} escape \u{1b}[31m line \n";
    result["milestones"] = json!([{"name": name, "attributes": {"long": "y".repeat(60_000)}}]);
    assert_eq!(world.report_raw(&[result]).await, [(true, false)]);
    assert_eq!(world.finish(&[next]).await, ["complete"]);
    world.assert_complete().await;
    let spans = world.spans_of(next);
    let told = spans.iter().flat_map(|span| &span.span.events).find(|event| event.name.starts_with("bell"));
    let told = told.expect("the milestone");
    assert_eq!(told.name, "bell   escape  [31m line  ");
    let longest = format!("{:?}", told.attributes).len();
    assert!(longest < 6000, "{longest} bytes");
    let stats = world.orchestrators[0].export_stats().expect("traced");
    assert!(stats.cleaned.load(Ordering::Relaxed) >= 1);
    world.end().await;
}
