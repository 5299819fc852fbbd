//! What the spans of a trace were like, in figures.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, TimeDelta, Utc};

use super::flat::Shown;
use super::{Flat, Gap, MOST_LINES, SummaryLine, Tokens, WaitLine, ms};
use tasker_shared::trace::names;

pub(super) fn tokens(spans: &[Flat]) -> Option<Tokens> {
    let mut sum = Tokens::default();
    let mut any = false;
    // Sums that stand on attempts and tasks repeat what the spans of the calls say.
    for span in spans.iter().filter(|span| span.name == names::HANDLER_EXECUTION || !span.of_log) {
        for (key, total) in
            [("gen_ai.usage.input_tokens", &mut sum.input), ("gen_ai.usage.output_tokens", &mut sum.output)]
        {
            if let Some(n) = span.attributes.int(key)
                && span.of_log
            {
                *total = total.saturating_add(n);
                any = true;
            }
        }
    }
    any.then_some(sum)
}

pub(super) fn summary<'a>(spans: &'a [Flat], shown: &mut Shown<'a>) -> Vec<SummaryLine> {
    let mut lines: HashMap<(&str, Option<Cow<str>>), SummaryLine> = HashMap::new();
    for span in spans {
        let step = shown.text(&span.attributes, names::STEP_NAME);
        let took = ms(span.end - span.start);
        let line = lines.entry((&span.name, step.clone())).or_insert_with(|| SummaryLine {
            name: span.name.to_string(),
            step: step.map(Cow::into_owned),
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

pub(super) fn waits<'a>(spans: &'a [Flat], shown: &mut Shown<'a>) -> Vec<WaitLine> {
    let mut lines: BTreeMap<Cow<str>, (usize, f64)> = BTreeMap::new();
    for span in spans.iter().filter(|span| span.name == names::STEP_WAIT) {
        let reason = shown.text(&span.attributes, names::WAIT_REASON).unwrap_or("unknown".into());
        let line = lines.entry(reason).or_default();
        line.0 += 1;
        line.1 += ms(span.end - span.start);
    }
    let line =
        |(reason, (count, total_ms)): (Cow<str>, (usize, f64))| WaitLine { reason: reason.into(), count, total_ms };
    lines.into_iter().map(line).collect()
}

/// What no span but a task's own covers; the longest are kept.
pub(super) fn gaps(spans: &[Flat], began: DateTime<Utc>) -> Vec<Gap> {
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
