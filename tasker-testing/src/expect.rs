//! `assert_trace!`: an expected tree, written as one.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::trace::{Forest, Trace, plain};

/// What must hang below a span.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    /// Each stands for as many spans as its `times` says.
    pub nodes: Vec<Node>,
    /// Whether other spans may be there too.
    pub open: bool,
}

/// An expected span.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its name.
    pub name: &'static str,
    /// Attributes that it must have, as [`Span::get`](crate::Span::get) gives them.
    pub attributes: Vec<(&'static str, Value)>,
    /// How many such spans there are.
    pub times: usize,
    /// What hangs below it; `None` says nothing about that.
    pub below: Option<Tree>,
}

/// Asserts that a [`Trace`] has this tree.
///
/// A node is `"name"`, then if wanted `* n` for n such spans, `[key = value, …]` for attributes
/// (a key with a dot is quoted; `kind`, `service`, `status` and `links` are asked for the same
/// way) and `{ … }` for what hangs below: exactly these spans in any order, or with `..` at least
/// these. Without braces nothing is said about what hangs below. Panics with both trees.
#[macro_export]
macro_rules! assert_trace {
    ($trace:expr, { $($tree:tt)* }) => {
        $crate::expect::check(&$trace, &$crate::expected!($($tree)*))
    };
}

/// The [`Tree`](crate::expect::Tree) of [`assert_trace!`] as a value.
#[macro_export]
macro_rules! expected {
    ($($nodes:tt)*) => {{
        #[allow(unused_mut, reason = "a tree may be empty")]
        let mut tree = $crate::expect::Tree::default();
        $crate::__nodes!(tree; $($nodes)*);
        tree
    }};
}

#[doc(hidden)]
#[macro_export]
macro_rules! __nodes {
    ($tree:ident;) => {};
    ($tree:ident; ..) => { $tree.open = true; };
    ($tree:ident; , $($rest:tt)*) => { $crate::__nodes!($tree; $($rest)*) };
    ($tree:ident; $name:literal $($rest:tt)*) => { $crate::__node!($tree; $name; 1; []; $($rest)*) };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __node {
    ($tree:ident; $name:literal; $times:literal; [$($attributes:tt)*]; * $n:literal $($rest:tt)*) => {
        $crate::__node!($tree; $name; $n; [$($attributes)*]; $($rest)*)
    };
    ($tree:ident; $name:literal; $times:literal; []; [$($attributes:tt)*] $($rest:tt)*) => {
        $crate::__node!($tree; $name; $times; [$($attributes)*]; $($rest)*)
    };
    ($tree:ident; $name:literal; $times:literal; [$($key:tt = $value:expr),* $(,)?]; { $($below:tt)* } $($rest:tt)*) => {
        $tree.nodes.push($crate::expect::Node {
            name: $name,
            attributes: vec![$(($crate::__key!($key), $value.into())),*],
            times: $times,
            below: Some($crate::expected!($($below)*)),
        });
        $crate::__nodes!($tree; $($rest)*)
    };
    ($tree:ident; $name:literal; $times:literal; [$($key:tt = $value:expr),* $(,)?]; $($rest:tt)*) => {
        $tree.nodes.push($crate::expect::Node {
            name: $name,
            attributes: vec![$(($crate::__key!($key), $value.into())),*],
            times: $times,
            below: None,
        });
        $crate::__nodes!($tree; $($rest)*)
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __key {
    ($key:ident) => {
        stringify!($key)
    };
    ($key:literal) => {
        $key
    };
}

/// Compares; [`assert_trace!`] calls it.
///
/// # Panics
/// If the trace is not as expected, with both trees.
#[track_caller]
pub fn check(trace: &Trace, expected: &Tree) {
    if let Err(difference) = compare(trace, expected) {
        panic!("{difference}");
    }
}

/// Whether the trace is as expected.
///
/// # Errors
/// If it is not, a drawing of both trees: `+` is not expected, `-` is missing, `~` differs.
pub fn compare(trace: &Trace, expected: &Tree) -> Result<(), String> {
    let forest = Forest::new(trace);
    if fit(&forest, expected, forest.roots()).is_exact(expected) {
        return Ok(());
    }
    let keys: Vec<&str> = mentioned(expected).into_iter().collect();
    let mut drawing = Drawing { forest: &forest, keys: &keys, arrived: String::new(), expected: String::new() };
    drawing.level(expected, forest.roots(), 0);
    Err(format!(
        "the trace is not as expected (+ not expected, - missing, ~ differs below or in an attribute)\n\
         --- arrived\n{}--- expected\n{}",
        drawing.arrived, drawing.expected
    ))
}

/// Who is who on one level.
struct Fit {
    /// Index of the span that each expected one is, each node as often as its `times` says.
    wanted: Vec<(usize, Option<usize>)>,
    /// Spans that none of them is.
    others: Vec<usize>,
}

impl Fit {
    fn is_exact(&self, tree: &Tree) -> bool {
        self.wanted.iter().all(|(_, span)| span.is_some()) && (tree.open || self.others.is_empty())
    }
}

fn fits(forest: &Forest<'_>, node: &Node, place: usize) -> bool {
    let span = &forest.spans[place];
    span.name == node.name
        && node.attributes.iter().all(|(key, value)| span.get(key).as_ref() == Some(value))
        && node.below.as_ref().is_none_or(|tree| fit(forest, tree, forest.below(place)).is_exact(tree))
}

/// The largest matching, by augmenting paths: nodes may be as vague as they like.
fn fit(forest: &Forest<'_>, tree: &Tree, places: &[usize]) -> Fit {
    let wanted: Vec<usize> = tree.nodes.iter().enumerate().flat_map(|(n, node)| vec![n; node.times]).collect();
    let possible: Vec<Vec<usize>> = tree
        .nodes
        .iter()
        .map(|node| (0..places.len()).filter(|at| fits(forest, node, places[*at])).collect())
        .collect();
    let mut taken: Vec<Option<usize>> = vec![None; places.len()];
    for one in 0..wanted.len() {
        augment(one, &wanted, &possible, &mut taken, &mut vec![false; places.len()]);
    }
    let of = |one: usize| taken.iter().position(|by| *by == Some(one)).map(|at| places[at]);
    Fit {
        wanted: wanted.iter().enumerate().map(|(one, node)| (*node, of(one))).collect(),
        others: places.iter().zip(&taken).filter(|(_, by)| by.is_none()).map(|(place, _)| *place).collect(),
    }
}

fn augment(
    one: usize,
    wanted: &[usize],
    possible: &[Vec<usize>],
    taken: &mut [Option<usize>],
    seen: &mut [bool],
) -> bool {
    for &at in &possible[wanted[one]] {
        if std::mem::replace(&mut seen[at], true) {
            continue;
        }
        if taken[at].is_none_or(|other| augment(other, wanted, possible, taken, seen)) {
            taken[at] = Some(one);
            return true;
        }
    }
    false
}

fn mentioned(tree: &Tree) -> BTreeSet<&'static str> {
    let of = |node: &Node| {
        let below = node.below.as_ref().map(mentioned).unwrap_or_default();
        node.attributes.iter().map(|(key, _)| *key).chain(below).collect::<Vec<_>>()
    };
    tree.nodes.iter().flat_map(of).collect()
}

struct Drawing<'a> {
    forest: &'a Forest<'a>,
    keys: &'a [&'a str],
    arrived: String,
    expected: String,
}

