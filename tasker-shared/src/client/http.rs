//! The HTTP API, from Rust: for services that reach a server but not its database.
//!
//! Requests and answers are the server's own types. The current trace context goes with every
//! request, and with a submission into the task. What has no method of its own here is asked for
//! with [`HttpClient::get`] and [`HttpClient::send`]; `GET /openapi.json` lists it.
//!
//! ```no_run
//! use serde_json::json;
//! use tasker_shared::client::Submit;
//! use tasker_shared::client::http::{HttpClient, HttpError, TaskQuery};
//!
//! # async fn example() -> Result<(), HttpError> {
//! let tasker = HttpClient::new("https://tasks.example.com", &std::env::var("TASKER_KEY").unwrap_or_default())?;
//! let order = Submit {
//!     idempotency_key: Some("order-4711".into()),
//!     correlation_id: Some("ORD-4711".into()),
//!     ..Submit::new("shop", "order", json!({"order_id": "4711"}))
//! };
//! let submitted = match tasker.submit(&order).await {
//!     Ok(submitted) => submitted,
//!     Err(HttpError::Refused(problem)) if problem.code == "idempotency_conflict" => return Ok(()),
//!     Err(other) => return Err(other),
//! };
//! let task = tasker.wait(submitted.task_uuid).await?;
//! println!("{}: {:?}", task.status, tasker.result(task.task_uuid).await?);
//!
//! let mut failed = tasker.tasks(TaskQuery { status: Some("failed".into()), ..TaskQuery::default() });
//! while let Some(page) = failed.next().await? {
//!     for task in page {
//!         println!("{} {:?}", task.correlation_id, task.reason);
//!     }
//! }
//! # Ok(())
//! # }
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Method, RequestBuilder, Response, Url};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

pub use super::wire::{
    BatchAnswer, BatchItem, Bulk, BulkAction, BulkAnswer, BulkFilter, Finding, Page, Problem, TaskQuery, TaskResult,
    Why,
};
use super::{Submit, Submitted};
use crate::store::details::{AttemptRow, StepPayloads, StepRow, TransitionRow};
use crate::store::views::{ChildView, TaskView};
use crate::trace::context::inject_current;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a connection that nobody uses is kept: less than the server keeps it, so that no request
/// goes out on one that is being closed.
const UNUSED: Duration = Duration::from_mins(1);
/// The longest wait for the head of an answer; the server gives up after 30 s.
const ANSWER: Duration = Duration::from_secs(40);
/// An event of one task is no longer; a server that sends more is not one of ours.
const LONGEST_EVENT: usize = 4 << 20;
/// How soon a stream that ended is begun again.
const AGAIN: Duration = Duration::from_secs(1);

/// A request was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The server said no; `code` is what a program may branch on.
    #[error("{}", .0.detail)]
    Refused(Box<Problem>),
    /// The URL, the key or the HTTP client cannot be used.
    #[error("{field}: {rule}")]
    Unusable {
        /// Which of them.
        field: &'static str,
        /// What is wrong with it.
        rule: String,
    },
    /// No answer came, or it broke off. What was asked may have been done: submit with an
    /// idempotency key to ask again safely.
    #[error("the server did not answer: {0}")]
    NoAnswer(#[source] reqwest::Error),
    /// What came is not an answer of this API: another program, or a much newer server.
    #[error("the server's answer ({status}) cannot be read: {problem}")]
    Unreadable {
        /// The HTTP status.
        status: u16,
        /// What is wrong with it.
        problem: String,
    },
}

impl HttpError {
    /// The stable code of a refusal, such as `not_found`.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused(problem) => Some(&problem.code),
            _ => None,
        }
    }

    /// Whether asking again later may help; `Retry-After` is in the problem.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Refused(problem) => matches!(problem.status, 408 | 429 | 500..=599),
            Self::NoAnswer(_) => true,
            Self::Unusable { .. } | Self::Unreadable { .. } => false,
        }
    }
}

/// Asks a server. Cheap to clone; the clones share connections.
#[derive(Debug, Clone)]
pub struct HttpClient {
    http: reqwest::Client,
    base: Arc<str>,
    key: HeaderValue,
}

