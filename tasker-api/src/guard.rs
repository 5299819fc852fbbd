//! What every request passes: which host it was sent to, who sends it and from where, how often.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{FromRequestParts, Request, State as Extract};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures_util::FutureExt as _;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use subtle::ConstantTimeEq as _;
use tasker_shared::store::{self, keys};

use crate::auth::{self, Principal, cookie_of, csrf_of, sha256};
use crate::problem::{CROSS_SITE, INTERNAL, Problem, RATE_LIMITED, TIMEOUT, UNAUTHENTICATED, UNKNOWN_HOST};
use crate::{Config, State};

/// How long an answer of the database about a credential is believed: a revoked key is refused
/// no later.
const BELIEVE: Duration = Duration::from_millis(500);
/// Credentials that are remembered at once; more are asked for again.
const MOST_KNOWN: usize = 10_000;
/// The longest that a request may take until its answer begins, its body included.
const LONGEST_REQUEST: Duration = Duration::from_secs(30);

/// Where the token that proves a write to come from a page of ours has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CsrfIn {
    /// It reads only.
    NotNeeded,
    /// In the header `x-tasker-csrf`.
    Header,
    /// In a field of a form: the handler calls [`Caller::check_csrf`].
    Form,
}

/// A principal that has been let in.
#[derive(Debug, Clone)]
pub struct Caller {
    principal: Arc<Principal>,
    /// What a page of this session sends with a write; `None` for a key.
    csrf: Option<String>,
}

impl Deref for Caller {
    type Target = Principal;

    fn deref(&self) -> &Principal {
        &self.principal
    }
}

impl Caller {
    /// What a page of this session sends with each write; `None` if it came with a key.
    pub fn csrf(&self) -> Option<&str> {
        self.csrf.as_deref()
    }

    /// Refuses a write of a browser without this session's token.
    pub fn check_csrf(&self, sent: &str) -> Result<(), Problem> {
        match &self.csrf {
            Some(own) if !bool::from(own.as_bytes().ct_eq(sent.as_bytes())) => Err(CROSS_SITE
                .because("the request lacks this session's token; load the page again")
                .field("x-tasker-csrf")),
            _ => Ok(()),
        }
    }

    fn bearer(principal: Arc<Principal>) -> Self {
        Self { principal, csrf: None }
    }
}

/// Lets pages ask who is there: reads need no token, writes need it in the header.
impl FromRequestParts<State> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Self, Problem> {
        let csrf = if parts.method.is_safe() { CsrfIn::NotNeeded } else { CsrfIn::Header };
        identify(state, parts, csrf).await
    }
}

