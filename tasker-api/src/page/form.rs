//! A form for the input of a task, made from the template's JSON Schema, and what it was filled
//! in with. Whether the input is good is the schema's to say, when it is submitted.

use std::collections::BTreeMap;

use maud::{Markup, html};
use serde_json::{Map, Value, json};
use tasker_shared::redact;

use super::{Page, json_of};
use crate::problem::Problem;

/// Properties that get a field of their own.
const MOST_FIELDS: usize = 100;

/// How a property is filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Whole,
    Number,
    Boolean,
    /// Objects, lists, and whatever has no simple type.
    Json,
}

fn kind(property: &Value) -> (Kind, bool) {
    let types: Vec<&str> = match &property["type"] {
        Value::String(one) => vec![one],
        Value::Array(many) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let nullable = types.contains(&"null");
    let one: Vec<&str> = types.into_iter().filter(|kind| *kind != "null").collect();
    let texts = property["enum"].as_array().is_some_and(|values| values.iter().all(Value::is_string));
    let kind = match one.as_slice() {
        ["string"] => Kind::Text,
        ["integer"] => Kind::Whole,
        ["number"] => Kind::Number,
        ["boolean"] => Kind::Boolean,
        [] if texts => Kind::Text,
        _ => Kind::Json,
    };
    (kind, nullable)
}

fn properties(schema: Option<&Value>) -> Vec<(&String, &Value)> {
    let listed = schema.and_then(|schema| schema["properties"].as_object());
    let mut listed: Vec<_> = listed.into_iter().flatten().take(MOST_FIELDS).collect();
    // What must be given comes first, in the order in which the schema asks for it.
    let required = schema.and_then(|schema| schema["required"].as_array()).map_or(&[][..], Vec::as_slice);
    listed.sort_by_key(|(name, _)| required.iter().position(|one| one == *name).unwrap_or(usize::MAX));
    listed
}

fn is_required(schema: Option<&Value>, name: &str) -> bool {
    schema.and_then(|schema| schema["required"].as_array()).is_some_and(|names| names.iter().any(|one| one == name))
}

/// Properties that are required and have no description of their own.
fn undescribed(schema: Option<&Value>) -> Vec<String> {
    let named = properties(schema);
    let required = schema.and_then(|schema| schema["required"].as_array());
    required
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .filter(|name| !named.iter().any(|(known, _)| known == name))
        .map(str::to_owned)
        .collect()
}

/// The form.
pub(super) fn form(page: &Page, action: &str, version: &str, schema: Option<&Value>) -> Markup {
    let fields = properties(schema);
    let others = undescribed(schema);
    html! {
        form method="post" action=(action) {
            (page.csrf())
            input type="hidden" name="version" value=(version);
            @for (name, property) in &fields { (field(name, property, is_required(schema, name))) }
            @for name in &others { (field(name, &Value::Null, true)) }
            details open[fields.is_empty() && others.is_empty()] {
                summary { "The whole input as JSON" }
                div.field {
                    label.visually-hidden for="whole" { "The whole input as JSON" }
                    textarea.mono id="whole" name="whole" placeholder=(skeleton(schema)) spellcheck="false" {}
                    @if !fields.is_empty() { span.hint { "If this is given, it takes the place of the fields above." } }
                }
            }
            details {
                summary { "Correlation id, key, priority" }
                div.field { label for="correlation_id" { "Correlation id" } input id="correlation_id" type="text" name="correlation_id" maxlength="200"; span.hint { "What people search by; the task's id if not given." } }
                div.field { label for="idempotency_key" { "Idempotency key" } input id="idempotency_key" type="text" name="idempotency_key" maxlength="200"; span.hint { "Submitting it again leads to the first task." } }
                div.field { label for="priority" { "Priority" } input id="priority" type="number" name="priority" min="-9999" max="9999"; }
            }
            p {}
            button.primary { "Submit" }
        }
    }
}

/// A property without the values in it that the rules of redaction hide; `None` if they hide none.
fn without_secrets(name: &str, property: &Value) -> Option<Value> {
    let mut shown = redact::shown(&json!({"input_schema": {"properties": {name: property}}}))?;
    let mut shown = shown["input_schema"]["properties"][name].take();
    if let Some(keywords) = shown.as_object_mut() {
        // A mask in the place of a value or of choices would be sent as one.
        keywords.retain(|keyword, value| property.get(keyword) == Some(value));
    }
    Some(shown)
}

fn field(name: &str, property: &Value, required: bool) -> Markup {
    let cleaned = without_secrets(name, property);
    let property = cleaned.as_ref().unwrap_or(property);
    let secret = redact::shown(&json!({ name: "text" })).is_some();
    let (kind, nullable) = kind(property);
    let id = format!("in-{name}");
    let sent = format!("in.{name}");
    let hint = property["description"].as_str().or_else(|| property["pattern"].as_str());
    let choices = property["enum"].as_array();
    let given = match &property["default"] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    // An empty text stands for null where null is allowed.
    let must = required && !nullable;
    html! {
        div.field {
            label for=(id) { (property["title"].as_str().unwrap_or(name)) @if must { " " span.quiet aria-hidden="true" { "*" } } }
            @if let (Some(choices), true) = (choices, kind != Kind::Json || choices.is_some()) {
                select id=(id) name=(sent) required[must] {
                    @if !must { option value="" { "–" } }
                    @for choice in choices {
                        @let text = choice.as_str().map_or_else(|| choice.to_string(), str::to_owned);
                        option value=(text) selected[text == given] { (text) }
                    }
                }
            } @else {
                @match kind {
                    Kind::Text => input id=(id) type=(if secret { "password" } else { "text" }) autocomplete="off" name=(sent) value=(given) required[must] placeholder=[example(property)];,
                    Kind::Whole => input id=(id) type="number" step="1" name=(sent) value=(given) required[must];,
                    Kind::Number => input id=(id) type="number" step="any" name=(sent) value=(given) required[must];,
                    Kind::Boolean => select id=(id) name=(sent) { option value="" { "–" } option value="true" selected[given == "true"] { "true" } option value="false" selected[given == "false"] { "false" } },
                    Kind::Json => textarea.mono id=(id) name=(sent) rows="3" spellcheck="false" required[must] placeholder=(json_skeleton(property)) { (given) },
                }
            }
            @if let Some(hint) = hint { span.hint { (hint) } }
            @else if kind == Kind::Json { span.hint { "JSON" } }
            @if cleaned.is_some() { span.hint { "Values that its schema holds are hidden." } }
        }
    }
}

fn example(property: &Value) -> Option<String> {
    property["examples"][0].as_str().map(str::to_owned)
}

fn json_skeleton(property: &Value) -> String {
    if let Some(example) = property["examples"].get(0) {
        return example.to_string();
    }
    match property["type"].as_str() {
        Some("array") => format!("[{}]", skeleton(Some(&property["items"]))),
        Some("object") => skeleton(Some(property)),
        _ => "\"a text\", 1, true, {…} or […]".into(),
    }
}

/// What an object of this schema must have, to be filled in.
fn skeleton(schema: Option<&Value>) -> String {
    let names = schema.and_then(|schema| schema["required"].as_array());
    let names: Vec<String> =
        names.into_iter().flatten().filter_map(|name| Some(format!("\"{}\": …", name.as_str()?))).collect();
    format!("{{{}}}", names.join(", "))
}

/// The input that the form was filled in with.
pub(super) fn input(schema: Option<&Value>, fields: &BTreeMap<&str, &str>) -> Result<Value, Problem> {
    if let Some(whole) = fields.get("whole").filter(|text| !text.trim().is_empty()) {
        return json_of("input", whole);
    }
    let mut input = Map::new();
    let none = Value::Null;
    let others = undescribed(schema);
    let all = properties(schema).into_iter().chain(others.iter().map(|name| (name, &none)));
    for (name, property) in all {
        let Some(text) = fields.get(format!("in.{name}").as_str()) else {
            continue;
        };
        let (kind, nullable) = kind(property);
        let at = || format!("input.{name}");
        let value = match (kind, text.trim()) {
            (_, "") if nullable && is_required(schema, name) => Value::Null,
            // A text may be empty where it must be given; the schema says whether that will do.
            (Kind::Text, "") if is_required(schema, name) => Value::String(String::new()),
            (_, "") => continue,
            (Kind::Text, _) => Value::String((*text).to_owned()),
            (Kind::Whole, number) => {
                number.parse::<i64>().map_err(|_| Problem::invalid(at(), "must be a whole number"))?.into()
            }
            (Kind::Number, number) => {
                let number: f64 = number.parse().map_err(|_| Problem::invalid(at(), "must be a number"))?;
                serde_json::Number::from_f64(number).ok_or_else(|| Problem::invalid(at(), "must be a number"))?.into()
            }
            (Kind::Boolean, word) => {
                word.parse::<bool>().map_err(|_| Problem::invalid(at(), "must be true or false"))?.into()
            }
            (Kind::Json, json) => json_of(&at(), json)?,
        };
        input.insert(name.clone(), value);
    }
    Ok(Value::Object(input))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn filled(schema: &Value, fields: &[(&str, &str)]) -> Result<Value, String> {
        input(Some(schema), &fields.iter().copied().collect()).map_err(|problem| problem.detail().to_owned())
    }

    #[test]
    fn fields_become_the_types_of_the_schema() {
        let schema = json!({"required": ["id", "note"], "properties": {
            "id": {"type": "string"}, "n": {"type": "integer"}, "ok": {"type": "boolean"}, "share": {"type": "number"},
            "note": {"type": ["string", "null"]}, "items": {"type": "array"}, "more": {"type": "string"}}});
        let fields = [
            ("in.id", "7"),
            ("in.n", "7"),
            ("in.ok", "true"),
            ("in.share", "0.5"),
            ("in.note", ""),
            ("in.items", "[1]"),
            ("in.more", ""),
        ];
        let wanted = json!({"id": "7", "n": 7, "ok": true, "share": 0.5, "note": null, "items": [1]});
        assert_eq!(filled(&schema, &fields).unwrap(), wanted);
        assert_eq!(filled(&schema, &[("in.n", "x")]).unwrap_err(), "input.n: must be a whole number");
        assert!(filled(&schema, &[("in.items", "[")]).unwrap_err().starts_with("input.items: must be JSON"));
        assert_eq!(filled(&schema, &[("in.n", "x"), ("whole", r#"{"a": 1}"#)]).unwrap(), json!({"a": 1}));
    }

    #[test]
    fn a_secret_of_the_schema_is_not_filled_in_and_what_must_be_given_comes_first() {
        let schema = json!({"required": ["weight", "id"], "properties": {
            "api_token": {"type": "string", "default": "tok-1", "minLength": 3, "description": "Of the carrier"},
            "password": {"enum": ["hunter2"]}, "id": {"type": "string"}, "weight": {"type": "number"}}});
        let names: Vec<&String> = properties(Some(&schema)).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["weight", "id", "api_token", "password"]);
        let shown = |name: &str| field(name, &schema["properties"][name], false).into_string();
        let all = format!("{}{}", shown("api_token"), shown("password"));
        assert!(!all.contains("tok-1") && !all.contains("hunter2") && !all.contains("redacted"), "{all}");
        assert!(all.contains("type=\"password\"") && all.contains("Of the carrier"), "{all}");
        assert!(shown("id").contains("type=\"text\""));
    }

    #[test]
    fn what_is_required_but_not_described_is_json() {
        let schema = json!({"required": ["order"]});
        assert_eq!(filled(&schema, &[("in.order", r#"{"id": 1}"#)]).unwrap(), json!({"order": {"id": 1}}));
    }
}
