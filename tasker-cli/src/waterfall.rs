//! Draws a trace as a waterfall of text: names on the left, bars on a common time axis.
//!
//! A pure function of the spans and a width. It never changes what it shows, only how much of it.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use chrono::{DateTime, TimeDelta, Utc};
use console::{Style, measure_text_width, pad_str};
use tasker_shared::duration::in_words;
use tasker_shared::trace::names;
use tasker_shared::trace::otlp::hex;
use tasker_shared::trace::span::{Span, SpanId, TaskSpans, Value};

use crate::output::{cell, clip};

/// Which spans are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// The task, its attempts, handlers and waits.
    Main,
    /// Every span.
    Every,
}

/// A part of the axis without any beginning or end gets at most this share of the width.
const LONGEST_GAP: f64 = 0.25;

/// Items of a map that are drawn; what failed is never left out.
const FIRST_ITEMS: i64 = 10;

/// A trace, laid out.
pub struct Waterfall<'a> {
    spans: &'a TaskSpans,
    rows: Vec<Row<'a>>,
    hidden: usize,
    axis: Axis,
    steps: HashMap<&'a str, &'a str>,
}

struct Row<'a> {
    span: &'a Span,
    /// The lines that lead to the name.
    lead: String,
    /// The lines that lead past it, to what stands below.
    below: String,
}

/// Events of handlers that are listed below a drawing.
const MOST_EVENTS: usize = 30;

/// Milestones that handlers reported, a line for each, each with its time since the trace began; empty
/// if there are none.
pub fn reported(spans: &TaskSpans, width: usize) -> String {
    let Some(began) = spans.spans.iter().map(|span| span.start).min() else {
        return String::new();
    };
    let handlers = spans.spans.iter().filter(|span| span.name == names::HANDLER_EXECUTION);
    let mut events: Vec<_> = handlers
        .flat_map(|span| {
            span.events.iter().filter(|event| event.name != names::EXCEPTION).map(move |event| (span, event))
        })
        .collect();
    events.sort_by_key(|(_, event)| event.at);
    let mut text = String::new();
    for (span, event) in events.iter().take(MOST_EVENTS) {
        let handler = span.attributes.iter().find(|(key, _)| *key == names::HANDLER_NAME);
        let handler = handler.map_or_else(String::new, |(_, value)| plain(value));
        let said: Vec<String> =
            event.attributes.iter().map(|(key, value)| format!("{key}={}", clip(&plain(value), 60))).collect();
        let line = format!("+{}  {handler}  {}  {}", in_words(event.at - began), event.name, said.join(" "));
        text.push_str("\n  ");
        text.push_str(&clip(&cell(Some(line.trim_end())), width.saturating_sub(2)));
    }
    if events.len() > MOST_EVENTS {
        let _ = write!(text, "\n  … and {} more", events.len() - MOST_EVENTS);
    }
    if text.is_empty() { text } else { format!("\n\nreported by handlers{text}") }
}

