//! Templates in a few words, and what a test changes in one.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::QUEUE;
use tasker_shared::state_machine::condition::Condition;
use tasker_shared::state_machine::definition::{Definition, ForEach, Join, OnItemFailure, StepDefinition};
use tasker_shared::state_machine::graph::Graph;
use tasker_shared::state_machine::input::{InputTemplate, Reference};
use tasker_shared::state_machine::retry::RetryPolicy;
use tasker_shared::state_machine::wait::{ChildTask, OnTimeout, SignalWait, WaitFor, Work};

/// Builds a template out of `name` or `name<parent,parent` words.
pub(crate) fn template(words: &str) -> Definition {
    let steps: Vec<(String, Vec<String>)> = words
        .split_whitespace()
        .map(|word| {
            let (name, parents) = word.split_once('<').unwrap_or((word, ""));
            (name.to_owned(), parents.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
        })
        .collect();
    let graph = Graph::new(steps.iter().map(|(name, parents)| (&**name, &**parents))).unwrap();
    let by_name = (0_u32..).zip(&steps).map(|(index, (name, _))| (Arc::from(&**name), index)).collect();
    let steps = (0_u32..).zip(&steps).map(|(index, (name, _))| StepDefinition {
        name: Arc::from(&**name),
        work: Work::Handler,
        handler: Arc::from(format!("do.{name}")),
        queue: QUEUE.into(),
        priority: 0,
        retry: RetryPolicy { jitter: 0.0, ..RetryPolicy::default() },
        queue_timeout: None,
        total: None,
        run_timeout: Some(Duration::from_secs(30)),
        input: None,
        needs: graph.parents(index).to_vec(),
        when: None,
        branches: Vec::new(),
        join: Join::All,
        limits: Vec::new(),
        for_each: None,
    });
    Definition {
        template_id: 1,
        namespace: "shop".into(),
        name: "order".into(),
        version: "1.0.0".into(),
        block_on_failure: false,
        total: None,
        steps: steps.collect(),
        by_name,
        graph,
        fair_key: None,
        reaches_far: false,
    }
}

/// Changes one step of a template.
pub(crate) fn with(mut definition: Definition, step: &str, change: impl FnOnce(&mut StepDefinition)) -> Definition {
    let index = definition.by_name[step] as usize;
    change(&mut definition.steps[index]);
    definition
}

/// Makes a step a decision among its dependents of these names.
pub(crate) fn with_branches(mut definition: Definition, step: &str, branches: &[&str]) -> Definition {
    definition.reaches_far = true;
    let branches = branches.iter().map(|name| definition.by_name[*name]).collect();
    with(definition, step, |step| step.branches = branches)
}

/// Gives a step a condition.
pub(crate) fn with_when(mut definition: Definition, step: &str, when: &str) -> Definition {
    definition.reaches_far = true;
    let when = Condition::parse(when).unwrap();
    let need = when.reference().step().map(|name| definition.by_name[name]);
    with(definition, step, |step| {
        let new = need.filter(|need| !step.needs.contains(need));
        step.needs.extend(new);
        step.when = Some(when);
    })
}

/// Lets a step join its dependencies in another way.
pub(crate) fn with_join(mut definition: Definition, step: &str, join: Join) -> Definition {
    definition.reaches_far |= join == Join::Any;
    with(definition, step, |step| step.join = join)
}

/// Gives a step an explicit input.
pub(crate) fn with_input(definition: Definition, step: &str, input: &Value) -> Definition {
    let template = InputTemplate::parse(input).unwrap();
    let needs = template.references().map(|name| definition.by_name[name]).collect();
    with(definition, step, |step| {
        step.needs = needs;
        step.input = Some(template);
    })
}

/// Makes a step wait instead of running a handler.
pub(crate) fn with_wait(definition: Definition, step: &str, wait: WaitFor) -> Definition {
    with(definition, step, |step| {
        step.work = Work::Wait(wait);
        step.needs.clear();
    })
}

/// Makes a step start a task instead of running a handler.
pub(crate) fn with_task(definition: Definition, step: &str, awaited: bool) -> Definition {
    let task = ChildTask { template: "child".into(), version: None, namespace: None, awaited };
    with(definition, step, |step| {
        step.work = Work::Task(task);
        step.handler = "".into();
    })
}

/// Makes a step a map over the list that this reference leads to.
pub(crate) fn with_map(
    mut definition: Definition,
    step: &str,
    list: &str,
    max_parallel: u32,
    on_item_failure: OnItemFailure,
) -> Definition {
    definition.reaches_far = true;
    let reference = Reference::parse_whole(list).unwrap();
    let list = reference.step().map(|name| definition.by_name[name]);
    with(definition, step, |step| {
        // What its items read, its step does not; it reads the list.
        let needs = if step.input.is_some() { step.needs.clone() } else { Vec::new() };
        step.needs = needs.iter().copied().chain(list).collect();
        step.for_each = Some(ForEach { reference, max_parallel, on_item_failure, needs });
    })
}

/// A wait for a signal.
pub(crate) fn signal_wait(name: &str, allowed: &[&str], timeout: Option<Duration>, on_timeout: OnTimeout) -> WaitFor {
    let allowed = allowed.iter().map(|answer| (*answer).to_owned()).collect();
    WaitFor::Signal(SignalWait { name: name.into(), allowed, timeout, on_timeout })
}
