//! Spans that a handler makes below its own `handler.execution`.
//!
//! They are ordinary live spans: exported by the SDK of this process, sampled with the task, and
//! lost if the process is killed. Without tracing they cost a few nanoseconds and record nothing.
//!
//! ```no_run
//! use tasker_worker::{ModelCall, StepContext, StepError, Usage};
//! # #[derive(Debug, thiserror::Error)] #[error("away")] struct Away;
//! # struct Answer { status: u16, text: String, input_tokens: u64, output_tokens: u64 }
//! # async fn post(_: &str) -> Result<Answer, Away> { Err(Away) }
//!
//! async fn summarize(ctx: StepContext, input: String) -> Result<String, StepError> {
//!     // A span of your own: it ends with the future, and bears its error.
//!     let page = ctx.span("fetch_page").run(post(&input)).await?;
//!
//!     // A call of another service.
//!     let call = ctx.external_call("rates.lookup", "rates.example.com");
//!     let rates = call.within(post("https://rates.example.com")).await;
//!     if let Ok(answer) = &rates {
//!         call.http_response(answer.status);
//!     }
//!     call.finish_with(&rates);
//!
//!     // A query.
//!     ctx.database_call("postgresql", "SELECT", "customers").run(post("…")).await?;
//!
//!     // A tool of an agent, and a language model with its tokens.
//!     let tool = ctx.tool_call("web_search");
//!     tool.set("process.command", "search --limit 5");
//!     tool.run(post("…")).await?;
//!     let model = ctx.model_call(ModelCall { operation: "chat", provider: "example", model: "large-2" });
//!     let answer = model.within(post("…")).await?;
//!     model.usage(Usage { input_tokens: answer.input_tokens, output_tokens: answer.output_tokens });
//!     model.finish();
//!
//!     // Durable, in the task's own tree: see `tasker trace show`.
//!     ctx.milestone("summarized", [("characters", answer.text.len().into())]);
//!     Ok(page.text)
//! }
//! ```

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::context::FutureExt as _;
use opentelemetry::trace::{SpanKind, Status, TraceContextExt as _, Tracer as _};
use opentelemetry::{Context, KeyValue, Value, global};
use tasker_shared::redact::{self, clipped};
use tasker_shared::trace::context::inject_current;
use tasker_shared::trace::names;

use crate::context::StepContext;
use crate::error::{StepError, short_type_name};
use crate::measure;

/// Longest text of an attribute.
const MAX_TEXT_BYTES: usize = 4096;

/// A live span of a handler. It ends when it is finished; one that is dropped before, by a panic, a
/// timeout or a cancelled future, ends as an error of type `abandoned`.
#[must_use = "a span ends when it is dropped, as abandoned"]
pub struct Span {
    at: Context,
    ctx: StepContext,
    name: Arc<str>,
    open: bool,
}

/// What a call of a language model is about, in the words of the semantic conventions.
#[derive(Debug, Clone, Copy)]
pub struct ModelCall<'a> {
    /// `chat`, `text_completion`, `embeddings` …
    pub operation: &'a str,
    /// Who serves it: `openai`, `anthropic`, `aws.bedrock` …
    pub provider: &'a str,
    /// The model that was asked for.
    pub model: &'a str,
}

/// Tokens that a call of a language model used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub struct Usage {
    pub input_tokens: u64,
    pub output_tokens: u64,
}

/// An error that a span can bear. Implemented for [`StepError`] and for every `std::error::Error`.
pub trait Failed {
    /// Its class, for `error.type`, and its words.
    fn class_and_message(&self) -> (String, String);
}

impl Failed for StepError {
    fn class_and_message(&self) -> (String, String) {
        match self {
            Self::Retry { kind, message, .. } | Self::Fail { kind, message } => (kind.clone(), message.clone()),
            Self::Cancel => ("cancelled".into(), "the handler was cancelled".into()),
        }
    }
}

impl<E: std::error::Error> Failed for E {
    fn class_and_message(&self) -> (String, String) {
        (short_type_name(std::any::type_name::<E>()).to_owned(), self.to_string())
    }
}

