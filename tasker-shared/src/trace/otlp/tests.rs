use chrono::TimeDelta;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1 as proto;
use proptest::prelude::*;
use prost::Message;

use super::super::span::Kind;
use super::*;

/// The request as the generated types would hold it, built by the obvious code.
fn expected(tasks: &[TaskSpans], names: &ServiceNames) -> ExportTraceServiceRequest {
    fn attribute<K: AsRef<str>>((key, value): &(K, Value)) -> KeyValue {
        KeyValue {
            key: key.as_ref().into(),
            value: Some(AnyValue {
                value: Some(match value {
                    Value::Str(s) => any_value::Value::StringValue(s.to_string()),
                    Value::Int(i) => any_value::Value::IntValue(*i),
                    Value::Float(f) => any_value::Value::DoubleValue(*f),
                    Value::Bool(b) => any_value::Value::BoolValue(*b),
                }),
            }),
            ..KeyValue::default()
        }
    }
    let nanos = |at: DateTime<Utc>| u64::try_from(at.timestamp_nanos_opt().unwrap()).unwrap();
    let span = |task: &TaskSpans, span: &Span| proto::Span {
        trace_id: task.trace_id.to_vec(),
        span_id: span.id.to_vec(),
        trace_state: task.tracestate.clone().unwrap_or_default(),
        parent_span_id: span.parent.map(|p| p.to_vec()).unwrap_or_default(),
        flags: u32::from(task.trace_flags) + 256 + if span.parent_is_remote { 512 } else { 0 },
        name: span.name.into(),
        kind: span.kind as i32,
        start_time_unix_nano: nanos(span.start),
        end_time_unix_nano: nanos(span.end),
        attributes: task.common.iter().chain(&span.attributes).map(attribute::<&str>).collect(),
        events: span
            .events
            .iter()
            .map(|e| proto::span::Event {
                time_unix_nano: nanos(e.at),
                name: e.name.to_string(),
                attributes: e.attributes.iter().map(attribute::<_>).collect(),
                dropped_attributes_count: 0,
            })
            .collect(),
        links: span
            .links
            .iter()
            .map(|l| proto::span::Link {
                trace_id: l.trace_id.to_vec(),
                span_id: l.span_id.to_vec(),
                ..proto::span::Link::default()
            })
            .collect(),
        status: span
            .error
            .as_ref()
            .map(|m| proto::Status { message: m.clone(), code: proto::status::StatusCode::Error as i32 }),
        ..proto::Span::default()
    };
    let resource_spans = [(Service::Orchestration, &names.orchestration), (Service::Worker, &names.worker)]
        .into_iter()
        .map(|(service, name)| proto::ResourceSpans {
            resource: Some(Resource {
                attributes: [
                    ("service.name", name.clone()),
                    ("telemetry.sdk.language", "rust".into()),
                    ("telemetry.sdk.name", "tasker".into()),
                    ("telemetry.sdk.version", env!("CARGO_PKG_VERSION").into()),
                ]
                .map(|(k, v)| attribute(&(k, Value::from(v))))
                .to_vec(),
                ..Resource::default()
            }),
            scope_spans: vec![proto::ScopeSpans {
                scope: Some(InstrumentationScope {
                    name: "tasker".into(),
                    version: env!("CARGO_PKG_VERSION").into(),
                    ..InstrumentationScope::default()
                }),
                spans: tasks
                    .iter()
                    .flat_map(|t| t.spans.iter().filter(|s| s.service == service).map(|s| span(t, s)))
                    .collect(),
                schema_url: String::new(),
            }],
            schema_url: String::new(),
        })
        .filter(|r| !r.scope_spans[0].spans.is_empty())
        .collect();
    ExportTraceServiceRequest { resource_spans }
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        ".{0,200}".prop_map(Value::from),
        any::<i64>().prop_map(Value::Int),
        (-1e300..1e300).prop_map(Value::Float),
        any::<bool>().prop_map(Value::Bool),
    ]
}

