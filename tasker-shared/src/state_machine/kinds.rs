//! Kinds of values of a template: what JSON Schema says of each, and how a duration is stored.
//!
//! A field names its kind with `#[schemars(with = "…")]`. Where JSON Schema cannot express a rule,
//! `format` names it, and the reader of files (`template/formats.rs`) checks it.
//! `patternErrorMessage` is what editors and that reader say of a text that breaks the rule.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serializer};

use super::duration::parse_duration;

/// The most characters of a name.
pub const MAX_NAME_CHARS: usize = 40;
/// The most characters of a handler's name.
pub const MAX_HANDLER_CHARS: usize = 100;
/// The most characters of a version.
pub const MAX_VERSION_CHARS: usize = 64;
/// The largest limit.
pub const MAX_LIMIT: i32 = 1_000_000;
/// The most characters of an answer to a signal, and of the type of an error.
pub const MAX_WORD_CHARS: usize = 100;

/// Declares kinds that exist for their schema only.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident => $schema:tt)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub enum $kind {}

        impl JsonSchema for $kind {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($kind).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    )*};
}

kinds! {
    /// The name of a template, a step or a signal.
    Name => {
        "type": "string",
        "pattern": "^[a-z][a-z0-9_]*$",
        "maxLength": MAX_NAME_CHARS,
        "patternErrorMessage": format!(
            "may hold only a-z, 0-9 and _, start with a letter, and have at most {MAX_NAME_CHARS} characters"
        ),
    }
    /// A namespace, or a queue in it: `__` separates the two in the name of a PGMQ queue.
    QueuePart => {
        "type": "string",
        "pattern": "^[a-z](_?[a-z0-9])*$",
        "maxLength": MAX_NAME_CHARS,
        "patternErrorMessage": format!(
            "may hold only a-z, 0-9 and single _ between them, start with a letter, and have at most {MAX_NAME_CHARS} characters"
        ),
    }
    /// The name under which a worker registers code.
    Handler => {
        "type": "string",
        "pattern": r"^[a-z][a-z0-9_]*(\.[a-z0-9_]+)*$",
        "maxLength": MAX_HANDLER_CHARS,
        "patternErrorMessage": format!(
            "may hold only a-z, 0-9 and _ in parts separated by dots, start with a letter, and have at most {MAX_HANDLER_CHARS} characters"
        ),
    }
    /// A version. A number is refused with a reason of its own.
    Version => {
        "type": "string",
        "format": "tasker-version",
        "pattern": "^[!-~]+$",
        "maxLength": MAX_VERSION_CHARS,
        "patternErrorMessage": format!(
            "must have 1 to {MAX_VERSION_CHARS} printable ASCII characters without spaces, such as \"1.2.0\""
        ),
    }
    /// A JSON Schema; the reader of files compiles it.
    InputSchemaText => {
        "$ref": "https://json-schema.org/draft/2020-12/schema",
    }
    /// Any value that JSON can hold, but for nothing at all.
    Anything => {
        "type": ["object", "array", "string", "number", "boolean"],
    }
    /// The key by which tasks share a limit, or take turns.
    Key => {
        "type": "string",
        "minLength": 1,
        "examples": ["${input.customer_id}"],
    }
    /// A reference to a time, or a time.
    Time => {
        "type": "string",
        "format": "tasker-time",
        "pattern": r"\$\{|^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)$",
        "patternErrorMessage": "is neither a reference such as \"${input.at}\" nor a time such as 2030-01-31T12:00:00Z",
        "examples": ["${input.at}", "2030-01-31T12:00:00Z"],
    }
    /// An answer that a signal may bring.
    AnswerText => {
        "title": "answer",
        "type": "string",
        "pattern": r"\S",
        "maxLength": MAX_WORD_CHARS,
        "patternErrorMessage": format!("must have 1 to {MAX_WORD_CHARS} characters, such as approve"),
    }
    /// The type of an error that a handler reports.
    ErrorType => {
        "title": "error type",
        "type": "string",
        "pattern": r"\S",
        "maxLength": MAX_WORD_CHARS,
        "patternErrorMessage": format!("must have 1 to {MAX_WORD_CHARS} characters, such as CardDeclined"),
    }
    /// A share of the items of a map.
    Share => {
        "type": "string",
        "pattern": "^[1-9][0-9]?%$",
        "patternErrorMessage": "is neither a count of items nor a share from 1% to 99%",
        "examples": ["5%"],
    }
    /// How many a limit allows. Zero is refused with a reason of its own.
    LimitCount => {
        "type": "integer",
        "format": "tasker-limit",
        "minimum": 1,
        "maximum": MAX_LIMIT,
    }
    /// The lease of a claim: a duration of at least a second.
    Lease => {
        "type": "string",
        "format": "tasker-lease",
        "pattern": DURATION,
        "not": {"pattern": r"^([0a-z]*|\d{1,3}ms)$"},
        "patternErrorMessage": DURATION_RULE,
        "examples": ["10s"],
    }
}

/// Units largest first, each once, and a digit that is not zero.
const DURATION: &str = r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?$";
const DURATION_RULE: &str = "is not a duration; write whole numbers with a unit: 250ms, 30s, 5m, 1h30m or 7d";

/// A duration, for `#[serde(with = "Milliseconds")]`: a text such as `30s` in a file, whole
/// milliseconds where it is stored, so that SQL can compute with it. It reads both.
#[derive(Debug)]
pub enum Milliseconds {}

impl JsonSchema for Milliseconds {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "format": "tasker-duration",
            "pattern": DURATION,
            "not": {"pattern": "^[0a-z]*$"},
            "patternErrorMessage": DURATION_RULE,
            "examples": ["5s", "1h30m"],
        })
    }
}

impl Milliseconds {
    /// Writes whole milliseconds; finer parts are dropped.
    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(value.as_millis()).unwrap_or(u64::MAX))
    }

    /// Reads whole milliseconds, or the text of a file.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        from.deserialize_any(DurationVisitor)
    }
}

struct DurationVisitor;

impl Visitor<'_> for DurationVisitor {
    type Value = Duration;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("a duration in whole milliseconds")
    }

    fn visit_u64<E>(self, value: u64) -> Result<Duration, E> {
        Ok(Duration::from_millis(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Duration, E> {
        let value = u64::try_from(value).map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))?;
        Ok(Duration::from_millis(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Duration, E> {
        parse_duration(value).map_err(E::custom)
    }
}

/// As [`Milliseconds`], of a duration that may be absent: pair it with
/// `#[serde(default, skip_serializing_if = "Option::is_none")]`.
#[derive(Debug)]
pub enum OptionalMilliseconds {}

impl JsonSchema for OptionalMilliseconds {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        Milliseconds::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Milliseconds::json_schema(generator)
    }
}

impl OptionalMilliseconds {
    /// Writes whole milliseconds, or null.
    pub fn serialize<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => Milliseconds::serialize(value, to),
            None => to.serialize_none(),
        }
    }

    /// Reads whole milliseconds, the text of a file, or null.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        #[derive(Deserialize)]
        struct Present(#[serde(with = "Milliseconds")] Duration);
        Ok(Option::<Present>::deserialize(from)?.map(|Present(value)| value))
    }
}
