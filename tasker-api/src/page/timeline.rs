//! A trace as rows of bars on one time axis: pure, from the same spans that are exported.
//!
//! One row per step. Each attempt is bars of its own: the wait for a worker, the run, the time
//! until the result was settled. What lies between attempts is drawn too: a retry's wait, a
//! timer, a signal. Where nothing ran for long, the axis is shortened.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::Serialize;
use tasker_shared::duration::in_words;
use tasker_shared::trace::log::TaskLog;
use tasker_shared::trace::names;
use tasker_shared::trace::span::{Span, SpanId, TaskSpans, Value};
use uuid::Uuid;

use super::rows::OpenWait;
use super::words;

/// A stretch in which nothing ran is shortened past this share of all the others together.
const LONGEST_GAP: f64 = 0.35;
/// What is left of it.
const SHORT_GAP: f64 = 0.08;
/// No shorter stretch is worth a break, in microseconds, and no less than this must be left to look at.
const LEAST_GAP: i64 = 1_000_000;
const LEAST_REST: i64 = 20_000;
/// Rows that the page itself holds; the script fetches and draws all of them.
pub const FIRST_ROWS: usize = 60;

/// A stretch of time: from, to.
type Gap = (i64, i64);
/// A time, and its place from 0 to 1.
type Knot = (i64, f64);

/// Rows of bars, and the axis that they share. Times are microseconds since the beginning.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Timeline {
    /// The moment zero.
    pub began_at: DateTime<Utc>,
    /// Where the last bar ends.
    pub length_us: i64,
    /// Whether something is still open: it ends "now" for the moment.
    pub open: bool,
    /// Stretches that are drawn shorter than they are, as `(from, to)`.
    pub gaps: Vec<Gap>,
    /// The axis: `(time, place)` where its scale changes; the place runs from 0 to 1.
    pub knots: Vec<Knot>,
    /// In the order of their beginnings.
    pub rows: Vec<Row>,
}

/// The bars of one step, or of the task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The step's name, with its place if it is an item of a map.
    pub name: String,
    /// The step; none for the row of the task.
    pub step: Option<Uuid>,
    /// Whether its last attempt failed.
    pub failed: bool,
    /// From its first bar to its last, in microseconds.
    pub took_us: i64,
    /// In the order of time.
    pub bars: Vec<Bar>,
}

/// One stretch of time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bar {
    /// What it was spent on.
    pub kind: Shade,
    /// Since the timeline's beginning.
    pub from: i64,
    /// The same.
    pub to: i64,
    /// Which attempt, from 1; 0 for none.
    pub attempt: i64,
    /// Whether it is still going on.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub open: bool,
    /// What a person reads beside it: a worker, an error, what was waited for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// What time was spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shade {
    /// The whole task.
    Task,
    /// A handler ran.
    Run,
    /// A handler ran, and failed.
    Fail,
    /// An attempt lay in its queue.
    Queue,
    /// A ready step was held back: by room, a worker, a limit, a pause.
    Held,
    /// Before the next attempt.
    Retry,
    /// For a timer, a signal, a child or the items of a map.
    Wait,
    /// The result was on its way.
    Settle,
}

impl Shade {
    /// The class that colours it.
    pub fn class(self) -> &'static str {
        match self {
            Self::Task => "task",
            Self::Run => "run",
            Self::Fail => "fail",
            Self::Queue => "queue",
            Self::Held => "held",
            Self::Retry => "retry",
            Self::Wait => "wait",
            Self::Settle => "settle",
        }
    }

    /// What a person reads.
    pub fn word(self) -> &'static str {
        match self {
            Self::Task => "the task",
            Self::Run => "running",
            Self::Fail => "failed attempt",
            Self::Queue => "in the queue",
            Self::Held => "held back",
            Self::Retry => "waiting to retry",
            Self::Wait => "waiting",
            Self::Settle => "result on its way",
        }
    }
}

