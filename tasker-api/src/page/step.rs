//! One step in full: what it got, what it gave, each attempt, and what a person may do with it.

use std::sync::Arc;

use axum::extract::{Path, Query};
use axum::response::Response;
use chrono::{DateTime, TimeDelta, Utc};
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::Value;
use tasker_shared::duration::in_words;
use tasker_shared::redact;
use tasker_shared::trace::ids::{SpanKey, span_id};
use tasker_shared::trace::otlp::hex;
use tasker_shared::trace::span::{Span, SpanId, Value as SpanValue};
use uuid::Uuid;

use super::payload::payload;
use super::rows::{self, AttemptDetail, ItemLine, StepDetail};
use super::shell::Section;
use super::task;
use super::task_data::{GOOD_FOR, TaskData, task_data};
use super::words::{self, copyable, counted, pill, when};
use super::{Page, hidden, task_timeline};
use crate::auth::Scope;
use crate::problem::Problem;

/// What the page of a step is drawn from.
#[derive(Debug)]
pub(super) struct Detail {
    step: StepDetail,
    attempts: Vec<AttemptDetail>,
    items: Vec<ItemLine>,
}

/// The address of a step's page.
#[derive(Debug, Default, Deserialize)]
pub(super) struct StepQuery {
    /// Which attempt; the latest if not said.
    attempt: Option<i32>,
}

/// `GET /tasks/{task}/steps/{step}`
pub(super) async fn show(
    page: Page,
    Path((task, step)): Path<(Uuid, Uuid)>,
    Query(params): Query<StepQuery>,
) -> Result<Response, Problem> {
    let data = task_data(&page, task).await?;
    let found = page.memory.steps.get((task, step), page.good_for(GOOD_FOR, 6), async || {
        let mut conn = page.database.conn().await?;
        let Some(step) = rows::step(&mut conn, task, step).await? else {
            return Ok(None);
        };
        let attempts = rows::attempts(&mut conn, task, step.step_uuid).await?;
        let items = if step.item < 0 && is_map(&data, &step) {
            rows::items(&mut conn, task, step.step_index).await?
        } else {
            Vec::new()
        };
        Ok(Some(Arc::new(Detail { step, attempts, items })))
    });
    let found = found.await?.ok_or_else(|| Problem::not_found(format!("step {step}")))?;
    let Detail { step: detail, attempts, items } = &*found;
    let now = data.situation.now;
    let chosen = match params.attempt {
        Some(number) => attempts.iter().find(|attempt| attempt.attempt == number),
        None => attempts.first(),
    };
    let span = match chosen.and_then(|attempt| handler_span(&data, detail, attempt)) {
        Some(id) => Some((id, task_timeline::handler_span(&page, &data, id).await?)),
        None => None,
    };
    let view = &data.situation.task;
    let may_see = page.who.may(Scope::PayloadsRead, &view.namespace);
    // What a person, a signal or the items of a map gave has no number, and no worker.
    let worked = attempts.iter().any(|attempt| attempt.attempt > 0);
    let name = name_of(detail);
    let body = html! {
        (head(&page, &data, detail, now))
        div.columns id="step" data-live-part="" {
            section.panel aria-labelledby="input-title" {
                h2 id="input-title" { "Input" }
                @match (&detail.input, may_see) {
                    (_, false) => (hidden()),
                    (Some(input), true) => (payload("input", input)),
                    (None, true) => p.quiet {
                        @if is_map(&data, detail) && detail.item < 0 { "Each of its items has an input of its own." }
                        @else if detail.handler.is_empty() { "It needs none." }
                        @else { "It gets its input when it is sent to a worker." }
                    },
                }
            }
            section.panel aria-labelledby="attempt-title" {
                h2 id="attempt-title" { @if worked { "Attempts" } @else { "Result" } }
                @if attempts.is_empty() {
                    p.quiet { @if detail.handler.is_empty() || is_map(&data, detail) && detail.item < 0 { "It has none yet." } @else { "No worker has claimed it yet." } }
                } @else if worked {
                    nav.tabs aria-label="Attempts" {
                        @for attempt in attempts.iter().filter(|attempt| attempt.attempt > 0) {
                            a href=(page.link(format!("/tasks/{task}/steps/{step}?attempt={}", attempt.attempt)))
                                aria-current=[(chosen.map(|c| c.attempt) == Some(attempt.attempt)).then_some("true")] {
                                (sign(attempt)) " " (attempt.attempt)
                            }
                        }
                    }
                }
                @if let Some(attempt) = chosen { (attempt_panel(attempt, span.as_ref().map(|(id, span)| (id, span.as_ref())), may_see, now)) }
                @else if params.attempt.is_some() { p.quiet { "There is no such attempt." } }
            }
        }
        div id="reported" data-live-part="" { @if let Some(attempt) = chosen { (reported(attempt, may_see)) } }
        @if !items.is_empty() { (item_table(&page, task, items, now)) }
    };
    let events = format!("/v1/events?task={task}");
    Ok(page.show(now, format!("{name} of {}", view.template), Section::Tasks, Some(&events), &body))
}

