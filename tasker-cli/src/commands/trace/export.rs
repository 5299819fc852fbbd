//! `tasker trace export`.

use std::io::{BufWriter, Write};

use serde_json::{Value, json};
use tasker_shared::store::transitions;
use tasker_shared::trace::otlp::{self, ServiceNames};
use tasker_shared::trace::span::TaskSpans;
use tasker_shared::trace::tree;

use super::Which;
use crate::Global;
use crate::run;

/// Spans of one line.
const CHUNK: usize = 2048;

/// Write the spans of tasks to stdout, as they are exported. The log of one task at a time is held
/// in memory, however many there are, and as OTLP JSON never more than a line of its spans.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker trace export ORD-4711 > order.otlp.json
  tasker trace export --since 1h > hour.otlp.json          OTLP JSON, a document a line, as collectors write it
  tasker trace export ORD-4711 --format jaeger-json > order.json   for the upload of Jaeger's page")]
pub struct Export {
    #[command(flatten)]
    which: Which,
    /// What is written
    #[arg(long, value_enum, default_value = "otlp-json")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// OTLP JSON, one document of at most 2,048 spans a line
    OtlpJson,
    /// What Jaeger's query API answers and its page uploads
    JaegerJson,
}

impl Export {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let connected = run::connect(global).await?;
        let config = super::config(&connected.client).await?;
        let names = config.service_names;
        let mut pages = self.which.pages(&connected.client).await?;
        let mut out = BufWriter::new(std::io::stdout().lock());
        let mut first = true;
        if self.format == Format::JaegerJson {
            out.write_all(b"{\"data\":[")?;
        }
        loop {
            let tasks = pages.next(&connected.client).await?;
            if tasks.is_empty() {
                break;
            }
            for task in tasks {
                let mut conn = connected.client.pool().acquire().await?;
                for log in transitions::logs(&mut conn, &[task]).await? {
                    match self.format {
                        Format::OtlpJson => {
                            for part in tree::in_parts(&log, CHUNK) {
                                out.write_all(&otlp::json_line(&part, &names))?;
                            }
                        }
                        Format::JaegerJson => {
                            if !std::mem::replace(&mut first, false) {
                                out.write_all(b",")?;
                            }
                            jaeger(&mut out, &tree::spans(&log), &names)?;
                        }
                    }
                }
            }
        }
        if self.format == Format::JaegerJson {
            out.write_all(b"]}\n")?;
        }
        out.flush()?;
        Ok(())
    }
}

