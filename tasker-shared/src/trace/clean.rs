//! Live spans without secrets: applied to what user code and libraries recorded, just before export.

use std::borrow::Cow;

use opentelemetry::trace::Status;
use opentelemetry::{Array, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::SpanData;

use super::otlp;
use crate::redact::{Action, Policy, REDACTED};

/// Applies the policy to everything that a span says in words, then cuts what is too long for any
/// backend. Names are constants by convention: the policy does not concern them, but control
/// characters do not go out. Answers how many texts were cut or cleaned.
pub fn span(policy: &Policy, span: &mut SpanData) -> u64 {
    let mut cut = 0;
    name(&mut span.name, &mut cut);
    attributes(policy, &mut span.attributes, &mut cut);
    for event in &mut span.events.events {
        name(&mut event.name, &mut cut);
        attributes(policy, &mut event.attributes, &mut cut);
    }
    for link in &mut span.links.links {
        attributes(policy, &mut link.attributes, &mut cut);
    }
    if let Status::Error { description } = &mut span.status {
        if let Cow::Owned(clean) = policy.text(description) {
            *description = clean.into();
        }
        if let Cow::Owned(clean) = otlp::clean(description, true, &mut cut) {
            *description = clean.into();
        } else if description.len() > otlp::MAX_TEXT_BYTES {
            *description = otlp::cut(description, &mut 0).to_owned().into();
        }
    }
    cut
}

fn name(name: &mut Cow<'static, str>, cut: &mut u64) {
    let clean = otlp::clean(name, false, cut);
    if clean != *name {
        *name = clean.into_owned().into();
    }
}

fn shorten(text: &mut StringValue, cut: &mut u64) {
    if text.as_str().len() > otlp::MAX_TEXT_BYTES {
        *text = otlp::cut(text.as_str(), cut).to_owned().into();
    }
}

fn attributes(policy: &Policy, attributes: &mut Vec<KeyValue>, cut: &mut u64) {
    attributes.retain_mut(|attribute| {
        let name = attribute.key.as_str();
        match &mut attribute.value {
            Value::String(text) => match policy.attribute(name, text.as_str()) {
                None => return false,
                Some(Cow::Owned(clean)) => *text = clean.into(),
                Some(shown) if shown != text.as_str() => *text = shown.into_owned().into(),
                Some(_) => {}
            },
            Value::Array(Array::String(items)) => {
                let shown = |item: &StringValue| {
                    policy.attribute(name, item.as_str()).map(|shown| StringValue::from(shown.into_owned()))
                };
                *items = items.iter().filter_map(shown).collect();
                for item in items.iter_mut() {
                    shorten(item, cut);
                }
            }
            other => match policy.of_attribute(name) {
                Some(Action::Deny) => return false,
                Some(Action::Mask | Action::Hash) => *other = REDACTED.into(),
                Some(Action::Allow) | None => {}
            },
        }
        if let Value::String(text) = &mut attribute.value {
            shorten(text, cut);
        }
        true
    });
}
