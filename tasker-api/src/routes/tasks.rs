//! Tasks: a task is one run of a workflow. What is done to one is in `acts`.

use chrono::{DateTime, Utc};
use http::HeaderMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tasker_shared::client::wire::{BatchAnswer, BatchItem, TaskQuery, TaskResult, Why};
use tasker_shared::client::{Submit, Submitted};
use tasker_shared::store::details::{self, AttemptRow, StatusCount, StepCursor, StepPayloads, StepRow, TransitionRow};
use tasker_shared::store::listing::{self, Filter};
use tasker_shared::store::tx;
use tasker_shared::store::views::{self, ChildView, TaskView};
use tasker_shared::telemetry::live;
use tasker_shared::trace::config::Incoming;
use tasker_shared::trace::otlp::hex;
use uuid::Uuid;

use super::{Page, limit};
use crate::auth::Scope;
use crate::guard::Caller;
use crate::operation::{Answer, Api, Call, Nothing, Operation, Reply};
use crate::problem::{IDEMPOTENCY_CONFLICT, Problem};

/// The most tasks of one batch.
const MAX_BATCH: usize = 1000;
const TRACE_HEADERS: &[(&str, &str)] = &[
    ("traceparent", "W3C trace context of the caller: the task joins that trace"),
    ("tracestate", "Goes with traceparent"),
    ("baggage", "W3C baggage, kept with the task"),
];
const SUBMIT_HEADERS: &[(&str, &str)] = &[
    ("Idempotency-Key", "Submitting with it again answers the first task; instead of idempotency_key in the body"),
    TRACE_HEADERS[0],
    TRACE_HEADERS[1],
    TRACE_HEADERS[2],
];

pub(super) fn add(api: &mut Api) {
    let (read, submits) = (Scope::TasksRead, Scope::TasksSubmit);
    let operation =
        Operation::post("/v1/tasks", "submit_task", "Submit a task; the answer names its trace in traceparent");
    api.add(operation.reads_headers(SUBMIT_HEADERS), submits, submit);
    let operation =
        Operation::post("/v1/tasks/batch", "submit_tasks", "Submit up to 1000 tasks; a bad one costs only itself");
    api.add(operation.reads_headers(TRACE_HEADERS).body_up_to(16 * 1024 * 1024), submits, submit_batch);
    api.add(Operation::get("/v1/tasks", "list_tasks", "The latest tasks that match, newest first"), read, list);
    api.add(
        Operation::get("/v1/tasks/counts", "count_tasks", "How many tasks have each status, up to 2500"),
        read,
        counts,
    );
    api.add(Operation::get("/v1/tasks/{task}", "get_task", "One task"), read, get);
    api.add(
        Operation::get("/v1/tasks/{task}/why", "why_task", "What a task waits for, or how it ended, in a sentence"),
        read,
        why,
    );
    api.add(
        Operation::get("/v1/tasks/{task}/steps", "list_steps", "Its steps in template order, items of maps among them"),
        read,
        steps,
    );
    api.add(
        Operation::get("/v1/tasks/{task}/attempts", "list_attempts", "Every execution of its steps"),
        read,
        attempts,
    );
    api.add(
        Operation::get("/v1/tasks/{task}/transitions", "list_transitions", "Its log, in order of time"),
        read,
        transitions,
    );
    api.add(
        Operation::get("/v1/tasks/{task}/children", "list_children", "The tasks that its steps started, in that order"),
        read,
        children,
    );
    let payloads = Scope::PayloadsRead;
    api.add(Operation::get("/v1/tasks/{task}/input", "get_input", "What the task was given"), payloads, input);
    api.add(
        Operation::get("/v1/tasks/{task}/result", "get_result", "What it came to: the outputs of its last steps"),
        payloads,
        result,
    );
    let operation = Operation::get(
        "/v1/tasks/{task}/steps/{step}/payloads",
        "get_step_payloads",
        "Input, progress, output and error of a step",
    );
    api.add(operation, payloads, step_payloads);
}

/// A task.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TaskPath {
    /// The task's uuid.
    pub task: Uuid,
}

/// A step of a task.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StepPath {
    /// The task's uuid.
    pub task: Uuid,
    /// The step's name; of an item of a map with its place, such as `ship[3]`.
    pub step: String,
}