fn name_of(step: &StepDetail) -> String {
    if step.item >= 0 { format!("{}[{}]", step.name, step.item) } else { step.name.clone() }
}

fn is_map(data: &TaskData, step: &StepDetail) -> bool {
    definition(data, step)["for_each"].is_string()
}

fn definition<'a>(data: &'a TaskData, step: &StepDetail) -> &'a Value {
    &data.detail.definition["steps"][usize::try_from(step.step_index).unwrap_or(usize::MAX)]
}

fn head(page: &Page, data: &TaskData, step: &StepDetail, now: DateTime<Utc>) -> Markup {
    let task = &data.situation.task;
    html! {
        div.panel id="head" data-live-part="" {
            p.small { a href=(page.link(format!("/tasks/{}", task.task_uuid))) { "← " (task.template) " " (super::tasks::short(task.task_uuid)) } }
            div.head {
                (pill(words::step(&step.state)))
                h1 { (name_of(step)) }
                span.grow {}
                (Page::live_button())
                (actions(page, data, step))
            }
            (task::waiting_for_person(page, data, Some(step.step_uuid)))
            dl.facts.wide {
                @if !step.handler.is_empty() { div { dt { "Handler" } dd { code { (step.handler) } } } }
                @if !step.handler.is_empty() { div { dt { "Queue" } dd { code { (step.queue) } } } }
                // A wait and a map make no attempts of their own.
                @if !(step.handler.is_empty() || is_map(data, step) && step.item < 0) { div { dt { "Attempts" } dd { (step.attempt) " begun · " (step.failures) " failed of " (step.max_attempts) " allowed" @if step.losses > 0 { " · " (step.losses) " lost" } } } }
                @if let Some(worker) = &step.worker { div { dt { "Worker" } dd { (worker) } } }
                @if let Some(held) = &step.held_by { div { dt { "Held back by" } dd { (held) @if let Some(since) = step.ready_at { ", ready " (when(now, since)) } } } }
                @if let Some(due) = step.due_at { div { dt { "Due" } dd { (when(now, due)) } } }
                @if step.state == "in_progress" {
                    @if let Some(beat) = step.last_heartbeat_at { div { dt { "Last heartbeat" } dd { (when(now, beat)) } } }
                    @if let Some(ends) = step.lease_expires_at { div { dt { "Lease ends" } dd { (when(now, ends)) } } }
                }
                div { dt { "In this state" } dd { (when(now, step.last_at)) } }
                div { dt { "Step id" } dd { (copyable(&step.step_uuid.to_string(), "step id")) } }
            }
            @if let Some(progress) = &step.progress {
                @if page.who.may(Scope::PayloadsRead, &task.namespace) {
                    h3 { "Progress, as its handler says" }
                    (payload("progress", progress))
                }
            }
        }
    }
}