impl Timeline {
    /// Draws the spans of a task, and what waits in it now. `log` is what they were made from: it has the names.
    pub fn new(log: &TaskLog, spans: &TaskSpans, waits: &[OpenWait], now: DateTime<Utc>) -> Self {
        let began_at = spans.spans.iter().map(|span| span.start).min().unwrap_or(log.head.created_at);
        let mut rows = Rows { log, began_at, tasks: Vec::new(), steps: HashMap::new(), executions: HashMap::new() };
        for span in &spans.spans {
            rows.add(span);
        }
        for wait in waits {
            rows.add_open(wait, now);
        }
        let rows = rows.sorted();
        let length_us = rows.iter().flat_map(|row| &row.bars).map(|bar| bar.to).max().unwrap_or(0).max(1);
        let open = rows.iter().flat_map(|row| &row.bars).any(|bar| bar.open);
        let (gaps, knots) = axis(&rows, length_us);
        Self { began_at, length_us, open, gaps, knots, rows }
    }

    /// Where a time is on the axis, from 0 to 1.
    fn place(&self, us: i64) -> f64 {
        let after = self.knots.partition_point(|&(at, _)| at <= us).clamp(1, self.knots.len() - 1);
        let ((t0, x0), (t1, x1)) = (self.knots[after - 1], self.knots[after]);
        if t1 == t0 {
            return x0;
        }
        #[expect(clippy::cast_precision_loss, reason = "a place on a screen")]
        let share = (us - t0) as f64 / (t1 - t0) as f64;
        x0 + (x1 - x0) * share.clamp(0.0, 1.0)
    }

    /// The first rows, for who has no script; with one, `source` is where all of them are. `steps` leads to
    /// the page of a step, but for its id.
    pub fn markup(&self, source: &str, steps: &str) -> Markup {
        let more = self.rows.len().saturating_sub(FIRST_ROWS);
        html! {
            div.timeline id="timeline" data-source=(source) data-steps=(steps) tabindex="0" role="group" aria-label="Timeline; plus and minus zoom, arrows move" {
                div.tl-axis aria-hidden="true" {
                    span.tl-name {}
                    (self.ticks())
                    span.tl-took {}
                }
                div.tl-rows {
                    @for row in self.rows.iter().take(FIRST_ROWS) {
                        div.tl-row {
                            span.tl-name title=(row.name) {
                                @match row.step {
                                    Some(step) => a href={ (steps) (step) } { (row.name) },
                                    None => (row.name),
                                }
                            }
                            svg.tl-bars viewBox="0 0 1000 16" preserveAspectRatio="none" role="img" aria-label=(said_row(row)) {
                                (self.breaks())
                                @for bar in &row.bars { (self.rect(bar)) }
                            }
                            span.tl-took { (in_words(chrono::TimeDelta::microseconds(row.took_us))) }
                        }
                    }
                }
                @if more > 0 {
                    p.tl-more.quiet { (words::counted(more, "more row")) " with JavaScript, or as " a href=(source) { "JSON" } }
                }
            }
        }
    }

    fn ticks(&self) -> Markup {
        let length = in_words(chrono::TimeDelta::microseconds(self.length_us));
        html! {
            svg.tl-bars.tl-scale viewBox="0 0 1000 16" preserveAspectRatio="none" {
                (self.breaks())
            }
            span.tl-ends { span { "0" } span { (length) } }
        }
    }

    /// Where the axis is shortened.
    fn breaks(&self) -> Markup {
        html! {
            @for (from, to) in &self.gaps {
                @let (x0, x1) = (self.place(*from) * 1000.0, self.place(*to) * 1000.0);
                rect.b-gap x=(digits(x0)) y="0" width=(digits(x1 - x0)) height="16" {
                    title { "nothing ran for " (in_words(chrono::TimeDelta::microseconds(to - from))) "; shortened" }
                }
            }
        }
    }

    fn rect(&self, bar: &Bar) -> Markup {
        let (x0, x1) = (self.place(bar.from) * 1000.0, self.place(bar.to) * 1000.0);
        let thin = matches!(bar.kind, Shade::Settle | Shade::Task);
        html! {
            rect class={ "b-" (bar.kind.class()) @if bar.open { " open" } } x=(digits(x0)) y=(if thin { "6" } else { "2" })
                width=(digits((x1 - x0).max(1.5))) height=(if thin { "4" } else { "12" }) {
                title { (said(bar)) }
            }
        }
    }
}

