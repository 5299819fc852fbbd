//! Promise 7, on the wire: what is acknowledged has arrived, and what has not
//! arrived is an error that says whether to send it again.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use http::StatusCode;
use opentelemetry::context::FutureExt;
use opentelemetry::trace::{Span as _, SpanBuilder, SpanKind, TraceContextExt, Tracer};
use prost::bytes::Bytes;
use tasker_shared::telemetry::{self, LiveExport, LiveSpans, LogFormat, Role};
use tasker_shared::trace::config::{Compression, Protocol, TraceConfig};
use tasker_shared::trace::context::{Baggage, Traceparent, inject_current, to_otel_context};
use tasker_shared::trace::otlp::{Encoder, ServiceNames, hex};
use tasker_shared::trace::span::{Kind, Service, Span, TaskSpans, Value};
use tasker_shared::trace::transport::{Accepted, ErrorKind, SendError, Transport};
use tasker_tests::receiver::{Behaviour, Receiver, outline};
use tonic::Code;
use tracing::Instrument;

#[path = "../tools/bench/src/sink.rs"]
mod sink;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const PROTOCOLS: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];
const ALL: Accepted = Accepted { rejected_spans: 0, message: None };

fn config(endpoint: &str, protocol: Protocol) -> TraceConfig {
    let protocol = match protocol {
        Protocol::Grpc => "grpc",
        Protocol::HttpProtobuf => "http/protobuf",
    };
    let (config, warnings) = TraceConfig::from_vars(&|name| match name {
        "OTEL_EXPORTER_OTLP_ENDPOINT" => Some(endpoint.to_owned()),
        "OTEL_EXPORTER_OTLP_PROTOCOL" => Some(protocol.to_owned()),
        "OTEL_EXPORTER_OTLP_HEADERS" => Some("x-api-key=hunter2".to_owned()),
        _ => None,
    })
    .unwrap();
    assert_eq!(warnings, []);
    config
}

/// The request of a task of two spans; `seed` is its trace id.
fn request(seed: u8) -> Bytes {
    let at = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::seconds(1_790_000_000);
    let span = |id: u8, parent: Option<u8>, name, service| Span {
        id: [id; 8],
        parent: parent.map(|p| [p; 8]),
        parent_is_remote: false,
        name,
        kind: Kind::Internal,
        service,
        start: at,
        end: at + TimeDelta::milliseconds(i64::from(10 - id)),
        attributes: vec![("attempt_number", Value::Int(1))],
        links: vec![],
        events: vec![],
        error: None,
        settled_at: at,
    };
    let task = TaskSpans {
        trace_id: [seed; 16],
        trace_flags: 1,
        tracestate: None,
        common: vec![("correlation_id", Value::from("order-4711"))],
        spans: vec![
            span(1, None, "task.orchestration", Service::Orchestration),
            span(2, Some(1), "handler.execution", Service::Worker),
        ],
    };
    let mut encoder = Encoder::new(&ServiceNames::default());
    encoder.push(&task);
    encoder.finish()
}

async fn refused(receiver: &Receiver, transport: &Transport, behaviour: Behaviour) -> SendError {
    receiver.behave(behaviour.clone());
    match transport.send(request(9)).await {
        Ok(accepted) => panic!("{behaviour:?} was acknowledged: {accepted:?}"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn acknowledged_spans_have_arrived() {
    for protocol in PROTOCOLS {
        for compression in [Compression::None, Compression::Gzip] {
            let receiver = Receiver::start().await;
            let config = TraceConfig { compression, ..config(&receiver.endpoint(), protocol) };
            let transport = Transport::connect(&config).unwrap();
            assert_eq!(transport.send(request(1)).await, Ok(ALL), "{protocol:?} {compression:?}");
            let spans = receiver.trace([1; 16]);
            assert_eq!(outline(&spans), ["task.orchestration", "  handler.execution"]);
            let mut services: Vec<_> = spans.iter().map(|s| (s.service.as_str(), s.scope.as_str())).collect();
            services.sort_unstable();
            assert_eq!(services, [("tasker-orchestration", "tasker"), ("tasker-worker", "tasker")]);
            assert!(spans.iter().all(|s| s.text("correlation_id") == Some("order-4711")));
            assert!(spans.iter().all(|s| s.int("attempt_number") == Some(1)));
            assert_eq!(receiver.compressed_requests(), u64::from(compression == Compression::Gzip));
            assert_eq!(receiver.headers()[0]["x-api-key"], "hunter2");
            assert_eq!(receiver.violations(), [""; 0]);
        }
    }
}

#[tokio::test]
async fn rejected_spans_are_counted_and_not_an_error() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start().await;
        receiver.behave(Behaviour::Partial(1));
        let transport = Transport::connect(&config(&receiver.endpoint(), protocol)).unwrap();
        let accepted = transport.send(request(1)).await.unwrap();
        assert_eq!(accepted, Accepted { rejected_spans: 1, message: Some("told to reject".into()) });
        assert_eq!(receiver.spans().len(), 1);
    }
}

#[tokio::test]
async fn refusals_say_whether_and_when_to_send_again() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start().await;
        let transport = Transport::connect(&config(&receiver.endpoint(), protocol)).unwrap();
        let busy = Behaviour::Refuse(Code::Unavailable, StatusCode::SERVICE_UNAVAILABLE);
        let busy = refused(&receiver, &transport, busy).await;
        assert_eq!((busy.kind, busy.retryable), (ErrorKind::Refused, true), "{busy:?}");
        if protocol == Protocol::HttpProtobuf {
            assert_eq!(busy.retry_after, Some(Duration::from_secs(7)));
        }
        let never = Behaviour::Refuse(Code::Unauthenticated, StatusCode::UNAUTHORIZED);
        let never = refused(&receiver, &transport, never).await;
        assert_eq!((never.kind, never.retryable, never.retry_after), (ErrorKind::Refused, false, None), "{never:?}");
        assert!(never.to_string().contains("told to refuse"), "{never}");
        // A redirect would carry our headers elsewhere.
        let moved = Behaviour::Refuse(Code::Unimplemented, StatusCode::TEMPORARY_REDIRECT);
        assert!(!refused(&receiver, &transport, moved).await.retryable);
        receiver.behave(Behaviour::Accept);
        let not_otlp = transport.send(Bytes::from_static(b"\x0a\xff\xff\x03no")).await.unwrap_err();
        assert_eq!(not_otlp.kind, ErrorKind::Refused, "{not_otlp:?}");
        assert_eq!(receiver.spans(), []);
    }
}