impl HttpClient {
    /// A client of the server at `url` (with its base path, if it has one) that shows this API key.
    ///
    /// # Errors
    /// [`HttpError::Unusable`] names what cannot be used: the URL, the key, or this machine's TLS.
    pub fn new(url: &str, key: &str) -> Result<Self, HttpError> {
        let unusable = |rule: String| HttpError::Unusable { field: "http client", rule };
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(crate::tls::web().map_err(|error| unusable(error.to_string()))?)
            // A redirect would carry the key to another host.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            .pool_idle_timeout(UNUSED)
            .tcp_nodelay(true)
            .build()
            .map_err(|error| unusable(error.to_string()))?;
        Self::with(http, url, key)
    }

    /// With an HTTP client of the caller's: its proxies, its own certificate authority. It should
    /// follow no redirects, since they would carry the key elsewhere.
    ///
    /// # Errors
    /// [`HttpError::Unusable`] if the URL or the key cannot be used.
    pub fn with(http: reqwest::Client, url: &str, key: &str) -> Result<Self, HttpError> {
        let parsed: Url = url.parse().map_err(|_| HttpError::Unusable {
            field: "url",
            rule: "must look like https://tasks.example.com".into(),
        })?;
        if !matches!(parsed.scheme(), "http" | "https") || parsed.query().is_some() || parsed.fragment().is_some() {
            let rule = "must begin with http:// or https:// and end with the path at most".into();
            return Err(HttpError::Unusable { field: "url", rule });
        }
        let mut key = HeaderValue::from_str(&format!("Bearer {key}"))
            .map_err(|_| HttpError::Unusable { field: "key", rule: "must look like tsk_…".into() })?;
        // So that no log of the HTTP client shows it.
        key.set_sensitive(true);
        Ok(Self { http, base: parsed.as_str().trim_end_matches('/').into(), key })
    }

    /// Submits a task.
    ///
    /// The task joins the current trace, or the one in `traceparent`.
    ///
    /// # Errors
    /// [`HttpError::Refused`] if the server refuses the task; `field` of its problem names what is wrong. Otherwise
    /// as [`get`](Self::get).
    pub async fn submit(&self, task: &Submit) -> Result<Submitted, HttpError> {
        let mut task = task.clone();
        task.add_current_context();
        // In headers, as every HTTP service understands it.
        let context = [
            ("traceparent", &mut task.traceparent),
            ("tracestate", &mut task.tracestate),
            ("baggage", &mut task.baggage),
        ];
        let context: Vec<_> = context.into_iter().filter_map(|(name, value)| Some((name, value.take()?))).collect();
        let mut request = self.request(Method::POST, "/v1/tasks", &());
        for (name, value) in context {
            request = with_header(request, name, &value);
        }
        read(answered(request.timeout(ANSWER).json(&task)).await?).await
    }

