//! A trace as people and programs read it: one normalised tree, whatever it was made from.
//!
//! Pure. The spans come from the log, which always has them, and from a backend, which may have
//! the user's own spans beside them; what both have is the log's. Sizes are bounded here: a task
//! of ten thousand steps answers with its figures and its first spans, never with all of them.

mod figures;
mod flat;
mod nodes;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value as Json};

use self::flat::Shown;
pub use self::flat::{Attributes, Flat, flat};
use self::nodes::Tree;
use tasker_shared::redact::Policy;
use tasker_shared::trace::names;
use tasker_shared::trace::span::Span;

/// The most spans of one answer.
pub const MOST_SPANS: usize = 10_000;
/// The deepest tree of one answer; what a reader of JSON can take.
pub const DEEPEST: usize = 30;
/// Lines of a summary, gaps and kinds of waits, each.
const MOST_LINES: usize = 200;

/// What an answer holds.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a word of the query")]
pub struct Include {
    /// Attributes of spans.
    pub attributes: bool,
    /// Events of spans.
    pub events: bool,
    /// Links of spans.
    pub links: bool,
    /// State transitions and the other spans that only explain.
    pub transitions: bool,
    /// Spans at most; 1,000 unless said.
    pub max_spans: usize,
    /// Levels at most.
    pub depth: usize,
    /// Only this span and what is below it, by its id in hex.
    pub under: Option<String>,
}

impl Default for Include {
    fn default() -> Self {
        Self {
            attributes: true,
            events: true,
            links: true,
            transitions: true,
            max_spans: 1000,
            depth: DEEPEST,
            under: None,
        }
    }
}

impl Include {
    /// Keeps what the words of a list name; answers the first word that names nothing.
    pub fn only(mut self, words: &str) -> Result<Self, String> {
        (self.attributes, self.events, self.links, self.transitions) = (false, false, false, false);
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word {
                "attributes" => self.attributes = true,
                "events" => self.events = true,
                "links" => self.links = true,
                "transitions" => self.transitions = true,
                other => return Err(other.to_owned()),
            }
        }
        Ok(self)
    }
}

/// A trace, or the part of one that was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct TraceView {
    /// 32 hex digits.
    pub trace_id: String,
    /// Of its earliest task.
    pub correlation_id: Option<String>,
    /// The tasks whose spans are here, by uuid.
    pub tasks: Vec<String>,
    /// When its first span began.
    pub began_at: Option<DateTime<Utc>>,
    /// From there to the end of its last span, or to now.
    pub duration_ms: f64,
    /// Whether it is exported: what was decided when it began.
    pub sampled: bool,
    /// Something is not over yet.
    pub in_progress: bool,
    /// Spans that there are.
    pub spans: usize,
    /// Spans that are in `roots`.
    pub shown: usize,
    /// Spans that failed; retried attempts count.
    pub errors: usize,
    /// Tokens that models took and gave, where handlers said so.
    pub tokens: Option<Tokens>,
    /// The trees; more than one after a retry of the whole task, or with callers' spans.
    pub roots: Vec<Node>,
    /// What the spans were like, by name and step, the longest first.
    pub summary: Vec<SummaryLine>,
    /// What was waited for, by reason.
    pub waits: Vec<WaitLine>,
    /// Times in which nothing ran and nothing waited.
    pub gaps: Vec<Gap>,
    /// Where the spans came from.
    pub sources: Sources,
}

/// Tokens of models.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Tokens {
    /// `gen_ai.usage.input_tokens`, summed.
    pub input: i64,
    /// `gen_ai.usage.output_tokens`, summed.
    pub output: i64,
}

/// Where spans came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Sources {
    /// Spans of the log.
    pub log: usize,
    /// Spans that only the backend has.
    pub backend: usize,
    /// `none` without a backend, `read`, or why it could not be read.
    pub backend_state: String,
}

