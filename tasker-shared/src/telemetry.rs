//! Logs and live spans of one process. Metrics are [`crate::metrics`].
//!
//! Without the feature `otlp` a process has no subscriber and no exporter from here: then there are no
//! live spans of ours, and the spans of handlers go where the program's own OpenTelemetry provider sends them.

#[cfg(feature = "otlp")]
mod lines;
pub mod live;
#[cfg(feature = "otlp")]
mod pipeline;
#[cfg(feature = "otlp")]
mod process;
#[cfg(feature = "otlp")]
pub mod settings;
#[cfg(feature = "otlp")]
mod statements;

#[cfg(feature = "otlp")]
pub use self::lines::LogFormat;
#[cfg(feature = "otlp")]
pub use self::pipeline::{Error, Role};
#[cfg(feature = "otlp")]
pub use self::process::{LiveExport, Telemetry, apply, init, init_at, live_spans, start};

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
