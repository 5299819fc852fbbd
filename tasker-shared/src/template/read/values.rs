//! Values of any mapping: texts, numbers, durations, lists and choices, each refused at its place
//! and with what to write instead.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde_json::Number;

use super::{Fields, Read};
use crate::template::duration::parse_duration;
use crate::template::yaml::{Kind, Node};

impl Read<'_> {
    pub(super) fn fields<'n>(&mut self, node: &'n Node, path: &str, known: &[&str]) -> Option<Fields<'n>> {
        let Kind::Map(entries) = &node.kind else {
            self.kind(node, path, &format!("a mapping with keys such as `{}:`", known[0]));
            return None;
        };
        let fields = Fields { place: node.place, path: path.to_owned(), entries };
        for entry in entries {
            if !known.contains(&entry.key.as_str()) {
                let near = did_you_mean(&entry.key, known.iter().copied());
                let advice = if near.is_empty() { format!("; known here: {}", known.join(", ")) } else { near };
                let message = format!("is not a known key{advice}");
                self.wrong(entry.key_place, fields.path(&shown(&entry.key)), message);
            }
        }
        Some(fields)
    }

    pub(super) fn required<'n, T>(
        &mut self,
        fields: &Fields<'n>,
        key: &str,
        value: impl FnOnce(&mut Self, &'n Node, &str) -> Option<T>,
    ) -> Option<T> {
        if fields.get(key).is_none() {
            let message = format!("is missing; add `{key}:`");
            self.wrong(fields.place, fields.path(key), message);
        }
        self.optional(fields, key, value)
    }

    pub(super) fn optional<'n, T>(
        &mut self,
        fields: &Fields<'n>,
        key: &str,
        value: impl FnOnce(&mut Self, &'n Node, &str) -> Option<T>,
    ) -> Option<T> {
        let node = fields.get(key)?;
        let path = fields.path(key);
        if matches!(node.kind, Kind::Null) {
            // A forgotten value under `depends_on:` must not mean "no
            // dependency".
            self.wrong(node.place, path, "is empty; give it a value or remove the line");
            return None;
        }
        value(self, node, &path)
    }

    pub(super) fn kind(&mut self, node: &Node, path: &str, wanted: &str) {
        self.wrong(node.place, path, format!("is {}, not {wanted}", node.kind_name()));
    }

    pub(super) fn list<T>(
        &mut self,
        node: &Node,
        path: &str,
        item: impl Fn(&mut Self, &Node, &str) -> Option<T>,
    ) -> Option<Vec<T>> {
        let Kind::List(nodes) = &node.kind else {
            self.kind(node, path, "a list; write it as [a, b]");
            return None;
        };
        let mut items = Vec::with_capacity(nodes.len());
        for (index, node) in nodes.iter().enumerate() {
            items.extend(item(self, node, &format!("{path}[{index}]")));
        }
        // Without all of them, positions in the list would be wrong.
        (items.len() == nodes.len()).then_some(items)
    }

    pub(super) fn text(&mut self, node: &Node, path: &str) -> Option<String> {
        match &node.kind {
            Kind::Text(text) => Some(text.clone()),
            Kind::Number(_) | Kind::Bool(_) => {
                self.kind(node, path, "a text; put it in quotes");
                None
            }
            _ => {
                self.kind(node, path, "a text");
                None
            }
        }
    }

    pub(super) fn text_where(
        &mut self,
        node: &Node,
        path: &str,
        fits: impl FnOnce(&str) -> bool,
        message: impl FnOnce(&str) -> String,
    ) -> Option<String> {
        let text = self.text(node, path)?;
        if !fits(&text) {
            let message = message(&text);
            self.wrong(node.place, path, message);
            return None;
        }
        Some(text)
    }

    /// A text of a certain shape, which `rule` describes.
    pub(super) fn text_like(&mut self, node: &Node, path: &str, fits: fn(&str) -> bool, rule: &str) -> Option<String> {
        self.text_where(node, path, fits, |text| format!("`{}` {rule}", shown(text)))
    }

    pub(super) fn duration(&mut self, node: &Node, path: &str) -> Option<Duration> {
        let text = match &node.kind {
            Kind::Text(text) => text.clone(),
            Kind::Number(number) => number.to_string(),
            _ => {
                self.kind(node, path, "a duration such as 30s");
                return None;
            }
        };
        match parse_duration(&text) {
            Ok(duration) => Some(duration),
            Err(message) => {
                self.wrong(node.place, path, format!("`{}` {message}", shown(&text)));
                None
            }
        }
    }

    pub(super) fn number<'n>(&mut self, node: &'n Node, path: &str, wanted: &str) -> Option<&'n Number> {
        let Kind::Number(number) = &node.kind else {
            self.kind(node, path, wanted);
            return None;
        };
        Some(number)
    }

    pub(super) fn whole<T: TryFrom<i64> + PartialOrd + Display>(
        &mut self,
        node: &Node,
        path: &str,
        range: RangeInclusive<T>,
    ) -> Option<T> {
        let number = self.number(node, path, "a whole number")?;
        let value = number.as_i64().and_then(|value| T::try_from(value).ok());
        match value {
            Some(value) if range.contains(&value) => Some(value),
            _ => {
                let (least, most) = (range.start(), range.end());
                let message = format!("{number} is not a whole number from {least} to {most}");
                self.wrong(node.place, path, message);
                None
            }
        }
    }

    pub(super) fn decimal(&mut self, node: &Node, path: &str, range: RangeInclusive<f64>) -> Option<f64> {
        let number = self.number(node, path, "a number")?;
        match number.as_f64() {
            Some(value) if range.contains(&value) => Some(value),
            _ => {
                let (least, most) = (range.start(), range.end());
                let message = format!("{number} is not from {least} to {most}");
                self.wrong(node.place, path, message);
                None
            }
        }
    }

    pub(super) fn choice<T: Copy>(&mut self, node: &Node, path: &str, choices: &[(&str, T)]) -> Option<T> {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let Kind::Text(text) = &node.kind else {
            self.kind(node, path, &format!("one of: {}", names.join(", ")));
            return None;
        };
        let chosen = choices.iter().find(|(name, _)| name == text).map(|(_, value)| *value);
        if chosen.is_none() {
            let message = format!("`{}` is not one of: {}", shown(text), names.join(", "));
            self.wrong(node.place, path, message);
        }
        chosen
    }
}

/// A value of the file inside a message: short, and on one line.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 60;
    let mut shown: String = text.chars().take(MOST).map(|c| if c.is_control() { '?' } else { c }).collect();
    if text.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}

/// `; did you mean …?`, or nothing if no candidate is close.
pub(super) fn did_you_mean<'c>(word: &str, candidates: impl Iterator<Item = &'c str>) -> String {
    let limit = (word.len() / 3).clamp(1, 3);
    candidates
        .filter(|candidate| candidate.len().abs_diff(word.len()) <= limit)
        .map(|candidate| (edit_distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map_or_else(String::new, |(_, near)| format!("; did you mean `{near}`?"))
}

/// Levenshtein distance in bytes: names are ASCII.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
