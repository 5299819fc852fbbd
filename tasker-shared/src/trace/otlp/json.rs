//! The request in OTLP's JSON form, as a value and as a line of text.

use serde_json::json;

use super::{SCOPE_NAME, ServiceNames, VERSION, clean, cut, hex, span_flags, unix_nanos};
use crate::trace::span::{Service, Span, TaskSpans, Value};

/// The same request in OTLP's JSON form: ids in hex, 64-bit integers as
/// strings, `camelCase`. `tasks` may mix traces; spans are grouped as
/// [`Encoder`](super::Encoder) groups them.
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
