//! The web page: server-rendered, readable without a script, live with one.
//!
//! Pages read through `tasker_shared::store`, show what the caller's scopes and namespaces allow,
//! and ask for changes by plain forms. The template crate escapes every text; the only markup that
//! is not escaped is ours (the sign of the product).

mod assets;
mod audit;
mod form;
mod graph;
mod log;
mod memo;
mod payload;
mod queues;
pub mod rows;
mod schedules;
mod settings;
mod shell;
mod step;
mod task;
mod task_data;
mod task_timeline;
mod tasks;
mod templates;
mod timeline;
mod words;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::{Extension, FromRequest, FromRequestParts, Request, State as Extract};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use chrono::{DateTime, Utc};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use maud::{Markup, html};

use self::memo::Memory;
use self::shell::{Section, Shell};
use crate::guard::{Caller, CsrfIn, identify, once_more};
use crate::operation::{Database, MAX_BODY, whole};
use crate::problem::{FORBIDDEN, MALFORMED_BODY, Problem, READ_ONLY};
use crate::shares::Share;
use crate::{Config, State};

/// The cookie that keeps the choice between light and dark.
const THEME_COOKIE: &str = "tasker_theme";

/// Its routes, below the base path.
pub(crate) fn routes(state: &State) -> Router<State> {
    let pages = Router::new()
        .route("/", get(tasks::list))
        .route("/search", get(tasks::search))
        .route("/bulk", post(tasks::bulk))
        .route("/example", post(tasks::example))
        .route("/tasks/{task}", get(task::show))
        .route("/tasks/{task}/act", post(task::act))
        .route("/tasks/{task}/signal", post(task::signal))
        .route("/tasks/{task}/timeline.json", get(task_timeline::timeline))
        .route("/tasks/{task}/log", get(log::show))
        .route("/tasks/{task}/log.csv", get(log::csv))
        .route("/tasks/{task}/log.json", get(log::json))
        .route("/tasks/{task}/steps/{step}", get(step::show))
        .route("/queues", get(queues::show))
        .route("/queues/act", post(queues::act))
        .route("/quarantine/{id}", get(queues::quarantined).post(queues::settle))
        .route("/templates", get(templates::list))
        .route("/templates/{namespace}/{name}", get(templates::show).post(templates::submit))
        .route("/schedules", get(schedules::list))
        .route("/schedules/act", post(schedules::act))
        .route("/audit", get(audit::list))
        .route("/settings", get(settings::show))
        .layer(from_fn_with_state(state.clone(), once_more))
        .layer(from_fn_with_state(state.clone(), frame))
        .layer(Extension(Arc::new(Memory::default())));
    Router::new().route("/assets/{file}", get(assets::get)).merge(pages)
}

/// Who asks for a page, and what every page needs.
#[derive(Debug, Clone)]
struct Page {
    state: State,
    who: Caller,
    memory: Arc<Memory>,
    theme: Option<&'static str>,
    said: Option<&'static str>,
    search: String,
    database: Database,
}

/// The caller, for the error page, once somebody has found out who it is.
#[derive(Debug, Clone, Default)]
struct KnownCaller(Arc<OnceLock<Caller>>);

/// Sentences that a page may begin with, by the word in its address: `?done=…`.
const DONE: [(&str, &str); 14] = [
    ("cancel", "Asked to cancel; running handlers are told to stop."),
    ("terminate", "Asked to terminate; running handlers are dropped."),
    ("suspend", "Asked to suspend; nothing more is sent until it is resumed."),
    ("resume", "Asked to resume."),
    ("retry", "Asked to retry."),
    ("rerun", "Asked to run again; what is not affected keeps its result."),
    ("give_up", "Asked to give up; the task ends as failed."),
    ("resolve", "Asked to resolve by hand."),
    ("step", "Asked to settle the step by hand."),
    ("signal", "The signal was sent."),
    ("submitted", "Submitted."),
    ("pause", "Paused; nothing more is sent until it is resumed."),
    ("quarantine", "Done; the message has left the quarantine."),
    ("trigger", "A run was started; it appears among the tasks."),
];

