//! Queues, who works on them, and what stands in quarantine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Path;
use axum::response::Response;
use chrono::{DateTime, TimeDelta, Utc};
use maud::{Markup, html};
use tasker_shared::redact;
use tasker_shared::store::details::{self, OrchestratorRow, QuarantineFilter, Quarantined, WorkerRow};
use tasker_shared::store::views::{self, QueueView};
use tasker_shared::store::{flow, requests};

use super::payload::payload;
use super::rows::{self, Rates, Unoffered};
use super::shell::{Section, command, empty};
use super::words::{self, count, counted, when};
use super::{Form, Page, accepted, forbidden, hidden, may_read};
use crate::auth::Scope;
use crate::problem::Problem;

const GOOD_FOR: Duration = Duration::from_secs(3);
/// Messages in quarantine that are listed.
const LISTED: i64 = 100;
/// How long a process is shown after its last sign of life.
const SHOWN_FOR: TimeDelta = TimeDelta::hours(1);

/// What the page is drawn from.
#[derive(Debug)]
pub(super) struct Overview {
    queues: Vec<QueueView>,
    rates: HashMap<String, Rates>,
    workers: Vec<WorkerRow>,
    orchestrators: Vec<OrchestratorRow>,
    orchestrator_runs: bool,
    unoffered: Vec<Unoffered>,
    quarantine: Vec<Quarantined>,
}

/// The namespace that a queue of steps belongs to; `None`: it is the orchestrators'.
fn namespace_of(queue: &str) -> Option<&str> {
    let rest = queue.strip_prefix("worker_")?;
    Some(rest.split_once("__").map_or(rest, |(namespace, _)| namespace))
}

/// Whether the caller may look at a queue; those that all namespaces share only with all of them.
fn reaches(page: &Page, queue: &str) -> bool {
    namespace_of(queue).map_or(page.namespaces().is_none(), |namespace| page.who.reaches(namespace))
}

/// `GET /queues`
pub(super) async fn show(page: Page) -> Result<Response, Problem> {
    may_read(&page, Scope::QueuesRead)?;
    let visible = page.namespaces().map(<[String]>::to_vec);
    let now = page.memory.now(&page.state).await?;
    let overview = page.memory.queues.get(visible, page.good_for(GOOD_FOR, 8), async || {
        let mut conn = page.database.conn().await?;
        let mut queues = views::queues(&mut conn).await?;
        queues.retain(|queue| reaches(&page, &queue.queue));
        let rates = page.memory.rates(&rows::queue_totals(&mut conn).await?);
        let lately = now - SHOWN_FOR;
        let mut workers = details::workers(&mut conn, page.namespaces()).await?;
        workers.retain(|worker| worker.seen_at > lately);
        let mut orchestrators = details::orchestrators(&mut conn).await?;
        orchestrators.retain(|one| one.seen_at > lately);
        let orchestrator_runs = rows::orchestrator_runs(&mut conn).await?;
        let unoffered = rows::unoffered(&mut conn, page.namespaces()).await?;
        let own = QuarantineFilter { namespaces: page.namespaces(), ..QuarantineFilter::default() };
        let quarantine = details::quarantine(&mut conn, own, false, LISTED).await?;
        Ok(Arc::new(Overview { queues, rates, workers, orchestrators, orchestrator_runs, unoffered, quarantine }))
    });
    let overview = overview.await?;
    let body = html! {
        div.head { h1 { "Queues and workers" } span.grow {} (Page::live_button()) }
        div id="alarms" data-live-part="" { (alarms(&page, &overview, now)) }
        div id="queues" data-live-part="" data-poll="4000" { (queue_table(&page, &overview)) }
        div id="workers" data-live-part="" { (worker_table(&overview, now)) (orchestrator_table(&overview, now)) }
        div id="quarantine" data-live-part="" { (quarantine_table(&page, &overview, now)) }
    };
    Ok(page.show(now, "Queues and workers", Section::Queues, Some("/v1/events"), &body))
}

