//! Rules that hold of whole traces, and of spans picked by name and attributes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::Value;
use tasker_shared::trace::names;
use tasker_shared::trace::otlp::hex;
use tasker_shared::trace::span::{SpanId, TraceId};

use crate::trace::{Forest, Span, Trace, plain};

/// The names of the tree; other spans are the users' own, or live ones.
pub const TREE: [&str; 10] = [
    names::TASK_ORCHESTRATION,
    names::TASK_STATE_TRANSITION,
    names::STEP_DISCOVERY,
    names::STEP_ENQUEUING,
    names::RESULT_EVALUATION,
    names::STEP_EXECUTION,
    names::STEP_STATE_TRANSITION,
    names::STEP_WAIT,
    names::HANDLER_EXECUTION,
    names::RESULT_SUBMISSION,
];
/// What a drawing shows of each span.
const SHOWN: [&str; 7] = ["task_name", "step_name", "attempt_number", "event", "wait.reason", "status", "outcome"];

/// Whether the span is one of the tree that Tasker derives from its log.
pub fn is_of_the_tree(span: &Span) -> bool {
    TREE.contains(&span.name.as_str())
}

/// Spans of one name, narrowed down by attributes.
#[derive(Debug, Clone)]
pub struct Pick {
    name: String,
    attributes: Vec<(String, Value)>,
}

/// All spans of this name.
pub fn span(name: impl Into<String>) -> Pick {
    Pick { name: name.into(), attributes: Vec::new() }
}

impl Pick {
    /// Only those with this attribute.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.attributes.push((key.into(), value.into()));
        self
    }

    fn is(&self, span: &Span) -> bool {
        span.name == self.name && self.attributes.iter().all(|(key, value)| span.get(key).as_ref() == Some(value))
    }

    fn of<'a>(&self, trace: &'a Trace) -> Vec<&'a Span> {
        trace.spans.iter().filter(|span| self.is(span)).collect()
    }

    fn words(&self) -> String {
        let attributes = self.attributes.iter().map(|(key, value)| format!(" {key}={}", plain(value)));
        std::iter::once(self.name.clone()).chain(attributes).collect()
    }
}

type Check = Box<dyn Fn(&Trace) -> Vec<String>>;

/// Rules to be held; each adds to what [`assert`](Self::assert) looks at.
#[derive(Default)]
pub struct Rules {
    checks: Vec<Check>,
}

impl std::fmt::Debug for Rules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} rules", self.checks.len())
    }
}

impl Rules {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What every complete trace of Tasker keeps: each span is there once, no orphan, one root a
    /// task and generation, children inside their parents' times, `correlation_id`, `task_uuid`
    /// and `namespace` on every span of the tree, attempts 1 to n without a gap.
    #[must_use]
    pub fn well_formed(self) -> Self {
        self.once().no_orphan().unique_roots().inside_parents().common_attributes().attempts()
    }

    /// No two spans have one id.
    #[must_use]
    pub fn once(self) -> Self {
        self.rule(|trace| {
            let mut seen = BTreeSet::new();
            let again = |span: &&Span| !seen.insert((span.trace_id, span.span_id));
            trace.spans.iter().filter(again).map(|span| format!("is there twice: {}", words(span))).collect()
        })
    }

    /// Every parent is there, but for another service's: of the tree only a root may have one.
    #[must_use]
    pub fn no_orphan(self) -> Self {
        self.rule(|trace| {
            let ids = ids(trace);
            let orphan = |span: &&Span| {
                let Some(parent) = span.parent else {
                    return is_of_the_tree(span) && span.name != names::TASK_ORCHESTRATION;
                };
                let may = span.name == names::TASK_ORCHESTRATION || !is_of_the_tree(span);
                !(ids.contains_key(&(span.trace_id, parent)) || (span.parent_is_remote && may))
            };
            let say = |span: &Span| {
                let parent = span.parent.map_or_else(|| "none".into(), |parent| hex(&parent));
                format!("an orphan, its parent {parent} never came: {}", words(span))
            };
            trace.spans.iter().filter(orphan).map(say).collect()
        })
    }

    /// One root a task and generation, and no tree without one.
    #[must_use]
    pub fn unique_roots(self) -> Self {
        self.rule(|trace| {
            let (mut roots, mut tasks) = (BTreeMap::<(String, i64), u32>::new(), BTreeSet::new());
            for span in trace.spans.iter().filter(|span| is_of_the_tree(span)) {
                let task = span.text(names::TASK_UUID).unwrap_or_default().to_owned();
                if span.name == names::TASK_ORCHESTRATION {
                    *roots.entry((task.clone(), span.int(names::GENERATION).unwrap_or(1))).or_default() += 1;
                }
                tasks.insert(task);
            }
            let several = roots.iter().filter(|(_, n)| **n > 1);
            let mut wrong: Vec<String> = several
                .map(|((task, generation), n)| format!("{n} roots of generation {generation} of task {task}"))
                .collect();
            let with: BTreeSet<&String> = roots.keys().map(|(task, _)| task).collect();
            wrong
                .extend(tasks.iter().filter(|task| !with.contains(task)).map(|task| format!("no root of task {task}")));
            wrong
        })
    }

