//! A step's `input:` with its `${…}` references -> the input of an attempt.
//!
//! Pure. A message made here may name steps, keys and kinds of values, all of
//! which stand in the template, but never a value of a payload.

use std::fmt;

use serde_json::{Map, Value, json};

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

/// `input.a.b[0]`, `steps.<name>.output.a`, `item.a` or `item_index`.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    root: Root,
    path: Vec<Segment>,
}

/// Where a reference begins.
#[derive(Debug, Clone, PartialEq)]
enum Root {
    /// The task's input.
    Input,
    /// The output of this step.
    Step(String),
    /// The item of the list that a map runs over.
    Item,
    /// Its place in that list, from 0.
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
    /// Of a map's step: the item, and its place in the list.
    pub item: Option<(&'a Value, &'a Value)>,
}

/// One move down into a JSON value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// A key of an object.
    Key(String),
    /// A place in a list, from 0.
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

impl fmt::Display for MissingPath {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "input{} reads ${{{}}}, but {}", Path(&self.at), self.reference, self.found)
    }
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

/// A value of more bytes than this is not copied into the inputs that read it: they name it.
pub const MAX_INLINE_BYTES: usize = 64 * 1024;

/// The key by which a stored input says that parts of it are kept elsewhere; `tasker.resolve_input`
/// puts them back when the step is claimed.
pub const BY_REFERENCE: &str = "$tasker.by_reference";

/// The input as it is stored: large values that references brought in whole are left out and
/// named, `{"$tasker.by_reference": [{at, step, path}], "input": …}`. Without any it is stored as it is.
///
/// `template` is the one that the input was resolved with, `None` for [`default_input`].
pub fn stored_input(template: Option<&InputTemplate>, mut input: Value) -> Value {
    let mut left_out = Vec::new();
    if let Some(template) = template {
        leave_out(&template.root, &mut input, &mut Vec::new(), &mut left_out);
    } else if let Value::Object(parts) = &mut input {
        for (part, value) in parts.iter_mut() {
            match (part.as_str(), value) {
                ("input", value) if is_large(value) => {
                    left_out.push(json!({"at": ["input"], "step": null, "path": []}));
                    *value = Value::Null;
                }
                ("steps", Value::Object(outputs)) => {
                    for (step, output) in outputs.iter_mut().filter(|(_, output)| is_large(output)) {
                        left_out.push(json!({"at": ["steps", step], "step": step, "path": []}));
                        *output = Value::Null;
                    }
                }
                _ => {}
            }
        }
    }
    // An input that happens to have our key is wrapped as well, so that it is never misread.
    if left_out.is_empty() && input.get(BY_REFERENCE).is_none() {
        return input;
    }
    json!({BY_REFERENCE: left_out, "input": input})
}

fn is_large(value: &Value) -> bool {
    !take_bytes(value, &mut { MAX_INLINE_BYTES })
}

/// Walks a template and what it was resolved to side by side.
fn leave_out(part: &Part, value: &mut Value, at: &mut Vec<Segment>, left_out: &mut Vec<Value>) {
    match (part, value) {
        (Part::List(parts), Value::Array(items)) => {
            for (index, (part, item)) in parts.iter().zip(items).enumerate() {
                at.push(Segment::Index(index));
                leave_out(part, item, at, left_out);
                at.pop();
            }
        }
        (Part::Map(parts), Value::Object(map)) => {
            for (key, part) in parts {
                if let Some(item) = map.get_mut(key) {
                    at.push(Segment::Key(key.clone()));
                    leave_out(part, item, at, left_out);
                    at.pop();
                }
            }
        }
        (Part::Whole(reference), value) if is_large(value) => {
            let step = match &reference.root {
                Root::Input => None,
                Root::Step(step) => Some(step),
                // An item is nobody's output: its copy is the only one.
                Root::Item | Root::ItemIndex => return,
            };
            left_out.push(json!({"at": words(at), "step": step, "path": words(&reference.path)}));
            *value = Value::Null;
        }
        _ => {}
    }
}

