//! The live span of a request, and what its caller's trace context is worth.
//!
//! Whoever handles the request finds the context in its headers: the caller's own, that of this
//! server's span, or none. With detail `tree` there is no span, and the caller's goes through.

use std::collections::HashMap;

use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderName, HeaderValue, header};
use tasker_shared::metrics::metrics;
use tasker_shared::telemetry::live::{self, Kind};
use tasker_shared::trace::config::Incoming;
use tasker_shared::trace::context::{self, Traceparent};

const CONTEXT: [HeaderName; 3] =
    [HeaderName::from_static("traceparent"), HeaderName::from_static("tracestate"), HeaderName::from_static("baggage")];

/// Around every request of the API.
pub(crate) async fn around(mut request: Request, next: Next) -> Response {
    let sent = sent(&request);
    let theirs = context::extract(&sent);
    if theirs.malformed {
        metrics().http_context_ignored.inc();
    }
    let span = span_of(&request, theirs.traceparent);
    if live::incoming() != Incoming::Join {
        for name in &CONTEXT {
            request.headers_mut().remove(name);
        }
    } else if span.is_some() && theirs.traceparent.is_none() {
        // It would go on with a trace of ours.
        request.headers_mut().remove(&CONTEXT[1]);
    }
    let Some(span) = span else { return next.run(request).await };
    let own = live::traceparent(&span);
    if let Ok(value) = HeaderValue::from_str(&own) {
        request.headers_mut().insert(CONTEXT[0].clone(), value);
    }
    let mut response = live::within(Some(&span), next.run(request)).await;
    live::answered(&span, response.status().as_u16(), Kind::Server);
    // An answer that names a trace itself, such as that of a new task, knows better.
    if let Ok(value) = HeaderValue::from_str(&own) {
        response.headers_mut().entry(CONTEXT[0].clone()).or_insert(value);
    }
    response
}

fn text<'a>(request: &'a Request, name: &HeaderName) -> Option<&'a str> {
    request.headers().get(name).and_then(|value| value.to_str().ok())
}

fn sent(request: &Request) -> HashMap<String, String> {
    CONTEXT.iter().filter_map(|name| Some((name.to_string(), text(request, name)?.to_owned()))).collect()
}

fn span_of(request: &Request, caller: Option<Traceparent>) -> Option<live::LiveSpan> {
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let agent = text(request, &header::USER_AGENT);
    live::server(request.method().as_str(), route, request.uri().path(), agent, caller)
}