    /// Every child lies inside its parent's time. Exempt are your own spans, a detached task and a
    /// nested one whose parent ended first.
    #[must_use]
    pub fn inside_parents(self) -> Self {
        self.rule(|trace| {
            let ids = ids(trace);
            let mut wrong = Vec::new();
            for span in trace.spans.iter().filter(|span| is_of_the_tree(span)) {
                let parent = span.parent.and_then(|parent| ids.get(&(span.trace_id, parent)));
                let Some(parent) = parent.filter(|parent| is_of_the_tree(parent)) else { continue };
                if span.start < parent.start || (span.end > parent.end && span.name != names::TASK_ORCHESTRATION) {
                    let (from, to) = (signed(span.start, parent.start), signed(span.end, parent.end));
                    wrong.push(format!(
                        "outside its parent {} (begins {from:+} ns from its start, ends {to:+} ns from its end): {}",
                        parent.name,
                        words(span)
                    ));
                }
            }
            wrong
        })
    }

    /// `correlation_id`, `task_uuid` and `namespace` on every span of the tree.
    #[must_use]
    pub fn common_attributes(self) -> Self {
        TREE.iter().fold(self, |rules, name| {
            rules.requires(*name, &[names::CORRELATION_ID, names::TASK_UUID, names::NAMESPACE])
        })
    }

    /// The attempts of each step are 1 to n, each once, and none begins before the one before.
    #[must_use]
    pub fn attempts(self) -> Self {
        self.rule(|trace| {
            let mut steps: BTreeMap<&str, Vec<(i64, u64)>> = BTreeMap::new();
            for span in trace.spans.iter().filter(|span| span.name == names::STEP_EXECUTION) {
                let (step, number) = (span.text(names::STEP_UUID), span.int(names::ATTEMPT_NUMBER));
                if let (Some(step), Some(number)) = (step, number) {
                    steps.entry(step).or_default().push((number, span.start));
                }
            }
            let mut wrong = Vec::new();
            for (step, mut attempts) in steps {
                attempts.sort_unstable();
                if attempts.iter().map(|(number, _)| *number).ne(1..=i64::try_from(attempts.len()).unwrap_or(0)) {
                    let numbers: Vec<i64> = attempts.iter().map(|(number, _)| *number).collect();
                    wrong.push(format!("the attempts of step {step} are {numbers:?}"));
                } else if !attempts.is_sorted_by_key(|(_, start)| *start) {
                    wrong.push(format!("the attempts of step {step} do not begin one after another"));
                }
            }
            wrong
        })
    }

    /// Every link within the trace points at a span that is there, and each attempt is linked to
    /// what enqueued it and to the attempt before.
    #[must_use]
    pub fn links(self) -> Self {
        self.rule(|trace| {
            let ids = ids(trace);
            let traces: BTreeSet<TraceId> = trace.spans.iter().map(|span| span.trace_id).collect();
            let mut wrong = Vec::new();
            for span in &trace.spans {
                for link in span.links.iter().filter(|link| traces.contains(&link.0) && !ids.contains_key(link)) {
                    wrong.push(format!("links to {}, which is not there: {}", hex(&link.1), words(span)));
                }
                let to = |name: &str| span.links.iter().any(|link| ids.get(link).is_some_and(|to| to.name == name));
                if span.name == names::STEP_EXECUTION {
                    // The attempt of a step that starts a task is sent to nobody.
                    let was_sent = span.get(names::HANDLER_NAME).is_some();
                    // Nor does any move send the one that took over from a lost one while its task was suspended.
                    let lost =
                        |to: &&&Span| to.name == names::STEP_EXECUTION && to.text(names::OUTCOME) == Some("lost");
                    let took_over = span.links.iter().filter_map(|link| ids.get(link)).any(|to| lost(&to));
                    if was_sent && !took_over && !to(names::STEP_ENQUEUING) {
                        wrong.push(format!("is not linked to its step.enqueuing: {}", words(span)));
                    }
                    if span.int(names::ATTEMPT_NUMBER) > Some(1) && !to(names::STEP_EXECUTION) {
                        wrong.push(format!("is not linked to the attempt before: {}", words(span)));
                    }
                }
            }
            wrong
        })
    }

