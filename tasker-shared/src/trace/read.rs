//! A trace as people and programs read it: one normalised tree, whatever it was made from.
//!
//! Pure. The spans come from the log, which always has them, and from a backend, which may have
//! the user's own spans beside them; what both have is the log's. Sizes are bounded here: a task
//! of ten thousand steps answers with its figures and its first spans, never with all of them.

use std::collections::{BTreeMap, HashMap, HashSet};

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use super::names;
use super::otlp::{ServiceNames, hex};
use super::span::{Kind, Span, TaskSpans, Value};
use crate::redact::Policy;

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

/// A span from anywhere.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "what OTLP calls them; ids are in lower-case hex")]
pub struct Flat {
    pub trace_id: String,
    pub span_id: String,
    pub parent_span_id: Option<String>,
    pub name: String,
    pub service: String,
    pub kind: &'static str,
    pub start: DateTime<Utc>,
    pub end: DateTime<Utc>,
    pub attributes: Map<String, Json>,
    pub events: Vec<ReadEvent>,
    pub links: Vec<ReadLink>,
    pub error: Option<String>,
    /// The log has it.
    pub of_log: bool,
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

/// The spans of a task as any reader sees them.
pub fn flat(task: &TaskSpans, names: &ServiceNames, policy: &Policy) -> Vec<Flat> {
    let trace_id = hex(&task.trace_id);
    // Most values stand on many spans: the policy looks at each once.
    let mut known = HashMap::new();
    task.spans
        .iter()
        .map(|span| Flat {
            trace_id: trace_id.clone(),
            span_id: hex(&span.id),
            parent_span_id: span.parent.map(|id| hex(&id)),
            name: span.name.to_owned(),
            service: names.of(span.service).to_owned(),
            kind: match span.kind {
                Kind::Internal => "internal",
                Kind::Server => "server",
                Kind::Client => "client",
                Kind::Producer => "producer",
                Kind::Consumer => "consumer",
            },
            start: span.start,
            end: span.end,
            attributes: map(
                policy,
                &mut known,
                task.common.iter().chain(&span.attributes).map(|(key, value)| (*key, value)),
            ),
            events: span
                .events
                .iter()
                .map(|event| ReadEvent {
                    name: event.name.to_string(),
                    at: event.at,
                    attributes: map(policy, &mut known, event.attributes.iter().map(|(key, value)| (&**key, value))),
                })
                .collect(),
            links: span
                .links
                .iter()
                .map(|link| ReadLink { trace_id: hex(&link.trace_id), span_id: hex(&link.span_id) })
                .collect(),
            error: span.error.as_deref().map(|error| policy.text(error).into_owned()),
            of_log: true,
        })
        .collect()
}

/// What the policy made of a text by the name of its attribute.
type Known<'a> = HashMap<(&'a str, &'a str), Option<Json>>;

fn map<'a>(
    policy: &Policy,
    known: &mut Known<'a>,
    attributes: impl Iterator<Item = (&'a str, &'a Value)>,
) -> Map<String, Json> {
    attributes.filter_map(|(key, value)| Some((key.to_owned(), shown(policy, known, key, value)?))).collect()
}

fn shown<'a>(policy: &Policy, known: &mut Known<'a>, key: &'a str, value: &'a Value) -> Option<Json> {
    Some(match value {
        Value::Str(text) => {
            let shown = || policy.attribute(key, text).map(|text| json!(text));
            return known.entry((key, &**text)).or_insert_with(shown).clone();
        }
        Value::Int(number) => json!(number),
        Value::Float(number) => json!(number),
        Value::Bool(word) => json!(word),
    })
}

/// The log's spans and those that only the backend has, each once; how many are the backend's.
pub fn merge(mut log: Vec<Flat>, backend: Vec<Flat>) -> (Vec<Flat>, usize) {
    let mut known: HashSet<String> = log.iter().map(|span| span.span_id.clone()).collect();
    let before = log.len();
    log.extend(backend.into_iter().filter(|span| known.insert(span.span_id.clone())));
    let added = log.len() - before;
    (log, added)
}

