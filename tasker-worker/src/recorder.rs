//! What a handler records of its attempt, kept until its result is reported and stored with it: milestones,
//! timings, artifacts, captured payloads and usage. Unlike spans they are durable, and part of the
//! task's tree. What no handler uses costs nothing.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Map, Value, json};
use tasker_shared::{payload, redact};

/// Events of one attempt, their attributes, and the bytes of all of them; the database takes 64 KiB.
const MOST_EVENTS: usize = 128;
const MOST_ATTRIBUTES: usize = 32;
const MOST_BYTES: usize = 32 << 10;
const MAX_NAME_BYTES: usize = 100;
const MAX_TEXT_BYTES: usize = 1024;
pub(crate) const MAX_CAPTURE_BYTES: usize = 4096;
const MOST_COUNTERS: usize = 32;

#[derive(Debug)]
pub(crate) struct Recorder {
    /// When the claim arrived: events are timed from there.
    received: Instant,
    recorded: Mutex<Recorded>,
}

#[derive(Debug, Default)]
struct Recorded {
    events: Vec<Value>,
    bytes: usize,
    omitted: u64,
    usage: BTreeMap<String, f64>,
}

impl Recorder {
    pub(crate) fn new(received: Instant) -> Self {
        Self { received, recorded: Mutex::default() }
    }

    /// Notes an event that is happening now.
    pub(crate) fn event<K: AsRef<str>>(
        &self,
        name: &str,
        attributes: impl IntoIterator<Item = (K, Value)>,
        longest: usize,
    ) {
        let policy = redact::policy();
        let mut kept = Map::new();
        for (key, value) in attributes.into_iter().take(MOST_ATTRIBUTES) {
            let key = name_of(key.as_ref());
            if let Some(value) = attribute(&policy, &key, value, longest) {
                kept.insert(key, value);
            }
        }
        let at_ms = (self.received.elapsed().as_secs_f64() * 1e6).round() / 1e3;
        let event = json!({"name": name_of(name), "at_ms": at_ms, "attributes": kept});
        let bytes = event.to_string().len();
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        if recorded.events.len() < MOST_EVENTS && recorded.bytes + bytes <= MOST_BYTES {
            recorded.bytes += bytes;
            recorded.events.push(event);
        } else {
            recorded.omitted += 1;
        }
    }

    /// Adds to a counter of what the attempt used.
    pub(crate) fn add_usage(&self, name: &str, amount: f64) {
        if !amount.is_finite() {
            return;
        }
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        let name = name_of(name);
        if recorded.usage.len() < MOST_COUNTERS || recorded.usage.contains_key(&name) {
            *recorded.usage.entry(name).or_default() += amount;
        }
    }

    /// Everything that was recorded: milestones, then usage.
    pub(crate) fn take(&self) -> (Option<Value>, Option<Value>) {
        let recorded = std::mem::take(&mut *self.recorded.lock().unwrap_or_else(PoisonError::into_inner));
        let mut events = recorded.events;
        if recorded.omitted > 0 {
            events.push(json!({"name": "events_omitted", "attributes": {"count": recorded.omitted}}));
        }
        let usage = recorded.usage.into_iter().map(|(name, amount)| (name, number(amount))).collect::<Map<_, _>>();
        ((!events.is_empty()).then_some(Value::Array(events)), (!usage.is_empty()).then_some(Value::Object(usage)))
    }
}

/// At most [`MAX_NAME_BYTES`], no secrets, and nothing that the database cannot store.
fn name_of(text: &str) -> String {
    let mut name = redact::clipped(text, MAX_NAME_BYTES);
    payload::clean_text(&mut name);
    name
}

/// Whole numbers are written as such.
fn number(amount: f64) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "checked on this line")]
    if amount.fract() == 0.0 && amount.abs() < 9e15 { (amount as i64).into() } else { amount.into() }
}

/// A value as it may be kept: redacted, then cut; what is neither text, number nor boolean as JSON text.
fn attribute(policy: &redact::Policy, key: &str, value: Value, longest: usize) -> Option<Value> {
    let text = match value {
        Value::Null => return None,
        Value::Bool(_) | Value::Number(_) => {
            let action = policy.of_attribute(key).filter(|action| *action != redact::Action::Allow);
            return if action.is_none() { Some(value) } else { Some(redact::REDACTED.into()) };
        }
        Value::String(text) => text,
        mut payload => {
            policy.json(&mut payload);
            payload.to_string()
        }
    };
    let mut text = policy.attribute(key, &text)?.replace('\0', "\u{fffd}");
    text.truncate(text.floor_char_boundary(longest));
    Some(text.into())
}

/// At most [`MAX_TEXT_BYTES`] of each text.
pub(crate) const SHORT: usize = MAX_TEXT_BYTES;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_bounded_and_what_is_left_out_is_counted() {
        let recorder = Recorder::new(Instant::now());
        for n in 0..1000 {
            recorder.event("step", [("n", json!(n)), ("text", json!("é".repeat(5000)))], SHORT);
            recorder.add_usage(&format!("counter{n}"), 1.0);
        }
        let (events, usage) = recorder.take();
        let (events, usage) = (events.unwrap(), usage.unwrap());
        assert!(events.to_string().len() < 40 << 10, "{}", events.to_string().len());
        let events = events.as_array().unwrap();
        assert_eq!(events[0]["attributes"]["text"].as_str().unwrap().len(), SHORT);
        let last = events.last().unwrap();
        assert_eq!(last["attributes"]["count"], json!(1000 - (events.len() - 1)));
        assert_eq!(usage.as_object().unwrap().len(), MOST_COUNTERS);
        assert_eq!(recorder.take(), (None, None), "it was taken");
    }

    #[test]
    fn secrets_are_not_kept() {
        let recorder = Recorder::new(Instant::now());
        let attributes = [
            ("password", json!("hunter2")),
            ("pin_code", json!(4711)),
            ("note", json!("token=hunter2")),
            ("payload", json!({"api_key": "hunter2", "amount": 5})),
            ("nothing", Value::Null),
        ];
        recorder.event("asked with Bearer hunter2-2-2-2", attributes, SHORT);
        let told = recorder.take().0.unwrap();
        assert!(!told.to_string().contains("hunter2") && !told.to_string().contains("4711"), "{told}");
        assert_eq!(told[0]["attributes"]["payload"], json!(r#"{"amount":5,"api_key":"[redacted]"}"#));
    }
}
