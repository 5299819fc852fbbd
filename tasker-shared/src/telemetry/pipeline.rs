//! Where live spans go: the SDK's batch processor, its exporter, and a count of what becomes of
//! them. A pipeline is put in the place of another while the process runs, and never waits for
//! the program's own runtime.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use opentelemetry::{Context as OtelContext, KeyValue};
use opentelemetry_otlp::{WithExportConfig, WithHttpConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanExporter, SpanProcessor};

use crate::redact;
use crate::trace::config::{Compression, Protocol, TraceConfig};
use crate::trace::{clean, transport};

/// Longest wait for one export of live spans.
pub(super) const LIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Which kind of process this is; gives live spans their `service.name`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Role {
    Orchestrator,
    Worker,
    Cli,
}

/// Live spans cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration names no usable way to the collector.
    #[error(transparent)]
    Transport(#[from] transport::Error),
    /// The SDK's exporter refused its configuration.
    #[error("the exporter of live spans cannot be built: {0}")]
    Exporter(String),
    /// No thread for the exporter.
    #[error("the exporter of live spans has no thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// The pipeline that takes spans at the moment.
#[derive(Debug, Default)]
pub(super) struct Current(pub RwLock<Option<Pipeline>>);

/// Hands spans to the current pipeline.
#[derive(Debug)]
pub(super) struct Hand(pub Arc<Current>);

impl Hand {
    fn with<T>(&self, otherwise: T, act: impl FnOnce(&Pipeline) -> T) -> T {
        let current = self.0.0.read().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map_or(otherwise, act)
    }
}

impl SpanProcessor for Hand {
    fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &OtelContext) {}

    fn on_end(&self, span: SpanData) {
        self.with((), |pipeline| pipeline.take(span));
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.with(Ok(()), |pipeline| pipeline.processor.force_flush())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.with(Ok(()), |pipeline| pipeline.processor.shutdown_with_timeout(timeout))
    }
}

/// The SDK's batch processor, its exporter, and the threads they need.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub processor: BatchSpanProcessor,
    counts: Arc<Counts>,
    /// Spans in its queue, and how many may be.
    waiting: Arc<AtomicUsize>,
    room: usize,
    /// Drives gRPC. A runtime of its own, so that a flush that blocks a
    /// thread of the program's runtime cannot wait for itself.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Pipeline {
    pub fn start(role: Role, config: &TraceConfig, counts: &Arc<Counts>) -> Result<Self, Error> {
        let endpoint = config.destination();
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(config.live.max_queue)
            .with_max_export_batch_size(config.live.batch)
            .with_scheduled_delay(config.live.delay)
            .build();
        let resource = resource(role, config);
        let waiting = Arc::<AtomicUsize>::default();
        let of = |processor, runtime| Self {
            processor,
            counts: counts.clone(),
            waiting: waiting.clone(),
            room: config.live.max_queue,
            runtime,
        };
        if let Some(lines) = transport::JsonLines::open(config)? {
            let inner = LineExporter { lines, resource };
            let exporter = Counted { inner, counts: counts.clone(), waiting: waiting.clone(), endpoint };
            let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
            return Ok(of(processor, None));
        }
        let (mut exporter, runtime) = match config.protocol {
            Protocol::Grpc => {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .thread_name("tasker-otlp")
                    .enable_all()
                    .build()?;
                (grpc_exporter(config, &runtime)?, Some(runtime))
            }
            Protocol::HttpProtobuf => (http_exporter(config)?, None),
        };
        exporter.set_resource(&resource);
        let exporter = Counted { inner: exporter, counts: counts.clone(), waiting: waiting.clone(), endpoint };
        let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
        Ok(of(processor, runtime))
    }

    /// Queues a span, or drops and counts it: a full queue of the SDK's would not say so.
    fn take(&self, span: SpanData) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.room {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.processor.on_end(span);
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        // Dropping a runtime inside another one panics.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Live spans as lines of OTLP JSON.
#[derive(Debug)]
struct LineExporter {
    lines: transport::JsonLines,
    resource: Resource,
}

impl SpanExporter for LineExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
        let resource = (&self.resource).into();
        let resource_spans =
            opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope(batch, &resource);
        self.lines
            .write(&ExportTraceServiceRequest { resource_spans })
            .map_err(|error| opentelemetry_sdk::error::OTelSdkError::InternalFailure(error.to_string()))
    }
}

