//! Live spans without secrets: applied to what user code and libraries recorded, just before export.

use opentelemetry::trace::Status;
use opentelemetry::{Array, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::SpanData;

use crate::redact::{Action, Policy, REDACTED};

/// Applies the policy to everything that a span says in words. Its name is a constant by
/// convention, and stays.
pub fn span(policy: &Policy, span: &mut SpanData) {
    attributes(policy, &mut span.attributes);
    for event in &mut span.events.events {
        attributes(policy, &mut event.attributes);
    }
    for link in &mut span.links.links {
        attributes(policy, &mut link.attributes);
    }
    if let Status::Error { description } = &mut span.status
        && let std::borrow::Cow::Owned(clean) = policy.text(description)
    {
        *description = clean.into();
    }
}

fn attributes(policy: &Policy, attributes: &mut Vec<KeyValue>) {
    attributes.retain_mut(|attribute| {
        let name = attribute.key.as_str();
        match &mut attribute.value {
            Value::String(text) => match policy.attribute(name, text.as_str()) {
                None => return false,
                Some(std::borrow::Cow::Owned(clean)) => *text = clean.into(),
                Some(shown) if shown != text.as_str() => *text = shown.into_owned().into(),
                Some(_) => {}
            },
            Value::Array(Array::String(items)) => {
                let shown = |item: &StringValue| {
                    policy.attribute(name, item.as_str()).map(|shown| StringValue::from(shown.into_owned()))
                };
                *items = items.iter().filter_map(shown).collect();
            }
            other => match policy.of_attribute(name) {
                Some(Action::Deny) => return false,
                Some(Action::Mask | Action::Hash) => *other = REDACTED.into(),
                Some(Action::Allow) | None => {}
            },
        }
        true
    });
}