#[tokio::test]
async fn broken_answers_are_errors_and_the_next_request_arrives() {
    for protocol in PROTOCOLS {
        for behaviour in [
            Behaviour::Garbage,
            Behaviour::WebPage,
            Behaviour::GarbageBytes,
            Behaviour::CloseMidStream,
            Behaviour::Hang,
        ] {
            let receiver = Receiver::start().await;
            let timeout = match behaviour {
                Behaviour::Hang => Duration::from_millis(200),
                _ => Duration::from_secs(10),
            };
            let config = TraceConfig { timeout, ..config(&receiver.endpoint(), protocol) };
            let transport = Transport::connect(&config).unwrap();
            let error = refused(&receiver, &transport, behaviour.clone()).await;
            let expected = match behaviour {
                Behaviour::Garbage | Behaviour::WebPage => ErrorKind::BadAnswer,
                Behaviour::Hang => ErrorKind::Timeout,
                _ => ErrorKind::Connection,
            };
            assert_eq!((error.kind, error.retryable), (expected, true), "{protocol:?} {behaviour:?}: {error:?}");
            let printed = format!("{error} {error:?} {transport:?}");
            assert!(!printed.contains("hunter2"), "{printed}");
            receiver.behave(Behaviour::Accept);
            assert_eq!(transport.send(request(2)).await, Ok(ALL), "{protocol:?} after {behaviour:?}");
        }
    }
}

#[tokio::test]
async fn a_collector_that_was_down_is_found_again() {
    for protocol in PROTOCOLS {
        let mut receiver = Receiver::start().await;
        let transport = Transport::connect(&config(&receiver.endpoint(), protocol)).unwrap();
        assert_eq!(transport.send(request(1)).await, Ok(ALL));
        receiver.down().await;
        for _ in 0..2 {
            let error = transport.send(request(2)).await.unwrap_err();
            assert_eq!((error.kind, error.retryable), (ErrorKind::Connection, true), "{error:?}");
        }
        receiver.up().await;
        assert_eq!(transport.send(request(3)).await, Ok(ALL), "{protocol:?}");
        assert_eq!(receiver.trace([3; 16]).len(), 2);
        assert_eq!(receiver.trace([2; 16]).len(), 0);
    }
}

#[tokio::test]
async fn several_requests_travel_at_once() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start().await;
        let transport = Transport::connect(&config(&receiver.endpoint(), protocol)).unwrap();
        let sends = (1..=20).map(|seed| {
            let transport = transport.clone();
            tokio::spawn(async move { transport.send(request(seed)).await })
        });
        for send in sends.collect::<Vec<_>>() {
            assert_eq!(send.await.unwrap(), Ok(ALL));
        }
        assert_eq!(receiver.spans().len(), 40);
    }
}

