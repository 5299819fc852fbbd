//! A file against the schema: unknown keys, types, choices and limits, each at its position.
//!
//! It follows the published JSON Schema and knows nothing of templates. Unlike a validator it
//! reports all problems in the words of a person, and it goes on past them: what has a problem is
//! left out, so that the rest can be read and checked.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value};

use super::formats::{Check, FORMATS};
use super::problems::Problems;
use super::published::schema;
use super::suggestions::{did_you_mean, listed, shown};
use super::yaml::{Entry, Kind, Node, Position};

/// What the schema says of one value.
#[derive(Debug)]
pub(super) struct Shape {
    check: Option<Check>,
    rule: Rule,
}

#[derive(Debug)]
enum Rule {
    Any,
    Bool,
    Whole { least: i64, most: i64 },
    Decimal { least: f64, most: f64 },
    Text(Text),
    List { item: Box<Shape>, noun: Option<String>, least: usize, most: usize },
    Mapping(Mapping),
    Union { texts: Vec<String>, mappings: Vec<Mapping>, others: Vec<Shape> },
}

#[derive(Debug)]
struct Text {
    pattern: Option<Regex>,
    most_chars: usize,
    message: Option<String>,
    example: Option<String>,
}

#[derive(Debug)]
struct Mapping {
    title: Option<String>,
    /// Those that are required first.
    fields: Vec<Field>,
    required: usize,
    /// A key, and another without which it means nothing.
    dependent: Vec<(String, String)>,
}

#[derive(Debug)]
struct Field {
    key: String,
    shape: Shape,
}

/// The shape of a template.
pub(super) fn template() -> &'static Shape {
    static SHAPE: LazyLock<Shape> = LazyLock::new(|| Shape::of(schema()));
    &SHAPE
}

impl Shape {
    fn of(schema: &Value) -> Self {
        let check = schema["format"].as_str().map(|format| {
            let known = FORMATS.iter().find(|(name, _)| *name == format);
            known.unwrap_or_else(|| panic!("{format} is one of the formats")).1
        });
        Self { check, rule: Rule::of(schema) }
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|size| usize::try_from(size).ok())
}

impl Rule {
    fn of(schema: &Value) -> Self {
        let alternatives = schema["oneOf"].as_array().or(schema["anyOf"].as_array());
        match (schema["type"].as_str(), alternatives) {
            (Some("boolean"), _) => Self::Bool,
            (Some("integer"), _) => Self::Whole {
                least: schema["minimum"].as_i64().unwrap_or(i64::MIN),
                most: schema["maximum"].as_i64().unwrap_or(i64::MAX),
            },
            (Some("number"), _) => Self::Decimal {
                least: schema["minimum"].as_f64().unwrap_or(f64::MIN),
                most: schema["maximum"].as_f64().unwrap_or(f64::MAX),
            },
            (Some("array"), _) => Self::List {
                item: Box::new(Shape::of(&schema["items"])),
                noun: text(&schema["items"]["title"]),
                least: size(&schema["minItems"]).unwrap_or(0),
                most: size(&schema["maxItems"]).unwrap_or(usize::MAX),
            },
            (Some("object"), _) => Self::Mapping(Mapping::of(schema)),
            (Some("string"), _) if schema["enum"].is_null() && schema["const"].is_null() => {
                Self::Text(Text::of(schema))
            }
            (Some("string"), _) => Self::union(std::slice::from_ref(schema)),
            (None, Some(alternatives)) => Self::union(alternatives),
            _ => Self::Any,
        }
    }

