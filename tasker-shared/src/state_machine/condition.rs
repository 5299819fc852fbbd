//! `when:` of a step: one test of one value.
//!
//! Pure, and deliberately not a language: a choice that takes more than a comparison belongs in
//! a handler whose step has `branches:`.

use std::cmp::Ordering;

use serde_json::{Number, Value};

use super::input::{Found, Reference, Scope, kind};

/// A parsed condition such as `${input.total} >= 100` or `${steps.check.output.note} is present`.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition {
    reference: Reference,
    test: Test,
    /// As written, for messages.
    text: String,
}

#[derive(Debug, Clone, PartialEq)]
enum Test {
    Present,
    Absent,
    Equal(Value),
    NotEqual(Value),
    /// A number or a text, and the orderings that fulfil it.
    Ordered(Value, &'static [Ordering]),
}

const SHAPE: &str = "write `${path} == value` (or !=, <, <=, >, >= with a number or a \"text\"), \
                     `${path} is present` or `${path} is absent`";

impl Condition {
    /// Reads a condition; the error says what is wrong and what to write.
    pub fn parse(written: &str) -> Result<Self, String> {
        let trimmed = written.trim();
        let end = trimmed.find('}').filter(|_| trimmed.starts_with("${"));
        let Some(end) = end else {
            return Err(format!("does not begin with a reference; {SHAPE}"));
        };
        let reference = Reference::parse_whole(&trimmed[..=end])?;
        let rest = trimmed[end + 1..].trim();
        let test = match rest {
            "is present" => Test::Present,
            "is absent" => Test::Absent,
            _ => comparison(rest)?,
        };
        Ok(Self { reference, test, text: trimmed.to_owned() })
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What it looks at.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The JSON types that the value may have for the test to make sense, by their names in JSON
    /// Schema; `None` if any will do.
    pub fn types(&self) -> Option<&'static [&'static str]> {
        match &self.test {
            Test::Equal(value) | Test::NotEqual(value) | Test::Ordered(value, _) => match value {
                Value::Number(_) => Some(&["number", "integer"]),
                Value::String(_) => Some(&["string"]),
                Value::Bool(_) => Some(&["boolean"]),
                _ => None,
            },
            Test::Present | Test::Absent => None,
        }
    }

    /// Whether it holds. A path that leads nowhere is like null: absent, equal to null alone, and
    /// neither less nor greater than anything. Ordering a value of another kind is an error, in
    /// words for a person.
    pub fn holds(&self, scope: Scope<'_, '_>) -> Result<bool, String> {
        let value = match self.reference.read(scope) {
            Ok(value) => value,
            Err(found @ Found::NoItem) => return Err(format!("when reads ${{{}}}, but {found}", self.reference)),
            Err(_) => &Value::Null,
        };
        Ok(match &self.test {
            Test::Present => !value.is_null(),
            Test::Absent => value.is_null(),
            Test::Equal(wanted) => equal(value, wanted),
            Test::NotEqual(wanted) => !equal(value, wanted),
            Test::Ordered(..) if value.is_null() => false,
            Test::Ordered(wanted, orderings) => match (value, wanted) {
                (Value::Number(a), Value::Number(b)) => orderings.contains(&order(a, b)),
                (Value::String(a), Value::String(b)) => orderings.contains(&a.cmp(b)),
                _ => {
                    return Err(format!(
                        "when compares ${{{}}} with {}, but it is {}",
                        self.reference,
                        kind(wanted),
                        kind(value)
                    ));
                }
            },
        })
    }
}

fn comparison(rest: &str) -> Result<Test, String> {
    const OPERATORS: [&str; 6] = ["==", "!=", "<=", ">=", "<", ">"];
    let split = OPERATORS.iter().find_map(|operator| Some((*operator, rest.strip_prefix(operator)?)));
    let Some((operator, literal)) = split else {
        return Err(format!("has no comparison after the reference; {SHAPE}"));
    };
    let value: Value = serde_json::from_str(literal.trim()).map_err(|_| {
        format!("`{}` is not a JSON value; put a text in double quotes, as in `== \"express\"`", literal.trim())
    })?;
    if value.is_array() || value.is_object() {
        return Err(format!("compares with {}; compare with a number, a text, true, false or null", kind(&value)));
    }
    let orderings: &[Ordering] = match operator {
        "==" => return Ok(Test::Equal(value)),
        "!=" => return Ok(Test::NotEqual(value)),
        "<" => &[Ordering::Less],
        "<=" => &[Ordering::Less, Ordering::Equal],
        ">" => &[Ordering::Greater],
        _ => &[Ordering::Greater, Ordering::Equal],
    };
    if value.is_number() || value.is_string() {
        return Ok(Test::Ordered(value, orderings));
    }
    Err(format!("{} has no order, so `{operator}` makes no sense; use == or !=", kind(&value)))
}

fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => order(a, b) == Ordering::Equal,
        _ => a == b,
    }
}

/// Whole numbers are compared exactly, others as doubles; JSON has no number that is not one.
fn order(a: &Number, b: &Number) -> Ordering {
    let whole = |n: &Number| n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from));
    match (whole(a), whole(b)) {
        (Some(a), Some(b)) => a.cmp(&b),
        _ => a.as_f64().partial_cmp(&b.as_f64()).unwrap_or(Ordering::Equal),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn holds(text: &str) -> Result<bool, String> {
        let input = json!({"total": 100, "big": 9_007_199_254_740_993_i64, "rate": 0.5, "kind": "express", "note": null, "gift": true, "tags": []});
        let check = json!({"score": 7});
        let outputs = |step: &str| (step == "check").then_some(&check);
        let absent = |step: &str| step == "skipped";
        Condition::parse(text)?.holds(Scope { input: &input, outputs: &outputs, absent: &absent, item: None })
    }

    #[test]
    fn conditions_compare_as_json_does() {
        for (text, expected) in [
            ("${input.total} == 100", true),
            ("${input.total} == 100.0", true),
            ("${input.total}>=100", true),
            ("${input.total} > 100", false),
            ("${input.total} != 100", false),
            ("${input.big} > 9007199254740992", true),
            ("${input.rate} < 1", true),
            ("${input.kind} == \"express\"", true),
            ("${input.kind} < \"f\"", true),
            ("${input.kind} == 1", false),
            ("${input.gift} == true", true),
            ("${input.note} is absent", true),
            ("${input.note} == null", true),
            ("${input.nowhere.at.all} is absent", true),
            ("${input.nowhere} != 3", true),
            ("${input.nowhere} < 3", false),
            ("${input.tags} is present", true),
            ("${steps.check.output.score} <= 7", true),
            ("${steps.skipped.output.score} is present", false),
            ("${steps.skipped.output.score} > 1", false),
        ] {
            assert_eq!(holds(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn ordering_values_of_two_kinds_is_explained() {
        assert_eq!(
            holds("${input.kind} > 3").unwrap_err(),
            "when compares ${input.kind} with a number, but it is a string"
        );
    }

    #[test]
    fn what_is_no_condition_is_refused_with_what_to_write() {
        for (text, says) in [
            ("input.total > 3", "does not begin with a reference"),
            ("${total} > 3", "starts with neither"),
            ("${input.total}", "has no comparison"),
            ("${input.total} = 3", "has no comparison"),
            ("${input.total} > ${input.other}", "is not a JSON value"),
            ("${input.kind} == express", "put a text in double quotes"),
            ("${input.total} > true", "has no order"),
            ("${input.total} == [1]", "compares with a list"),
            ("${input.total} is missing", "has no comparison"),
        ] {
            let error = Condition::parse(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
