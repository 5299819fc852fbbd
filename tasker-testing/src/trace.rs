//! Spans wherever they came from, and their outline.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;

use serde_json::Value;
use tasker_shared::trace::span::{Kind, SpanId, TraceId};

/// Spans of one trace or of several, in no particular order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trace {
    /// All of them.
    pub spans: Vec<Span>,
}

/// A span as any backend has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// The trace it belongs to.
    pub trace_id: TraceId,
    /// Its own id.
    pub span_id: SpanId,
    /// The span it hangs below.
    pub parent: Option<SpanId>,
    /// Whether `parent` is known to be another service's span.
    pub parent_is_remote: bool,
    /// Its name.
    pub name: String,
    /// OpenTelemetry span kind.
    pub kind: Kind,
    /// `service.name` of its resource; empty if not known.
    pub service: String,
    /// Start, in nanoseconds since 1970.
    pub start: u64,
    /// End, in nanoseconds since 1970.
    pub end: u64,
    /// Values as JSON; an integer is a number here, whatever the source wrote it as.
    pub attributes: BTreeMap<String, Value>,
    /// Spans it points at.
    pub links: Vec<(TraceId, SpanId)>,
    /// Events inside it.
    pub events: Vec<Event>,
    /// `Some(description)` means status ERROR.
    pub error: Option<String>,
}

/// Something that happened inside a span.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `exception`, or what the author called it.
    pub name: String,
    /// Nanoseconds since 1970.
    pub at: u64,
    /// Values as JSON.
    pub attributes: BTreeMap<String, Value>,
}

impl Span {
    /// An attribute's value, or what is asked for in the same way: `kind`, `service`, `status`
    /// (`ERROR` or nothing) and `links` (their number, or nothing).
    pub fn get(&self, key: &str) -> Option<Value> {
        match key {
            "kind" => Some(kind_name(self.kind).into()),
            "service" => Some(self.service.clone().into()),
            "status" => self.error.as_ref().map(|_| "ERROR".into()),
            "links" => (!self.links.is_empty()).then(|| self.links.len().into()),
            _ => self.attributes.get(key).cloned(),
        }
    }

    /// An attribute's value if it is a text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.attributes.get(key)?.as_str()
    }

    /// An attribute's value if it is a whole number.
    pub fn int(&self, key: &str) -> Option<i64> {
        self.attributes.get(key)?.as_i64()
    }

    /// Its name, then what was asked of it with [`get`](Self::get): those it has.
    pub fn describe(&self, keys: &[&str]) -> String {
        let mut line = self.name.clone();
        for key in keys {
            if let Some(value) = self.get(key) {
                let _ = write!(line, " {key}={}", plain(&value));
            }
        }
        line
    }
}

/// A value without the quotes of JSON.
pub(crate) fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

pub(crate) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Internal => "INTERNAL",
        Kind::Server => "SERVER",
        Kind::Client => "CLIENT",
        Kind::Producer => "PRODUCER",
        Kind::Consumer => "CONSUMER",
    }
}

/// Who hangs below whom.
pub(crate) struct Forest<'a> {
    pub spans: &'a [Span],
    /// By parent; `None` holds every span whose parent is not there. In the order of their start.
    children: HashMap<Option<(TraceId, SpanId)>, Vec<usize>>,
}

impl<'a> Forest<'a> {
    pub fn new(trace: &'a Trace) -> Self {
        let spans = &trace.spans[..];
        let ids: BTreeSet<(TraceId, SpanId)> = spans.iter().map(|span| (span.trace_id, span.span_id)).collect();
        let mut children: HashMap<Option<(TraceId, SpanId)>, Vec<usize>> = HashMap::new();
        for (place, span) in spans.iter().enumerate() {
            let parent = span.parent.map(|parent| (span.trace_id, parent)).filter(|parent| ids.contains(parent));
            children.entry(parent).or_default().push(place);
        }
        for places in children.values_mut() {
            places.sort_by_key(|place| spans[*place].start);
        }
        Self { spans, children }
    }

    pub fn roots(&self) -> &[usize] {
        self.children.get(&None).map_or(&[], Vec::as_slice)
    }

    pub fn below(&self, place: usize) -> &[usize] {
        let span = &self.spans[place];
        self.children.get(&Some((span.trace_id, span.span_id))).map_or(&[], Vec::as_slice)
    }

    /// The blocks of lines of these spans, two spaces a level, sorted: structure, not time.
    fn blocks(&self, places: &[usize], depth: usize, keys: &[&str]) -> Vec<String> {
        let block = |place: &usize| {
            let mut text = format!("{}{}\n", "  ".repeat(depth), self.spans[*place].describe(keys));
            text.extend(self.blocks(self.below(*place), depth + 1, keys));
            text
        };
        let mut blocks: Vec<String> = places.iter().map(block).collect();
        blocks.sort();
        blocks
    }
}

impl Trace {
    /// The tree as an indented outline, two spaces a level, siblings in the order of their
    /// lines; each line is [`Span::describe`].
    pub fn outline(&self, keys: &[&str]) -> String {
        let forest = Forest::new(self);
        forest.blocks(forest.roots(), 0, keys).concat()
    }

    /// Compares with an outline that a person wrote, whatever the order of siblings.
    ///
    /// # Panics
    /// If they differ, with both.
    #[track_caller]
    pub fn assert_outline(&self, keys: &[&str], expected: &str) {
        let lines: Vec<&str> = expected.lines().filter(|line| !line.trim().is_empty()).collect();
        let margin = lines.iter().map(|line| line.len() - line.trim_start().len()).min().unwrap_or(0);
        let lines: Vec<&str> = lines.iter().map(|line| line[margin..].trim_end()).collect();
        let (arrived, expected) = (self.outline(keys), sorted(&lines, 0));
        assert!(arrived == expected, "--- arrived\n{arrived}\n--- expected\n{expected}");
    }

    /// Only the spans of which this is true.
    #[must_use]
    pub fn only(&self, keep: impl Fn(&Span) -> bool) -> Self {
        Self { spans: self.spans.iter().filter(|span| keep(span)).cloned().collect() }
    }
}

/// The order of [`Trace::outline`] for lines that a person wrote.
fn sorted(lines: &[&str], depth: usize) -> String {
    let at = |line: &str| line.len() - line.trim_start().len();
    let starts: Vec<usize> = (0..lines.len()).filter(|n| at(lines[*n]) == depth).collect();
    let block = |(n, start): (usize, &usize)| {
        let end = starts.get(n + 1).copied().unwrap_or(lines.len());
        format!("{}\n{}", lines[*start], sorted(&lines[start + 1..end], depth + 2))
    };
    let mut blocks: Vec<String> = starts.iter().enumerate().map(block).collect();
    blocks.sort();
    blocks.concat()
}