    fn union(alternatives: &[Value]) -> Self {
        let (mut texts, mut mappings, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for alternative in alternatives {
            if let Some(only) = text(&alternative["const"]) {
                texts.push(only);
            } else if let Some(some) = alternative["enum"].as_array() {
                texts.extend(some.iter().filter_map(text));
            } else if alternative["type"] == "object" {
                mappings.push(Mapping::of(alternative));
            } else {
                others.push(Shape::of(alternative));
            }
        }
        Self::Union { texts, mappings, others }
    }
}

impl Text {
    fn of(schema: &Value) -> Self {
        let pattern = schema["pattern"].as_str();
        Self {
            pattern: pattern.map(|pattern| Regex::new(pattern).expect("a pattern of ours is a regular expression")),
            most_chars: size(&schema["maxLength"]).unwrap_or(usize::MAX),
            message: text(&schema["patternErrorMessage"]),
            example: text(&schema["examples"][0]),
        }
    }

    fn problem(&self, text: &str) -> Option<String> {
        let fits = self.pattern.as_ref().is_none_or(|pattern| pattern.is_match(text));
        if fits && (text.len() <= self.most_chars || text.chars().count() <= self.most_chars) {
            return None;
        }
        Some(match &self.message {
            Some(message) => format!("`{}` {message}", shown(text)),
            None => format!("has more than {} characters; shorten it", self.most_chars),
        })
    }
}

impl Mapping {
    fn of(schema: &Value) -> Self {
        let properties = schema["properties"].as_object().expect("a mapping declares its keys");
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let optional = properties.keys().map(String::as_str).filter(|key| !required.contains(key));
        let fields = required.iter().copied().chain(optional);
        let dependent = schema["dependentRequired"].as_object().into_iter().flatten();
        Self {
            title: text(&schema["title"]),
            fields: fields.map(|key| Field { key: key.to_owned(), shape: Shape::of(&properties[key]) }).collect(),
            required: required.len(),
            dependent: dependent
                .flat_map(|(key, needs)| {
                    needs.as_array().into_iter().flatten().filter_map(text).map(|need| (key.clone(), need))
                })
                .collect(),
        }
    }

    fn keys(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().map(|field| field.key.as_str())
    }

    fn required(&self) -> &[Field] {
        &self.fields[..self.required]
    }

    fn has(&self, key: &str) -> bool {
        self.keys().any(|known| known == key)
    }
}

/// The path of a key of a mapping, from the file's root.
fn below(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn find<'n>(entries: &'n [Entry], key: &str) -> Option<&'n Node> {
    entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
}

/// The keys of a mapping that have the right shape, without the others; `None` if it is no mapping.
pub(super) fn fields(root: &Node, shape: &Shape, problems: &mut Problems<'_>) -> Option<Map<String, Value>> {
    let Rule::Mapping(mapping) = &shape.rule else { unreachable!("a template is a mapping") };
    Reader { problems }.known_fields(root, std::slice::from_ref(mapping), "").map(|(fields, _)| fields)
}

struct Reader<'p, 'a> {
    problems: &'p mut Problems<'a>,
}

impl Reader<'_, '_> {
    fn wrong(&mut self, at: Position, path: &str, message: impl Into<String>) {
        self.problems.add(at, path, message);
    }

    fn kind(&mut self, node: &Node, path: &str, wanted: &str) {
        self.wrong(node.at, path, format!("is {}, not {wanted}", node.kind_name()));
    }

    /// The value as JSON if it has this shape.
    fn value(&mut self, node: &Node, shape: &Shape, path: &str) -> Option<Value> {
        if let Some(check) = shape.check
            && let Err(message) = check(node)
        {
            self.wrong(node.at, path, message);
            return None;
        }
        match &shape.rule {
            Rule::Any => Some(node.to_value()),
            Rule::Bool => {
                if !matches!(node.kind, Kind::Bool(_)) {
                    self.kind(node, path, "true or false");
                    return None;
                }
                Some(node.to_value())
            }
            Rule::Whole { least, most } => {
                let Kind::Number(number) = &node.kind else {
                    self.kind(node, path, "a whole number");
                    return None;
                };
                if !number.as_i64().is_some_and(|value| (*least..=*most).contains(&value)) {
                    self.wrong(node.at, path, format!("{number} is not a whole number from {least} to {most}"));
                    return None;
                }
                Some(node.to_value())
            }
            Rule::Decimal { least, most } => {
                let Kind::Number(number) = &node.kind else {
                    self.kind(node, path, "a number");
                    return None;
                };
                if !number.as_f64().is_some_and(|value| (*least..=*most).contains(&value)) {
                    self.wrong(node.at, path, format!("{number} is not from {least} to {most}"));
                    return None;
                }
                Some(node.to_value())
            }
            Rule::Text(rule) => {
                let text = self.text(node, path)?;
                if let Some(message) = rule.problem(text) {
                    self.wrong(node.at, path, message);
                    return None;
                }
                Some(node.to_value())
            }
            Rule::List { .. } => self.list(node, &shape.rule, path),
            Rule::Mapping(mapping) => self.mapping(node, std::slice::from_ref(mapping), path),
            Rule::Union { .. } => self.union(node, &shape.rule, path),
        }
    }

