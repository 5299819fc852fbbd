//! The span as the tree yields it: plain data, no SDK.
//!
//! What every span of a task shares (trace id, correlation id, namespace …)
//! stands once on [`TaskSpans`], so that it is formatted and encoded once a
//! task and not once a span.

use std::borrow::Cow;

use chrono::{DateTime, Utc};

/// A W3C trace id: 16 random bytes, never a UUID.
pub type TraceId = [u8; 16];
/// A W3C span id: 8 bytes, never all zero.
pub type SpanId = [u8; 8];

/// The spans of one task (or of a part of its log), and what they share.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskSpans {
    /// The trace all spans belong to.
    pub trace_id: TraceId,
    /// W3C trace flags; bit 0 is "sampled".
    pub trace_flags: u8,
    /// W3C tracestate of the caller, passed through unchanged.
    pub tracestate: Option<String>,
    /// `correlation_id`, `task_uuid`, `namespace`: on every span.
    pub common: Vec<(&'static str, Value)>,
    /// In an order where a parent stands before its children.
    pub spans: Vec<Span>,
}

/// One span. Times are database times with microsecond resolution.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Derived from the entity, see `trace::ids`.
    pub id: SpanId,
    /// `None` only for a root without a remote parent.
    pub parent: Option<SpanId>,
    /// True when `parent` belongs to another service's span.
    pub parent_is_remote: bool,
    /// One of the names of the trace contract; never contains an id.
    pub name: &'static str,
    /// OpenTelemetry span kind.
    pub kind: Kind,
    /// Whose `service.name` the span carries.
    pub service: Service,
    /// Start time.
    pub start: DateTime<Utc>,
    /// End time, never before `start`.
    pub end: DateTime<Utc>,
    /// Beyond the common ones.
    pub attributes: Vec<(&'static str, Value)>,
    /// Other spans this one points at.
    pub links: Vec<Link>,
    /// Events inside the span.
    pub events: Vec<Event>,
    /// `Some(description)` means status ERROR; success leaves it unset.
    pub error: Option<String>,
    /// The `at` of the log row that made this span final: it is exported with that transaction.
    pub settled_at: DateTime<Utc>,
}

/// OpenTelemetry span kind; the discriminants are those of OTLP's `Span.SpanKind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Kind {
    Internal = 1,
    Server = 2,
    Client = 3,
    Producer = 4,
    Consumer = 5,
}

/// The two kinds of process; names are configurable, the split is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Service {
    Orchestration,
    Worker,
}

/// A span link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// The trace of the span pointed at.
    pub trace_id: TraceId,
    /// The span pointed at.
    pub span_id: SpanId,
}

/// A span event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `exception`, or the name of a milestone.
    pub name: Cow<'static, str>,
    /// When it happened.
    pub at: DateTime<Utc>,
    /// What it says.
    pub attributes: Vec<(Cow<'static, str>, Value)>,
}

/// An attribute value.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Value {
    Str(Cow<'static, str>),
    Int(i64),
    Float(f64),
    Bool(bool),
}

impl From<&'static str> for Value {
    fn from(value: &'static str) -> Self {
        Self::Str(Cow::Borrowed(value))
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Str(Cow::Owned(value))
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}
