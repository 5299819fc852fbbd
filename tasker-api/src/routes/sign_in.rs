//! How a browser signs in and out.

use std::convert::Infallible;
use std::net::IpAddr;

use axum::extract::{DefaultBodyLimit, Form, FromRequestParts, Query, State as Extract};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Router, response::Redirect};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;

use crate::auth::{self, Session};
use crate::guard::{failed, may_try, same_site, source};
use crate::problem::Problem;
use crate::{State, page};

/// Bytes of a form with a key.
const SMALL_FORM: usize = 8 * 1024;

pub(super) fn routes() -> Router<State> {
    // Before anybody is known, little is read.
    let small = DefaultBodyLimit::max(SMALL_FORM);
    Router::new().route("/login", get(show).post(with_key)).route("/logout", post(out)).layer(small)
}

#[derive(Deserialize)]
struct Link {
    once: Option<String>,
}

async fn show(
    Extract(state): Extract<State>,
    Query(link): Query<Link>,
    Source(source): Source,
) -> Result<Response, Problem> {
    let Some(once) = link.once else {
        return Ok(page::sign_in_page(&state, None));
    };
    if let Err(problem) = may_try(&state, source) {
        return Ok(too_often(&state, &problem));
    }
    if let Some(session) = auth::redeem_once(state.pool(), &once).await? {
        return Ok(begin(&state, &session));
    }
    failed(&state, source);
    Ok(page::sign_in_page(&state, Some("the link was used, or is too old")))
}

/// The sign-in page, which says how long to wait.
fn too_often(state: &State, problem: &Problem) -> Response {
    let mut response = page::sign_in_page(state, Some(problem.detail()));
    *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
    if let Some(seconds) = problem.details().retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// Where a request comes from.
struct Source(IpAddr);

impl FromRequestParts<State> for Source {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Self, Infallible> {
        Ok(Self(source(state.config(), parts)))
    }
}

#[derive(Deserialize)]
struct WithKey {
    key: String,
}

async fn with_key(
    Extract(state): Extract<State>,
    headers: HeaderMap,
    Source(source): Source,
    Form(form): Form<WithKey>,
) -> Result<Response, Problem> {
    same_site(&headers)?;
    if let Err(problem) = may_try(&state, source) {
        return Ok(too_often(&state, &problem));
    }
    if let Some(session) = auth::sign_in(state.pool(), &form.key).await? {
        return Ok(begin(&state, &session));
    }
    failed(&state, source);
    Ok(page::sign_in_page(&state, Some("the key is unknown, expired or revoked")))
}

#[derive(Deserialize)]
struct Out {
    #[serde(default)]
    csrf: String,
}

async fn out(Extract(state): Extract<State>, headers: HeaderMap, Form(form): Form<Out>) -> Result<Response, Problem> {
    same_site(&headers)?;
    // Without a session there is nothing to protect, and nothing to end.
    if let Some(own) = auth::cookie_of(&headers).map(auth::csrf_of)
        && own != form.csrf
    {
        return Err(crate::problem::CROSS_SITE.because("the form lacks this session's token; load the page again"));
    }
    let config = state.config();
    let cookie = auth::sign_out(state.pool(), &headers, config.is_secure(), &config.base_path).await?;
    Ok(redirect(&format!("{}/login", config.base_path), &cookie))
}

fn begin(state: &State, session: &Session) -> Response {
    let config = state.config();
    redirect(&format!("{}/", config.base_path), &session.cookie(config.is_secure(), &config.base_path))
}

/// A link that signs in must not stay in a history or a log as one that works: it does not work twice.
fn redirect(to: &str, cookie: &str) -> Response {
    let mut response = Redirect::to(to).into_response();
    if let Ok(cookie) = HeaderValue::from_str(cookie) {
        response.headers_mut().insert(header::SET_COOKIE, cookie);
    }
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
