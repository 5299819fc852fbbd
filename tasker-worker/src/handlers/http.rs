//! Calls an HTTP service within the step's trace.
//!
//! The input of a step may come from far away, so nothing is reachable unless
//! the worker's operator allowed its host, and no message repeats a query, a
//! header or a body.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Method, StatusCode, Url, redirect};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tasker_shared::telemetry::live::{self, Area, Kind};
use tasker_shared::tls;

use crate::{StepContext, StepError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_REDIRECTS: usize = 5;
/// The default limit of a payload.
const MAX_BODY_BYTES: usize = 1 << 20;
/// Headers of the answer that the output repeats; cookies and the like stay out of the database.
const KEPT_HEADERS: [&str; 6] = ["content-type", "etag", "last-modified", "link", "location", "x-request-id"];
/// Headers that belong to the connection.
const OWN_HEADERS: [&str; 5] = ["host", "content-length", "transfer-encoding", "connection", "upgrade"];

/// Input of the `http` handler.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// `http` or `https`, of an allowed host.
    pub url: String,
    /// `GET` if not given.
    #[serde(default)]
    pub method: Option<String>,
    /// Headers by name.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Text is sent as it is, anything else as JSON.
    #[serde(default)]
    pub body: Option<Value>,
}

/// Output of the `http` handler.
#[derive(Debug, Serialize)]
pub struct Response {
    /// 200 to 399.
    pub status: u16,
    /// Some of the answer's headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// JSON if the answer says so and it is, else text.
    pub body: Value,
}

/// The `http` handler of one worker.
///
/// An answer of 5xx, 408 or 429 is a retryable error `http_<status>` that honours `Retry-After`;
/// any other 4xx is a permanent one. Redirects are followed within the allowed hosts.
#[derive(Debug, Clone)]
pub struct Http {
    allowed: Arc<[String]>,
    client: Arc<OnceLock<Client>>,
}

impl Http {
    /// With the hosts that may be called, as `host` (ports 80 and 443) or `host:port`.
    pub fn new(allowed: impl IntoIterator<Item = String>) -> Self {
        let allowed = allowed.into_iter().map(|host| host.to_ascii_lowercase()).collect();
        Self { allowed, client: Arc::default() }
    }

    /// Makes the call, below a live span of its own if anybody wants it.
    ///
    /// # Errors
    /// As [`Http`] describes. Permanent too if the host is not allowed or the request is not valid.
    pub async fn call(self, ctx: StepContext, request: Request) -> Result<Response, StepError> {
        let span = live::is_on(Area::Http, Some(ctx.namespace())).then(|| Url::parse(&request.url).ok()).flatten();
        let method = request.method.as_deref().unwrap_or("GET").to_ascii_uppercase();
        let span = span.and_then(|url| live::client(&method, url.host_str()?, url.port_or_known_default()));
        let Some(span) = span else { return self.exchange(ctx, request).await };
        let answer = live::within(Some(&span), self.exchange(ctx, request)).await;
        match &answer {
            Ok(answer) => live::answered(&span, answer.status, Kind::Client),
            Err(StepError::Retry { kind, .. } | StepError::Fail { kind, .. }) => live::failed(&span, kind),
            Err(StepError::Cancel) => live::failed(&span, "cancelled"),
        }
        answer
    }

    async fn exchange(self, ctx: StepContext, request: Request) -> Result<Response, StepError> {
        let url = Url::parse(&request.url).map_err(|error| invalid("url", &error.to_string()))?;
        if !is_allowed(&self.allowed, &url) {
            return Err(StepError::fail("host_not_allowed", refusal(&url)));
        }
        let method = request.method.as_deref().unwrap_or("GET").to_ascii_uppercase();
        let method = Method::from_bytes(method.as_bytes()).map_err(|_| invalid("method", "is not an HTTP method"))?;
        let shown = format!("{method} {}", without_secrets(&url));
        let mut outgoing = self.client()?.request(method, url).headers(headers(&ctx, &request.headers)?);
        outgoing = match request.body {
            None | Some(Value::Null) => outgoing,
            Some(Value::String(text)) => outgoing.body(text),
            Some(json) if has(&request.headers, CONTENT_TYPE.as_str()) => outgoing.body(json.to_string()),
            Some(json) => outgoing.json(&json),
        };
        let answer = outgoing.send().await.map_err(|error| failed(&shown, error))?;
        let status = answer.status();
        if status.is_client_error() || status.is_server_error() {
            return Err(refused(&shown, status, answer.headers()));
        }
        read(&shown, answer).await
    }

    fn client(&self) -> Result<&Client, StepError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let allowed = Arc::clone(&self.allowed);
        let redirects = redirect::Policy::custom(move |next| {
            if next.previous().len() > MAX_REDIRECTS {
                next.error(format!("more than {MAX_REDIRECTS} redirects"))
            } else if is_allowed(&allowed, next.url()) {
                next.follow()
            } else {
                let refusal = refusal(next.url());
                next.error(refusal)
            }
        });
        let tls = tls::web().map_err(|error| StepError::fail("http_client", error.to_string()))?;
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(redirects)
            .user_agent(concat!("tasker/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(self.client.get_or_init(|| client))
    }
}

fn is_allowed(allowed: &[String], url: &Url) -> bool {
    let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
        return false;
    };
    let usual = matches!((url.scheme(), port), ("http", 80) | ("https", 443));
    matches!(url.scheme(), "http" | "https")
        && allowed.iter().any(|entry| (usual && entry == host) || *entry == format!("{host}:{port}"))
}