/// Who sends this: `Authorization: Bearer`, else the session's cookie. Counts it against the
/// principal's rate.
pub async fn identify(state: &State, parts: &Parts, csrf: CsrfIn) -> Result<Caller, Problem> {
    let headers = &parts.headers;
    let caller = if let Some(value) = headers.get(header::AUTHORIZATION) {
        let key = value.to_str().ok().and_then(|text| {
            let (scheme, key) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
        });
        let key = key.ok_or_else(|| UNAUTHENTICATED.because("authorization: must be `Bearer tsk_…`"))?;
        let principal = state.known().principal(state, Credential::Key(key)).await?;
        Caller::bearer(principal.ok_or_else(|| UNAUTHENTICATED.because("the key is unknown, expired or revoked"))?)
    } else if let Some(cookie) = cookie_of(headers) {
        let principal = state.known().principal(state, Credential::Session(cookie)).await?;
        let principal = principal.ok_or_else(|| UNAUTHENTICATED.because("the session has ended; sign in again"))?;
        let caller = Caller { principal, csrf: Some(csrf_of(cookie)) };
        if csrf != CsrfIn::NotNeeded {
            same_site(headers)?;
        }
        if csrf == CsrfIn::Header {
            caller.check_csrf(text(headers, &HeaderName::from_static("x-tasker-csrf")))?;
        }
        caller
    } else {
        return Err(UNAUTHENTICATED.because("send `Authorization: Bearer <key>`, or sign in at /login"));
    };
    state.rates().take(&caller.key_id, state.config())?;
    Ok(caller)
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> &'h str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Refuses a browser's request from a page of another origin.
pub(crate) fn same_site(headers: &HeaderMap) -> Result<(), Problem> {
    let site = text(headers, &HeaderName::from_static("sec-fetch-site"));
    if !matches!(site, "" | "same-origin" | "none") {
        return Err(CROSS_SITE.because("the request comes from a page of another site"));
    }
    let origin = headers.get(header::ORIGIN).map(|value| value.to_str().unwrap_or("null"));
    let host = text(headers, &header::HOST);
    match origin {
        Some(origin) if origin.split_once("://").is_none_or(|(_, named)| named != host) => {
            Err(CROSS_SITE.because("origin: is not this site").field("origin"))
        }
        _ => Ok(()),
    }
}

enum Credential<'a> {
    Key(&'a str),
    Session(&'a str),
}

/// Credentials that were good a moment ago.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<HashMap<[u8; 32], Seen>>);

/// When the database was asked, and whose credential it is.
type Seen = (Instant, Arc<Principal>);

impl Known {
    async fn principal(
        &self,
        state: &State,
        credential: Credential<'_>,
    ) -> Result<Option<Arc<Principal>>, store::Error> {
        let hash = match credential {
            Credential::Key(key) => sha256(key),
            Credential::Session(secret) => sha256(secret),
        };
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&hash).cloned();
        if let Some((at, principal)) = known.filter(|(at, _)| at.elapsed() < BELIEVE) {
            let _ = at;
            return Ok(Some(principal));
        }
        let asked = Instant::now();
        let pool = state.client().pool();
        let found = match credential {
            Credential::Key(key) => auth::authenticate(pool, key).await?,
            Credential::Session(_) => keys::of_session(&mut *pool.acquire().await?, &hash).await?.map(Principal::of),
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(principal) = found.map(Arc::new) else {
            all.remove(&hash);
            return Ok(None);
        };
        if all.len() >= MOST_KNOWN {
            all.retain(|_, (at, _)| at.elapsed() < BELIEVE);
        }
        if all.len() < MOST_KNOWN {
            // From before the question: the answer was true then.
            all.insert(hash, (asked, Arc::clone(&principal)));
        }
        Ok(Some(principal))
    }
}

/// A bucket of requests for each principal.
#[derive(Debug, Default)]
pub(crate) struct Rates(Mutex<HashMap<String, (f64, Instant)>>);

impl Rates {
    fn take(&self, key_id: &str, config: &Config) -> Result<(), Problem> {
        let (rate, burst) = (f64::from(config.rate_per_s.max(1)), f64::from(config.burst.max(1)));
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if buckets.len() > MOST_KNOWN {
            buckets.retain(|_, (_, at)| now.duration_since(*at).as_secs_f64() * rate < burst);
        }
        let (tokens, at) = buckets.entry(key_id.to_owned()).or_insert((burst, now));
        *tokens = (*tokens + now.duration_since(*at).as_secs_f64() * rate).min(burst);
        *at = now;
        if *tokens < 1.0 {
            let detail = format!("this key may send {} requests a second; wait a moment", config.rate_per_s);
            return Err(RATE_LIMITED.because(detail).retry_after(1));
        }
        *tokens -= 1.0;
        Ok(())
    }
}

/// Around every route: the host is one of ours, the handler neither hangs nor panics the
/// connection, and the browser is told what it may do with the answer.
pub(crate) async fn around(Extract(state): Extract<State>, request: Request, next: Next) -> Response {
    let secure = state.config().is_secure();
    let mut response = if let Err(refused) = host_is_ours(state.config(), &request) {
        refused.into_response()
    } else {
        let answer = std::panic::AssertUnwindSafe(next.run(request)).catch_unwind();
        match tokio::time::timeout(LONGEST_REQUEST, answer).await {
            Ok(Ok(response)) => response,
            Ok(Err(_)) => {
                tracing::error!("a handler of the API panicked");
                INTERNAL.because("the server made a mistake; its log says more").into_response()
            }
            Err(_) => TIMEOUT.because(format!("no answer within {} s", LONGEST_REQUEST.as_secs())).into_response(),
        }
    };
    let headers = response.headers_mut();
    for (name, value) in SECURITY_HEADERS {
        headers.entry(HeaderName::from_static(name)).or_insert(HeaderValue::from_static(value));
    }
    if secure {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    }
    response
}

const SECURITY_HEADERS: [(&str, &str); 6] = [
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; \
         connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    // Not `no-referrer`: a browser would send `Origin: null` with the forms of our own pages.
    ("referrer-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
];

/// A page of another site that has pointed its own name at this machine is not let in.
fn host_is_ours(config: &Config, request: &Request) -> Result<(), Problem> {
    // Probes ask by address, and learn nothing but that the server lives.
    if request.uri().path().starts_with("/health/") {
        return Ok(());
    }
    let named = request.uri().authority().map(http::uri::Authority::as_str);
    let host = named.unwrap_or_else(|| text(request.headers(), &header::HOST));
    if config.answers_to(host) {
        return Ok(());
    }
    Err(UNKNOWN_HOST
        .because("host: this server was not told to answer to that name; start it with --allow-host NAME")
        .field("host"))
}