/// One element of `data`. Made of the OTLP JSON, so that both say the same.
fn jaeger(out: &mut impl Write, task: &TaskSpans, names: &ServiceNames) -> anyhow::Result<()> {
    write!(out, "{{\"traceID\":\"{}\",\"spans\":[", otlp::hex(&task.trace_id))?;
    let document = otlp::to_json(std::slice::from_ref(task), names);
    let (mut first, mut processes) = (true, serde_json::Map::new());
    for resource in array(&document["resourceSpans"]) {
        let service = array(&resource["resource"]["attributes"])
            .iter()
            .find(|kv| kv["key"] == "service.name")
            .map_or(Value::Null, |kv| kv["value"]["stringValue"].clone());
        let process = format!("p{}", processes.len() + 1);
        for scope in array(&resource["scopeSpans"]) {
            for span in array(&scope["spans"]) {
                if !std::mem::replace(&mut first, false) {
                    out.write_all(b",")?;
                }
                serde_json::to_writer(&mut *out, &jaeger_span(span, &process))?;
            }
        }
        processes.insert(process, json!({"serviceName": service, "tags": []}));
    }
    write!(out, "],\"processes\":{}}}", Value::Object(processes))?;
    Ok(())
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn jaeger_span(span: &Value, process: &str) -> Value {
    const KINDS: [&str; 6] = ["internal", "internal", "server", "client", "producer", "consumer"];
    let micros = |value: &Value| value.as_str().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0) / 1000;
    let (start, end) = (micros(&span["startTimeUnixNano"]), micros(&span["endTimeUnixNano"]));
    let mut tags = tags(&span["attributes"]);
    let kind = span["kind"].as_u64().and_then(|kind| KINDS.get(usize::try_from(kind).ok()?)).unwrap_or(&"internal");
    tags.push(json!({"key": "span.kind", "type": "string", "value": kind}));
    if span["status"]["code"] == 2 {
        tags.push(json!({"key": "error", "type": "bool", "value": true}));
        tags.push(json!({"key": "otel.status_code", "type": "string", "value": "ERROR"}));
        tags.push(json!({"key": "otel.status_description", "type": "string", "value": span["status"]["message"]}));
    }
    let mut references = Vec::new();
    if !span["parentSpanId"].is_null() {
        references.push(json!({"refType": "CHILD_OF", "traceID": span["traceId"], "spanID": span["parentSpanId"]}));
    }
    references.extend(
        array(&span["links"])
            .iter()
            .map(|link| json!({"refType": "FOLLOWS_FROM", "traceID": link["traceId"], "spanID": link["spanId"]})),
    );
    let logs: Vec<Value> = array(&span["events"])
        .iter()
        .map(|event| {
            let mut fields = self::tags(&event["attributes"]);
            fields.push(json!({"key": "event", "type": "string", "value": event["name"]}));
            json!({"timestamp": micros(&event["timeUnixNano"]), "fields": fields})
        })
        .collect();
    json!({
        "traceID": span["traceId"], "spanID": span["spanId"], "operationName": span["name"],
        "references": references, "startTime": start, "duration": end - start,
        "tags": tags, "logs": logs, "processID": process, "warnings": null,
    })
}

fn tags(attributes: &Value) -> Vec<Value> {
    let tag = |kv: &Value| {
        let (kind, value) = kv["value"].as_object()?.iter().next()?;
        let (kind, value) = match kind.as_str() {
            "intValue" => ("int64", value.as_str()?.parse::<i64>().ok()?.into()),
            "boolValue" => ("bool", value.clone()),
            "doubleValue" => ("float64", value.clone()),
            _ => ("string", value.clone()),
        };
        Some(json!({"key": kv["key"], "type": kind, "value": value}))
    };
    array(attributes).iter().filter_map(tag).collect()
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta, Utc};
    use tasker_shared::trace::span::{Event, Kind, Link, Service, Span};
    use tasker_testing::Trace;

    use super::*;

    #[test]
    fn both_formats_read_back_as_the_same_trace() {
        let at = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::microseconds(1_790_000_000_123_456);
        let span = |id: u8, parent: Option<u8>, service| Span {
            id: [id; 8],
            parent: parent.map(|parent| [parent; 8]),
            parent_is_remote: false,
            name: if parent.is_none() { "task.orchestration" } else { "handler.execution" },
            kind: if parent.is_none() { Kind::Internal } else { Kind::Consumer },
            service,
            start: at,
            end: at + TimeDelta::milliseconds(3),
            attributes: vec![("attempt_number", 2i64.into()), ("outcome", "success".into())],
            links: vec![Link { trace_id: [7; 16], span_id: [1; 8] }],
            events: vec![Event {
                name: "exception".into(),
                at,
                attributes: vec![("exception.type".into(), "E".into())],
            }],
            error: parent.map(|_| "it failed".into()),
            settled_at: at,
        };
        let spans = vec![span(1, None, Service::Orchestration), span(2, Some(1), Service::Worker)];
        let common = vec![("correlation_id", "c".into())];
        let task = TaskSpans { trace_id: [7; 16], trace_flags: 1, tracestate: None, common, spans };
        let names = ServiceNames::default();
        let expected = Trace::of_spans(&task, &names);
        let written = otlp::json_line(&task, &names);
        assert_eq!(Trace::from_json(str::from_utf8(&written).unwrap()).unwrap(), expected);
        let mut written = b"{\"data\":[".to_vec();
        jaeger(&mut written, &task, &names).unwrap();
        written.extend(b"]}");
        assert_eq!(Trace::from_json(str::from_utf8(&written).unwrap()).unwrap(), expected);
    }
}