fn refusal(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let host = url.host_str().unwrap_or("no host");
    format!(
        "url: {}://{host}{port} is not among the hosts that this worker may call; its operator can allow it",
        url.scheme()
    )
}

/// Neither the user part nor the query.
fn without_secrets(url: &Url) -> String {
    format!("{}{}", url.origin().ascii_serialization(), url.path())
}

fn invalid(field: &str, problem: &str) -> StepError {
    StepError::fail("invalid_input", format!("input.{field}: {problem}"))
}

fn has(headers: &BTreeMap<String, String>, name: &str) -> bool {
    headers.keys().any(|key| key.eq_ignore_ascii_case(name))
}

fn headers(ctx: &StepContext, given: &BTreeMap<String, String>) -> Result<HeaderMap, StepError> {
    let mut all = HeaderMap::new();
    let mut context = HashMap::new();
    ctx.inject(&mut context);
    // The trace's headers come last: what the input says of them does not count.
    for (name, value) in given.iter().chain(&context) {
        let key =
            HeaderName::try_from(name.as_str()).map_err(|_| invalid("headers", "a name is not a header's name"))?;
        if OWN_HEADERS.contains(&key.as_str()) {
            return Err(invalid(&format!("headers.{key}"), "is set by the client itself; leave it out"));
        }
        let value = HeaderValue::try_from(value.as_str())
            .map_err(|_| invalid(&format!("headers.{key}"), "has characters that a header cannot hold"))?;
        all.insert(key, value);
    }
    Ok(all)
}

fn failed(shown: &str, error: reqwest::Error) -> StepError {
    let kind = match &error {
        error if error.is_redirect() => {
            let reason = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            return StepError::fail("host_not_allowed", format!("{shown} was redirected: {reason}"));
        }
        error if error.is_timeout() => "http_timeout",
        error if error.is_connect() => "http_connect",
        _ => "http_broken",
    };
    match StepError::from(error.without_url()) {
        StepError::Retry { message, .. } => StepError::retry(kind, format!("{shown}: {message}")),
        other => other,
    }
}

fn refused(shown: &str, status: StatusCode, headers: &HeaderMap) -> StepError {
    let kind = format!("http_{}", status.as_u16());
    let message = format!("{shown} answered {status}");
    let again =
        status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
    if !again {
        return StepError::fail(kind, message);
    }
    let after =
        headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(|text| retry_after(text, Utc::now()));
    StepError::Retry { kind, message, after }
}

/// Seconds or an HTTP date; a past one is no delay.
fn retry_after(text: &str, now: DateTime<Utc>) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let at = DateTime::parse_from_rfc2822(text.trim()).ok()?;
    Some((at.to_utc() - now).to_std().unwrap_or_default())
}

async fn read(shown: &str, mut answer: reqwest::Response) -> Result<Response, StepError> {
    let status = answer.status().as_u16();
    let headers: BTreeMap<String, String> = KEPT_HEADERS
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), answer.headers().get(*name)?.to_str().ok()?.to_owned())))
        .collect();
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|error| failed(shown, error))? {
        if body.len() + chunk.len() > MAX_BODY_BYTES {
            return Err(StepError::fail(
                "response_too_large",
                format!("{shown} answered with more than {MAX_BODY_BYTES} bytes"),
            ));
        }
        body.extend_from_slice(&chunk);
    }
    let says_json = headers.get("content-type").is_some_and(|kind| kind.contains("json"));
    let json = if says_json { serde_json::from_slice(&body).ok() } else { None };
    let body = json.unwrap_or_else(|| Value::String(String::from_utf8_lossy(&body).into_owned()));
    Ok(Response { status, headers, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_hosts_and_ports_are_allowed() {
        let allowed = ["api.example.com".to_owned(), "localhost:8080".to_owned()];
        for (url, expected) in [
            ("https://api.example.com/x", true),
            ("http://api.example.com", true),
            ("https://API.example.com", true),
            ("https://api.example.com:8443", false),
            ("http://api.example.com:443", false),
            ("https://api.example.com.evil.net", false),
            ("https://evil.net/api.example.com", false),
            ("https://api.example.com@evil.net", false),
            ("http://localhost:8080", true),
            ("http://localhost", false),
            ("ftp://api.example.com", false),
            ("file:///etc/passwd", false),
        ] {
            assert_eq!(is_allowed(&allowed, &Url::parse(url).unwrap()), expected, "{url}");
        }
        assert!(!is_allowed(&[], &Url::parse("http://localhost").unwrap()));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = DateTime::parse_from_rfc3339("2015-10-21T07:27:00Z").unwrap().to_utc();
        assert_eq!(retry_after(" 120 ", now), Some(Duration::from_mins(2)));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT", now), Some(Duration::from_mins(1)));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:00:00 GMT", now), Some(Duration::ZERO));
        assert_eq!(retry_after("soon", now), None);
    }
}
