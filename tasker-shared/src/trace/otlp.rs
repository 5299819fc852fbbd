//! Spans -> bytes of an OTLP `ExportTraceServiceRequest`, and the same as OTLP JSON.
//!
//! Writes the protobuf wire format directly: what the spans of a task share is
//! encoded once a task and copied into each span, and nothing is encoded twice
//! to learn its length. Never does I/O, and never changes a span beyond
//! cutting what no backend would keep (counted in [`Encoder::cleaned`]).

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use prost::bytes::Bytes;
use prost::encoding::{encode_varint, encoded_len_varint};
use serde_json::json;

use super::span::{Event, Link, Service, Span, TaskSpans, Value};

/// The instrumentation scope of every span of the tree.
pub const SCOPE_NAME: &str = "tasker";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Longest attribute value, event name or status message, in bytes of UTF-8.
pub const MAX_TEXT_BYTES: usize = 4096;

/// OTLP: the bit that says "whether the parent is remote is known".
const HAS_IS_REMOTE: u32 = 0x100;
/// OTLP: the bit that says "the parent is remote".
const IS_REMOTE: u32 = 0x200;

/// The `service.name` of each kind of process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceNames {
    /// Of task, transition, wait and attempt spans.
    pub orchestration: String,
    /// Of `handler.execution` and `result.submission`.
    pub worker: String,
}

impl Default for ServiceNames {
    fn default() -> Self {
        Self { orchestration: "tasker-orchestration".into(), worker: "tasker-worker".into() }
    }
}

impl ServiceNames {
    /// The name for one kind of process.
    pub fn of(&self, service: Service) -> &str {
        match service {
            Service::Orchestration => &self.orchestration,
            Service::Worker => &self.worker,
        }
    }

    /// The resource of `service`. It holds only what is the same in every
    /// process, so that a span exported again elsewhere is the same span.
    fn resource(&self, service: Service) -> [(&'static str, &str); 4] {
        [
            ("service.name", self.of(service)),
            ("telemetry.sdk.language", "rust"),
            ("telemetry.sdk.name", SCOPE_NAME),
            ("telemetry.sdk.version", VERSION),
        ]
    }
}

/// Builds one export request out of the spans of many tasks.
#[derive(Debug)]
pub struct Encoder {
    groups: [Group; 2],
    /// Scratch: the fields that all spans of the current task share.
    common: Vec<u8>,
    /// Scratch: the body of the current span.
    span: Vec<u8>,
    /// Scratch: the body of the current event.
    event: Vec<u8>,
    spans: usize,
    cleaned: u64,
}

/// The spans of one service.
#[derive(Debug)]
struct Group {
    /// The field `resource` of `ResourceSpans`, tag and length included.
    resource: Vec<u8>,
    /// The field `scope` of `ScopeSpans`, tag and length included.
    scope: Vec<u8>,
    /// The fields `spans` of `ScopeSpans`.
    spans: Vec<u8>,
}

/// The first byte of a field on the wire. All tags but `Span.flags` are below 16.
const fn key(tag: u8, wire_type: u8) -> u8 {
    tag << 3 | wire_type
}
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;

impl Encoder {
    /// An empty request.
    pub fn new(names: &ServiceNames) -> Self {
        let group = |service| {
            let mut body = Vec::new();
            for (name, value) in names.resource(service) {
                put_text_attribute(key(1, BYTES), name, value, &mut body);
            }
            let mut resource = Vec::new();
            put_bytes(key(1, BYTES), &body, &mut resource);
            body.clear();
            put_bytes(key(1, BYTES), SCOPE_NAME.as_bytes(), &mut body);
            put_bytes(key(2, BYTES), VERSION.as_bytes(), &mut body);
            let mut scope = Vec::new();
            put_bytes(key(1, BYTES), &body, &mut scope);
            Group { resource, scope, spans: Vec::new() }
        };
        Self {
            groups: [group(Service::Orchestration), group(Service::Worker)],
            common: Vec::new(),
            span: Vec::new(),
            event: Vec::new(),
            spans: 0,
            cleaned: 0,
        }
    }

    /// Adds all spans of `task`.
    pub fn push(&mut self, task: &TaskSpans) {
        self.push_from(task, 0, usize::MAX);
    }