impl Page {
    fn new(state: &State, parts: &Parts, who: Caller) -> Self {
        let query = parts.uri.query().unwrap_or_default();
        let of_query = |key: &str| {
            form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == key).map(|(_, value)| value.into_owned())
        };
        if let Some(known) = parts.extensions.get::<KnownCaller>() {
            // Set once a request; a second extractor finds the same caller.
            let _ = known.0.set(who.clone());
        }
        let done = of_query("done").unwrap_or_default();
        Self {
            state: state.clone(),
            who,
            memory: parts.extensions.get::<Arc<Memory>>().cloned().unwrap_or_default(),
            theme: theme(&parts.headers),
            said: DONE.iter().find(|(word, _)| *word == done).map(|(_, said)| *said),
            database: Database { pool: state.pool().clone(), writes: !parts.method.is_safe() },
            search: if parts.uri.path().ends_with("/search") {
                of_query("q").unwrap_or_default()
            } else {
                String::new()
            },
        }
    }

    fn config(&self) -> &Config {
        self.state.config()
    }

    /// A path of ours as a link.
    fn link(&self, path: impl std::fmt::Display) -> String {
        format!("{}{path}", self.config().base_path)
    }

    /// What the caller may see; `None`: every namespace.
    fn namespaces(&self) -> Option<&[String]> {
        self.who.namespaces()
    }

    /// How long an answer is good that many may look at, and that so many statements make.
    fn good_for(&self, alone: Duration, statements: u32) -> Duration {
        memo::good_for(&self.state, alone, statements)
    }

    /// Whether forms that change something are offered.
    fn may_change(&self, scope: crate::auth::Scope, namespace: &str) -> bool {
        !self.config().read_only && self.who.may(scope, namespace)
    }

    /// The hidden field of a form.
    fn csrf(&self) -> Markup {
        html! { input type="hidden" name="csrf" value=(self.who.csrf().unwrap_or_default()); }
    }

    fn show(
        &self,
        now: DateTime<Utc>,
        title: impl Into<String>,
        section: Section,
        events: Option<&str>,
        body: &Markup,
    ) -> Response {
        let shell = Shell {
            base: &self.config().base_path,
            who: Some(&self.who),
            theme: self.theme,
            read_only: self.config().read_only,
            now,
            title: title.into(),
            section,
            events: events.map(|events| self.link(events)),
            crowded: self.state.hub().is_crowded(),
            said: self.said,
            search: &self.search,
        };
        document(StatusCode::OK, &shell, body)
    }

    /// Where to go after a form was taken.
    fn then(&self, path: impl std::fmt::Display, done: &str) -> Response {
        let path = path.to_string();
        let sign = if path.contains('?') { '&' } else { '?' };
        see_other(&format!("{}{sign}done={done}", self.link(path)))
    }

    /// The button that pauses live changes.
    fn live_button() -> Markup {
        html! { button.live.js-only type="button" data-live="" data-state="off" data-keep="" title="Pause or resume live changes (p)" { "Connecting" } }
    }
}

impl FromRequestParts<State> for Page {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Self, Problem> {
        let who = identify(state, parts, CsrfIn::NotNeeded).await?;
        Ok(Self::new(state, parts, who))
    }
}

/// A form of ours that was sent: by whom, and its fields in order.
#[derive(Debug)]
struct Form {
    page: Page,
    fields: Vec<(String, String)>,
    /// That of the fields.
    _room: Share<String>,
}

