//! What people did: append-only, newest first.

use axum::extract::Query;
use axum::response::Response;
use maud::html;
use serde::Deserialize;
use serde_json::{Map, Value};
use tasker_shared::redact;
use tasker_shared::store::details::{self, AuditFilter};
use uuid::Uuid;

use super::shell::{Section, empty};
use super::words::{self, when};
use super::{Page, may_read};
use crate::auth::Scope;
use crate::problem::Problem;

/// Acts on one page.
const PAGE: usize = 100;

/// The query of the page.
#[derive(Debug, Default, Deserialize)]
pub(super) struct AuditQuery {
    #[serde(default)]
    actor: String,
    #[serde(default)]
    task: String,
    before: Option<i64>,
}

/// `GET /audit`
pub(super) async fn list(page: Page, Query(params): Query<AuditQuery>) -> Result<Response, Problem> {
    may_read(&page, Scope::AuditRead)?;
    let actor = Some(params.actor.trim()).filter(|actor| !actor.is_empty());
    let task = Some(params.task.trim()).filter(|task| !task.is_empty());
    let task: Option<Uuid> =
        task.map(|task| task.parse().map_err(|_| Problem::invalid("task", "must be the id of a task"))).transpose()?;
    let now = page.memory.now(&page.state).await?;
    let mut conn = page.database.conn().await?;
    let most = i64::try_from(PAGE + 1).unwrap_or(i64::MAX);
    let filter = AuditFilter { task, actor, namespaces: page.namespaces(), before: params.before };
    let mut acts = details::audit(&mut conn, filter, page.who.has(Scope::PayloadsRead), most).await?;
    drop(conn);
    let more = acts.len() > PAGE;
    acts.truncate(PAGE);
    let last = acts.last().map(|act| act.audit_id);
    let body = html! {
        div.head { h1 { "Audit" } span.quiet { "requests of people; no row is ever changed" } }
        form.panel.filters method="get" {
            label { "Who" input type="text" name="actor" value=(params.actor) maxlength="100"; }
            label { "Task id" input type="text" name="task" value=(params.task) maxlength="36"; }
            button { "Apply" }
            @if actor.is_some() || task.is_some() { a.button.plain href=(page.link("/audit")) { "Clear" } }
        }
        div.panel.flush {
            @if acts.is_empty() {
                (empty("Nothing was done", &html! { p { "Cancelling, retrying, pausing, limits and keys leave a line here, with who and why." } @if actor.is_some() || task.is_some() { a.button href=(page.link("/audit")) { "Show all" } } }))
            } @else {
                div.scroll { table.cards {
                    thead { tr { th.tight { "When" } th.tight { "Who" } th { "Did" } th { "To" } th { "Why" } th { "Details" } } }
                    tbody { @for act in &acts { tr {
                        td.tight data-label="When" { span { (when(now, act.at)) } }
                        td.tight data-label="Who" { span.strong title=(act.actor) { (words::clip(&act.actor, 32)) } }
                        td.tight data-label="Did" { span { (act.action.replace(['_', '.'], " ")) } }
                        td data-label="To" { div {
                            @if let Some(task) = act.task_uuid { a.nowrap href=(page.link(format!("/tasks/{task}"))) { "task " (super::tasks::short(task)) } }
                            @if let Some(subject) = &act.subject { (words::clip(subject, 200)) }
                        } }
                        td data-label="Why" { @if let Some(reason) = &act.reason { span { (words::clip(&redact::text(reason), 300)) } } }
                        td data-label="Details" { @if let Some(details) = &act.details { code { (words::clip(&redact::document(&said(details)), 200)) } } }
                    } } }
                } }
                div.pages {
                    @if let (true, Some(last)) = (more, last) {
                        a.button href=(page.link(format!("/audit?before={last}&actor={}&task={}", super::task::encoded(&params.actor), super::task::encoded(&params.task)))) { "Older" }
                    }
                }
            }
        }
    };
    Ok(page.show(now, "Audit", Section::Audit, None, &body))
}

/// Details without what has no value.
fn said(details: &Value) -> String {
    let Value::Object(all) = details else {
        return details.to_string();
    };
    let given: Map<String, Value> =
        all.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())).collect();
    Value::Object(given).to_string()
}
