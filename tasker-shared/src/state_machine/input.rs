//! A step's `input:` with its `${…}` references -> the input of an attempt.
//!
//! Pure. A message made here may name steps, keys and kinds of values, all of
//! which stand in the template, but never a value of a payload.

mod reference;
mod stored;

use std::fmt;

use serde_json::{Map, Value};

use self::reference::Root;
pub(super) use self::reference::kind;
pub use self::reference::{Found, Path, Reference, Scope, Segment};
pub use self::stored::{BY_REFERENCE, MAX_INLINE_BYTES, stored_input};

/// The deepest JSON that is accepted anywhere, counting objects and lists.
pub const MAX_DEPTH: usize = 64;

/// The deepest input of a step: a payload of the deepest kind and what a template puts around it.
/// Readers of JSON commonly stop at 128 levels.
pub const MAX_INPUT_DEPTH: usize = 96;

/// The most bytes of JSON that the references of one input may bring in. It
/// only keeps a small template from copying a payload thousands of times; the
/// payload limit of the installation is checked by the caller.
pub const MAX_RESOLVED_BYTES: usize = 16 * 1024 * 1024;

/// A parsed `input:`; parse once, resolve for each attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct InputTemplate {
    root: Part,
    /// The steps whose output is needed: sorted, each once.
    steps: Vec<String>,
    /// Where `${item}` or `${item_index}` is read first.
    item: Option<Vec<Segment>>,
}

/// Whatever holds no reference is kept as the value it is.
#[derive(Debug, Clone, PartialEq)]
enum Part {
    Literal(Value),
    List(Vec<Part>),
    Map(Vec<(String, Part)>),
    /// The whole value is one reference and keeps its JSON type.
    Whole(Reference),
    /// References inside a longer string.
    Text(Vec<Piece>),
}

#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Literal(String),
    Reference(Reference),
}

/// A `${…}` that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputError {
    /// Where in the step's `input` it stands.
    pub at: Vec<Segment>,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for InputError {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "input{}: {}", Path(&self.at), self.message)
    }
}

impl std::error::Error for InputError {}

/// A reference that leads nowhere in what a task really has: a permanent,
/// explained error of the step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingPath {
    /// Where in the step's `input` the reference stands.
    pub at: Vec<Segment>,
    /// The reference as written, without `${` and `}`.
    pub reference: String,
    /// What was found instead.
    pub found: Found,
}

impl fmt::Display for MissingPath {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "input{} reads ${{{}}}, but {}", Path(&self.at), self.reference, self.found)
    }
}

impl std::error::Error for MissingPath {}

impl InputTemplate {
    /// Reads the references of an `input:`; the errors are everything that is
    /// wrong with them, at least one.
    pub fn parse(input: &Value) -> Result<Self, Vec<InputError>> {
        let mut parse = Parse { at: Vec::new(), steps: Vec::new(), item: None, errors: Vec::new() };
        let root = parse.part(input);
        if !parse.errors.is_empty() {
            return Err(parse.errors);
        }
        let mut steps = parse.steps;
        steps.sort_unstable();
        steps.dedup();
        Ok(Self { root, steps, item: parse.item })
    }

    /// The steps whose output is needed, in alphabetical order, each once.
    pub fn references(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().map(String::as_str)
    }

    /// Where the input reads the item of a map; `None` if it reads none.
    pub fn reads_item(&self) -> Option<&[Segment]> {
        self.item.as_deref()
    }

    /// Calls `visit` with each step that is read and where in the input.
    pub fn visit_steps<'a>(&'a self, mut visit: impl FnMut(&[Segment], &'a str)) {
        visit_part(&self.root, &mut Vec::new(), &mut visit);
    }

    /// The input of an attempt. `outputs` gives a step's output, and `None` if
    /// it has none.
    ///
    /// The result nests at most [`MAX_INPUT_DEPTH`] levels if the template was
    /// checked; its size is for the caller to check.
    pub fn resolve<'a>(
        &self,
        task_input: &'a Value,
        outputs: &dyn Fn(&str) -> Option<&'a Value>,
    ) -> Result<Value, MissingPath> {
        self.resolve_in(Scope { input: task_input, outputs, absent: &|_| false, item: None })
    }

    /// The same, with everything that a reference may read.
    pub fn resolve_in(&self, scope: Scope<'_, '_>) -> Result<Value, MissingPath> {
        Resolve { scope, at: Vec::new(), room: MAX_RESOLVED_BYTES }.part(&self.root)
    }
}

