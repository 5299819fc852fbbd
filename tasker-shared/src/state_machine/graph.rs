//! Steps and what they depend on -> a checked DAG.
//!
//! Pure, and linear in steps and edges: 20,000 steps are an ordinary day. It
//! knows names and edges, never handlers, inputs or states.

use std::collections::HashMap;
use std::fmt;

/// The most steps one template may hold.
pub const MAX_STEPS: usize = 20_000;

/// A directed acyclic graph of steps. A step is named by its index, which is
/// its place in the template file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    names: Vec<String>,
    parents: Edges,
    children: Edges,
    order: Vec<u32>,
    /// The place of each step in `order`.
    place: Vec<u32>,
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

/// Why steps and dependencies are not a DAG. Indexes are the steps' places in
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
        /// Place in its `depends_on` of the repetition.
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
        /// Place in its `depends_on`.
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
        /// Place in its `depends_on`.
        position: usize,
    },
    /// Steps wait for each other in a circle.
    Cycle {
        /// Names in the order of waiting: each depends on the next, the last
        /// on the first.
        names: Vec<String>,
        /// Index of the first of them.
        step: usize,
        /// Place of the second in the first's `depends_on`.
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
        let mut place = vec![0; order.len()];
        for (at, &step) in order.iter().enumerate() {
            place[step as usize] = index(at);
        }
        let names = steps.iter().map(|(name, _)| (*name).to_owned()).collect();
        Ok(Self { names, parents, children, order, place })
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

    /// Which of the pairs `(step, ancestor)` are wrong, as places in `pairs`:
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
            if self.place[ancestor as usize] >= self.place[step as usize] {
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Step = (String, Vec<String>);

    fn steps(text: &str) -> Vec<Step> {
        text.split_whitespace()
            .map(|step| {
                let (name, parents) = step.split_once('<').unwrap_or((step, ""));
                let parents = parents.split(',').filter(|p| !p.is_empty()).map(str::to_owned);
                (name.to_owned(), parents.collect())
            })
            .collect()
    }

    fn check(steps: &[Step]) -> Result<Graph, Vec<GraphError>> {
        Graph::check(steps.iter().map(|(name, parents)| (name.as_str(), parents.as_slice())))
    }

    fn graph(text: &str) -> Graph {
        check(&steps(text)).unwrap()
    }

    fn messages(text: &str) -> Vec<String> {
        check(&steps(text)).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn diamond_has_its_edges_both_ways() {
        let graph = graph("a b<a c<a d<c,b");
        assert_eq!(graph.roots().collect::<Vec<_>>(), [0]);
        assert_eq!(graph.children(0), [1, 2]);
        assert_eq!(graph.parents(3), [2, 1]);
        assert_eq!(graph.children(3), [0_u32; 0]);
        assert_eq!(graph.dependencies(3), 2);
        assert_eq!(graph.topological_order(), [0, 1, 2, 3]);
        assert_eq!((graph.len(), graph.name(2)), (4, "c"));
    }

    #[test]
    fn no_steps_make_an_empty_graph() {
        let graph = graph("");
        assert!(graph.is_empty());
        assert_eq!(graph.roots().count(), 0);
    }

    #[test]
    fn file_order_need_not_be_run_order() {
        assert_eq!(graph("c<b b<a a").topological_order(), [2, 1, 0]);
    }

    #[test]
    fn every_mistake_is_named() {
        assert_eq!(
            messages("a a b<x,b c<b,b"),
            [
                "a step named `a` exists already; step names must differ",
                "step `b` depends on `x`, which is not a step",
                "step `b` depends on itself; remove it from its depends_on",
                "step `c` depends on `b` twice; remove one",
            ]
        );
    }

    #[test]
    fn cycles_are_told_in_order_of_waiting_from_the_file_order_first() {
        assert_eq!(
            messages("root z<root,c b<a a<z c<b tail<c"),
            ["steps wait for each other in a circle: z -> c -> b -> a -> z; \
              remove one of these dependencies"]
        );
        let errors = check(&steps("root z<root,c b<a a<z c<b")).unwrap_err();
        assert!(matches!(&errors[..], [GraphError::Cycle { step: 1, position: 1, .. }]));
    }

    #[test]
    fn separate_cycles_are_all_reported() {
        let errors = check(&steps("a<b b<a c<d,a d<c e<d")).unwrap_err();
        assert_eq!(errors.len(), 2, "{errors:?}");
    }

    #[test]
    fn a_very_long_cycle_is_told_in_short() {
        let text: Vec<String> = (0..1000).map(|step| format!("s{step}<s{}", (step + 999) % 1000)).collect();
        let message = messages(&text.join(" ")).remove(0);
        assert!(message.contains("s0 -> s999 -> s998"), "{message}");
        assert!(message.contains("… 988 more -> s0;"), "{message}");
    }

    #[test]
    fn one_step_too_many_is_refused() {
        let many: Vec<Step> = (0..=MAX_STEPS).map(|n| (format!("s{n}"), vec![])).collect();
        assert_eq!(check(&many), Err(vec![GraphError::TooManySteps { count: MAX_STEPS + 1 }]));
        assert!(check(&many[..MAX_STEPS]).is_ok());
    }

    #[test]
    fn largest_template_is_checked_with_distant_ancestors() {
        let count = MAX_STEPS;
        let all: Vec<Step> = (0..count)
            .map(|n| {
                let parents = [1, 2, 7].iter().filter(|&&back| back <= n);
                (format!("s{n}"), parents.map(|back| format!("s{}", n - back)).collect())
            })
            .collect();
        let graph = check(&all).unwrap();
        assert_eq!(graph.topological_order().len(), count);
        let pairs: Vec<(u32, u32)> = (1..index(count)).flat_map(|n| [(n, n / 2), (n / 2, n)]).collect();
        let wrong = graph.not_ancestors(&pairs);
        assert_eq!(wrong, (0..count - 1).map(|n| 2 * n + 1).collect::<Vec<_>>());
    }

    #[test]
    fn a_step_is_not_its_own_ancestor() {
        assert_eq!(graph("a b<a").not_ancestors(&[(0, 0), (1, 0), (1, 1), (0, 1)]), [0, 2, 3]);
    }

    /// Random DAG: step n depends on some steps before it, then the file order
    /// is shuffled.
    fn dag() -> impl Strategy<Value = Vec<Step>> {
        proptest::collection::vec(proptest::collection::btree_set(0_usize..40, 0..5), 1..40)
            .prop_map(|picks| {
                picks
                    .into_iter()
                    .enumerate()
                    .map(|(n, parents)| {
                        let parents = parents.into_iter().filter(|&parent| parent < n);
                        (format!("s{n}"), parents.map(|p| format!("s{p}")).collect())
                    })
                    .collect::<Vec<Step>>()
            })
            .prop_shuffle()
    }

    proptest! {
        #[test]
        fn order_puts_every_step_once_after_its_parents(steps in dag()) {
            let graph = check(&steps).unwrap();
            let mut done = vec![false; graph.len()];
            for &step in graph.topological_order() {
                prop_assert!(graph.parents(step).iter().all(|&parent| done[parent as usize]));
                prop_assert!(!std::mem::replace(&mut done[step as usize], true));
            }
            prop_assert!(done.iter().all(|&step| step));
        }

        #[test]
        fn children_mirror_parents(steps in dag()) {
            let graph = check(&steps).unwrap();
            let all = 0..index(graph.len());
            for step in all.clone() {
                for other in all.clone() {
                    let down = graph.children(step).iter().filter(|&&c| c == other).count();
                    let up = graph.parents(other).iter().filter(|&&p| p == step).count();
                    prop_assert_eq!(down, up);
                }
            }
        }

        #[test]
        fn ancestors_agree_with_a_plain_search(steps in dag()) {
            let graph = check(&steps).unwrap();
            let all = 0..index(graph.len());
            let pairs: Vec<(u32, u32)> =
                all.clone().flat_map(|a| all.clone().map(move |b| (a, b))).collect();
            let mut expected = Vec::new();
            for (at, &(step, ancestor)) in pairs.iter().enumerate() {
                let mut todo = graph.parents(step).to_vec();
                let mut found = false;
                while let Some(next) = todo.pop() {
                    found |= next == ancestor;
                    todo.extend(graph.parents(next));
                }
                if !found {
                    expected.push(at);
                }
            }
            prop_assert_eq!(graph.not_ancestors(&pairs), expected);
        }

        /// A chain of dependencies closed by one more is found, and what is
        /// reported is a circle of real dependencies.
        #[test]
        fn injected_cycle_is_found(steps in dag(), at: proptest::sample::Index) {
            let mut steps = steps;
            let bottom = at.index(steps.len());
            // Climb from the bottom as far as first parents lead.
            let mut top = bottom;
            while let Some(parent) = steps[top].1.first().cloned() {
                top = steps.iter().position(|(name, _)| *name == parent).unwrap();
            }
            prop_assume!(top != bottom);
            let closing = steps[bottom].0.clone();
            steps[top].1.push(closing);
            let errors = check(&steps).unwrap_err();
            prop_assert!(!errors.is_empty());
            for error in errors {
                let GraphError::Cycle { names, step, position } = error else {
                    return Err(TestCaseError::fail("only cycles were injected"));
                };
                prop_assert_eq!(&steps[step].0, &names[0]);
                prop_assert_eq!(&steps[step].1[position], &names[1]);
                for (from, to) in names.iter().zip(names.iter().cycle().skip(1)) {
                    let (_, parents) = steps.iter().find(|(name, _)| name == from).unwrap();
                    prop_assert!(parents.contains(to));
                }
            }
        }
    }
}
