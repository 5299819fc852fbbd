//! A span from anywhere, in one form.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value as Json, json};

use super::{ReadEvent, ReadLink};
use tasker_shared::redact::Policy;
use tasker_shared::trace::otlp::{ServiceNames, hex};
use tasker_shared::trace::span::{Kind, TaskSpans, Value};

/// A span from anywhere.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "what OTLP calls them; ids are in lower-case hex")]
pub struct Flat {
    pub trace_id: Arc<str>,
    pub span_id: String,
    pub parent_span_id: Option<String>,
    pub name: Cow<'static, str>,
    pub service: Arc<str>,
    pub kind: &'static str,
    pub start: DateTime<Utc>,
    pub end: DateTime<Utc>,
    pub attributes: Attributes,
    pub events: Vec<ReadEvent>,
    pub links: Vec<ReadLink>,
    pub error: Option<String>,
    /// The log has it.
    pub of_log: bool,
}

/// What a span says of itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Attributes {
    /// Those of the span in this place of the task's. They stay where they are until they are
    /// shown: of a hundred thousand spans a reader sees a thousand. No policy has looked at them.
    Log(Arc<TaskSpans>, usize),
    /// As a backend said them, after the policy.
    Backend(Map<String, Json>),
}

impl Attributes {
    fn of_log(task: &TaskSpans, at: usize) -> impl DoubleEndedIterator<Item = (&str, &Value)> {
        task.common.iter().chain(&task.spans[at].attributes).map(|(key, value)| (*key, value))
    }

    fn value(&self, key: &str) -> Option<&Value> {
        let Self::Log(task, at) = self else { return None };
        Self::of_log(task, *at).rev().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// A text as it was recorded; for comparing, not for showing.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self {
            Self::Log(..) => {
                self.value(key).and_then(|value| if let Value::Str(text) = value { Some(&**text) } else { None })
            }
            Self::Backend(map) => map.get(key)?.as_str(),
        }
    }

    /// A whole number.
    pub fn int(&self, key: &str) -> Option<i64> {
        match self {
            Self::Log(..) => {
                self.value(key).and_then(|value| if let Value::Int(number) = value { Some(*number) } else { None })
            }
            Self::Backend(map) => map.get(key)?.as_i64(),
        }
    }

    /// Whether it is there and true.
    pub fn is_true(&self, key: &str) -> bool {
        match self {
            Self::Log(..) => self.value(key) == Some(&Value::Bool(true)),
            Self::Backend(map) => map.get(key) == Some(&Json::Bool(true)),
        }
    }
}

/// Shows what the policy leaves. Most values stand on many spans: it looks at each once.
pub(super) struct Shown<'a> {
    policy: &'a Policy,
    known: HashMap<(&'a str, &'a str), Option<Cow<'a, str>>>,
}

impl<'a> Shown<'a> {
    pub(super) fn by(policy: &'a Policy) -> Self {
        Self { policy, known: HashMap::new() }
    }

    fn known(&mut self, key: &'a str, text: &'a str) -> Option<Cow<'a, str>> {
        self.known.entry((key, text)).or_insert_with(|| self.policy.attribute(key, text)).clone()
    }

    /// A text of a span.
    pub(super) fn text(&mut self, attributes: &'a Attributes, key: &'static str) -> Option<Cow<'a, str>> {
        let text = attributes.text(key)?;
        match attributes {
            Attributes::Log(..) => self.known(key, text),
            Attributes::Backend(_) => Some(Cow::Borrowed(text)),
        }
    }

    /// All that a span says.
    pub(super) fn all(&mut self, attributes: &'a Attributes) -> Map<String, Json> {
        match attributes {
            Attributes::Log(task, at) => self.map(Attributes::of_log(task, *at)),
            Attributes::Backend(map) => map.clone(),
        }
    }

    fn map(&mut self, attributes: impl Iterator<Item = (&'a str, &'a Value)>) -> Map<String, Json> {
        let mut shown = |key, value: &'a Value| {
            Some(match value {
                Value::Str(text) => json!(self.known(key, text)?),
                Value::Int(number) => json!(number),
                Value::Float(number) => json!(number),
                Value::Bool(word) => json!(word),
            })
        };
        attributes.filter_map(|(key, value)| Some((key.to_owned(), shown(key, value)?))).collect()
    }
}

/// The spans of a task as any reader sees them.
pub fn flat(task: TaskSpans, names: &ServiceNames, policy: &Policy) -> Vec<Flat> {
    let task = Arc::new(task);
    let trace_id: Arc<str> = hex(&task.trace_id).into();
    let mut services: HashMap<_, Arc<str>> = HashMap::new();
    let mut shown = Shown::by(policy);
    let spans = task.spans.iter().enumerate();
    spans
        .map(|(at, span)| Flat {
            trace_id: Arc::clone(&trace_id),
            span_id: hex(&span.id),
            parent_span_id: span.parent.map(|id| hex(&id)),
            name: Cow::Borrowed(span.name),
            service: Arc::clone(services.entry(span.service).or_insert_with(|| names.of(span.service).into())),
            kind: match span.kind {
                Kind::Internal => "internal",
                Kind::Server => "server",
                Kind::Client => "client",
                Kind::Producer => "producer",
                Kind::Consumer => "consumer",
            },
            start: span.start,
            end: span.end,
            attributes: Attributes::Log(Arc::clone(&task), at),
            events: span
                .events
                .iter()
                .map(|event| ReadEvent {
                    name: event.name.to_string(),
                    at: event.at,
                    attributes: shown.map(event.attributes.iter().map(|(key, value)| (&**key, value))),
                })
                .collect(),
            links: span
                .links
                .iter()
                .map(|link| ReadLink { trace_id: hex(&link.trace_id), span_id: hex(&link.span_id) })
                .collect(),
            error: span.error.as_deref().map(|error| policy.text(error).into_owned()),
            of_log: true,
        })
        .collect()
}
