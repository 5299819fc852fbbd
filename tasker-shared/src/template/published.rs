//! The JSON Schema of a template file, derived from the types of the document.
//!
//! Editors complete and check with it, and the reader of files follows it. It describes the form of
//! a file, never the stored one.

use std::sync::LazyLock;
use std::time::Duration;

use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform as _};
use schemars::{JsonSchema as _, Schema};
use serde_json::{Map, Value, json};

use super::Template;
use super::cross_checks::{NOT_IN_TASKS, NOT_IN_WAITS};
use crate::state_machine::duration::format_duration;

/// JSON Schema 2020-12 of a template file.
pub fn schema() -> &'static Value {
    static SCHEMA: LazyLock<Value> = LazyLock::new(generate);
    &SCHEMA
}

fn generate() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    let mut generator = settings.into_generator();
    let mut schema = Template::json_schema(&mut generator);
    RecursiveTransform(as_written).transform(&mut schema);
    let step = schema.pointer_mut("/properties/steps/items").and_then(Value::as_object_mut);
    step.expect("steps are a list of mappings").insert("dependentSchemas".to_owned(), beside_each_other());
    schema.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
    schema.insert("$id".to_owned(), json!("urn:tasker:template"));
    schema.insert("title".to_owned(), json!("Tasker template"));
    schema.to_value()
}

/// Which keys of a step mean nothing beside another one.
fn beside_each_other() -> Value {
    let excluding = |excluded: &[(&str, &str)]| {
        let nothing = |(key, advice): &(&str, &str)| ((*key).to_owned(), json!({"not": {}, "errorMessage": advice}));
        let mut properties: Map<String, Value> = excluded.iter().map(nothing).collect();
        properties.insert("timeouts".to_owned(), json!({"propertyNames": {"const": "total"}}));
        json!({ "properties": properties })
    };
    json!({"wait": excluding(&NOT_IN_WAITS), "task": excluding(&NOT_IN_TASKS)})
}

/// A file never says null: a key without a value is a mistake. Defaults stand as a file says them.
fn as_written(schema: &mut Schema) {
    let Some(keys) = schema.as_object_mut() else {
        return;
    };
    if let Some(Value::Array(types)) = keys.get_mut("type") {
        types.retain(|name| name != "null");
        if let [only] = &types[..] {
            let only = only.clone();
            keys.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(alternatives)) = keys.get_mut("anyOf") {
        alternatives.retain(|alternative| *alternative != json!({"type": "null"}));
        if let [Value::Object(only)] = &mut alternatives[..] {
            let only: Map<String, Value> = std::mem::take(only);
            keys.remove("anyOf");
            for (key, value) in only {
                keys.entry(key).or_insert(value);
            }
        }
    }
    let format = keys.get("format").and_then(Value::as_str).unwrap_or_default();
    let is_duration = matches!(format, "tasker-duration" | "tasker-lease");
    // Widths of numbers are no formats of JSON Schema; `minimum` and `maximum` say the same.
    if !format.is_empty() && !format.starts_with("tasker-") {
        keys.remove("format");
    }
    match keys.get("default").cloned() {
        Some(Value::Number(ms)) if is_duration => {
            let text = format_duration(Duration::from_millis(ms.as_u64().unwrap_or_default()));
            keys.insert("default".to_owned(), json!(text));
        }
        Some(Value::Null) => {
            keys.remove("default");
        }
        Some(Value::Array(items)) if items.is_empty() => {
            keys.remove("default");
        }
        _ => {}
    }
}
