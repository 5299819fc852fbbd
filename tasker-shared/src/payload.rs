//! What PostgreSQL cannot keep of JSON that this program can hold: the character U+0000, and values
//! that nest too deep. One of them fails the whole call that it is part of.

use serde_json::Value;

/// The deepest that a payload may nest; the database refuses deeper ones as well.
pub const MAX_DEPTH: usize = 64;

/// Why a value cannot be kept, or `None`.
pub fn problem(value: &Value) -> Option<&'static str> {
    look(value, MAX_DEPTH)
}

/// Why a text cannot be kept, or `None`.
pub fn text_problem(text: &str) -> Option<&'static str> {
    text.contains('\0').then_some("holds the character U+0000, which PostgreSQL cannot store; leave it out")
}

fn look(value: &Value, left: usize) -> Option<&'static str> {
    match value {
        Value::String(text) => text_problem(text),
        Value::Array(items) if items.is_empty() => None,
        Value::Object(entries) if entries.is_empty() => None,
        Value::Array(_) | Value::Object(_) if left == 0 => {
            Some("nests deeper than 64 levels; flatten it, or store it elsewhere and pass a reference")
        }
        Value::Array(items) => items.iter().find_map(|item| look(item, left - 1)),
        Value::Object(entries) => {
            entries.iter().find_map(|(key, value)| text_problem(key).or_else(|| look(value, left - 1)))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

/// A text with U+FFFD in the place of what cannot be kept.
pub fn clean_text(text: &mut String) {
    if text.contains('\0') {
        *text = text.replace('\0', "\u{fffd}");
    }
}

/// The same of all texts and keys of a value that does not nest too deep.
pub fn clean(value: &mut Value) {
    match value {
        Value::String(text) => clean_text(text),
        Value::Array(items) => items.iter_mut().for_each(clean),
        Value::Object(entries) => {
            if entries.keys().any(|key| key.contains('\0')) {
                *entries = std::mem::take(entries)
                    .into_iter()
                    .map(|(mut key, value)| {
                        clean_text(&mut key);
                        (key, value)
                    })
                    .collect();
            }
            entries.values_mut().for_each(clean);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_database_cannot_hold_is_found_and_cleaned() {
        let mut bad = json!({"a\0": [1, "b\0c", {"d": "e"}]});
        for value in [&bad, &json!("\0"), &json!({"k\0": null}), &json!([["\0"]])] {
            assert!(problem(value).is_some_and(|why| why.contains("U+0000")), "{value}");
        }
        clean(&mut bad);
        assert_eq!(bad, json!({"a\u{fffd}": [1, "b\u{fffd}c", {"d": "e"}]}));
        assert_eq!(problem(&bad), None);
    }

    #[test]
    fn depth_is_counted_as_the_database_counts_it() {
        let nested = |levels: usize| (0..levels).fold(json!(1), |value, _| json!([value]));
        assert_eq!(problem(&nested(64)), None);
        assert!(problem(&nested(65)).is_some_and(|why| why.contains("64 levels")));
    }
}