/// A span and those below it.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Node {
    /// 16 hex digits.
    pub span_id: String,
    /// Its parent's, also when that is not here.
    pub parent_span_id: Option<String>,
    /// The kind of span; never holds an id.
    pub name: String,
    /// `service.name`.
    pub service: String,
    /// internal, server, client, producer or consumer.
    pub kind: String,
    /// From the beginning of the trace.
    pub offset_ms: f64,
    /// Until now, if it is not over.
    pub duration_ms: f64,
    /// ok or error.
    pub status: String,
    /// What went wrong.
    pub error: Option<String>,
    /// It is not over yet.
    pub in_progress: bool,
    /// `log` or `backend`.
    pub source: String,
    /// Absent if not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attributes: Option<Map<String, Json>>,
    /// Absent if there are none, or not asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<ReadEvent>,
    /// Absent if there are none, or not asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<ReadLink>,
    /// In the order in which they began.
    pub children: Vec<Node>,
    /// Spans below it that are not here; ask again with `under` for them.
    pub omitted: usize,
}

/// Something that happened within a span.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ReadEvent {
    /// `exception`, or a milestone's.
    pub name: String,
    /// When.
    pub at: DateTime<Utc>,
    /// What it says.
    pub attributes: Map<String, Json>,
}

/// Another span that one points at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ReadLink {
    /// 32 hex digits.
    pub trace_id: String,
    /// 16 hex digits.
    pub span_id: String,
}

/// Spans of one name and step.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct SummaryLine {
    /// Of the spans.
    pub name: String,
    /// Where they are a step's.
    pub step: Option<String>,
    /// How many.
    pub count: usize,
    /// How many failed.
    pub errors: usize,
    /// Of all of them.
    pub total_ms: f64,
    /// Of the longest.
    pub longest_ms: f64,
}

/// Waits for one reason.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct WaitLine {
    /// queue, retry, timer, signal, child, items, room, limit, worker or paused.
    pub reason: String,
    /// How many.
    pub count: usize,
    /// Of all of them.
    pub total_ms: f64,
}

/// A time in which nothing was recorded.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Gap {
    /// From the beginning of the trace.
    pub offset_ms: f64,
    /// How long.
    pub duration_ms: f64,
}

/// The log's spans and those that only the backend has, each once; how many are the backend's.
pub fn merge(mut log: Vec<Flat>, backend: Vec<Flat>) -> (Vec<Flat>, usize) {
    let mut known: HashSet<String> = log.iter().map(|span| span.span_id.clone()).collect();
    let before = log.len();
    log.extend(backend.into_iter().filter(|span| known.insert(span.span_id.clone())));
    let added = log.len() - before;
    (log, added)
}

/// Those of a backend's spans that belong to a namespace within reach. A span that names none, such as
/// one of a user's own, belongs where the nearest span above it does; one that hangs nowhere is left out.
pub fn within_reach(backend: Vec<Flat>, log: &[Flat], reaches: &dyn Fn(&str) -> bool) -> Vec<Flat> {
    let keep: Vec<bool> = {
        let by_id: HashMap<&str, &Flat> =
            log.iter().chain(&backend).map(|span| (span.span_id.as_str(), span)).collect();
        let is_within = |span: &Flat| {
            let mut at = Some(span);
            // A chain longer than the tree is a cycle.
            for _ in 0..=by_id.len() {
                let Some(span) = at else { break };
                if let Some(namespace) = span.attributes.text(names::NAMESPACE) {
                    return reaches(namespace);
                }
                at = span.parent_span_id.as_deref().and_then(|parent| by_id.get(parent).copied());
            }
            false
        };
        backend.iter().map(is_within).collect()
    };
    backend.into_iter().zip(keep).filter_map(|(span, keep)| keep.then_some(span)).collect()
}

/// The spans of a task and those below them.
pub fn below_task(spans: Vec<Flat>, task_uuid: &str) -> Vec<Flat> {
    let parents: HashMap<&str, &str> =
        spans.iter().filter_map(|span| Some((span.span_id.as_str(), span.parent_span_id.as_deref()?))).collect();
    let is_own = |span: &Flat| span.of_log && span.attributes.text(names::TASK_UUID) == Some(task_uuid);
    let mut inside: HashSet<&str> =
        spans.iter().filter(|span| is_own(span)).map(|span| span.span_id.as_str()).collect();
    for span in &spans {
        let mut path = Vec::new();
        let mut at = span.span_id.as_str();
        // A chain longer than the tree is a cycle.
        while !inside.contains(at) && path.len() <= spans.len() {
            path.push(at);
            match parents.get(at) {
                Some(parent) if !path.contains(parent) => at = parent,
                _ => break,
            }
        }
        if inside.contains(at) {
            inside.extend(path);
        }
    }
    let keep: Vec<bool> = spans.iter().map(|span| inside.contains(span.span_id.as_str())).collect();
    spans.into_iter().zip(keep).filter_map(|(span, keep)| keep.then_some(span)).collect()
}