    /// Submits up to 1000 tasks in one statement; one answer each, in order. A bad one costs only itself.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn submit_many(&self, tasks: &[Submit]) -> Result<Vec<BatchItem>, HttpError> {
        let answer: BatchAnswer = self.send(Method::POST, "/v1/tasks/batch", &json!({"tasks": tasks})).await?;
        Ok(answer.results)
    }

    /// The tasks that match, newest first, page by page.
    pub fn tasks(&self, query: TaskQuery) -> Pages<TaskView> {
        self.pages("/v1/tasks", query)
    }

    /// One task.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn task(&self, task: Uuid) -> Result<TaskView, HttpError> {
        self.get(&format!("/v1/tasks/{task}"), &()).await
    }

    /// What a task waits for, or how it ended.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn why(&self, task: Uuid) -> Result<Why, HttpError> {
        self.get(&format!("/v1/tasks/{task}/why"), &()).await
    }

    /// What a task came to: the outputs of its last steps, by step name.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn result(&self, task: Uuid) -> Result<BTreeMap<String, Value>, HttpError> {
        let answer: TaskResult = self.get(&format!("/v1/tasks/{task}/result"), &()).await?;
        Ok(answer.outputs)
    }

    /// The steps of a task in template order, items of maps among them.
    pub fn steps(&self, task: Uuid) -> Pages<StepRow> {
        self.pages(&format!("/v1/tasks/{task}/steps"), ())
    }

    /// Every execution of a task's steps.
    pub fn attempts(&self, task: Uuid) -> Pages<AttemptRow> {
        self.pages(&format!("/v1/tasks/{task}/attempts"), ())
    }

    /// A task's log, in order of time.
    pub fn transitions(&self, task: Uuid) -> Pages<TransitionRow> {
        self.pages(&format!("/v1/tasks/{task}/transitions"), ())
    }

    /// The tasks that its steps started.
    pub fn children(&self, task: Uuid) -> Pages<ChildView> {
        self.pages(&format!("/v1/tasks/{task}/children"), ())
    }

    /// Input, progress, output and error of a step; of an item of a map as `ship[3]`.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn step_payloads(&self, task: Uuid, step: &str) -> Result<StepPayloads, HttpError> {
        self.get(&format!("/v1/tasks/{task}/steps/{}/payloads", segment(step)), &()).await
    }

    /// Does to a task what needs nothing but a reason: `cancel`, `terminate`, `suspend`, `resume`,
    /// `retry`, `give-up` or `resolve`. An orchestrator decides a moment later.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn act(&self, task: Uuid, act: &str, reason: Option<&str>) -> Result<(), HttpError> {
        let body = reason.map_or_else(|| json!({}), |reason| json!({"reason": reason}));
        self.post(&format!("/v1/tasks/{task}/{}", segment(act)), &body).await
    }

    /// Runs a finished task again from these steps, in a new generation.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn rerun(&self, task: Uuid, from: &[&str], reason: Option<&str>) -> Result<(), HttpError> {
        self.post(&format!("/v1/tasks/{task}/rerun"), &json!({"from": from, "reason": reason})).await
    }

    /// Sends a signal; the step that waits for it completes with the payload.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn signal(&self, task: Uuid, name: &str, payload: &Value) -> Result<(), HttpError> {
        self.post(&format!("/v1/tasks/{task}/signal"), &json!({"name": name, "payload": payload})).await
    }

    /// Acts on up to 1000 tasks that match, or says which those would be.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn bulk(&self, bulk: &Bulk) -> Result<BulkAnswer, HttpError> {
        self.send(Method::POST, "/v1/tasks/bulk", bulk).await
    }

    /// Waits until the task's generation has ended, in whatever way. Put a timeout around it.
    ///
    /// It follows the server's live changes, and asks again when their stream breaks off.
    ///
    /// # Errors
    /// As [`get`](Self::get), if asking again would not help: see [`HttpError::is_transient`].
    pub async fn wait(&self, task: Uuid) -> Result<TaskView, HttpError> {
        loop {
            let begun = self.events(&EventQuery { task: Some(task), ..EventQuery::default() }).await;
            let mut events = match begun {
                Err(error) if error.is_transient() => {
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
                other => other?,
            };
            // A stream that breaks off says nothing of the task.
            while let Ok(Some(event)) = events.next().await {
                match event {
                    Event::Task(seen) if seen.task_uuid == task && seen.is_finished() => return Ok(*seen),
                    Event::Task(_) | Event::Other(_) => {}
                    // What ended before the stream began, or in a crowd.
                    Event::Hello | Event::Many => match self.task(task).await {
                        Ok(seen) if seen.is_finished() => return Ok(seen),
                        Err(error) if !error.is_transient() => return Err(error),
                        _ => {}
                    },
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Live changes from now on; they end with the server, or with the key.
    ///
    /// # Errors
    /// As [`get`](Self::get). [`HttpError::Unreadable`] also if no answer begins within 40 s.
    pub async fn events(&self, query: &EventQuery) -> Result<Events, HttpError> {
        let request = self.request(Method::GET, "/v1/events", query);
        // The head only: the stream itself has no end.
        let response = tokio::time::timeout(ANSWER, answered(request)).await.unwrap_or_else(|_| {
            Err(HttpError::Unreadable { status: 0, problem: format!("no answer within {} s", ANSWER.as_secs()) })
        })?;
        Ok(Events { response, buffer: Vec::new() })
    }

    /// Any list of the API, page by page: `client.pages::<QueueView>("/v1/queues", ())`.
    pub fn pages<T: DeserializeOwned>(&self, path: &str, query: impl Serialize) -> Pages<T> {
        let query = serde_json::to_value(query).unwrap_or_default();
        Pages { client: self.clone(), path: path.to_owned(), query, more: true, items: PhantomData }
    }

    /// Any GET of the API that answers JSON. Fields of `query` that are null are left out.
    ///
    /// # Errors
    /// [`HttpError::Refused`] with the server's problem, [`HttpError::NoAnswer`] if no answer came within 40 s or it
    /// broke off, [`HttpError::Unreadable`] if it is not an answer of this API.
    pub async fn get<T: DeserializeOwned>(&self, path: &str, query: &impl Serialize) -> Result<T, HttpError> {
        read(answered(with_context(self.request(Method::GET, path, query).timeout(ANSWER))).await?).await
    }

    /// Any other operation of the API that answers JSON.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, HttpError> {
        let request = with_context(self.request(method, path, &()).timeout(ANSWER));
        read(answered(request.json(body)).await?).await
    }

    async fn post(&self, path: &str, body: &Value) -> Result<(), HttpError> {
        self.send::<Value>(Method::POST, path, body).await.map(|_| ())
    }

    fn request(&self, method: Method, path: &str, query: &impl Serialize) -> RequestBuilder {
        let mut url = format!("{}{path}", self.base);
        if let Ok(Value::Object(fields)) = serde_json::to_value(query) {
            let mut mark = '?';
            for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                url.push(mark);
                url.push_str(name);
                url.push('=');
                url.push_str(&segment(&text));
                mark = '&';
            }
        }
        self.http.request(method, url).header(AUTHORIZATION, self.key.clone())
    }
}

/// With the trace that the caller is in.
fn with_context(request: RequestBuilder) -> RequestBuilder {
    let mut context = HashMap::new();
    inject_current(&mut context);
    context.iter().fold(request, |request, (name, value)| with_header(request, name, value))
}

/// A value that is no header value is left out.
fn with_header(request: RequestBuilder, name: &str, value: &str) -> RequestBuilder {
    match (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value)) {
        (Ok(name), Ok(value)) => request.header(name, value),
        _ => request,
    }
}

/// Text as a part of a URL.
fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~,".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// A good answer's head, or why there is none.
async fn answered(request: RequestBuilder) -> Result<Response, HttpError> {
    let response = request.send().await.map_err(no_answer)?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let retry_after = seconds(response.headers());
    let json = is(response.headers(), "application/problem+json");
    let bytes = response.bytes().await.map_err(no_answer)?;
    let unreadable = |problem: &str| HttpError::Unreadable { status: status.as_u16(), problem: problem.to_owned() };
    if !json {
        return Err(unreadable("it is no problem of this API; is there another program at this address?"));
    }
    let problem: Problem = serde_json::from_slice(&bytes).map_err(|_| unreadable("its problem has another shape"))?;
    Err(HttpError::Refused(Box::new(Problem { retry_after, ..problem })))
}

async fn read<T: DeserializeOwned>(response: Response) -> Result<T, HttpError> {
    let status = response.status().as_u16();
    let bytes = response.bytes().await.map_err(no_answer)?;
    serde_json::from_slice(&bytes).map_err(|error| HttpError::Unreadable { status, problem: error.to_string() })
}

fn no_answer(error: reqwest::Error) -> HttpError {
    // The URL names what was asked for, which may be what nobody else should read.
    HttpError::NoAnswer(error.without_url())
}

fn seconds(headers: &HeaderMap) -> Option<u64> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()
}