/// A path as PostgreSQL writes one.
fn words(path: &[Segment]) -> Vec<String> {
    path.iter()
        .map(|segment| match segment {
            Segment::Key(key) => key.clone(),
            Segment::Index(index) => index.to_string(),
        })
        .collect()
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
    fn parse(text: &str) -> Result<Self, String> {
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

/// What a message calls a kind of value.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn task_input() -> Value {
        json!({"total": 4200, "name": "Ada", "gift": true, "note": null, "rate": 0.5,
               "items": [{"sku": "A-1"}, {"sku": "B-2"}], "größe": "L"})
    }

    fn reserve() -> Value {
        json!({"hold_id": "h-7", "lines": [1, 2]})
    }

    fn resolve(template: &Value) -> Result<Value, MissingPath> {
        let (input, reserve) = (task_input(), reserve());
        let outputs = |step: &str| (step == "reserve").then_some(&reserve);
        InputTemplate::parse(template).unwrap().resolve(&input, &outputs)
    }

    #[test]
    fn whole_references_keep_their_type_and_inner_ones_become_text() {
        let cases = [
            (json!("${input.total}"), json!(4200)),
            (json!("${input.gift}"), json!(true)),
            (json!("${input.note}"), json!(null)),
            (json!("${input.items}"), json!([{"sku": "A-1"}, {"sku": "B-2"}])),
            (json!("${input.items[1].sku}"), json!("B-2")),
            (json!("${input.größe}"), json!("L")),
            (json!("${input}"), task_input()),
            (json!("${steps.reserve.output}"), reserve()),
            (json!("${steps.reserve.output.lines[0]}"), json!(1)),
            (json!(" ${input.total}"), json!(" 4200")),
            (json!("${input.name}: ${input.total} at ${input.rate}, ${input.gift}"), json!("Ada: 4200 at 0.5, true")),
            (json!("${input.name}${steps.reserve.output.hold_id}"), json!("Adah-7")),
            (json!("$${input.total}"), json!("${input.total}")),
            (json!("$$${input.total}"), json!("$${input.total}")),
            (json!("costs $5 and $${x} and ${input.total}$"), json!("costs $5 and ${x} and 4200$")),
            (json!("$"), json!("$")),
            (json!("}"), json!("}")),
            (
                json!({"a": [1, "${input.total}", {"b": "x"}], "c": {"d": []}}),
                json!({"a": [1, 4200, {"b": "x"}], "c": {"d": []}}),
            ),
        ];
        for (template, expected) in cases {
            assert_eq!(resolve(&template), Ok(expected), "{template}");
        }
    }

    #[test]
    fn every_missing_path_says_what_was_found() {
        let cases = [
            ("${input.nope}", "input has no key `nope`"),
            ("${input.items[2]}", "input.items has only 2 items"),
            ("${input.items[0].price}", "input.items[0] has no key `price`"),
            ("${input.items.sku}", "input.items is a list, not an object"),
            ("${input.name[0]}", "input.name is a string, not a list"),
            ("${input.total.cents}", "input.total is a number, not an object"),
            ("${input.gift.a}", "input.gift is a boolean, not an object"),
            ("${input.note.a}", "input.note is null, not an object"),
            ("${input[0]}", "input is an object, not a list"),
            ("${steps.reserve.output.nope.x}", "steps.reserve.output has no key `nope`"),
            ("${steps.skipped.output.x}", "step skipped has no output"),
            (
                "hold ${steps.reserve.output}",
                "steps.reserve.output is an object, not a string, number or boolean that fits \
                 inside a text",
            ),
            ("${input.note}!", "input.note is null, not a string, number or boolean that fits inside a text"),
        ];
        for (template, expected) in cases {
            let error = resolve(&json!({"a": [template]})).unwrap_err();
            assert_eq!(error.at, [Segment::Key("a".into()), Segment::Index(0)]);
            let reference = &error.reference;
            let expected = format!("input.a[0] reads ${{{reference}}}, but {expected}");
            assert_eq!(error.to_string(), expected);
            assert!(template.contains(reference.as_str()));
        }
    }

    #[test]
    fn unreadable_references_are_all_reported_with_their_place() {
        let input = json!({"b": ["${inptu.x}", "ok", "${input.x"], "k${input.x}": 1});
        let errors = InputTemplate::parse(&input).unwrap_err();
        let shown: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "input.b[0]: ${inptu.x} starts with neither `input` nor `steps`; write \
                 ${input.key} or ${steps.name.output.key}, with [0] for a list item",
                "input.b[2]: `${` is not closed; add `}`, or write `$${` for a literal `${`",
                "input.k${input.x}: references are read in values only; use a plain key",
            ]
        );
    }

    #[test]
    fn malformed_references_are_refused() {
        for text in [
            "",
            " ",
            "input.",
            ".input",
            "input..a",
            "input .a",
            "input.a b",
            "input[",
            "input[]",
            "input[x]",
            "input[-1]",
            "input[+1]",
            "input[1]a",
            "input.[0]",
            "input]",
            "Input",
            "input[99999999999999999999999]",
            "steps",
            "steps.a",
            "steps.a.input",
            "steps.a.outputs",
            "steps.a[0].output",
            "steps[0].output",
            "input.$a",
            "input.\"a\"",
            "steps..output",
            "env.HOME",
            "input.{a",
        ] {
            let input = json!(format!("${{{text}}}"));
            assert!(InputTemplate::parse(&input).is_err(), "{text:?}");
        }
    }

    #[test]
    fn references_name_each_step_once() {
        let input = json!(["${steps.b.output}", "${steps.a.output.x} ${steps.b.output.y}", "${input}"]);
        let template = InputTemplate::parse(&input).unwrap();
        assert_eq!(template.references().collect::<Vec<_>>(), ["a", "b"]);
        let mut visited = Vec::new();
        template.visit_steps(|at, step| visited.push(format!("{step}{}", Path(at))));
        assert_eq!(visited, ["b[0]", "a[1]", "b[1]"]);
    }

    #[test]
    fn small_template_cannot_multiply_a_payload_without_bound() {
        let input = json!({"big": "x".repeat(1024 * 1024)});
        let template = InputTemplate::parse(&json!(vec!["${input.big}"; 1000])).unwrap();
        let error = template.resolve(&input, &|_| None).unwrap_err();
        assert_eq!(error.found, Found::TooLarge);
        assert!(error.to_string().len() < 200);
    }

    #[test]
    fn resolved_input_nests_no_deeper_than_the_limit() {
        let nested = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!([inner]));
        let template = InputTemplate::parse(&json!({"a": {"b": "${input}"}})).unwrap();
        let resolved = template.resolve(&nested(MAX_INPUT_DEPTH - 2), &|_| None).unwrap();
        assert_eq!(depth(&resolved, 1000), MAX_INPUT_DEPTH);
        let error = template.resolve(&nested(MAX_INPUT_DEPTH - 1), &|_| None).unwrap_err();
        assert_eq!(error.found, Found::TooDeep);
    }

    #[test]
    fn depth_counts_objects_and_lists_and_stops_after_the_limit() {
        assert_eq!(depth(&json!(1), 9), 0);
        assert_eq!(depth(&json!({}), 9), 1);
        assert_eq!(depth(&json!([1, {"a": [2]}]), 9), 3);
        assert_eq!(depth(&json!([[[[[[]]]]]]), 3), 4);
    }

    #[test]
    fn default_input_holds_the_task_input_and_the_parents() {
        let (input, reserve) = (task_input(), reserve());
        let parents = [("reserve", &reserve)];
        assert_eq!(
            default_input(&input, parents.into_iter()),
            Ok(json!({"input": input, "steps": {"reserve": reserve}}))
        );
    }

    #[test]
    fn default_input_nests_no_deeper_and_grows_no_larger_than_the_limits() {
        let nested = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!([inner]));
        let (flat, deep, deeper) = (json!({}), nested(MAX_INPUT_DEPTH - 2), nested(MAX_INPUT_DEPTH - 1));
        let with = |input: &Value, parent: &Value| default_input(input, [("reserve", parent)].into_iter());
        assert_eq!(with(&flat, &deep).map(|input| depth(&input, 1000)), Ok(MAX_INPUT_DEPTH));
        assert!(with(&deeper, &flat).is_ok());
        let error = with(&flat, &deeper).unwrap_err();
        assert!(error.starts_with("with the output of reserve the input would nest deeper than 96 levels;"), "{error}");
        assert!(with(&nested(MAX_INPUT_DEPTH), &flat).unwrap_err().starts_with("with the task's input"));
        let big = json!("x".repeat(MAX_RESOLVED_BYTES / 2));
        assert!(with(&big, &big).unwrap_err().contains("would exceed 16777216 bytes"));
    }

    #[test]
    fn large_values_are_named_where_they_are_read_whole_and_nowhere_else() {
        let big = json!("x".repeat(MAX_INLINE_BYTES + 1));
        let input = json!({"small": 1, "big": big});
        let output = json!({"lines": [1, big], "id": "h-7"});
        let outputs = |_: &str| Some(&output);
        let stored = |template: Value| {
            let template = InputTemplate::parse(&template).unwrap();
            stored_input(Some(&template), template.resolve(&input, &outputs).unwrap())
        };
        let small = json!({"a": "${input.small}", "b": "${steps.s.output.id}"});
        assert_eq!(stored(small), json!({"a": 1, "b": "h-7"}));
        assert_eq!(
            stored(json!({"a": ["${input.small}", "${steps.s.output.lines[1]}"], "b": "${input}"})),
            json!({BY_REFERENCE: [
                {"at": ["a", "1"], "step": "s", "path": ["lines", "1"]},
                {"at": ["b"], "step": null, "path": []},
            ], "input": {"a": [1, null], "b": null}})
        );
        assert_eq!(
            stored(json!("${steps.s.output}")),
            json!({BY_REFERENCE: [{"at": [], "step": "s", "path": []}], "input": null})
        );
        // Inside a longer text it is a text of its own.
        assert_eq!(stored(json!({"a": "no ${input.big}"})), json!({"a": format!("no {}", big.as_str().unwrap())}));
        assert_eq!(
            stored_input(None, default_input(&input, [("s", &output), ("t", &json!(2))].into_iter()).unwrap()),
            json!({BY_REFERENCE: [
                {"at": ["input"], "step": null, "path": []},
                {"at": ["steps", "s"], "step": "s", "path": []},
            ], "input": {"input": null, "steps": {"s": null, "t": 2}}})
        );
    }

    #[test]
    fn an_input_with_our_own_key_is_never_misread() {
        let strange = json!({BY_REFERENCE: [{"at": [], "step": "s", "path": []}]});
        assert_eq!(stored_input(None, strange.clone()), json!({BY_REFERENCE: [], "input": strange}));
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                proptest::collection::btree_map("[a-z_-]{1,6}", inner, 0..5)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// Every path into a value, with the value it leads to.
    fn paths(value: &Value, path: String, to: &mut Vec<(String, Value)>) {
        match value {
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    paths(item, format!("{path}[{index}]"), to);
                }
            }
            Value::Object(map) => {
                for (key, item) in map {
                    paths(item, format!("{path}.{key}"), to);
                }
            }
            _ => {}
        }
        to.push((path, value.clone()));
    }

    fn escaped(value: &Value) -> Value {
        match value {
            Value::String(text) => text.replace("${", "$${").into(),
            Value::Array(items) => items.iter().map(escaped).collect(),
            Value::Object(map) => Value::Object(map.iter().map(|(k, v)| (k.clone(), escaped(v))).collect()),
            plain => plain.clone(),
        }
    }

    proptest! {
        #[test]
        fn every_path_reads_exactly_the_value_it_names(value in json_value()) {
            let mut all = Vec::new();
            paths(&value, String::new(), &mut all);
            for (path, expected) in all {
                let template = json!({
                    "from_input": format!("${{input{path}}}"),
                    "from_step": [format!("${{steps.s.output{path}}}")],
                });
                let template = InputTemplate::parse(&template).unwrap();
                let resolved = template.resolve(&value, &|_| Some(&value)).unwrap();
                prop_assert_eq!(resolved, json!({"from_input": expected, "from_step": [expected]}));
            }
        }

        #[test]
        fn escaped_values_come_out_as_they_were(value in json_value()) {
            let template = InputTemplate::parse(&escaped(&value)).unwrap();
            prop_assert_eq!(template.references().count(), 0);
            prop_assert_eq!(template.resolve(&Value::Null, &|_| None).unwrap(), value);
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in "[$\\{\\}a-z\\.\\[\\]0-9 ]{0,40}") {
            if let Ok(template) = InputTemplate::parse(&Value::String(text)) {
                let _ = template.resolve(&json!({}), &|_| None);
            }
        }
    }
}
