//! One task: why it is where it is, its graph, its timeline, and what can be done to it.

use axum::extract::{Path, Query};
use axum::response::Response;
use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::{Value, json};
use tasker_shared::redact;
use tasker_shared::state_machine::decide::ByHand;
use tasker_shared::store::views::{self, TaskView};
use tasker_shared::store::why::Situation;
use tasker_shared::store::{requests, signals};
use uuid::Uuid;

use super::graph::{self, Node};
use super::payload::payload;
use super::rows::StepLine;
use super::shell::Section;
use super::task_data::{TRACE_WITH_PAGE, TaskData, task_data};
use super::task_timeline::task_timeline;
use super::timeline::Timeline;
use super::words::{self, copyable, count, counted, pill, when};
use super::{Form, Page, accepted, hidden, json_of};
use crate::auth::Scope;
use crate::problem::Problem;

/// Steps of a list; the rest is a page away.
const STEPS: usize = 200;
/// The query of a task's page.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TaskQuery {
    /// Only steps whose name begins so.
    #[serde(default)]
    steps: String,
    #[serde(default)]
    pub from: usize,
}

/// `GET /tasks/{task}`
pub(super) async fn show(
    page: Page,
    Path(task): Path<Uuid>,
    Query(params): Query<TaskQuery>,
) -> Result<Response, Problem> {
    let data = task_data(&page, task).await?;
    let now = data.situation.now;
    let view = &data.situation.task;
    let may_see = page.who.may(Scope::PayloadsRead, &view.namespace);
    let timeline = if page.config().ui_trace && !data.steps.is_empty() {
        Some(if data.steps.len() <= TRACE_WITH_PAGE { Some(task_timeline(&page, task, may_see).await?) } else { None })
    } else {
        None
    };
    let body = html! {
        (header(&page, &data))
        (graph_panel(&page, &data))
        @if let Some(timeline) = &timeline { (timeline_panel(&page, task, timeline.as_ref().map(|ready| &ready.timeline))) }
        (step_table(&page, &data, &params))
        (facts(&page, &data))
    };
    let events = format!("/v1/events?task={task}");
    Ok(page.show(
        now,
        format!("{} {}", view.template, words::clip(&view.correlation_id, 40)),
        Section::Tasks,
        Some(&events),
        &body,
    ))
}

fn header(page: &Page, data: &TaskData) -> Markup {
    let task = &data.situation.task;
    let now = data.situation.now;
    let sentence = sentence(page, &data.situation);
    let sentence = redact::text(&sentence);
    let reason = sentence.split_once(": ").map_or(&*sentence, |(_, reason)| reason);
    let unoffered = data.situation.open.iter().find(|group| {
        !group.offered
            && (matches!(group.held_by.as_deref(), Some("worker" | "limit"))
                || (group.state == "enqueued" && group.held_by.is_none()))
    });
    let trace_url = page.config().trace_url.as_ref().map(|url| url.replace("{trace_id}", &task.trace_id));
    html! {
        div.panel id="head" data-live-part="" {
            div.head {
                (pill(words::status(task.status)))
                h1 { (task.template) " " span.quiet.small { (task.version) } }
                @if task.generation > 1 { span.pill.queued { "run " (task.generation) } }
                span.grow {}
                (Page::live_button())
                (actions(page, task))
            }
            p.reason { (words::with_commands(reason)) }
            @if let Some(group) = unoffered {
                div.banner.bad role="alert" {
                    span aria-hidden="true" { "⚠" }
                    span {
                        strong { "No live worker offers the handler " code { (group.handler) } } " on the queue " code { (group.queue) } ". "
                        (super::queues::remedy(page, &task.namespace, &group.queue, &group.handler))
                        @if group.count == 1 { "Then the step goes on by itself. " } @else { "Then the " (count(group.count)) " steps go on by themselves. " }
                        @if page.who.has(Scope::QueuesRead) { a href=(page.link("/queues")) { "See queues and workers" } }
                    }
                }
            }
            (waiting_for_person(page, data, None))
            dl.facts.wide {
                div { dt { "Task" } dd { (copyable(&task.task_uuid.to_string(), "task id")) } }
                div { dt { "Correlation id" } dd { (copyable(&task.correlation_id, "correlation id")) " " a.small.nowrap href=(page.link(format!("/search?q={}", encoded(&task.correlation_id)))) { "all with it" } } }
                div { dt { "Trace" } dd { (copyable(&task.trace_id, "trace id")) @if let Some(url) = &trace_url { " " a href=(url) rel="noopener" { "Open the trace ↗" } } } }
                div { dt { "Created" } dd { (when(now, task.created_at)) " · took " (words::took(Some(task.finished_at.unwrap_or(now) - task.created_at))) @if !task.is_finished() { " so far" } } }
                div { dt { "Namespace" } dd { a href=(page.link(format!("/?namespace={}", encoded(&task.namespace)))) { (task.namespace) } " · priority " (task.priority) } }
                @if let Some(key) = &task.idempotency_key { div { dt { "Idempotency key" } dd { (copyable(key, "idempotency key")) } } }
                @if let Some(parent) = data.detail.parent_task_uuid {
                    div { dt { "Started by" } dd {
                        @if data.detail.parent_namespace.as_ref().is_some_and(|namespace| page.who.reaches(namespace)) {
                            a href=(page.link(format!("/tasks/{parent}"))) { "task " (super::tasks::short(parent)) }
                            @if let Some(step) = &data.detail.parent_step { ", step " (step) } @if let Some(attempt) = data.detail.parent_attempt { ", attempt " (attempt) }
                        } @else { "task " (super::tasks::short(parent)) " of another namespace" }
                    } }
                }
                @if data.children.iter().any(|child| page.who.reaches(&child.namespace)) {
                    div { dt { "Started" } dd { @for child in data.children.iter().filter(|child| page.who.reaches(&child.namespace)) { a href=(page.link(format!("/tasks/{}", child.task_uuid))) { (child.template) } " " (pill(words::status(child.status))) " " } } }
                }
            }
        }
    }
}

