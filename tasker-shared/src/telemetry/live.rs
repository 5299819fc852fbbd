//! Our own live spans, by area: what was received from a queue and settled, SQL statements, HTTP.
//!
//! Off unless the detail is `full`. Off they cost one load of an atomic; a loop that found
//! nothing, or a statement outside of any span, is never recorded.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::SystemTime;

use opentelemetry::context::{FutureExt as _, WithContext};
use opentelemetry::trace::{Link, SpanBuilder, SpanKind, Status, TraceContextExt, Tracer as _};
use opentelemetry::{Context, KeyValue};

#[cfg(feature = "otlp")]
use crate::trace::config::TraceConfig;
use crate::trace::config::{Areas, Incoming};
use crate::trace::context::{Baggage, Traceparent, to_otel_context};
pub use crate::trace::span::Kind;

/// What a live span of ours is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Area {
    Db = 1,
    Http = 2,
    Messaging = 4,
}

/// The most links of one span.
const MOST_LINKS: usize = 128;

/// Of every namespace that has no word of its own.
static EVERYWHERE: AtomicU8 = AtomicU8::new(0);
/// Of all of them together: what must be looked at.
static ANYWHERE: AtomicU8 = AtomicU8::new(0);
static INCOMING: AtomicU8 = AtomicU8::new(0);
static NAMESPACES: RwLock<BTreeMap<String, u8>> = RwLock::new(BTreeMap::new());

/// Makes the spans of this process, once its telemetry has begun.
#[cfg(feature = "otlp")]
static TRACER: std::sync::OnceLock<opentelemetry_sdk::trace::SdkTracer> = std::sync::OnceLock::new();

/// Spans are made by this tracer from now on.
#[cfg(feature = "otlp")]
pub(super) fn set_tracer(tracer: opentelemetry_sdk::trace::SdkTracer) {
    let _ = TRACER.set(tracer);
}

fn bits(areas: Areas) -> u8 {
    u8::from(areas.db) | u8::from(areas.http) << 1 | u8::from(areas.messaging) << 2
}

/// Takes over what holds for every namespace.
#[cfg(feature = "otlp")]
pub(super) fn set(config: &TraceConfig) {
    EVERYWHERE.store(bits(config.areas()), Ordering::Relaxed);
    INCOMING.store(config.incoming as u8, Ordering::Relaxed);
    add_up();
}

/// Takes over what holds for some namespaces only.
pub fn set_namespaces(areas: &BTreeMap<String, Areas>) {
    let own = areas.iter().map(|(namespace, areas)| (namespace.clone(), bits(*areas))).collect();
    *NAMESPACES.write().unwrap_or_else(PoisonError::into_inner) = own;
    add_up();
    tracing::callsite::rebuild_interest_cache();
}

fn add_up() {
    let own = NAMESPACES.read().unwrap_or_else(PoisonError::into_inner);
    let all = own.values().fold(EVERYWHERE.load(Ordering::Relaxed), |all, areas| all | areas);
    ANYWHERE.store(all, Ordering::Relaxed);
}

/// Whether spans of an area are made, for a namespace or for what belongs to none.
pub fn is_on(area: Area, namespace: Option<&str>) -> bool {
    let bit = area as u8;
    if ANYWHERE.load(Ordering::Relaxed) & bit == 0 {
        return false;
    }
    let own = namespace
        .and_then(|namespace| NAMESPACES.read().unwrap_or_else(PoisonError::into_inner).get(namespace).copied());
    own.unwrap_or_else(|| EVERYWHERE.load(Ordering::Relaxed)) & bit != 0
}

/// What an HTTP caller's context is worth here.
pub fn incoming() -> Incoming {
    match INCOMING.load(Ordering::Relaxed) {
        1 => Incoming::Link,
        2 => Incoming::Ignore,
        _ => Incoming::Join,
    }
}

/// A span below what is current, or of its own; `None` in a process without telemetry.
pub(super) fn begin(
    name: String,
    kind: SpanKind,
    start: SystemTime,
    attributes: Vec<KeyValue>,
    links: Vec<Link>,
) -> Option<Context> {
    #[cfg(feature = "otlp")]
    let tracer = TRACER.get()?;
    #[cfg(not(feature = "otlp"))]
    let tracer = None::<opentelemetry::global::BoxedTracer>?;
    let builder = SpanBuilder::from_name(name)
        .with_kind(kind)
        .with_start_time(start)
        .with_attributes(attributes)
        .with_links(links);
    let parent = Context::current();
    Some(parent.with_span(tracer.build_with_context(builder, &parent)))
}

/// What was received from a queue, and what is then done with it.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// The queue.
    pub queue: &'a str,
    /// Where all messages are of one.
    pub namespace: Option<&'a str>,
    /// Before it was read.
    pub began: SystemTime,
    /// Messages.
    pub count: usize,
}

