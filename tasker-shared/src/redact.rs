//! What must not be seen: secrets in text, in JSON and in attributes.
//!
//! Pure but for the process's one policy. Applied when something is recorded (errors, panics, log
//! lines, helpers' attributes and captured payloads) and again when it is read (command line, HTTP
//! API, pages), so that what was written before a rule was made is hidden as well. Every pattern
//! is matched in linear time, and redacting twice changes nothing more.

mod forms;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// What stands where something was.
pub const REDACTED: &str = "[redacted]";

/// The name of the built-in rules; a new one when they change.
pub const DEFAULT_VERSION: &str = "tasker-1";

/// Text beyond this is not looked at, and not kept either.
const MAX_TEXT_BYTES: usize = 64 << 10;

/// What happens to a value that a rule names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Shown as it is, whatever other rules and the built-in forms say.
    Allow,
    /// Left out.
    Deny,
    /// Shown as `[redacted]`.
    Mask,
    /// Shown as the beginning of its SHA-256: equal values can be told, and guessed ones too.
    Hash,
}

/// One rule: for attributes (and log fields) by name, or for JSON by path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A name, `*` stands for any characters: `http.request.header.*`. Case does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attribute: Option<String>,
    /// A path into a payload: `$.customer.email`, `$.lines[*].card`, `$..iban` at any depth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What to do.
    #[serde(rename = "do")]
    pub action: Action,
}

/// A policy as it is written in a file or in the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// Names it, for people.
    pub version: String,
    /// Whether the built-in rules apply where no rule of its own does.
    #[serde(default = "yes")]
    pub defaults: bool,
    /// The first that fits decides.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

fn yes() -> bool {
    true
}

impl Default for Definition {
    fn default() -> Self {
        Self { version: DEFAULT_VERSION.to_owned(), defaults: true, rules: Vec::new() }
    }
}

/// A policy cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// It is not what a policy looks like.
    #[error(
        "redaction policy: {0}; it needs version, and rules of attribute or path with do: allow, deny, mask or hash"
    )]
    Shape(String),
    /// A rule names nothing, or both.
    #[error("redaction policy: rules[{0}]: give either attribute or path")]
    Target(usize),
    /// A path is not one.
    #[error(
        "redaction policy: rules[{0}].path: {1:?} is not a path; write it as $.customer.email, $.lines[*].card or $..iban"
    )]
    Path(usize, String),
    /// Too much of it.
    #[error("redaction policy: has more than {0} rules")]
    TooMany(usize),
    /// The file.
    #[error("redaction policy: the file cannot be read: {0}")]
    File(std::io::ErrorKind),
}

const MOST_RULES: usize = 500;

/// A policy, ready for use.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    definition: Definition,
    attributes: Vec<(String, Action)>,
    paths: Vec<(Vec<Part>, Action)>,
}

/// A part of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Key(String),
    /// `[*]` or `.*`
    Any,
    /// `..`
    Deep,
}

static CURRENT: LazyLock<RwLock<Arc<Policy>>> = LazyLock::new(RwLock::default);

/// The policy of this process: the built-in one until [`set`] gives another.
pub fn policy() -> Arc<Policy> {
    Arc::clone(&CURRENT.read().unwrap_or_else(PoisonError::into_inner))
}

/// Gives this process another policy.
pub fn set(policy: Policy) {
    *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(policy);
}

/// Text without the secrets that it may hold, by the policy of this process.
pub fn text(text: &str) -> Cow<'_, str> {
    policy().text(text)
}

/// At most `limit` bytes of text, redacted before it is cut: half a secret would not be known as one.
pub fn clipped(text: &str, limit: usize) -> String {
    let mut clean = policy().text(text).into_owned();
    clean.truncate(clean.floor_char_boundary(limit));
    clean
}

/// A payload without its secrets, by the policy of this process.
pub fn json(value: &mut Value) {
    policy().json(value);
}

/// A line that may be JSON or text, by the policy of this process. JSON in which nothing is hidden
/// stays as it is, to the order of its keys.
pub fn document(line: &str) -> Cow<'_, str> {
    if line.starts_with(['{', '['])
        && let Ok(known) = serde_json::from_str::<Value>(line)
    {
        return match shown(&known) {
            Some(clean) => Cow::Owned(clean.to_string()),
            None => Cow::Borrowed(line),
        };
    }
    text(line)
}

/// The same of a value; `None` if nothing of it is hidden.
pub fn shown(known: &Value) -> Option<Value> {
    let mut clean = known.clone();
    json(&mut clean);
    (clean != *known).then_some(clean)
}