fn actions(page: &Page, data: &TaskData, step: &StepDetail) -> Markup {
    let task = &data.situation.task;
    if !page.may_change(Scope::TasksOperate, &task.namespace) || step.item >= 0 {
        return html! {};
    }
    let ended = task.is_finished();
    let look = words::step(&step.state);
    let blocked = task.state == "blocked_by_failures" && step.state == "error";
    let by_hand = !ended && (!look.ended || step.state == "error");
    html! {
        @if ended || by_hand {
            details.menu {
                summary.button { "Actions ▾" }
                div.sheet {
                    form method="post" action=(page.link(format!("/tasks/{}/act", task.task_uuid))) {
                        (page.csrf())
                        input type="hidden" name="step" value=(step.name);
                        div.field { label for="reason" { "Reason, for the audit" } input id="reason" type="text" name="reason" maxlength="1000" data-keep=""; }
                        @if by_hand {
                            div.field {
                                label for="output" { "Output, as JSON" }
                                textarea.mono id="output" name="output" placeholder="{}" rows="3" data-keep="" {}
                                span.hint { "For completing or resolving it by hand; steps behind it read it." }
                            }
                        }
                        div.actions {
                            @if ended { button.primary name="action" value="rerun" { "Rerun from here" } }
                            @if blocked { button.primary name="action" value="retry" { "Retry this step" } }
                            @if by_hand {
                                button name="action" value="complete_step" { "Complete" }
                                button name="action" value="resolve_step" { "Resolve" }
                                button.danger name="action" value="skip_step" { "Skip" }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn sign(attempt: &AttemptDetail) -> &'static str {
    match (attempt.outcome.as_deref(), &attempt.error) {
        (_, Some(_)) => "✕",
        (Some(_), None) => "✓",
        (None, None) => "▶",
    }
}

fn attempt_panel(
    attempt: &AttemptDetail,
    span: Option<(&SpanId, Option<&Span>)>,
    may_see: bool,
    now: DateTime<Utc>,
) -> Markup {
    html! {
        dl.facts {
            @if attempt.attempt > 0 {
                dt { "Worker" } dd { (attempt.worker) @if let Some(version) = &attempt.worker_version { " " span.quiet { (version) } } }
                dt { "Claimed" } dd { (when(now, attempt.claimed_at)) }
            }
            @if let Some(reported) = attempt.reported_at { dt { "Reported" } dd { (when(now, reported)) } }
            @if let Some(ms) = attempt.run_ms { dt { "Ran" } dd { (milliseconds(ms)) } }
            dt { "Outcome" } dd { (attempt.outcome.as_deref().unwrap_or("open")) }
            @if let Some((id, _)) = span { dt { "Span" } dd { (copyable(&hex(id), "span id")) } }
            @if attempt.generation > 1 { dt { "Run" } dd { (attempt.generation) } }
        }
        @if let Some((_, Some(span))) = span { (attribute_table(span)) }
        @if let Some(error) = &attempt.error {
            h3 { "Error" }
            div.banner.bad {
                span aria-hidden="true" { "✕" }
                span {
                    strong { (words::clip(error["type"].as_str().unwrap_or("error"), 200)) }
                    @if may_see { @if let Some(message) = error["message"].as_str() { ": " (words::clip(&redact::text(message), 4000)) } }
                    @if error["retryable"] == Value::Bool(false) { " (not retryable)" }
                }
            }
            @if may_see { details { summary { "The whole error" } (payload("error", error)) } }
        }
        @if let Some(output) = &attempt.output {
            h3 { "Output" }
            @if may_see { (payload("output", output)) } @else { (hidden()) }
        }
    }
}

/// The id of the attempt's `handler.execution`: the same in every backend.
fn handler_span(data: &TaskData, step: &StepDetail, attempt: &AttemptDetail) -> Option<SpanId> {
    let trace = u128::from_str_radix(&data.situation.task.trace_id, 16).ok()?.to_be_bytes();
    let number = u64::try_from(attempt.attempt).ok().filter(|number| *number > 0)?;
    Some(span_id(&trace, step.step_uuid, 0, number, SpanKey::Handler, 0))
}

/// What the handler reported of the attempt: milestones, artifacts, and usage where it counts something.
fn reported(attempt: &AttemptDetail, may_see: bool) -> Markup {
    let usage: Vec<(&str, f64)> = attempt
        .usage
        .as_ref()
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?)))
        .take(32)
        .collect();
    let all = attempt.milestones.as_ref().and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let (artifacts, milestones): (Vec<&Value>, Vec<&Value>) = all.iter().partition(|one| one["name"] == "artifact");
    html! {
        @if !usage.is_empty() || !all.is_empty() {
            div.columns {
                @if !usage.is_empty() { section.panel aria-labelledby="usage-title" { h2 id="usage-title" { "Usage" } (usage_chart(&usage)) } }
                @if !artifacts.is_empty() {
                    section.panel aria-labelledby="artifacts-title" { h2 id="artifacts-title" { "Artifacts" }
                        @if may_see { (artifact_list(&artifacts)) } @else { (hidden()) }
                    }
                }
                @if !milestones.is_empty() {
                    section.panel.flush aria-labelledby="milestones-title" { div.panel-head { h2 id="milestones-title" { "Milestones" } }
                        @if may_see { (milestone_table(&milestones)) } @else { div.empty { (hidden()) } }
                    }
                }
            }
        }
    }
}

/// A text of a payload, with its secrets hidden.
fn text(value: &Value, most: usize) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    words::clip(&redact::text(&text), most)
}

/// What the handler made and left elsewhere.
fn artifact_list(artifacts: &[&Value]) -> Markup {
    html! {
        @for artifact in artifacts {
            @let about = &artifact["attributes"];
            @let uri = text(&about["artifact.uri"], 1_000);
            dl.facts {
                dt { "Name" } dd { span.strong { (text(&about["artifact.name"], 300)) } }
                dt { "Where" } dd {
                    @if uri.starts_with("https://") || uri.starts_with("http://") { a href=(uri) rel="noopener noreferrer" { (uri) } " " }
                    @else { (copyable(&uri, "address")) }
                }
                @if let Some(bytes) = about["artifact.size"].as_i64() { dt { "Size" } dd { (words::count(bytes)) " bytes" } }
                @if about["artifact.digest"].is_string() { dt { "Digest" } dd { code { (text(&about["artifact.digest"], 300)) } } }
            }
        }
    }
}

/// What the handler noted, and when after it got its claim.
fn milestone_table(milestones: &[&Value]) -> Markup {
    html! {
        div.scroll { table.cards {
            thead { tr { th.tight.num { "After" } th { "Milestone" } th { "Says" } } }
            tbody { @for one in milestones.iter().take(128) { tr {
                td.tight.num data-label="After" { span { @if let Some(ms) = one["at_ms"].as_f64() { (milliseconds(ms)) } } }
                td data-label="Milestone" { span.strong { (text(&one["name"], 200)) } }
                td data-label="Says" { div { @for (name, value) in one["attributes"].as_object().into_iter().flatten() {
                    div { code { (words::clip(name, 100)) } " " (text(value, 1_000)) }
                } } }
            } } }
        } }
    }
}

fn milliseconds(ms: f64) -> String {
    #[expect(clippy::cast_possible_truncation, reason = "a length for people")]
    in_words(TimeDelta::microseconds((ms * 1000.0) as i64))
}

/// What every backend has of the attempt's `handler.execution`.
fn attribute_table(span: &Span) -> Markup {
    html! {
        details { summary { "Its span: " (counted(span.attributes.len(), "attribute")) }
            dl.facts {
                dt { "name" } dd { code { (span.name) } }
                @for (name, value) in &span.attributes {
                    dt { (name) }
                    dd { code { @match value {
                        SpanValue::Str(text) => (words::clip(&redact::text(text), 500)),
                        SpanValue::Int(n) => (n),
                        SpanValue::Float(n) => (n),
                        SpanValue::Bool(yes) => (yes),
                    } } }
                }
            }
        }
    }
}

/// Counts (tokens, bytes, calls) as bars of one scale.
fn usage_chart(usage: &[(&str, f64)]) -> Markup {
    let most = usage.iter().map(|(_, n)| *n).fold(0.0, f64::max).max(1.0);
    let height = usage.len() * 24;
    html! {
        svg.usage width="100%" height=(height) role="img" aria-label={ @for (name, n) in usage { (name) ": " (n) "; " } } {
            @for (row, (name, n)) in usage.iter().enumerate() {
                text x="0" y=(row * 24 + 16) { (words::clip(name, 26)) ": " (n) }
                rect x="50%" y=(row * 24 + 6) height="12" rx="3" width={ (format!("{:.1}", 50.0 * n / most)) "%" } {}
            }
        }
    }
}

fn item_table(page: &Page, task: Uuid, items: &[ItemLine], now: DateTime<Utc>) -> Markup {
    html! {
        section.panel.flush {
            div.panel-head { h2 { "Items" } span.quiet.small { @if items.len() == 200 { "the first 200, what failed and what is open first" } @else { (counted(items.len(), "item")) } } }
            div.scroll { table.cards {
                thead { tr { th { "State" } th { "Item" } th.tight { "Attempt" } th.tight { "Since" } } }
                tbody { @for item in items { tr {
                    td.tight data-label="State" { span { (pill(words::step(&item.state))) } }
                    td data-label="Item" { a href=(page.link(format!("/tasks/{task}/steps/{}", item.step_uuid))) data-row="" { (item.item) } }
                    td.tight data-label="Attempt" { @if item.attempt > 0 { span { (item.attempt) } } }
                    td.tight data-label="Since" { span { (when(now, item.last_at)) } }
                } } }
            } }
        }
    }
}