    /// Every span of this name has these attributes.
    #[must_use]
    pub fn requires(self, name: impl Into<String>, keys: &[&str]) -> Self {
        let (name, keys) = (name.into(), keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>());
        self.rule(move |trace| {
            let mut wrong = Vec::new();
            for span in trace.spans.iter().filter(|span| span.name == name) {
                for key in keys.iter().filter(|key| span.get(key).is_none()) {
                    wrong.push(format!("without {key}: {}", words(span)));
                }
            }
            wrong
        })
    }

    /// Both are there, and each of `first` has ended when any of `then` begins.
    #[must_use]
    pub fn before(self, first: Pick, then: Pick) -> Self {
        self.rule(move |trace| {
            both(trace, &first, &then, |firsts, thens| {
                let late = |span: &&&Span| thens.iter().any(|then| span.end > then.start);
                let say = |span: &&Span| format!("not before {}: {}", then.words(), words(span));
                firsts.iter().filter(late).map(say).collect()
            })
        })
    }

    /// [`before`](Self::before) the other way round.
    #[must_use]
    pub fn after(self, then: Pick, first: Pick) -> Self {
        self.before(first, then)
    }

    /// Each of `inner` hangs somewhere below one of `outer`, inside its time.
    #[must_use]
    pub fn inside(self, inner: Pick, outer: Pick) -> Self {
        self.rule(move |trace| {
            let ids = ids(trace);
            both(trace, &inner, &outer, |inners, _| {
                let hangs = |span: &Span| {
                    let mut above = span;
                    // No more steps up than there are spans, whatever the parents say.
                    for _ in 0..ids.len() {
                        let Some(next) = above.parent.and_then(|parent| ids.get(&(above.trace_id, parent))) else {
                            return false;
                        };
                        above = *next;
                        if outer.is(above) && above.start <= span.start && span.end <= above.end {
                            return true;
                        }
                    }
                    false
                };
                let say = |span: &&Span| format!("not inside {}: {}", outer.words(), words(span));
                inners.iter().filter(|span| !hangs(span)).map(say).collect()
            })
        })
    }

    /// Each of `from` has a link to one of `to`.
    #[must_use]
    pub fn linked(self, from: Pick, to: Pick) -> Self {
        self.rule(move |trace| {
            both(trace, &from, &to, |froms, tos| {
                let is = |link: &(TraceId, SpanId)| tos.iter().any(|to| (to.trace_id, to.span_id) == *link);
                let say = |span: &&Span| format!("not linked to {}: {}", to.words(), words(span));
                froms.iter().filter(|span| !span.links.iter().any(is)).map(say).collect()
            })
        })
    }

    /// A rule of your own: one sentence for each breach.
    #[must_use]
    pub fn rule(mut self, check: impl Fn(&Trace) -> Vec<String> + 'static) -> Self {
        self.checks.push(Box::new(check));
        self
    }

    /// One sentence for each breach.
    pub fn breaches(&self, trace: &Trace) -> Vec<String> {
        self.checks.iter().flat_map(|check| check(trace)).collect()
    }

    /// Asserts all of them.
    ///
    /// # Panics
    /// If one is broken, with each breach and the tree.
    #[track_caller]
    pub fn assert(&self, trace: &Trace) {
        let breaches = self.breaches(trace);
        assert!(breaches.is_empty(), "{}\n--- of\n{}", breaches.join("\n"), draw(trace));
    }
}

/// The tree in the order of time.
fn draw(trace: &Trace) -> String {
    fn below(forest: &Forest<'_>, places: &[usize], depth: usize, out: &mut Vec<String>) {
        for place in places {
            out.push(format!("{}{}", "  ".repeat(depth), forest.spans[*place].describe(&SHOWN)));
            below(forest, forest.below(*place), depth + 1, out);
        }
    }
    let forest = Forest::new(trace);
    let mut lines = Vec::new();
    below(&forest, forest.roots(), 0, &mut lines);
    lines.join("\n")
}

fn both(
    trace: &Trace,
    one: &Pick,
    other: &Pick,
    check: impl FnOnce(Vec<&Span>, Vec<&Span>) -> Vec<String>,
) -> Vec<String> {
    let (ones, others) = (one.of(trace), other.of(trace));
    let absent: Vec<String> = [(one, &ones), (other, &others)]
        .into_iter()
        .filter(|(_, spans)| spans.is_empty())
        .map(|(pick, _)| format!("there is no {}", pick.words()))
        .collect();
    if absent.is_empty() { check(ones, others) } else { absent }
}

fn ids(trace: &Trace) -> HashMap<(TraceId, SpanId), &Span> {
    trace.spans.iter().map(|span| ((span.trace_id, span.span_id), span)).collect()
}

fn words(span: &Span) -> String {
    format!("{} ({})", span.describe(&SHOWN), hex(&span.span_id))
}

fn signed(a: u64, b: u64) -> i128 {
    i128::from(a) - i128::from(b)
}