impl StepContext {
    /// A live span below this attempt: see [`Span`].
    pub fn span(&self, name: impl Into<Cow<'static, str>>) -> Span {
        Span::start(self, name.into(), SpanKind::Internal, Vec::new())
    }

    /// A span of a call to another service: `name` says what is called, `server` where it is.
    pub fn external_call(&self, name: impl Into<Cow<'static, str>>, server: &str) -> Span {
        Span::start(self, name.into(), SpanKind::Client, vec![KeyValue::new("server.address", clipped(server, 255))])
    }

    /// A span of a database's operation, such as `SELECT` on `orders`. Never its parameters.
    pub fn database_call(&self, system: &str, operation: &str, collection: &str) -> Span {
        let name = clipped(&format!("{operation} {collection}"), 255);
        let attributes = vec![
            KeyValue::new("db.system.name", clipped(system, 64)),
            KeyValue::new("db.operation.name", clipped(operation, 64)),
            KeyValue::new("db.collection.name", clipped(collection, 255)),
            KeyValue::new("db.query.summary", name.clone()),
        ];
        Span::start(self, name.into(), SpanKind::Client, attributes)
    }

    /// A span of a tool that an agent runs.
    pub fn tool_call(&self, tool: &str) -> Span {
        let attributes = vec![
            KeyValue::new("gen_ai.operation.name", "execute_tool"),
            KeyValue::new("gen_ai.tool.name", clipped(tool, 255)),
        ];
        Span::start(self, format!("execute_tool {}", clipped(tool, 100)).into(), SpanKind::Internal, attributes)
    }

    /// A span of a call of a language model; tell its tokens with [`Span::usage`].
    pub fn model_call(&self, call: ModelCall<'_>) -> Span {
        let attributes = vec![
            KeyValue::new("gen_ai.operation.name", clipped(call.operation, 64)),
            KeyValue::new("gen_ai.provider.name", clipped(call.provider, 64)),
            KeyValue::new("gen_ai.request.model", clipped(call.model, 255)),
        ];
        let name = format!("{} {}", clipped(call.operation, 64), clipped(call.model, 100));
        Span::start(self, name.into(), SpanKind::Client, attributes)
    }
}

impl Span {
    pub(crate) fn start(ctx: &StepContext, name: Cow<'static, str>, kind: SpanKind, attributes: Vec<KeyValue>) -> Self {
        let mut all = vec![
            KeyValue::new(names::CORRELATION_ID, ctx.correlation_id().to_owned()),
            KeyValue::new(names::TASK_UUID, ctx.task_uuid().to_string()),
            KeyValue::new(names::NAMESPACE, ctx.namespace().to_owned()),
        ];
        all.extend(attributes);
        let tracer = global::tracer("tasker");
        let parent = Context::current();
        let span =
            tracer.span_builder(name.clone()).with_kind(kind).with_attributes(all).start_with_context(&tracer, &parent);
        let at = parent.with_span(span);
        Self { at, ctx: ctx.clone(), name: name.into(), open: true }
    }

    /// Sets an attribute; text is redacted, and cut at 4 KiB.
    pub fn set(&self, key: impl Into<Cow<'static, str>>, value: impl Into<Value>) -> &Self {
        let span = self.at.span();
        if span.is_recording()
            && let Some(attribute) = attribute(key.into(), value.into())
        {
            span.set_attribute(attribute);
        }
        self
    }