/// A row in words, for who does not see it.
fn said_row(row: &Row) -> String {
    let bars: Vec<String> = row.bars.iter().take(12).map(said).collect();
    format!("{}: {}", row.name, bars.join("; "))
}

fn said(bar: &Bar) -> String {
    let attempt = if bar.attempt > 0 { format!("attempt {}: ", bar.attempt) } else { String::new() };
    let note = if bar.note.is_empty() { String::new() } else { format!(", {}", bar.note) };
    let open = if bar.open { " so far" } else { "" };
    let took = in_words(chrono::TimeDelta::microseconds(bar.to - bar.from));
    format!("{attempt}{} {took}{open}{note}", bar.kind.word())
}

fn digits(x: f64) -> String {
    format!("{}", (x * 100.0).round() / 100.0)
}

struct Rows<'a> {
    log: &'a TaskLog,
    began_at: DateTime<Utc>,
    tasks: Vec<Row>,
    steps: HashMap<Uuid, Row>,
    /// Of each attempt's span: its step, its number, where it ends.
    executions: HashMap<SpanId, (Uuid, i64, i64)>,
}

impl Rows<'_> {
    fn add(&mut self, span: &Span) {
        let (from, to) = (self.since(span.start), self.since(span.end));
        let open = matches!(get(span, names::IN_PROGRESS), Some(Value::Bool(true)));
        let step = || text(span, names::STEP_UUID)?.parse::<Uuid>().ok();
        match span.name {
            names::TASK_ORCHESTRATION => {
                let generation = integer(span, names::GENERATION);
                let again = if generation > 1 { format!(" (generation {generation})") } else { String::new() };
                let name = format!("{}{again}", text(span, names::TASK_NAME).unwrap_or("task"));
                let bar = Bar { kind: Shade::Task, from, to, attempt: 0, open, note: error(span) };
                self.tasks.push(Row { name, step: None, failed: span.error.is_some(), took_us: 0, bars: vec![bar] });
            }
            names::STEP_EXECUTION => {
                if let Some(step) = step() {
                    self.executions.insert(span.id, (step, integer(span, names::ATTEMPT_NUMBER), to));
                }
            }
            names::STEP_WAIT => {
                let reason = text(span, names::WAIT_REASON).unwrap_or_default();
                let kind = match reason {
                    "queue" => Shade::Queue,
                    "retry" => Shade::Retry,
                    "room" | "limit" | "worker" | "paused" => Shade::Held,
                    _ => Shade::Wait,
                };
                let attempt = span.parent.and_then(|parent| self.executions.get(&parent)).copied();
                let attempt = attempt.map_or(0, |(_, number, _)| number);
                let note = match (reason, text(span, names::ACTOR)) {
                    ("queue" | "retry", _) => String::new(),
                    ("room", _) => "no slot was free".into(),
                    ("worker", _) => "no worker offered its handler".into(),
                    (reason, Some(actor)) => format!("for {reason}, ended by {actor}"),
                    (reason, None) => format!("for {reason}"),
                };
                if let Some(step) = step() {
                    self.row(step).bars.push(Bar { kind, from, to, attempt, open, note });
                }
            }
            names::HANDLER_EXECUTION => {
                let Some(&(step, attempt, end)) = span.parent.and_then(|parent| self.executions.get(&parent)) else {
                    return;
                };
                let kind = if span.error.is_some() { Shade::Fail } else { Shade::Run };
                let worker = text(span, names::WORKER).map(|worker| format!("on {worker}"));
                let note = worker.into_iter().chain(Some(error(span)).filter(|note| !note.is_empty()));
                let note = note.collect::<Vec<_>>().join(", ");
                let row = self.row(step);
                row.failed = span.error.is_some();
                row.bars.push(Bar { kind, from, to, attempt, open, note });
                if end > to {
                    let settle =
                        Bar { kind: Shade::Settle, from: to, to: end, attempt, open: false, note: String::new() };
                    row.bars.push(settle);
                }
            }
            _ => {}
        }
    }

    /// A wait that has not ended.
    fn add_open(&mut self, wait: &OpenWait, now: DateTime<Utc>) {
        let (kind, note) = match (wait.held_by.as_deref(), wait.state.as_str()) {
            (Some("worker"), _) => (Shade::Held, "no worker offers its handler"),
            (Some("room"), _) => (Shade::Held, "no slot is free"),
            (Some("paused"), _) => (Shade::Held, "its queue is paused"),
            (Some(_), _) => (Shade::Held, "by a limit"),
            (None, "waiting_for_retry") => (Shade::Retry, ""),
            (None, _) => (Shade::Wait, ""),
        };
        let (from, to) = (self.since(wait.since), self.since(now.max(wait.since)));
        let bar = Bar { kind, from, to, attempt: 0, open: true, note: note.to_owned() };
        self.row(wait.step_uuid).bars.push(bar);
    }

    fn since(&self, at: DateTime<Utc>) -> i64 {
        (at - self.began_at).num_microseconds().unwrap_or(i64::MAX).max(0)
    }

    fn row(&mut self, step: Uuid) -> &mut Row {
        let info = self.log.steps.get(&step);
        self.steps.entry(step).or_insert_with(|| Row {
            name: info.map_or_else(
                || step.to_string(),
                |info| match info.item {
                    Some(item) => format!("{}[{item}]", info.name),
                    None => info.name.to_string(),
                },
            ),
            step: Some(step),
            failed: false,
            took_us: 0,
            bars: Vec::new(),
        })
    }

    fn sorted(self) -> Vec<Row> {
        let place = |row: &Row| {
            let info = row.step.and_then(|step| self.log.steps.get(&step));
            info.map_or((0, None), |info| (info.index, info.item))
        };
        let began = |row: &Row| row.bars.first().map_or(0, |bar| bar.from);
        let mut steps: Vec<Row> = self.steps.into_values().collect();
        for row in &mut steps {
            row.bars.sort_by_key(|bar| (bar.from, bar.to));
        }
        // A map stands above its items, though they are held before it begins to wait for them.
        let mut first: HashMap<u32, i64> = HashMap::new();
        for row in &steps {
            let earliest = first.entry(place(row).0).or_insert(i64::MAX);
            *earliest = (*earliest).min(began(row));
        }
        steps.sort_by_cached_key(|row| {
            let (index, item) = place(row);
            let of_map = item.is_none().then(|| first.get(&index).copied()).flatten();
            (of_map.unwrap_or_else(|| began(row)), index, item)
        });
        let mut rows = self.tasks;
        rows.extend(steps);
        for row in &mut rows {
            let last = row.bars.iter().map(|bar| bar.to).max().unwrap_or(0);
            row.took_us = last - row.bars.first().map_or(0, |bar| bar.from);
        }
        rows
    }
}

