//! Numbers of one process, as `OpenMetrics` text for Prometheus.
//!
//! Owns every metric's name, and the listener that serves them. On the hot path a number is an
//! atomic in memory; what only the database knows is read when somebody asks, and at most every
//! few seconds. A label is a name from a template or a word from a short list, never an id: ids
//! stand in exemplars, which lead from a slow bucket to a trace.

mod bounded;
mod exports;
mod serve;

use std::fmt::{self, Write as _};
use std::sync::{Arc, LazyLock};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

pub use self::bounded::{Bounded, Labels};
use self::exports::Exports;
pub use self::exports::{Newest, Stats};
pub use self::serve::{CONTENT_TYPE, Listen, Serving, serve};
use crate::trace::span::TraceId;

/// Points at the trace of one observation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Exemplar {
    trace_id: Hex,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Hex(TraceId);

impl EncodeLabelValue for Hex {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(encoder, "{byte:02x}"))
    }
}

impl Exemplar {
    /// The trace, if it is sampled: nobody could look at another.
    pub fn of(trace_id: TraceId, trace_flags: u8) -> Option<Self> {
        (trace_flags & 1 == 1).then_some(Self { trace_id: Hex(trace_id) })
    }
}

/// A histogram of seconds or sizes whose buckets can name a trace.
pub type Histogram = HistogramWithExemplars<Exemplar>;

fn histogram(buckets: &[f64]) -> Histogram {
    Histogram::new(buckets.iter().copied())
}

/// A template.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct OfTemplate {
    pub namespace: Arc<str>,
    pub template: Arc<str>,
}

/// How tasks of a template ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct TaskEnd {
    pub namespace: Arc<str>,
    pub template: Arc<str>,
    pub outcome: &'static str,
}

/// A namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct OfNamespace {
    pub namespace: Arc<str>,
}

/// How steps of a namespace ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct StepEnd {
    pub namespace: Arc<str>,
    pub state: &'static str,
}

/// A handler.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct OfHandler {
    pub namespace: Arc<str>,
    pub handler: Arc<str>,
}

/// How attempts of a handler ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct AttemptEnd {
    pub namespace: Arc<str>,
    pub handler: Arc<str>,
    pub outcome: &'static str,
}

/// Where hints came from: a queue of the orchestrators, or `due`; or what a loop does beside them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct OfSource {
    pub source: &'static str,
}

/// A kind of span that handlers' helpers make.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct SpanEnd {
    pub span_name: Arc<str>,
    pub namespace: Arc<str>,
    pub handler: Arc<str>,
}

/// A function of the worker protocol.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct OfCall {
    pub call: &'static str,
}

/// One of a few words.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct OfResult {
    pub result: &'static str,
}

/// Why something failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "labels")]
pub struct OfReason {
    pub reason: &'static str,
}

macro_rules! with_other {
    ($($name:ident { $($names:ident),* ; $($words:ident),* })*) => {
        $(impl Labels for $name {
            fn other(&self) -> Self {
                Self { $($names: Arc::from("other"),)* $($words: self.$words,)* }
            }
        })*
    };
}
with_other! {
    OfTemplate { namespace, template; }
    TaskEnd { namespace, template; outcome }
    OfNamespace { namespace; }
    StepEnd { namespace; state }
    OfHandler { namespace, handler; }
    AttemptEnd { namespace, handler; outcome }
    OfSource { ; source }
    OfResult { ; result }
    OfCall { ; call }
    SpanEnd { span_name, namespace, handler; }
    OfReason { ; reason }
}

/// Of things that take milliseconds, as a rule.
const SHORT: [f64; 15] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0];
/// Of things that may take days.
const LONG: [f64; 15] =
    [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21600.0, 86400.0];
const SIZES: [f64; 10] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];