fn attributes() -> impl Strategy<Value = Vec<(&'static str, Value)>> {
    let key = prop_oneof![Just("correlation_id"), Just("größe"), Just("k"), Just("messaging.batch.message_count")];
    proptest::collection::vec((key, value()), 0..5)
}

fn at() -> impl Strategy<Value = DateTime<Utc>> {
    (0i64..9_000_000_000_000_000).prop_map(|us| DateTime::<Utc>::UNIX_EPOCH + TimeDelta::microseconds(us))
}

// What has no control character, so that nothing is cleaned.
const PLAIN: &str = "[ -~äöü→🦀]{0,150}";

fn span() -> impl Strategy<Value = Span> {
    let kinds = [Kind::Internal, Kind::Server, Kind::Client, Kind::Producer, Kind::Consumer];
    let head = (
        any::<[u8; 8]>(),
        proptest::option::of(any::<[u8; 8]>()),
        any::<bool>(),
        prop_oneof![Just("task.orchestration"), Just("")],
        (0..5usize).prop_map(move |i| kinds[i]),
        prop_oneof![Just(Service::Orchestration), Just(Service::Worker)],
        at(),
        at(),
    );
    let event = (PLAIN, at(), attributes()).prop_map(|(name, at, attributes)| {
        let attributes = attributes.into_iter().map(|(key, value)| (key.into(), value)).collect();
        Event { name: name.into(), at, attributes }
    });
    let link = (any::<[u8; 16]>(), any::<[u8; 8]>()).prop_map(|(trace_id, span_id)| Link { trace_id, span_id });
    let tail = (
        attributes(),
        proptest::collection::vec(event, 0..4),
        proptest::collection::vec(link, 0..4),
        proptest::option::of(PLAIN),
    );
    (head, tail).prop_map(|(h, (attributes, events, links, error))| Span {
        id: h.0,
        parent: h.1,
        parent_is_remote: h.2,
        name: h.3,
        kind: h.4,
        service: h.5,
        start: h.6,
        end: h.7,
        attributes,
        links,
        events,
        error,
        settled_at: h.7,
    })
}

