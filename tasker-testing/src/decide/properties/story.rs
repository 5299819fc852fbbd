//! A random template, and what is to become of its tasks.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use crate::simulation::{
    signal_wait, template, with, with_branches, with_input, with_join, with_map, with_task, with_wait, with_when,
};
use tasker_shared::state_machine::definition::{Definition, Join, OnItemFailure};
use tasker_shared::state_machine::flow::{Allows, Rule};
use tasker_shared::state_machine::input::InputTemplate;
use tasker_shared::state_machine::retry::OnExhausted;
use tasker_shared::state_machine::wait::{OnTimeout, WaitFor};

/// What a handler does in one attempt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Behaviour {
    Succeeds,
    Fails,
    AsksForNow,
    FailsForGood,
    /// The worker dies.
    IsLost,
    /// The worker reports only after its lease has ended.
    IsLate,
    /// The worker renews its lease for ever and never reports.
    Hangs,
}

/// One step of a random template.
#[derive(Debug, Clone)]
pub(crate) struct RandomStep {
    pub(super) parents: BTreeSet<usize>,
    pub(super) on_exhausted: OnExhausted,
    pub(super) max_attempts: u32,
    pub(super) has_queue_timeout: bool,
    pub(super) has_total: bool,
    /// 0..=5 take the parents' outputs as they come, 6 and 7 read one, 8 reads what no output has.
    pub(super) input: u8,
    pub(super) wait: RandomWait,
    pub(super) behaviours: Vec<Behaviour>,
    /// 0 and 1 change how it joins, 2 and 3 give it a condition, 4 and 5 make it a decision.
    pub(super) graph: u8,
    pub(super) map: Option<RandomMap>,
    pub(super) priority: i32,
    pub(super) limit: RandomLimit,
    /// Of a decision: the dependents it chooses, one bit each; 0x80 chooses one that is unknown.
    pub(super) choice: u8,
}

/// What a step is run over, if it is a map.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RandomMap {
    /// 0..=3 read a list of the task's input, 4 reads what is no list, others what the first parent answers.
    pub(super) list: u8,
    pub(super) max_parallel: u32,
    pub(super) on_item_failure: OnItemFailure,
}

/// Lists of the task's input, by their length, and what is no list.
pub(super) const LISTS: [&str; 5] =
    ["${input.none}", "${input.one}", "${input.three}", "${input.seven}", "${input.total}"];

fn random_map() -> impl Strategy<Value = RandomMap> {
    let on_item_failure = prop_oneof![
        2 => Just(OnItemFailure::Fail),
        2 => Just(OnItemFailure::Continue),
        1 => (0_u32..4).prop_map(OnItemFailure::Count),
        1 => (0_u32..=100).prop_map(OnItemFailure::Percent),
    ];
    (0_u8..12, 1_u32..5, on_item_failure).prop_map(|(list, max_parallel, on_item_failure)| RandomMap {
        list,
        max_parallel,
        on_item_failure,
    })
}

/// What a random step does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum RandomWait {
    Runs,
    Sleeps,
    WaitsUntil,
    /// Until it comes, or for a while and then fails or goes on.
    WaitsForSignal(Option<OnTimeout>),
    /// For an answer that only some signals give.
    WaitsForApproval,
    /// Starts a task, and awaits it or not.
    StartsTask(bool),
}

/// What a template allows of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum RandomLimit {
    None,
    OfItsOwn(Allows),
    OfTheTenant(Allows),
    /// What all steps that have it share: so many at once, and so many in a time.
    OfTheTemplate,
    /// Its key is in no input.
    Nowhere,
}

fn random_limit() -> impl Strategy<Value = RandomLimit> {
    let allows = prop_oneof![
        (1_i32..4).prop_map(Allows::AtOnce),
        (1_i32..4, 500_u64..5000).prop_map(|(times, per)| Allows::Rate(times, Duration::from_millis(per))),
    ];
    prop_oneof![
        60 => Just(RandomLimit::None),
        10 => allows.clone().prop_map(RandomLimit::OfItsOwn),
        10 => allows.prop_map(RandomLimit::OfTheTenant),
        19 => Just(RandomLimit::OfTheTemplate),
        1 => Just(RandomLimit::Nowhere),
    ]
}