fn grpc_exporter(
    config: &TraceConfig,
    runtime: &tokio::runtime::Runtime,
) -> Result<opentelemetry_otlp::SpanExporter, Error> {
    let _inside = runtime.enter();
    let mut builder = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_channel(transport::channel(config)?)
        .with_metadata(transport::metadata(config)?)
        .with_timeout(config.timeout.min(LIVE_TIMEOUT));
    if config.compression == Compression::Gzip {
        builder = builder.with_compression(opentelemetry_otlp::Compression::Gzip);
    }
    builder.build().map_err(|e| Error::Exporter(e.to_string()))
}

fn http_exporter(config: &TraceConfig) -> Result<opentelemetry_otlp::SpanExporter, Error> {
    let tls = transport::tls_config(config)?;
    let timeout = config.timeout.min(LIVE_TIMEOUT);
    // A blocking client must not be made on a thread of a runtime, and it must
    // be given explicitly: the async default panics in the SDK's own thread.
    let client = std::thread::spawn(move || {
        reqwest::blocking::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .timeout(timeout)
            .build()
    })
    .join()
    .map_err(|_| Error::Exporter("the HTTP client panicked".into()))?
    .map_err(|e| Error::Exporter(e.without_url().to_string()))?;
    let mut builder = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(config.endpoint.clone())
        .with_headers(config.headers.iter().cloned().collect::<HashMap<_, _>>())
        .with_timeout(timeout);
    if config.compression == Compression::Gzip {
        builder = builder.with_compression(opentelemetry_otlp::Compression::Gzip);
    }
    builder.build().map_err(|e| Error::Exporter(e.to_string()))
}

/// Of live spans only; the tree's resource is derived.
fn resource(role: Role, config: &TraceConfig) -> Resource {
    let given = |key: &str| config.resource_attributes.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    let by_role = || match role {
        Role::Orchestrator => config.service_names.orchestration.clone(),
        Role::Worker => config.service_names.worker.clone(),
        Role::Cli => "tasker-cli".to_owned(),
    };
    let service = config.service_name.clone().or_else(|| given("service.name")).unwrap_or_else(by_role);
    let mut attributes = vec![
        KeyValue::new("service.name", service),
        KeyValue::new("telemetry.sdk.language", "rust"),
        KeyValue::new("telemetry.sdk.name", "opentelemetry"),
        KeyValue::new("process.pid", i64::from(std::process::id())),
    ];
    for (key, value) in &config.resource_attributes {
        if !attributes.iter().any(|a| a.key.as_str() == key) {
            attributes.push(KeyValue::new(key.clone(), value.clone()));
        }
    }
    Resource::builder_empty().with_attributes(attributes).build()
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    pub exported: AtomicU64,
    pub failed: AtomicU64,
    pub dropped: AtomicU64,
    pub cut: AtomicU64,
    failing: AtomicBool,
}

/// Counts what the SDK does not tell, and says once that the collector is
/// gone and once that it is back.
#[derive(Debug)]
pub(super) struct Counted<E> {
    pub inner: E,
    pub counts: Arc<Counts>,
    /// Of its pipeline.
    pub waiting: Arc<AtomicUsize>,
    pub endpoint: String,
}

impl<E: SpanExporter> SpanExporter for Counted<E> {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        // What is here has left the queue.
        self.waiting.fetch_sub(batch.len(), Ordering::Relaxed);
        let policy = redact::policy();
        let cut: u64 = batch.iter_mut().map(|span| clean::span(&policy, span)).sum();
        self.counts.cut.fetch_add(cut, Ordering::Relaxed);
        let spans = batch.len() as u64;
        let result = self.inner.export(batch).await;
        let counter = if result.is_ok() { &self.counts.exported } else { &self.counts.failed };
        counter.fetch_add(spans, Ordering::Relaxed);
        let failing = self.counts.failing.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(error) if !failing => {
                tracing::warn!(endpoint = self.endpoint, %error, "live spans are lost: the collector does not take them");
            }
            Ok(()) if failing => {
                let lost = self.counts.failed.load(Ordering::Relaxed);
                tracing::info!(endpoint = self.endpoint, lost, "the collector takes live spans again");
            }
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
