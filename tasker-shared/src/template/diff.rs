//! What changed between two versions of a template.
//!
//! It compares the canonical JSON, where whatever has its default value is left out, so a key
//! that the format gains is compared without a line of code here. It compares what is written and
//! tells what may be shown: a secret that changed is listed as changed, and hidden on both sides.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::{RetryPolicy, StepTimeouts, Template, format_duration, to_json};
use crate::redact;

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

/// One key whose value differs. A value that is not there is the default (of `timeouts`, `input` and
/// `input_schema`: none). What the rules of redaction hide stands as `[redacted]`, on both sides if
/// both are hidden.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Change {
    /// With dots, such as `timeouts.run` or `input_schema.properties.id.pattern`, down to what is no
    /// object; durations are milliseconds.
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
    compare("", Some(before.template.side()), Some(after.template.side()), &mut diff.template);
    diff.removed.extend(before.names.iter().filter(|name| !after.steps.contains_key(*name)).cloned());
    for name in &after.names {
        let Some(known) = before.steps.get(name) else {
            diff.added.push(name.clone());
            continue;
        };
        let mut changes = Vec::new();
        compare("", Some(known.side()), Some(after.steps[name].side()), &mut changes);
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
    template: Part,
    names: Vec<String>,
    steps: BTreeMap<String, Part>,
    edges: BTreeSet<Edge>,
}

/// A part of a template: as it is written, and as it may be shown.
struct Part {
    written: Value,
    shown: Value,
}

/// A value of it; what is shown may be missing.
#[derive(Clone, Copy)]
struct Side<'a> {
    written: &'a Value,
    shown: Option<&'a Value>,
}

impl Part {
    fn side(&self) -> Side<'_> {
        Side { written: &self.written, shown: Some(&self.shown) }
    }
}

impl Side<'_> {
    /// What stands below it by name, unless it is a value, or hidden as a whole.
    fn inner(self) -> Option<BTreeMap<String, Self>> {
        let quoted = |key: &String| if key.contains('.') { format!("{key:?}") } else { key.clone() };
        match (self.written, self.shown?) {
            (Value::Object(written), Value::Object(shown)) => Some(
                written
                    .iter()
                    .map(|(key, value)| (quoted(key), Self { written: value, shown: shown.get(key) }))
                    .collect(),
            ),
            (Value::Array(written), Value::Array(shown))
                if !written.is_empty() && written.len() == shown.len() && written.iter().all(Value::is_object) =>
            {
                let both = written.iter().zip(shown).enumerate();
                Some(
                    both.map(|(at, (written, shown))| (format!("[{at}]"), Self { written, shown: Some(shown) }))
                        .collect(),
                )
            }
            _ => None,
        }
    }

    fn value(self) -> Value {
        self.shown.cloned().unwrap_or_else(|| redact::REDACTED.into())
    }
}

impl Parts {
    fn of(template: &Template) -> Self {
        let written = to_json(template);
        let shown = redact::shown(&written).unwrap_or_else(|| written.clone());
        let (written, mut steps) = apart(written);
        let (shown, shown_steps) = apart(shown);
        let mut parts = Self {
            template: Part { written, shown },
            names: Vec::new(),
            steps: BTreeMap::new(),
            edges: BTreeSet::new(),
        };
        for ((step, written), shown) in template.steps.iter().zip(steps.drain(..)).zip(shown_steps) {
            parts.edges.extend(step.depends_on.iter().map(|from| Edge { from: from.clone(), to: step.name.clone() }));
            parts.names.push(step.name.clone());
            parts.steps.insert(step.name.clone(), Part { written, shown });
        }
        parts
    }
}

/// The keys of a template itself, and its steps without what names and joins them.
fn apart(mut template: Value) -> (Value, Vec<Value>) {
    let mut steps = Vec::new();
    if let Value::Object(keys) = &mut template {
        for key in ["namespace", "name", "version"] {
            keys.remove(key);
        }
        if let Some(Value::Array(list)) = keys.remove("steps") {
            steps = list;
        }
    }
    for step in &mut steps {
        if let Value::Object(keys) = step {
            keys.remove("name");
            keys.remove("depends_on");
            // A policy that is left out has values all the same, and people know those.
            keys.entry("retry").or_insert_with(|| json!(RetryPolicy::default()));
            keys.entry("timeouts").or_insert_with(|| json!(StepTimeouts::default()));
        }
    }
    (template, steps)
}

