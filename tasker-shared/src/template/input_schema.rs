//! `input_schema`: a JSON Schema 2020-12, compiled once and asked often.
//!
//! It runs in the orchestrator on schemas and inputs that others wrote, so it
//! never fetches anything, matches patterns in linear time, and puts no value
//! of an input into a message.

use jsonschema::error::ValidationErrorKind;
use jsonschema::{Draft, PatternOptions, ValidationError, Validator};
use serde_json::Value;

/// How many violations of one input are reported.
const MAX_VIOLATIONS: usize = 20;

/// The most characters of one violation; enumerations can be very long.
const MAX_MESSAGE_CHARS: usize = 300;

/// The dialect that `$schema` may name.
const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";

/// A compiled `input_schema`. Compiling costs far more than checking; keep it.
#[derive(Debug)]
pub struct InputSchema(Validator);

/// A schema that cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SchemaError {
    /// JSON pointer into the schema; empty for the schema as a whole.
    pub pointer: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl InputSchema {
    /// Compiles a schema. References must stay inside it, and patterns are
    /// regular expressions without look-around or back-references.
    pub fn compile(schema: &Value) -> Result<Self, SchemaError> {
        let wrong = |pointer: &str, message: String| Err(SchemaError { pointer: pointer.to_owned(), message });
        if !(schema.is_object() || schema.is_boolean()) {
            return wrong("", "a JSON Schema is an object; write keys such as type".to_owned());
        }
        if let Some(dialect) = schema.get("$schema")
            && dialect.as_str().map(|uri| uri.trim_end_matches('#')) != Some(DIALECT)
        {
            return wrong("/$schema", format!("must be {DIALECT}, or left out"));
        }
        let compiled = jsonschema::options()
            .with_draft(Draft::Draft202012)
            .with_pattern_options(PatternOptions::regex())
            .offline()
            .build(schema);
        match compiled {
            Ok(validator) => Ok(Self(validator)),
            Err(error) => wrong(
                error.instance_path().as_str(),
                format!("is not valid JSON Schema 2020-12: {}", shortened(error.to_string(), MAX_MESSAGE_CHARS)),
            ),
        }
    }

    /// Checks a task's input. Each message names the path in the input and
    /// the rule, never the value; at most 20 of them.
    pub fn check(&self, input: &Value) -> Result<(), Vec<String>> {
        if self.0.is_valid(input) {
            return Ok(());
        }
        let mut errors = self.0.iter_errors(input);
        let mut messages: Vec<String> = errors.by_ref().take(MAX_VIOLATIONS - 1).map(|error| message(&error)).collect();
        if errors.next().is_some() {
            messages.push("and more".to_owned());
        }
        Err(messages)
    }
}

fn message(error: &ValidationError<'_>) -> String {
    let path = error.instance_path().as_str();
    let rule = match error.kind() {
        // Its own masking shows the offending name through the inner error.
        ValidationErrorKind::PropertyNames { error } => {
            format!("has a key that is not allowed: {}", error.masked_with("the key"))
        }
        _ => error.masked_with("the value").to_string(),
    };
    let path = shortened(format!("input{path}"), MAX_MESSAGE_CHARS);
    format!("{path}: {}", shortened(rule, MAX_MESSAGE_CHARS))
}

