//! Templates: their graph, their versions, what changed between two, and a form to submit a task.

use std::collections::BTreeMap;

use axum::extract::{Path, Query};
use axum::response::Response;
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::Value;
use tasker_shared::client::Submit;
use tasker_shared::store::views;
use tasker_shared::template::Template;
use tasker_shared::template::diff::diff;

use super::rows;
use super::shell::{Section, command, empty};
use super::task::template_nodes;
use super::words::{self, counted, when};
use super::{Form, Page, form, graph, may_read};
use crate::auth::Scope;
use crate::problem::Problem;

/// `GET /templates`
pub(super) async fn list(page: Page) -> Result<Response, Problem> {
    may_read(&page, Scope::TemplatesRead)?;
    let now = page.memory.now(&page.state).await?;
    let found = rows::templates(&mut *page.database.conn().await?, page.namespaces()).await?;
    let body = html! {
        div.head { h1 { "Templates" } span.quiet { "workflows that tasks run" } }
        div.panel.flush {
            @if found.is_empty() {
                (empty("No template yet", &html! { p { "Write one as YAML, check it, and register it:" } (command("tasker template lint order.yaml")) " " (command("tasker template apply order.yaml")) }))
            } @else {
                div.scroll { table.cards {
                    thead { tr { th { "Template" } th { "About" } th { "Latest" } th.num { "Versions" } th.num { "Steps" } th.tight { "Registered" } } }
                    tbody { @for one in &found { tr {
                        td data-label="Template" { div { a.strong href=(page.link(format!("/templates/{}/{}", one.namespace, one.name))) data-row="" { (one.name) } span.sub { (one.namespace) } } }
                        td data-label="About" { @if let Some(about) = &one.description { span { (words::clip(about, 160)) } } }
                        td data-label="Latest" { span { (one.version) } }
                        td.num data-label="Versions" { span { (one.versions) } }
                        td.num data-label="Steps" { span { (words::count(one.steps)) } }
                        td.tight data-label="Registered" { span { (when(now, one.created_at)) } }
                    } } }
                } }
            }
        }
    };
    Ok(page.show(now, "Templates", Section::Templates, None, &body))
}

/// The query of a template's page.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TemplateQuery {
    /// Which version; the latest if not said.
    version: Option<String>,
    /// Shows what changed since this version.
    since: Option<String>,
}

