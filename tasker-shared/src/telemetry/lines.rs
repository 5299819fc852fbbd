//! Log lines: which are written, and what stands in them. A line bears the fields of the spans
//! around it and the ids of the current trace; what the policy of redaction hides never gets here.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::io::IsTerminal;
use std::sync::Arc;

use opentelemetry::Context as OtelContext;
use opentelemetry::trace::TraceContextExt;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Filter, Layer};
use tracing_subscriber::registry::LookupSpan;

use crate::redact::{self, Action, Policy};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One flat JSON object a line.
    Json,
}

/// Crates whose spans and events stay out of the user's trace. Our own spans
/// lend their fields to log lines; the tree says in our name what happened.
pub(super) const OWN: [&str; 6] =
    ["tasker", "tasker_shared", "tasker_orchestration", "tasker_worker", "tasker_api", "tasker_cli"];

/// The filter of log lines, and what was wrong with the one asked for.
pub(super) fn env_filter(lookup: impl Fn(&str) -> Option<String>) -> (EnvFilter, Option<String>) {
    // The SDK logs each lost batch; we say once that the collector is gone.
    let quiet = |text: &str| format!("opentelemetry_sdk=off,opentelemetry-otlp=off,opentelemetry_otlp=off,{text}");
    let asked = ["TASKER_LOG", "RUST_LOG"]
        .into_iter()
        .find_map(|name| lookup(name).filter(|text| !text.trim().is_empty()).map(|text| (name, text)));
    let Some((name, text)) = asked else {
        return (EnvFilter::new(quiet("info")), None);
    };
    match EnvFilter::try_new(quiet(&text)) {
        Ok(filter) => (filter, None),
        Err(e) => {
            let complaint = format!("{name}={text} is ignored ({e}); use for example info,my_crate=debug");
            (EnvFilter::new(quiet("info")), Some(complaint))
        }
    }
}

pub(super) fn use_ansi(format: LogFormat) -> bool {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    format == LogFormat::Pretty && std::io::stderr().is_terminal() && !no_color
}

/// The level of lines is the environment's; our own spans are always kept,
/// so that a warning bears its ids when only warnings are shown.
pub(super) struct LogFilter(pub EnvFilter);

impl LogFilter {
    fn keeps(meta: &Metadata<'_>) -> bool {
        meta.is_span() && *meta.level() <= Level::INFO && OWN.contains(&crate_of(meta.target()))
    }

    /// The text of a statement never stands in a log line.
    fn is_statement(meta: &Metadata<'_>) -> bool {
        meta.target() == "sqlx::query" && *meta.level() > Level::WARN
    }
}

impl<S: Subscriber + for<'l> LookupSpan<'l>> Filter<S> for LogFilter {
    fn enabled(&self, meta: &Metadata<'_>, cx: &Context<'_, S>) -> bool {
        Self::keeps(meta) || (!Self::is_statement(meta) && Filter::<S>::enabled(&self.0, meta, cx))
    }

    fn callsite_enabled(&self, meta: &'static Metadata<'static>) -> Interest {
        if Self::is_statement(meta) {
            return Interest::never();
        }
        let interest = Filter::<S>::callsite_enabled(&self.0, meta);
        if Self::keeps(meta) { Interest::always() } else { interest }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Filter::<S>::max_level_hint(&self.0).map(|level| level.max(LevelFilter::INFO))
    }

    fn event_enabled(&self, event: &Event<'_>, cx: &Context<'_, S>) -> bool {
        Filter::<S>::event_enabled(&self.0, event, cx)
    }

    fn on_new_span(&self, attrs: &Attributes<'_>, id: &Id, cx: Context<'_, S>) {
        Filter::<S>::on_new_span(&self.0, attrs, id, cx);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, cx: Context<'_, S>) {
        Filter::<S>::on_record(&self.0, id, values, cx);
    }

    fn on_enter(&self, id: &Id, cx: Context<'_, S>) {
        Filter::<S>::on_enter(&self.0, id, cx);
    }

    fn on_exit(&self, id: &Id, cx: Context<'_, S>) {
        Filter::<S>::on_exit(&self.0, id, cx);
    }

    fn on_close(&self, id: Id, cx: Context<'_, S>) {
        Filter::<S>::on_close(&self.0, id, cx);
    }
}

/// Writes one line an event: its message, its fields, the fields of the spans
/// around it (the innermost wins), and the ids of the current OpenTelemetry
/// span where one is, which is more exact than what our spans say.
pub(super) struct LogLines<W> {
    pub format: LogFormat,
    pub ansi: bool,
    pub writer: W,
}

/// Fields as text, in one buffer: a span costs two allocations.
#[derive(Default)]
struct Fields {
    text: String,
    fields: Vec<(&'static str, std::ops::Range<usize>, Shape)>,
}

/// Whether a value is written with quotes in JSON.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Text,
    Bare,
}

impl Fields {
    fn push(&mut self, name: &'static str, shape: Shape, value: fmt::Arguments<'_>) {
        let start = self.text.len();
        // A Display that fails leaves what it wrote so far.
        let _ = self.text.write_fmt(value);
        let field = (name, start..self.text.len(), shape);
        // A field recorded again has its new value in its old place.
        match self.fields.iter_mut().find(|(known, ..)| *known == name) {
            Some(known) => *known = field,
            None => self.fields.push(field),
        }
    }

