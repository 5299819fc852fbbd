//! Reads traces back from a backend: Jaeger's query API, Tempo's, or anything that answers OTLP JSON.
//!
//! A backend is a guest here: it is asked briefly, asked again with growing pauses, left alone for
//! a while when it fails, and whatever it does the log answers without it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Map, Value as Json};

use super::read::{Attributes, Flat, ReadEvent, ReadLink};
use tasker_shared::metrics::{OfReason, metrics};
use tasker_shared::redact::Policy;
use tasker_shared::trace::config::TraceConfig;
use tasker_shared::trace::otlp::hex;
use tasker_shared::trace::span::TraceId;
use tasker_shared::trace::transport::tls_config;

/// The longest that one trace is waited for, all tries together.
const LONGEST: Duration = Duration::from_secs(3);
/// Pauses between the tries of one question.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(400)];
/// Questions that fail one after another until the backend is left alone.
const TOO_MANY: u32 = 3;
/// How long it is then left alone: doubled each time, up to the second.
const LEFT_ALONE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_mins(1));
/// The most bytes of an answer.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// Why the spans of a backend are not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No connection, or it broke.
    #[error("it cannot be reached")]
    Unreachable,
    /// No answer in time.
    #[error("it did not answer in time")]
    Timeout,
    /// An answer that is neither spans nor "not found".
    #[error("it refused the question")]
    Refused,
    /// An answer that is no trace.
    #[error("its answer is no trace")]
    BadAnswer,
    /// It failed several times and is left alone for a moment.
    #[error("it failed several times and is not asked for a moment")]
    LeftAlone,
}

impl Problem {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Unreachable, Self::Timeout, Self::Refused, Self::BadAnswer, Self::LeftAlone];

    /// For metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Refused => "refused",
            Self::BadAnswer => "bad_answer",
            Self::LeftAlone => "left_alone",
        }
    }
}

/// One backend, and how it has behaved.
#[derive(Debug)]
pub struct Backend {
    client: reqwest::Client,
    url: String,
    breaker: Mutex<Breaker>,
}

#[derive(Debug, Default)]
struct Breaker {
    failures: u32,
    until: Option<Instant>,
}

impl Breaker {
    fn lets_through(&mut self, now: Instant) -> bool {
        match self.until {
            Some(until) if now < until => false,
            Some(_) => {
                // One question tries it; the others wait for its answer or the next time.
                self.until = Some(now + LONGEST);
                true
            }
            None => true,
        }
    }

    fn note(&mut self, worked: bool, now: Instant) {
        if worked {
            *self = Self::default();
            return;
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures >= TOO_MANY {
            let doubled = LEFT_ALONE.0.saturating_mul(1 << (self.failures - TOO_MANY).min(6));
            self.until = Some(now + doubled.min(LEFT_ALONE.1));
        }
    }
}

impl Backend {
    /// The backend that `config` names; `None` if it names none, or there is no way to it.
    pub fn of(config: &TraceConfig) -> Option<Self> {
        let url = config.query_url.clone()?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls_config(config).ok()?)
            .redirect(reqwest::redirect::Policy::none())
            .timeout(LONGEST)
            .build()
            .ok()?;
        Some(Self { client, url, breaker: Mutex::default() })
    }

    /// What names it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The spans that it has of a trace; none if it does not know it.
    pub async fn trace(&self, id: TraceId, policy: &Policy) -> Result<Vec<Flat>, Problem> {
        let began = Instant::now();
        let answer = self.asked(id).await;
        if answer != Err(Problem::LeftAlone) {
            metrics().trace_fetch.observe(began.elapsed().as_secs_f64(), None, None);
        }
        let answer = answer.and_then(|text| {
            let Some(text) = text else { return Ok(Vec::new()) };
            read(&text, &hex(&id), policy).ok_or(Problem::BadAnswer)
        });
        if let Err(problem) = &answer {
            metrics().trace_fetch_failures.of(&OfReason { reason: problem.word() }).inc();
        }
        answer
    }

