use std::sync::atomic::AtomicBool;

use opentelemetry::context::FutureExt;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SpanData, SpanExporter};
use tracing::Instrument;

use super::super::pipeline::Counted;
use super::*;
use crate::trace::context::{Baggage, Traceparent, to_otel_context};

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Captured {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'w> MakeWriter<'w> for Captured {
    type Writer = Self;

    fn make_writer(&'w self) -> Self {
        self.clone()
    }
}

/// A subscriber on this thread whose lines and spans can be read.
struct Bench {
    lines: Captured,
    spans: InMemorySpanExporter,
    provider: SdkTracerProvider,
    mode: Arc<Mode>,
    _current: tracing::subscriber::DefaultGuard,
}

impl Bench {
    fn start(format: LogFormat, filter: &str, detail: Option<Detail>) -> Self {
        let lines = Captured::default();
        let spans = InMemorySpanExporter::default();
        let mode = Arc::new(Mode::default());
        if let Some(detail) = detail {
            mode.set(&TraceConfig { enabled: true, detail, ..TraceConfig::default() });
        }
        let provider =
            SdkTracerProvider::builder().with_simple_exporter(spans.clone()).with_sampler(mode.sampler()).build();
        let writer = LogLines { format, ansi: false, writer: lines.clone() };
        let tracer = detail.map(|_| (provider.tracer("test"), mode.clone()));
        let subscriber = subscriber(writer, EnvFilter::new(filter), tracer);
        let current = tracing::subscriber::set_default(subscriber);
        Self { lines, spans, provider, mode, _current: current }
    }

    fn text(&self) -> String {
        String::from_utf8(self.lines.0.lock().unwrap().clone()).unwrap()
    }

    fn json(&self) -> Vec<serde_json::Value> {
        self.text().lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
    }

    fn spans(&self) -> Vec<SpanData> {
        self.provider.force_flush().unwrap();
        self.spans.get_finished_spans().unwrap()
    }
}

fn handler_context(traceparent: &str) -> OtelContext {
    let parent: Traceparent = traceparent.parse().unwrap();
    to_otel_context(&parent, None, &Baggage::default())
}

fn executor_span() -> tracing::Span {
    tracing::info_span!(
        target: "tasker_worker::executor",
        "execute",
        correlation_id = "order-4711",
        task_uuid = %uuid::Uuid::from_u128(7),
        trace_id = "from the field",
        span_id = "from the field",
    )
}

/// What a worker does around a handler: spans of ours outside and inside
/// of the handler's context, the user's own below.
async fn handled(traceparent: &str) {
    let handler = async {
        async {
            tracing::info_span!(target: "shop::payments", "charge", card = "visa").in_scope(|| {
                tracing::info_span!(target: "sqlx::query", "query").in_scope(|| {
                    tracing::info_span!(target: "shop::payments", "inner").in_scope(|| {
                        tracing::info!(target: "shop::payments", amount = 12, "charged");
                        tracing::info!(target: "tasker_worker", "noise");
                    });
                });
            });
            tokio::task::yield_now().await;
        }
        .instrument(tracing::info_span!(target: "tasker_worker::executor", "inside"))
        .await;
        tracing::info!(target: "shop::payments", "done");
    };
    handler.with_context(handler_context(traceparent)).instrument(executor_span()).await;
}

#[tokio::test]
async fn user_spans_hang_below_the_attempt_and_ours_are_not_exported() {
    let bench = Bench::start(LogFormat::Json, "info", Some(Detail::Tree));
    handled(PARENT).await;
    let spans = bench.spans();
    let names: Vec<_> = spans.iter().map(|s| s.name.as_ref()).collect();
    assert_eq!(names, ["inner", "charge"]);
    let [inner, charge] = spans.as_slice() else { unreachable!() };
    assert_eq!(charge.span_context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(charge.parent_span_id.to_string(), "00f067aa0ba902b7");
    assert!(charge.parent_span_is_remote);
    assert_eq!(inner.parent_span_id, charge.span_context.span_id());
    assert_eq!(inner.span_context.trace_id(), charge.span_context.trace_id());
    let events: Vec<_> = inner.events.iter().map(|e| e.name.as_ref()).collect();
    assert_eq!(events, ["charged"]);
    let keys: Vec<_> = charge.attributes.iter().map(|a| a.key.as_str()).collect();
    assert_eq!(keys, ["code.file.path", "code.module.name", "code.line.number", "card"]);
}

#[tokio::test]
async fn tracing_is_switched_off_and_on_while_the_process_runs() {
    let bench = Bench::start(LogFormat::Json, "info", Some(Detail::Tree));
    let mut names = Vec::new();
    for (enabled, detail) in [(true, Detail::Tree), (false, Detail::Full), (true, Detail::Full)] {
        bench.mode.set(&TraceConfig { enabled, detail, ..TraceConfig::default() });
        tracing::callsite::rebuild_interest_cache();
        bench.spans.reset();
        handled(PARENT).await;
        names.push(bench.spans().into_iter().map(|span| span.name.into_owned()).collect::<Vec<_>>());
    }
    assert_eq!(names[0], ["inner", "charge"]);
    assert_eq!(names[1], [""; 0]);
    assert_eq!(names[2], ["inner", "charge", "inside", "execute"]);
}

#[tokio::test]
async fn the_stored_decision_rules_user_spans() {
    let bench = Bench::start(LogFormat::Json, "info", Some(Detail::Tree));
    handled(&PARENT.replace("-01", "-00")).await;
    assert_eq!(bench.spans(), []);
    // Lines of an unsampled task bear its ids all the same.
    assert_eq!(bench.json()[0]["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
}

#[tokio::test]
async fn full_detail_exports_our_spans_but_no_plumbing() {
    let bench = Bench::start(LogFormat::Json, "info", Some(Detail::Full));
    handled(PARENT).await;
    let names: Vec<_> = bench.spans().into_iter().map(|s| s.name.into_owned()).collect();
    assert_eq!(names, ["inner", "charge", "inside", "execute"]);
}

#[tokio::test]
async fn json_lines_carry_the_ids_at_the_top() {
    let bench = Bench::start(LogFormat::Json, "info", Some(Detail::Tree));
    executor_span().in_scope(|| tracing::info!(target: "tasker_worker", attempt = 2, "claimed"));
    handled(PARENT).await;
    let lines = bench.json();
    let spans = bench.spans();
    let claimed = &lines[0];
    assert_eq!(claimed["message"], "claimed");
    assert_eq!(claimed["level"], "INFO");
    assert_eq!(claimed["attempt"], 2);
    assert_eq!(claimed["trace_id"], "from the field");
    let charged = lines.iter().find(|l| l["message"] == "charged").unwrap();
    assert_eq!(charged["amount"], 12);
    assert_eq!(charged["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(charged["span_id"], spans[0].span_context.span_id().to_string());
    let done = lines.iter().find(|l| l["message"] == "done").unwrap();
    assert_eq!(done["span_id"], "00f067aa0ba902b7");
    for line in &lines {
        assert_eq!(line["correlation_id"], "order-4711", "{line}");
        assert_eq!(line["task_uuid"], "00000000-0000-0000-0000-000000000007", "{line}");
    }
}

#[tokio::test]
async fn without_tracing_lines_still_bear_the_context_of_the_handler() {
    let bench = Bench::start(LogFormat::Json, "info", None);
    handled(PARENT).await;
    assert_eq!(bench.spans(), []);
    let lines = bench.json();
    let charged = lines.iter().find(|l| l["message"] == "charged").unwrap();
    assert_eq!(charged["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(charged["span_id"], "00f067aa0ba902b7");
    assert_eq!(charged["correlation_id"], "order-4711");
}

#[test]
fn pretty_lines_carry_the_ids_and_cannot_be_forged() {
    let bench = Bench::start(LogFormat::Pretty, "info", None);
    executor_span().in_scope(|| {
        tracing::info!(target: "tasker_worker", who = "a b", "said \"{}\"", "x\n2026 ERROR forged \x1b[31m");
    });
    let text = bench.text();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(!text.contains('\x1b'), "{text}");
    assert!(text.contains("  INFO tasker_worker: said \"x\\n2026 ERROR forged \\u{1b}[31m\" who=\"a b\""), "{text}");
    assert!(text.contains(" correlation_id=order-4711 "), "{text}");
    assert!(text.contains(" task_uuid=00000000-0000-0000-0000-000000000007 "), "{text}");
    assert!(text.contains(" trace_id=\"from the field\" "), "{text}");
}

#[test]
fn a_warning_bears_its_ids_when_only_warnings_are_shown() {
    let bench = Bench::start(LogFormat::Json, "warn", None);
    executor_span().in_scope(|| {
        tracing::info!(target: "tasker_worker", "not shown");
        tracing::warn!(target: "tasker_worker", "shown");
    });
    let lines = bench.json();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["correlation_id"], "order-4711");
}

#[test]
fn the_innermost_value_wins_and_late_values_count() {
    let bench = Bench::start(LogFormat::Json, "info", None);
    let outer = tracing::info_span!(target: "tasker_worker", "outer", step = "outer", late = tracing::field::Empty);
    outer.record("late", 1);
    outer.record("late", 2);
    let inner = tracing::info_span!(target: "tasker_worker", parent: &outer, "inner", step = "inner", level = 3);
    inner.in_scope(|| tracing::info!(target: "tasker_worker", nan = f64::NAN, ok = true, "now"));
    let line = &bench.json()[0];
    assert_eq!(line["step"], "inner");
    assert_eq!(line["late"], 2);
    assert_eq!((&line["level"], &line["field.level"]), (&"INFO".into(), &3.into()));
    assert_eq!((&line["nan"], &line["ok"]), (&"NaN".into(), &true.into()));
}

/// Fails as long as it is told to.
#[derive(Debug, Default)]
struct Moody(Arc<AtomicBool>);

impl SpanExporter for Moody {
    async fn export(&self, _: Vec<SpanData>) -> OTelSdkResult {
        if self.0.load(Ordering::Relaxed) {
            return Err(opentelemetry_sdk::error::OTelSdkError::InternalFailure("gone".into()));
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_collector_that_is_gone_is_one_line_and_its_return_another() {
    let bench = Bench::start(LogFormat::Json, "info", None);
    let (counts, fails) = (Arc::new(Counts::default()), Arc::new(AtomicBool::new(false)));
    let exporter = Counted {
        inner: Moody(fails.clone()),
        counts: counts.clone(),
        waiting: Arc::default(),
        endpoint: "http://c".into(),
    };
    for failing in [false, true, true, true, false, false, true] {
        fails.store(failing, Ordering::Relaxed);
        assert_eq!(exporter.export(Vec::new()).await.is_err(), failing);
    }
    let lines = bench.json();
    let levels: Vec<_> = lines.iter().map(|l| l["level"].as_str().unwrap()).collect();
    assert_eq!(levels, ["WARN", "INFO", "WARN"], "{lines:?}");
    assert_eq!(lines[0]["endpoint"], "http://c");
}

#[test]
fn the_log_filter_comes_from_the_environment_and_a_bad_one_is_told() {
    let read = |vars: &'static [(&str, &str)]| {
        let (filter, complaint) =
            env_filter(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()));
        (filter.to_string(), complaint)
    };
    let (default, none) = read(&[]);
    assert!(default.contains("info") && default.contains("opentelemetry_sdk=off"), "{default}");
    assert_eq!(none, None);
    assert!(read(&[("RUST_LOG", "debug"), ("TASKER_LOG", "error")]).0.contains("error"));
    assert!(read(&[("RUST_LOG", "debug"), ("TASKER_LOG", " ")]).0.contains("debug"));
    let (fallback, complaint) = read(&[("TASKER_LOG", "x=y=z")]);
    assert!(fallback.contains("info"), "{fallback}");
    assert!(complaint.unwrap().starts_with("TASKER_LOG=x=y=z is ignored"));
}
