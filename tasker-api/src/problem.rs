//! Refusals: RFC 9457 problem details with a stable code.
//!
//! Nothing internal stands in one: no SQL, no path, no secret, no payload.

use std::borrow::Cow;
use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use tasker_shared::client::ClientError;
pub use tasker_shared::client::wire::{Finding, Problem as Details};
use tasker_shared::store;
use tasker_shared::store::outage;
use tasker_shared::store::templates::TemplateError;

/// Why a request was refused.
#[derive(Debug, Clone)]
pub struct Problem(Box<Details>, Option<Away>);

/// The database was not asked, or its answer is not known: it is away, or was a moment ago. Goes
/// with the response to whoever can say so once, and ask once more.
#[derive(Debug, Clone)]
pub(crate) struct Away {
    /// What is wrong.
    pub(crate) error: Arc<str>,
    /// Whether it was a connection that died: on another one the same may succeed.
    pub(crate) is_lost: bool,
}

macro_rules! codes {
    ($($(#[doc = $doc:literal])* $name:ident = $status:literal, $code:literal, $title:literal;)*) => {
        $($(#[doc = $doc])* pub const $name: Code = Code { status: $status, code: $code, title: $title };)*
        /// Every code there is.
        pub const CODES: &[Code] = &[$($name),*];
    };
}

/// A stable code, its status and its title.
#[derive(Debug, Clone, Copy)]
pub struct Code {
    /// The HTTP status.
    pub status: u16,
    /// Never changes its meaning.
    pub code: &'static str,
    /// For people.
    pub title: &'static str,
}

codes! {
    /// A field breaks a rule.
    INVALID_REQUEST = 400, "invalid_request", "The request breaks a rule";
    /// Not JSON, or not of the documented shape.
    MALFORMED_BODY = 400, "malformed_body", "The body cannot be read";
    /// No credential, or one that is not valid now.
    UNAUTHENTICATED = 401, "unauthenticated", "Sign in or send a valid API key";
    /// The credential does not reach so far.
    FORBIDDEN = 403, "forbidden", "This key may not do that";
    /// A browser's request from another site, or without its token.
    CROSS_SITE = 403, "cross_site", "The request did not come from this site's own pages";
    /// The whole server only reads.
    READ_ONLY = 403, "read_only", "This server is read-only";
    /// There is none, or the caller may not know of it.
    NOT_FOUND = 404, "not_found", "There is no such thing";
    /// The path exists for other methods.
    METHOD_NOT_ALLOWED = 405, "method_not_allowed", "The path does not take this method";
    /// Something slower than the limit.
    TIMEOUT = 408, "timeout", "The request took too long";
    /// The state of the thing does not allow it.
    CONFLICT = 409, "conflict", "The state of the thing does not allow that";
    /// The key was used for another request.
    IDEMPOTENCY_CONFLICT = 409, "idempotency_conflict", "The idempotency key was used for another request";
    /// A template version never changes.
    IMMUTABLE = 409, "immutable", "A template version never changes";
    /// Over the limit.
    TOO_LARGE = 413, "too_large", "The body is over the limit";
    /// Not JSON by its own account.
    UNSUPPORTED_MEDIA_TYPE = 415, "unsupported_media_type", "The body must be JSON";
    /// A host name that this server was not told to answer to.
    UNKNOWN_HOST = 421, "unknown_host", "This server does not answer to that host name";
    /// Too many requests of this principal.
    RATE_LIMITED = 429, "rate_limited", "Too many requests";
    /// The namespace has as many open tasks as it may.
    TOO_MANY_OPEN_TASKS = 429, "too_many_open_tasks", "The namespace has as many open tasks as it may";
    /// Ours.
    INTERNAL = 500, "internal", "The server made a mistake";
    /// As much as this server takes at once is taken; trying again may help.
    OVERLOADED = 503, "overloaded", "The server has too much to do";
    /// The database does not answer; trying again may help.
    UNAVAILABLE = 503, "unavailable", "The database does not answer";
}

impl Code {
    /// A problem of this code.
    pub fn because(self, detail: impl Into<String>) -> Problem {
        let details = Details {
            code: self.code.into(),
            title: self.title.into(),
            status: self.status,
            detail: detail.into(),
            field: None,
            problems: Vec::new(),
            retry_after: None,
        };
        Problem(Box::new(details), None)
    }
}

impl Problem {
    /// Which field, what is wrong with it, what to do.
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// Names the field that is at fault.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.0.field = Some(field.into());
        self
    }

    /// Says when it is worth trying again.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.0.retry_after = Some(seconds);
        self
    }

    /// A rule that `field` breaks.
    pub fn invalid(field: impl Into<String>, rule: impl std::fmt::Display) -> Self {
        let field = field.into();
        INVALID_REQUEST.because(format!("{field}: {rule}")).field(field)
    }

    /// Names every problem, where there are several.
    #[must_use]
    pub fn findings(mut self, problems: Vec<Finding>) -> Self {
        self.0.problems = problems;
        self
    }

    /// What it says.
    pub fn details(&self) -> &Details {
        &self.0
    }

    /// There is no such thing, as far as the caller may know.
    pub fn not_found(what: impl std::fmt::Display) -> Self {
        NOT_FOUND.because(format!("no {what}"))
    }

    /// What breaks a schema: lines such as `input/tasks/0/priority: is too large`, of which the
    /// first word stands for the whole and is left out.
    pub(crate) fn violations(lines: &[String], whole: &str) -> Self {
        let findings: Vec<Finding> = lines
            .iter()
            .map(|line| {
                let (place, rule) = line.split_once(": ").unwrap_or(("", line));
                let field = dotted(place.strip_prefix(whole).unwrap_or(place));
                Finding { field, line: None, detail: rule.to_owned() }
            })
            .collect();
        let Some(first) = findings.first() else {
            return INVALID_REQUEST.because("the request breaks a rule");
        };
        let place = if first.field.is_empty() { "the body" } else { &first.field };
        let problem = INVALID_REQUEST.because(format!("{place}: {}", first.detail));
        let problem = if first.field.is_empty() { problem } else { problem.field(first.field.clone()) };
        if findings.len() > 1 { problem.findings(findings) } else { problem }
    }

    /// What a function of the database refused, in words that begin with the field: `input: …`.
    pub fn refused(text: &str) -> Self {
        let field = text.split_once(": ").map(|(field, _)| field).filter(|field| is_field(field));
        let code = match field {
            Some("idempotency_key") if text.contains("was used for task") => IDEMPOTENCY_CONFLICT,
            Some("namespace") if text.contains(" open tasks, its limit; ") => TOO_MANY_OPEN_TASKS,
            Some(_) => INVALID_REQUEST,
            None => CONFLICT,
        };
        let problem = code.because(text);
        match field {
            Some(field) => problem.field(field),
            None => problem,
        }
    }
}

/// `/tasks/0/priority` as `tasks[0].priority`.
fn dotted(pointer: &str) -> String {
    let mut field = String::new();
    for part in pointer.split('/').filter(|part| !part.is_empty()) {
        if part.bytes().all(|byte| byte.is_ascii_digit()) {
            field.push('[');
            field.push_str(part);
            field.push(']');
        } else {
            if !field.is_empty() {
                field.push('.');
            }
            field.push_str(part);
        }
    }
    field
}

fn is_field(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.[]/".contains(&byte))
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let (retry_after, unauthenticated) = (self.0.retry_after, self.0.status == UNAUTHENTICATED.status);
        let mut response = (status, Json(self.0)).into_response();
        if let Some(away) = self.1 {
            response.extensions_mut().insert(away);
        }
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if unauthenticated {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<store::Error> for Problem {
    fn from(error: store::Error) -> Self {
        if let store::Error::Database(sqlx::Error::Database(answer)) = &error {
            match answer.code().as_deref() {
                // Functions of ours refuse with words that are meant for the caller.
                Some("22023") => return Self::refused(answer.message()),
                Some("42501") => return FORBIDDEN.because(answer.message()),
                // PostgreSQL keeps no NUL in text, and no lone surrogate in JSON.
                Some("22P05" | "22021") => {
                    return INVALID_REQUEST.because("a text holds a character that cannot be kept, such as \\u0000");
                }
                Some("57014") => {
                    return TIMEOUT.because("the database took too long; ask for less").retry_after(1);
                }
                _ => {}
            }
        }
        let unavailable = || UNAVAILABLE.because("the database does not answer; try again in a moment").retry_after(1);
        if outage::is_away(&error) {
            let is_lost = matches!(&error, store::Error::Database(error) if outage::is_lost(error));
            return Self(unavailable().0, Some(Away { error: error.to_string().into(), is_lost }));
        }
        if error.is_transient() {
            tracing::warn!(%error, "a request failed because the database did not answer");
            return unavailable();
        }
        tracing::error!(%error, "a request failed");
        INTERNAL.because("the server made a mistake; its log says more")
    }
}

impl From<sqlx::Error> for Problem {
    fn from(error: sqlx::Error) -> Self {
        store::Error::from(error).into()
    }
}

impl From<ClientError> for Problem {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(text) => Self::refused(&text),
            ClientError::NotFound(task) => Self::not_found(format!("task {task}")),
            ClientError::Connect(error) => error.into(),
            ClientError::Store(error) => error.into(),
            ClientError::Timeout { .. } => TIMEOUT.because("the time to wait is over"),
        }
    }
}

impl From<TemplateError> for Problem {
    fn from(error: TemplateError) -> Self {
        match error {
            TemplateError::Immutable { .. } => IMMUTABLE.because(error.to_string()).field("version"),
            TemplateError::Store(error) => error.into(),
            TemplateError::Stored(_) => {
                tracing::error!(%error, "a stored template cannot be read");
                INTERNAL.because("the stored template cannot be read by this version of the server")
            }
        }
    }
}

/// The first line of an error of a parser, without the position in a text that the caller never saw.
pub(crate) fn plain(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    let cut: Cow<'_, str> = line.split(" at line ").next().unwrap_or(line).into();
    cut.chars().take(300).collect()
}