impl Policy {
    /// Checks a definition.
    pub fn new(definition: Definition) -> Result<Self, Error> {
        if definition.rules.len() > MOST_RULES {
            return Err(Error::TooMany(MOST_RULES));
        }
        let (mut attributes, mut paths) = (Vec::new(), Vec::new());
        for (place, rule) in definition.rules.iter().enumerate() {
            match (&rule.attribute, &rule.path) {
                (Some(name), None) => attributes.push((name.to_ascii_lowercase(), rule.action)),
                (None, Some(path)) => {
                    let parts = parts(path).ok_or_else(|| Error::Path(place, path.clone()))?;
                    paths.push((parts, rule.action));
                }
                _ => return Err(Error::Target(place)),
            }
        }
        Ok(Self { definition, attributes, paths })
    }

    /// From YAML or JSON.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Self::new(read_as_yaml(text).map_err(Error::Shape)?)
    }

    /// From a file of YAML or JSON.
    pub fn read(path: &std::path::Path) -> Result<Self, Error> {
        Self::parse(&std::fs::read_to_string(path).map_err(|error| Error::File(error.kind()))?)
    }

    /// As it was written.
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// Text without the secrets that it may hold: the forms of `redact/forms.rs`, each replaced by `[redacted]`.
    pub fn text<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let text = &text[..text.floor_char_boundary(MAX_TEXT_BYTES)];
        if self.definition.defaults { forms::redact(text) } else { Cow::Borrowed(text) }
    }

    /// The value of an attribute or log field as it may be shown; `None`: not at all.
    pub fn attribute<'t>(&self, name: &str, value: &'t str) -> Option<Cow<'t, str>> {
        match self.of_attribute(name) {
            Some(action) => apply(action, value),
            None => Some(self.text(value)),
        }
    }

    /// What the rules say of the attribute by its name alone.
    pub fn of_attribute(&self, name: &str) -> Option<Action> {
        if !self.attributes.is_empty() {
            let lower = name.to_ascii_lowercase();
            if let Some((_, action)) = self.attributes.iter().find(|(pattern, _)| fits(pattern, &lower)) {
                return Some(*action);
            }
        }
        (self.definition.defaults && forms::is_secret_name(name)).then_some(Action::Mask)
    }

    /// A payload without its secrets.
    pub fn json(&self, value: &mut Value) {
        let open: Vec<(&[Part], Action)> = self.paths.iter().map(|(parts, action)| (&parts[..], *action)).collect();
        self.walk(value, &open);
    }

    /// The same of JSON text. Text that is no JSON is treated as text.
    pub fn json_text(&self, json: &str) -> String {
        match serde_json::from_str::<Value>(json) {
            Ok(mut value) => {
                self.json(&mut value);
                value.to_string()
            }
            Err(_) => self.text(json).into_owned(),
        }
    }

    fn walk(&self, value: &mut Value, open: &[(&[Part], Action)]) {
        match value {
            Value::Object(fields) => fields.retain(|key, inner| self.enter(Some(key), inner, open)),
            Value::Array(items) => items.retain_mut(|inner| self.enter(None, inner, open)),
            Value::String(text) => {
                if let Cow::Owned(clean) = self.text(text) {
                    *text = clean;
                }
            }
            _ => {}
        }
    }

    /// A JSON Schema. That a property is called `password` is no secret, so its name does not hide
    /// what is said about it; but every value in it that is not known to be about its form
    /// (`default`, `const`, `enum`, `examples`, whatever else) is hidden as that of such a field is.
    fn schema(&self, value: &mut Value, secret: bool) {
        let fields = match value {
            Value::Object(fields) => fields,
            Value::Array(items) => return items.iter_mut().for_each(|item| self.schema(item, secret)),
            Value::Bool(_) => return,
            // No schema at all.
            other if secret => {
                replace(Action::Mask, other);
                return;
            }
            other => return self.walk(other, &[]),
        };
        for (keyword, inner) in fields {
            match inner {
                Value::Object(named) if NAMED.contains(&keyword.as_str()) => {
                    for (name, inner) in named {
                        let secret = secret
                            || self.of_attribute(name).is_some_and(|action| action != Action::Allow)
                            || self.ends_a_path(name);
                        self.schema(inner, secret);
                    }
                }
                _ if NESTED.contains(&keyword.as_str()) => self.schema(inner, secret),
                _ if secret && !ABOUT.contains(&keyword.as_str()) => match inner {
                    Value::Null | Value::Bool(_) => {}
                    // It stays a schema: `enum` and `examples` are lists.
                    Value::Array(items) => items.iter_mut().for_each(|item| {
                        replace(Action::Mask, item);
                    }),
                    other => {
                        replace(Action::Mask, other);
                    }
                },
                _ => {
                    self.enter(Some(keyword), inner, &[]);
                }
            }
        }
    }

    /// Whether a rule hides fields of that name somewhere.
    fn ends_a_path(&self, name: &str) -> bool {
        let hides = |(parts, action): &(Vec<Part>, Action)| {
            *action != Action::Allow && matches!(parts.last(), Some(Part::Key(last)) if last == name)
        };
        self.paths.iter().any(hides)
    }

    /// Whether the value below this key (or in a list) stays.
    fn enter(&self, key: Option<&String>, value: &mut Value, open: &[(&[Part], Action)]) -> bool {
        let mut below: Vec<(&[Part], Action)> = Vec::new();
        let mut decided = None;
        for (parts, action) in open {
            advance(parts, key.map(String::as_str), &mut |rest| {
                if rest.is_empty() {
                    decided.get_or_insert(*action);
                } else {
                    below.push((rest, *action));
                }
            });
        }
        let by_name = || key.is_some_and(|key| self.definition.defaults && forms::is_secret_name(key));
        match decided {
            Some(action) => return replace(action, value),
            None if key.is_some_and(|key| SCHEMAS.contains(&key.as_str())) && value.is_object() => {
                self.schema(value, false);
            }
            None if by_name() && !matches!(value, Value::Null | Value::Bool(_)) => return replace(Action::Mask, value),
            None => self.walk(value, &below),
        }
        true
    }
}

