//! Traces from the log, from files, from backends' answers and from the SDK.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::{Value, json};
use tasker_shared::trace::log::TaskLog;
use tasker_shared::trace::otlp::{self, ServiceNames};
use tasker_shared::trace::span::{Kind, TaskSpans};
use tasker_shared::trace::tree;

use crate::trace::{Event, Span, Trace};

/// A trace could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("{path} cannot be read: {source}")]
    File {
        /// As given.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The text is no JSON.
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// JSON of another kind.
    #[error("{0}; expected OTLP JSON (`resourceSpans`), Tempo's (`batches`) or Jaeger's (`data`)")]
    Shape(String),
}

impl Trace {
    /// What is exported of a task, by its log.
    pub fn of_log(log: &TaskLog) -> Self {
        Self::of_spans(&tree::spans(log), &ServiceNames::default())
    }

    /// The spans of one task, as its export shows them to a receiver.
    pub fn of_spans(spans: &TaskSpans, names: &ServiceNames) -> Self {
        // Through the writer, so that cutting and cleaning are the export's own.
        let written = otlp::to_json(std::slice::from_ref(spans), names);
        Self::from_value(&written).unwrap_or_default()
    }

    /// OTLP JSON, Tempo's or Jaeger's: one document, or one a line.
    ///
    /// # Errors
    /// [`Error::Json`] if it is no JSON, [`Error::Shape`] if it is JSON of another kind.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let mut trace = Self::default();
        for document in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
            trace.spans.extend(Self::from_value(&document?)?.spans);
        }
        Ok(trace)
    }

    /// The same from a file.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read; otherwise as [`from_json`](Self::from_json).
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::File { path: path.display().to_string(), source })?;
        Self::from_json(&text)
    }

    /// The same from JSON that is parsed already.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is JSON of another kind.
    pub fn from_value(document: &Value) -> Result<Self, Error> {
        let document = document.get("result").unwrap_or(document);
        if let Some(traces) = document.get("data").and_then(Value::as_array) {
            return jaeger(traces);
        }
        let Some(resources) = ["resourceSpans", "batches"].iter().find_map(|key| document.get(key)?.as_array()) else {
            return Err(Error::Shape("there are no spans in it".into()));
        };
        let mut spans = Vec::new();
        for resource in resources {
            let service = resource.pointer("/resource/attributes").map(attributes).unwrap_or_default();
            let service = service.get("service.name").and_then(Value::as_str).unwrap_or_default();
            for scope in list(resource, "scopeSpans") {
                for span in list(scope, "spans") {
                    spans.push(otlp_span(service, span)?);
                }
            }
        }
        Ok(Self { spans })
    }

    /// What the SDK's `InMemorySpanExporter` has.
    #[cfg(feature = "sdk")]
    pub fn from_sdk(spans: &[opentelemetry_sdk::trace::SpanData]) -> Self {
        Self { spans: spans.iter().map(sdk::span).collect() }
    }
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn otlp_span(service: &str, span: &Value) -> Result<Span, Error> {
    let id = |key: &str| span.get(key).and_then(Value::as_str).unwrap_or_default();
    let at = |key: &str| number(span.get(key));
    let flags = number(span.get("flags"));
    let status = span.get("status");
    let failed = matches!(status.and_then(|s| s.get("code")), Some(code) if code == 2 || code == "STATUS_CODE_ERROR");
    let message = status.and_then(|s| s.get("message")).and_then(Value::as_str).unwrap_or_default();
    Ok(Span {
        trace_id: bytes(id("traceId"))?,
        span_id: bytes(id("spanId"))?,
        parent: Some(id("parentSpanId")).filter(|id| !id.is_empty()).map(bytes).transpose()?,
        parent_is_remote: flags & 0x200 != 0,
        name: id("name").to_owned(),
        kind: kind(span.get("kind")),
        service: service.to_owned(),
        start: at("startTimeUnixNano"),
        end: at("endTimeUnixNano"),
        attributes: span.get("attributes").map(attributes).unwrap_or_default(),
        links: list(span, "links")
            .iter()
            .map(|link| {
                let id = |key: &str| link.get(key).and_then(Value::as_str).unwrap_or_default();
                Ok((bytes(id("traceId"))?, bytes(id("spanId"))?))
            })
            .collect::<Result<_, Error>>()?,
        events: list(span, "events")
            .iter()
            .map(|event| Event {
                name: event.get("name").and_then(Value::as_str).unwrap_or_default().to_owned(),
                at: number(event.get("timeUnixNano")),
                attributes: event.get("attributes").map(attributes).unwrap_or_default(),
            })
            .collect(),
        error: failed.then(|| message.to_owned()),
    })
}

