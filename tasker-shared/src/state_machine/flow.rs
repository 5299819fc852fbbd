//! Limits and fair turns: which limits apply to a step, and what they have left.
//!
//! A place under a concurrency limit is not counted up and down: it is a row beside the step,
//! and counts for as long as the step is in flight. So whatever closes an attempt gives its
//! place back, in the same transaction and without a word.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::input::InputTemplate;

/// The most bytes of a key.
pub const MAX_KEY_BYTES: usize = 200;

/// Separates the parts of the name of a hold group; no key holds it.
pub const GROUP_SEPARATOR: char = '\u{1f}';

/// A limit as a template declares it, on a step or on all its steps together.
#[derive(Debug, Clone)]
pub struct Rule {
    /// What it is about: `shop/order.charge`, or `shop/order` for all steps of the template.
    pub scope: Arc<str>,
    /// Which tasks share it; `None`: all.
    pub key: Option<InputTemplate>,
    /// How much it allows.
    pub allows: Allows,
}

/// How much a limit allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Allows {
    /// So many attempts in flight at once.
    AtOnce(i32),
    /// So many attempts sent in each such time; a bucket of as many tokens, refilled evenly.
    Rate(i32, Duration),
}

/// A limit that applies to one step of one task.
#[derive(Debug, Clone, PartialEq)]
pub struct Limit {
    /// Its name, unique in the database: `shop/order.charge/customer-42`.
    pub name: String,
    /// How much it allows.
    pub allows: Allows,
}

/// The name of the limit of a namespace.
pub fn namespace_limit(namespace: &str) -> String {
    namespace.to_owned()
}

/// The name of the limit of a handler.
pub fn handler_limit(namespace: &str, handler: &str) -> String {
    format!("{namespace}:{handler}")
}

/// What a key of a limit or a fair key leads to.
pub(super) fn resolve_key(key: &InputTemplate, input: &Value) -> Result<String, String> {
    let key = match key.resolve(input, &|_| None).map_err(|missing| missing.to_string())? {
        Value::String(text) => text,
        Value::Number(number) => number.to_string(),
        Value::Bool(yes) => yes.to_string(),
        Value::Null => return Err("leads to null; it must lead to a text, a number or a boolean".into()),
        Value::Array(_) | Value::Object(_) => {
            return Err("leads to a list or an object; it must lead to a text, a number or a boolean".into());
        }
    };
    if key.is_empty() || key.len() > MAX_KEY_BYTES || key.chars().any(char::is_control) {
        return Err(format!(
            "must have 1 to {MAX_KEY_BYTES} bytes and no control characters, it has {} bytes",
            key.len()
        ));
    }
    Ok(key)
}

/// What limits have left, read under their locks by whoever admits held steps; everybody else has none.
#[derive(Debug, Clone, Default)]
pub struct LimitSlots {
    free: HashMap<String, Free>,
    taken: Vec<(Uuid, i64)>,
}

/// What one limit has left.
#[derive(Debug, Clone, PartialEq)]
pub struct Free {
    /// Its row.
    pub limit_id: i64,
    /// Slots; `None`: it does not limit how many are in flight.
    pub slots: Option<i64>,
    /// Tokens; `None`: it does not limit how many begin.
    pub tokens: Option<f64>,
}

impl Free {
    /// How many more it lets through.
    pub fn left(&self) -> i64 {
        #[expect(clippy::cast_possible_truncation, reason = "a bucket holds at most as many tokens as an i32")]
        let tokens = self.tokens.map_or(i64::MAX, |tokens| tokens.floor() as i64);
        self.slots.unwrap_or(i64::MAX).min(tokens)
    }

    /// Takes one.
    pub fn take(&mut self) {
        self.slots = self.slots.map(|slots| slots - 1);
        self.tokens = self.tokens.map(|tokens| tokens - 1.0);
    }
}

impl LimitSlots {
    /// Says what a limit has left.
    pub fn set(&mut self, name: String, free: Free) {
        self.free.insert(name, free);
    }

    /// Whether it knows no limit.
    pub fn is_empty(&self) -> bool {
        self.free.is_empty()
    }

    /// Whether it knows this limit.
    pub fn knows(&self, name: &str) -> bool {
        self.free.contains_key(name)
    }

    /// Takes a slot under each of these limits, or none at all. What is not known has nothing left.
    pub fn take(&mut self, step: Uuid, names: &[String]) -> bool {
        if !names.iter().all(|name| self.free.get(name).is_some_and(|free| free.left() > 0)) {
            return false;
        }
        for name in names {
            if let Some(free) = self.free.get_mut(name) {
                free.take();
                self.taken.push((step, free.limit_id));
            }
        }
        true
    }

    /// The slots that were taken, as `(step, limit)`.
    pub fn taken(&self) -> &[(Uuid, i64)] {
        &self.taken
    }
}
