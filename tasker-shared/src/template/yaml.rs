//! YAML text -> a tree in which every node knows its line and column.
//!
//! It knows nothing of templates. Reading into a tree first, and into the
//! definition from there, lets all mistakes be reported at once.

use std::fmt;
use std::panic::resume_unwind;
use std::thread;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Error, Location, Spanned, UserMessageFormatter};

use crate::state_machine::input::Segment;

/// Deep enough for the limit of a definition to be reported with its key, and
/// shallow enough for any thread's stack.
const MAX_YAML_DEPTH: usize = 100;

/// A line and a column of the file, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub line: u64,
    pub column: u64,
}

impl From<Location> for Position {
    fn from(location: Location) -> Self {
        Self { line: location.line(), column: location.column() }
    }
}

#[derive(Debug)]
pub(super) struct Node {
    pub at: Position,
    pub kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub key: String,
    pub key_at: Position,
    pub value: Node,
}

/// Stack for [`MAX_YAML_DEPTH`] levels. The deserializer takes about 35 KB a
/// level when not optimized, more than an ordinary thread has.
const STACK_BYTES: usize = 16 * 1024 * 1024;

/// Reads one document. The error is the first thing that is not YAML.
pub(super) fn read(text: &str) -> Result<Node, (Position, String)> {
    let start = Position { line: 1, column: 1 };
    thread::scope(|scope| {
        let reader = thread::Builder::new().stack_size(STACK_BYTES);
        match reader.spawn_scoped(scope, || parse(text)) {
            Ok(reader) => reader.join().unwrap_or_else(|panic| resume_unwind(panic)),
            Err(error) => Err((start, format!("no thread could be started to read it: {error}"))),
        }
    })
}

fn parse(text: &str) -> Result<Node, (Position, String)> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_YAML_DEPTH,
            flow_nesting_limit: MAX_YAML_DEPTH,
            max_documents: 1,
            // The file's size bounds these; the limits stop aliases from
            // multiplying it.
            max_nodes: 2_000_000,
            max_events: 4_000_000,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
        non_finite_float_policy: NonFiniteFloatPolicy::Reject,
        // `NO` is a country and `on` an event; only true and false are booleans.
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    let read = serde_saphyr::from_str_with_options::<Node>(text, options);
    read.map_err(|error| explain(error.without_snippet()))
}

fn explain(error: &Error) -> (Position, String) {
    let at = error.location().map_or(Position { line: 1, column: 1 }, Position::from);
    let message = error.render_with_formatter(&UserMessageFormatter);
    // The rendering ends with the position, which a problem shows in front.
    let message = message.split(" at line ").next().unwrap_or_default();
    let message = match message {
        "expected string scalar" => "a key must be a plain text",
        deep if deep.contains("Depth {") || deep.contains("recursion limit") => "lists and mappings nest too deep",
        several if several.contains("Documents {") => "the file holds more than one document",
        other => other,
    };
    (at, message.replace('\n', " "))
}

