//! The user's spans hang below their attempt.

use std::collections::HashMap;
use std::sync::OnceLock;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use serde_json::{Value, json};
use tasker_worker::{ModelCall, StepContext, StepError, Usage};
use tracing::Instrument as _;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};

use crate::bench::{Bench, TRACE_ID, start, step};

/// One subscriber for the whole test binary, as the product installs it: our
/// own spans stay out of the user's trace.
fn exporter() -> &'static InMemorySpanExporter {
    static EXPORTER: OnceLock<InMemorySpanExporter> = OnceLock::new();
    EXPORTER.get_or_init(|| {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        opentelemetry::global::set_tracer_provider(provider.clone());
        let spans = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("test"))
            .with_filter(filter_fn(|meta| meta.target().starts_with("worker::spans")));
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(spans))
            .expect("the first subscriber");
        exporter
    })
}

async fn user_code(ctx: StepContext, _: Value) -> Result<HashMap<String, String>, StepError> {
    let mark = ctx.step_uuid().to_string();
    let outer = tracing::info_span!("outer", mark);
    async {
        tokio::task::yield_now().await;
        tracing::info_span!("inner", mark).in_scope(|| ());
        let mut headers = HashMap::new();
        ctx.inject(&mut headers);
        Ok(headers)
    }
    .instrument(outer)
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_of_a_handler_are_children_of_its_attempt() {
    let exporter = exporter();
    let bench = Bench::new().await;
    let (_, steps) = bench.enqueue(&vec![step("user_code", json!(null)); 5]).await;
    let worker = start(bench.worker().handler("user_code", user_code));
    let mut outputs = Vec::new();
    for uuid in &steps {
        outputs.push(bench.reported(*uuid).await.output.expect("headers"));
    }
    worker.drained().await;

    let all = exporter.get_finished_spans().expect("spans");
    let trace_id = u128::from_str_radix(TRACE_ID, 16).expect("hex").to_be_bytes();
    for (uuid, headers) in steps.iter().zip(outputs) {
        let mark = uuid.to_string();
        let find = |name: &str| -> &SpanData {
            let has_mark = |span: &&SpanData| span.attributes.iter().any(|pair| pair.value.as_str() == mark);
            all.iter().filter(|span| span.name == name).find(has_mark).expect(name)
        };
        let (outer, inner) = (find("outer"), find("inner"));
        let attempt =
            tasker_shared::trace::ids::span_id(&trace_id, *uuid, 0, 1, tasker_shared::trace::ids::SpanKey::Handler, 0);
        assert_eq!(outer.parent_span_id.to_bytes(), attempt, "below handler.execution");
        assert!(outer.parent_span_is_remote);
        assert_eq!(outer.span_context.trace_id().to_bytes(), trace_id);
        assert_eq!(inner.parent_span_id, outer.span_context.span_id());
        assert_eq!(
            headers["traceparent"],
            format!("00-{TRACE_ID}-{}-01", outer.span_context.span_id()),
            "the current span is injected"
        );
        assert_eq!(headers["baggage"], "correlation_id=order-4711");
    }
}

async fn with_helpers(ctx: StepContext, _: Value) -> Result<(), StepError> {
    let outer = ctx.span("with_helpers");
    let outcome: Result<(), std::num::ParseIntError> = outer
        .within(async {
            let call = ctx.external_call("rates.lookup", "rates.example.com");
            call.http_response(503).set("password", "hunter2");
            call.finish();
            ctx.database_call("postgresql", "SELECT", "orders").finish();
            let tool = ctx.tool_call("search");
            tool.set("process.command", "search --token hunter2 shoes");
            tool.finish();
            let model = ctx.model_call(ModelCall { operation: "chat", provider: "example", model: "large" });
            model.usage(Usage { input_tokens: 12, output_tokens: 3 }).messages(&json!("asked"), &json!("answered"));
            model.finish();
            drop(ctx.span("forgotten"));
            ctx.span("parse").run(async { "x".parse::<i32>().map(drop) }).await
        })
        .await;
    assert!(outcome.is_err());
    outer.finish();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn helpers_make_spans_by_the_conventions_and_none_stays_open() {
    let exporter = exporter();
    let bench = Bench::new().await;
    let (task, steps) = bench.enqueue(&[step("with_helpers", json!(null))]).await;
    let worker = start(bench.worker().handler("with_helpers", with_helpers));
    let attempt = bench.reported(steps[0]).await;
    assert_eq!(attempt.outcome.as_deref(), Some("success"), "{:?}", attempt.error);
    worker.drained().await;

    let all = exporter.get_finished_spans().expect("spans");
    let task = task.to_string();
    let text = |span: &SpanData, key: &str| {
        let found = span.attributes.iter().find(|pair| pair.key.as_str() == key);
        found.map(|pair| pair.value.as_str().into_owned())
    };
    let of_task: Vec<&SpanData> = all.iter().filter(|span| text(span, "task_uuid").as_ref() == Some(&task)).collect();
    let find = |name: &str| *of_task.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no span {name}"));
    let outer = find("with_helpers");
    for span in &of_task {
        assert_eq!(text(span, "correlation_id").as_deref(), Some("order-4711"), "{}", span.name);
        assert!(span.name == "with_helpers" || span.parent_span_id == outer.span_context.span_id(), "{}", span.name);
    }
    let shown: Vec<String> = of_task
        .iter()
        .map(|span| {
            let own = |key: &&opentelemetry::KeyValue| {
                !["correlation_id", "task_uuid", "namespace"].contains(&key.key.as_str())
            };
            let own = span.attributes.iter().filter(own).map(|pair| format!("{}={}", pair.key, pair.value.as_str()));
            format!("{} {:?} {}", span.name, span.span_kind, own.collect::<Vec<_>>().join(" "))
        })
        .collect();
    assert_eq!(
        shown,
        [
            "rates.lookup Client server.address=rates.example.com http.response.status_code=503 error.type=503 password=[redacted]",
            "SELECT orders Client db.system.name=postgresql db.operation.name=SELECT db.collection.name=orders db.query.summary=SELECT orders",
            "execute_tool search Internal gen_ai.operation.name=execute_tool gen_ai.tool.name=search process.command=search --token [redacted] shoes",
            "chat large Client gen_ai.operation.name=chat gen_ai.provider.name=example gen_ai.request.model=large gen_ai.usage.input_tokens=12 gen_ai.usage.output_tokens=3",
            "forgotten Internal error.type=abandoned",
            "parse Internal error.type=ParseIntError",
            "with_helpers Internal ",
        ]
    );
    let parse = find("parse");
    assert_eq!(parse.events.events[0].name, "exception");
    assert!(format!("{:?}", parse.status).contains("invalid digit found in string"));
    let usage: Option<Value> = bench.ask("select usage from tasker.attempts").await;
    assert_eq!(usage, Some(json!({"gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 3})));
}
