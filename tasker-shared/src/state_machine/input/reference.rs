//! One `${…}`: what it may begin with, the path that follows, and the value it leads to.

use std::fmt;

use serde_json::Value;

use super::{MAX_INPUT_DEPTH, MAX_RESOLVED_BYTES};

/// `input.a.b[0]`, `steps.<name>.output.a`, `item.a` or `item_index`.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    pub(super) root: Root,
    pub(super) path: Vec<Segment>,
}

/// Where a reference begins.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Root {
    /// The task's input.
    Input,
    /// The output of this step.
    Step(String),
    /// The item of the list that a map runs over.
    Item,
    /// Its index in that list, from 0.
    ItemIndex,
}

/// What references read.
#[derive(Clone, Copy)]
pub struct Scope<'a, 'f> {
    /// The task's input.
    pub input: &'a Value,
    /// A step's output; `None` if it has none.
    pub outputs: &'f dyn Fn(&str) -> Option<&'a Value>,
    /// Whether a step without output was skipped, or is still open behind a `join: any`: whatever
    /// is read of it is null.
    pub absent: &'f dyn Fn(&str) -> bool,
    /// Of a map's step: the item, and its index in the list.
    pub item: Option<(&'a Value, &'a Value)>,
}

/// One move down into a JSON value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// A key of an object.
    Key(String),
    /// An index in a list, from 0.
    Index(usize),
}

/// Writes `.key` and `[0]` one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Path<'a>(pub &'a [Segment]);

impl fmt::Display for Path<'_> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in self.0 {
            match segment {
                Segment::Key(key) => write!(to, ".{key}")?,
                Segment::Index(index) => write!(to, "[{index}]")?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}{}", self.root, Path(&self.path))
    }
}

impl fmt::Display for Root {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input => to.write_str("input"),
            Self::Step(step) => write!(to, "steps.{step}.output"),
            Self::Item => to.write_str("item"),
            Self::ItemIndex => to.write_str("item_index"),
        }
    }
}

/// What a reference met instead of a value it can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The step has no output: it was skipped, or resolved without one.
    NoOutput {
        /// The step.
        step: String,
    },
    /// The object at `within` lacks the key.
    NoKey {
        /// Where the object is, such as `steps.reserve.output`.
        within: String,
        /// The key it lacks.
        key: String,
    },
    /// The list at `within` is too short.
    TooShort {
        /// Where the list is.
        within: String,
        /// How many items it has.
        items: usize,
    },
    /// The value at `within` has no such parts.
    OtherKind {
        /// Where the value is.
        within: String,
        /// `an object`, `a list`, `a string`, …
        kind: &'static str,
        /// What the reference needs there.
        wanted: &'static str,
    },
    /// The step is not a map, so there is no item.
    NoItem,
    /// The input would grow beyond [`MAX_RESOLVED_BYTES`].
    TooLarge,
    /// The input would nest deeper than [`MAX_INPUT_DEPTH`].
    TooDeep,
}

impl fmt::Display for Found {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::NoOutput { step } => write!(to, "step {step} has no output"),
            Found::NoKey { within, key } => write!(to, "{within} has no key `{key}`"),
            Found::TooShort { within, items: 1 } => write!(to, "{within} has only 1 item"),
            Found::TooShort { within, items } => write!(to, "{within} has only {items} items"),
            Found::OtherKind { within, kind, wanted } => {
                write!(to, "{within} is {kind}, not {wanted}")
            }
            Found::NoItem => write!(to, "this step has no for_each"),
            Found::TooLarge => write!(to, "the input would exceed {MAX_RESOLVED_BYTES} bytes"),
            Found::TooDeep => write!(to, "the input would nest deeper than {MAX_INPUT_DEPTH} levels"),
        }
    }
}

impl Reference {
    /// Parses a text that is one reference from `${` to `}`.
    pub fn parse_whole(text: &str) -> Result<Self, String> {
        let inner = text.trim().strip_prefix("${").and_then(|rest| rest.strip_suffix('}'));
        let Some(inner) = inner.filter(|inner| !inner.contains('}')) else {
            return Err("is not one reference; write it as \"${input.key}\" or \"${steps.name.output.key}\"".into());
        };
        Self::parse(inner)
    }

