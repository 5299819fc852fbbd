//! What exporters of traces count: their figures, and how `/metrics` shows the sum of them.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::Metrics;
use crate::redact;

/// Between two lines of the log about the same matter.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// What was delivered, and what waits.
#[derive(Debug, Default)]
pub struct Stats {
    /// Spans that a receiver acknowledged.
    pub exported: AtomicU64,
    /// Of these, spans that were derived again from the log.
    pub re_exported: AtomicU64,
    /// Batches given up to the database because memory was full.
    pub released: AtomicU64,
    /// Log rows that were in memory at once because a log was read, at most: see `reading`.
    pub most_rows_read: AtomicUsize,
    /// Spans given up because no receiver took them within `max_export_lag`.
    pub abandoned: AtomicU64,
    /// Requests that failed and were tried again.
    pub failed_requests: AtomicU64,
    /// Spans that a receiver took and then said it dropped.
    pub rejected: AtomicU64,
    /// Spans that a receiver refused for good; their batches are kept in `refused_exports`.
    pub set_aside: AtomicU64,
    /// Why the last request was not taken; nothing once one is.
    pub problem: Newest,
    /// What a receiver last said of spans that it dropped, or warned of.
    pub rejected_because: Newest,
    /// Why spans were last set aside.
    pub set_aside_because: Newest,
    /// Texts in spans that were cut, or cleaned of control characters.
    pub cleaned: AtomicU64,
    /// Whether the last request failed.
    pub failing: AtomicBool,
    /// Log rows that wait in memory.
    pub queued_rows: AtomicUsize,
    /// Batches handed over and neither acknowledged nor released.
    pub open_batches: AtomicUsize,
}

impl Stats {
    /// The figures by name, for people.
    pub fn summary(&self) -> serde_json::Value {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let waiting = self.queued_rows.load(Ordering::Relaxed);
        let reached = if self.failing.load(Ordering::Relaxed) {
            "down"
        } else if load(&self.exported) > 0 {
            "up"
        } else {
            "not used yet"
        };
        serde_json::json!({
            "receiver": reached,
            "exported": load(&self.exported),
            "re_exported": load(&self.re_exported),
            "failed_requests": load(&self.failed_requests),
            "problem": self.problem.text(),
            "rejected": load(&self.rejected),
            "rejected_because": self.rejected_because.text(),
            "set_aside": load(&self.set_aside),
            "set_aside_because": self.set_aside_because.text(),
            "abandoned": load(&self.abandoned),
            "released_batches": load(&self.released),
            "waiting_rows": waiting,
            "waiting_batches": self.open_batches.load(Ordering::Relaxed),
            "most_rows_read": self.most_rows_read.load(Ordering::Relaxed),
        })
    }
}

/// The newest words of somebody outside, redacted and cut, and when the log last had them.
#[derive(Debug, Default)]
pub struct Newest(Mutex<Heard>);

#[derive(Debug, Default)]
struct Heard {
    text: Option<String>,
    /// What was last said, by its kind, and when.
    said: Option<(String, Instant)>,
}

impl Newest {
    /// Keeps it, and answers whether it is worth a line: it is of another kind than what was last
    /// said, and that was not a moment ago. A reason that others displace is said when it stays.
    pub fn hear(&self, kind: &str, text: &str) -> bool {
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.text = Some(redact::clipped(text, 400));
        let is_new = heard.said.as_ref().is_none_or(|(said, at)| said != kind && at.elapsed() >= SAY_EVERY);
        if is_new {
            heard.said = Some((kind.to_owned(), Instant::now()));
        }
        is_new
    }

    /// It no longer holds. Answers whether the log still has it.
    pub fn forget(&self) -> bool {
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.text = None;
        // When it was said counts on: what comes and goes is not said each time.
        let kind = heard.said.as_mut().map(|(kind, _)| std::mem::take(kind));
        kind.is_some_and(|kind| !kind.is_empty())
    }

    fn text(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).text.clone()
    }
}

/// The exporters of this process. What one counted is gone with it: a restarted exporter begins
/// at zero, as a restarted process does.
#[derive(Debug, Clone, Default)]
pub(super) struct Exports(Arc<Mutex<Vec<Weak<Stats>>>>);

impl Collector for Exports {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        use Ordering::Relaxed;
        let known: Vec<Arc<Stats>> =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect();
        let mut counter = |name: &str, help: &str, read: fn(&Stats) -> u64| {
            let counter = ConstCounter::new(known.iter().map(|stats| read(stats)).sum::<u64>());
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)
        };
        counter("tasker_otlp_spans_exported", "Spans of the tree that a receiver acknowledged", |s| {
            s.exported.load(Relaxed)
        })?;
        counter("tasker_otlp_spans_re_exported", "Of these, spans derived again from the log", |s| {
            s.re_exported.load(Relaxed)
        })?;
        counter("tasker_otlp_spans_abandoned", "Spans given up past max_export_lag; must stay 0", |s| {
            s.abandoned.load(Relaxed)
        })?;
        counter("tasker_otlp_spans_rejected", "Spans that a receiver took and said it dropped", |s| {
            s.rejected.load(Relaxed)
        })?;
        counter("tasker_otlp_spans_set_aside", "Spans that a receiver refused for good", |s| {
            s.set_aside.load(Relaxed)
        })?;
        counter("tasker_otlp_export_failures", "Requests that failed and were tried again", |s| {
            s.failed_requests.load(Relaxed)
        })?;
        counter("tasker_otlp_batches_released", "Batches given back because memory was full", |s| {
            s.released.load(Relaxed)
        })?;
        #[cfg(feature = "otlp")]
        let live = crate::telemetry::live_spans();
        #[cfg(not(feature = "otlp"))]
        let live = crate::telemetry::LiveSpans::default();
        let cleaned: u64 = known.iter().map(|stats| stats.cleaned.load(Relaxed)).sum();
        for (name, help, value) in [
            ("tasker_live_spans_exported", "Live spans of this process that a receiver acknowledged", live.exported),
            ("tasker_live_spans_lost", "Live spans that no receiver took", live.failed),
            ("tasker_live_spans_dropped", "Live spans for which the queue had no room", live.dropped),
            ("tasker_span_texts_cut", "Texts in spans that were cut or cleaned", cleaned + live.cut),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let mut gauge = |name: &str, help: &str, value: i64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        let sum = |read: fn(&Stats) -> usize| {
            i64::try_from(known.iter().map(|stats| read(stats)).sum::<usize>()).unwrap_or(i64::MAX)
        };
        gauge(
            "tasker_otlp_queued_rows",
            "Log rows that wait in memory for their export",
            sum(|s| s.queued_rows.load(Relaxed)),
        )?;
        gauge(
            "tasker_otlp_open_batches",
            "Batches handed over and not yet acknowledged",
            sum(|s| s.open_batches.load(Relaxed)),
        )?;
        if !known.is_empty() {
            let up = known.iter().all(|stats| !stats.failing.load(Relaxed));
            gauge("tasker_otlp_up", "Whether the receiver of traces took the last request", up.into())?;
        }
        Ok(())
    }
}

impl Metrics {
    /// Counts what this exporter delivers, for as long as it lives.
    pub fn watch_export(&self, stats: &Arc<Stats>) {
        let mut known = self.exports.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|old| old.strong_count() > 0);
        known.push(Arc::downgrade(stats));
    }
}
