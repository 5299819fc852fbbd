//! What the user writes: a typed async function.
//!
//! Here a typed handler becomes one that takes and gives JSON. It never sees
//! the database.

use std::marker::PhantomData;

use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::context::StepContext;
use crate::error::StepError;

pub(crate) type Output = Result<Box<RawValue>, StepError>;

/// A handler whatever its types.
pub(crate) trait Handler: Send + Sync {
    fn call(&self, ctx: StepContext, input: Value) -> BoxFuture<'static, Output>;
}

/// A user's function with its types.
pub(crate) struct Typed<F, I> {
    function: F,
    input: PhantomData<fn(I)>,
}

impl<F, I> Typed<F, I> {
    pub(crate) fn new(function: F) -> Self {
        Self { function, input: PhantomData }
    }
}

impl<F, Fut, I, O, E> Handler for Typed<F, I>
where
    F: Fn(StepContext, I) -> Fut + Send + Sync,
    Fut: Future<Output = Result<O, E>> + Send + 'static,
    I: DeserializeOwned,
    O: Serialize,
    E: Into<StepError>,
{
    fn call(&self, ctx: StepContext, input: Value) -> BoxFuture<'static, Output> {
        let running = match parse_input(&input) {
            Ok(input) => (self.function)(ctx, input),
            Err(error) => return Box::pin(std::future::ready(Err(error))),
        };
        Box::pin(async move { write_output(&running.await.map_err(Into::into)?) })
    }
}

fn parse_input<I: DeserializeOwned>(input: &Value) -> Result<I, StepError> {
    I::deserialize(input).or_else(|_| {
        // Again, slower, now that it is known to matter where it goes wrong.
        serde_path_to_error::deserialize(input).map_err(|error| {
            let path = error.path().to_string();
            let place = if path == "." { "input".to_owned() } else { format!("input.{path}") };
            StepError::fail(
                "invalid_input",
                format!("{place}: {}", problem(&error.into_inner().to_string(), input, &path)),
            )
        })
    })
}

/// What serde says without the value it says it of: a value may be a secret.
fn problem(serde_says: &str, input: &Value, path: &str) -> String {
    if ["missing field", "unknown field", "duplicate field"].iter().any(|start| serde_says.starts_with(start)) {
        return serde_says.to_owned();
    }
    let known = ["invalid type: ", "invalid value: ", "invalid length ", "unknown variant "];
    let expected = known
        .iter()
        .any(|start| serde_says.starts_with(start))
        .then(|| serde_says.rsplit_once(", expected "))
        .flatten()
        .map_or("what the handler's type accepts", |(_, expected)| expected);
    format!("is {}; the handler needs {expected}", shape(at(input, path)))
}

fn at<'v>(input: &'v Value, path: &str) -> Option<&'v Value> {
    if path == "." {
        return Some(input);
    }
    path.split(['.', '[', ']']).filter(|part| !part.is_empty()).try_fold(input, |value, part| match value {
        Value::Array(items) => items.get(part.parse::<usize>().ok()?),
        other => other.get(part),
    })
}

fn shape(value: Option<&Value>) -> &'static str {
    match value {
        None => "a value of another kind",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a boolean",
        Some(Value::Number(_)) => "a number",
        Some(Value::String(_)) => "a string",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}

/// Beyond this an output is not even sent; the database's own limit is usually far lower.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
const MAX_OUTPUT_DEPTH: usize = 64;

fn write_output<O: Serialize>(output: &O) -> Output {
    let text = serde_json::value::to_raw_value(output)
        .map_err(|error| StepError::fail("invalid_output", format!("the output cannot be written as JSON: {error}")))?;
    match refusal(text.get()) {
        None => Ok(text),
        Some((kind, problem)) => Err(StepError::fail(kind, problem)),
    }
}

