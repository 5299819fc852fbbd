//! Schedules: when they tick, what came of it, and letting one run now.

use axum::response::Response;
use maud::{Markup, html};
use tasker_shared::store::schedules::{self, ScheduleView};

use super::shell::{Section, command, empty};
use super::words::{self, when};
use super::{Form, Page, may_read};
use crate::auth::Scope;
use crate::problem::Problem;

/// `GET /schedules`
pub(super) async fn list(page: Page) -> Result<Response, Problem> {
    may_read(&page, Scope::SchedulesRead)?;
    let now = page.memory.now(&page.state).await?;
    let mut found = schedules::list(&mut *page.database.conn().await?, None, None).await?;
    found.retain(|one| page.who.reaches(&one.namespace));
    let body = html! {
        div.head { h1 { "Schedules" } }
        div.panel.flush {
            @if found.is_empty() {
                (empty("No schedule yet", &html! {
                    p { "A schedule starts a task at certain times:" }
                    (command("tasker schedule set NAMESPACE/nightly --template NAME --cron '0 3 * * *' --time-zone Europe/Berlin"))
                }))
            } @else {
                div.scroll { table.cards {
                    thead { tr { th { "Schedule" } th { "Runs" } th { "When" } th { "Next" } th { "Last" } th.num { "Runs so far" } th { "" } } }
                    tbody { @for one in &found {
                        tr {
                            td data-label="Schedule" { div { span.strong { (one.name) } span.sub { (one.namespace) }
                                @if let Some(problem) = &one.problem { span.sub { strong { (words::clip(problem, 200)) } } } } }
                            td data-label="Runs" { span { a href=(page.link(format!("/templates/{}/{}", one.namespace, one.template))) { (one.template) } @if let Some(version) = &one.version { " " (version) } } }
                            td data-label="When" { span { (timing(one)) } }
                            td data-label="Next" { div {
                                @if one.paused { span.pill.suspended { span.sign aria-hidden="true" { "‖" } " paused" } }
                                @else {
                                    @let ticks = one.next_ticks(3);
                                    @match ticks.split_first() {
                                        Some((first, rest)) => { (when(now, *first)) @for tick in rest { span.sub { "then " (words::to_the_second(*tick)) } } },
                                        None => span.quiet { @if one.planned { "never again" } @else { "about to be worked out" } },
                                    }
                                }
                            } }
                            td data-label="Last" { span { @match (one.last_at, one.last_task) {
                                (Some(at), Some(task)) => a href=(page.link(format!("/tasks/{task}"))) { (when(now, at)) },
                                (Some(at), None) => (when(now, at)),
                                (None, _) => span.quiet { "not yet" },
                            } } }
                            td.num data-label="Runs so far" { span { (words::count(one.runs)) @if one.skipped > 0 { " (" (words::count(one.skipped)) " skipped)" } } }
                            td { @if page.may_change(Scope::SchedulesWrite, &one.namespace) { (actions(&page, one)) } }
                        }
                    } }
                } }
            }
        }
    };
    Ok(page.show(now, "Schedules", Section::Schedules, None, &body))
}

fn timing(one: &ScheduleView) -> Markup {
    html! {
        @if let Some(cron) = &one.cron { code { (cron) } @if let Some(zone) = &one.time_zone { " " (zone) } }
        @else if let Some(ms) = one.every_ms { "every " (words::took(Some(chrono::TimeDelta::milliseconds(ms)))) }
        @else if let Some(at) = one.once_at { "once, " (words::to_the_second(at)) }
        span.sub { "missed: " (one.missed.replace('_', " ")) ", overlap: " (one.overlap.replace('_', " ")) }
    }
}

fn actions(page: &Page, one: &ScheduleView) -> Markup {
    html! {
        form.actions method="post" action=(page.link("/schedules/act")) {
            (page.csrf())
            input type="hidden" name="namespace" value=(one.namespace);
            input type="hidden" name="name" value=(one.name);
            button name="action" value="trigger" { "Run now" }
            @if one.paused { button name="action" value="resume" { "Resume" } } @else { button name="action" value="pause" { "Pause" } }
        }
    }
}

/// `POST /schedules/act`
pub(super) async fn act(form: Form) -> Result<Response, Problem> {
    let page = &form.page;
    let (namespace, name) = (form.need("namespace")?, form.need("name")?);
    page.who.require(Scope::SchedulesWrite, namespace)?;
    let client = page.state.client();
    let actor = Some(page.who.name.as_str());
    let action = form.need("action")?;
    match action {
        "trigger" => {
            client.trigger_schedule((namespace, name), actor, None).await?;
        }
        "pause" => client.pause_schedule((namespace, name), true, actor, None).await?,
        "resume" => client.pause_schedule((namespace, name), false, actor, None).await?,
        _ => return Err(Problem::invalid("action", "must be trigger, pause or resume")),
    }
    Ok(page.then("/schedules", action))
}