/// Down to values that are no objects and no lists of objects, so that each rule that differs has a
/// line of its own, and none is hidden for the name of what it is about.
fn compare(path: &str, before: Option<Side<'_>>, after: Option<Side<'_>>, changes: &mut Vec<Change>) {
    if before.map(|side| side.written) == after.map(|side| side.written) {
        return;
    }
    let (old, new) = (before.and_then(Side::inner), after.and_then(Side::inner));
    let nothing_below = |side: Option<Side<'_>>, inner: &Option<BTreeMap<_, _>>, other: Option<Side<'_>>| {
        side.is_some() && inner.as_ref().is_none_or(|inner| inner.is_empty() && other.is_none())
    };
    if nothing_below(before, &old, after) || nothing_below(after, &new, before) {
        let value = |side: Option<Side<'_>>| side.map(Side::value);
        changes.push(Change { key: path.to_owned(), before: value(before), after: value(after) });
        return;
    }
    let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for key in keys {
        let dot = if path.is_empty() || key.starts_with('[') { "" } else { "." };
        let path = format!("{path}{dot}{key}");
        compare(&path, old.get(key).copied(), new.get(key).copied(), changes);
    }
}

/// Past so many characters two values stand below each other.
const ONE_LINE: usize = 100;

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_time = self.key.starts_with("timeouts.") || self.key.ends_with("_interval");
        let nothing = if self.key.starts_with("input") || self.key == "description" { "none" } else { "default" };
        let shown = |value: &Option<Value>| match value {
            None => nothing.to_owned(),
            Some(Value::Number(ms)) if is_time => {
                format_duration(Duration::from_millis(ms.as_u64().unwrap_or_default()))
            }
            Some(value) => value.to_string(),
        };
        let (key, before, after) = (&self.key, shown(&self.before), shown(&self.after));
        if self.before == self.after {
            return write!(f, "{key}: changed, and hidden");
        }
        if before.chars().count() + after.chars().count() <= ONE_LINE {
            return write!(f, "{key}: {before} → {after}");
        }
        write!(f, "{key}:\n      - {before}\n      + {after}")
    }
}

/// A line for each change (three where it is long), those of a step below its name; nothing if nothing differs.
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
                 input.sku: \"${input.sku}\" → \"${input.article}\"\n\
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

    fn with_schema(schema: &str) -> Template {
        template("1", &format!("input_schema: {schema}\nsteps: [{{name: one, handler: noop}}]\n"))
    }

    #[test]
    fn every_rule_about_a_secret_is_told_and_no_secret_is() {
        let before = with_schema(
            r"{required: [password], properties: {
                 password: {type: string, default: hunter2, examples: [hunter3]},
                 login: {type: object, properties: {api_token: {type: string, enum: [tok-1]}}},
                 any_of: {oneOf: [{type: object, properties: {secret: {const: s-1}}}, {type: string}]}}}",
        );
        let after = with_schema(
            r#"{required: [password, token], properties: {
                 password: {type: string, minLength: 8, default: hunter4, examples: [hunter3]},
                 login: {type: object, properties: {api_token: {type: string, enum: [tok-2], maxLength: 40}}},
                 token: {type: string, pattern: "^t-", default: tok-3},
                 any_of: {oneOf: [{type: object, properties: {secret: {const: s-2, minLength: 3}}}, {type: string}]}}}"#,
        );
        let diff = diff(&before, &after);
        let text = diff.to_string();
        assert_eq!(
            text,
            "~ input_schema.properties.any_of.oneOf[0].properties.secret.const: changed, and hidden\n\
             ~ input_schema.properties.any_of.oneOf[0].properties.secret.minLength: none → 3\n\
             ~ input_schema.properties.login.properties.api_token.enum: changed, and hidden\n\
             ~ input_schema.properties.login.properties.api_token.maxLength: none → 40\n\
             ~ input_schema.properties.password.default: changed, and hidden\n\
             ~ input_schema.properties.password.minLength: none → 8\n\
             ~ input_schema.properties.token.default: none → \"[redacted]\"\n\
             ~ input_schema.properties.token.pattern: none → \"^t-\"\n\
             ~ input_schema.properties.token.type: none → \"string\"\n\
             ~ input_schema.required: [\"password\"] → [\"password\",\"token\"]\n"
        );
        // The API hides once more what goes out: nothing is left for it, so nothing is lost by it.
        let sent = json!(diff);
        assert_eq!(redact::shown(&sent), None, "{sent}");
        for secret in ["hunter", "tok-", "s-1", "s-2"] {
            assert!(!sent.to_string().contains(secret) && !text.contains(secret), "{secret}: {text}");
        }
    }

    #[test]
    fn a_long_value_is_shown_as_a_whole() {
        let long = "x".repeat(300);
        let (before, after) = (with_schema("{title: short}"), with_schema(&format!("{{title: {long}}}")));
        let text = diff(&before, &after).to_string();
        assert_eq!(text, format!("~ input_schema.title:\n      - \"short\"\n      + \"{long}\"\n"));
    }

    #[test]
    fn a_property_without_rules_and_one_with_a_dot_are_told() {
        let (before, after) = (with_schema("{properties: {a: {}}}"), with_schema(r#"{properties: {"b.c": {}}}"#));
        let text = diff(&before, &after).to_string();
        assert_eq!(text, "~ input_schema.properties.\"b.c\": none → {}\n~ input_schema.properties.a: {} → none\n");
    }
}