fn is(headers: &HeaderMap, media: &str) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(media.as_bytes()))
}

/// A list, page by page.
#[derive(Debug)]
pub struct Pages<T> {
    client: HttpClient,
    path: String,
    query: Value,
    more: bool,
    items: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Pages<T> {
    /// The next page; `None` behind the last one. A page may be empty and not be the last. After an
    /// error the same page is asked for again.
    ///
    /// # Errors
    /// As [`HttpClient::get`].
    pub async fn next(&mut self) -> Result<Option<Vec<T>>, HttpError> {
        if !self.more {
            return Ok(None);
        }
        let page: Page<T> = self.client.get(&self.path, &self.query).await?;
        match page.next {
            Some(next) if self.query.is_object() => self.query["after"] = Value::String(next),
            Some(next) => self.query = json!({"after": next}),
            None => self.more = false,
        }
        Ok(Some(page.items))
    }

    /// The items one by one, to the end of the list or the first error.
    pub fn items(self) -> impl Stream<Item = Result<T, HttpError>> {
        stream::try_unfold((self, Vec::new()), |(mut pages, mut ready): (Self, Vec<T>)| async move {
            loop {
                if let Some(item) = ready.pop() {
                    return Ok(Some((item, (pages, ready))));
                }
                match pages.next().await? {
                    Some(page) => ready = page.into_iter().rev().collect(),
                    None => return Ok(None),
                }
            }
        })
    }
}

/// Which changes to hear of; all that the key may see if empty.
#[derive(Debug, Clone, Default, Serialize)]
pub struct EventQuery {
    /// Of this namespace only.
    pub namespace: Option<String>,
    /// Of this task only.
    pub task: Option<Uuid>,
}

/// What moved.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The stream has begun: what moves from now on is reported.
    Hello,
    /// This task moved, or a step of it did.
    Task(Box<TaskView>),
    /// So much moved that a list is best read anew.
    Many,
    /// An event of a newer server, by its name.
    Other(String),
}