    /// Notes that something happened. Durable events are [`StepContext::milestone`]s.
    pub fn event<K: Into<Cow<'static, str>>, V: Into<Value>>(
        &self,
        name: impl Into<Cow<'static, str>>,
        attributes: impl IntoIterator<Item = (K, V)>,
    ) -> &Self {
        let span = self.at.span();
        if span.is_recording() {
            let attributes = attributes.into_iter().filter_map(|(key, value)| attribute(key.into(), value.into()));
            span.add_event(name, attributes.collect());
        }
        self
    }

    /// Notes how long something took.
    pub fn timing(&self, name: impl Into<Cow<'static, str>>, took: Duration) -> &Self {
        self.event(name, [("duration_ms", took.as_secs_f64() * 1e3)])
    }

    /// Sets `http.response.status_code`; a status of 400 or more makes the span an error of that type.
    pub fn http_response(&self, status: u16) -> &Self {
        self.set("http.response.status_code", i64::from(status));
        if status >= 400 {
            self.mark(&status.to_string(), "");
        }
        self
    }

    /// Sets the tokens of this call, and adds them to those of the attempt, the step and the task.
    pub fn usage(&self, usage: Usage) -> &Self {
        for (key, tokens) in [(names::INPUT_TOKENS, usage.input_tokens), (names::OUTPUT_TOKENS, usage.output_tokens)] {
            self.set(key, i64::try_from(tokens).unwrap_or(i64::MAX));
            #[expect(clippy::cast_precision_loss, reason = "nobody uses 2^53 tokens")]
            self.ctx.add_usage(key, tokens as f64);
        }
        self
    }

    /// Keeps what was said to a model and what it answered, where the worker captures inputs and
    /// outputs: redacted, and cut at 4 KiB.
    pub fn messages(&self, input: &serde_json::Value, output: &serde_json::Value) -> &Self {
        let capture = self.ctx.capture();
        for (wanted, key, payload) in
            [(capture.input, "gen_ai.input.messages", input), (capture.output, "gen_ai.output.messages", output)]
        {
            if wanted && self.at.span().is_recording() {
                let mut payload = payload.clone();
                redact::json(&mut payload);
                self.set(key, payload.to_string());
            }
        }
        self
    }

    /// Makes the span an error, with an `exception` event.
    pub fn record_error(&self, error: &impl Failed) -> &Self {
        let (class, message) = error.class_and_message();
        self.mark(&class, &message);
        self.event(names::EXCEPTION, [(names::EXCEPTION_TYPE, class), (names::EXCEPTION_MESSAGE, message)]);
        self
    }

    /// The headers by which an outgoing request or message joins the trace below this span.
    pub fn inject<S: BuildHasher>(&self, headers: &mut HashMap<String, String, S>) {
        let _current = self.at.clone().attach();
        inject_current(headers);
    }

    /// Runs a future below this span, which stays open.
    pub async fn within<F: Future>(&self, future: F) -> F::Output {
        future.with_context(self.at.clone()).await
    }

    /// Runs a future below this span, and ends it with the future's error, if any.
    ///
    /// # Errors
    /// Those of the future.
    pub async fn run<T, E: Failed>(self, future: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let result = self.within(future).await;
        self.finish_with(&result);
        result
    }

    /// Ends it, with the error if there is one.
    pub fn finish_with<T, E: Failed>(self, result: &Result<T, E>) {
        if let Err(error) = result {
            self.record_error(error);
        }
        self.finish();
    }

    /// Ends it.
    pub fn finish(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.open = false;
        self.at.span().end();
    }

    fn mark(&self, class: &str, message: &str) {
        measure::span_failed(&self.name, self.ctx.shared_namespace(), self.ctx.handler_name());
        let span = self.at.span();
        if span.is_recording() {
            self.set(names::ERROR_TYPE, class.to_owned());
            let words = if message.is_empty() { class } else { message };
            span.set_status(Status::error(redact::clipped(words, 1024)));
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if self.open {
            self.mark("abandoned", "the span was dropped before it was finished");
            self.end();
        }
    }
}

impl std::fmt::Debug for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Span").field("name", &self.name).finish_non_exhaustive()
    }
}

fn attribute(key: Cow<'static, str>, value: Value) -> Option<KeyValue> {
    let value = match value {
        Value::String(text) => {
            let shown = redact::policy().attribute(&key, text.as_str())?.into_owned();
            let end = shown.floor_char_boundary(MAX_TEXT_BYTES);
            Value::from(shown[..end].to_owned())
        }
        other => other,
    };
    Some(KeyValue::new(key, value))
}