    /// The step whose output it reads.
    pub fn step(&self) -> Option<&str> {
        if let Root::Step(step) = &self.root { Some(step) } else { None }
    }

    /// Whether it reads the item of a map.
    pub fn is_of_item(&self) -> bool {
        matches!(self.root, Root::Item | Root::ItemIndex)
    }

    /// Where in the task's input it leads; `None` if it reads something else.
    pub fn input_path(&self) -> Option<&[Segment]> {
        (self.root == Root::Input).then_some(&*self.path)
    }

    /// The value it leads to.
    pub fn read<'a>(&self, scope: Scope<'a, '_>) -> Result<&'a Value, Found> {
        const NULL: &Value = &Value::Null;
        let mut value = match &self.root {
            Root::Input => scope.input,
            Root::Step(step) => match (scope.outputs)(step) {
                Some(output) => output,
                None if (scope.absent)(step) => return Ok(NULL),
                None => return Err(Found::NoOutput { step: step.clone() }),
            },
            Root::Item => scope.item.ok_or(Found::NoItem)?.0,
            Root::ItemIndex => scope.item.ok_or(Found::NoItem)?.1,
        };
        for (walked, segment) in self.path.iter().enumerate() {
            let within = || format!("{}{}", self.root, Path(&self.path[..walked]));
            value = match (segment, value) {
                (Segment::Key(key), Value::Object(map)) => {
                    map.get(key).ok_or_else(|| Found::NoKey { within: within(), key: key.clone() })
                }
                (Segment::Index(index), Value::Array(items)) => {
                    items.get(*index).ok_or_else(|| Found::TooShort { within: within(), items: items.len() })
                }
                (Segment::Key(_), other) => {
                    Err(Found::OtherKind { within: within(), kind: kind(other), wanted: "an object" })
                }
                (Segment::Index(_), other) => {
                    Err(Found::OtherKind { within: within(), kind: kind(other), wanted: "a list" })
                }
            }?;
        }
        Ok(value)
    }

    /// Parses what stands between `${` and `}`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(80).collect();
        let wrong = |why: &str| {
            Err(format!(
                "${{{shown}}} {why}; write ${{input.key}} or ${{steps.name.output.key}}, \
                 with [0] for a list item"
            ))
        };
        let Some(path) = segments(text) else {
            return wrong("is not a path of keys");
        };
        let mut segments = path.into_iter();
        let root = match segments.next() {
            Some(Segment::Key(root)) if root == "input" => Root::Input,
            Some(Segment::Key(root)) if root == "item" => Root::Item,
            Some(Segment::Key(root)) if root == "item_index" => Root::ItemIndex,
            Some(Segment::Key(root)) if root == "steps" => {
                let Some(Segment::Key(step)) = segments.next() else {
                    return wrong("names no step");
                };
                match segments.next() {
                    Some(Segment::Key(output)) if output == "output" => Root::Step(step),
                    _ => return wrong("reads something other than the step's output"),
                }
            }
            _ => return wrong("starts with neither `input` nor `steps`"),
        };
        let path: Vec<Segment> = segments.collect();
        if root == Root::ItemIndex && !path.is_empty() {
            return wrong("reads inside a number");
        }
        Ok(Self { root, path })
    }
}

/// Splits `a.b[0].c`; `None` if it is anything else.
fn segments(text: &str) -> Option<Vec<Segment>> {
    let reserved = |c: char| ".[]{}$\"'`".contains(c) || c.is_whitespace() || c.is_control();
    let mut path = Vec::new();
    for dotted in text.split('.') {
        let (key, mut indexes) = dotted.split_at(dotted.find('[').unwrap_or(dotted.len()));
        if key.is_empty() || key.contains(reserved) {
            return None;
        }
        path.push(Segment::Key(key.to_owned()));
        while !indexes.is_empty() {
            let (digits, rest) = indexes.strip_prefix('[')?.split_once(']')?;
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            path.push(Segment::Index(digits.parse().ok()?));
            indexes = rest;
        }
    }
    Some(path)
}

/// What a message calls a kind of value.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
