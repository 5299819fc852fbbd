//! SQL statements as live spans, read from the records of sqlx.

use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanKind, TraceContextExt as _};
use opentelemetry::{Context, KeyValue};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context as LayerContext, Filter, Layer};

use super::live::{begin, is_on_somewhere};

/// Statements as sqlx records them.
const STATEMENT: &str = "sqlx::query";

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
