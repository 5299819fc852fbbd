//! Which trees are exported: the flag that was stored when the trace began decides, and after it
//! how the task ended.
//!
//! Pure, like the tree: the export, its recovery, and those who verify or replay it agree.

use super::log::TaskLog;
use super::names;
use super::span::{Span, TaskSpans, Value};
use super::tree;
use crate::template::Keep;

/// The spans that are due to a receiver; `None` if the task was not sampled and its end is not
/// worth keeping, or has not come. A trace that is kept for its end is whole, and its roots say
/// why, and that it has no spans of the user: those were never made.
pub fn exported(log: &TaskLog, keep: &[Keep]) -> Option<TaskSpans> {
    if log.head.trace_flags & 1 == 1 {
        return Some(tree::spans(log));
    }
    // A nested task belongs to the trace of its topmost one.
    if keep.is_empty() || log.head.parent_task_uuid.is_some() {
        return None;
    }
    let mut task = tree::spans(log);
    let reasons: Vec<Option<&'static str>> = task.spans.iter().map(|span| reason(span, &task, keep)).collect();
    let any = reasons.iter().flatten().next().copied()?;
    for (span, own) in task.spans.iter_mut().zip(reasons) {
        if span.name == names::TASK_ORCHESTRATION {
            // A generation that was not worth it is there because another one was.
            span.attributes.push((names::SAMPLING_REASON, own.unwrap_or(any).into()));
            span.attributes.push((names::SAMPLING_USER_SPANS, false.into()));
        }
    }
    task.trace_flags |= 1;
    Some(task)
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