impl RandomLimit {
    pub(super) fn rules(self, step: &str) -> Vec<Rule> {
        let rule = |scope: &str, key: Option<&str>, allows| {
            let key = key.map(|key| InputTemplate::parse(&json!(key)).unwrap());
            Rule { scope: scope.into(), key, allows }
        };
        let own = format!("shop/order.{step}");
        match self {
            Self::None => Vec::new(),
            Self::OfItsOwn(allows) => vec![rule(&own, None, allows)],
            Self::OfTheTenant(allows) => vec![rule(&own, Some(TENANT), allows)],
            Self::OfTheTemplate => vec![
                rule("shop/order", None, Allows::AtOnce(3)),
                rule("shop/order", Some(TENANT), Allows::Rate(4, Duration::from_secs(2))),
            ],
            Self::Nowhere => vec![rule(&own, Some("${input.nobody}"), Allows::AtOnce(1))],
        }
    }
}

/// Whose turn it is, and whose limit.
pub(super) const TENANT: &str = "${input.tenant}";

/// The signals that random steps wait for.
pub(super) const SIGNALS: [&str; 2] = ["go", "approved"];

/// A random template, and what becomes of its tasks.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is one fact about the story")]
pub(crate) struct Story {
    pub(super) steps: Vec<RandomStep>,
    pub(super) block_on_failure: bool,
    pub(super) has_total: bool,
    pub(super) invalid: bool,
    /// At most so many steps in flight, by a limit of the namespace.
    pub(super) limit: Option<i32>,
    /// Whether its steps take turns by tenant.
    pub(super) is_fair: bool,
    pub(super) priority: i32,
    /// Whether operators skip steps, which no retry undoes.
    pub(super) skips: bool,
    pub(super) choices: Vec<u16>,
}

fn random_step() -> impl Strategy<Value = RandomStep> {
    let behaviour = prop_oneof![
        8 => Just(Behaviour::Succeeds),
        3 => Just(Behaviour::Fails),
        1 => Just(Behaviour::AsksForNow),
        1 => Just(Behaviour::FailsForGood),
        2 => Just(Behaviour::IsLost),
        1 => Just(Behaviour::IsLate),
        1 => Just(Behaviour::Hangs),
    ];
    let policy = prop_oneof![
        3 => Just(OnExhausted::Fail), 2 => Just(OnExhausted::Block), 2 => Just(OnExhausted::Continue)];
    let wait = prop_oneof![
        16 => Just(RandomWait::Runs),
        1 => Just(RandomWait::Sleeps),
        1 => Just(RandomWait::WaitsUntil),
        1 => Just(RandomWait::WaitsForSignal(None)),
        1 => Just(RandomWait::WaitsForSignal(Some(OnTimeout::Continue))),
        1 => Just(RandomWait::WaitsForSignal(Some(OnTimeout::Fail))),
        1 => Just(RandomWait::WaitsForApproval),
        2 => Just(RandomWait::StartsTask(true)),
        1 => Just(RandomWait::StartsTask(false)),
    ];
    (
        prop::collection::btree_set(0_usize..40, 0..4),
        policy,
        1_u32..4,
        (prop::bool::weighted(0.15), prop::bool::weighted(0.1)),
        0_u8..40,
        prop::collection::vec(behaviour, 0..5),
        0_u8..16,
        (any::<u8>(), prop::option::weighted(0.15, random_map())),
        wait,
        (-2_i32..3, random_limit()),
    )
        .prop_map(
            |(
                parents,
                on_exhausted,
                max_attempts,
                (has_queue_timeout, has_total),
                input,
                behaviours,
                graph,
                (choice, map),
                wait,
                (priority, limit),
            )| {
                RandomStep {
                    parents,
                    on_exhausted,
                    max_attempts,
                    has_queue_timeout,
                    has_total,
                    input,
                    behaviours,
                    graph,
                    map,
                    priority,
                    limit,
                    // An unknown branch is rare.
                    choice: if choice.is_multiple_of(16) { choice | 0x80 } else { choice & 0x7f },
                    wait,
                }
            },
        )
}