/// Live changes, while this is kept.
#[derive(Debug)]
pub struct Events {
    response: Response,
    buffer: Vec<u8>,
}

impl Events {
    /// The next change; `None`: the stream has ended. Begin it anew, and read what matters once,
    /// since what moved meanwhile is not reported.
    ///
    /// # Errors
    /// [`HttpError::NoAnswer`] if the stream breaks off, [`HttpError::Unreadable`] if an event cannot be read.
    pub async fn next(&mut self) -> Result<Option<Event>, HttpError> {
        loop {
            while let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let lines: Vec<u8> = self.buffer.drain(..end + 2).collect();
                if let Some(event) = event(&String::from_utf8_lossy(&lines))? {
                    return Ok(Some(event));
                }
            }
            if self.buffer.len() > LONGEST_EVENT {
                return Err(HttpError::Unreadable { status: 200, problem: "an event does not end".into() });
            }
            match self.response.chunk().await.map_err(no_answer)? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }
}

/// One event of a stream; `None`: a sign of life.
fn event(lines: &str) -> Result<Option<Event>, HttpError> {
    let (mut name, mut data) = (None, String::new());
    for line in lines.lines() {
        match line.split_once(':') {
            Some(("event", rest)) => name = Some(rest.trim_start()),
            Some(("data", rest)) => data.push_str(rest.strip_prefix(' ').unwrap_or(rest)),
            _ => {}
        }
    }
    Ok(match name {
        None => None,
        Some("hello") => Some(Event::Hello),
        Some("many") => Some(Event::Many),
        Some("task") => {
            let task = TaskView::deserialize(&mut serde_json::Deserializer::from_str(&data));
            let unreadable =
                |error: serde_json::Error| HttpError::Unreadable { status: 200, problem: error.to_string() };
            Some(Event::Task(Box::new(task.map_err(unreadable)?)))
        }
        Some(other) => Some(Event::Other(other.to_owned())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_asked_is_refused_before_it_is_sent() {
        for (url, key) in [("tasks", "k"), ("ftp://tasks", "k"), ("http://tasks?a=1", "k"), ("http://tasks", "a\nb")] {
            assert!(matches!(HttpClient::new(url, key), Err(HttpError::Unusable { .. })), "{url} {key:?}");
        }
        let client = HttpClient::new("http://tasks/base/", "k").expect("a client");
        let query = TaskQuery { correlation_id: Some("a&b=ü".into()), limit: Some(2), ..TaskQuery::default() };
        let request = client.request(Method::GET, "/v1/tasks", &query).build().expect("a request");
        assert_eq!(request.url().as_str(), "http://tasks/base/v1/tasks?correlation_id=a%26b%3D%C3%BC&limit=2");
        assert!(!format!("{client:?}").contains("Bearer"), "a key is shown");
    }

    #[test]
    fn events_are_read_and_signs_of_life_are_not() {
        assert_eq!(event(":\n\n").unwrap(), None);
        assert_eq!(event("event: hello\ndata: {}\n\n").unwrap(), Some(Event::Hello));
        assert_eq!(event("event: later\ndata: {}\n\n").unwrap(), Some(Event::Other("later".into())));
        assert!(event("event: task\ndata: {}\n\n").is_err());
    }
}