impl Form {
    /// The first field of this name that is not empty.
    fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.trim()).filter(|value| !value.is_empty())
    }

    /// The same, or a refusal that names it.
    fn need(&self, name: &str) -> Result<&str, Problem> {
        self.get(name).ok_or_else(|| Problem::invalid(name, "must be given"))
    }

    /// Every field of this name.
    fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.fields.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl FromRequest<State> for Form {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &State) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let who = identify(state, &parts, CsrfIn::Form).await?;
        let page = Page::new(state, &parts, who);
        if state.config().read_only {
            return Err(READ_ONLY.because("this server changes nothing; use one that was not started with --read-only"));
        }
        let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if !kind.starts_with("application/x-www-form-urlencoded") {
            return Err(MALFORMED_BODY.because("content-type: must be application/x-www-form-urlencoded"));
        }
        // Escaping makes text up to three times as long.
        let mut room = state.room().bodies.none(page.who.key_id.clone());
        let bytes = whole(body, 3 * MAX_BODY, &mut room).await?;
        let fields: Vec<(String, String)> =
            form_urlencoded::parse(&bytes).map(|(key, value)| (key.into_owned(), value.into_owned())).collect();
        let form = Self { page, fields, _room: room };
        form.page.who.check_csrf(form.get("csrf").unwrap_or_default())?;
        Ok(form)
    }
}

/// Turns refusals into pages, and who has not signed in to the sign-in page.
async fn frame(Extract(state): Extract<State>, mut request: Request, next: Next) -> Response {
    let known = KnownCaller::default();
    request.extensions_mut().insert(known.clone());
    let theme = theme(request.headers());
    let reads = request.method().is_safe();
    let wants_json = request.uri().path().rsplit_once('.').is_some_and(|(_, kind)| kind == "json");
    let mut response = next.run(request).await;
    let status = response.status();
    if status.as_u16() < 400 || wants_json {
        return private(response);
    }
    if status == StatusCode::UNAUTHORIZED && reads {
        return see_other(&format!("{}{}", state.config().base_path, crate::page::LOGIN));
    }
    let retry_after = response.headers_mut().remove(header::RETRY_AFTER);
    let body = axum::body::to_bytes(response.into_body(), 64 * 1024).await.unwrap_or_default();
    let problem: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    let plain = String::from_utf8_lossy(&body);
    let detail = problem["detail"].as_str().unwrap_or(&plain);
    let title = problem["title"].as_str().unwrap_or_else(|| status.canonical_reason().unwrap_or("It did not work"));
    let asked_by_form = !reads && matches!(status, StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY);
    let mut page = problem_page(&state, known.0.get(), theme, asked_by_form, status, title, detail);
    if let Some(seconds) = retry_after {
        page.headers_mut().insert(header::RETRY_AFTER, seconds);
    }
    page
}

/// Where a browser signs in.
pub(crate) const LOGIN: &str = "/login";

/// What a browser shows where nothing is: who asks is not known, so nobody is named.
pub(crate) fn nothing_here(state: &State, headers: &HeaderMap) -> Response {
    let detail = "no page has this address";
    problem_page(state, None, theme(headers), false, StatusCode::NOT_FOUND, "There is no such page", detail)
}

fn problem_page(
    state: &State,
    who: Option<&Caller>,
    theme: Option<&str>,
    asked_by_form: bool,
    status: StatusCode,
    title: &str,
    detail: &str,
) -> Response {
    let base = &state.config().base_path;
    let next = match status.as_u16() {
        401 => "Sign in, then try again.",
        403 => "Ask an administrator for a key that may, or sign in with another.",
        404 if who.is_none() => "Look for a typing mistake, or begin at the tasks.",
        404 => "It may have been removed by retention, or belong to a namespace that your key does not reach.",
        409 => "Look at its state as it is now, then decide again.",
        429 | 503 => "Wait a moment and load the page again.",
        500.. => "The log of the server says more. Nothing was changed unless the page says so.",
        _ => "Go back, correct it and send it again.",
    };
    let shell = Shell {
        base,
        who,
        theme,
        read_only: state.config().read_only,
        now: Utc::now(),
        title: title.to_owned(),
        section: Section::Elsewhere,
        events: None,
        crowded: false,
        said: None,
        search: "",
    };
    let body = html! {
        div.panel {
            h1 { (title) }
            p.reason { (detail) }
            p.quiet { (next) }
            div.actions {
                @if asked_by_form { button.primary.js-only type="button" data-back="" { "Back to the form" } }
                a.button href={ (base) "/" } { "To the tasks" }
                @if status == StatusCode::UNAUTHORIZED { a.button.primary href={ (base) (LOGIN) } { "Sign in" } }
            }
        }
    };
    document(status, &shell, &body)
}

