//! What changed between two versions of a template: pure.
//!
//! It compares the canonical JSON, where whatever has its default value is left out, so a key
//! that the format gains is compared without a line of code here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{RetryPolicy, StepTimeouts, Template, format_duration, to_json};

/// What changed from one template to another.
#[derive(Debug, Clone, Default, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Diff {
    /// Keys of the template itself, such as `on_failure`; not its version.
    pub template: Vec<Change>,
    /// Steps that only the later one has, in file order.
    pub added: Vec<String>,
    /// Steps that only the earlier one has, in file order.
    pub removed: Vec<String>,
    /// Steps that both have and that differ, in the later one's file order.
    pub changed: Vec<StepChange>,
    /// Dependencies that only the later one has.
    pub edges_added: Vec<Edge>,
    /// Dependencies that only the earlier one has.
    pub edges_removed: Vec<Edge>,
}

/// A step that differs in more than what it depends on.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct StepChange {
    /// Its name.
    pub step: String,
    /// Its keys, such as `retry.max_attempts`.
    pub changes: Vec<Change>,
}

/// One key whose value differs. A value that is not there is the default (of `timeouts`: none).
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Change {
    /// With dots, such as `timeouts.run`; durations are milliseconds.
    pub key: String,
    /// In the earlier one.
    pub before: Option<Value>,
    /// In the later one.
    pub after: Option<Value>,
}

/// `to` depends on `from`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, schemars::JsonSchema)]
pub struct Edge {
    /// Runs first.
    pub from: String,
    /// Waits for it.
    pub to: String,
}

/// Compares two templates, step by step and by name.
pub fn diff(before: &Template, after: &Template) -> Diff {
    let (before, after) = (Parts::of(before), Parts::of(after));
    let mut diff = Diff::default();
    compare("", &before.template, &after.template, &mut diff.template);
    diff.removed.extend(before.names.iter().filter(|name| !after.steps.contains_key(*name)).cloned());
    for name in &after.names {
        let Some(known) = before.steps.get(name) else {
            diff.added.push(name.clone());
            continue;
        };
        let mut changes = Vec::new();
        compare("", known, &after.steps[name], &mut changes);
        if !changes.is_empty() {
            diff.changed.push(StepChange { step: name.clone(), changes });
        }
    }
    diff.edges_added.extend(after.edges.difference(&before.edges).cloned());
    diff.edges_removed.extend(before.edges.difference(&after.edges).cloned());
    diff
}