    fn iter(&self) -> impl Iterator<Item = (&'static str, &str, Shape)> {
        self.fields.iter().map(|(name, at, shape)| (*name, &self.text[at.clone()], *shape))
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field.name(), Shape::Text, format_args!("{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field.name(), Shape::Bare, format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field.name(), Shape::Bare, format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field.name(), Shape::Bare, format_args!("{value}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        let shape = if value.is_finite() { Shape::Bare } else { Shape::Text };
        self.push(field.name(), shape, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field.name(), Shape::Text, format_args!("{value:?}"));
    }
}

impl<S, W> Layer<S> for LogLines<W>
where
    S: Subscriber + for<'l> LookupSpan<'l>,
    W: for<'w> MakeWriter<'w> + 'static,
{
    fn on_new_span(&self, attrs: &Attributes<'_>, id: &Id, cx: Context<'_, S>) {
        let Some(span) = cx.span(id) else { return };
        let mut fields = Fields::default();
        attrs.record(&mut fields);
        span.extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, cx: Context<'_, S>) {
        let Some(span) = cx.span(id) else { return };
        if let Some(fields) = span.extensions_mut().get_mut::<Fields>() {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, cx: Context<'_, S>) {
        let mut own = Fields::default();
        event.record(&mut own);
        let mut line = LogLine::new(self.format, self.ansi, event.metadata(), &own);
        OtelContext::map_current(|current| {
            let span = current.span();
            let span = span.span_context();
            if span.is_valid() {
                line.field("trace_id", &span.trace_id().to_string(), Shape::Text);
                line.field("span_id", &span.span_id().to_string(), Shape::Text);
            }
        });
        for span in cx.event_scope(event).into_iter().flatten() {
            if let Some(fields) = span.extensions().get::<Fields>() {
                for (name, value, shape) in fields.iter() {
                    line.field(name, value, shape);
                }
            }
        }
        let line = line.finish();
        // One write a line, so that lines of several threads do not mix. There
        // is nowhere to report that stderr is closed.
        let mut writer = self.writer.make_writer_for(event.metadata());
        let _ = std::io::Write::write_all(&mut writer, line.as_bytes());
    }
}

/// A log line in the making.
struct LogLine {
    format: LogFormat,
    policy: Arc<Policy>,
    text: String,
    seen: Vec<&'static str>,
}

/// Keys of ours in JSON; a field with such a name is written as `field.<name>`.
const JSON_KEYS: [&str; 3] = ["timestamp", "level", "target"];
const MESSAGE: &str = "message";
/// Made by us, and never a secret.
const OWN_FIELDS: [&str; 4] = ["trace_id", "span_id", "task_uuid", "step_uuid"];

impl LogLine {
    fn new(format: LogFormat, ansi: bool, meta: &Metadata<'_>, own: &Fields) -> Self {
        let at = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
        let policy = redact::policy();
        let message = own.iter().find(|(name, ..)| *name == MESSAGE).map_or("", |(_, text, _)| text);
        let message = policy.text(message);
        let mut text = String::with_capacity(256);
        match format {
            LogFormat::Json => {
                text.push_str("{\"timestamp\":");
                push_json(&mut text, &at);
                text.push_str(",\"level\":");
                push_json(&mut text, meta.level().as_str());
                text.push_str(",\"target\":");
                push_json(&mut text, meta.target());
                text.push_str(",\"message\":");
                push_json(&mut text, &message);
            }
            LogFormat::Pretty => {
                let (on, off) = if ansi { (color(*meta.level()), "\x1b[0m") } else { ("", "") };
                // Writing to a String cannot fail.
                let _ = write!(text, "{at} {on}{:>5}{off} {}: ", meta.level().as_str(), meta.target());
                push_printable(&mut text, &message);
            }
        }
        let mut line = Self { format, policy: Arc::clone(&policy), text, seen: vec![MESSAGE] };
        for (name, value, shape) in own.iter() {
            line.field(name, value, shape);
        }
        line
    }

    /// Adds a field unless an inner one of that name is there.
    fn field(&mut self, name: &'static str, value: &str, shape: Shape) {
        if self.seen.contains(&name) {
            return;
        }
        self.seen.push(name);
        let value = match (shape, OWN_FIELDS.contains(&name)) {
            (Shape::Text, false) => match self.policy.attribute(name, value) {
                Some(shown) => shown,
                None => return,
            },
            (Shape::Bare, false) if self.policy.of_attribute(name).is_some_and(|action| action != Action::Allow) => {
                return;
            }
            _ => Cow::Borrowed(value),
        };
        let value = &*value;
        match self.format {
            LogFormat::Json => {
                self.text.push(',');
                if JSON_KEYS.contains(&name) {
                    push_json(&mut self.text, &format!("field.{name}"));
                } else {
                    push_json(&mut self.text, name);
                }
                self.text.push(':');
                match shape {
                    Shape::Text => push_json(&mut self.text, value),
                    Shape::Bare => self.text.push_str(value),
                }
            }
            LogFormat::Pretty => {
                self.text.push(' ');
                self.text.push_str(name);
                self.text.push('=');
                let plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '"';
                if !value.is_empty() && value.chars().all(plain) {
                    self.text.push_str(value);
                } else {
                    let _ = write!(self.text, "{value:?}");
                }
            }
        }
    }

    fn finish(mut self) -> String {
        self.text.push_str(match self.format {
            LogFormat::Json => "}\n",
            LogFormat::Pretty => "\n",
        });
        self.text
    }
}

fn color(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        _ => "\x1b[34m",
    }
}

fn push_json(out: &mut String, text: &str) {
    out.push_str(&serde_json::Value::from(text).to_string());
}

/// Escapes control characters: a message must not forge a line or drive a terminal.
fn push_printable(out: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
}

/// The crate that a target names.
pub(super) fn crate_of(target: &str) -> &str {
    target.split("::").next().unwrap_or_default()
}