    async fn asked(&self, id: TraceId) -> Result<Option<String>, Problem> {
        if !self.breaker.lock().unwrap_or_else(PoisonError::into_inner).lets_through(Instant::now()) {
            return Err(Problem::LeftAlone);
        }
        let tries = async {
            let mut pauses = PAUSES.into_iter();
            loop {
                match self.ask(id).await {
                    Err(Problem::Unreachable | Problem::Timeout | Problem::Refused) if pauses.len() > 0 => {
                        tokio::time::sleep(pauses.next().unwrap_or_default()).await;
                    }
                    answer => return answer,
                }
            }
        };
        let answer = tokio::time::timeout(LONGEST, tries).await.unwrap_or(Err(Problem::Timeout));
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner).note(answer.is_ok(), Instant::now());
        answer
    }

    async fn ask(&self, id: TraceId) -> Result<Option<String>, Problem> {
        let url = if self.url.contains("{trace_id}") {
            self.url.replace("{trace_id}", &hex(&id))
        } else {
            // Jaeger's and Tempo's are the same; Jaeger's v3 is named with its path.
            let base = if self.url.ends_with("/api/v3") { "traces" } else { "api/traces" };
            format!("{}/{base}/{}", self.url, hex(&id))
        };
        let sent = self.client.get(url).header("accept", "application/json").send().await;
        let mut answer =
            sent.map_err(|error| if error.is_timeout() { Problem::Timeout } else { Problem::Unreachable })?;
        if answer.status() == reqwest::StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !answer.status().is_success() {
            return Err(Problem::Refused);
        }
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|_| Problem::Unreachable)? {
            if body.len() + chunk.len() > MAX_ANSWER {
                return Err(Problem::BadAnswer);
            }
            body.extend_from_slice(&chunk);
        }
        String::from_utf8(body).map(Some).map_err(|_| Problem::BadAnswer)
    }
}

/// The spans of one trace in OTLP JSON, Tempo's JSON or Jaeger's; `None` if it is none of them.
fn read(text: &str, trace_id: &str, policy: &Policy) -> Option<Vec<Flat>> {
    let document: Json = serde_json::from_str(text).ok()?;
    let document = document.get("result").or_else(|| document.get("trace")).unwrap_or(&document);
    let spans = if let Some(traces) = document.get("data").and_then(Json::as_array) {
        traces.iter().flat_map(|trace| jaeger(trace, policy)).collect::<Vec<_>>()
    } else {
        let resources = ["resourceSpans", "batches"].iter().find_map(|key| document.get(key)?.as_array())?;
        resources.iter().flat_map(|resource| otlp(resource, policy)).collect()
    };
    Some(spans.into_iter().filter(|span| *span.trace_id == *trace_id).collect())
}

fn list<'a>(value: &'a Json, key: &str) -> &'a [Json] {
    value.get(key).and_then(Json::as_array).map_or(&[], Vec::as_slice)
}

fn text(value: &Json, key: &str) -> String {
    value.get(key).and_then(Json::as_str).unwrap_or_default().to_owned()
}