fn alarms(page: &Page, overview: &Overview, now: DateTime<Utc>) -> Markup {
    let unread = overview.queues.iter().filter(|queue| {
        namespace_of(&queue.queue).is_some() && queue.depth > 0 && queue.workers == 0 && queue.paused.is_none()
    });
    html! {
        @if !overview.orchestrator_runs {
            div.banner.bad role="alert" { span aria-hidden="true" { "⚠" } span { "No orchestrator is running: nothing begins, retries or ends. Start one with " code { "tasker orchestrator run" } "." } }
        }
        @for one in &overview.unoffered {
            div.banner.bad role="alert" {
                span aria-hidden="true" { "⚠" }
                span {
                    strong { "No worker offers " (one.handler) } ": " (counted(one.steps, "step")) " on the queue " code { (one.queue) }
                    @if one.steps == 1 { " waits" } @else { " wait" } " for it, the first since " (when(now, one.since)) ". "
                    (remedy(page, &one.namespace, &one.queue, &one.handler))
                    a href=(page.link(format!("/tasks/{}", one.task_uuid))) { "See such a task" } "."
                }
            }
        }
        @for queue in unread {
            div.banner.bad role="alert" {
                span aria-hidden="true" { "⚠" }
                span { strong { "No live worker reads " (queue.queue) } ": " (counted(queue.depth, "message")) " in it. " (remedy(page, namespace_of(&queue.queue).unwrap_or_default(), &queue.queue, "")) }
            }
        }
    }
}

/// Handlers that every `tasker worker run` offers.
const BUILT_IN: [&str; 5] = ["echo", "fail", "http", "noop", "sleep"];

/// What to do when nobody offers a handler, or reads a queue: the exact command where one is known.
pub(super) fn remedy(page: &Page, namespace: &str, queue: &str, handler: &str) -> Markup {
    let of_example = page.config().example.as_ref().is_some_and(|example| example.namespace == namespace);
    if BUILT_IN.contains(&handler) {
        let part = queue.split_once("__").map_or_else(String::new, |(_, name)| format!(" --queue {name}"));
        return html! { "Start one: " (inline_command(&format!("tasker worker run --namespace {namespace}{part}"))) };
    }
    if of_example {
        return html! { "Start one: " (inline_command("tasker worker example")) };
    }
    html! { "Start the program with its handlers, as a worker of the namespace " code { (namespace) } ". " }
}

fn inline_command(line: &str) -> Markup {
    html! { code { (line) } button.copy type="button" data-copy=(line) aria-label="Copy the command" title="Copy the command" { (words::copy_sign()) } " " }
}

fn queue_table(page: &Page, overview: &Overview) -> Markup {
    html! {
        section.panel.flush {
            div.panel-head { h2 { "Queues" } }
            div.scroll { table.cards {
                thead { tr { th { "Queue" } th.num { "Depth" } th.num { "Held back" } th.num { "Oldest" } th.num { "In / out per s" } th.num { "Workers" } th { "State" } } }
                tbody { @for queue in &overview.queues {
                    @let namespace = namespace_of(&queue.queue);
                    @let rates = overview.rates.get(&queue.queue);
                    tr data-key=(queue.queue) {
                        td.bare data-label="Queue" { div { code.strong { (queue.queue) } span.sub { @match namespace { Some(namespace) => { "steps of " (namespace) }, None => { "read by orchestrators" } } } } }
                        td.num data-label="Depth" { span { (count(queue.depth)) } }
                        td.num data-label="Held back" { span { (count(queue.held)) } }
                        td.num.minor[queue.depth == 0] data-label="Oldest" { span { @match queue.oldest_s { Some(s) if queue.depth > 0 => (words::took(Some(chrono::TimeDelta::seconds(s.into())))), _ => "–" } } }
                        td.num.minor[rates.is_none()] data-label="In / out" { span { @match rates { Some(rates) => { (rate(rates.into)) " / " (rate(rates.out)) }, None => "–" } } }
                        td.num.minor[namespace.is_none()] data-label="Workers" { span { @if namespace.is_some() { (count(queue.workers)) } @else { "–" } } }
                        td data-label="State" { div.actions {
                            @if let Some(paused) = &queue.paused { span.pill.suspended { span.sign aria-hidden="true" { "‖" } " paused" } span.quiet.small { (words::clip(paused, 120)) } }
                            @if let Some(namespace) = namespace {
                                @if page.may_change(Scope::QueuesOperate, namespace) {
                                    form method="post" action=(page.link("/queues/act")) {
                                        (page.csrf())
                                        input type="hidden" name="queue" value=(queue.queue);
                                        @if queue.paused.is_some() { button name="action" value="resume" { "Resume" } } @else { button name="action" value="pause" { "Pause" } }
                                    }
                                }
                            }
                        } }
                    }
                } }
            } }
        }
    }
}

