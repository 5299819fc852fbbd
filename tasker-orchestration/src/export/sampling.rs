//! Which trees are exported: the flag that was stored when the trace began decides, and after it
//! how the task ended.
//!
//! Pure, like the tree: the export, its recovery, and those who verify or replay it agree.

use tasker_shared::template::Keep;
use tasker_shared::trace::log::{Head, TaskLog};
use tasker_shared::trace::span::{Span, TaskSpans, Value};
use tasker_shared::trace::{names, tree};

/// Why a trace that was not chosen when it began is exported all the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// A word of `trace.keep`.
    pub reason: &'static str,
    /// All that the template of the topmost task wants to see.
    pub keep: Vec<Keep>,
}

impl Kept {
    /// Whether the trace of this task, the topmost of its trace, ended in a way that its template
    /// wants to see; `None` if it did not, or has not ended yet.
    pub fn of(log: &TaskLog, keep: &[Keep]) -> Option<Self> {
        if keep.is_empty() || is_within(&log.head) {
            return None;
        }
        let task = tree::spans(log);
        let reason = task.spans.iter().find_map(|span| reason(span, &task, keep))?;
        Some(Self { reason, keep: keep.to_vec() })
    }
}

/// Whether the trace of this task was chosen when it began.
pub fn is_sampled(head: &Head) -> bool {
    head.trace_flags & 1 == 1
}

/// Whether a task is a part of the trace of the task that awaits it. One that nobody awaits has a
/// trace of its own.
pub fn is_within(head: &Head) -> bool {
    head.parent_task_uuid.is_some() && head.remote_span_id.is_some()
}

/// The spans that are due to a receiver; `None` if the task was not sampled and its trace is not
/// kept, or its own end has not come. A trace that is kept for the end of its topmost task is
/// whole: the tasks that it awaited are due as well. The topmost roots say why, and that there
/// are no spans of the user: those were never made.
pub fn exported(log: &TaskLog, kept: Option<&Kept>) -> Option<TaskSpans> {
    if is_sampled(&log.head) {
        return Some(tree::spans(log));
    }
    let kept = kept.filter(|_| has_ended(log))?;
    let mut task = tree::spans(log);
    task.trace_flags |= 1;
    if is_within(&log.head) {
        return Some(task);
    }
    let reasons: Vec<Option<&'static str>> = task.spans.iter().map(|span| reason(span, &task, &kept.keep)).collect();
    for (span, own) in task.spans.iter_mut().zip(reasons) {
        if span.name == names::TASK_ORCHESTRATION {
            // A generation that was not worth it is there because another one was.
            span.attributes.push((names::SAMPLING_REASON, own.unwrap_or(kept.reason).into()));
            span.attributes.push((names::SAMPLING_USER_SPANS, false.into()));
        }
    }
    Some(task)
}

/// Whether the task is over, as far as this log goes.
fn has_ended(log: &TaskLog) -> bool {
    let last = log.transitions.iter().filter(|row| row.entity == log.head.task_uuid).max_by_key(|row| row.version);
    last.is_some_and(|row| row.of_task().is_some_and(|(.., to)| to.is_terminal()))
}

/// Why the generation of this root is worth keeping.
fn reason(root: &Span, task: &TaskSpans, keep: &[Keep]) -> Option<&'static str> {
    if root.name != names::TASK_ORCHESTRATION {
        return None;
    }
    let has = |span: &Span, key: &str, is: fn(&Value) -> bool| span.attributes.iter().any(|(k, v)| *k == key && is(v));
    let retried = || {
        task.spans.iter().any(|span| {
            span.name == names::STEP_EXECUTION
                && span.parent == Some(root.id)
                && has(span, names::ATTEMPT_NUMBER, |number| matches!(number, Value::Int(2..)))
        })
    };
    keep.iter().find_map(|keep| match keep {
        Keep::Failed => (!has(root, names::OUTCOME, |outcome| *outcome == "success".into())).then_some("failed"),
        Keep::Retried => retried().then_some("retried"),
        Keep::SlowerThan(limit) => {
            (root.end - root.start).to_std().is_ok_and(|took| took > *limit).then_some("slower_than")
        }
    })
}
