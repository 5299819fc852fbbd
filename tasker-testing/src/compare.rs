//! What the log says against what a backend holds.

use std::collections::HashMap;

use tasker_shared::trace::names;
use tasker_shared::trace::otlp::hex;
use tasker_shared::trace::span::{SpanId, TraceId};

use crate::rules::is_of_the_tree;
use crate::trace::{Span, Trace};

/// Where two views of the same tasks differ; every list holds one sentence a span.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// Spans of the log that are not there.
    pub missing: Vec<String>,
    /// Spans of the tree that are there, and not in the log.
    pub extra: Vec<String>,
    /// Spans whose parent is not there; a missing span's children are among them.
    pub orphan: Vec<String>,
    /// Spans that hang below another parent than the log says.
    pub misparented: Vec<String>,
    /// Spans that say something else than the log, and second copies that say something else than the first.
    pub differing: Vec<String>,
    /// Second copies with the same content: harmless.
    pub duplicates: usize,
    /// Parents of another service that are not there: theirs to send.
    pub remote_parents_missing: usize,
    /// Spans that are there as the log has them.
    pub matched: usize,
}

impl Difference {
    /// Whether the views agree.
    pub fn is_none(&self) -> bool {
        self.counts().iter().all(|(_, n)| *n == 0)
    }

    /// What counts against it, by name.
    pub fn counts(&self) -> [(&'static str, usize); 5] {
        [
            ("missing", self.missing.len()),
            ("extra", self.extra.len()),
            ("orphan", self.orphan.len()),
            ("misparented", self.misparented.len()),
            ("differing", self.differing.len()),
        ]
    }

    /// Adds another one's.
    pub fn add(&mut self, other: Self) {
        self.missing.extend(other.missing);
        self.extra.extend(other.extra);
        self.orphan.extend(other.orphan);
        self.misparented.extend(other.misparented);
        self.differing.extend(other.differing);
        self.duplicates += other.duplicates;
        self.remote_parents_missing += other.remote_parents_missing;
        self.matched += other.matched;
    }
}

/// Compares what the log says with what is there. Spans of other tasks of the same trace are left
/// alone, and so are the users' own spans, but for their parents.
pub fn compare(log: &Trace, there: &Trace) -> Difference {
    let mut found = Difference::default();
    let mut by_id: HashMap<(TraceId, SpanId), &Span> = HashMap::with_capacity(there.spans.len());
    for span in &there.spans {
        match by_id.get(&(span.trace_id, span.span_id)) {
            None => {
                by_id.insert((span.trace_id, span.span_id), span);
            }
            Some(first) if *first == span => found.duplicates += 1,
            Some(_) => found.differing.push(format!("{} came twice with different content", words(span))),
        }
    }
    let tasks: Vec<&str> = {
        let mut tasks: Vec<&str> = log.spans.iter().filter_map(|span| span.text(names::TASK_UUID)).collect();
        tasks.sort_unstable();
        tasks.dedup();
        tasks
    };
    let mut expected: HashMap<(TraceId, SpanId), &Span> = HashMap::with_capacity(log.spans.len());
    for span in &log.spans {
        expected.insert((span.trace_id, span.span_id), span);
        let Some(other) = by_id.get(&(span.trace_id, span.span_id)) else {
            found.missing.push(words(span));
            continue;
        };
        if other.parent != span.parent {
            let parent = |parent: Option<SpanId>| parent.map_or_else(|| "nothing".into(), |id| hex(&id));
            found.misparented.push(format!(
                "{} hangs below {}, by the log below {}",
                words(span),
                parent(other.parent),
                parent(span.parent)
            ));
        } else if let Some(what) = differs(span, other) {
            found.differing.push(format!("{}: {what}", words(span)));
        } else {
            found.matched += 1;
        }
    }
    for (key, span) in &by_id {
        let ours = span.text(names::TASK_UUID).is_some_and(|task| tasks.binary_search(&task).is_ok());
        if is_of_the_tree(span) && ours && !expected.contains_key(key) {
            found.extra.push(words(span));
        }
        let Some(parent) = span.parent.filter(|parent| !by_id.contains_key(&(span.trace_id, *parent))) else {
            continue;
        };
        let remote = span.parent_is_remote && (span.name == names::TASK_ORCHESTRATION || !is_of_the_tree(span));
        // A parent that the log knows of should be there, whatever the flag says.
        if remote && !expected.contains_key(&(span.trace_id, parent)) {
            found.remote_parents_missing += 1;
        } else {
            found.orphan.push(format!("{}: its parent {} is not there", words(span), hex(&parent)));
        }
    }
    for list in [&mut found.extra, &mut found.orphan] {
        list.sort();
    }
    found
}

/// The first thing that differs, or `None`. Backends that keep microseconds are not at fault.
fn differs(log: &Span, there: &Span) -> Option<String> {
    if log.name != there.name {
        return Some(format!("is called {}", there.name));
    }
    if log.kind != there.kind {
        return Some(format!("its kind is {:?}, not {:?}", there.kind, log.kind));
    }
    if log.start.abs_diff(there.start) > 1000 || log.end.abs_diff(there.end) > 1000 {
        return Some("its times differ".into());
    }
    if log.error.is_some() != there.error.is_some() {
        return Some(if log.error.is_some() { "its error is lost" } else { "it has an error" }.into());
    }
    // A backend may add attributes, never lose or change one.
    let changed = |(key, value): (&String, &serde_json::Value)| {
        (there.attributes.get(key) != Some(value)).then(|| format!("its attribute {key} is not {value}"))
    };
    log.attributes.iter().find_map(changed)
}

fn words(span: &Span) -> String {
    let keys = ["task_uuid", "step_name", "step_uuid", "attempt_number", "event"];
    format!("{} (trace {}, span {})", span.describe(&keys), hex(&span.trace_id), hex(&span.span_id))
}