pub(crate) fn story() -> impl Strategy<Value = Story> {
    (
        prop::collection::vec(random_step(), 1..=40),
        any::<bool>(),
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.03),
        prop::option::weighted(0.3, 1_i32..5),
        (any::<bool>(), -5_i32..6),
        prop::collection::vec(any::<u16>(), 0..250),
    )
        .prop_map(|(mut steps, block_on_failure, has_total, invalid, limit, (is_fair, priority), choices)| {
            for (index, step) in steps.iter_mut().enumerate() {
                step.parents.retain(|parent| *parent < index);
            }
            Story { steps, block_on_failure, has_total, invalid, limit, is_fair, priority, skips: true, choices }
        })
}

impl Story {
    pub fn definition(&self) -> Definition {
        let words: Vec<String> = (0..)
            .zip(&self.steps)
            .map(|(index, step)| {
                let parents: Vec<String> = step.parents.iter().map(|parent| format!("s{parent}")).collect();
                format!("s{index}<{}", parents.join(","))
            })
            .collect();
        let mut definition = template(&words.join(" "));
        definition.block_on_failure = self.block_on_failure;
        definition.total = self.has_total.then_some(Duration::from_hours(2));
        definition.fair_key = self.is_fair.then(|| InputTemplate::parse(&json!(TENANT)).unwrap());
        for (index, step) in self.steps.iter().enumerate() {
            let name = format!("s{index}");
            definition = with(definition, &name, |defined| {
                defined.retry.on_exhausted = step.on_exhausted;
                defined.retry.max_attempts = step.max_attempts;
                defined.queue_timeout = step.has_queue_timeout.then_some(Duration::from_mins(2));
                defined.total = step.has_total.then_some(Duration::from_secs(90));
                defined.priority = step.priority;
                if step.wait == RandomWait::Runs {
                    defined.limits = step.limit.rules(&name);
                }
            });
            let [go, approved] = SIGNALS;
            let soon = Some(Duration::from_mins(1));
            let wait = match step.wait {
                RandomWait::Runs | RandomWait::StartsTask(_) => None,
                RandomWait::Sleeps => Some(WaitFor::Sleep(Duration::from_secs(30))),
                RandomWait::WaitsUntil => Some(WaitFor::Until("${input.at}".into())),
                RandomWait::WaitsForSignal(None) => Some(signal_wait(go, &[], None, OnTimeout::Fail)),
                RandomWait::WaitsForSignal(Some(late)) => Some(signal_wait(go, &[], soon, late)),
                RandomWait::WaitsForApproval => Some(signal_wait(approved, &["yes", "no"], None, OnTimeout::Fail)),
            };
            if let Some(wait) = wait {
                let until = matches!(wait, WaitFor::Until(_));
                definition = with_wait(definition, &name, wait);
                if until {
                    let at = if step.input == 8 { "${input.total}" } else { "${input.at}" };
                    definition = with_input(definition, &name, &json!({"until": at}));
                }
                continue;
            }
            if let RandomWait::StartsTask(awaited) = step.wait {
                definition = with_task(definition, &name, awaited);
            }
            definition = match (step.input, step.parents.first()) {
                (6 | 7, Some(parent)) if self.answers_a_list(*parent) => {
                    with_input(definition, &name, &json!({"n": format!("${{steps.s{parent}.output.n}}")}))
                }
                (8, _) => with_input(definition, &name, &json!({"n": "${input.nothing}"})),
                (9..=20, _) if self.maps(index).is_some() => {
                    with_input(definition, &name, &json!({"value": "${item}", "place": "${item_index}"}))
                }
                _ => definition,
            };
            if let Some(map) = self.maps(index) {
                let list = match step.parents.first() {
                    Some(parent) if map.list > 4 && self.answers_a_list(*parent) => {
                        format!("${{steps.s{parent}.output.list}}")
                    }
                    _ => LISTS[usize::from(map.list % 5)].to_owned(),
                };
                definition = with_map(definition, &name, &list, map.max_parallel, map.on_item_failure);
            }
            definition = match (step.graph, step.parents.first()) {
                (0, Some(_)) => with_join(definition, &name, Join::Taken),
                (1, Some(_)) => with_join(definition, &name, Join::Any),
                (2, Some(parent)) => {
                    with_when(definition, &name, &format!("${{steps.s{parent}.output.n}} > {}", step.choice % 8))
                }
                (3, _) => with_when(definition, &name, "${input.total} != 7"),
                (4 | 5, _) if self.decides(index) => {
                    let branches = self.branches(index);
                    let branches: Vec<&str> = branches.iter().map(String::as_str).collect();
                    with_branches(definition, &name, &branches)
                }
                _ => definition,
            };
        }
        definition
    }