/// What a new task is made from.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewTask {
    /// Who owns the template.
    pub namespace: String,
    /// The template's name.
    pub template: String,
    /// Its version; the one registered last if not given.
    pub version: Option<String>,
    /// What the template's input schema asks for, 1 MiB at most.
    #[serde(default)]
    pub input: Map<String, Value>,
    /// What people will search by, 1 to 200 bytes; the task's uuid if not given.
    pub correlation_id: Option<String>,
    /// Submitting it again answers the first task; 1 to 200 bytes.
    pub idempotency_key: Option<String>,
    /// Higher runs first, from -9999 to 9999.
    #[schemars(range(min = -9999, max = 9999))]
    pub priority: Option<i32>,
    /// Not before this time.
    pub run_at: Option<DateTime<Utc>>,
    /// W3C trace context of this task's caller; goes before the headers of the request.
    pub traceparent: Option<String>,
    /// Goes with traceparent.
    pub tracestate: Option<String>,
    /// W3C baggage, kept with the task; goes before the header.
    pub baggage: Option<String>,
}

impl NewTask {
    fn request(self, headers: &HeaderMap) -> Submit {
        let text =
            |name| headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok()).map(str::to_owned);
        // As of a header: a server that joins no caller's trace joins none.
        let joins = live::incoming() == Incoming::Join;
        let own = (self.traceparent, self.tracestate);
        let (traceparent, tracestate) =
            if own.0.is_some() && joins { own } else { (text("traceparent"), text("tracestate")) };
        Submit {
            namespace: self.namespace,
            template: self.template,
            version: self.version,
            input: Value::Object(self.input),
            correlation_id: self.correlation_id,
            idempotency_key: self.idempotency_key,
            priority: self.priority,
            run_at: self.run_at,
            traceparent,
            tracestate,
            baggage: self.baggage.filter(|_| joins).or_else(|| text("baggage")),
        }
    }
}

async fn submit(call: Call<Nothing, Nothing, NewTask>) -> Answer<Submitted> {
    let Call { state, who, headers, body, .. } = call;
    who.require(Scope::TasksSubmit, &body.namespace)?;
    let mut request = body.request(&headers);
    if let Some(key) = headers.get("idempotency-key") {
        let key = key.to_str().map_err(|_| Problem::invalid("idempotency-key", "must be ASCII"))?;
        if request.idempotency_key.as_deref().is_some_and(|other| other != key) {
            return Err(Problem::invalid(
                "idempotency-key",
                "the header and idempotency_key of the body differ; give one",
            ));
        }
        request.idempotency_key = Some(key.to_owned());
    }
    let answer = state.client().submit_many(vec![request]).await?.pop();
    let submitted =
        answer.unwrap_or_else(|| Err("the database gave no answer".into())).map_err(|text| not_submitted(&text))?;
    let root = || async { details::root_span(&mut *state.pool().acquire().await?, submitted.task_uuid).await };
    let root = match root().await {
        Err(error) if tx::was_lost(state.pool(), &error) => root().await?,
        root => root?,
    };
    let reply = Reply::from(submitted)
        .header("location", &format!("{}/v1/tasks/{}", state.config().base_path, submitted.task_uuid));
    Ok(match root {
        Some((trace, span, flags)) => {
            reply.header("traceparent", &format!("00-{}-{}-{:02x}", hex(&trace), hex(&span), flags & 1))
        }
        None => reply,
    })
}

/// A refusal of the input's schema has a line for each problem, with the path of each.
fn not_submitted(text: &str) -> Problem {
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let of_input = text.starts_with("input") && (lines.len() > 1 || text.starts_with("input/"));
    if of_input { Problem::violations(&lines, "") } else { Problem::refused(text) }
}

/// Many tasks.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Batch {
    /// 1 to 1000.
    #[schemars(length(min = 1, max = 1000))]
    pub tasks: Vec<NewTask>,
}

async fn submit_batch(call: Call<Nothing, Nothing, Batch>) -> Answer<BatchAnswer> {
    let Call { state, who, headers, body, .. } = call;
    if body.tasks.is_empty() || body.tasks.len() > MAX_BATCH {
        return Err(Problem::invalid("tasks", format_args!("must hold 1 to {MAX_BATCH} tasks")));
    }
    let refused = |problem: Problem| BatchItem {
        task_uuid: None,
        is_new: false,
        code: Some(problem.details().code.clone()),
        detail: Some(problem.details().detail.clone()),
    };
    let mut results: Vec<Option<BatchItem>> = Vec::with_capacity(body.tasks.len());
    let mut requests = Vec::new();
    for task in body.tasks {
        match who.require(Scope::TasksSubmit, &task.namespace) {
            Ok(()) => {
                results.push(None);
                requests.push(task.request(&headers));
            }
            Err(problem) => results.push(Some(refused(problem))),
        }
    }
    let mut answers = state.client().submit_many(requests).await?.into_iter();
    let results = results.into_iter().map(|known| {
        known.unwrap_or_else(|| match answers.next() {
            Some(Ok(submitted)) => {
                BatchItem { task_uuid: Some(submitted.task_uuid), is_new: submitted.is_new, code: None, detail: None }
            }
            Some(Err(text)) => refused(not_submitted(&text)),
            None => refused(IDEMPOTENCY_CONFLICT.because("the database gave no answer")),
        })
    });
    Ok(BatchAnswer { results: results.collect() }.into())
}