fn attributes(list: &Value) -> BTreeMap<String, Value> {
    let pair = |kv: &Value| Some((kv.get("key")?.as_str()?.to_owned(), any_value(kv.get("value")?)));
    list.as_array().into_iter().flatten().filter_map(pair).collect()
}

/// An `AnyValue`: 64-bit integers are texts in OTLP JSON.
fn any_value(value: &Value) -> Value {
    if let Some(number) = value.get("intValue") {
        let text = number.as_str().and_then(|text| text.parse::<i64>().ok());
        return text.map_or_else(|| number.clone(), Value::from);
    }
    let plain = ["stringValue", "boolValue", "doubleValue"].iter().find_map(|key| value.get(key));
    if let Some(plain) = plain {
        return plain.clone();
    }
    match value.get("arrayValue") {
        Some(array) => list(array, "values").iter().map(any_value).collect(),
        None => value.clone(),
    }
}

fn number(value: Option<&Value>) -> u64 {
    let Some(value) = value else { return 0 };
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
}

fn kind(value: Option<&Value>) -> Kind {
    match value {
        Some(Value::String(text)) => kind_named(text.trim_start_matches("SPAN_KIND_")),
        other => kind_numbered(number(other)),
    }
}

fn kind_named(text: &str) -> Kind {
    match text.to_ascii_uppercase().as_str() {
        "SERVER" => Kind::Server,
        "CLIENT" => Kind::Client,
        "PRODUCER" => Kind::Producer,
        "CONSUMER" => Kind::Consumer,
        _ => Kind::Internal,
    }
}

fn kind_numbered(n: u64) -> Kind {
    match n {
        2 => Kind::Server,
        3 => Kind::Client,
        4 => Kind::Producer,
        5 => Kind::Consumer,
        _ => Kind::Internal,
    }
}

/// An id in hexadecimal, as OTLP JSON has it, or in base64, as the plain mapping of protobuf has it.
fn bytes<const N: usize>(text: &str) -> Result<[u8; N], Error> {
    let read = || {
        if text.len() == 2 * N {
            let digit = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
            return (0..N).map(|n| digit(2 * n)).collect::<Option<Vec<u8>>>();
        }
        // Jaeger writes ids without leading zeros.
        if text.len() < 2 * N && !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit()) && !text.ends_with('=')
        {
            let value = u128::from_str_radix(text, 16).ok()?.to_be_bytes();
            return Some(value[16 - N..].to_vec());
        }
        base64(text)
    };
    read()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Error::Shape(format!("{text:?} is no id of {N} bytes")))
}

fn base64(text: &str) -> Option<Vec<u8>> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut out, mut held, mut bits) = (Vec::new(), 0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let digit = DIGITS.iter().position(|d| *d == byte)?;
        held = held << 6 | u32::try_from(digit).ok()?;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            out.push(u8::try_from(held >> bits & 0xff).ok()?);
        }
    }
    Some(out)
}