fn plain(value: &Value) -> String {
    match value {
        Value::Str(text) => text.to_string(),
        Value::Int(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Bool(yes) => yes.to_string(),
    }
}

impl<'a> Waterfall<'a> {
    /// Lays the spans out; those left out are counted.
    pub fn new(spans: &'a TaskSpans, detail: Detail) -> Self {
        let further = if detail == Detail::Every { HashSet::new() } else { further_items(spans) };
        let is_shown = |span: &&Span| {
            let inner = span.parent.is_some_and(|parent| further.contains(&parent)) || further.contains(&span.id);
            detail == Detail::Every || (is_main(span) && !inner)
        };
        let shown: Vec<&Span> = spans.spans.iter().filter(is_shown).collect();
        let ids: HashSet<SpanId> = shown.iter().map(|span| span.id).collect();
        let mut children: HashMap<Option<SpanId>, Vec<&Span>> = HashMap::new();
        for span in &shown {
            children.entry(span.parent.filter(|parent| ids.contains(parent))).or_default().push(span);
        }
        for siblings in children.values_mut() {
            // Stable: spans that begin together keep the order of the tree.
            siblings.sort_by_key(|span| span.start);
        }
        let mut rows = Vec::with_capacity(shown.len());
        let roots = children.get(&None).cloned().unwrap_or_default();
        for root in roots {
            let below = if children.contains_key(&Some(root.id)) { "│ " } else { "  " };
            rows.push(Row { span: root, lead: String::new(), below: below.into() });
            add_children(&children, root.id, "", &mut rows);
        }
        let steps = spans
            .spans
            .iter()
            .filter_map(|span| Some((attribute(span, names::STEP_UUID)?, attribute(span, names::STEP_NAME)?)))
            .collect();
        let axis = Axis::new(shown.iter().flat_map(|span| [span.start, span.end]));
        Self { spans, hidden: spans.spans.len() - shown.len(), rows, axis, steps }
    }

    /// The drawing, `width` columns wide, without a final line break.
    pub fn text(&self, width: usize) -> String {
        let labels: Vec<String> = self.rows.iter().map(|row| format!("{}{}", row.lead, self.label(row.span))).collect();
        let longest = labels.iter().map(|label| measure_text_width(label)).max().unwrap_or(0);
        let name_width = longest.min(width * 9 / 20).max(20);
        let bar_width = width.saturating_sub(name_width + 2 + 10).max(10);
        let mut lines = vec![self.heading(), self.scale(name_width, bar_width)];
        for (row, label) in self.rows.iter().zip(labels) {
            lines.push(self.row(row.span, &clip(&label, name_width), name_width, bar_width));
            if let Some(error) = &row.span.error {
                let kind = attribute(row.span, names::ERROR_TYPE).map_or_else(String::new, |kind| format!("{kind}: "));
                let message: String = error.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                let message = message.strip_prefix(&kind).unwrap_or(&message).to_owned();
                let room = width.saturating_sub(measure_text_width(&row.below));
                lines.push(format!(
                    "{}{}",
                    row.below,
                    Style::new().red().apply_to(clip(&format!("✗ {kind}{message}"), room))
                ));
            }
        }
        if self.hidden > 0 {
            let dim = Style::new().dim();
            lines.push(
                dim.apply_to(format!(
                    "{} more (state transitions, further items and the like) with --tree",
                    self.hidden
                ))
                .to_string(),
            );
        }
        lines.join("\n")
    }

    fn heading(&self) -> String {
        let common = |key: &str| {
            let found = self.spans.common.iter().find(|(name, _)| *name == key);
            found.map_or_else(String::new, |(_, value)| match value {
                Value::Str(text) => text.to_string(),
                other => format!("{other:?}"),
            })
        };
        let count = self.spans.spans.len();
        let failed = self.spans.spans.iter().filter(|span| span.error.is_some()).count();
        let errors = if failed == 0 { String::new() } else { format!(", {failed} with an error") };
        format!(
            "trace {}  {} {}  {count} spans{errors}",
            hex(&self.spans.trace_id),
            names::CORRELATION_ID,
            clip(&common(names::CORRELATION_ID), 60)
        )
    }

    /// The axis: where it begins and ends, and where time is shortened.
    fn scale(&self, name_width: usize, bar_width: usize) -> String {
        let mut cells = vec!['─'; bar_width];
        for (from, to) in self.axis.shortened() {
            let (from, to) = self.axis.cells(from, to, bar_width);
            cells[from..to].fill('╌');
        }
        if let (Some(first), true) = (cells.first_mut(), bar_width > 1) {
            *first = '├';
        }
        if let Some(last) = cells.last_mut() {
            *last = '┤';
        }
        let note = if self.axis.shortened().next().is_some() { "(╌ is shortened)" } else { "" };
        let axis: String = cells.into_iter().collect();
        let dim = Style::new().dim();
        format!("{}  {} {}", pad(note, name_width), dim.apply_to(axis), dim.apply_to(in_words(self.axis.length())))
    }

    fn row(&self, span: &Span, label: &str, name_width: usize, bar_width: usize) -> String {
        let (from, to) = self.axis.cells(span.start, span.end, bar_width);
        let open = attribute_is_true(span, names::IN_PROGRESS);
        let fill = match span.name {
            names::STEP_WAIT => '░',
            _ if open => '▒',
            names::TASK_ORCHESTRATION | names::STEP_EXECUTION => '▬',
            _ => '█',
        };
        let mut cells = vec![' '; bar_width];
        cells[from..to].fill(fill);
        for (gap_from, gap_to) in self.axis.shortened().filter(|(a, b)| *a >= span.start && *b <= span.end) {
            let (gap_from, gap_to) = self.axis.cells(gap_from, gap_to, bar_width);
            cells[gap_from..gap_to].fill('╌');
        }
        if open && to > 0 {
            cells[to - 1] = '▶';
        }
        let bar: String = cells.into_iter().collect();
        let style = match () {
            () if span.error.is_some() => Style::new().red(),
            () if open => Style::new().yellow(),
            () if span.name == names::STEP_WAIT => Style::new().dim(),
            () if span.name == names::HANDLER_EXECUTION => Style::new().green(),
            () => Style::new().cyan(),
        };
        let took = in_words(span.end - span.start);
        let took = if open { format!("{took} …") } else { took };
        format!("{}  {} {took}", pad(label, name_width), style.apply_to(bar))
    }

    fn label(&self, span: &Span) -> String {
        let get = |key| attribute(span, key).unwrap_or("?");
        let number = |key| integer(span, key).unwrap_or_default();
        let step = attribute(span, names::STEP_UUID).and_then(|step| self.steps.get(step)).copied();
        let detail = match span.name {
            names::TASK_ORCHESTRATION => {
                let generation = number(names::GENERATION);
                let again = if generation > 1 { format!(" generation {generation}") } else { String::new() };
                format!("{} {}{again}", get(names::TASK_NAME), get(names::TEMPLATE_VERSION))
            }
            // Where it came from stands in the line before.
            names::TASK_STATE_TRANSITION => format!("→ {}", get(names::TO_STATE)),
            names::STEP_STATE_TRANSITION => {
                let outside = span.parent.is_some_and(|parent| {
                    self.spans.spans.iter().any(|span| span.id == parent && span.name == names::TASK_ORCHESTRATION)
                });
                let whose = if outside { step.unwrap_or("a step") } else { "" };
                format!("{whose} → {}", get(names::TO_STATE)).trim_start().to_owned()
            }
            names::STEP_EXECUTION => {
                let item = integer(span, names::STEP_INDEX).map_or_else(String::new, |item| format!("[{item}]"));
                format!(
                    "{}{item} attempt {}/{}",
                    get(names::STEP_NAME),
                    number(names::ATTEMPT_NUMBER),
                    number(names::MAX_ATTEMPTS)
                )
            }
            names::STEP_WAIT if get(names::WAIT_REASON) == "queue" => "queue".to_owned(),
            names::STEP_WAIT => format!("{} of {}", get(names::WAIT_REASON), step.unwrap_or("a step")),
            names::HANDLER_EXECUTION => get(names::HANDLER_NAME).to_owned(),
            names::STEP_DISCOVERY => format!("{} ready", number(names::READY_STEPS)),
            names::STEP_ENQUEUING => {
                let queue = attribute(span, names::MESSAGING_DESTINATION).unwrap_or("several queues");
                format!("{} → {queue}", number(names::MESSAGING_BATCH_COUNT))
            }
            names::RESULT_EVALUATION => format!("{} result(s)", number(names::RESULTS)),
            _ => String::new(),
        };
        format!("{} {detail}", span.name).trim_end().to_owned()
    }
}

fn pad(text: &str, width: usize) -> String {
    pad_str(text, width, console::Alignment::Left, None).into_owned()
}

/// The attempts of a map's items beyond the first few, but for those that failed.
fn further_items(spans: &TaskSpans) -> HashSet<SpanId> {
    let is_further = |span: &&Span| integer(span, names::STEP_INDEX).is_some_and(|item| item >= FIRST_ITEMS);
    spans.spans.iter().filter(is_further).filter(|span| span.error.is_none()).map(|span| span.id).collect()
}

fn is_main(span: &Span) -> bool {
    matches!(span.name, names::TASK_ORCHESTRATION | names::STEP_EXECUTION | names::HANDLER_EXECUTION | names::STEP_WAIT)
        // What failed is never left out.
        || span.error.is_some()
}

fn add_children<'a>(
    children: &HashMap<Option<SpanId>, Vec<&'a Span>>,
    parent: SpanId,
    lead: &str,
    rows: &mut Vec<Row<'a>>,
) {
    let below = children.get(&Some(parent)).map_or(&[][..], Vec::as_slice);
    for (place, span) in below.iter().enumerate() {
        let last = place + 1 == below.len();
        let past = format!("{lead}{}", if last { "  " } else { "│ " });
        let below = if children.contains_key(&Some(span.id)) { format!("{past}│ ") } else { format!("{past}  ") };
        rows.push(Row { span, lead: format!("{lead}{}", if last { "└ " } else { "├ " }), below });
        add_children(children, span.id, &past, rows);
    }
}