#[tokio::test]
async fn the_sink_acknowledges_what_it_does_not_read() {
    let sink = sink::Sink::start().await.unwrap();
    let large = Bytes::from(vec![7; 3 << 20]);
    for protocol in PROTOCOLS {
        let transport = Transport::connect(&config(&sink.endpoint(), protocol)).unwrap();
        let (requests, bytes) = (sink.requests(), sink.bytes());
        assert_eq!(transport.send(large.clone()).await, Ok(ALL), "{protocol:?}");
        assert_eq!(transport.send(request(1)).await, Ok(ALL), "{protocol:?}");
        assert_eq!(sink.requests() - requests, 2);
        let frames = if protocol == Protocol::Grpc { 10 } else { 0 };
        assert_eq!(sink.bytes() - bytes, (large.len() + request(1).len() + frames) as u64);
    }
}

fn user_span(live: &LiveExport, name: &'static str) {
    let parent: Traceparent = PARENT.parse().unwrap();
    let cx = to_otel_context(&parent, None, &Baggage::default());
    assert!(cx.span().span_context().is_remote());
    live.tracer().build_with_context(SpanBuilder::from_name(name).with_kind(SpanKind::Client), &cx).end();
}

#[tokio::test]
async fn live_spans_leave_the_process_at_shutdown_without_a_second_thread() {
    // This runtime has one thread: a flush that needed it would wait for itself.
    for protocol in PROTOCOLS {
        for compression in [Compression::None, Compression::Gzip] {
            let receiver = Receiver::start().await;
            let config = TraceConfig { compression, ..config(&receiver.endpoint(), protocol) };
            let live = LiveExport::start(Role::Worker, &config).unwrap();
            user_span(&live, "charge card");
            let counts = live.shutdown(Duration::from_secs(20)).await;
            assert_eq!(counts, LiveSpans { exported: 1, ..LiveSpans::default() });
            let spans = receiver.spans();
            assert_eq!(outline(&spans), ["charge card"], "{protocol:?}");
            assert_eq!(spans[0].service, "tasker-worker");
            assert_eq!(spans[0].span.parent_span_id, [0x00, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7]);
            assert_eq!(receiver.headers()[0]["x-api-key"], "hunter2");
            assert_eq!(receiver.compressed_requests(), u64::from(compression == Compression::Gzip));
            assert_eq!(receiver.violations(), [""; 0]);
        }
    }
}

#[tokio::test]
async fn a_dead_collector_costs_live_spans_and_nothing_else() {
    for protocol in PROTOCOLS {
        let mut receiver = Receiver::start().await;
        let endpoint = receiver.endpoint();
        receiver.down().await;
        let live = LiveExport::start(Role::Orchestrator, &config(&endpoint, protocol)).unwrap();
        assert_eq!(live.counts(), LiveSpans::default());
        user_span(&live, "lost");
        let counts = live.shutdown(Duration::from_secs(20)).await;
        assert_eq!(counts, LiveSpans { failed: 1, ..LiveSpans::default() }, "{protocol:?}");
    }
}

/// What `telemetry::init` does is once per process, so it gets one.
#[tokio::test]
#[ignore = "run by a_process_exports_the_users_spans_and_logs_with_their_ids"]
async fn child_with_telemetry() {
    let (config, _) = TraceConfig::from_env().unwrap();
    let telemetry = telemetry::init(Role::Worker, &config, LogFormat::Json);
    let again = telemetry::init(Role::Cli, &config, LogFormat::Pretty);
    let parent: Traceparent = PARENT.parse().unwrap();
    let handler = async {
        tracing::info_span!(target: "shop", "charge card").in_scope(|| {
            let mut headers = std::collections::HashMap::new();
            inject_current(&mut headers);
            tracing::info!(target: "shop", traceparent = headers["traceparent"], "charged");
        });
    };
    handler
        .with_context(to_otel_context(&parent, None, &Baggage::default()))
        .instrument(tracing::info_span!(target: "tasker_worker::executor", "execute", correlation_id = "order-4711"))
        .await;
    assert_eq!(again.shutdown(Duration::from_secs(20)).await, LiveSpans::default());
    assert_eq!(telemetry.shutdown(Duration::from_secs(20)).await, LiveSpans { exported: 1, ..LiveSpans::default() });
}

#[tokio::test]
async fn a_process_exports_the_users_spans_and_logs_with_their_ids() {
    for protocol in ["grpc", "http/protobuf"] {
        let receiver = Receiver::start().await;
        let output = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "export_wire::child_with_telemetry", "--ignored", "--nocapture"])
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint())
            .env("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
            .env("TASKER_LOG", "info")
            .output()
            .await
            .unwrap();
        let lines = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{lines}");
        let spans = receiver.spans();
        assert_eq!(outline(&spans), ["charge card"], "{protocol}: {lines}");
        let span_id = hex(&spans[0].span.span_id);
        let lines: Vec<serde_json::Value> = lines.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!(line["message"], "charged");
        assert_eq!(line["trace_id"], PARENT[3..35]);
        assert_eq!(line["span_id"], span_id.as_str());
        assert_eq!(line["correlation_id"], "order-4711");
        assert_eq!(line["traceparent"], format!("00-{}-{span_id}-01", &PARENT[3..35]));
    }
}
