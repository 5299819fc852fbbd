//! Steps and what they depend on -> a checked DAG.
//!
//! Pure, and linear in steps and edges: 20,000 steps are an ordinary day. It
//! knows names and edges, never handlers, inputs or states.

use std::collections::HashMap;
use std::fmt;

/// The most steps one template may hold.
pub const MAX_STEPS: usize = 20_000;

/// A directed acyclic graph of steps. A step is named by its index, which is
/// its position in the template file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    names: Vec<String>,
    parents: Edges,
    children: Edges,
    order: Vec<u32>,
    /// The position of each step in `order`.
    position: Vec<u32>,
}

/// Neighbours of every step in two flat vectors: those of step `i` are
/// `items[starts[i]..starts[i + 1]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Edges {
    starts: Vec<u32>,
    items: Vec<u32>,
}

impl Edges {
    fn of(&self, step: u32) -> &[u32] {
        let step = step as usize;
        &self.items[self.starts[step] as usize..self.starts[step + 1] as usize]
    }

    /// The same edges read the other way; neighbours come in index order.
    fn reversed(&self) -> Self {
        let steps = self.starts.len() - 1;
        let mut starts = vec![0_u32; steps + 1];
        for &to in &self.items {
            starts[to as usize + 1] += 1;
        }
        for step in 0..steps {
            starts[step + 1] += starts[step];
        }
        let mut next = starts.clone();
        let mut items = vec![0_u32; self.items.len()];
        for from in 0..index(steps) {
            for &to in self.of(from) {
                items[next[to as usize] as usize] = from;
                next[to as usize] += 1;
            }
        }
        Self { starts, items }
    }
}

/// Why steps and dependencies are not a DAG. Indexes are the steps' positions in
/// the file, so that the caller can point at the line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GraphError {
    /// More than [`MAX_STEPS`].
    TooManySteps {
        /// Steps given.
        count: usize,
    },
    /// Two steps have one name.
    DuplicateStep {
        /// The name.
        name: String,
        /// Index of the step that had it first.
        first: usize,
        /// Index of the step that repeats it.
        step: usize,
    },
    /// A step names one dependency twice.
    DuplicateDependency {
        /// The step's name.
        name: String,
        /// The step's index.
        step: usize,
        /// Position in its `depends_on` of the repetition.
        position: usize,
        /// The dependency's name.
        dependency: String,
    },
    /// A step depends on a name that no step has.
    UnknownDependency {
        /// The step's name.
        name: String,
        /// The step's index.
        step: usize,
        /// Position in its `depends_on`.
        position: usize,
        /// The unknown name.
        dependency: String,
    },
    /// A step depends on itself.
    SelfDependency {
        /// The step's name.
        name: String,
        /// The step's index.
        step: usize,
        /// Position in its `depends_on`.
        position: usize,
    },
    /// Steps wait for each other in a circle.
    Cycle {
        /// Names in the order of waiting: each depends on the next, the last
        /// on the first.
        names: Vec<String>,
        /// Index of the first of them.
        step: usize,
        /// Position of the second in the first's `depends_on`.
        position: usize,
    },
}

impl fmt::Display for GraphError {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManySteps { count } => write!(
                to,
                "{count} steps are more than the {MAX_STEPS} a template may have; \
                 split the work into several tasks"
            ),
            Self::DuplicateStep { name, .. } => {
                write!(to, "a step named `{name}` exists already; step names must differ")
            }
            Self::DuplicateDependency { name, dependency, .. } => {
                write!(to, "step `{name}` depends on `{dependency}` twice; remove one")
            }
            Self::UnknownDependency { name, dependency, .. } => {
                write!(to, "step `{name}` depends on `{dependency}`, which is not a step")
            }
            Self::SelfDependency { name, .. } => {
                write!(to, "step `{name}` depends on itself; remove it from its depends_on")
            }
            Self::Cycle { names, .. } => {
                write!(to, "steps wait for each other in a circle: {}; remove one of these dependencies", circle(names))
            }
        }
    }
}

impl std::error::Error for GraphError {}

/// `a -> b -> c -> a`, with the middle of a very long circle left out.
fn circle(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let shown = names[..names.len().min(SHOWN)].join(" -> ");
    let more = match names.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" -> … {more} more"),
    };
    format!("{shown}{more} -> {}", names[0])
}