/// Records that messages were received, and begins the span of their settling, in whose context
/// that should happen; both link to the tasks. `None` if nobody wants to know, or nothing came.
pub fn batch<'a>(received: Received<'_>, traceparents: impl Iterator<Item = &'a str>) -> Option<LiveSpan> {
    let Received { queue, namespace, began, count } = received;
    if count == 0 || !is_on(Area::Messaging, namespace) {
        return None;
    }
    let mut links: Vec<Link> = Vec::new();
    for parent in traceparents.filter_map(|text| text.parse::<Traceparent>().ok()) {
        let span = to_otel_context(&parent, None, &Baggage::default()).span().span_context().clone();
        if links.len() < MOST_LINKS && links.iter().all(|link| link.span_context != span) {
            links.push(Link::with_context(span));
        }
    }
    let attributes = |operation: &'static str| {
        let mut all = vec![
            KeyValue::new("messaging.system", "pgmq"),
            KeyValue::new("messaging.destination.name", queue.to_owned()),
            KeyValue::new("messaging.operation.type", operation),
            KeyValue::new("messaging.batch.message_count", i64::try_from(count).unwrap_or(i64::MAX)),
        ];
        all.extend(namespace.map(|namespace| KeyValue::new("namespace", namespace.to_owned())));
        all
    };
    let received = begin(format!("receive {queue}"), SpanKind::Client, began, attributes("receive"), links.clone())?;
    received.span().end();
    begin(format!("settle {queue}"), SpanKind::Client, SystemTime::now(), attributes("settle"), links)
}

/// A span of ours that has begun; it ends when it is dropped.
pub type LiveSpan = Context;

/// The work in the context of a span, if there is one.
pub fn within<F: Future>(span: Option<&LiveSpan>, work: F) -> WithContext<F> {
    work.with_context(span.cloned().unwrap_or_else(Context::current))
}

/// The `traceparent` by which others continue a span.
pub fn traceparent(span: &LiveSpan) -> String {
    let span = span.span().span_context().clone();
    let parent = Traceparent {
        trace_id: span.trace_id().to_bytes(),
        span_id: span.span_id().to_bytes(),
        flags: span.trace_flags().to_u8() & 1,
    };
    parent.to_string()
}

/// Marks a span that went wrong.
pub fn failed(context: &Context, error_type: &str) {
    let span = context.span();
    span.set_attribute(KeyValue::new("error.type", error_type.to_owned()));
    span.set_status(Status::error(error_type.to_owned()));
}

/// Begins the span of a request that came in. Its parent is the caller's span, if that is worth
/// as much, or else linked.
pub fn server(
    method: &str,
    route: Option<&str>,
    path: &str,
    agent: Option<&str>,
    caller: Option<Traceparent>,
) -> Option<Context> {
    if !is_on(Area::Http, None) {
        return None;
    }
    let caller = caller.map(|parent| to_otel_context(&parent, None, &Baggage::default()));
    let (parent, links) = match (incoming(), caller) {
        (Incoming::Join, Some(caller)) => (caller, Vec::new()),
        (Incoming::Link, Some(caller)) => {
            (Context::new(), vec![Link::with_context(caller.span().span_context().clone())])
        }
        _ => (Context::new(), Vec::new()),
    };
    let mut attributes =
        vec![KeyValue::new("http.request.method", method.to_owned()), KeyValue::new("url.path", path.to_owned())];
    attributes.extend(route.map(|route| KeyValue::new("http.route", route.to_owned())));
    attributes
        .extend(agent.map(|agent| KeyValue::new("user_agent.original", agent.chars().take(200).collect::<String>())));
    let name = route.map_or_else(|| method.to_owned(), |route| format!("{method} {route}"));
    let _parent = parent.attach();
    begin(name, SpanKind::Server, SystemTime::now(), attributes, links)
}

/// Begins the span of a request that goes out, below what is current.
pub fn client(method: &str, host: &str, port: Option<u16>) -> Option<Context> {
    let mut attributes =
        vec![KeyValue::new("http.request.method", method.to_owned()), KeyValue::new("server.address", host.to_owned())];
    attributes.extend(port.map(|port| KeyValue::new("server.port", i64::from(port))));
    begin(method.to_owned(), SpanKind::Client, SystemTime::now(), attributes, Vec::new())
}

/// Notes the answer of a request, in or out; what counts as an error differs.
pub fn answered(context: &LiveSpan, status: u16, kind: Kind) {
    let span = context.span();
    span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
    if status >= 500 || (status >= 400 && kind == Kind::Client) {
        failed(context, &status.to_string());
    }
}

/// Whether spans of statements are made for anybody.
#[cfg(feature = "otlp")]
pub(super) fn is_on_somewhere() -> bool {
    ANYWHERE.load(Ordering::Relaxed) & Area::Db as u8 != 0
}