    /// Adds spans of `task` from index `first` on, until the request holds at
    /// least `limit` bytes, and returns the index of the first span left out.
    /// At least one span is added, so a loop over the result always ends.
    pub fn push_from(&mut self, task: &TaskSpans, first: usize, limit: usize) -> usize {
        self.common.clear();
        put_bytes(key(1, BYTES), &task.trace_id, &mut self.common);
        if let Some(state) = task.tracestate.as_deref().filter(|s| !s.is_empty()) {
            put_bytes(key(3, BYTES), state.as_bytes(), &mut self.common);
        }
        for (name, value) in &task.common {
            put_attribute(key(9, BYTES), name, value, &mut self.common, &mut self.cleaned);
        }
        let mut next = first;
        for span in task.spans.get(first..).unwrap_or_default() {
            self.span.clear();
            self.span.extend_from_slice(&self.common);
            put_span(span, u32::from(task.trace_flags), &mut self.span, &mut self.event, &mut self.cleaned);
            let group = &mut self.groups[index(span.service)].spans;
            put_bytes(key(2, BYTES), &self.span, group);
            next += 1;
            if self.bytes_len() >= limit {
                break;
            }
        }
        self.spans += next - first;
        next
    }

    /// Spans added since the last [`finish`](Self::finish).
    pub fn spans(&self) -> usize {
        self.spans
    }

    /// Values, names and messages that were cut or cleaned, since creation.
    pub fn cleaned(&self) -> u64 {
        self.cleaned
    }

    /// Size in bytes of what [`finish`](Self::finish) would return now.
    pub fn bytes_len(&self) -> usize {
        self.groups.iter().filter(|g| !g.spans.is_empty()).map(|g| field_len(g.body_len())).sum()
    }

