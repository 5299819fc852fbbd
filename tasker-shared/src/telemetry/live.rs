//! Our own live spans, by area: what was received from a queue and settled, SQL statements, HTTP.
//!
//! Off unless the detail is `full`. Off they cost one load of an atomic; a loop that found
//! nothing, or a statement outside of any span, is never recorded.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use opentelemetry::context::{FutureExt as _, WithContext};
use opentelemetry::trace::{Link, SpanBuilder, SpanKind, Status, TraceContextExt, Tracer as _};
use opentelemetry::{Context, KeyValue};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context as LayerContext, Filter, Layer};

use crate::trace::config::{Areas, Incoming, TraceConfig};
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
/// Statements as sqlx tells of them.
const STATEMENT: &str = "sqlx::query";

/// Of every namespace that has no word of its own.
static EVERYWHERE: AtomicU8 = AtomicU8::new(0);
/// Of all of them together: what must be looked at.
static ANYWHERE: AtomicU8 = AtomicU8::new(0);
static INCOMING: AtomicU8 = AtomicU8::new(0);
static NAMESPACES: RwLock<BTreeMap<String, u8>> = RwLock::new(BTreeMap::new());

fn bits(areas: Areas) -> u8 {
    u8::from(areas.db) | u8::from(areas.http) << 1 | u8::from(areas.messaging) << 2
}

/// Takes over what holds for every namespace.
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
fn begin(
    name: String,
    kind: SpanKind,
    start: SystemTime,
    attributes: Vec<KeyValue>,
    links: Vec<Link>,
) -> Option<Context> {
    let tracer = super::PROCESS.get()?.tracer();
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

/// Statements become spans of their own below what is current. Their text is never kept: its
/// first words say what it does, and to which table.
pub(super) struct Statements;

impl<S: Subscriber> Layer<S> for Statements {
    fn on_event(&self, event: &Event<'_>, _: LayerContext<'_, S>) {
        if !Context::map_current(Context::has_active_span) || !is_on_somewhere() {
            return;
        }
        let mut said = Statement::default();
        event.record(&mut said);
        let now = SystemTime::now();
        let start = now - said.took;
        let (operation, table) = words(&said.summary);
        let mut attributes =
            vec![KeyValue::new("db.system.name", "postgresql"), KeyValue::new("db.operation.name", operation.clone())];
        let mut name = operation;
        if let Some(table) = table {
            name = format!("{name} {table}");
            attributes.push(KeyValue::new("db.collection.name", table));
        }
        attributes.push(KeyValue::new("db.query.summary", name.clone()));
        if let Some(context) = begin(name, SpanKind::Client, start, attributes, Vec::new()) {
            context.span().end_with_timestamp(now);
        }
    }
}

fn is_on_somewhere() -> bool {
    ANYWHERE.load(Ordering::Relaxed) & Area::Db as u8 != 0
}

/// Lets through what [`Statements`] reads, while anybody wants it.
pub(super) struct OnlyStatements;

impl<S> Filter<S> for OnlyStatements {
    fn enabled(&self, meta: &Metadata<'_>, _: &LayerContext<'_, S>) -> bool {
        meta.target() == STATEMENT && is_on_somewhere()
    }

    fn callsite_enabled(&self, meta: &'static Metadata<'static>) -> Interest {
        // Asked again when the settings change.
        if meta.target() == STATEMENT && is_on_somewhere() { Interest::always() } else { Interest::never() }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(if is_on_somewhere() { LevelFilter::DEBUG } else { LevelFilter::OFF })
    }
}

#[derive(Default)]
struct Statement {
    summary: String,
    took: Duration,
}

impl Visit for Statement {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if field.name() == "elapsed_secs" {
            self.took = Duration::try_from_secs_f64(value).unwrap_or_default();
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "summary" {
            value.clone_into(&mut self.summary);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

/// The operation and the table of a statement's first words.
fn words(summary: &str) -> (String, Option<String>) {
    let mut words = summary.trim_end_matches(" …").split_whitespace();
    let operation = words.next().unwrap_or("statement").to_ascii_lowercase();
    if !operation.bytes().all(|b| b.is_ascii_alphabetic()) {
        return ("statement".into(), None);
    }
    let name = |word: &str| {
        let word = word.split(['(', ',', ';']).next().unwrap_or_default();
        let plain = !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.');
        plain.then(|| word.to_owned())
    };
    let table = match operation.as_str() {
        "update" => words.next().and_then(name),
        "insert" | "delete" => words.nth(1).and_then(name),
        // A function of ours, as a rule.
        "select" => {
            let first = words.next().unwrap_or_default();
            if first.contains('(') {
                name(first)
            } else {
                words.skip_while(|word| *word != "from").nth(1).and_then(name)
            }
        }
        _ => None,
    };
    (operation, table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_is_named_after_what_it_does_and_to_what() {
        let named = |summary| {
            let (operation, table) = words(summary);
            table.map_or_else(|| operation.clone(), |table| format!("{operation} {table}"))
        };
        assert_eq!(named("insert into tasker.readers (queue, …"), "insert tasker.readers");
        assert_eq!(named("delete from tasker.export_batches where …"), "delete tasker.export_batches");
        assert_eq!(named("update tasker.tasks set …"), "update tasker.tasks");
        assert_eq!(named("select tasker.claim_steps($1, $2, …"), "select tasker.claim_steps");
        assert_eq!(named("select x from tasker.due …"), "select tasker.due");
        assert_eq!(named("with moves as ( …"), "with");
        assert_eq!(named("/* secret */ select …"), "statement");
    }
}
