//! What every page has around it: the head, the navigation, the search box, messages.

use chrono::{DateTime, Utc};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::assets;
use crate::auth::Scope;

/// A place in the navigation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    Tasks,
    Queues,
    Templates,
    Schedules,
    Audit,
    Settings,
    /// None of them.
    Elsewhere,
}

const SECTIONS: [(Section, &str, &str, Scope); 6] = [
    (Section::Tasks, "Tasks", "/", Scope::TasksRead),
    (Section::Queues, "Queues & workers", "/queues", Scope::QueuesRead),
    (Section::Templates, "Templates", "/templates", Scope::TemplatesRead),
    (Section::Schedules, "Schedules", "/schedules", Scope::SchedulesRead),
    (Section::Audit, "Audit", "/audit", Scope::AuditRead),
    (Section::Settings, "Settings", "/settings", Scope::LimitsRead),
];

/// What the frame is drawn from.
#[derive(Debug)]
pub(super) struct Shell<'a> {
    pub base: &'a str,
    /// The scopes that decide which sections are offered; `None` before signing in.
    pub who: Option<&'a crate::Caller>,
    pub theme: Option<&'a str>,
    pub read_only: bool,
    pub now: DateTime<Utc>,
    pub title: String,
    pub section: Section,
    /// Which events make the parts marked live stale; `None`: nothing on it changes by itself.
    pub events: Option<String>,
    /// Whether so many watch that everybody looks less often.
    pub crowded: bool,
    /// What was just done, or why it was not.
    pub said: Option<&'static str>,
    /// What was searched for.
    pub search: &'a str,
}

impl Shell<'_> {
    /// The whole document around a body.
    pub fn document(&self, body: &Markup) -> Markup {
        let base = self.base;
        html! {
            (DOCTYPE)
            html lang="en" data-theme=[self.theme] {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (self.title) " · Tasker" }
                    link rel="icon" type="image/svg+xml" href={ (base) (assets::icon()) };
                    link rel="stylesheet" href={ (base) (assets::css()) };
                    script src={ (base) (assets::js()) } defer {}
                }
                body data-base=(base) data-now=(self.now.timestamp_millis()) data-events=[self.events.as_ref()]
                    data-every=[self.crowded.then_some(2_000)] data-again=[self.crowded.then_some(7_000)] {
                    a.skip href="#main" { "Skip to the content" }
                    header.top { div.bar { (self.bar()) } }
                    main id="main" tabindex="-1" {
                        @if let Some(said) = self.said {
                            div.banner.good role="status" { span aria-hidden="true" { "✓" } span { (said) } }
                        }
                        (body)
                    }
                    footer.foot {
                        span { "Tasker " (env!("CARGO_PKG_VERSION")) }
                        @if self.read_only { span { "Read-only: this server changes nothing" } }
                        @if self.who.is_some() {
                            span.js-only { "Keys: " kbd { "/" } " search, " kbd { "j" } " " kbd { "k" } " rows, " kbd { "p" } " pause" }
                            a href={ (base) "/openapi.json" } { "API description" }
                        }
                    }
                }
            }
        }
    }

    fn bar(&self) -> Markup {
        let base = self.base;
        html! {
            a.brand href={ (base) "/" } { (mark()) "Tasker" }
            @if let Some(who) = self.who {
                nav.nav aria-label="Sections" {
                    @for (section, name, path, scope) in SECTIONS {
                        @if who.has(scope) {
                            a href={ (base) (path) } aria-current=[(section == self.section).then_some("page")] { (name) }
                        }
                    }
                }
                form.search role="search" action={ (base) "/search" } method="get" {
                    label.visually-hidden for="search" { "Find a task by its id, correlation id or idempotency key" }
                    input id="search" type="search" name="q" value=(self.search) placeholder="Task id, correlation id, key" autocomplete="off" spellcheck="false" maxlength="300" required;
                    kbd aria-hidden="true" { "/" }
                }
                div.account {
                    button.plain.js-only type="button" data-theme="" aria-label="Switch between light and dark" title="Light or dark" { "◐" }
                    span.who.quiet.small title="The key that you signed in with" { (who.name) }
                    @if let Some(csrf) = who.csrf() {
                        form method="post" action={ (base) "/logout" } {
                            input type="hidden" name="csrf" value=(csrf);
                            button.plain { "Sign out" }
                        }
                    }
                }
            }
        }
    }
}

/// The sign of the product: three steps in a row, the last one ticked.
fn mark() -> Markup {
    PreEscaped(
        r##"<svg width="22" height="22" viewBox="0 0 32 32" aria-hidden="true" focusable="false"><rect x="1" y="1" width="30" height="30" rx="8" fill="#2453c6"/><path d="M8 10h4m3 0h9M8 16h4m3 0h9" stroke="#fff" stroke-width="2.6" stroke-linecap="round" opacity=".75"/><path d="m8 22 3 3 6-6" fill="none" stroke="#fff" stroke-width="2.8" stroke-linecap="round" stroke-linejoin="round"/></svg>"##
            .to_owned(),
    )
}

/// A page that says what is missing and gives the exact next command.
pub(super) fn empty(title: &str, body: &Markup) -> Markup {
    html! { div.empty { h2 { (title) } (body) } }
}

/// A command to copy.
pub(super) fn command(line: &str) -> Markup {
    html! { pre { code { (line) } " " button.copy type="button" data-copy=(line) aria-label="Copy the command" title="Copy the command" { (super::words::copy_sign()) } } }
}
