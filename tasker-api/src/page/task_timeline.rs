//! The timeline of a task, drawn once for many who look.

use std::hash::{DefaultHasher, Hasher as _};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, StatusCode, header};
use tasker_shared::store::views;
use tasker_shared::trace::span::{Span, SpanId};
use tasker_shared::trace::tree;
use uuid::Uuid;

use super::Page;
use super::rows;
use super::task_data::{GOOD_FOR, TRACE_WITH_PAGE, TaskData, may_look, read_log};
use super::timeline::Timeline;
use crate::auth::Scope;
use crate::problem::Problem;
use crate::trace::read;

/// How long the timeline of a task is kept that has ended: of a large one it is seconds of work.
const ENDED_GOOD_FOR: Duration = Duration::from_mins(1);
/// Spans that are kept for the pages of their steps; of a task with more, only the timeline is.
const SPANS_KEPT: usize = 5_000;

/// The timeline of a task, and its text once somebody has asked for that.
#[derive(Debug)]
pub(super) struct TaskTimeline {
    pub timeline: Timeline,
    /// What it was drawn from, of a task of few.
    spans: Vec<Span>,
    /// As JSON, with the tag of that.
    text: OnceLock<(Bytes, String)>,
}

impl TaskTimeline {
    fn text(&self) -> &(Bytes, String) {
        self.text.get_or_init(|| {
            let text = serde_json::to_vec(&self.timeline).unwrap_or_default();
            // It need not be hard to forge, and is much quicker so.
            let mut hasher = DefaultHasher::new();
            hasher.write(&text);
            (text.into(), format!("\"{:016x}\"", hasher.finish()))
        })
    }
}

/// The timeline of a task that the caller may look at, without what errors say if payloads are not its own.
pub(super) async fn task_timeline(page: &Page, task: Uuid, payloads: bool) -> Result<Arc<TaskTimeline>, Problem> {
    let timeline = page.memory.traces.get((task, payloads), page.good_for(GOOD_FOR, 13), async || {
        let Some(view) = views::these(&mut *page.database.conn().await?, &[task]).await?.pop() else {
            return Ok(None);
        };
        if !view.is_finished() {
            return draw(page, task, payloads).await;
        }
        // It moves no more, unless somebody runs it again, and that is a move.
        let ended = page
            .memory
            .ended_traces
            .get((task, payloads, view.last_at), ENDED_GOOD_FOR, async || draw(page, task, payloads).await);
        ended.await
    });
    timeline.await?.ok_or_else(|| Problem::not_found(format!("task {task}")))
}

async fn draw(page: &Page, task: Uuid, payloads: bool) -> Result<Option<Arc<TaskTimeline>>, Problem> {
    let (log, now) = match read_log(page, task).await {
        Ok(read) => read,
        Err(problem) if problem.details().status == StatusCode::NOT_FOUND.as_u16() => return Ok(None),
        Err(problem) => return Err(problem),
    };
    let waits = rows::open_waits(&mut *page.database.conn().await?, task).await?;
    // The tree is work for the processor alone; others go on meanwhile.
    let timeline = tokio::task::spawn_blocking(move || {
        let mut spans = tree::spans_so_far(&log, now);
        if !payloads {
            spans.spans.iter_mut().for_each(read::hide_errors_of);
        }
        let timeline = Timeline::new(&log, &spans, &waits, now);
        let spans = if spans.spans.len() <= SPANS_KEPT { spans.spans } else { Vec::new() };
        TaskTimeline { timeline, spans, text: OnceLock::new() }
    });
    Ok(Some(Arc::new(timeline.await.map_err(|_| undrawn())?)))
}

/// The span of an attempt's handler, if the task has not too many for a page.
pub(super) async fn handler_span(page: &Page, data: &TaskData, id: SpanId) -> Result<Option<Span>, Problem> {
    let view = &data.situation.task;
    if data.steps.len() > TRACE_WITH_PAGE || !page.config().ui_trace {
        return Ok(None);
    }
    let payloads = page.who.may(Scope::PayloadsRead, &view.namespace);
    let timeline = task_timeline(page, view.task_uuid, payloads).await?;
    Ok(timeline.spans.iter().find(|span| span.id == id).cloned())
}

fn undrawn() -> Problem {
    crate::problem::INTERNAL.because("the timeline could not be drawn")
}

/// `GET /tasks/{task}/timeline.json`
pub(super) async fn timeline(page: Page, Path(task): Path<Uuid>, headers: HeaderMap) -> Result<Response, Problem> {
    let home = may_look(&page, task).await?;
    if !page.config().ui_trace {
        return Err(Problem::not_found("timeline; this server was started with --ui-trace false"));
    }
    let timeline = task_timeline(&page, task, page.who.may(Scope::PayloadsRead, &home)).await?;
    let text = tokio::task::spawn_blocking(move || timeline.text().clone());
    let (text, tag) = text.await.map_err(|_| undrawn())?;
    if headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response());
    }
    let about = [(header::CONTENT_TYPE, "application/json".to_owned()), (header::ETAG, tag)];
    Ok((about, text).into_response())
}