/// What somebody sees who has not signed in, with what went wrong the last time.
pub(crate) fn sign_in_page(state: &State, problem: Option<&str>) -> Response {
    let shell = Shell {
        base: &state.config().base_path,
        who: None,
        theme: None,
        read_only: state.config().read_only,
        now: Utc::now(),
        title: "Sign in".to_owned(),
        section: Section::Elsewhere,
        events: None,
        crowded: false,
        said: None,
        search: "",
    };
    let body = html! {
        div.panel.sign-in {
            h1 { "Sign in" }
            p.quiet { "Tasker shows and runs your tasks (a task is one run of a workflow)." }
            @if let Some(problem) = problem {
                div.banner.bad role="alert" { span aria-hidden="true" { "✕" } span { (problem) } }
            }
            form method="post" {
                div.field {
                    label for="key" { "API key" }
                    input id="key" name="key" type="password" autocomplete="current-password" required autofocus spellcheck="false" placeholder="tsk_…";
                    span.hint { "It begins with tsk_. The browser stays signed in for 12 hours; the key itself is not kept in it." }
                }
                button.primary { "Sign in" }
            }
            h2 { "No key yet?" }
            p { "On the machine that runs Tasker, either open the link that " code { "tasker up" } " prints, or make a key:" }
            (shell::command("tasker key create me --role operator"))
        }
    };
    document(StatusCode::OK, &shell, &body)
}

fn document(status: StatusCode, shell: &Shell<'_>, body: &Markup) -> Response {
    let html = shell.document(body).into_string();
    let mut response = (status, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], html).into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn private(mut response: Response) -> Response {
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn see_other(to: &str) -> Response {
    match HeaderValue::from_str(to) {
        Ok(to) => (
            StatusCode::SEE_OTHER,
            [(header::LOCATION, to), (header::CACHE_CONTROL, HeaderValue::from_static("no-store"))],
        )
            .into_response(),
        Err(_) => StatusCode::BAD_REQUEST.into_response(),
    }
}

fn theme(headers: &HeaderMap) -> Option<&'static str> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| *name == THEME_COOKIE).and_then(|(_, value)| match value {
        "dark" => Some("dark"),
        "light" => Some("light"),
        _ => None,
    })
}

/// Refuses what the caller may not look at here.
fn may_read(page: &Page, scope: crate::auth::Scope) -> Result<(), Problem> {
    page.who.require_scope(scope)
}

/// What somebody without the scope for payloads sees in their place.
fn hidden() -> Markup {
    html! { p.quiet { "Hidden: your key lacks the scope " code { "payloads:read" } "." } }
}

/// Text of the caller as JSON, or a refusal that names the field.
fn json_of(field: &str, text: &str) -> Result<serde_json::Value, Problem> {
    serde_json::from_str(text)
        .map_err(|error| Problem::invalid(field, format!("must be JSON: {}", crate::problem::plain(error))))
}

/// What was asked of the database, if it was accepted.
fn accepted(answer: &str) -> Result<(), Problem> {
    match answer {
        "accepted" => Ok(()),
        "no such task" => Err(Problem::not_found("such task")),
        other => Err(Problem::refused(other)),
    }
}

/// Refuses what the caller's key may not do.
fn forbidden(detail: impl Into<String>) -> Problem {
    FORBIDDEN.because(detail)
}