/// The answer of Jaeger's query API and of `--format jaeger-json`.
fn jaeger(traces: &[Value]) -> Result<Trace, Error> {
    let mut spans = Vec::new();
    for trace in traces {
        let processes = trace.get("processes").and_then(Value::as_object);
        let services: HashMap<&str, &str> = processes
            .into_iter()
            .flatten()
            .filter_map(|(key, process)| Some((key.as_str(), process.get("serviceName")?.as_str()?)))
            .collect();
        for span in list(trace, "spans") {
            spans.push(jaeger_span(&services, span)?);
        }
    }
    Ok(Trace { spans })
}

fn jaeger_span(services: &HashMap<&str, &str>, span: &Value) -> Result<Span, Error> {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let trace_id: [u8; 16] = bytes(&text(span, "traceID"))?;
    let tags = |list: &[Value]| -> BTreeMap<String, Value> {
        let value = |tag: &Value| {
            let value = tag.get("value").cloned().unwrap_or_default();
            // Large integers come as texts.
            let number = value.as_str().filter(|_| tag.get("type").is_some_and(|t| t == "int64"));
            number.and_then(|text| text.parse::<i64>().ok()).map_or(value.clone(), Value::from)
        };
        list.iter().map(|tag| (text(tag, "key"), value(tag))).collect()
    };
    let mut attributes = tags(list(span, "tags"));
    let kind = attributes.remove("span.kind").map_or(Kind::Internal, |kind| kind_named(kind.as_str().unwrap_or("")));
    let failed = attributes.remove("error").is_some_and(|value| value == json!(true));
    let failed = attributes.remove("otel.status_code").is_some_and(|code| code == "ERROR") || failed;
    let description = attributes.remove("otel.status_description");
    for made_by_jaeger in ["otel.scope.name", "otel.scope.version", "internal.span.format", "w3c.tracestate"] {
        attributes.remove(made_by_jaeger);
    }
    let (mut parent, mut links) = (None, Vec::new());
    for reference in list(span, "references") {
        let to: ([u8; 16], [u8; 8]) = (bytes(&text(reference, "traceID"))?, bytes(&text(reference, "spanID"))?);
        if text(reference, "refType") == "CHILD_OF" && to.0 == trace_id && parent.is_none() {
            parent = Some(to.1);
        } else {
            links.push(to);
        }
    }
    let start = number(span.get("startTime")).saturating_mul(1000);
    Ok(Span {
        trace_id,
        span_id: bytes(&text(span, "spanID"))?,
        parent,
        // Jaeger does not say; a root's parent that is not there is another service's.
        parent_is_remote: parent.is_some() && text(span, "operationName") == "task.orchestration",
        name: text(span, "operationName"),
        kind,
        service: services.get(text(span, "processID").as_str()).copied().unwrap_or_default().to_owned(),
        start,
        end: start.saturating_add(number(span.get("duration")).saturating_mul(1000)),
        attributes,
        links,
        events: list(span, "logs")
            .iter()
            .map(|log| {
                let mut attributes = tags(list(log, "fields"));
                let name = attributes.remove("event").and_then(|name| Some(name.as_str()?.to_owned()));
                Event {
                    name: name.unwrap_or_default(),
                    at: number(log.get("timestamp")).saturating_mul(1000),
                    attributes,
                }
            })
            .collect(),
        error: failed.then(|| description.and_then(|d| Some(d.as_str()?.to_owned())).unwrap_or_default()),
    })
}

#[cfg(feature = "sdk")]
mod sdk {
    use std::time::{SystemTime, UNIX_EPOCH};

    use opentelemetry::trace::{SpanKind, Status};
    use opentelemetry::{KeyValue, SpanId, Value as SdkValue};
    use opentelemetry_sdk::trace::SpanData;

    use super::{BTreeMap, Event, Kind, Span, Value};