    fn text<'n>(&mut self, node: &'n Node, path: &str) -> Option<&'n str> {
        match &node.kind {
            Kind::Text(text) => return Some(text),
            Kind::Number(_) | Kind::Bool(_) => self.kind(node, path, "a text; put it in quotes"),
            _ => self.kind(node, path, "a text"),
        }
        None
    }

    fn list(&mut self, node: &Node, rule: &Rule, path: &str) -> Option<Value> {
        let Rule::List { item, noun, least, most } = rule else { unreachable!("the caller looked") };
        let noun = noun.as_deref().unwrap_or("item");
        let Kind::List(nodes) = &node.kind else {
            let wanted = match item.rule {
                Rule::Mapping(_) => format!("a list of {noun}s"),
                _ => "a list; write it as [a, b]".to_owned(),
            };
            self.kind(node, path, &wanted);
            return None;
        };
        if nodes.len() < *least {
            self.wrong(node.at, path, format!("is an empty list; name at least one {noun}, or remove the line"));
        }
        if nodes.len() > *most {
            self.wrong(node.at, path, format!("lists {} {noun}s, more than {most}", nodes.len()));
        }
        let items: Vec<Value> = (0..)
            .zip(nodes)
            .filter_map(|(index, node): (usize, _)| self.value(node, item, &format!("{path}[{index}]")))
            .collect();
        // Without all of them, positions in the list would be wrong.
        (items.len() == nodes.len()).then_some(Value::Array(items))
    }

    /// A mapping that has every required key, without the keys that have a problem.
    fn mapping(&mut self, node: &Node, alternatives: &[Mapping], path: &str) -> Option<Value> {
        let (fields, is_whole) = self.known_fields(node, alternatives, path)?;
        is_whole.then_some(Value::Object(fields))
    }

    /// The fields without a problem, and whether none is missing that is required.
    fn known_fields(
        &mut self,
        node: &Node,
        alternatives: &[Mapping],
        path: &str,
    ) -> Option<(Map<String, Value>, bool)> {
        let Kind::Map(entries) = &node.kind else {
            let first = alternatives[0].keys().next().unwrap_or_default();
            self.kind(node, path, &format!("a mapping with keys such as `{first}:`"));
            return None;
        };
        for entry in entries.iter().filter(|entry| !alternatives.iter().any(|mapping| mapping.has(&entry.key))) {
            let known: Vec<&str> = alternatives.iter().flat_map(Mapping::keys).collect();
            let near = did_you_mean(&entry.key, known.iter().copied());
            let advice = if near.is_empty() { format!("; known here: {}", known.join(", ")) } else { near };
            self.wrong(entry.key_at, &below(path, &shown(&entry.key)), format!("is not a known key{advice}"));
        }
        let mapping = self.alternative(node.at, entries, alternatives, path)?;
        for (key, need) in &mapping.dependent {
            if let Some(node) = find(entries, key)
                && find(entries, need).is_none()
            {
                let what = mapping.title.as_deref().unwrap_or("mapping");
                let message = format!("means something only in a {what} with `{need}`; add it, or remove this");
                self.wrong(node.at, &below(path, key), message);
            }
        }
        let mut fields = Map::new();
        for Field { key, shape } in &mapping.fields {
            let Some(node) = find(entries, key) else {
                continue;
            };
            if matches!(node.kind, Kind::Null) {
                // A forgotten value under `depends_on:` must not mean "no dependency".
                self.wrong(node.at, &below(path, key), "is empty; give it a value or remove the line");
            } else if let Some(value) = self.value(node, shape, &below(path, key)) {
                fields.insert(key.clone(), value);
            }
        }
        for Field { key, .. } in mapping.required().iter().filter(|field| find(entries, &field.key).is_none()) {
            self.wrong(node.at, &below(path, key), format!("is missing; add `{key}:`"));
        }
        let is_whole = mapping.required().iter().all(|field| fields.contains_key(&field.key));
        Some((fields, is_whole))
    }

    /// The only alternative whose required keys are given.
    fn alternative<'m>(
        &mut self,
        at: Position,
        entries: &[Entry],
        alternatives: &'m [Mapping],
        path: &str,
    ) -> Option<&'m Mapping> {
        if let [only] = alternatives {
            return Some(only);
        }
        let given = |mapping: &&Mapping| mapping.required().iter().all(|field| find(entries, &field.key).is_some());
        let fitting: Vec<&Mapping> = alternatives.iter().filter(given).collect();
        let [chosen] = fitting[..] else {
            let names: Vec<&str> = alternatives.iter().filter_map(|mapping| mapping.keys().next()).collect();
            let example =
                alternatives.iter().find_map(example).map_or_else(String::new, |it| format!(", such as `{it}`"));
            self.wrong(at, path, format!("needs exactly one of {}{example}", listed(&names)));
            return None;
        };
        for entry in entries.iter().filter(|entry| !chosen.has(&entry.key)) {
            let Some(other) = alternatives.iter().find(|mapping| mapping.has(&entry.key)) else {
                continue;
            };
            let names = [other, chosen].map(|mapping| mapping.keys().next().unwrap_or_default());
            let message = format!("belongs to `{}`, not to `{}`; remove it", names[0], names[1]);
            self.wrong(entry.value.at, &below(path, &entry.key), message);
        }
        Some(chosen)
    }

    fn union(&mut self, node: &Node, rule: &Rule, path: &str) -> Option<Value> {
        let Rule::Union { texts, mappings, others } = rule else { unreachable!("the caller looked") };
        let other = others.iter().find(|shape| match (&node.kind, &shape.rule) {
            (Kind::Number(_), Rule::Whole { .. } | Rule::Decimal { .. }) | (Kind::Bool(_), Rule::Bool) => true,
            (Kind::Text(_), Rule::Text(_)) => texts.is_empty(),
            _ => false,
        });
        match &node.kind {
            Kind::Map(_) if !mappings.is_empty() => self.mapping(node, mappings, path),
            _ if let Some(shape) = other => self.value(node, shape, path),
            Kind::Text(text) if texts.contains(text) => Some(node.to_value()),
            Kind::Text(text) if !texts.is_empty() => {
                let needs_value = mappings.iter().find(|mapping| mapping.has(text)).and_then(example);
                let message = match needs_value {
                    Some(example) => format!("needs a value; write `{example}`"),
                    None => format!("`{}` is not one of: {}", shown(text), texts.join(", ")),
                };
                self.wrong(node.at, path, message);
                None
            }
            _ if !texts.is_empty() => {
                self.kind(node, path, &format!("one of: {}", texts.join(", ")));
                None
            }
            _ if !mappings.is_empty() => self.mapping(node, mappings, path),
            _ => {
                let first = others.first()?;
                self.value(node, first, path)
            }
        }
    }
}

/// `key: value` of the first key of a mapping, if the schema has an example of it.
fn example(mapping: &Mapping) -> Option<String> {
    let Field { key, shape } = mapping.fields.first()?;
    let Rule::Text(Text { example: Some(example), .. }) = &shape.rule else {
        return None;
    };
    Some(format!("{key}: {example}"))
}