impl Diff {
    /// Whether nothing but the version differs.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A template taken apart: what belongs to it as a whole, its steps, its dependencies.
struct Parts {
    template: Value,
    names: Vec<String>,
    steps: BTreeMap<String, Value>,
    edges: BTreeSet<Edge>,
}

impl Parts {
    fn of(template: &Template) -> Self {
        let mut json = to_json(template);
        let mut steps = BTreeMap::new();
        let (mut names, mut edges) = (Vec::new(), BTreeSet::new());
        if let Value::Object(keys) = &mut json {
            for key in ["namespace", "name", "version"] {
                keys.remove(key);
            }
            let list = match keys.remove("steps") {
                Some(Value::Array(list)) => list,
                _ => Vec::new(),
            };
            for (step, mut json) in template.steps.iter().zip(list) {
                if let Value::Object(keys) = &mut json {
                    keys.remove("name");
                    keys.remove("depends_on");
                    // A policy that is left out has values all the same, and people know those.
                    keys.entry("retry").or_insert_with(|| json!(RetryPolicy::default()));
                    keys.entry("timeouts").or_insert_with(|| json!(StepTimeouts::default()));
                }
                edges.extend(step.depends_on.iter().map(|from| Edge { from: from.clone(), to: step.name.clone() }));
                names.push(step.name.clone());
                steps.insert(step.name.clone(), json);
            }
        }
        Self { template: json, names, steps, edges }
    }
}

/// Objects are compared key by key; a list, a schema or an input is one value.
fn compare(path: &str, before: &Value, after: &Value, changes: &mut Vec<Change>) {
    let nothing = Map::new();
    let before = before.as_object().unwrap_or(&nothing);
    let after = after.as_object().unwrap_or(&nothing);
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for key in keys {
        let (old, new) = (before.get(key), after.get(key));
        if old == new {
            continue;
        }
        let whole = matches!(&**key, "input" | "input_schema" | "description");
        let inner = |value: Option<&Value>| !whole && value.is_none_or(Value::is_object);
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        if inner(old) && inner(new) {
            let empty = Value::Null;
            compare(&path, old.unwrap_or(&empty), new.unwrap_or(&empty), changes);
        } else {
            changes.push(Change { key: path, before: old.cloned(), after: new.cloned() });
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_time = self.key.starts_with("timeouts.") || self.key.ends_with("_interval");
        let shown = |value: &Option<Value>| match value {
            None => "default".to_owned(),
            Some(Value::Number(ms)) if is_time => {
                format_duration(Duration::from_millis(ms.as_u64().unwrap_or_default()))
            }
            Some(value) => {
                let text = value.to_string();
                let short: String = text.chars().take(120).collect();
                if short.len() < text.len() { format!("{short}…") } else { short }
            }
        };
        write!(f, "{}: {} → {}", self.key, shown(&self.before), shown(&self.after))
    }
}

/// One line a change, those of a step below its name; nothing if nothing differs.
impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for change in &self.template {
            writeln!(f, "~ {change}")?;
        }
        for step in &self.removed {
            writeln!(f, "- step {step}")?;
        }
        for step in &self.added {
            writeln!(f, "+ step {step}")?;
        }
        for StepChange { step, changes } in &self.changed {
            writeln!(f, "~ step {step}")?;
            for change in changes {
                writeln!(f, "    {change}")?;
            }
        }
        for Edge { from, to } in &self.edges_removed {
            writeln!(f, "- {to} depends on {from}")?;
        }
        for Edge { from, to } in &self.edges_added {
            writeln!(f, "+ {to} depends on {from}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::parse;

    fn template(version: &str, rest: &str) -> Template {
        let text = format!("namespace: shop\nname: order\nversion: \"{version}\"\n{rest}");
        parse("order.yaml", &text).unwrap_or_else(|problems| panic!("{problems:?}")).template
    }

    const FIRST: &str = "
timeouts: {total: 1h}
steps:
  - {name: reserve, handler: reserve, input: {sku: \"${input.sku}\"}}
  - {name: charge, handler: charge, depends_on: [reserve], retry: {max_attempts: 5}, timeouts: {run: 10s}}
  - {name: ship, handler: ship, depends_on: [charge]}
";

    #[test]
    fn a_version_alone_is_no_difference() {
        let diff = diff(&template("1", FIRST), &template("2", FIRST));
        assert!(diff.is_empty(), "{diff}");
        assert_eq!(diff.to_string(), "");
    }

    #[test]
    fn spelling_a_default_out_is_no_difference() {
        let spelled = FIRST.replace("handler: ship,", "handler: ship, retry: {max_attempts: 3}, priority: 0,");
        assert!(diff(&template("1", FIRST), &template("2", &spelled)).is_empty());
    }

    #[test]
    fn a_policy_that_was_left_out_shows_the_values_it_had() {
        let patient =
            FIRST.replace("handler: ship,", "handler: ship, retry: {max_attempts: 9}, timeouts: {queue: 1h},");
        let diff = diff(&template("1", FIRST), &template("2", &patient)).to_string();
        assert_eq!(diff, "~ step ship\n    retry.max_attempts: 3 → 9\n    timeouts.queue: default → 1h\n");
    }

    #[test]
    fn steps_edges_and_policies_are_told_apart() {
        let second = "
on_failure: block
steps:
  - {name: reserve, handler: reserve, input: {sku: \"${input.article}\"}}
  - {name: fraud, handler: fraud}
  - {name: charge, handler: charge, depends_on: [reserve, fraud], retry: {max_attempts: 7, initial_interval: 2s}, timeouts: {run: 1m}}
";
        let (first, second) = (template("1", FIRST), template("2", second));
        let forth = diff(&first, &second);
        assert_eq!(
            forth.to_string(),
            "~ on_failure: default → \"block\"\n\
             ~ timeouts.total: 1h → default\n\
             - step ship\n\
             + step fraud\n\
             ~ step reserve\n    \
                 input: {\"sku\":\"${input.sku}\"} → {\"sku\":\"${input.article}\"}\n\
             ~ step charge\n    \
                 retry.initial_interval: 1s → 2s\n    \
                 retry.max_attempts: 5 → 7\n    \
                 timeouts.run: 10s → 1m\n\
             - ship depends on charge\n\
             + charge depends on fraud\n"
        );
        let back = diff(&second, &first);
        assert_eq!((&back.added, &back.removed), (&forth.removed, &forth.added));
        assert_eq!((&back.edges_added, &back.edges_removed), (&forth.edges_removed, &forth.edges_added));
        assert_eq!(back.changed.len(), forth.changed.len());
    }
}