/// What stands for an error's words.
const HIDDEN: &str = "hidden";

/// Leaves of an error only its type.
pub fn hide_errors_of(span: &mut Span) {
    if let Some(error) = &mut span.error {
        HIDDEN.clone_into(error);
    }
    span.attributes.retain(|(key, _)| *key != names::REASON);
    for event in &mut span.events {
        event.attributes.retain(|(key, _)| *key != names::EXCEPTION_MESSAGE);
    }
}

/// The same for a span of a backend.
pub fn hide_errors(span: &mut Flat) {
    if let Some(error) = &mut span.error {
        HIDDEN.clone_into(error);
    }
    if let Attributes::Backend(attributes) = &mut span.attributes {
        attributes.remove(names::REASON);
    }
    for event in &mut span.events {
        event.attributes.remove(names::EXCEPTION_MESSAGE);
    }
}

/// The normalised tree.
pub fn view(mut spans: Vec<Flat>, sampled: bool, include: &Include, sources: Sources, policy: &Policy) -> TraceView {
    spans.sort_by(|a, b| {
        (a.start, depth_hint(&a.name), std::cmp::Reverse(a.end), &a.span_id).cmp(&(
            b.start,
            depth_hint(&b.name),
            std::cmp::Reverse(b.end),
            &b.span_id,
        ))
    });
    let began = spans.iter().map(|span| span.start).min();
    let ended = spans.iter().map(|span| span.end).max();
    let mut shown = Shown::by(policy);
    let mut tasks: Vec<&str> = Vec::new();
    for task in spans.iter().filter(|span| span.of_log).filter_map(|span| span.attributes.text(names::TASK_UUID)) {
        if tasks.last() != Some(&task) && !tasks.contains(&task) {
            tasks.push(task);
        }
    }
    let first = spans.iter().find(|span| span.name == names::TASK_ORCHESTRATION).or(spans.first());
    let mut view = TraceView {
        trace_id: spans.first().map(|span| span.trace_id.to_string()).unwrap_or_default(),
        correlation_id: first.and_then(|span| shown.text(&span.attributes, names::CORRELATION_ID)).map(Cow::into_owned),
        tasks: tasks.into_iter().map(str::to_owned).collect(),
        began_at: began,
        duration_ms: began.zip(ended).map_or(0.0, |(began, ended)| ms(ended - began)),
        sampled,
        in_progress: spans.iter().any(is_open),
        spans: spans.len(),
        shown: 0,
        errors: spans.iter().filter(|span| span.error.is_some()).count(),
        tokens: figures::tokens(&spans),
        roots: Vec::new(),
        summary: figures::summary(&spans, &mut shown),
        waits: figures::waits(&spans, &mut shown),
        gaps: began.map(|began| figures::gaps(&spans, began)).unwrap_or_default(),
        sources,
    };
    let tree = Tree::of(&spans, include, began.unwrap_or_default());
    (view.roots, view.shown) = tree.nodes(&mut shown);
    view
}

/// Of spans that began together, the one that others hang below comes first.
fn depth_hint(name: &str) -> u8 {
    match name {
        names::TASK_ORCHESTRATION => 0,
        names::TASK_STATE_TRANSITION | names::STEP_EXECUTION => 1,
        _ => 2,
    }
}

fn ms(delta: TimeDelta) -> f64 {
    // Microseconds of three hundred years are exact in a double.
    #[expect(clippy::cast_precision_loss, reason = "see above")]
    let micros = delta.num_microseconds().unwrap_or(i64::MAX) as f64;
    micros / 1000.0
}

fn is_open(span: &Flat) -> bool {
    span.attributes.is_true(names::IN_PROGRESS)
}

#[cfg(test)]
mod tests;