/// Database time to columns. Long stretches in which nothing begins or ends are shortened, so
/// that milliseconds of work stay visible beside hours of waiting.
struct Axis {
    /// Where something begins or ends, with its place from 0 to 1.
    marks: Vec<(DateTime<Utc>, f64)>,
    gaps: Vec<(DateTime<Utc>, DateTime<Utc>)>,
}

impl Axis {
    fn new(times: impl Iterator<Item = DateTime<Utc>>) -> Self {
        let mut times: Vec<_> = times.collect();
        times.sort_unstable();
        times.dedup();
        let lengths: Vec<f64> = times.windows(2).map(|pair| seconds(pair[1] - pair[0])).collect();
        let all: f64 = lengths.iter().sum();
        // With few marks there is nothing that a long stretch could crowd out.
        let is_long = |length: f64| lengths.len() > 4 && length > all * 2.0 * LONGEST_GAP;
        let short: f64 = lengths.iter().filter(|length| !is_long(**length)).sum();
        let weights: Vec<f64> = lengths
            .iter()
            .map(|length| if is_long(*length) { short.max(1e-9) * LONGEST_GAP / (1.0 - LONGEST_GAP) } else { *length })
            .collect();
        let total: f64 = weights.iter().sum::<f64>().max(1e-9);
        let mut marks = Vec::with_capacity(times.len());
        let mut place = 0.0;
        for (at, time) in times.iter().enumerate() {
            marks.push((*time, place / total));
            place += weights.get(at).copied().unwrap_or(0.0);
        }
        let gaps = times
            .windows(2)
            .zip(&lengths)
            .filter(|(_, length)| is_long(**length))
            .map(|(pair, _)| (pair[0], pair[1]))
            .collect();
        Self { marks, gaps }
    }