/// `GET /templates/{namespace}/{name}`
pub(super) async fn show(
    page: Page,
    Path((namespace, name)): Path<(String, String)>,
    Query(params): Query<TemplateQuery>,
) -> Result<Response, Problem> {
    let missing = || Problem::not_found(format!("template {namespace}/{name}"));
    page.who.require_scope(Scope::TemplatesRead)?;
    if !page.who.reaches(&namespace) {
        return Err(missing());
    }
    let now = page.memory.now(&page.state).await?;
    let mut conn = page.database.conn().await?;
    let versions = rows::versions(&mut conn, &namespace, &name).await?;
    let chosen = params.version.as_deref().filter(|version| !version.is_empty());
    let (_, definition) = views::definition(&mut conn, &namespace, &name, chosen).await?.ok_or_else(missing)?;
    let before = match params.since.as_deref() {
        Some(since) => views::definition(&mut conn, &namespace, &name, Some(since)).await?,
        None => None,
    };
    drop(conn);
    let version = definition["version"].as_str().unwrap_or_default().to_owned();
    let nodes = template_nodes(&definition);
    let here = format!("/templates/{namespace}/{name}");
    let body = html! {
        div.panel {
            p.small { a href=(page.link("/templates")) { "← Templates" } }
            div.head { h1 { (name) " " span.quiet.small { (version) } } span.pill { (namespace) } span.grow {}
                a.button href=(page.link(format!("/?namespace={}&template={}", super::task::encoded(&namespace), super::task::encoded(&name)))) { "Its tasks" } }
            @if let Some(about) = definition["description"].as_str() { p.reason { (about) } }
            nav.tabs aria-label="Versions" {
                @for one in versions.iter().take(30) {
                    a href=(page.link(format!("{here}?version={}", super::task::encoded(&one.version)))) aria-current=[(one.version == version).then_some("true")] title=(words::absolute(one.created_at)) { (one.version) }
                }
            }
            @if let Some(older) = versions.iter().skip_while(|one| one.version != version).nth(1) {
                @if params.since.is_none() { a.small href=(page.link(format!("{here}?version={}&since={}#diff", super::task::encoded(&version), super::task::encoded(&older.version)))) { "What changed since " (older.version) } }
            }
        }
        @if let (Some((_, before)), Some(since)) = (&before, &params.since) { (difference(since, &version, before, &definition)) }
        section.panel aria-labelledby="graph-title" {
            div.head { h2.grow id="graph-title" { "Graph" } span.quiet.small { (counted(nodes.len(), "step")) } button.js-only type="button" data-fit="" { "Fit to width" } }
            @match graph::layout(&nodes) {
                Some(drawing) => div.graph-box tabindex="0" role="region" aria-label="Graph of the steps" { (drawing.svg(&nodes, "Steps and what they depend on")) },
                None => p.quiet { "This graph is too large to draw." },
            }
        }
        div.columns {
            @if page.may_change(Scope::TasksSubmit, &namespace) {
                section.panel aria-labelledby="submit-title" id="submit" {
                    h2 id="submit-title" { "Submit a task" }
                    (form::form(&page, &page.link(&here), &version, definition.get("input_schema")))
                }
            }
            section.panel aria-labelledby="definition-title" {
                h2 id="definition-title" { "Definition" }
                (super::payload::payload("definition", &definition))
            }
        }
    };
    Ok(page.show(now, format!("{namespace}/{name}"), Section::Templates, None, &body))
}

/// Line by line, what two definitions do not have in common.
fn difference(since: &str, version: &str, before: &Value, after: &Value) -> Markup {
    let read = |definition: &Value| serde_json::from_value::<Template>(definition.clone()).ok();
    let text = match (read(before), read(after)) {
        (Some(before), Some(after)) => diff(&before, &after).to_string(),
        _ => "One of them cannot be read by this version of the server.".into(),
    };
    html! {
        section.panel id="diff" aria-labelledby="diff-title" {
            h2 id="diff-title" { "What changed from " (since) " to " (version) }
            @if text.trim().is_empty() { p.quiet { "Nothing but the version." } } @else {
                pre.diff tabindex="0" {
                    @for line in text.lines() {
                        @let sign = line.trim_start().chars().next();
                        span class=[match sign { Some('+') => Some("add"), Some('-') => Some("del"), _ => None }] { (line) "\n" }
                    }
                }
            }
        }
    }
}

/// `POST /templates/{namespace}/{name}`: submits a task.
pub(super) async fn submit(Path((namespace, name)): Path<(String, String)>, form: Form) -> Result<Response, Problem> {
    let page = &form.page;
    page.who.require(Scope::TasksSubmit, &namespace)?;
    let version = form.get("version").map(str::to_owned);
    let schema = {
        let mut conn = page.database.conn().await?;
        let found = views::input_schema(&mut conn, &namespace, &name, version.as_deref()).await?;
        found.ok_or_else(|| Problem::not_found(format!("template {namespace}/{name}")))?.1
    };
    let fields: BTreeMap<&str, &str> =
        form.fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let input = form::input(schema.as_ref(), &fields)?;
    let mut request = Submit::new(&namespace, &name, input);
    request.version = version;
    request.correlation_id = form.get("correlation_id").map(str::to_owned);
    request.idempotency_key = form.get("idempotency_key").map(str::to_owned);
    if let Some(priority) = form.get("priority") {
        let number = priority.parse().map_err(|_| Problem::invalid("priority", "must be a whole number"))?;
        request.priority = Some(number);
    }
    let task = page.state.client().submit(request).await?;
    Ok(page.then(format!("/tasks/{task}"), "submitted"))
}
