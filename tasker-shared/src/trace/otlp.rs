//! Spans -> bytes of an OTLP `ExportTraceServiceRequest`; `json.rs` writes the same as OTLP JSON.
//!
//! Writes the protobuf wire format directly: what the spans of a task share is
//! encoded once a task and copied into each span, and nothing is encoded twice
//! to learn its length. Never does I/O, and never changes a span beyond
//! cutting what no backend would keep (counted in [`Encoder::cleaned`]).

mod json;

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use tokio_util::bytes::Bytes;

pub use self::json::{json_line, to_json};
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

/// Lower-case hexadecimal, as W3C and OTLP JSON write ids.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]).map(char::from).collect()
}

/// A number as protobuf writes it: seven bits a byte, the least first.
fn encode_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).unwrap_or_default() | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap_or_default());
}

/// How many bytes [`encode_varint`] writes.
fn encoded_len_varint(value: u64) -> usize {
    ((70 - (value | 1).leading_zeros()) / 7) as usize
}

#[cfg(test)]
mod tests;