impl Graph {
    /// Checks the steps, in file order, and builds their graph; the first
    /// thing wrong is the error. [`Graph::check`] reports everything.
    pub fn new<'a>(steps: impl Iterator<Item = (&'a str, &'a [String])>) -> Result<Self, GraphError> {
        Self::check(steps).map_err(|mut errors| errors.swap_remove(0))
    }

    /// Like [`Graph::new`], with everything that is wrong. The list is never
    /// empty.
    pub fn check<'a>(steps: impl Iterator<Item = (&'a str, &'a [String])>) -> Result<Self, Vec<GraphError>> {
        let steps: Vec<(&str, &[String])> = steps.collect();
        if steps.len() > MAX_STEPS {
            return Err(vec![GraphError::TooManySteps { count: steps.len() }]);
        }
        let mut errors = Vec::new();

        let mut by_name = HashMap::with_capacity(steps.len());
        for (step, &(name, _)) in steps.iter().enumerate() {
            if let Some(&first) = by_name.get(name) {
                errors.push(GraphError::DuplicateStep { name: name.to_owned(), first, step });
            } else {
                by_name.insert(name, step);
            }
        }

        let mut starts = Vec::with_capacity(steps.len() + 1);
        let mut items: Vec<u32> = Vec::new();
        // The last step that named each dependency, which finds repetitions
        // without a set per step.
        let mut named_by = vec![usize::MAX; steps.len()];
        starts.push(0);
        for (step, &(name, depends_on)) in steps.iter().enumerate() {
            let name = || name.to_owned();
            for (position, dependency) in depends_on.iter().enumerate() {
                match by_name.get(dependency.as_str()) {
                    None => errors.push(GraphError::UnknownDependency {
                        name: name(),
                        step,
                        position,
                        dependency: dependency.clone(),
                    }),
                    Some(&parent) if parent == step => {
                        errors.push(GraphError::SelfDependency { name: name(), step, position });
                    }
                    Some(&parent) if named_by[parent] == step => {
                        errors.push(GraphError::DuplicateDependency {
                            name: name(),
                            step,
                            position,
                            dependency: dependency.clone(),
                        });
                    }
                    Some(&parent) => {
                        named_by[parent] = step;
                        items.push(index(parent));
                    }
                }
            }
            starts.push(index(items.len()));
        }

        let parents = Edges { starts, items };
        let children = parents.reversed();
        let order = topological(&parents, &children);
        if order.len() < steps.len() {
            cycles(&steps, &parents, &order, &mut errors);
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let mut position = vec![0; order.len()];
        for (at, &step) in order.iter().enumerate() {
            position[step as usize] = index(at);
        }
        let names = steps.iter().map(|(name, _)| (*name).to_owned()).collect();
        Ok(Self { names, parents, children, order, position })
    }

    /// Number of steps.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is no step at all.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The step's name.
    pub fn name(&self, step: u32) -> &str {
        &self.names[step as usize]
    }

    /// The steps this one waits for, in the order of its `depends_on`.
    pub fn parents(&self, step: u32) -> &[u32] {
        self.parents.of(step)
    }

    /// The steps that wait for this one, in index order.
    pub fn children(&self, step: u32) -> &[u32] {
        self.children.of(step)
    }

    /// How many steps this one waits for.
    pub fn dependencies(&self, step: u32) -> u32 {
        index(self.parents(step).len())
    }

    /// The steps that wait for nothing, in index order.
    pub fn roots(&self) -> impl Iterator<Item = u32> + '_ {
        (0..index(self.len())).filter(|&step| self.parents(step).is_empty())
    }

    /// Every step after all the steps it waits for; among those that could
    /// come next, the ones freed first come first.
    pub fn topological_order(&self) -> &[u32] {
        &self.order
    }

    /// Which of the pairs `(step, ancestor)` are wrong, as indexes in `pairs`:
    /// those where `step` does not wait, directly or through others, for
    /// `ancestor`.
    ///
    /// Sixty-four ancestors are carried through the graph at a time, one bit
    /// each, so that even 20,000 different ones take 313 passes over the edges
    /// and memory for one pass.
    pub fn not_ancestors(&self, pairs: &[(u32, u32)]) -> Vec<usize> {
        let mut wrong = Vec::new();
        let mut distant: Vec<(u32, usize)> = Vec::new();
        for (at, &(step, ancestor)) in pairs.iter().enumerate() {
            if self.position[ancestor as usize] >= self.position[step as usize] {
                wrong.push(at);
            } else if !self.parents(step).contains(&ancestor) {
                distant.push((ancestor, at));
            }
        }
        distant.sort_unstable();
        let targets: Vec<&[(u32, usize)]> = distant.chunk_by(|a, b| a.0 == b.0).collect();
        let mut reached = vec![0_u64; self.len()];
        for block in targets.chunks(64) {
            reached.fill(0);
            for (bit, target) in block.iter().enumerate() {
                reached[target[0].0 as usize] |= 1 << bit;
            }
            for &step in &self.order {
                let inherited = self.parents(step).iter().fold(0, |all, &p| all | reached[p as usize]);
                reached[step as usize] |= inherited;
            }
            for (bit, target) in block.iter().enumerate() {
                wrong.extend(target.iter().map(|&(_, at)| at).filter(|&at| {
                    let step = pairs[at].0 as usize;
                    reached[step] & (1 << bit) == 0
                }));
            }
        }
        wrong.sort_unstable();
        wrong
    }
}

