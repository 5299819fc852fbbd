//! The log of a task: a page of it, and the whole of it to take away.

use std::fmt::Write as _;

use axum::extract::{Path, Query};
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, SecondsFormat, Utc};
use http::{HeaderValue, header};
use maud::html;
use tasker_shared::redact;
use tasker_shared::trace::log::TaskLog;
use uuid::Uuid;

use super::Page;
use super::shell::Section;
use super::task::TaskQuery;
use super::task_data::{may_look, read_log};
use super::words::{self, counted};
use crate::auth::Scope;
use crate::problem::Problem;

/// One row of the log, as it is shown and downloaded.
#[derive(Debug, serde::Serialize)]
struct Move {
    at: DateTime<Utc>,
    began_at: DateTime<Utc>,
    /// The step's name; `task` for the task itself.
    of: String,
    from: &'static str,
    event: &'static str,
    to: &'static str,
    attempt: Option<i32>,
    generation: i32,
    actor: Option<String>,
    reason: Option<String>,
    error_type: Option<String>,
}

/// The log in the order of time; without `payloads` nothing of what errors say.
fn moves(log: &TaskLog, payloads: bool) -> Vec<Move> {
    let mut rows: Vec<_> = log.transitions.iter().collect();
    // Moves of one settle share their time; the task's own frame those of its steps.
    rows.sort_by_key(|row| (row.at, row.task_version.unwrap_or(row.version), row.entity, row.version));
    rows.into_iter()
        .map(|row| {
            let info = log.steps.get(&row.entity);
            Move {
                at: row.at,
                began_at: row.began_at,
                of: match info {
                    Some(info) => {
                        info.item.map_or_else(|| info.name.to_string(), |item| format!("{}[{item}]", info.name))
                    }
                    None => "task".into(),
                },
                from: row.change.from(),
                event: row.change.event(),
                to: row.change.to(),
                attempt: row.attempt,
                generation: row.generation,
                actor: row.actor.clone(),
                reason: row
                    .detail
                    .as_ref()
                    .filter(|_| payloads)
                    .and_then(|detail| Some(redact::text(detail.reason.as_ref()?).into_owned())),
                error_type: row.detail.as_ref().and_then(|detail| detail.error_type.clone()),
            }
        })
        .collect()
}

/// Rows of the log on one page.
const MOVES: usize = 500;

/// `GET /tasks/{task}/log`
pub(super) async fn show(
    page: Page,
    Path(task): Path<Uuid>,
    Query(params): Query<TaskQuery>,
) -> Result<Response, Problem> {
    let home = may_look(&page, task).await?;
    let (log, now) = read_log(&page, task).await?;
    let all = moves(&log, page.who.may(Scope::PayloadsRead, &home));
    let body = html! {
        div.head {
            h1 { "Transitions of " a href=(page.link(format!("/tasks/{task}"))) { (log.head.task_name) " " (super::tasks::short(task)) } }
            span.grow {}
            a.button href=(page.link(format!("/tasks/{task}/log.csv"))) download { "CSV" }
            a.button href=(page.link(format!("/tasks/{task}/log.json"))) download { "JSON" }
        }
        div.panel.flush {
            div.scroll { table.cards {
                thead { tr { th.tight { "At" } th { "What" } th { "Move" } th.tight { "Event" } th.tight { "Attempt" } th { "By" } th { "Reason" } } }
                tbody { @for row in all.iter().skip(params.from).take(MOVES) { tr {
                    td.tight data-label="At" { time datetime=(row.at.to_rfc3339_opts(SecondsFormat::Micros, true)) title=(words::relative(now, row.at)) data-keep="" { (row.at.format("%m-%d %H:%M:%S%.6f")) } }
                    td data-label="What" { span.strong { (row.of) } }
                    td data-label="Move" { span { (row.from) " → " (row.to) } }
                    td.tight data-label="Event" { span { (row.event) } }
                    td.tight data-label="Attempt" { @if let Some(attempt) = row.attempt { span { (attempt) } } }
                    td data-label="By" { @if let Some(actor) = &row.actor { span { (words::clip(actor, 60)) } } }
                    td data-label="Reason" { @if let Some(reason) = &row.reason { span { @if let Some(kind) = &row.error_type { code { (kind) } " " } (words::clip(reason, 300)) } } }
                } } }
            } }
            div.pages {
                span.quiet.small { (counted(all.len(), "transition")) }
                @let link = |from: usize| page.link(format!("/tasks/{task}/log?from={from}"));
                @if params.from > 0 { a.button href=(link(params.from.saturating_sub(MOVES))) { "Before" } }
                @if params.from + MOVES < all.len() { a.button href=(link(params.from + MOVES)) { "After" } }
            }
        }
    };
    Ok(page.show(now, "Transitions", Section::Tasks, None, &body))
}

/// `GET /tasks/{task}/log.json`
pub(super) async fn json(page: Page, Path(task): Path<Uuid>) -> Result<Response, Problem> {
    let home = may_look(&page, task).await?;
    let (log, _) = read_log(&page, task).await?;
    let text = serde_json::to_vec_pretty(&moves(&log, page.who.may(Scope::PayloadsRead, &home))).unwrap_or_default();
    Ok(download(&format!("{task}.json"), "application/json", text))
}

/// `GET /tasks/{task}/log.csv`
pub(super) async fn csv(page: Page, Path(task): Path<Uuid>) -> Result<Response, Problem> {
    let home = may_look(&page, task).await?;
    let (log, _) = read_log(&page, task).await?;
    let mut text = String::from("at,began_at,of,from,event,to,attempt,generation,actor,error_type,reason\r\n");
    for row in moves(&log, page.who.may(Scope::PayloadsRead, &home)) {
        let at = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Micros, true);
        let attempt = row.attempt.map_or_else(String::new, |attempt| attempt.to_string());
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "{},{},{},{},{},{},{},{},{},{},{}\r\n",
            at(row.at),
            at(row.began_at),
            cell(&row.of),
            row.from,
            row.event,
            row.to,
            attempt,
            row.generation,
            cell(row.actor.as_deref().unwrap_or_default()),
            cell(row.error_type.as_deref().unwrap_or_default()),
            cell(row.reason.as_deref().unwrap_or_default()),
        );
    }
    Ok(download(&format!("{task}.csv"), "text/csv; charset=utf-8", text.into_bytes()))
}

/// A cell of a CSV file: quoted where it must be, and never a formula to a spreadsheet.
fn cell(text: &str) -> String {
    let text = if text.starts_with(['=', '+', '-', '@', '\t', '\r']) { format!("'{text}") } else { text.to_owned() };
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

fn download(name: &str, kind: &'static str, content: Vec<u8>) -> Response {
    let mut response = ([(header::CONTENT_TYPE, kind)], content).into_response();
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename=\"{name}\"")) {
        response.headers_mut().insert(header::CONTENT_DISPOSITION, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spreadsheet_runs_nothing() {
        for (text, safe) in [
            ("a", "a"),
            ("a,b", "\"a,b\""),
            ("=1+1", "'=1+1"),
            ("say \"x\"", "\"say \"\"x\"\"\""),
            ("@x,y", "\"'@x,y\""),
        ] {
            assert_eq!(cell(text), safe);
        }
    }
}