    /// Closes the request and starts the next one; the scratch space is kept.
    pub fn finish(&mut self) -> Bytes {
        let mut request = Vec::with_capacity(self.bytes_len());
        for group in &mut self.groups {
            if group.spans.is_empty() {
                continue;
            }
            put_len(key(1, BYTES), group.body_len(), &mut request);
            request.extend_from_slice(&group.resource);
            put_len(key(2, BYTES), group.scope.len() + group.spans.len(), &mut request);
            request.extend_from_slice(&group.scope);
            request.extend_from_slice(&group.spans);
            group.spans.clear();
        }
        self.spans = 0;
        request.into()
    }
}

impl Group {
    /// Length of the `ResourceSpans` message.
    fn body_len(&self) -> usize {
        self.resource.len() + field_len(self.scope.len() + self.spans.len())
    }
}

fn index(service: Service) -> usize {
    match service {
        Service::Orchestration => 0,
        Service::Worker => 1,
    }
}

/// Length of a length-delimited field with a one-byte key.
fn field_len(body: usize) -> usize {
    1 + encoded_len_varint(body as u64) + body
}

fn put_len(key: u8, len: usize, out: &mut Vec<u8>) {
    out.push(key);
    if len < 0x80 {
        out.push(len.to_le_bytes()[0]);
    } else {
        encode_varint(len as u64, out);
    }
}

fn put_bytes(key: u8, body: &[u8], out: &mut Vec<u8>) {
    put_len(key, body.len(), out);
    out.extend_from_slice(body);
}

fn put_fixed64(key: u8, value: u64, out: &mut Vec<u8>) {
    out.push(key);
    out.extend_from_slice(&value.to_le_bytes());
}

/// Everything of a `Span` but what its task shares.
fn put_span(span: &Span, trace_flags: u32, out: &mut Vec<u8>, scratch: &mut Vec<u8>, cleaned: &mut u64) {
    put_bytes(key(2, BYTES), &span.id, out);
    if let Some(parent) = &span.parent {
        put_bytes(key(4, BYTES), parent, out);
    }
    put_bytes(key(5, BYTES), span.name.as_bytes(), out);
    out.extend_from_slice(&[key(6, VARINT), span.kind as u8]);
    put_fixed64(key(7, FIXED64), unix_nanos(span.start), out);
    put_fixed64(key(8, FIXED64), unix_nanos(span.end), out);
    for (name, value) in &span.attributes {
        put_attribute(key(9, BYTES), name, value, out, cleaned);
    }
    for event in &span.events {
        scratch.clear();
        put_event(event, scratch, cleaned);
        put_bytes(key(11, BYTES), scratch, out);
    }
    for link in &span.links {
        put_link(link, out);
    }
    if let Some(message) = &span.error {
        let message = clean(message, true, cleaned);
        let code = [key(3, VARINT), 2];
        put_len(key(15, BYTES), field_len(message.len()) + code.len(), out);
        put_bytes(key(2, BYTES), message.as_bytes(), out);
        out.extend_from_slice(&code);
    }
    // Tag 16 is the only key of two bytes: (16 << 3 | fixed32) as a varint.
    out.extend_from_slice(&[0x85, 0x01]);
    out.extend_from_slice(&span_flags(span, trace_flags).to_le_bytes());
}

fn put_event(event: &Event, out: &mut Vec<u8>, cleaned: &mut u64) {
    put_fixed64(key(1, FIXED64), unix_nanos(event.at), out);
    put_bytes(key(2, BYTES), clean(&event.name, false, cleaned).as_bytes(), out);
    for (name, value) in &event.attributes {
        put_attribute(key(3, BYTES), name, value, out, cleaned);
    }
}

fn put_link(link: &Link, out: &mut Vec<u8>) {
    put_len(key(13, BYTES), field_len(16) + field_len(8), out);
    put_bytes(key(1, BYTES), &link.trace_id, out);
    put_bytes(key(2, BYTES), &link.span_id, out);
}

/// A `KeyValue` as the field `field` of its owner.
fn put_attribute(field: u8, name: &str, value: &Value, out: &mut Vec<u8>, cleaned: &mut u64) {
    match value {
        Value::Str(text) => put_text_attribute(field, name, cut(text, cleaned), out),
        Value::Bool(value) => put_any(field, name, 2, out, |out| {
            out.extend_from_slice(&[key(2, VARINT), u8::from(*value)]);
        }),
        Value::Int(value) => {
            let bits = value.cast_unsigned();
            put_any(field, name, 1 + encoded_len_varint(bits), out, |out| {
                out.push(key(3, VARINT));
                encode_varint(bits, out);
            });
        }
        Value::Float(value) => put_any(field, name, 9, out, |out| {
            put_fixed64(key(4, FIXED64), value.to_bits(), out);
        }),
    }
}

fn put_text_attribute(field: u8, name: &str, value: &str, out: &mut Vec<u8>) {
    put_any(field, name, field_len(value.len()), out, |out| {
        put_bytes(key(1, BYTES), value.as_bytes(), out);
    });
}

fn put_any(field: u8, name: &str, any_len: usize, out: &mut Vec<u8>, put: impl FnOnce(&mut Vec<u8>)) {
    put_len(field, field_len(name.len()) + field_len(any_len), out);
    put_bytes(key(1, BYTES), name.as_bytes(), out);
    put_len(key(2, BYTES), any_len, out);
    put(out);
}

fn span_flags(span: &Span, trace_flags: u32) -> u32 {
    trace_flags | HAS_IS_REMOTE | if span.parent_is_remote { IS_REMOTE } else { 0 }
}

/// Nanoseconds since 1970; what OTLP cannot express becomes its nearest bound.
fn unix_nanos(at: DateTime<Utc>) -> u64 {
    u64::try_from(at.timestamp())
        .map_or(0, |s| s.saturating_mul(1_000_000_000).saturating_add(u64::from(at.timestamp_subsec_nanos())))
}

/// At most [`MAX_TEXT_BYTES`], cut between two characters.
pub(super) fn cut<'a>(text: &'a str, cleaned: &mut u64) -> &'a str {
    if text.len() <= MAX_TEXT_BYTES {
        return text;
    }
    *cleaned += 1;
    &text[..text.floor_char_boundary(MAX_TEXT_BYTES)]
}

/// Cut, and control characters replaced by spaces: a name or a message is
/// printed by people's terminals. A message keeps its line breaks and tabs.
pub(super) fn clean<'a>(text: &'a str, lines: bool, cleaned: &mut u64) -> Cow<'a, str> {
    let bad = |c: char| c.is_control() && !(lines && matches!(c, '\n' | '\t'));
    if !text.contains(bad) {
        return Cow::Borrowed(cut(text, cleaned));
    }
    *cleaned += 1;
    // Replace first: U+0080…U+009F shrink from two bytes to one.
    let mut text = text.replace(bad, " ");
    text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
    Cow::Owned(text)
}

