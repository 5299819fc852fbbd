//! The user's spans hang below their attempt.

use std::collections::HashMap;
use std::sync::OnceLock;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use serde_json::{Value, json};
use tasker_worker::{StepContext, StepError};
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