/// What a step without `input:` receives: the task's input, and its parents'
/// outputs by name, as `{"input": …, "steps": {"<parent>": <output>}}`. A
/// parent without output is left out by the caller.
///
/// Errors, in words for a person, if that would nest deeper than [`MAX_INPUT_DEPTH`] or exceed
/// [`MAX_RESOLVED_BYTES`].
pub fn default_input<'a>(
    task_input: &Value,
    parents: impl Iterator<Item = (&'a str, &'a Value)>,
) -> Result<Value, String> {
    let mut room = MAX_RESOLVED_BYTES;
    let mut fits = |what: &str, value: &Value, below: usize| {
        let problem = if depth(value, MAX_INPUT_DEPTH - below) > MAX_INPUT_DEPTH - below {
            format!("nest deeper than {MAX_INPUT_DEPTH} levels")
        } else if !take_bytes(value, &mut room) {
            format!("exceed {MAX_RESOLVED_BYTES} bytes")
        } else {
            return Ok(value.clone());
        };
        Err(format!("with {what} the input would {problem}; give the step an `input` that takes only what it needs"))
    };
    let input = fits("the task's input", task_input, 1)?;
    let mut steps = Map::new();
    for (name, output) in parents {
        steps.insert(name.to_owned(), fits(&format!("the output of {name}"), output, 2)?);
    }
    Ok(Value::Object(Map::from_iter([("input".to_owned(), input), ("steps".to_owned(), Value::Object(steps))])))
}

/// How deep a value nests: 0 for a scalar, 1 for a flat object or list. Stops
/// counting one level beyond `limit`.
pub fn depth(value: &Value, limit: usize) -> usize {
    let deepest = |deepest: usize, inner: &Value| match limit {
        0 => deepest,
        _ => deepest.max(depth(inner, limit - 1)),
    };
    match value {
        Value::Array(items) => 1 + items.iter().fold(0, deepest),
        Value::Object(map) => 1 + map.values().fold(0, deepest),
        _ => 0,
    }
}

struct Parse {
    at: Vec<Segment>,
    steps: Vec<String>,
    item: Option<Vec<Segment>>,
    errors: Vec<InputError>,
}

impl Parse {
    fn part(&mut self, value: &Value) -> Part {
        match value {
            Value::String(text) => self.text(text),
            Value::Array(items) => {
                let mut parts = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    self.at.push(Segment::Index(index));
                    parts.push(self.part(item));
                    self.at.pop();
                }
                if parts.iter().all(Part::is_literal) {
                    return Part::Literal(parts.into_iter().filter_map(Part::literal).collect());
                }
                Part::List(parts)
            }
            Value::Object(map) => {
                let mut parts = Vec::with_capacity(map.len());
                for (key, item) in map {
                    self.at.push(Segment::Key(key.clone()));
                    if key.contains("${") {
                        self.wrong("references are read in values only; use a plain key");
                    }
                    parts.push((key.clone(), self.part(item)));
                    self.at.pop();
                }
                if parts.iter().all(|(_, part)| part.is_literal()) {
                    let literals = parts.into_iter().filter_map(|(k, p)| Some((k, p.literal()?)));
                    return Part::Literal(Value::Object(literals.collect()));
                }
                Part::Map(parts)
            }
            plain => Part::Literal(plain.clone()),
        }
    }

    fn wrong(&mut self, message: impl Into<String>) {
        self.errors.push(InputError { at: self.at.clone(), message: message.into() });
    }

    /// Splits a string at its references; `$${` stands for a literal `${`.
    fn text(&mut self, text: &str) -> Part {
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(dollar) = rest.find('$') {
            literal.push_str(&rest[..dollar]);
            rest = &rest[dollar..];
            if let Some(after) = rest.strip_prefix("$${") {
                literal.push_str("${");
                rest = after;
            } else if let Some(after) = rest.strip_prefix("${") {
                let Some(end) = after.find('}') else {
                    self.wrong("`${` is not closed; add `}`, or write `$${` for a literal `${`");
                    return Part::Literal(Value::Null);
                };
                match Reference::parse(&after[..end]) {
                    Ok(reference) => {
                        self.steps.extend(reference.step().map(str::to_owned));
                        if matches!(reference.root, Root::Item | Root::ItemIndex) {
                            self.item.get_or_insert_with(|| self.at.clone());
                        }
                        if !literal.is_empty() {
                            pieces.push(Piece::Literal(std::mem::take(&mut literal)));
                        }
                        pieces.push(Piece::Reference(reference));
                    }
                    Err(message) => self.wrong(message),
                }
                rest = &after[end + 1..];
            } else {
                literal.push('$');
                rest = &rest[1..];
            }
        }
        literal.push_str(rest);
        if pieces.is_empty() {
            return Part::Literal(Value::String(literal));
        }
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal));
        }
        match <[Piece; 1]>::try_from(pieces) {
            Ok([Piece::Reference(reference)]) => Part::Whole(reference),
            Ok(one) => Part::Text(Vec::from(one)),
            Err(pieces) => Part::Text(pieces),
        }
    }
}

