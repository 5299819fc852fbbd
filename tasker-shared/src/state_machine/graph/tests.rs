//! Graphs of a few steps, of many, and random ones.

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
