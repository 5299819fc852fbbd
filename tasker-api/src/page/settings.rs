//! How this installation is set: tracing, retention, limits, and what this key may do.

use axum::response::Response;
use maud::{Markup, html};
use tasker_shared::store::retention::Policy;
use tasker_shared::store::{flow, retention};

use super::rows;
use super::shell::{Section, command};
use super::words::{count, counted, took, when};
use super::{Page, may_read};
use crate::auth::Scope;
use crate::problem::Problem;
use crate::sampling;

/// `GET /settings`
pub(super) async fn show(page: Page) -> Result<Response, Problem> {
    may_read(&page, Scope::LimitsRead)?;
    let now = page.memory.now(&page.state).await?;
    let mut conn = page.database.conn().await?;
    let backlog = rows::export_backlog(&mut conn).await?;
    let mut ratios = sampling::all(&mut conn).await?;
    let mut policies = retention::list(&mut conn).await?;
    let mut limits = flow::limits(&mut conn, None).await?;
    drop(conn);
    ratios.retain(|(namespace, _)| namespace == "*" || page.who.reaches(namespace));
    policies.retain(|policy| policy.namespace == "*" || page.who.reaches(&policy.namespace));
    limits.retain(|limit| page.who.reaches(&limit.namespace));
    let config = page.config();
    let body = html! {
        div.head { h1 { "Settings" } span.quiet { "as this server sees them" } }
        div.columns {
            section.panel { h2 { "Tracing" }
                dl.facts {
                    dt { "Timeline on pages" } dd { @if config.ui_trace { "on" } @else { "off (ui.trace)" } }
                    dt { "Link to a backend" } dd { @match &config.trace_url { Some(url) => code { (url) }, None => { "none; set " code { "--trace-url" } " such as " code { "http://localhost:16686/trace/{trace_id}" } } } }
                    dt { "Waiting for the collector" } dd {
                        @if backlog.batches == 0 { "nothing" } @else {
                            (counted(backlog.batches, "transaction")) @if let Some(oldest) = backlog.oldest_at { ", the oldest " (when(now, oldest)) }
                        }
                    }
                    dt { "Sampling" } dd {
                        @if ratios.is_empty() { "every trace" }
                        @for (namespace, ratio) in &ratios { div { code { (namespace) } " " (format!("{:.1} %", ratio * 100.0)) } }
                    }
                }
                p {}
                p.quiet.small { "Where spans are exported is set at each orchestrator, by " code { "OTEL_EXPORTER_OTLP_ENDPOINT" } "." }
            }
            section.panel { h2 { "Retention" }
                @if policies.is_empty() { p { "Everything is kept for ever." } (command("tasker retention set --namespace '*' --keep 30d")) }
                @else { table.cards { thead { tr { th { "Namespace" } th { "Finished tasks" } th { "Quarantine" } } } tbody { @for policy in &policies { tr {
                    td data-label="Namespace" { code { (policy.namespace) } }
                    td data-label="Tasks" { span { (kept(policy.keep_s)) @if policy.archive { ", archived first" } } }
                    td data-label="Quarantine" { span { (kept_quarantine(policy)) } }
                } } } } }
            }
            section.panel { h2 { "Limits" }
                @if limits.is_empty() { p { "No limit is set." } (command("tasker limit set NAMESPACE --concurrency 10")) }
                @else { table.cards { thead { tr { th { "Limit" } th { "In use" } th { "Rate" } } } tbody { @for limit in &limits { tr {
                    td data-label="Limit" { div { code { (limit.name) } span.sub { (limit.kind) " · " (limit.namespace) } } }
                    td data-label="In use" { span { (count(limit.in_use)) @if let Some(most) = limit.concurrency { " of " (most) } } }
                    td data-label="Rate" { @if let Some(rate) = limit.rate { span { (rate) " per " (took(limit.per_ms.map(chrono::TimeDelta::milliseconds))) } } }
                } } } } }
            }
            section.panel { h2 { "This key" }
                dl.facts {
                    dt { "Name" } dd { (page.who.name) }
                    dt { "Namespaces" } dd { @match page.namespaces() { Some(names) => (names.join(", ")), None => "all" } }
                    dt { "May" } dd { @for scope in Scope::ALL.iter().filter(|scope| page.who.has(**scope)) { code title=(scope.about()) { (scope.as_str()) } " " } }
                    dt { "This server" } dd { @if config.read_only { "changes nothing (read-only)" } @else { "lets keys change what their scopes allow" } }
                }
            }
        }
    };
    Ok(page.show(now, "Settings", Section::Settings, None, &body))
}

fn kept(seconds: Option<i64>) -> Markup {
    html! { @match seconds { Some(s) => { "kept " (took(Some(chrono::TimeDelta::seconds(s)))) }, None => "kept for ever" } }
}

fn kept_quarantine(policy: &Policy) -> Markup {
    kept(policy.keep_quarantine_s)
}