fn task() -> impl Strategy<Value = TaskSpans> {
    (
        any::<[u8; 16]>(),
        any::<u8>(),
        proptest::option::of("[a-z0-9=,]{0,300}"),
        attributes(),
        proptest::collection::vec(span(), 0..6),
    )
        .prop_map(|(trace_id, trace_flags, tracestate, common, spans)| TaskSpans {
            trace_id,
            trace_flags,
            tracestate,
            common,
            spans,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_line_says_what_the_document_says(task in task()) {
        let names = ServiceNames { orchestration: "o".into(), worker: "ärbeiter".into() };
        let line: serde_json::Value = serde_json::from_slice(&json_line(&task, &names)).expect("JSON");
        let document = to_json(std::slice::from_ref(&task), &names).to_string();
        prop_assert_eq!(line, serde_json::from_str::<serde_json::Value>(&document).expect("JSON"));
    }

    #[test]
    fn bytes_decode_to_every_field_of_every_span(tasks in proptest::collection::vec(task(), 0..4)) {
        let names = ServiceNames { orchestration: "o".into(), worker: "ärbeiter".into() };
        let mut encoder = Encoder::new(&names);
        for task in &tasks {
            encoder.push(task);
        }
        prop_assert_eq!(encoder.spans(), tasks.iter().map(|t| t.spans.len()).sum::<usize>());
        prop_assert_eq!(encoder.cleaned(), 0);
        let len = encoder.bytes_len();
        let bytes = encoder.finish();
        prop_assert_eq!(bytes.len(), len);
        prop_assert_eq!(ExportTraceServiceRequest::decode(bytes).unwrap(), expected(&tasks, &names));
    }

    #[test]
    fn json_reads_back_as_the_same_request(tasks in proptest::collection::vec(task(), 0..3)) {
        let names = ServiceNames::default();
        let json = to_json(&tasks, &names);
        let read: ExportTraceServiceRequest = serde_json::from_value(json).unwrap();
        prop_assert_eq!(read, expected(&tasks, &names));
    }
}

fn plain_span(name: &'static str) -> Span {
    let at = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::microseconds(1_790_000_000_123_456);
    Span {
        id: [7; 8],
        parent: None,
        parent_is_remote: false,
        name,
        kind: Kind::Internal,
        service: Service::Orchestration,
        start: at,
        end: at,
        attributes: vec![],
        links: vec![],
        events: vec![],
        error: None,
        settled_at: at,
    }
}

fn one_task(spans: Vec<Span>) -> TaskSpans {
    TaskSpans { trace_id: [1; 16], trace_flags: 1, tracestate: None, common: vec![], spans }
}

fn only_span(encoder: &mut Encoder) -> proto::Span {
    let request = ExportTraceServiceRequest::decode(encoder.finish()).unwrap();
    request.resource_spans[0].scope_spans[0].spans[0].clone()
}

#[test]
fn long_values_are_cut_between_characters_and_counted() {
    let mut span = plain_span("s");
    span.attributes =
        vec![("a", Value::from("ö".repeat(2048))), ("b", Value::from("x".to_owned() + &"ö".repeat(2048)))];
    let mut encoder = Encoder::new(&ServiceNames::default());
    encoder.push(&one_task(vec![span]));
    assert_eq!(encoder.cleaned(), 1);
    let lengths: Vec<_> = only_span(&mut encoder)
        .attributes
        .into_iter()
        .map(|kv| match kv.value.unwrap().value.unwrap() {
            any_value::Value::StringValue(s) => s.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(lengths, [4096, 4095]);
}

#[test]
fn control_characters_leave_names_and_messages() {
    let mut span = plain_span("s");
    span.error = Some("line one\n\tline two\u{1b}[31m\u{9b}".into());
    span.events = vec![Event { name: "a\nb\0".into(), at: span.start, attributes: vec![] }];
    let mut encoder = Encoder::new(&ServiceNames::default());
    encoder.push(&one_task(vec![span]));
    assert_eq!(encoder.cleaned(), 2);
    let span = only_span(&mut encoder);
    assert_eq!(span.status.unwrap().message, "line one\n\tline two [31m ");
    assert_eq!(span.events[0].name, "a b ");
}

#[test]
fn a_task_too_large_for_one_request_is_continued_in_the_next() {
    let task = one_task((0..100).map(|_| plain_span("step.execution")).collect());
    let mut encoder = Encoder::new(&ServiceNames::default());
    let (mut next, mut requests, mut spans) = (0, 0, 0);
    while next < task.spans.len() {
        next = encoder.push_from(&task, next, 1000);
        let bytes = encoder.finish();
        assert!(bytes.len() < 1200, "{}", bytes.len());
        spans += ExportTraceServiceRequest::decode(bytes).unwrap().resource_spans[0].scope_spans[0].spans.len();
        requests += 1;
    }
    assert_eq!(spans, 100);
    assert!(requests > 5);
}

#[test]
fn a_request_after_finish_holds_nothing_of_the_last_one() {
    let mut encoder = Encoder::new(&ServiceNames::default());
    encoder.push(&one_task(vec![plain_span("first")]));
    encoder.finish();
    assert_eq!((encoder.spans(), encoder.bytes_len()), (0, 0));
    encoder.push(&one_task(vec![plain_span("second")]));
    assert_eq!(only_span(&mut encoder).name, "second");
}

#[test]
fn times_outside_the_range_of_otlp_are_clamped() {
    assert_eq!(unix_nanos(DateTime::<Utc>::MIN_UTC), 0);
    assert_eq!(unix_nanos(DateTime::<Utc>::MAX_UTC), u64::MAX);
}