fn shortened(mut text: String, most: usize) -> String {
    if let Some((cut, _)) = text.char_indices().nth(most) {
        text.truncate(cut);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn violations(schema: &Value, input: &Value) -> Vec<String> {
        InputSchema::compile(schema).expect("a schema").check(input).unwrap_err()
    }

    #[test]
    fn violations_name_path_and_rule() {
        let schema = json!({
            "type": "object",
            "required": ["order_id"],
            "properties": {"items": {"items": {"properties": {"quantity": {"minimum": 1}}}}},
        });
        let schema = InputSchema::compile(&schema).unwrap();
        assert_eq!(schema.check(&json!({"order_id": "a", "items": [{"quantity": 1}]})), Ok(()));
        assert_eq!(
            schema.check(&json!({"items": [{"quantity": 1}, {"quantity": -7}]})),
            Err(vec![
                "input: \"order_id\" is a required property".to_owned(),
                "input/items/1/quantity: the value is less than the minimum of 1".to_owned(),
            ])
        );
    }

    #[test]
    fn no_violation_shows_a_value() {
        let secret = "4111-1111";
        let schemas = [
            json!({"type": "integer"}),
            json!({"type": ["integer", "null"]}),
            json!({"const": "other"}),
            json!({"enum": ["other", 1]}),
            json!({"maxLength": 3}),
            json!({"minLength": 30}),
            json!({"pattern": "^x$"}),
            json!({"not": {"type": "string"}}),
            json!({"anyOf": [{"type": "null"}, {"maxLength": 1}]}),
            json!({"oneOf": [{"type": "null"}, {"maxLength": 1}]}),
            json!({"oneOf": [{"type": "string"}, {"minLength": 1}]}),
            json!({"allOf": [{"type": "null"}]}),
            json!({"if": {"type": "string"}, "then": false}),
            json!(false),
        ];
        let bad = json!(secret);
        let containers = [
            (json!({"items": {"type": "null"}}), json!([secret])),
            (json!({"contains": {"type": "null"}}), json!([secret])),
            (json!({"maxItems": 0}), json!([secret])),
            (json!({"uniqueItems": true}), json!([secret, secret])),
            (json!({"prefixItems": [{}], "items": false}), json!([1, secret])),
            (json!({"unevaluatedItems": false}), json!([secret])),
            (json!({"properties": {"a": {"type": "null"}}}), json!({"a": secret})),
            (json!({"additionalProperties": false}), json!({"a": secret})),
            (json!({"unevaluatedProperties": false}), json!({"a": secret})),
            (json!({"required": ["b"]}), json!({"a": secret})),
            (json!({"dependentRequired": {"a": ["b"]}}), json!({"a": secret})),
            (json!({"propertyNames": {"maxLength": 2}}), json!({secret: 1})),
            (json!({"propertyNames": {"pattern": "^x$"}}), json!({secret: 1})),
        ];
        let scalars = schemas.into_iter().map(|schema| (schema, bad.clone()));
        for (schema, input) in scalars.chain(containers) {
            let messages = violations(&schema, &input);
            assert!(!messages.is_empty(), "{schema}");
            for message in messages {
                assert!(!message.contains(secret), "{schema}: {message}");
            }
        }
    }

    #[test]
    fn many_violations_are_told_in_short() {
        let messages = violations(&json!({"items": {"type": "null"}}), &json!(vec![1; 5000]));
        assert_eq!(messages.len(), MAX_VIOLATIONS);
        assert_eq!(messages.last().unwrap(), "and more");
        let options: Vec<String> = (0..1000).map(|n| format!("option-{n}")).collect();
        let messages = violations(&json!({"enum": options}), &json!(1));
        assert!(messages[0].chars().count() < MAX_MESSAGE_CHARS + 20, "{messages:?}");
    }

    #[test]
    fn schemas_that_reach_outside_or_backtrack_are_refused() {
        for (schema, pointer) in [
            (json!({"$ref": "https://example.com/order.json"}), ""),
            (json!({"$ref": "file:///etc/passwd"}), ""),
            (json!({"$ref": "#/$defs/missing"}), ""),
            (json!({"$schema": "http://json-schema.org/draft-07/schema#"}), "/$schema"),
            (json!({"$schema": 7}), "/$schema"),
            (json!({"type": "objekt"}), "/type"),
            (json!({"properties": {"a": {"minimum": "1"}}}), "/properties/a/minimum"),
            (json!([1]), ""),
            (json!("object"), ""),
        ] {
            let error = InputSchema::compile(&schema).unwrap_err();
            assert_eq!(error.pointer, pointer, "{schema}: {error}");
        }
        for pattern in ["(", "(?=a)b", r"(a)\1"] {
            assert!(InputSchema::compile(&json!({"pattern": pattern})).is_err(), "{pattern}");
        }
        let dialect = json!({"$schema": DIALECT, "type": "object"});
        assert!(InputSchema::compile(&dialect).is_ok());
    }

    /// References in a circle must neither overflow the stack nor run forever.
    #[test]
    fn circular_references_end() {
        for schema in [
            json!({"$ref": "#"}),
            json!({"allOf": [{"$ref": "#"}]}),
            json!({"$ref": "#/$defs/a",
                   "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
            json!({"not": {"$ref": "#"}}),
            json!({"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
            json!({"$dynamicRef": "#a", "$dynamicAnchor": "a"}),
        ] {
            if let Ok(schema) = InputSchema::compile(&schema) {
                let _ = schema.check(&json!({"a": [1]}));
            }
        }
        let tree = json!({"properties": {"child": {"$ref": "#"}, "n": {"type": "integer"}}});
        let messages = violations(&tree, &json!({"child": {"child": {"n": "x"}}}));
        assert_eq!(messages, ["input/child/child/n: the value is not of type \"integer\""]);
    }
}
