//! Traces: from the log always, with a backend's spans beside them where one is configured.

use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::response::Response;
use futures_util::{StreamExt as _, stream};
use http::{HeaderValue, header};
use schemars::JsonSchema;
use serde::Deserialize;
use tasker_shared::redact;
use tasker_shared::store::{trace_settings, transitions, views};
use tasker_shared::telemetry::settings::EVERYWHERE;
use tasker_shared::trace::config::{Sources as Configured, Stored, TraceConfig};
use tasker_shared::trace::log::TaskLog;
use tasker_shared::trace::span::TraceId;
use tasker_shared::trace::{names, otlp, tree};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::Page;
use super::tasks::{TaskPath, visible};
use crate::State;
use crate::auth::Scope;
use crate::guard::Caller;
use crate::operation::{Answer, Api, Call, Nothing, Operation};
use crate::problem::Problem;
use crate::trace::backend::Backend;
use crate::trace::read::{self, Include, MOST_SPANS, Sources, TraceView};

/// Spans in one line of OTLP JSON: a few milliseconds of work.
const SPANS_A_LINE: usize = 512;
/// The most tasks of one trace that are read.
const MOST_TASKS: i64 = 200;

pub(super) fn add(api: &mut Api) {
    let read = Scope::TasksRead;
    api.add(
        Operation::get("/v1/tasks/{task}/trace", "get_task_trace", "The trace of a task as a tree, also while it runs"),
        read,
        of_task,
    );
    api.add_raw(
        Operation::get(
            "/v1/tasks/{task}/trace/otlp",
            "get_task_trace_otlp",
            "The ended spans of a task as OTLP JSON, a document a line, as they are exported",
        ),
        read,
        "application/jsonl",
        as_otlp,
    );
    api.add(Operation::get("/v1/traces/{trace_id}", "get_trace", "A trace as a tree"), read, by_id);
    api.add(
        Operation::get("/v1/traces", "list_traces", "The traces with a correlation id, the newest first"),
        read,
        by_correlation,
    );
}

/// How much of a trace.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TraceQuery {
    /// Any of attributes, events, links, transitions, with commas between them; all if not given.
    include: Option<String>,
    /// The most spans, 1 to 10,000; 1,000 if not given. The figures are of all spans all the same.
    max_spans: Option<usize>,
    /// The most levels, 1 to 30.
    depth: Option<usize>,
    /// Only this span and what is below it: 16 hex digits.
    under: Option<String>,
}

impl TraceQuery {
    fn include(self) -> Result<Include, Problem> {
        let mut include = Include { under: self.under, ..Include::default() };
        if let Some(words) = &self.include {
            include = include.only(words).map_err(|_| {
                Problem::invalid(
                    "include",
                    "must be any of attributes, events, links, transitions, with commas between them",
                )
            })?;
        }
        match self.max_spans {
            None => {}
            Some(spans @ 1..=MOST_SPANS) => include.max_spans = spans,
            Some(_) => return Err(Problem::invalid("max_spans", "must be a number from 1 to 10000")),
        }
        match self.depth {
            None => {}
            Some(depth @ 1..=read::DEEPEST) => include.depth = depth,
            Some(_) => return Err(Problem::invalid("depth", "must be a number from 1 to 30")),
        }
        Ok(include)
    }
}

/// A trace.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TracePath {
    /// 32 hex digits.
    trace_id: String,
}

/// Which traces, and how much of each.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CorrelationQuery {
    /// The correlation id of its tasks.
    correlation_id: String,
    /// As for one trace.
    include: Option<String>,
    /// The most spans of each, 1 to 10,000; 100 if not given.
    max_spans: Option<usize>,
}

async fn of_task(call: Call<TaskPath, TraceQuery, Nothing>) -> Answer<TraceView> {
    let task = visible(&call, call.path.task).await?.task_uuid;
    let include = call.query.include()?;
    let tasks = {
        let mut conn = call.database.conn().await?;
        transitions::awaited_below(&mut conn, task, MOST_TASKS).await?
    };
    Ok(whole(&call.state, &call.who, &tasks, Some(task), include).await?.into())
}

async fn by_id(call: Call<TracePath, TraceQuery, Nothing>) -> Answer<TraceView> {
    let unknown = || Problem::not_found(format!("trace {}", call.path.trace_id.chars().take(40).collect::<String>()));
    let id = trace_id(&call.path.trace_id).ok_or_else(|| Problem::invalid("trace_id", "must be 32 hex digits"))?;
    let include = call.query.include()?;
    let tasks = transitions::of_trace(&mut *call.database.conn().await?, &id, MOST_TASKS).await?;
    let view = whole(&call.state, &call.who, &tasks, None, include).await?;
    if view.spans == 0 { Err(unknown()) } else { Ok(view.into()) }
}

async fn by_correlation(call: Call<Nothing, CorrelationQuery, Nothing>) -> Answer<Page<TraceView>> {
    let CorrelationQuery { correlation_id, include, max_spans } = call.query;
    let include =
        TraceQuery { include, max_spans: Some(max_spans.unwrap_or(100)), ..TraceQuery::default() }.include()?;
    let traces = {
        let mut conn = call.database.conn().await?;
        let tasks = views::by_correlation(&mut conn, &correlation_id).await?;
        let mut traces = Vec::new();
        for id in transitions::traces_of(&mut conn, &tasks).await? {
            traces.push(transitions::of_trace(&mut conn, &id, MOST_TASKS).await?);
        }
        traces
    };
    let mut items = Vec::new();
    for tasks in traces {
        let view = whole(&call.state, &call.who, &tasks, None, include.clone()).await?;
        if view.spans > 0 {
            items.push(view);
        }
    }
    Ok(Page { items, next: None }.into())
}