/// The spans of a task and those below them.
pub fn below_task(spans: Vec<Flat>, task_uuid: &str) -> Vec<Flat> {
    let parents: HashMap<&str, &str> =
        spans.iter().filter_map(|span| Some((span.span_id.as_str(), span.parent_span_id.as_deref()?))).collect();
    let is_own =
        |span: &Flat| span.of_log && span.attributes.get(names::TASK_UUID).and_then(Json::as_str) == Some(task_uuid);
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

/// The same for a span of the normalised tree.
pub fn hide_errors(span: &mut Flat) {
    if let Some(error) = &mut span.error {
        HIDDEN.clone_into(error);
    }
    span.attributes.remove(names::REASON);
    for event in &mut span.events {
        event.attributes.remove(names::EXCEPTION_MESSAGE);
    }
}

/// The normalised tree.
pub fn view(mut spans: Vec<Flat>, sampled: bool, include: &Include, sources: Sources) -> TraceView {
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
    let mut tasks = Vec::new();
    for span in &spans {
        if let Some(task) = span.attributes.get(names::TASK_UUID).and_then(Json::as_str)
            && span.of_log
            && tasks.last().is_none_or(|last: &String| last != task)
            && !tasks.iter().any(|known: &String| known == task)
        {
            tasks.push(task.to_owned());
        }
    }
    let first = spans.iter().find(|span| span.name == names::TASK_ORCHESTRATION).or(spans.first());
    let mut view = TraceView {
        trace_id: spans.first().map(|span| span.trace_id.clone()).unwrap_or_default(),
        correlation_id: first.and_then(|span| span.attributes.get(names::CORRELATION_ID)?.as_str()).map(str::to_owned),
        tasks,
        began_at: began,
        duration_ms: began.zip(ended).map_or(0.0, |(began, ended)| ms(ended - began)),
        sampled,
        in_progress: spans.iter().any(is_open),
        spans: spans.len(),
        shown: 0,
        errors: spans.iter().filter(|span| span.error.is_some()).count(),
        tokens: tokens(&spans),
        roots: Vec::new(),
        summary: summary(&spans),
        waits: waits(&spans),
        gaps: began.map(|began| gaps(&spans, began)).unwrap_or_default(),
        sources,
    };
    let tree = Tree::of(&spans, include, began.unwrap_or_default());
    (view.roots, view.shown) = tree.nodes();
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
    span.attributes.get(names::IN_PROGRESS) == Some(&Json::Bool(true))
}

fn tokens(spans: &[Flat]) -> Option<Tokens> {
    let mut sum = Tokens::default();
    let mut any = false;
    // Sums that stand on attempts and tasks repeat what the spans of the calls say.
    for span in spans.iter().filter(|span| span.name == names::HANDLER_EXECUTION || !span.of_log) {
        for (key, total) in
            [("gen_ai.usage.input_tokens", &mut sum.input), ("gen_ai.usage.output_tokens", &mut sum.output)]
        {
            if let Some(n) = span.attributes.get(key).and_then(Json::as_i64)
                && span.of_log
            {
                *total = total.saturating_add(n);
                any = true;
            }
        }
    }
    any.then_some(sum)
}

fn summary(spans: &[Flat]) -> Vec<SummaryLine> {
    let mut lines: HashMap<(&str, Option<&str>), SummaryLine> = HashMap::new();
    for span in spans {
        let step = span.attributes.get(names::STEP_NAME).and_then(Json::as_str);
        let took = ms(span.end - span.start);
        let line = lines.entry((span.name.as_str(), step)).or_insert_with(|| SummaryLine {
            name: span.name.clone(),
            step: step.map(str::to_owned),
            count: 0,
            errors: 0,
            total_ms: 0.0,
            longest_ms: 0.0,
        });
        line.count += 1;
        line.errors += usize::from(span.error.is_some());
        line.total_ms += took;
        line.longest_ms = line.longest_ms.max(took);
    }
    let mut lines: Vec<SummaryLine> = lines.into_values().collect();
    lines.sort_by(|a, b| b.total_ms.total_cmp(&a.total_ms).then_with(|| (&a.name, &a.step).cmp(&(&b.name, &b.step))));
    lines.truncate(MOST_LINES);
    lines
}

fn waits(spans: &[Flat]) -> Vec<WaitLine> {
    let mut lines: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for span in spans.iter().filter(|span| span.name == names::STEP_WAIT) {
        let reason = span.attributes.get(names::WAIT_REASON).and_then(Json::as_str).unwrap_or("unknown");
        let line = lines.entry(reason).or_default();
        line.0 += 1;
        line.1 += ms(span.end - span.start);
    }
    let line = |(reason, (count, total_ms)): (&str, (usize, f64))| WaitLine { reason: reason.into(), count, total_ms };
    lines.into_iter().map(line).collect()
}

/// What no span but a task's own covers; the longest are kept.
fn gaps(spans: &[Flat], began: DateTime<Utc>) -> Vec<Gap> {
    let tasks = spans.iter().filter(|span| span.name == names::TASK_ORCHESTRATION);
    let Some(end) = tasks.map(|span| span.end).max() else {
        return Vec::new();
    };
    let mut covered = began;
    let mut gaps = Vec::new();
    let mut note = |from: DateTime<Utc>, to: DateTime<Utc>| {
        // What rounds to nothing is no gap.
        if to - from >= TimeDelta::milliseconds(1) {
            gaps.push(Gap { offset_ms: ms(from - began), duration_ms: ms(to - from) });
        }
    };
    for span in spans.iter().filter(|span| span.name != names::TASK_ORCHESTRATION) {
        if span.start > covered {
            note(covered, span.start);
        }
        covered = covered.max(span.end);
    }
    if end > covered {
        note(covered, end);
    }
    if gaps.len() > MOST_LINES {
        gaps.sort_by(|a, b| b.duration_ms.total_cmp(&a.duration_ms));
        gaps.truncate(MOST_LINES);
        gaps.sort_by(|a, b| a.offset_ms.total_cmp(&b.offset_ms));
    }
    gaps
}

struct Tree<'a> {
    spans: &'a [Flat],
    children: Vec<Vec<usize>>,
    roots: Vec<usize>,
    include: &'a Include,
    began: DateTime<Utc>,
}