/// What the database is asked for, within what the caller may see.
fn filter(query: TaskQuery, who: &Caller) -> Result<Filter, Problem> {
    if let Some(namespace) = &query.namespace {
        who.require(Scope::TasksRead, namespace)?;
    }
    let statuses: Vec<String> = match &query.status {
        None => Vec::new(),
        Some(list) => list.split(',').map(|word| word.trim().to_owned()).collect(),
    };
    if statuses.iter().any(|status| views::states_of(status).next().is_none()) {
        return Err(Problem::invalid(
            "status",
            "must be queued, running, waiting, suspended, completed, failed or cancelled; several with commas between them",
        ));
    }
    let namespaces = match query.namespace {
        Some(namespace) => Some(vec![namespace]),
        None => who.namespaces().map(<[String]>::to_vec),
    };
    Ok(Filter {
        namespaces,
        template: query.template,
        statuses,
        correlation_id: query.correlation_id,
        idempotency_key: query.idempotency_key,
        error_type: query.error_type,
        created_from: query.created_from,
        created_to: query.created_to,
        after: query.after,
        limit: limit(query.limit)?,
    })
}
async fn list(call: Call<Nothing, TaskQuery, Nothing>) -> Answer<Page<TaskView>> {
    let filter = filter(call.query, &call.who)?;
    let found = listing::tasks(&mut *call.database.conn().await?, &filter).await?;
    Ok(Page { items: found.tasks, next: found.next.map(|after| after.to_string()) }.into())
}

/// The task, if the caller may know of it: a task of another namespace does not exist for them.
pub(crate) async fn visible<P, Q, B>(call: &Call<P, Q, B>, task: Uuid) -> Result<TaskView, Problem> {
    let found = views::these(&mut *call.database.conn().await?, &[task]).await?.pop();
    found.filter(|found| call.who.reaches(&found.namespace)).ok_or_else(|| Problem::not_found(format!("task {task}")))
}

/// As [`visible`], for what has a scope of its own within the namespace.
async fn seen(call: &Call<impl Sized, impl Sized, impl Sized>, task: Uuid) -> Result<(TaskView, bool), Problem> {
    let found = visible(call, task).await?;
    let payloads = call.who.may(Scope::PayloadsRead, &found.namespace);
    Ok((found, payloads))
}

/// Which tasks to count.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CountQuery {
    /// Of this namespace only.
    pub namespace: Option<String>,
}

/// Counts by status.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Counts {
    /// Every status, in a fixed order.
    pub statuses: Vec<StatusCount>,
}

async fn counts(call: Call<Nothing, CountQuery, Nothing>) -> Answer<Counts> {
    let namespaces = super::own_namespaces(&call.who, Scope::TasksRead, call.query.namespace)?;
    let mut conn = call.database.conn().await?;
    Ok(Counts { statuses: details::counts(&mut conn, namespaces.as_deref()).await? }.into())
}

async fn why(call: Call<TaskPath, Nothing, Nothing>) -> Answer<Why> {
    visible(&call, call.path.task).await?;
    let situation = call.state.client().why(call.path.task).await?;
    let situation = situation.seen_by(&|namespace| call.who.payloads_of(namespace));
    Ok(Why { sentence: situation.sentence(), situation }.into())
}

/// The first 1000. A child of a namespace that the caller does not have does not exist for them.
async fn children(call: Call<TaskPath, Nothing, Nothing>) -> Answer<Page<ChildView>> {
    let (_, payloads) = seen(&call, call.path.task).await?;
    let mut items = views::children(&mut *call.database.conn().await?, call.path.task, false).await?;
    items.retain(|child| child.namespace.as_ref().is_none_or(|namespace| call.who.reaches(namespace)));
    if !payloads {
        // A refusal may quote what was asked for.
        for child in &mut items {
            child.error = None;
        }
    }
    Ok(Page { items, next: None }.into())
}

/// A part of a list.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PageQuery {
    /// The `next` of the page before this one.
    pub after: Option<String>,
    /// How many, 1 to 500; 50 if not given.
    pub limit: Option<u32>,
}

fn bad_after() -> Problem {
    Problem::invalid("after", "must be the `next` of the page before this one")
}