    fn length(&self) -> TimeDelta {
        match (self.marks.first(), self.marks.last()) {
            (Some((first, _)), Some((last, _))) => *last - *first,
            _ => TimeDelta::zero(),
        }
    }

    fn shortened(&self) -> impl Iterator<Item = (DateTime<Utc>, DateTime<Utc>)> + '_ {
        self.gaps.iter().copied()
    }

    /// The columns from (inclusive) and to (exclusive); at least one.
    fn cells(&self, start: DateTime<Utc>, end: DateTime<Utc>, width: usize) -> (usize, usize) {
        let place = |time| match self.marks.binary_search_by_key(&time, |mark| mark.0) {
            Ok(at) => self.marks[at].1,
            Err(at) => self.marks.get(at).map_or(1.0, |mark| mark.1),
        };
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "columns of a terminal"
        )]
        let column = |place: f64| ((place * width as f64).round() as usize).min(width);
        let from = column(place(start)).min(width - 1);
        (from, column(place(end)).max(from + 1))
    }
}

#[expect(clippy::cast_precision_loss, reason = "a bar has fewer columns than a float has digits")]
fn seconds(length: TimeDelta) -> f64 {
    length.num_microseconds().unwrap_or(i64::MAX) as f64 / 1e6
}

fn attribute<'s>(span: &'s Span, key: &str) -> Option<&'s str> {
    span.attributes.iter().find(|(name, _)| *name == key).and_then(|(_, value)| match value {
        Value::Str(text) => Some(text.as_ref()),
        _ => None,
    })
}

fn integer(span: &Span, key: &str) -> Option<i64> {
    span.attributes.iter().find(|(name, _)| *name == key).and_then(|(_, value)| match value {
        Value::Int(number) => Some(*number),
        _ => None,
    })
}

