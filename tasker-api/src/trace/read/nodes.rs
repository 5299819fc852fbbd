//! The tree of the spans that are shown.

use std::collections::HashMap;

use chrono::{DateTime, Utc};

use super::flat::Shown;
use super::{DEEPEST, Flat, Include, Node, is_open, ms};
use tasker_shared::trace::names;

pub(super) struct Tree<'a> {
    spans: &'a [Flat],
    children: Vec<Vec<usize>>,
    roots: Vec<usize>,
    include: &'a Include,
    began: DateTime<Utc>,
}

impl<'a> Tree<'a> {
    pub(super) fn of(spans: &'a [Flat], include: &'a Include, began: DateTime<Utc>) -> Self {
        let at: HashMap<&str, usize> = spans.iter().enumerate().map(|(n, span)| (span.span_id.as_str(), n)).collect();
        let mut children = vec![Vec::new(); spans.len()];
        let mut roots = Vec::new();
        for (n, span) in spans.iter().enumerate() {
            let parent = span.parent_span_id.as_deref().and_then(|id| at.get(id)).copied();
            match parent {
                Some(parent) if parent != n => children[parent].push(n),
                _ => roots.push(n),
            }
        }
        if let Some(under) = &include.under {
            roots = at.get(under.as_str()).copied().into_iter().collect();
        }
        Self { spans, children, roots, include, began }
    }

    /// The trees within the limits, and how many spans they hold. The first spans in the order in
    /// which a reader meets them are shown: each with all that are above it.
    pub(super) fn nodes(&self, shown: &mut Shown<'a>) -> (Vec<Node>, usize) {
        let below = self.below();
        let mut left = self.include.max_spans;
        let roots = self.roots.clone();
        let nodes: Vec<Node> =
            roots.into_iter().filter_map(|root| self.node(root, 1, &below, &mut left, shown)).collect();
        (nodes, self.include.max_spans - left)
    }

    /// How many wanted spans each span has below it; cycles of a backend's spans end somewhere.
    fn below(&self) -> Vec<usize> {
        let mut below = vec![0; self.spans.len()];
        let mut seen = vec![false; self.spans.len()];
        let mut stack: Vec<(usize, usize)> = self.roots.iter().map(|root| (*root, 0)).collect();
        while let Some((at, next)) = stack.pop() {
            seen[at] = true;
            match self.children[at].get(next) {
                Some(child) => {
                    stack.push((at, next + 1));
                    if !seen[*child] {
                        stack.push((*child, 0));
                    }
                }
                None => {
                    below[at] =
                        self.children[at].iter().map(|child| below[*child] + usize::from(self.wanted(*child))).sum();
                }
            }
        }
        below
    }

    fn wanted(&self, at: usize) -> bool {
        self.include.transitions
            || !matches!(
                &*self.spans[at].name,
                names::TASK_STATE_TRANSITION
                    | names::STEP_STATE_TRANSITION
                    | names::STEP_DISCOVERY
                    | names::STEP_ENQUEUING
                    | names::RESULT_EVALUATION
                    | names::RESULT_SUBMISSION
            )
    }

    fn node(&self, at: usize, depth: usize, below: &[usize], left: &mut usize, shown: &mut Shown<'a>) -> Option<Node> {
        if *left == 0 || !self.wanted(at) {
            return None;
        }
        *left -= 1;
        let span = &self.spans[at];
        let mut children = Vec::new();
        if depth < self.include.depth.clamp(1, DEEPEST) {
            for child in &self.children[at] {
                if *left == 0 {
                    break;
                }
                children.extend(self.node(*child, depth + 1, below, left, shown));
            }
        }
        let held: usize = children.iter().map(|child: &Node| 1 + held_below(child)).sum();
        Some(Node {
            span_id: span.span_id.clone(),
            parent_span_id: span.parent_span_id.clone(),
            name: span.name.to_string(),
            service: span.service.to_string(),
            kind: span.kind.to_owned(),
            offset_ms: ms(span.start - self.began),
            duration_ms: ms(span.end - span.start),
            status: if span.error.is_some() { "error" } else { "ok" }.to_owned(),
            error: span.error.clone(),
            in_progress: is_open(span),
            source: if span.of_log { "log" } else { "backend" }.to_owned(),
            attributes: self.include.attributes.then(|| shown.all(&span.attributes)),
            events: if self.include.events { span.events.clone() } else { Vec::new() },
            links: if self.include.links { span.links.clone() } else { Vec::new() },
            children,
            omitted: below[at].saturating_sub(held),
        })
    }
}

fn held_below(node: &Node) -> usize {
    node.children.iter().map(|child| 1 + held_below(child)).sum()
}