/// The same request in OTLP's JSON form: ids in hex, 64-bit integers as
/// strings, `camelCase`. `tasks` may mix traces; spans are grouped as
/// [`Encoder`] groups them.
pub fn to_json(tasks: &[TaskSpans], names: &ServiceNames) -> serde_json::Value {
    let groups: Vec<_> = [Service::Orchestration, Service::Worker]
        .into_iter()
        .filter_map(|service| {
            let spans: Vec<_> = tasks
                .iter()
                .flat_map(|task| task.spans.iter().filter(move |s| s.service == service).map(move |s| (task, s)))
                .map(|(task, span)| json_span(task, span))
                .collect();
            if spans.is_empty() {
                return None;
            }
            let resource: Vec<_> = names
                .resource(service)
                .iter()
                .map(|(key, value)| json!({"key": key, "value": {"stringValue": value}}))
                .collect();
            Some(json!({
                "resource": {"attributes": resource},
                "scopeSpans": [{"scope": {"name": SCOPE_NAME, "version": VERSION}, "spans": spans}],
            }))
        })
        .collect();
    json!({ "resourceSpans": groups })
}

/// [`to_json`] of one task as a line of text. What the spans share is written once and copied, and
/// no tree of values is made: a large task streams many times faster.
pub fn json_line(task: &TaskSpans, names: &ServiceNames) -> Vec<u8> {
    let mut out = Vec::with_capacity(128 + task.spans.len() * 900);
    let common: Vec<u8> = attributes_line(task.common.iter());
    out.extend(b"{\"resourceSpans\":[");
    for service in [Service::Orchestration, Service::Worker] {
        let mut spans = task.spans.iter().filter(|span| span.service == service).peekable();
        if spans.peek().is_none() {
            continue;
        }
        if !out.ends_with(b"[") {
            out.push(b',');
        }
        out.extend(b"{\"resource\":{\"attributes\":[");
        for (n, (key, value)) in names.resource(service).iter().enumerate() {
            out.extend(if n == 0 { &b""[..] } else { b"," });
            text_attribute(&mut out, key, value);
        }
        out.extend(b"]},\"scopeSpans\":[{\"scope\":{\"name\":");
        json_text(&mut out, SCOPE_NAME);
        out.extend(b",\"version\":");
        json_text(&mut out, VERSION);
        out.extend(b"},\"spans\":[");
        for (n, span) in spans.enumerate() {
            out.extend(if n == 0 { &b""[..] } else { b"," });
            span_line(&mut out, task, &common, span);
        }
        out.extend(b"]}]}");
    }
    out.extend(b"]}\n");
    out
}

fn span_line(out: &mut Vec<u8>, task: &TaskSpans, common: &[u8], span: &Span) {
    let cleaned = &mut 0;
    let head = format!(
        "{{\"traceId\":\"{}\",\"spanId\":\"{}\",\"flags\":{},\"kind\":{},\"startTimeUnixNano\":\"{}\",\"endTimeUnixNano\":\"{}\",\"name\":",
        hex(&task.trace_id),
        hex(&span.id),
        span_flags(span, u32::from(task.trace_flags)),
        span.kind as u8,
        unix_nanos(span.start),
        unix_nanos(span.end)
    );
    out.extend(head.as_bytes());
    json_text(out, span.name);
    out.extend(b",\"attributes\":[");
    out.extend(common);
    let own = attributes_line(span.attributes.iter());
    if !common.is_empty() && !own.is_empty() {
        out.push(b',');
    }
    out.extend(own);
    out.push(b']');
    if let Some(parent) = &span.parent {
        out.extend(format!(",\"parentSpanId\":\"{}\"", hex(parent)).as_bytes());
    }
    if let Some(state) = task.tracestate.as_deref().filter(|state| !state.is_empty()) {
        out.extend(b",\"traceState\":");
        json_text(out, state);
    }
    if !span.events.is_empty() {
        for (n, event) in span.events.iter().enumerate() {
            out.extend(if n == 0 { &b",\"events\":["[..] } else { b"," });
            out.extend(format!("{{\"timeUnixNano\":\"{}\",\"name\":", unix_nanos(event.at)).as_bytes());
            json_text(out, &clean(&event.name, false, cleaned));
            out.extend(b",\"attributes\":[");
            out.extend(attributes_line(event.attributes.iter()));
            out.extend(b"]}");
        }
        out.push(b']');
    }
    if !span.links.is_empty() {
        for (n, link) in span.links.iter().enumerate() {
            out.extend(if n == 0 { &b",\"links\":["[..] } else { b"," });
            let link = format!("{{\"traceId\":\"{}\",\"spanId\":\"{}\"}}", hex(&link.trace_id), hex(&link.span_id));
            out.extend(link.as_bytes());
        }
        out.push(b']');
    }
    if let Some(message) = &span.error {
        out.extend(b",\"status\":{\"code\":2,\"message\":");
        json_text(out, &clean(message, true, cleaned));
        out.push(b'}');
    }
    out.push(b'}');
}