impl Node {
    /// What the node is, for messages.
    pub(super) fn kind_name(&self) -> &'static str {
        match self.kind {
            Kind::Null => "empty",
            Kind::Bool(_) => "a boolean",
            Kind::Number(_) => "a number",
            Kind::Text(_) => "a text",
            Kind::List(_) => "a list",
            Kind::Map(_) => "a mapping",
        }
    }

    /// The value of a key of a mapping.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        let Kind::Map(entries) = &self.kind else {
            return None;
        };
        entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
    }

    /// The node as JSON.
    pub(super) fn to_value(&self) -> Value {
        match &self.kind {
            Kind::Null => Value::Null,
            Kind::Bool(value) => Value::Bool(*value),
            Kind::Number(value) => Value::Number(value.clone()),
            Kind::Text(value) => Value::String(value.clone()),
            Kind::List(items) => items.iter().map(Self::to_value).collect(),
            Kind::Map(entries) => {
                let entries = entries.iter().map(|e| (e.key.clone(), e.value.to_value()));
                Value::Object(entries.collect::<Map<_, _>>())
            }
        }
    }

    /// The position of what `path` leads to, or of the last node on the way.
    pub(super) fn position_of(&self, path: &[Segment]) -> Position {
        let Some((first, rest)) = path.split_first() else {
            return self.at;
        };
        let inner = match (&self.kind, first) {
            (Kind::List(items), Segment::Index(index)) => items.get(*index),
            (Kind::Map(_), Segment::Key(key)) => self.get(key),
            _ => None,
        };
        inner.map_or(self.at, |inner| inner.position_of(rest))
    }

    /// The position of the first node that nests more than `levels` levels of
    /// lists and mappings down.
    pub(super) fn deeper_than(&self, levels: usize) -> Option<Position> {
        let below = |node: &Self| node.deeper_than(levels - 1);
        match &self.kind {
            Kind::List(_) | Kind::Map(_) if levels == 0 => Some(self.at),
            Kind::List(items) => items.iter().find_map(below),
            Kind::Map(entries) => entries.iter().map(|entry| &entry.value).find_map(below),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Kind>::deserialize(from)?;
        Ok(Self { at: spanned.referenced.into(), kind: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(KindVisitor)
    }
}

struct KindVisitor;

impl<'de> Visitor<'de> for KindVisitor {
    type Value = Kind;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("any YAML value that JSON can hold")
    }

    fn visit_unit<E>(self) -> Result<Kind, E> {
        Ok(Kind::Null)
    }

    fn visit_none<E>(self) -> Result<Kind, E> {
        Ok(Kind::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Kind, E> {
        Ok(Kind::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Kind, E> {
        Ok(Kind::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Kind, E> {
        Ok(Kind::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Kind, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("not a finite number"))?;
        Ok(Kind::Number(number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Kind, E> {
        Ok(Kind::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Kind, E> {
        Ok(Kind::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Kind, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = from.next_element()? {
            items.push(item);
        }
        Ok(Kind::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Kind, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = from.next_key::<Spanned<String>>()? {
            let value = from.next_value()?;
            entries.push(Entry { key: key.value, key_at: key.referenced.into(), value });
        }
        Ok(Kind::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn position(line: u64, column: u64) -> Position {
        Position { line, column }
    }

    #[test]
    fn every_node_knows_its_position() {
        let node = read("a: 1\nb:\n  - x\n  - {c: [true]}\n").unwrap();
        let key = |key: &str| Segment::Key(key.to_owned());
        assert_eq!(node.to_value(), json!({"a": 1, "b": ["x", {"c": [true]}]}));
        assert_eq!(node.at, position(1, 1));
        assert_eq!(node.position_of(&[key("a")]), position(1, 4));
        assert_eq!(node.position_of(&[key("b"), Segment::Index(0)]), position(3, 5));
        assert_eq!(node.position_of(&[key("b"), Segment::Index(1), key("c")]), position(4, 9));
        let Kind::Map(entries) = &node.kind else { panic!("a mapping") };
        assert_eq!(entries[1].key_at, position(2, 1));
    }

    #[test]
    fn scalars_keep_their_json_type() {
        let node = read("[1, -2, 1.5, 1e3, yes, NO, on, true, False, '1', ~, null, '', 0x10, 2024-01-01]");
        assert_eq!(
            node.unwrap().to_value(),
            json!([1, -2, 1.5, 1000.0, "yes", "NO", "on", true, false, "1", null, null, "", 16, "2024-01-01"])
        );
    }

    #[test]
    fn anchors_and_merge_keys_are_expanded() {
        let node = read("a: &x {b: 1, c: 2}\nd: *x\ne: {<<: *x, c: 3}\n").unwrap();
        assert_eq!(node.to_value(), json!({"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 2}, "e": {"b": 1, "c": 3}}));
    }

    #[test]
    fn what_is_not_yaml_is_refused_with_its_position() {
        for (text, line, expected) in [
            ("a: 1\nb: [1, 2\n", 2, "unclosed bracket '['"),
            ("a: 1\na: 2\n", 2, "duplicate mapping key: a not allowed here"),
            ("a: 1\n\tb: 2\n", 1, "while scanning a plain scalar, found a tab"),
            ("a: .nan\n", 1, "value `.nan` is not a finite number"),
            ("a: !custom 1\n", 1, "unsupported tag `!custom`"),
            ("a: *missing\n", 1, "reference to unknown value"),
            ("a: &a [*a]\n", 1, "Recursive reference not allowed here"),
            ("a: 1\n---\nb: 2\n", 2, "the file holds more than one document"),
            ("a: 'x\n", 2, "invalid indentation in multiline quoted scalar"),
            ("a:\n  ? [1]\n  : 2\n", 2, "a key must be a plain text"),
        ] {
            let (at, message) = read(text).unwrap_err();
            assert_eq!((at.line, message.as_str()), (line, expected), "{text:?}");
        }
    }

    #[test]
    fn alias_bombs_and_bottomless_nesting_are_refused() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..9 {
            let again = vec![format!("*a{}", n - 1); 10].join(", ");
            bomb = format!("{bomb}a{n}: &a{n} [{again}]\n");
        }
        assert!(read(&bomb).is_err());
        for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")] {
            let deep = format!("{}{}", open.repeat(50_000), close.repeat(50_000));
            assert!(read(&deep).is_err(), "{open}");
        }
    }

    #[test]
    fn depth_is_found_where_it_begins() {
        let node = read("a:\n  b: [1]\n").unwrap();
        assert_eq!(node.deeper_than(3), None);
        assert_eq!(node.deeper_than(2), Some(position(2, 6)));
        assert_eq!(node.deeper_than(0), Some(position(1, 1)));
    }
}