/// Where the axis is shortened, and its scale.
fn axis(rows: &[Row], length: i64) -> (Vec<Gap>, Vec<Knot>) {
    // Only a running handler is worth its full length; everything else may be shortened between
    // two beginnings or ends.
    let mut busy: Vec<(i64, i64)> = Vec::new();
    let mut points = vec![0, length];
    for bar in rows.iter().flat_map(|row| &row.bars) {
        points.extend([bar.from, bar.to]);
        if matches!(bar.kind, Shade::Run | Shade::Fail) {
            busy.push((bar.from, bar.to));
        }
    }
    points.sort_unstable();
    points.dedup();
    busy.sort_unstable();
    let mut reach = 0;
    let mut next = 0;
    let mut idle: Vec<(i64, i64)> = Vec::new();
    for pair in points.windows(2) {
        while next < busy.len() && busy[next].0 <= pair[0] {
            reach = reach.max(busy[next].1);
            next += 1;
        }
        if reach < pair[1] {
            idle.push((pair[0], pair[1]));
        }
    }
    idle.sort_unstable_by_key(|(from, to)| std::cmp::Reverse(to - from));
    #[expect(clippy::cast_precision_loss, reason = "shares of a length")]
    let float = |us: i64| us as f64;
    let mut kept = length;
    let mut gaps = Vec::new();
    for (from, to) in idle {
        let rest = kept - (to - from);
        if to - from < LEAST_GAP || float(to - from) <= LONGEST_GAP * float(rest) || rest < LEAST_REST {
            break;
        }
        kept = rest;
        gaps.push((from, to));
    }
    gaps.sort_unstable();
    let short = float(kept) * SHORT_GAP;
    #[expect(clippy::cast_precision_loss, reason = "a handful of gaps")]
    let drawn = float(kept) + short * gaps.len() as f64;
    let mut knots = vec![(0, 0.0)];
    let (mut at, mut x) = (0, 0.0);
    for &(from, to) in &gaps {
        x += float(from - at) / drawn;
        if from > at {
            knots.push((from, x));
        }
        x += short / drawn;
        knots.push((to, x));
        at = to;
    }
    if at < length || knots.len() == 1 {
        knots.push((length, 1.0));
    }
    (gaps, knots)
}