fn trace_id(text: &str) -> Option<TraceId> {
    let well_formed = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    well_formed.then(|| u128::from_str_radix(text, 16).ok()).flatten().map(u128::to_be_bytes)
}

/// The tree of these tasks as far as the caller may see them; of one task only what is its own
/// or below it.
async fn whole(
    state: &State,
    who: &Caller,
    tasks: &[Uuid],
    only: Option<Uuid>,
    include: Include,
) -> Result<TraceView, Problem> {
    let (logs, now, config) = {
        let mut conn = state.pool().acquire().await?;
        let logs = transitions::logs(&mut conn, tasks).await?;
        (logs, views::now(&mut conn).await?, config(&mut conn).await?)
    };
    let logs: Vec<_> = logs.into_iter().filter(|log| who.may(Scope::TasksRead, &log.head.namespace)).collect();
    let sampled = logs.iter().any(|log| log.head.trace_flags & 1 == 1);
    let id = logs.first().map(|log| log.head.trace_id);
    let errors_hidden: Vec<String> = logs
        .iter()
        .filter(|log| !who.may(Scope::PayloadsRead, &log.head.namespace))
        .map(|log| log.head.namespace.to_string())
        .collect();
    let names = config.service_names.clone();
    // The tree of ten thousand steps takes a moment of computing.
    let hidden = errors_hidden.clone();
    let built = tokio::task::spawn_blocking(move || {
        let policy = redact::policy();
        let spans = |log: &TaskLog| {
            let mut task = tree::spans_so_far(log, now);
            if hidden.iter().any(|hidden| **hidden == *log.head.namespace) {
                task.spans.iter_mut().for_each(read::hide_errors_of);
            }
            read::flat(task, &names, &policy)
        };
        logs.iter().flat_map(spans).collect::<Vec<_>>()
    });
    let mut spans = built.await.unwrap_or_default();
    let mut sources = Sources { log: spans.len(), backend: 0, backend_state: "none".into() };
    if let (Some(id), Some(backend)) = (id, backend(&config)) {
        match backend.trace(id, &redact::policy()).await {
            Ok(theirs) => {
                let theirs = match who.namespaces() {
                    None => theirs,
                    Some(_) => read::within_reach(theirs, &spans, &|namespace| who.reaches(namespace)),
                };
                (spans, sources.backend) = read::merge(spans, theirs);
                sources.backend_state = "read".into();
            }
            Err(problem) => sources.backend_state = problem.to_string(),
        }
    }
    if let Some(task) = only {
        spans = read::below_task(spans, &task.to_string());
        sources.backend = spans.iter().filter(|span| !span.of_log).count();
    }
    for span in spans.iter_mut().filter(|span| !span.of_log) {
        let namespace = span.attributes.text(names::NAMESPACE).unwrap_or_default();
        if errors_hidden.iter().any(|hidden| hidden == namespace) {
            read::hide_errors(span);
        }
    }
    let view = tokio::task::spawn_blocking(move || read::view(spans, sampled, &include, sources, &redact::policy()));
    view.await.map_err(|_| Problem::not_found("such trace"))
}

/// What this process makes of its environment and of what is stored.
async fn config(conn: &mut sqlx::PgConnection) -> Result<TraceConfig, Problem> {
    let scopes = trace_settings::by_scope(conn).await?;
    let (sources, _) = Configured::of_process(Vec::new());
    let resolved = sources.resolve(scopes.get(EVERYWHERE).unwrap_or(&Stored::new()));
    Ok(resolved.map(|resolved| resolved.config).unwrap_or_default())
}

/// The backend that is configured now, with what is known of it.
fn backend(config: &TraceConfig) -> Option<Arc<Backend>> {
    static KNOWN: Mutex<Option<Arc<Backend>>> = Mutex::new(None);
    let url = config.query_url.as_deref()?;
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if known.as_ref().is_none_or(|backend| backend.url() != url) {
        *known = Backend::of(config).map(Arc::new);
    }
    known.clone()
}

/// The same spans that are exported. The log of the task is in memory, and one line or two of
/// what is made of it: whoever reads slowly waits, and keeps nothing else waiting.
async fn as_otlp(call: Call<TaskPath, Nothing, Nothing>) -> Result<Response, Problem> {
    let task = visible(&call, call.path.task).await?;
    let errors_hidden = !call.who.may(Scope::PayloadsRead, &task.namespace);
    let (log, config) = {
        let mut conn = call.database.conn().await?;
        let log = transitions::logs(&mut conn, &[task.task_uuid]).await?.pop();
        (log.ok_or_else(|| Problem::not_found(format!("task {}", task.task_uuid)))?, config(&mut conn).await?)
    };
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        for mut part in tree::in_parts(&log, SPANS_A_LINE) {
            if errors_hidden {
                part.spans.iter_mut().for_each(read::hide_errors_of);
            }
            let line = otlp::json_line(&part, &config.service_names);
            // Nobody reads on.
            if sender.send(line).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    });
    let lines = stream::unfold(receiver, |mut receiver| async move {
        let line = receiver.recv().await?;
        Some((Ok::<_, std::io::Error>(line), receiver))
    });
    // Compression asks once more when it is told that there is nothing left.
    let mut response = Response::new(Body::from_stream(lines.fuse()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    Ok(response)
}