/// The sentence, without what the caller may not see.
fn sentence(page: &Page, situation: &Situation) -> String {
    situation.clone().seen_by(&|namespace| page.who.payloads_of(namespace)).sentence()
}

/// A value for a query string.
pub(super) fn encoded(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

/// The acts that make sense in this state, most likely first.
fn actions(page: &Page, task: &TaskView) -> Markup {
    if !page.may_change(Scope::TasksOperate, &task.namespace) {
        return html! {};
    }
    let offered: &[(&str, &str, bool)] = match task.state {
        "error" | "cancelled" => &[("retry", "Retry", false)],
        "complete" | "resolved_manually" => &[],
        "suspended" => &[("resume", "Resume", false), ("cancel", "Cancel", true)],
        "blocked_by_failures" => &[
            ("retry", "Retry what failed", false),
            ("give_up", "Give up", true),
            ("resolve", "Resolve by hand", false),
            ("cancel", "Cancel", true),
        ],
        _ => &[("suspend", "Suspend", false), ("cancel", "Cancel", true), ("terminate", "Terminate", true)],
    };
    html! {
        @if !offered.is_empty() {
            details.menu {
                summary.button { "Actions ▾" }
                div.sheet {
                    form method="post" action=(page.link(format!("/tasks/{}/act", task.task_uuid))) {
                        (page.csrf())
                        div.field { label for="reason" { "Reason, for the audit" } input id="reason" type="text" name="reason" maxlength="1000" data-keep=""; }
                        div.actions { @for (action, name, danger) in offered { button name="action" value=(action) class=[danger.then_some("danger")] { (name) } } }
                    }
                }
            }
        }
    }
}

/// Steps that wait for a signal, or the one, with the answers that count.
pub(super) fn waiting_for_person(page: &Page, data: &TaskData, only: Option<Uuid>) -> Markup {
    let task = &data.situation.task;
    let may = page.may_change(Scope::TasksSignal, &task.namespace);
    let waiting: Vec<&StepLine> = data
        .steps
        .iter()
        .filter(|step| step.state == "waiting" && only.is_none_or(|only| only == step.step_uuid))
        .collect();
    html! {
        @for step in waiting {
            @let definition = &data.detail.definition["steps"][usize::try_from(step.step_index).unwrap_or(usize::MAX)]["wait"]["signal"];
            @if let Some(signal) = definition["name"].as_str() {
                @let allowed: Vec<&str> = definition["allowed"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                div.banner.warn data-key={ "signal-" (step.step_uuid) } {
                    span aria-hidden="true" { "◷" }
                    div {
                        p { strong { (step.name) } " waits for the signal " code { (signal) }
                            @if let Some(due) = step.due_at { ", " (when(data.situation.now, due)) " at the latest" } "." }
                        @if may {
                            form.actions method="post" action=(page.link(format!("/tasks/{}/signal", task.task_uuid))) {
                                (page.csrf())
                                input type="hidden" name="name" value=(signal);
                                @if allowed.is_empty() {
                                    input type="text" name="payload" value="{}" aria-label={ "Payload of the signal " (signal) ", as JSON" } data-keep="";
                                    button.primary { "Send the signal" }
                                } @else {
                                    input type="text" name="comment" aria-label="A comment, kept with the answer" placeholder="Comment" maxlength="1000" data-keep="";
                                    @for answer in &allowed { button name="answer" value=(answer) { (answer) } }
                                }
                            }
                        } @else { p.small { "Your key may not send signals." } }
                    }
                }
            }
        }
    }
}

fn detail(step: &StepLine, now: DateTime<Utc>) -> String {
    let look = words::step(&step.state);
    if let (Some(items), Some(ended)) = (step.items, step.items_ended) {
        let failed = step
            .items_failed
            .filter(|failed| *failed > 0)
            .map_or_else(String::new, |failed| format!(", {failed} failed"));
        return format!("{} of {} items{failed}", count(ended), count(items));
    }
    match (step.state.as_str(), step.held_by.as_deref()) {
        (_, Some("worker")) => "no worker offers it".into(),
        (_, Some("limit")) => "held by a limit".into(),
        (_, Some("paused")) => "queue is paused".into(),
        (_, Some(_)) => "waits for a slot".into(),
        ("waiting_for_retry", None) => {
            let at = step.due_at.map_or_else(String::new, |due| format!(" {}", words::relative(now, due)));
            format!("retry{at}, {} of {}", step.failures + 1, step.max_attempts)
        }
        ("error", _) => step.error_type.clone().unwrap_or_else(|| "failed".into()),
        ("complete" | "in_progress" | "enqueued", _) if step.attempt > 1 => {
            format!("{}, attempt {}", look.word, step.attempt)
        }
        _ => look.word.into(),
    }
}

fn graph_panel(page: &Page, data: &TaskData) -> Markup {
    let task = data.situation.task.task_uuid;
    let nodes = nodes(data, |step| page.link(format!("/tasks/{task}/steps/{}", step.step_uuid)));
    let drawing = graph::layout(&nodes);
    html! {
        section.panel id="graph" data-live-part="" aria-labelledby="graph-title" {
            div.head {
                h2.grow id="graph-title" { "Graph" }
                span.quiet.small { (counted(nodes.len(), "step")) @if let Some(drawing) = &drawing { @if drawing.boxes() < nodes.len() { ", alike ones gathered" } } }
                button.js-only type="button" data-fit="" data-keep="" { "Fit to width" }
            }
            @match &drawing {
                Some(drawing) => div.graph-box tabindex="0" role="region" aria-label="Graph of the steps" { (drawing.svg(&nodes, "Steps and what they depend on")) },
                None => p.quiet { "This graph is too large to draw; the steps are listed below." },
            }
        }
    }
}

/// The steps as nodes; those that have no row yet are not begun.
fn nodes(data: &TaskData, href: impl Fn(&StepLine) -> String) -> Vec<Node> {
    let mut nodes = template_nodes(&data.detail.definition);
    for node in &mut nodes {
        node.state = Some("pending".into());
        node.detail = "not begun".into();
    }
    for step in &data.steps {
        let Some(node) = usize::try_from(step.step_index).ok().and_then(|index| nodes.get_mut(index)) else {
            continue;
        };
        node.detail = detail(step, data.situation.now);
        node.items = step.items.map(|items| (items, step.items_ended.unwrap_or(0), step.items_failed.unwrap_or(0)));
        node.state = Some(step.state.clone());
        node.href = Some(href(step));
    }
    nodes
}

/// The nodes of a definition, without states.
pub(super) fn template_nodes(definition: &Value) -> Vec<Node> {
    let steps = definition["steps"].as_array().map_or(&[][..], Vec::as_slice);
    let places: std::collections::HashMap<&str, usize> =
        steps.iter().enumerate().filter_map(|(index, step)| Some((step["name"].as_str()?, index))).collect();
    let place = |name: &Value| places.get(name.as_str()?).copied();
    steps
        .iter()
        .map(|step| {
            let text = |key: &str| step[key].as_str().unwrap_or_default().to_owned();
            let handler = text("handler");
            let detail = match () {
                () if !handler.is_empty() => handler.clone(),
                () if step["wait"]["signal"].is_object() => {
                    format!("waits for {}", step["wait"]["signal"]["name"].as_str().unwrap_or("a signal"))
                }
                () if step["wait"].is_object() => "sleeps".into(),
                () => "starts a task".into(),
            };
            Node {
                name: text("name"),
                depends_on: step["depends_on"].as_array().into_iter().flatten().filter_map(place).collect(),
                decides: step["when"].is_string()
                    || step["branches"].as_array().is_some_and(|branches| !branches.is_empty()),
                items: None,
                handler,
                state: None,
                detail,
                href: None,
            }
        })
        .collect()
}

fn timeline_panel(page: &Page, task: Uuid, trace: Option<&Timeline>) -> Markup {
    let source = page.link(format!("/tasks/{task}/timeline.json"));
    let steps = page.link(format!("/tasks/{task}/steps/"));
    html! {
        section.panel.flush aria-labelledby="timeline-title" {
            div.panel-head {
                h2 id="timeline-title" { "Timeline" }
                span.quiet.small { "Trace" }
                div.legend.grow aria-hidden="true" {
                    span { i.i-queue {} "queue" } span { i.i-run {} "run" } span { i.i-settle {} "result on its way" } span { i.i-fail {} "failed" } span { i.i-retry {} "retry wait" }
                    span { i.i-held {} "held back" } span { i.i-wait {} "waiting" } span { i.i-open {} "now" }
                }
                div.actions.js-only {
                    button.plain type="button" data-zoom="left" aria-label="Earlier" { "◀" }
                    button.plain type="button" data-zoom="in" aria-label="Zoom in" { "+" }
                    button.plain type="button" data-zoom="out" aria-label="Zoom out" { "−" }
                    button.plain type="button" data-zoom="right" aria-label="Later" { "▶" }
                    button.plain type="button" data-zoom="all" { "All" }
                }
            }
            @match trace {
                Some(trace) => (trace.markup(&source, &steps)),
                None => div.timeline data-source=(source) data-steps=(steps) tabindex="0" role="group" aria-label="Timeline; plus and minus zoom, arrows move" {
                    p.tl-more.quiet { span.js-only { "Loading …" } span.no-js-only { "With JavaScript, or as " a href=(source) { "JSON" } "." } }
                },
            }
        }
    }
}

fn step_table(page: &Page, data: &TaskData, params: &TaskQuery) -> Markup {
    let task = &data.situation.task;
    let found: Vec<&StepLine> = data.steps.iter().filter(|step| step.name.starts_with(params.steps.as_str())).collect();
    let now = data.situation.now;
    let shown = found.iter().skip(params.from).take(STEPS);
    html! {
        section.panel.flush id="steps" data-live-part="" aria-labelledby="steps-title" {
            div.panel-head {
                h2 id="steps-title" { "Steps" }
                span.quiet.small.grow { @if found.len() > STEPS { (count(params.from + 1)) " to " (count((params.from + STEPS).min(found.len()))) " of " } (counted(found.len(), "step")) }
                a.button href=(page.link(format!("/tasks/{}/log", task.task_uuid))) { "Transitions" }
            }
            @if found.is_empty() {
                div.empty { p { @if data.steps.is_empty() { "The steps appear when an orchestrator has begun the task." } @else { "No step has such a name." } } }
            } @else {
                div.scroll { table.cards {
                    thead { tr { th { "State" } th { "Step" } th { "Now" } th.tight { "Attempt" } th { "Worker" } th.tight { "Since" } } }
                    tbody { @for step in shown {
                        tr data-key=(step.step_uuid) {
                            td.tight.bare data-label="State" { span { (pill(words::step(&step.state))) } }
                            td.bare data-label="Step" { div { a.strong href=(page.link(format!("/tasks/{}/steps/{}", task.task_uuid, step.step_uuid))) data-row="" { (step.name) } span.sub { (step.handler) } } }
                            @let now_at = detail(step, now);
                            td data-label="Now" { @if now_at != words::step(&step.state).word { span { (now_at) } } }
                            td.tight data-label="Attempt" { @if step.attempt > 0 { span { (step.failures + i32::from(step.state != "error")) " of " (step.max_attempts) } } }
                            td.minor data-label="Worker" { @if let Some(worker) = &step.worker { span { (words::clip(worker, 40)) } } }
                            td.tight.minor data-label="Since" { span { (when(now, step.last_at)) } }
                        }
                    } }
                } }
                @if found.len() > STEPS {
                    div.pages {
                        @let link = |from: usize| page.link(format!("/tasks/{}?steps={}&from={from}#steps", task.task_uuid, encoded(&params.steps)));
                        @if params.from > 0 { a.button href=(link(params.from.saturating_sub(STEPS))) { "Before" } }
                        @if params.from + STEPS < found.len() { a.button href=(link(params.from + STEPS)) { "After" } }
                    }
                }
            }
        }
    }
}

fn facts(page: &Page, data: &TaskData) -> Markup {
    let task = &data.situation.task;
    let may_see = page.who.may(Scope::PayloadsRead, &task.namespace);
    html! {
        div.columns {
            section.panel aria-labelledby="input-title" {
                h2 id="input-title" { "Input" }
                @if may_see { (payload("input", &data.detail.input)) } @else { (hidden()) }
            }
            section.panel aria-labelledby="more-title" {
                h2 id="more-title" { "On a terminal" }
                p { "The reason for its state, and the trace, without this page:" }
                (super::shell::command(&format!("tasker task why {}", task.task_uuid)))
                p {}
                (super::shell::command(&format!("tasker trace show {}", task.task_uuid)))
                @if page.who.has(Scope::AuditRead) { p {} p { a href=(page.link(format!("/audit?task={}", task.task_uuid))) { "Audit" } } }
            }
        }
    }
}

/// `POST /tasks/{task}/act`: one request about a task or one of its steps.
pub(super) async fn act(Path(task): Path<Uuid>, form: Form) -> Result<Response, Problem> {
    let page = &form.page;
    operate(page, task, Scope::TasksOperate).await?;
    let action = form.need("action")?;
    let reason = form.get("reason");
    let actor = Some(page.who.name.as_str());
    let mut conn = page.database.conn().await?;
    let steps: Vec<String> = form.all("step").filter(|step| !step.is_empty()).map(str::to_owned).collect();
    let step = || steps.first().map(String::as_str).ok_or_else(|| Problem::invalid("step", "must be given"));
    let by_hand = |act: ByHand, output: Option<Value>| (act, output);
    let answer = match action {
        "cancel" | "terminate" => requests::cancel(&mut conn, task, action == "terminate", actor, reason).await?,
        "retry" => requests::retry(&mut conn, task, &steps, actor, reason).await?,
        "rerun" => requests::rerun(&mut conn, task, &steps, actor, reason).await?,
        "suspend" | "resume" | "give_up" | "resolve" => {
            requests::act(&mut conn, task, super::tasks::act_of(action), actor, reason).await?
        }
        "skip_step" | "resolve_step" | "complete_step" => {
            let output = form.get("output").map(|text| json_of("output", text)).transpose()?;
            let (act, output) = match action {
                "skip_step" => by_hand(ByHand::Skip, None),
                "resolve_step" => by_hand(ByHand::Resolve, output),
                _ => by_hand(ByHand::Complete, output),
            };
            requests::settle_step(&mut conn, task, step()?, act, output, actor, reason).await?
        }
        _ => return Err(Problem::invalid("action", "must be one of those that the page offers")),
    };
    accepted(&answer)?;
    page.memory.tasks.forget(&task);
    let done = if action.ends_with("_step") { "step" } else { action };
    Ok(page.then(format!("/tasks/{task}"), done))
}

/// `POST /tasks/{task}/signal`
pub(super) async fn signal(Path(task): Path<Uuid>, form: Form) -> Result<Response, Problem> {
    let page = &form.page;
    operate(page, task, Scope::TasksSignal).await?;
    let name = form.need("name")?;
    let payload = match (form.get("answer"), form.get("payload")) {
        (Some(answer), _) => {
            let mut payload = json!({"answer": answer, "by": page.who.name});
            if let Some(comment) = form.get("comment") {
                payload["comment"] = comment.into();
            }
            payload
        }
        (None, Some(text)) => json_of("payload", text)?,
        (None, None) => json!({}),
    };
    let mut conn = page.database.conn().await?;
    let answer = signals::send(&mut conn, task, name, &payload, Some(&page.who.name), None).await?;
    accepted(&answer)?;
    page.memory.tasks.forget(&task);
    Ok(page.then(format!("/tasks/{task}"), "signal"))
}

/// Refuses an act on a task that the caller may not operate, and hides what it may not even see.
async fn operate(page: &Page, task: Uuid, scope: Scope) -> Result<(), Problem> {
    page.who.require_scope(scope)?;
    let found = views::these(&mut *page.database.conn().await?, &[task]).await?;
    match found.first() {
        Some(view) if page.who.reaches(&view.namespace) => Ok(()),
        _ => Err(Problem::not_found(format!("task {task}"))),
    }
}