fn get<'a>(span: &'a Span, key: &str) -> Option<&'a Value> {
    span.attributes.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
}

fn text<'a>(span: &'a Span, key: &str) -> Option<&'a str> {
    match get(span, key) {
        Some(Value::Str(text)) => Some(text),
        _ => None,
    }
}

fn integer(span: &Span, key: &str) -> i64 {
    match get(span, key) {
        Some(Value::Int(n)) => *n,
        _ => 0,
    }
}

fn error(span: &Span) -> String {
    let Some(message) = &span.error else {
        return String::new();
    };
    let kind = text(span, names::ERROR_TYPE).unwrap_or("error");
    let message = if message == kind { String::new() } else { format!(": {message}") };
    words::clip(&format!("{kind}{message}"), 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(bars: &[(Shade, i64, i64)]) -> Row {
        let bars = bars
            .iter()
            .map(|&(kind, from, to)| Bar { kind, from, to, attempt: 1, open: false, note: String::new() })
            .collect();
        Row { name: "a".into(), step: None, failed: false, took_us: 0, bars }
    }

    #[test]
    fn what_ran_keeps_its_length_and_a_long_wait_is_shortened() {
        const S: i64 = 1_000_000;
        let rows = [row(&[
            (Shade::Task, 0, 7_205 * S),
            (Shade::Run, 0, 2 * S),
            (Shade::Retry, 2 * S, 7_202 * S),
            (Shade::Run, 7_202 * S, 7_205 * S),
        ])];
        let (gaps, knots) = axis(&rows, 7_205 * S);
        assert_eq!(gaps, [(2 * S, 7_202 * S)]);
        let place = |us| knots.iter().find(|(at, _)| *at == us).unwrap().1;
        assert!((place(2 * S) - 2.0 / 5.4).abs() < 1e-9, "{knots:?}");
        assert!((place(7_202 * S) - 2.4 / 5.4).abs() < 1e-9);
        assert!((knots.last().unwrap().1 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_long_run_is_never_shortened() {
        let rows =
            [row(&[(Shade::Queue, 0, 1_000), (Shade::Run, 1_000, 9_000_000), (Shade::Run, 9_500_000, 9_600_000)])];
        assert_eq!(axis(&rows, 9_600_000).0, []);
    }

    #[test]
    fn a_moment_of_work_before_a_long_wait_does_not_fill_the_axis() {
        let rows =
            [row(&[(Shade::Task, 0, 43_000_000), (Shade::Run, 75_000, 75_200), (Shade::Wait, 90_000, 43_000_000)])];
        let (gaps, _) = axis(&rows, 43_000_000);
        assert_eq!(gaps, [(90_000, 43_000_000)]);
    }

    #[test]
    fn a_task_that_only_waits_has_an_axis() {
        let rows = [row(&[(Shade::Task, 0, 5_000_000), (Shade::Wait, 10, 5_000_000)])];
        let (_, knots) = axis(&rows, 5_000_000);
        assert!(knots.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1), "{knots:?}");
        assert!((knots.last().unwrap().1 - 1.0).abs() < 1e-9, "{knots:?}");
    }
}