/// Kahn's algorithm; steps on or behind a cycle are missing from the result.
fn topological(parents: &Edges, children: &Edges) -> Vec<u32> {
    let steps = index(parents.starts.len() - 1);
    let mut waiting: Vec<usize> = (0..steps).map(|step| parents.of(step).len()).collect();
    let mut order: Vec<u32> = (0..steps).filter(|&step| waiting[step as usize] == 0).collect();
    let mut done = 0;
    while done < order.len() {
        for &child in children.of(order[done]) {
            waiting[child as usize] -= 1;
            if waiting[child as usize] == 0 {
                order.push(child);
            }
        }
        done += 1;
    }
    order
}

/// Reports disjoint cycles among the steps that `order` lacks. Each of those
/// has a parent that `order` lacks too, so walking such parents always ends on
/// a step already walked; if this walk passed it, the walk closed a cycle.
fn cycles(steps: &[(&str, &[String])], parents: &Edges, order: &[u32], errors: &mut Vec<GraphError>) {
    let mut seen = vec![false; steps.len()];
    let mut on_walk = vec![false; steps.len()];
    let mut ordered = vec![false; steps.len()];
    for &step in order {
        ordered[step as usize] = true;
    }
    for start in 0..index(steps.len()) {
        if ordered[start as usize] || seen[start as usize] {
            continue;
        }
        let mut walk = Vec::new();
        let mut step = start;
        while !seen[step as usize] {
            seen[step as usize] = true;
            on_walk[step as usize] = true;
            walk.push(step);
            let unordered = parents.of(step).iter().find(|&&parent| !ordered[parent as usize]);
            step = *unordered.expect("a step that never became ready waits for another such");
        }
        if on_walk[step as usize] {
            let begin = walk.iter().position(|&passed| passed == step).unwrap_or(0);
            errors.push(named_cycle(steps, &walk[begin..]));
        }
        for passed in walk {
            on_walk[passed as usize] = false;
        }
    }
}

/// The cycle told from its step that comes first in the file.
fn named_cycle(steps: &[(&str, &[String])], cycle: &[u32]) -> GraphError {
    let mut cycle = cycle.to_vec();
    let first = cycle.iter().enumerate().min_by_key(|(_, step)| **step).map_or(0, |(at, _)| at);
    cycle.rotate_left(first);
    let name = |at: usize| steps[cycle[at % cycle.len()] as usize].0;
    let step = cycle[0] as usize;
    let position = steps[step].1.iter().position(|dependency| dependency == name(1));
    GraphError::Cycle {
        names: (0..cycle.len()).map(|at| name(at).to_owned()).collect(),
        step,
        position: position.unwrap_or(0),
    }
}

/// Step and edge counts fit: a template holds at most [`MAX_STEPS`] steps, each
/// naming another at most once, and 20,000² is below `u32::MAX`.
fn index(value: usize) -> u32 {
    u32::try_from(value).expect("at most MAX_STEPS squared edges")
}

#[cfg(test)]
mod tests;