    /// What a step is run over; a wait is no map, and a decision is none here.
    pub(super) fn maps(&self, index: usize) -> Option<RandomMap> {
        let step = &self.steps[index];
        let works = matches!(step.wait, RandomWait::Runs | RandomWait::StartsTask(_));
        step.map.filter(|_| works && !matches!(step.graph, 4 | 5))
    }

    pub(super) fn answers_a_list(&self, index: usize) -> bool {
        self.steps[index].wait == RandomWait::Runs && self.maps(index).is_none()
    }

    pub(super) fn decides(&self, index: usize) -> bool {
        let step = &self.steps[index];
        matches!(step.graph, 4 | 5) && step.wait == RandomWait::Runs
    }

    /// The dependents of a step, as far as it may choose among them: every second one is not a branch.
    pub(super) fn branches(&self, index: usize) -> Vec<String> {
        let dependents = (0..self.steps.len()).filter(|child| self.steps[*child].parents.contains(&index));
        dependents.filter(|child| !child.is_multiple_of(3)).map(|child| format!("s{child}")).collect()
    }

    /// What a step's handler answers.
    pub(super) fn output(&self, index: u32, item: Option<u32>, attempt: i32, healed: bool) -> serde_json::Value {
        let step = &self.steps[index as usize];
        // Another attempt answers another list: a map behind a step that is run again has other items.
        let list: Vec<u32> = (0..(index + attempt.unsigned_abs()) % 6).collect();
        if !matches!(step.graph, 4 | 5) {
            return json!({"n": index, "item": item, "list": list});
        }
        let branches = self.branches(index as usize);
        let mut chosen: Vec<&str> = (0..)
            .zip(&branches)
            .filter(|(bit, _)| step.choice & (1 << (bit % 7)) != 0)
            .map(|(_, name)| name.as_str())
            .collect();
        if step.choice & 0x80 != 0 && !healed && !branches.is_empty() {
            chosen.push("nowhere");
        }
        json!({"n": index, "branches": chosen, "list": list})
    }

    /// Cuts a story down, for tests whose cost grows with the square of it.
    pub fn shorten(&mut self, steps: usize, choices: usize) {
        self.steps.truncate(steps);
        self.choices.truncate(choices);
    }

    /// The same without what no retry can cure.
    pub(super) fn curable(mut self) -> Self {
        (self.has_total, self.invalid, self.skips) = (false, false, false);
        let lists: Vec<bool> = (0..self.steps.len()).map(|index| self.answers_a_list(index)).collect();
        for step in &mut self.steps {
            if step.input == 8 {
                step.input = 0;
            }
            step.has_total = false;
            if step.limit == RandomLimit::Nowhere {
                step.limit = RandomLimit::None;
            }
            // What is no list stays none; nor is what a skipped step answers.
            if let Some(map) = &mut step.map {
                let reads_output = map.list > 4 && step.parents.first().is_some_and(|parent| lists[*parent]);
                if !reads_output || matches!(step.graph, 0 | 1) {
                    map.list %= 4;
                }
            }
            // A wait in vain is waited again, in vain.
            if step.wait == RandomWait::WaitsForSignal(Some(OnTimeout::Fail)) {
                step.wait = RandomWait::WaitsForSignal(None);
            }
        }
        self
    }

    pub(super) fn behaviour(&self, step: u32, item: Option<u32>, attempt: i32) -> Behaviour {
        let behaviours = &self.steps[step as usize].behaviours;
        // Items of one map fare differently.
        let attempt = usize::try_from(attempt).unwrap() - 1 + item.map_or(0, |item| item as usize * 2);
        behaviours.get(attempt).copied().unwrap_or(Behaviour::Succeeds)
    }
}