    pub(super) fn span(data: &SpanData) -> Span {
        Span {
            trace_id: data.span_context.trace_id().to_bytes(),
            span_id: data.span_context.span_id().to_bytes(),
            parent: Some(data.parent_span_id).filter(|id| *id != SpanId::INVALID).map(SpanId::to_bytes),
            parent_is_remote: data.parent_span_is_remote,
            name: data.name.to_string(),
            kind: match data.span_kind {
                SpanKind::Client => Kind::Client,
                SpanKind::Server => Kind::Server,
                SpanKind::Producer => Kind::Producer,
                SpanKind::Consumer => Kind::Consumer,
                SpanKind::Internal => Kind::Internal,
            },
            // The resource belongs to the provider, not to its spans.
            service: String::new(),
            start: nanos(data.start_time),
            end: nanos(data.end_time),
            attributes: attributes(&data.attributes),
            links: data
                .links
                .iter()
                .map(|link| (link.span_context.trace_id().to_bytes(), link.span_context.span_id().to_bytes()))
                .collect(),
            events: data
                .events
                .iter()
                .map(|event| Event {
                    name: event.name.to_string(),
                    at: nanos(event.timestamp),
                    attributes: attributes(&event.attributes),
                })
                .collect(),
            error: match &data.status {
                Status::Error { description } => Some(description.to_string()),
                Status::Ok | Status::Unset => None,
            },
        }
    }

    fn attributes(list: &[KeyValue]) -> BTreeMap<String, Value> {
        let value = |value: &SdkValue| match value {
            SdkValue::Bool(yes) => (*yes).into(),
            SdkValue::I64(n) => (*n).into(),
            SdkValue::F64(n) => (*n).into(),
            SdkValue::String(text) => text.as_str().into(),
            other => other.to_string().into(),
        };
        list.iter().map(|kv| (kv.key.to_string(), value(&kv.value))).collect()
    }

    fn nanos(at: SystemTime) -> u64 {
        at.duration_since(UNIX_EPOCH).ok().and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or(0)
    }
}

#[cfg(feature = "proto")]
mod proto {
    use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value as Any};
    use opentelemetry_proto::tonic::trace::v1 as wire;

    use super::{BTreeMap, Event, Span, Value, kind_numbered};

    impl Span {
        /// A span of the protobuf messages; ids of a wrong length become zeros.
        pub fn from_proto(service: &str, span: &wire::Span) -> Self {
            let status = span.status.as_ref().filter(|status| status.code == wire::status::StatusCode::Error as i32);
            Self {
                trace_id: span.trace_id[..].try_into().unwrap_or_default(),
                span_id: span.span_id[..].try_into().unwrap_or_default(),
                parent: span.parent_span_id[..].try_into().ok(),
                parent_is_remote: span.flags & 0x200 != 0,
                name: span.name.clone(),
                kind: kind_numbered(u64::try_from(span.kind).unwrap_or(0)),
                service: service.to_owned(),
                start: span.start_time_unix_nano,
                end: span.end_time_unix_nano,
                attributes: attributes(&span.attributes),
                links: span
                    .links
                    .iter()
                    .map(|link| {
                        let span_id = link.span_id[..].try_into().unwrap_or_default();
                        (link.trace_id[..].try_into().unwrap_or_default(), span_id)
                    })
                    .collect(),
                events: span
                    .events
                    .iter()
                    .map(|event| Event {
                        name: event.name.clone(),
                        at: event.time_unix_nano,
                        attributes: attributes(&event.attributes),
                    })
                    .collect(),
                error: status.map(|status| status.message.clone()),
            }
        }
    }

    fn attributes(list: &[KeyValue]) -> BTreeMap<String, Value> {
        list.iter().map(|kv| (kv.key.clone(), kv.value.as_ref().map(value).unwrap_or_default())).collect()
    }

    fn value(value: &AnyValue) -> Value {
        match &value.value {
            Some(Any::StringValue(text)) => text.as_str().into(),
            Some(Any::IntValue(n)) => (*n).into(),
            Some(Any::BoolValue(yes)) => (*yes).into(),
            Some(Any::DoubleValue(n)) => (*n).into(),
            Some(Any::ArrayValue(array)) => array.values.iter().map(self::value).collect(),
            other => format!("{other:?}").into(),
        }
    }
}