fn rate(per_second: f64) -> String {
    if per_second >= 10.0 { format!("{per_second:.0}") } else { format!("{per_second:.1}") }
}

fn worker_table(overview: &Overview, now: DateTime<Utc>) -> Markup {
    html! {
        section.panel.flush {
            div.panel-head { h2 { "Workers" } span.quiet.small { "seen within the last hour" } }
            @if overview.workers.is_empty() {
                (empty("No worker", &html! { p { "Start one of your own, or one with the built-in handlers:" } (command("tasker worker run --namespace NAMESPACE")) }))
            } @else {
                div.scroll { table.cards {
                    thead { tr { th { "Worker" } th.tight { "Last heartbeat" } th.num { "Slots" } th { "Reads" } th { "Handlers offered" } } }
                    tbody { @for worker in &overview.workers {
                        tr data-key=(worker.worker) {
                            td data-label="Worker" { div { span.strong.nowrap { (words::clip(&worker.worker, 60)) } span.sub { (worker.namespace) @if let Some(version) = &worker.version { " · " (version) } } @if let Some(problem) = &worker.problem { span.sub { strong { "Of no use: " } (words::clip(problem, 200)) } } } }
                            td.tight data-label="Heartbeat" { span { @if worker.live { span.pill.complete { "live" } } @else { span.pill.failed { "silent" } } " " (when(now, worker.seen_at)) } }
                            td.num data-label="Slots" { span { (worker.slots) } }
                            td data-label="Reads" { div { @for queue in &worker.queues { code.nowrap { (queue) } " " } } }
                            td data-label="Handlers" { div { @for (at, handler) in worker.handlers.iter().take(30).enumerate() { @if at > 0 { ", " } code { (handler) } } @if worker.handlers.len() > 30 { " and " (worker.handlers.len() - 30) " more" } } }
                        }
                    } }
                } }
            }
        }
    }
}

fn orchestrator_table(overview: &Overview, now: DateTime<Utc>) -> Markup {
    html! {
        section.panel.flush {
            div.panel-head { h2 { "Orchestrators" } }
            @if overview.orchestrators.is_empty() && overview.orchestrator_runs {
                div.empty { p { "One is connected. Those that export traces are listed here, each with its last sign of life." } }
            } @else if overview.orchestrators.is_empty() {
                (empty("No orchestrator", &html! { (command("tasker orchestrator run")) }))
            } @else {
                div.scroll { table.cards {
                    thead { tr { th { "Instance" } th { "Last sign of life" } th { "Started" } th { "Version" } } }
                    tbody { @for one in &overview.orchestrators { tr data-key=(one.instance) {
                        td data-label="Instance" { code { (one.instance) } }
                        td data-label="Alive" { span { @if one.live { span.pill.complete { "live" } } @else { span.pill.failed { "silent" } } " " (when(now, one.seen_at)) } }
                        td data-label="Started" { span { (when(now, one.started_at)) } }
                        td data-label="Version" { span { (one.version) } }
                    } } }
                } }
            }
        }
    }
}

fn quarantine_table(page: &Page, overview: &Overview, now: DateTime<Utc>) -> Markup {
    html! {
        section.panel.flush {
            div.panel-head { h2 { "Quarantine" } span.quiet.small { "messages that nobody could use, each with its reason" } }
            @if overview.quarantine.is_empty() {
                div.empty { p { "Nothing is in quarantine." } }
            } @else {
                div.scroll { table.cards {
                    thead { tr { th.tight { "Since" } th { "Queue" } th { "Reason" } th.tight { "" } } }
                    tbody { @for message in &overview.quarantine { tr data-key=(message.quarantine_id) {
                        td.tight data-label="Since" { span { (when(now, message.quarantined_at)) } }
                        td data-label="Queue" { div { code { (message.queue) } span.sub { "message " (message.msg_id) } } }
                        td data-label="Reason" { span { (words::clip(&redact::text(&message.reason), 300)) } }
                        td.tight { a.button href=(page.link(format!("/quarantine/{}", message.quarantine_id))) { "Look" } }
                    } } }
                } }
            }
        }
    }
}