impl Drawing<'_> {
    fn level(&mut self, tree: &Tree, places: &[usize], depth: usize) {
        let Fit { wanted, mut others } = fit(self.forest, tree, places);
        for (node, place) in wanted {
            let node = &tree.nodes[node];
            // What is missing may be there with something wrong: show the two side by side.
            let near = place.or_else(|| {
                let like = |at: &usize| {
                    let span = &self.forest.spans[others[*at]];
                    node.attributes.iter().filter(|(key, value)| span.get(key).as_ref() == Some(value)).count()
                };
                let named = (0..others.len()).filter(|at| self.forest.spans[others[*at]].name == node.name);
                named.max_by_key(like).map(|at| others.remove(at))
            });
            match (place, near) {
                (Some(place), _) => {
                    self.span("  ", place, depth);
                    self.node("  ", node, depth);
                }
                (None, Some(near)) => {
                    self.line('~', near, depth);
                    push(&mut self.expected, '~', depth, &describe(node));
                    if let Some(below) = &node.below {
                        self.level(below, self.forest.below(near), depth + 1);
                    }
                }
                (None, None) => self.node("- ", node, depth),
            }
        }
        for other in others {
            self.span(if tree.open { "  " } else { "+ " }, other, depth);
        }
        if tree.open {
            push(&mut self.expected, ' ', depth, "..");
        }
    }

    fn line(&mut self, mark: char, place: usize, depth: usize) {
        let text = self.forest.spans[place].describe(self.keys);
        push(&mut self.arrived, mark, depth, &text);
    }

    fn span(&mut self, mark: &str, place: usize, depth: usize) {
        self.line(mark.chars().next().unwrap_or(' '), place, depth);
        for below in self.forest.below(place) {
            self.span(mark, *below, depth + 1);
        }
    }

    fn node(&mut self, mark: &str, node: &Node, depth: usize) {
        let mark_char = mark.chars().next().unwrap_or(' ');
        push(&mut self.expected, mark_char, depth, &describe(node));
        if let Some(tree) = &node.below {
            for below in tree.nodes.iter().flat_map(|node| vec![node; node.times]) {
                self.node(mark, below, depth + 1);
            }
            if tree.open {
                push(&mut self.expected, mark_char, depth + 1, "..");
            }
        }
    }
}

fn push(out: &mut String, mark: char, depth: usize, text: &str) {
    out.push(mark);
    out.push(' ');
    out.push_str(&"  ".repeat(depth));
    out.push_str(text);
    out.push('\n');
}

fn describe(node: &Node) -> String {
    let attributes = node.attributes.iter().map(|(key, value)| format!(" {key}={}", plain(value)));
    std::iter::once(node.name.to_owned()).chain(attributes).collect()
}