impl<'a> Tree<'a> {
    fn of(spans: &'a [Flat], include: &'a Include, began: DateTime<Utc>) -> Self {
        let at: HashMap<&str, usize> = spans.iter().enumerate().map(|(n, span)| (span.span_id.as_str(), n)).collect();
        let mut children = vec![Vec::new(); spans.len()];
        let mut roots = Vec::new();
        for (n, span) in spans.iter().enumerate() {
            let parent = span.parent_span_id.as_deref().and_then(|id| at.get(id)).copied();
            match parent {
                Some(parent) if parent != n => children[parent].push(n),
                _ => roots.push(n),
            }
        }
        if let Some(under) = &include.under {
            roots = at.get(under.as_str()).copied().into_iter().collect();
        }
        Self { spans, children, roots, include, began }
    }

    /// The trees within the limits, and how many spans they hold. The first spans in the order in
    /// which a reader meets them are shown: each with all that are above it.
    fn nodes(&self) -> (Vec<Node>, usize) {
        let below = self.below();
        let mut left = self.include.max_spans;
        let roots = self.roots.clone();
        let nodes: Vec<Node> = roots.into_iter().filter_map(|root| self.node(root, 1, &below, &mut left)).collect();
        (nodes, self.include.max_spans - left)
    }

    /// How many wanted spans each span has below it; cycles of a backend's spans end somewhere.
    fn below(&self) -> Vec<usize> {
        let mut below = vec![0; self.spans.len()];
        let mut seen = vec![false; self.spans.len()];
        let mut stack: Vec<(usize, usize)> = self.roots.iter().map(|root| (*root, 0)).collect();
        while let Some((at, next)) = stack.pop() {
            seen[at] = true;
            match self.children[at].get(next) {
                Some(child) => {
                    stack.push((at, next + 1));
                    if !seen[*child] {
                        stack.push((*child, 0));
                    }
                }
                None => {
                    below[at] =
                        self.children[at].iter().map(|child| below[*child] + usize::from(self.wanted(*child))).sum();
                }
            }
        }
        below
    }

    fn wanted(&self, at: usize) -> bool {
        self.include.transitions
            || !matches!(
                self.spans[at].name.as_str(),
                names::TASK_STATE_TRANSITION
                    | names::STEP_STATE_TRANSITION
                    | names::STEP_DISCOVERY
                    | names::STEP_ENQUEUING
                    | names::RESULT_EVALUATION
                    | names::RESULT_SUBMISSION
            )
    }

    fn node(&self, at: usize, depth: usize, below: &[usize], left: &mut usize) -> Option<Node> {
        if *left == 0 || !self.wanted(at) {
            return None;
        }
        *left -= 1;
        let span = &self.spans[at];
        let mut children = Vec::new();
        if depth < self.include.depth.clamp(1, DEEPEST) {
            for child in &self.children[at] {
                if *left == 0 {
                    break;
                }
                children.extend(self.node(*child, depth + 1, below, left));
            }
        }
        let held: usize = children.iter().map(|child: &Node| 1 + held_below(child)).sum();
        Some(Node {
            span_id: span.span_id.clone(),
            parent_span_id: span.parent_span_id.clone(),
            name: span.name.clone(),
            service: span.service.clone(),
            kind: span.kind.to_owned(),
            offset_ms: ms(span.start - self.began),
            duration_ms: ms(span.end - span.start),
            status: if span.error.is_some() { "error" } else { "ok" }.to_owned(),
            error: span.error.clone(),
            in_progress: is_open(span),
            source: if span.of_log { "log" } else { "backend" }.to_owned(),
            attributes: self.include.attributes.then(|| span.attributes.clone()),
            events: if self.include.events { span.events.clone() } else { Vec::new() },
            links: if self.include.links { span.links.clone() } else { Vec::new() },
            children,
            omitted: below[at].saturating_sub(held),
        })
    }
}