fn attribute_is_true(span: &Span, key: &str) -> bool {
    span.attributes.iter().any(|(name, value)| *name == key && *value == Value::Bool(true))
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone as _;
    use tasker_shared::trace::span::{Kind, Service};

    use super::*;

    fn at(ms: i64) -> DateTime<Utc> {
        Utc.timestamp_millis_opt(1_900_000_000_000 + ms).unwrap()
    }

    fn span(
        id: u8,
        parent: Option<u8>,
        name: &'static str,
        from: i64,
        to: i64,
        attributes: Vec<(&'static str, Value)>,
    ) -> Span {
        Span {
            id: [id; 8],
            parent: parent.map(|id| [id; 8]),
            parent_is_remote: false,
            name,
            kind: Kind::Internal,
            service: Service::Orchestration,
            start: at(from),
            end: at(to),
            attributes,
            links: vec![],
            events: vec![],
            error: None,
            settled_at: at(to),
        }
    }

    fn execution(id: u8, step: &'static str, number: i64, from: i64, to: i64) -> Span {
        let attributes = vec![
            (names::STEP_UUID, "s1".into()),
            (names::STEP_NAME, step.into()),
            (names::ATTEMPT_NUMBER, number.into()),
            (names::MAX_ATTEMPTS, 3.into()),
        ];
        span(id, Some(1), names::STEP_EXECUTION, from, to, attributes)
    }

    fn task(spans: Vec<Span>) -> TaskSpans {
        TaskSpans {
            trace_id: [0xab; 16],
            trace_flags: 1,
            tracestate: None,
            common: vec![(names::CORRELATION_ID, "ORD-1".into())],
            spans,
        }
    }

    fn retried(wait_ms: i64) -> TaskSpans {
        let again = 100 + wait_ms;
        let mut root =
            span(1, Some(9), names::TASK_ORCHESTRATION, 0, again + 100, vec![(names::TASK_NAME, "order".into())]);
        root.attributes.push((names::TEMPLATE_VERSION, "1.0.0".into()));
        root.parent_is_remote = true;
        let mut failed = execution(2, "charge", 1, 10, 100);
        failed.error = Some("the gateway timed out".into());
        failed.attributes.push((names::ERROR_TYPE, "GatewayTimeout".into()));
        let wait = vec![(names::STEP_UUID, "s1".into()), (names::WAIT_REASON, "retry".into())];
        let moved = vec![(names::FROM_STATE, "pending".into()), (names::TO_STATE, "initializing".into())];
        task(vec![
            root,
            span(6, Some(1), names::TASK_STATE_TRANSITION, 0, 5, moved),
            failed,
            span(3, Some(1), names::STEP_WAIT, 100, again, wait),
            execution(4, "charge", 2, again, again + 100),
            span(
                5,
                Some(4),
                names::HANDLER_EXECUTION,
                again + 20,
                again + 60,
                vec![(names::HANDLER_NAME, "payments.charge".into())],
            ),
        ])
    }

    fn draw(spans: &TaskSpans, detail: Detail) -> String {
        console::strip_ansi_codes(&Waterfall::new(spans, detail).text(110))
            .lines()
            .map(str::trim_end)
            .collect::<Vec<_>>()
            .join("\n")
    }

    #[test]
    fn a_retry_shows_the_failure_the_wait_and_the_next_attempt() {
        insta::assert_snapshot!(draw(&retried(100), Detail::Main));
    }

    #[test]
    fn an_hour_of_waiting_does_not_hide_milliseconds_of_work() {
        insta::assert_snapshot!(draw(&retried(3_600_000), Detail::Main));
    }

    #[test]
    fn every_span_stands_in_the_tree() {
        let spans = retried(100);
        let drawn = draw(&spans, Detail::Every);
        for name in [names::TASK_STATE_TRANSITION, names::STEP_WAIT, names::HANDLER_EXECUTION] {
            assert!(drawn.contains(name), "{drawn}");
        }
        assert!(!drawn.contains("--tree"), "{drawn}");
    }

    #[test]
    fn what_is_in_progress_is_marked() {
        let mut spans = retried(100);
        spans.spans[4].attributes.push((names::IN_PROGRESS, true.into()));
        let drawn = draw(&spans, Detail::Main);
        let line = drawn.lines().find(|line| line.contains("charge attempt 2/3")).unwrap();
        assert!(line.contains('▶') && line.ends_with("100 ms …"), "{line}");
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        let mut spans = retried(100);
        spans.spans[2].error = Some("x".repeat(500));
        for width in [60, 80, 200] {
            for line in console::strip_ansi_codes(&Waterfall::new(&spans, Detail::Every).text(width)).lines().skip(1) {
                assert!(measure_text_width(line) <= width + 4, "{} > {width}: {line}", measure_text_width(line));
            }
        }
    }
}