/// The numbers of a cursor, which are separated by dots.
fn cursor<const N: usize>(after: &str) -> Result<[i32; N], Problem> {
    let numbers: Result<Vec<i32>, _> = after.split('.').map(str::parse).collect();
    numbers.ok().and_then(|numbers| numbers.try_into().ok()).ok_or_else(bad_after)
}

async fn steps(call: Call<TaskPath, PageQuery, Nothing>) -> Answer<Page<StepRow>> {
    let limit = limit(call.query.limit)?;
    let after = match &call.query.after {
        None => StepCursor::START,
        Some(after) => {
            let [step_index, item] = cursor(after)?;
            StepCursor { step_index, item }
        }
    };
    visible(&call, call.path.task).await?;
    let mut conn = call.database.conn().await?;
    let found = details::steps(&mut conn, call.path.task, after, i64::from(limit) + 1).await?;
    Ok(Page::cut(found, limit, |step| format!("{}.{}", step.step_index, step.item.unwrap_or(-1))).into())
}

async fn attempts(call: Call<TaskPath, PageQuery, Nothing>) -> Answer<Page<AttemptRow>> {
    let limit = limit(call.query.limit)?;
    let after = match &call.query.after {
        None => (StepCursor::START, 0),
        Some(after) => {
            let [step_index, item, attempt] = cursor(after)?;
            (StepCursor { step_index, item }, attempt)
        }
    };
    let (_, payloads) = seen(&call, call.path.task).await?;
    let mut conn = call.database.conn().await?;
    let found = details::attempts(&mut conn, call.path.task, after, payloads, i64::from(limit) + 1).await?;
    let cursor = |row: &AttemptRow| format!("{}.{}.{}", row.step_index, row.item.unwrap_or(-1), row.attempt);
    Ok(Page::cut(found, limit, cursor).into())
}

async fn transitions(call: Call<TaskPath, PageQuery, Nothing>) -> Answer<Page<TransitionRow>> {
    let limit = limit(call.query.limit)?;
    let after = match &call.query.after {
        None => None,
        Some(after) => {
            let parts: Vec<&str> = after.split('.').collect();
            let [at, entity, version] = parts.try_into().map_err(|_: Vec<&str>| bad_after())?;
            let at = at.parse().ok().and_then(DateTime::from_timestamp_micros).filter(|at| at.timestamp() >= 0);
            match (at, entity.parse(), version.parse()) {
                (Some(at), Ok(entity), Ok(version)) => Some((at, entity, version)),
                _ => return Err(bad_after()),
            }
        }
    };
    let (_, payloads) = seen(&call, call.path.task).await?;
    let mut conn = call.database.conn().await?;
    let found = details::transitions(&mut conn, call.path.task, after, payloads, i64::from(limit) + 1).await?;
    let cursor = |row: &TransitionRow| format!("{}.{}.{}", row.at.timestamp_micros(), row.entity_uuid, row.version);
    Ok(Page::cut(found, limit, cursor).into())
}

/// What a task was given.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Input {
    /// A JSON object.
    pub input: Value,
}

async fn input(call: Call<TaskPath, Nothing, Nothing>) -> Answer<Input> {
    visible(&call, call.path.task).await?;
    let found = views::input(&mut *call.database.conn().await?, call.path.task).await?;
    let input = found.ok_or_else(|| Problem::not_found(format!("task {}", call.path.task)))?;
    Ok(Input { input }.into())
}

async fn result(call: Call<TaskPath, Nothing, Nothing>) -> Answer<TaskResult> {
    visible(&call, call.path.task).await?;
    Ok(TaskResult { outputs: call.state.client().result(call.path.task).await? }.into())
}

/// A step's name and its item: `ship[3]` is item 3 of `ship`.
fn step_name(text: &str) -> (&str, i32) {
    let item = text.strip_suffix(']').and_then(|rest| rest.split_once('['));
    match item.and_then(|(name, item)| Some((name, item.parse().ok().filter(|item| *item >= 0)?))) {
        Some(named) => named,
        None => (text, -1),
    }
}

async fn step_payloads(call: Call<StepPath, Nothing, Nothing>) -> Answer<StepPayloads> {
    visible(&call, call.path.task).await?;
    let (name, item) = step_name(&call.path.step);
    let found = details::step_payloads(&mut *call.database.conn().await?, call.path.task, name, item).await?;
    Ok(found.ok_or_else(|| Problem::not_found("such step of this task"))?.into())
}

async fn get(call: Call<TaskPath, Nothing, Nothing>) -> Answer<TaskView> {
    Ok(visible(&call, call.path.task).await?.into())
}