fn held_below(node: &Node) -> usize {
    node.children.iter().map(|child| 1 + held_below(child)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(1_700_000_000_000 + ms).unwrap()
    }

    fn span(id: &str, parent: Option<&str>, name: &str, from: i64, to: i64) -> Flat {
        Flat {
            trace_id: "aa".into(),
            span_id: id.into(),
            parent_span_id: parent.map(str::to_owned),
            name: name.into(),
            service: "s".into(),
            kind: "internal",
            start: at(from),
            end: at(to),
            attributes: Map::new(),
            events: Vec::new(),
            links: Vec::new(),
            error: None,
            of_log: true,
        }
    }

    fn outline(nodes: &[Node], level: usize, out: &mut Vec<String>) {
        for node in nodes {
            let more = if node.omitted > 0 { format!(" +{}", node.omitted) } else { String::new() };
            out.push(format!("{}{}{more}", "  ".repeat(level), node.span_id));
            outline(&node.children, level + 1, out);
        }
    }

    fn drawn(view: &TraceView) -> Vec<String> {
        let mut out = Vec::new();
        outline(&view.roots, 0, &mut out);
        out
    }

    fn sample() -> Vec<Flat> {
        vec![
            span("moved", Some("root"), names::TASK_STATE_TRANSITION, 0, 1),
            span("late", Some("try"), "charge", 30, 40),
            span("root", Some("caller"), names::TASK_ORCHESTRATION, 0, 100),
            span("try", Some("root"), names::STEP_EXECUTION, 20, 50),
        ]
    }

    #[test]
    fn spans_nest_whatever_their_order_and_a_parent_that_is_not_here_makes_a_root() {
        let view = view(sample(), true, &Include::default(), Sources::default());
        assert_eq!(drawn(&view), ["root", "  moved", "  try", "    late"]);
        assert_eq!((view.spans, view.shown, view.duration_ms), (4, 4, 100.0));
        assert_eq!(view.roots[0].parent_span_id.as_deref(), Some("caller"));
        assert!((view.roots[0].children[1].offset_ms - 20.0).abs() < 1e-9);
    }

    #[test]
    fn limits_leave_the_first_spans_and_count_the_rest() {
        let limited = |max_spans, depth| {
            let include = Include { max_spans, depth, ..Include::default() };
            drawn(&view(sample(), true, &include, Sources::default()))
        };
        assert_eq!(limited(2, 30), ["root +2", "  moved"]);
        assert_eq!(limited(10, 2), ["root +1", "  moved", "  try +1"]);
        let under = Include { under: Some("try".into()), ..Include::default() };
        assert_eq!(drawn(&view(sample(), true, &under, Sources::default())), ["try", "  late"]);
        let plain = Include::default().only("attributes, links").unwrap();
        assert_eq!(drawn(&view(sample(), true, &plain, Sources::default())), ["root", "  try", "    late"]);
        assert_eq!(Include::default().only("links,prompts").unwrap_err(), "prompts");
    }

    #[test]
    fn times_without_any_span_are_gaps() {
        let view = view(sample(), true, &Include::default(), Sources::default());
        let gaps: Vec<_> = view.gaps.iter().map(|gap| (gap.offset_ms, gap.duration_ms)).collect();
        assert_eq!(gaps, [(1.0, 19.0), (50.0, 50.0)]);
    }

    #[test]
    fn the_log_wins_where_a_backend_has_the_same_span_and_cycles_of_a_backend_hurt_nobody() {
        let mut theirs = vec![span("try", Some("root"), "other", 0, 1), span("own", Some("late"), "query", 31, 32)];
        theirs.push(span("a", Some("b"), "cycle", 0, 1));
        theirs.push(span("b", Some("a"), "cycle", 0, 1));
        for span in &mut theirs {
            span.of_log = false;
        }
        let (all, added) = merge(sample(), theirs);
        assert_eq!((all.len(), added), (7, 3));
        let view = view(all, true, &Include::default(), Sources::default());
        assert_eq!(drawn(&view), ["root", "  moved", "  try", "    late", "      own"]);
        assert_eq!(view.roots[0].children[1].children[0].children[0].source, "backend");
    }

    #[test]
    fn waits_and_summary_add_up() {
        let mut spans = sample();
        for n in 0..3 {
            let mut wait = span(&format!("w{n}"), Some("root"), names::STEP_WAIT, 50 + n * 10, 55 + n * 10);
            wait.attributes.insert(names::WAIT_REASON.into(), json!("retry"));
            spans.push(wait);
        }
        let view = view(spans, true, &Include::default(), Sources::default());
        assert_eq!(view.waits, [WaitLine { reason: "retry".into(), count: 3, total_ms: 15.0 }]);
        assert_eq!((view.summary[0].name.as_str(), view.summary[0].count), (names::TASK_ORCHESTRATION, 1));
        assert!(view.summary.iter().any(|line| line.name == names::STEP_WAIT && line.count == 3));
    }
}