/// Why the database would refuse this JSON text, which would cost the other results of its batch.
fn refusal(json: &str) -> Option<(&'static str, String)> {
    if json.len() > MAX_OUTPUT_BYTES {
        return Some((
            "output_too_large",
            format!("the output has {} bytes; store it elsewhere and return a reference", json.len()),
        ));
    }
    let (mut depth, mut deepest, mut in_string) = (0_usize, 0, false);
    let mut bytes = json.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'"' => in_string = !in_string,
            b'\\' => {
                if json[at..].starts_with("\\u0000") {
                    return Some((
                        "invalid_output",
                        "the output has a NUL character in a string, which PostgreSQL cannot store; remove it".into(),
                    ));
                }
                bytes.next();
            }
            b'{' | b'[' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    (deepest > MAX_OUTPUT_DEPTH).then(|| {
        (
            "invalid_output",
            format!("the output is nested {deepest} deep, the limit is {MAX_OUTPUT_DEPTH}; make it flatter"),
        )
    })
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;
    use crate::error::short_type_name;

    #[derive(Debug, Deserialize)]
    struct Order {
        #[expect(dead_code, reason = "only its type counts")]
        lines: Vec<Line>,
    }

    #[derive(Debug, Deserialize)]
    struct Line {
        #[expect(dead_code, reason = "only its type counts")]
        amount: u32,
    }

    #[test]
    fn an_input_that_does_not_fit_is_told_by_its_field_and_never_by_its_value() {
        let refused = |input: Value| match parse_input::<Order>(&input) {
            Err(StepError::Fail { kind, message }) => {
                assert_eq!(kind, "invalid_input");
                message
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(json!({})), "input: missing field `lines`");
        assert_eq!(refused(json!({"lines": [{"amount": 1}, {}]})), "input.lines[1]: missing field `amount`");
        assert_eq!(
            refused(json!({"lines": [{"amount": "4111, expected 1111"}]})),
            "input.lines[0].amount: is a string; the handler needs u32"
        );
        assert_eq!(
            refused(json!({"lines": [{"amount": -5}]})),
            "input.lines[0].amount: is a number; the handler needs u32"
        );
        assert_eq!(refused(json!(null)), "input: is null; the handler needs struct Order");
        assert!(parse_input::<Order>(&json!({"lines": [{"amount": 1}]})).is_ok());
    }

    #[test]
    fn any_error_becomes_a_retryable_one_named_after_its_type() {
        #[derive(Debug, thiserror::Error)]
        #[error("the bank is away")]
        struct BankAway<T: std::fmt::Debug>(T, #[source] std::num::ParseIntError);

        let cause = "x".parse::<i32>().unwrap_err();
        assert_eq!(StepError::from(cause.clone()), StepError::retry("ParseIntError", "invalid digit found in string"));
        assert_eq!(
            StepError::from(BankAway(std::collections::HashMap::<u8, u8>::new(), cause)),
            StepError::retry("BankAway", "the bank is away: invalid digit found in string")
        );
        assert_eq!(short_type_name("dyn std::error::Error"), "Error");
        assert_eq!(short_type_name("&std::io::Error"), "Error");
    }

    #[test]
    fn outputs_that_the_database_would_refuse_are_refused_here() {
        let kind = |output: Value| match write_output(&output) {
            Ok(_) => None,
            Err(StepError::Fail { kind, .. }) => Some(kind),
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!(kind(json!({"a": "\\u0000 as text, \"{[{[\""})), None);
        assert_eq!(kind(json!({"a": "nul \0"})).as_deref(), Some("invalid_output"));
        assert_eq!(kind(json!({"nul \0": 1})).as_deref(), Some("invalid_output"));
        let nested = |depth: usize| (0..depth).fold(json!(1), |inner, _| json!([inner]));
        assert_eq!(kind(nested(64)), None);
        assert_eq!(kind(nested(65)).as_deref(), Some("invalid_output"));
        assert_eq!(kind(json!("x".repeat(MAX_OUTPUT_BYTES))).as_deref(), Some("output_too_large"));
    }
}