/// What this process counts. There is one of it, as there is one `/metrics`: however many
/// orchestrators and workers a process runs, their numbers add up.
#[derive(Debug)]
#[expect(missing_docs, reason = "each has its help text in `new`")]
pub struct Metrics {
    registry: Registry,
    // Orchestrators.
    pub tasks_started: Bounded<OfTemplate, Counter>,
    pub tasks_ended: Bounded<TaskEnd, Counter>,
    pub task_duration: Bounded<OfTemplate, Histogram>,
    pub steps_enqueued: Bounded<OfNamespace, Counter>,
    pub steps_ended: Bounded<StepEnd, Counter>,
    pub attempts: Bounded<AttemptEnd, Counter>,
    pub queue_wait: Bounded<OfNamespace, Histogram>,
    pub handler_duration: Bounded<OfHandler, Histogram>,
    pub result_wait: Bounded<OfNamespace, Histogram>,
    pub settle_batch: Bounded<OfSource, Histogram>,
    pub settle_duration: Bounded<OfSource, Histogram>,
    pub settle_failures: Bounded<OfSource, Counter>,
    pub hints_ignored: Counter,
    pub lock_put_offs: Bounded<OfSource, Counter>,
    pub messages_quarantined: Counter,
    pub messages_put_off: Counter,
    pub settling_paused: Gauge,
    pub tasks_stuck: Gauge,
    // Workers.
    pub worker_slots: Bounded<OfNamespace, Gauge>,
    pub worker_slots_busy: Bounded<OfNamespace, Gauge>,
    pub worker_claims: Bounded<OfNamespace, Counter>,
    pub worker_attempts: Bounded<AttemptEnd, Counter>,
    pub worker_handler_duration: Bounded<OfHandler, Histogram>,
    pub worker_reports: Bounded<OfResult, Counter>,
    pub worker_results_waiting: Gauge,
    pub worker_call_failures: Bounded<OfCall, Counter>,
    pub span_errors: Bounded<SpanEnd, Counter>,
    // Readers of traces.
    pub trace_fetch: Histogram,
    pub trace_fetch_failures: Bounded<OfReason, Counter>,
    pub http_context_ignored: Counter,
    pub http_refused: Bounded<OfReason, Counter>,
    exports: Exports,
}

/// The process's numbers.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);
    &METRICS
}

/// The process's numbers as `OpenMetrics` text of type [`CONTENT_TYPE`].
#[expect(clippy::unused_async, reason = "`serve` asks for a future, as one that reads the database is")]
pub async fn text() -> String {
    let mut text = String::with_capacity(16 << 10);
    // Writing to a String cannot fail.
    let _ = metrics().write(&mut text);
    let _ = encode_eof(&mut text);
    text
}