impl Part {
    fn is_literal(&self) -> bool {
        matches!(self, Self::Literal(_))
    }

    fn literal(self) -> Option<Value> {
        match self {
            Self::Literal(value) => Some(value),
            _ => None,
        }
    }
}

fn visit_part<'a>(part: &'a Part, at: &mut Vec<Segment>, visit: &mut impl FnMut(&[Segment], &'a str)) {
    match part {
        Part::Literal(_) => {}
        Part::List(parts) => {
            for (index, part) in parts.iter().enumerate() {
                at.push(Segment::Index(index));
                visit_part(part, at, visit);
                at.pop();
            }
        }
        Part::Map(parts) => {
            for (key, part) in parts {
                at.push(Segment::Key(key.clone()));
                visit_part(part, at, visit);
                at.pop();
            }
        }
        Part::Whole(reference) => {
            if let Some(step) = reference.step() {
                visit(at, step);
            }
        }
        Part::Text(pieces) => {
            for piece in pieces {
                if let Piece::Reference(Reference { root: Root::Step(step), .. }) = piece {
                    visit(at, step);
                }
            }
        }
    }
}

struct Resolve<'a, 'f> {
    scope: Scope<'a, 'f>,
    at: Vec<Segment>,
    /// Bytes of JSON that references may still bring in.
    room: usize,
}

impl<'a> Resolve<'a, '_> {
    fn part(&mut self, part: &Part) -> Result<Value, MissingPath> {
        match part {
            Part::Literal(value) => Ok(value.clone()),
            Part::List(parts) => {
                let mut items = Vec::with_capacity(parts.len());
                for (index, part) in parts.iter().enumerate() {
                    self.at.push(Segment::Index(index));
                    items.push(self.part(part)?);
                    self.at.pop();
                }
                Ok(Value::Array(items))
            }
            Part::Map(parts) => {
                let mut map = Map::new();
                for (key, part) in parts {
                    self.at.push(Segment::Key(key.clone()));
                    map.insert(key.clone(), self.part(part)?);
                    self.at.pop();
                }
                Ok(Value::Object(map))
            }
            Part::Whole(reference) => {
                let value = self.read(reference)?;
                self.take_room(reference, value)?;
                let deepest = MAX_INPUT_DEPTH.saturating_sub(self.at.len());
                if depth(value, deepest) > deepest {
                    return Err(self.missing(reference, Found::TooDeep));
                }
                Ok(value.clone())
            }
            Part::Text(pieces) => self.text(pieces),
        }
    }

    fn text(&mut self, pieces: &[Piece]) -> Result<Value, MissingPath> {
        let mut text = String::new();
        for piece in pieces {
            match piece {
                Piece::Literal(literal) => text.push_str(literal),
                Piece::Reference(reference) => {
                    let value = self.read(reference)?;
                    self.take_room(reference, value)?;
                    match value {
                        Value::String(inner) => text.push_str(inner),
                        Value::Number(_) | Value::Bool(_) => text.push_str(&value.to_string()),
                        other => {
                            let found = Found::OtherKind {
                                within: reference.to_string(),
                                kind: kind(other),
                                wanted: "a string, number or boolean that fits inside a text",
                            };
                            return Err(self.missing(reference, found));
                        }
                    }
                }
            }
        }
        Ok(Value::String(text))
    }

    fn read(&self, reference: &Reference) -> Result<&'a Value, MissingPath> {
        reference.read(self.scope).map_err(|found| self.missing(reference, found))
    }

    fn take_room(&mut self, reference: &Reference, value: &Value) -> Result<(), MissingPath> {
        if take_bytes(value, &mut self.room) {
            return Ok(());
        }
        Err(self.missing(reference, Found::TooLarge))
    }

    fn missing(&self, reference: &Reference, found: Found) -> MissingPath {
        MissingPath { at: self.at.clone(), reference: reference.to_string(), found }
    }
}

/// Takes about as many bytes as the value has in JSON; false, early, if there
/// are not so many left.
fn take_bytes(value: &Value, room: &mut usize) -> bool {
    let own = match value {
        Value::String(text) => text.len() + 2,
        Value::Object(map) => map.keys().map(|key| key.len() + 4).sum(),
        _ => 8,
    };
    let Some(left) = room.checked_sub(own) else {
        return false;
    };
    *room = left;
    match value {
        Value::Array(items) => items.iter().all(|item| take_bytes(item, room)),
        Value::Object(map) => map.values().all(|item| take_bytes(item, room)),
        _ => true,
    }
}

#[cfg(test)]
mod tests;