/// `POST /queues/act`: pauses a queue, or lets it go on.
pub(super) async fn act(form: Form) -> Result<Response, Problem> {
    let page = &form.page;
    let queue = form.need("queue")?;
    let namespace = namespace_of(queue).ok_or_else(|| Problem::invalid("queue", "must be a queue of steps"))?;
    page.who.require(Scope::QueuesOperate, namespace)?;
    let resume = match form.need("action")? {
        "pause" => false,
        "resume" => true,
        _ => return Err(Problem::invalid("action", "must be pause or resume")),
    };
    let mut conn = page.database.conn().await?;
    accepted(&flow::pause(&mut conn, queue, resume, Some(&page.who.name), form.get("reason")).await?)?;
    Ok(page.then("/queues", if resume { "resume" } else { "pause" }))
}

async fn message(page: &Page, id: i64) -> Result<Quarantined, Problem> {
    let only = QuarantineFilter { id: Some(id), namespaces: page.namespaces(), ..QuarantineFilter::default() };
    let mut conn = page.database.conn().await?;
    let found = details::quarantine(&mut conn, only, page.who.has(Scope::PayloadsRead), 1).await?.pop();
    found.ok_or_else(|| Problem::not_found(format!("message {id} in quarantine")))
}

/// `GET /quarantine/{id}`
pub(super) async fn quarantined(page: Page, Path(id): Path<i64>) -> Result<Response, Problem> {
    may_read(&page, Scope::QueuesRead)?;
    let message = message(&page, id).await?;
    let now = page.memory.now(&page.state).await?;
    let may_see = page.who.has(Scope::PayloadsRead);
    let may_act = !page.config().read_only && page.who.has(Scope::QueuesOperate);
    let body = html! {
        div.panel {
            p.small { a href=(page.link("/queues#quarantine")) { "← Quarantine" } }
            div.head { h1 { "Message " (message.msg_id) " of " (message.queue) } }
            p.reason { (redact::text(&message.reason)) }
            dl.facts.wide {
                div { dt { "In quarantine" } dd { (when(now, message.quarantined_at)) } }
                div { dt { "Sent" } dd { (when(now, message.enqueued_at)) } }
                div { dt { "Failed the same way" } dd { (counted(message.failures, "time")) ", read " (message.read_ct) } }
            }
            @if may_act {
                p {}
                form.actions method="post" {
                    (page.csrf())
                    button.primary name="action" value="requeue" { "Requeue" }
                    button.danger name="action" value="discard" { "Discard" }
                    span.quiet.small { "Requeue once what it needs is there. Discarding is final." }
                }
            }
        }
        div.columns {
            section.panel { h2 { "Message, as it was sent" } @if may_see { @match &message.message { Some(text) => (payload("message", text)), None => p.quiet { "empty" } } } @else { (hidden()) } }
            section.panel { h2 { "Headers" } @if may_see { @match &message.headers { Some(text) => (payload("headers", text)), None => p.quiet { "none" } } } @else { (hidden()) } }
        }
    };
    Ok(page.show(now, "Quarantine", Section::Queues, None, &body))
}

/// `POST /quarantine/{id}`
pub(super) async fn settle(Path(id): Path<i64>, form: Form) -> Result<Response, Problem> {
    let page = &form.page;
    page.who.require_scope(Scope::QueuesOperate)?;
    message(page, id).await?;
    let mut conn = page.database.conn().await?;
    let actor = Some(page.who.name.as_str());
    let done = match form.need("action")? {
        "requeue" => requests::requeue(&mut conn, id, actor, None).await?.is_some(),
        "discard" => requests::discard(&mut conn, id, actor, None).await?,
        _ => return Err(Problem::invalid("action", "must be requeue or discard")),
    };
    if !done {
        return Err(forbidden("somebody else dealt with this message meanwhile"));
    }
    Ok(page.then("/queues", "quarantine"))
}

#[cfg(test)]
mod tests {
    use super::namespace_of;

    #[test]
    fn a_queue_says_whose_it_is() {
        for (queue, namespace) in [
            ("worker_shop", Some("shop")),
            ("worker_my_shop__slow", Some("my_shop")),
            ("step_results", None),
            ("task_requests", None),
        ] {
            assert_eq!(namespace_of(queue), namespace);
        }
    }
}