impl Metrics {
    #[expect(clippy::too_many_lines, reason = "the table of all metrics, one line each")]
    fn new() -> Self {
        let mut registry = Registry::default();
        registry.register(
            "tasker_build",
            "The version of this process",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        let r = &mut registry;
        let s = || Some(Unit::Seconds);
        let tasks_started = family(r, "tasker_tasks_started", "Tasks that began", None, Counter::default);
        let tasks_ended = family(r, "tasker_tasks_ended", "Tasks that ended, by outcome", None, Counter::default);
        let task_duration =
            family(r, "tasker_task_duration", "From a task's creation to its end", s(), || histogram(&LONG));
        let steps_enqueued = family(r, "tasker_steps_enqueued", "Step messages sent", None, Counter::default);
        let steps_ended = family(r, "tasker_steps_ended", "Steps that ended, by state", None, Counter::default);
        let attempts = family(r, "tasker_attempts", "Attempts that were settled, by outcome", None, Counter::default);
        let queue_wait =
            family(r, "tasker_step_queue_wait", "From a step's message to its claim", s(), || histogram(&SHORT));
        let handler_duration =
            family(r, "tasker_handler_duration", "How long handlers ran, as their workers reported", s(), || {
                histogram(&SHORT)
            });
        let result_wait = family(r, "tasker_result_wait", "From a report to its settle", s(), || histogram(&SHORT));
        let settle_batch =
            family(r, "tasker_settle_batch_size", "Hints in one transaction", None, || histogram(&SIZES));
        let settle_duration =
            family(r, "tasker_settle_duration", "How long one transaction took", s(), || histogram(&SHORT));
        let settle_failures = family(
            r,
            "tasker_settle_failures",
            "Transactions that failed; their hints come back",
            None,
            Counter::default,
        );
        let hints_ignored = one(
            r,
            "tasker_hints_ignored",
            "Duplicate, late or reordered events that changed nothing",
            Counter::default(),
        );
        let lock_put_offs = family(
            r,
            "tasker_lock_put_offs",
            "What was put off because a session of somebody else held a lock on it",
            None,
            Counter::default,
        );
        let messages_quarantined =
            one(r, "tasker_messages_quarantined", "Messages that this process quarantined", Counter::default());
        let messages_put_off = one(
            r,
            "tasker_messages_put_off",
            "Times that a message failed while others did not, for a reason that blames nobody, and was put off",
            Counter::default(),
        );
        let settling_paused = one(
            r,
            "tasker_settling_paused",
            "Orchestrators of this process for which everything fails alike, so that messages wait",
            Gauge::default(),
        );
        let tasks_stuck = one(
            r,
            "tasker_tasks_stuck",
            "Tasks that nothing will move, when it was last looked for them; must stay 0",
            Gauge::default(),
        );
        let worker_slots = family(r, "tasker_worker_slots", "Attempts that may run at once here", None, Gauge::default);
        let worker_slots_busy = family(r, "tasker_worker_slots_busy", "Attempts that run here", None, Gauge::default);
        let worker_claims = family(r, "tasker_worker_claims", "Attempts claimed here", None, Counter::default);
        let worker_attempts =
            family(r, "tasker_worker_attempts", "Attempts that ran here, by outcome", None, Counter::default);
        let worker_handler_duration =
            family(r, "tasker_worker_handler_duration", "How long handlers ran here", s(), || histogram(&SHORT));
        let worker_reports = family(
            r,
            "tasker_worker_reports",
            "Results that the database answered for: accepted, or stale because the claim was another's by then",
            None,
            Counter::default,
        );
        let worker_results_waiting =
            one(r, "tasker_worker_results_waiting", "Results that the database has not answered for", Gauge::default());
        let worker_call_failures = family(
            r,
            "tasker_worker_call_failures",
            "Calls of the database that failed and were repeated: claim, heartbeat or report",
            None,
            Counter::default,
        );
        let span_errors = family(
            r,
            "tasker_span_errors",
            "Spans of handlers that ended in an error, by name",
            None,
            Counter::default,
        );
        let trace_fetch = histogram(&SHORT);
        r.register_with_unit(
            "tasker_trace_fetch",
            "How long a backend took to answer for a trace",
            Unit::Seconds,
            trace_fetch.clone(),
        );
        let trace_fetch_failures = family(
            r,
            "tasker_trace_fetch_failures",
            "Traces that a backend was asked for in vain; the log answered alone",
            None,
            Counter::default,
        );
        let http_context_ignored = one(
            r,
            "tasker_http_context_ignored",
            "Requests whose traceparent, tracestate or baggage was malformed or too long",
            Counter::default(),
        );
        let http_refused = family(
            r,
            "tasker_http_refused",
            "Connections, event streams and bodies that were refused because there were too many, by what",
            None,
            Counter::default,
        );
        // A rate needs a zero to begin with.
        for source in ["task_requests", "step_results", "due"] {
            settle_failures.of(&OfSource { source });
            lock_put_offs.of(&OfSource { source });
        }
        for source in ["schedules", "partitions", "retention"] {
            lock_put_offs.of(&OfSource { source });
        }
        for result in ["accepted", "stale"] {
            worker_reports.of(&OfResult { result });
        }
        for call in ["claim", "heartbeat", "report"] {
            worker_call_failures.of(&OfCall { call });
        }
        for reason in ["unreachable", "timeout", "refused", "bad_answer", "left_alone"] {
            trace_fetch_failures.of(&OfReason { reason });
        }
        let exports = Exports::default();
        registry.register_collector(Box::new(exports.clone()));
        Self {
            registry,
            tasks_started,
            tasks_ended,
            task_duration,
            steps_enqueued,
            steps_ended,
            attempts,
            queue_wait,
            handler_duration,
            result_wait,
            settle_batch,
            settle_duration,
            settle_failures,
            hints_ignored,
            lock_put_offs,
            messages_quarantined,
            messages_put_off,
            settling_paused,
            tasks_stuck,
            worker_slots,
            worker_slots_busy,
            worker_claims,
            worker_attempts,
            worker_handler_duration,
            worker_reports,
            worker_results_waiting,
            worker_call_failures,
            span_errors,
            trace_fetch,
            trace_fetch_failures,
            http_context_ignored,
            http_refused,
            exports,
        }
    }

    /// Writes them all as `OpenMetrics` text, without its end.
    pub fn write(&self, text: &mut String) -> fmt::Result {
        encode_registry(text, &self.registry)
    }
}

fn one<M: Clone + prometheus_client::registry::Metric>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    metric: M,
) -> M {
    registry.register(name, help, metric.clone());
    metric
}

fn family<L, M>(registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>, new: fn() -> M) -> Bounded<L, M>
where
    L: Labels,
    M: Clone,
    Bounded<L, M>: prometheus_client::registry::Metric,
{
    let family = Bounded::new(new);
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, family.clone()),
        None => registry.register(name, help, family.clone()),
    }
    family
}

#[cfg(test)]
mod tests;