/// Attributes with commas between them.
fn attributes_line<'a, K: AsRef<str> + 'a>(attributes: impl Iterator<Item = &'a (K, Value)>) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in attributes {
        if !out.is_empty() {
            out.push(b',');
        }
        if let Value::Str(text) = value {
            text_attribute(&mut out, key.as_ref(), cut(text, &mut 0));
        } else {
            out.extend(b"{\"key\":");
            json_text(&mut out, key.as_ref());
            out.extend(format!(",\"value\":{}}}", json_value(value)).as_bytes());
        }
    }
    out
}

fn text_attribute(out: &mut Vec<u8>, key: &str, value: &str) {
    out.extend(b"{\"key\":");
    json_text(out, key);
    out.extend(b",\"value\":{\"stringValue\":");
    json_text(out, value);
    out.extend(b"}}");
}

fn json_text(out: &mut Vec<u8>, text: &str) {
    // Writing to memory cannot fail, and a text is always JSON.
    let _ = serde_json::to_writer(out, text);
}

fn json_span(task: &TaskSpans, span: &Span) -> serde_json::Value {
    let cleaned = &mut 0;
    let mut out = json!({
        "traceId": hex(&task.trace_id),
        "spanId": hex(&span.id),
        "flags": span_flags(span, u32::from(task.trace_flags)),
        "name": span.name,
        "kind": span.kind as u8,
        "startTimeUnixNano": unix_nanos(span.start).to_string(),
        "endTimeUnixNano": unix_nanos(span.end).to_string(),
        "attributes": json_attributes(task.common.iter().chain(&span.attributes)),
    });
    if let Some(parent) = &span.parent {
        out["parentSpanId"] = hex(parent).into();
    }
    if let Some(state) = task.tracestate.as_deref().filter(|s| !s.is_empty()) {
        out["traceState"] = state.into();
    }
    if !span.events.is_empty() {
        out["events"] = span
            .events
            .iter()
            .map(|event| {
                json!({
                    "timeUnixNano": unix_nanos(event.at).to_string(),
                    "name": clean(&event.name, false, cleaned),
                    "attributes": json_attributes(event.attributes.iter()),
                })
            })
            .collect();
    }
    if !span.links.is_empty() {
        out["links"] = span
            .links
            .iter()
            .map(|link| json!({"traceId": hex(&link.trace_id), "spanId": hex(&link.span_id)}))
            .collect();
    }
    if let Some(message) = &span.error {
        out["status"] = json!({"message": clean(message, true, cleaned), "code": 2});
    }
    out
}

fn json_attributes<'a, K: AsRef<str> + 'a>(attributes: impl Iterator<Item = &'a (K, Value)>) -> serde_json::Value {
    attributes.map(|(key, value)| json!({"key": key.as_ref(), "value": json_value(value)})).collect()
}

fn json_value(value: &Value) -> serde_json::Value {
    match value {
        Value::Str(text) => json!({"stringValue": cut(text, &mut 0)}),
        Value::Bool(value) => json!({"boolValue": value}),
        Value::Int(value) => json!({"intValue": value.to_string()}),
        // The JSON mapping of protobuf writes what JSON has no number for as a string.
        Value::Float(value) if value.is_nan() => json!({"doubleValue": "NaN"}),
        Value::Float(value) if value.is_infinite() => {
            json!({"doubleValue": if *value > 0.0 { "Infinity" } else { "-Infinity" }})
        }
        Value::Float(value) => json!({"doubleValue": value}),
    }
}

/// Lower-case hexadecimal, as W3C and OTLP JSON write ids.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]).map(char::from).collect()
}

#[cfg(test)]
mod tests {
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
}