/// A number, or one that is written as text.
fn number(value: Option<&Json>) -> Option<i64> {
    let value = value?;
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

fn clean(policy: &Policy, key: &str, value: Json) -> Option<Json> {
    match value {
        Json::String(text) => Some(Json::String(policy.attribute(key, &text)?.into_owned())),
        other => Some(other),
    }
}

/// Hex, also of an id that came as base64.
fn id(text: &str) -> Option<String> {
    let is_hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
    match text.len() {
        0 => None,
        16 | 32 if is_hex(text) => Some(text.to_ascii_lowercase()),
        // Jaeger leaves leading zeros out.
        1..16 if is_hex(text) && !text.ends_with('=') => Some(format!("{:0>16}", text.to_ascii_lowercase())),
        17..32 if is_hex(text) && !text.ends_with('=') => Some(format!("{:0>32}", text.to_ascii_lowercase())),
        _ => {
            let (mut bits, mut count, mut bytes) = (0_u32, 0, Vec::new());
            for b in text.trim_end_matches('=').bytes() {
                let six = match b {
                    b'A'..=b'Z' => b - b'A',
                    b'a'..=b'z' => b - b'a' + 26,
                    b'0'..=b'9' => b - b'0' + 52,
                    b'+' | b'-' => 62,
                    b'/' | b'_' => 63,
                    _ => return None,
                };
                bits = bits << 6 | u32::from(six);
                count += 6;
                if count >= 8 {
                    count -= 8;
                    bytes.push(u8::try_from(bits >> count & 0xff).ok()?);
                }
            }
            matches!(bytes.len(), 8 | 16).then(|| hex(&bytes))
        }
    }
}

fn otlp_attributes(value: &Json, policy: &Policy) -> Map<String, Json> {
    list(value, "attributes")
        .iter()
        .filter_map(|pair| {
            let (key, value) = (text(pair, "key"), pair.get("value")?);
            let plain = match value.as_object()?.iter().next()? {
                (kind, Json::String(number)) if kind == "intValue" => Json::from(number.parse::<i64>().ok()?),
                (_, other) => other.clone(),
            };
            let plain = clean(policy, &key, plain)?;
            Some((key, plain))
        })
        .collect()
}

fn otlp(resource: &Json, policy: &Policy) -> Vec<Flat> {
    let service = resource.get("resource").map(|resource| otlp_attributes(resource, policy)).unwrap_or_default();
    let service = service.get("service.name").and_then(Json::as_str).unwrap_or_default();
    let scopes = list(resource, "scopeSpans").iter().chain(list(resource, "instrumentationLibrarySpans"));
    scopes.flat_map(|scope| list(scope, "spans")).filter_map(|span| otlp_span(service, span, policy)).collect()
}

fn otlp_span(service: &str, span: &Json, policy: &Policy) -> Option<Flat> {
    let nanos = |value: &Json, key: &str| {
        let nanos = number(value.get(key))?;
        Some(DateTime::<Utc>::from_timestamp_nanos(nanos))
    };
    let status = span.get("status");
    let failed =
        status.and_then(|status| status.get("code")).is_some_and(|code| code == 2 || code == "STATUS_CODE_ERROR");
    let kind = span.get("kind").map(|kind| kind.as_str().map_or_else(|| kind.to_string(), str::to_owned));
    Some(Flat {
        trace_id: id(&text(span, "traceId"))?.into(),
        span_id: id(&text(span, "spanId"))?,
        parent_span_id: id(&text(span, "parentSpanId")).filter(|id| id.bytes().any(|b| b != b'0')),
        name: text(span, "name").into(),
        service: service.into(),
        kind: match kind.unwrap_or_default().trim_start_matches("SPAN_KIND_") {
            "2" | "SERVER" => "server",
            "3" | "CLIENT" => "client",
            "4" | "PRODUCER" => "producer",
            "5" | "CONSUMER" => "consumer",
            _ => "internal",
        },
        start: nanos(span, "startTimeUnixNano")?,
        end: nanos(span, "endTimeUnixNano")?,
        attributes: Attributes::Backend(otlp_attributes(span, policy)),
        events: list(span, "events")
            .iter()
            .filter_map(|event| {
                Some(ReadEvent {
                    name: text(event, "name"),
                    at: nanos(event, "timeUnixNano")?,
                    attributes: otlp_attributes(event, policy),
                })
            })
            .collect(),
        links: list(span, "links")
            .iter()
            .filter_map(|link| {
                Some(ReadLink { trace_id: id(&text(link, "traceId"))?, span_id: id(&text(link, "spanId"))? })
            })
            .collect(),
        error: failed.then(|| {
            let message = status.map(|status| text(status, "message")).unwrap_or_default();
            policy.text(&message).into_owned()
        }),
        of_log: false,
    })
}

fn jaeger(trace: &Json, policy: &Policy) -> Vec<Flat> {
    let tags = |tags: &[Json]| -> Map<String, Json> {
        tags.iter()
            .filter_map(|tag| {
                let key = text(tag, "key");
                let value = clean(policy, &key, tag.get("value")?.clone())?;
                Some((key, value))
            })
            .collect()
    };
    let micros = |value: Option<&Json>| DateTime::<Utc>::from_timestamp_micros(number(value)?);
    let span = |span: &Json| {
        let process = trace.get("processes").and_then(|all| all.get(text(span, "processID")));
        let attributes = tags(list(span, "tags"));
        let trace_id = id(&text(span, "traceID"))?;
        let start = micros(span.get("startTime"))?;
        let took = TimeDelta::microseconds(number(span.get("duration")).unwrap_or(0).max(0));
        let references = list(span, "references");
        let parent = references
            .iter()
            .find(|link| text(link, "refType") == "CHILD_OF" && id(&text(link, "traceID")).as_ref() == Some(&trace_id));
        let is_parent = |link: &&Json| !parent.is_some_and(|parent| std::ptr::eq(parent, *link));
        Some(Flat {
            span_id: id(&text(span, "spanID"))?,
            parent_span_id: parent.and_then(|link| id(&text(link, "spanID"))),
            name: text(span, "operationName").into(),
            service: process.map(|process| text(process, "serviceName")).unwrap_or_default().into(),
            kind: match attributes.get("span.kind").and_then(Json::as_str) {
                Some("server") => "server",
                Some("client") => "client",
                Some("producer") => "producer",
                Some("consumer") => "consumer",
                _ => "internal",
            },
            start,
            // A backend that names an end beyond the calendar names none.
            end: start.checked_add_signed(took).unwrap_or(start),
            events: list(span, "logs")
                .iter()
                .filter_map(|log| {
                    let mut attributes = tags(list(log, "fields"));
                    let name = attributes.remove("event").and_then(|name| name.as_str().map(str::to_owned));
                    Some(ReadEvent { name: name.unwrap_or_default(), at: micros(log.get("timestamp"))?, attributes })
                })
                .collect(),
            links: references
                .iter()
                .filter(is_parent)
                .filter_map(|link| {
                    Some(ReadLink { trace_id: id(&text(link, "traceID"))?, span_id: id(&text(link, "spanID"))? })
                })
                .collect(),
            error: (attributes.get("error") == Some(&Json::Bool(true))).then(|| {
                let said = attributes.get("otel.status_description").and_then(Json::as_str);
                policy.text(said.unwrap_or_default()).into_owned()
            }),
            trace_id: trace_id.into(),
            attributes: Attributes::Backend(attributes),
            of_log: false,
        })
    };
    list(trace, "spans").iter().filter_map(span).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_backend_that_fails_is_left_alone_for_longer_each_time_and_then_tried_once() {
        let (mut breaker, start) = (Breaker::default(), Instant::now());
        for _ in 0..TOO_MANY {
            assert!(breaker.lets_through(start));
            breaker.note(false, start);
        }
        assert!(!breaker.lets_through(start));
        let later = start + LEFT_ALONE.0;
        assert!(breaker.lets_through(later), "one tries");
        assert!(!breaker.lets_through(later), "the others do not");
        breaker.note(false, later);
        assert!(!breaker.lets_through(later + LEFT_ALONE.0), "twice as long");
        assert!(breaker.lets_through(later + LEFT_ALONE.0 * 2));
        breaker.note(true, later + LEFT_ALONE.0 * 2);
        assert!(breaker.lets_through(later + LEFT_ALONE.0 * 2) && breaker.lets_through(later + LEFT_ALONE.0 * 2));
    }

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    #[test]
    fn the_same_span_is_read_from_each_form() {
        let policy = tasker_shared::redact::policy();
        let otlp = json!({"resourceSpans": [{
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]},
            "scopeSpans": [{"spans": [{
                "traceId": TRACE, "spanId": "00f067aa0ba902b7", "parentSpanId": "00f067aa0ba902b8", "name": "charge",
                "kind": 3, "startTimeUnixNano": "1700000000000000000", "endTimeUnixNano": "1700000000002000000",
                "attributes": [{"key": "n", "value": {"intValue": "7"}}], "status": {"code": 2, "message": "no"},
            }]}],
        }]});
        let mut tempo = json!({"batches": otlp["resourceSpans"]});
        let span = &mut tempo["batches"][0]["scopeSpans"][0]["spans"][0];
        span["traceId"] = json!("S/kvNXezTaajzpKdDg5HNg==");
        span["spanId"] = json!("APBnqgupArc=");
        span["parentSpanId"] = json!("APBnqgupArg=");
        span["kind"] = json!("SPAN_KIND_CLIENT");
        span["status"]["code"] = json!("STATUS_CODE_ERROR");
        let jaeger = json!({"data": [{
            "processes": {"p1": {"serviceName": "shop"}},
            "spans": [{
                "traceID": TRACE, "spanID": "f067aa0ba902b7", "operationName": "charge", "processID": "p1",
                "references": [{"refType": "CHILD_OF", "traceID": TRACE, "spanID": "00f067aa0ba902b8"}],
                "startTime": 1_700_000_000_000_000_i64, "duration": 2000,
                "tags": [{"key": "n", "value": 7}, {"key": "span.kind", "value": "client"}, {"key": "error", "value": true},
                         {"key": "otel.status_description", "value": "no"}],
            }],
        }]});
        let v3 = json!({"result": otlp});
        for document in [&otlp, &tempo, &jaeger, &v3] {
            let spans = read(&document.to_string(), TRACE, &policy).unwrap();
            assert_eq!(spans.len(), 1, "{document}");
            let span = &spans[0];
            assert_eq!((&*span.name, &*span.service, span.kind), ("charge", "shop", "client"));
            assert_eq!(span.span_id, "00f067aa0ba902b7");
            assert_eq!(span.parent_span_id.as_deref(), Some("00f067aa0ba902b8"));
            assert_eq!((span.end - span.start).num_milliseconds(), 2);
            assert_eq!((span.attributes.int("n"), span.error.as_deref()), (Some(7), Some("no")));
        }
        let mut endless = jaeger.clone();
        endless["data"][0]["spans"][0]["duration"] = json!(i64::MAX);
        let spans = read(&endless.to_string(), TRACE, &policy).unwrap();
        assert_eq!(spans[0].end, spans[0].start, "no calendar has that end");
        assert_eq!(read("<html>", TRACE, &policy), None);
        assert_eq!(read("{}", TRACE, &policy), None);
        let other = "0".repeat(31) + "1";
        assert_eq!(read(&otlp.to_string(), &other, &policy).unwrap(), []);
    }
}