/// Keys below which a JSON Schema stands: a document about values, not a value.
const SCHEMAS: [&str; 1] = ["input_schema"];
/// Keywords below which schemas stand, by name.
const NAMED: [&str; 5] = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"];
/// Keywords that are, or list, schemas of the same value or of its parts.
const NESTED: [&str; 12] = [
    "items",
    "prefixItems",
    "additionalProperties",
    "unevaluatedProperties",
    "contains",
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
];
/// Keywords that say what a value looks like and hold none.
const ABOUT: [&str; 22] = [
    "$ref",
    "type",
    "title",
    "description",
    "format",
    "pattern",
    "required",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minItems",
    "maxItems",
    "uniqueItems",
    "minProperties",
    "maxProperties",
    "readOnly",
    "writeOnly",
    "deprecated",
];

/// What is left of a path one level down: none, one, or (after `..`) two continuations.
fn advance<'p>(parts: &'p [Part], key: Option<&str>, then: &mut dyn FnMut(&'p [Part])) {
    match parts {
        [Part::Deep, rest @ ..] => {
            then(parts);
            advance(rest, key, then);
        }
        [Part::Any, rest @ ..] => then(rest),
        [Part::Key(name), rest @ ..] if key == Some(name) => then(rest),
        _ => {}
    }
}

fn replace(action: Action, value: &mut Value) -> bool {
    let text = match *value {
        Value::String(ref text) => text.clone(),
        ref other => other.to_string(),
    };
    match apply(action, &text) {
        None => return false,
        Some(_) if action == Action::Allow => {}
        Some(shown) => *value = Value::String(shown.into_owned()),
    }
    true
}

fn apply(action: Action, value: &str) -> Option<Cow<'_, str>> {
    match action {
        Action::Allow => Some(Cow::Borrowed(value)),
        Action::Deny => None,
        Action::Mask => Some(Cow::Borrowed(REDACTED)),
        // Twice is once.
        Action::Hash if value.starts_with("sha256:") && value.len() == 23 => Some(Cow::Borrowed(value)),
        Action::Hash => {
            let mut shown = String::from("sha256:");
            for byte in &Sha256::digest(value.as_bytes())[..8] {
                let _ = write!(shown, "{byte:02x}");
            }
            Some(Cow::Owned(shown))
        }
    }
}

/// Whether a name fits a pattern in which `*` stands for any characters: greedy, in linear time for
/// one star, and never worse than the product of the lengths.
fn fits(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    if !pattern.contains('*') {
        return rest.is_empty();
    }
    let parts: Vec<&str> = parts.collect();
    let (last, middle) = parts.split_last().unwrap_or((&"", &[]));
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn parts(path: &str) -> Option<Vec<Part>> {
    let mut rest = path.trim().strip_prefix('$')?;
    let mut parts = Vec::new();
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("[*]") {
            parts.push(Part::Any);
            rest = after;
            continue;
        }
        if let Some(after) = rest.strip_prefix("..") {
            parts.push(Part::Deep);
            rest = after;
        } else {
            rest = rest.strip_prefix('.')?;
        }
        let end = rest.find(['.', '[']).unwrap_or(rest.len());
        let (key, after) = rest.split_at(end);
        parts.push(match key {
            "" => return None,
            "*" => Part::Any,
            key => Part::Key(key.to_owned()),
        });
        rest = after;
    }
    let ends_well = !matches!(parts.last(), None | Some(Part::Deep));
    ends_well.then_some(parts)
}

/// Reads YAML, of which JSON is a part.
#[cfg(feature = "yaml")]
fn read_as_yaml(text: &str) -> Result<Definition, String> {
    serde_saphyr::from_str(text).map_err(|error| error.to_string())
}

/// Reads JSON alone.
#[cfg(not(feature = "yaml"))]
fn read_as_yaml(text: &str) -> Result<Definition, String> {
    serde_json::from_str(text).map_err(|error| format!("{error} (without the feature `yaml` the file must be JSON)"))
}

#[cfg(test)]
mod tests;
