//! A document -> what decisions read of it: its expressions parsed, its graph, its limits.
//!
//! Files and stored definitions come the same way, so both yield the same [`Compiled`]. It checks
//! only what it must read; the rules of the format are for `cross_checks.rs`.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::document::{Concurrency, Keep, OnFailure, Rate, Step, Template, step_queue};
use super::{Error, InputSchema};
use crate::state_machine::condition::Condition;
use crate::state_machine::definition::{Definition, ForEach, Join, MAX_PARALLEL, StepDefinition};
use crate::state_machine::flow::{Allows, Rule};
use crate::state_machine::graph::{Graph, GraphError};
use crate::state_machine::input::{InputTemplate, Path, Reference, Segment};
use crate::state_machine::wait::{WaitFor, Work};

/// A template as decisions read it; it never changes.
#[derive(Debug)]
pub struct Compiled {
    /// The steps and their graph.
    pub definition: Arc<Definition>,
    /// The steps that wait for a signal, by index, with its name.
    pub signals: Vec<(u32, Arc<str>)>,
    /// Whether any of its steps starts tasks.
    pub starts_tasks: bool,
    /// Whether anything may be due for its tasks that outlasts them.
    pub has_timers: bool,
    /// Checks inputs; `None` accepts any object.
    pub schema: Option<InputSchema>,
    /// Ends whose trace is exported although sampling did not choose it.
    pub keep: Vec<Keep>,
}

/// Something wrong in a document, and the path to it.
#[derive(Debug)]
pub(super) struct Finding {
    pub path: Vec<Segment>,
    pub message: String,
}

/// The expressions of a template, parsed once.
pub(super) struct Expressions {
    pub steps: Vec<StepExpressions>,
    fair_key: Option<InputTemplate>,
}

/// The expressions of one step.
pub(super) struct StepExpressions {
    /// Its `input`, or the time that its wait ends, as `until`.
    pub input: Option<InputTemplate>,
    pub when: Option<Condition>,
    pub for_each: Option<Reference>,
    /// Its limits, and those that all steps share.
    limits: Vec<Rule>,
}

pub(super) fn key(key: &str) -> Segment {
    Segment::Key(key.to_owned())
}

/// The path of a key of a step.
pub(super) fn in_step(index: usize, keys: &[&str]) -> Vec<Segment> {
    [key("steps"), Segment::Index(index)].into_iter().chain(keys.iter().copied().map(key)).collect()
}

/// The key under which a step's references stand.
pub(super) fn input_key(step: &Step) -> &'static str {
    if step.wait.is_some() { "wait" } else { "input" }
}

impl Expressions {
    /// Parses them all; each that cannot be read is a finding.
    pub fn parse(template: &Template) -> (Self, Vec<Finding>) {
        let mut findings = Vec::new();
        let scope = format!("{}/{}", template.namespace, template.name);
        let shared = limits(&scope, &[], template.concurrency.as_ref(), template.rate.as_ref(), &mut findings);
        let fair_key = template
            .fair_key
            .as_deref()
            .and_then(|text| found(key_template(text), || vec![key("fair_key")], &mut findings));
        let mut steps = Vec::with_capacity(template.steps.len());
        for (index, step) in template.steps.iter().enumerate() {
            let at = |name| move || in_step(index, &[name]);
            let scope = format!("{scope}.{}", step.name);
            let own = in_step(index, &[]);
            let own = limits(&scope, &own, step.concurrency.as_ref(), step.rate.as_ref(), &mut findings);
            let when = step.when.as_deref().and_then(|text| found(Condition::parse(text), at("when"), &mut findings));
            let for_each = step.for_each.as_deref();
            let for_each = for_each.and_then(|text| found(Reference::parse_whole(text), at("for_each"), &mut findings));
            let input = match &step.wait {
                Some(WaitFor::Until(until)) => Some(InputTemplate::parse(&json!({ "until": until }))),
                _ => step.input.as_ref().map(InputTemplate::parse),
            };
            let input = input.and_then(|parsed| {
                let errors = match parsed {
                    Ok(template) => return Some(template),
                    Err(errors) => errors,
                };
                let below = in_step(index, &[input_key(step)]);
                findings.extend(
                    errors
                        .into_iter()
                        .map(|error| Finding { path: [below.clone(), error.at].concat(), message: error.message }),
                );
                None
            });
            steps.push(StepExpressions {
                input,
                when,
                for_each,
                limits: own.into_iter().chain(shared.iter().cloned()).collect(),
            });
        }
        (Self { steps, fair_key }, findings)
    }
}

fn found<T>(parsed: Result<T, String>, at: impl FnOnce() -> Vec<Segment>, findings: &mut Vec<Finding>) -> Option<T> {
    parsed.map_err(|message| findings.push(Finding { path: at(), message })).ok()
}

fn limits(
    scope: &str,
    of: &[Segment],
    concurrency: Option<&Concurrency>,
    rate: Option<&Rate>,
    findings: &mut Vec<Finding>,
) -> Vec<Rule> {
    let scope: Arc<str> = scope.into();
    let mut rule = |name: &str, text: Option<&String>, allows| {
        let at = || of.iter().cloned().chain([key(name), key("key")]).collect();
        let key = text.and_then(|text| found(key_template(text), at, findings));
        Rule { scope: scope.clone(), key, allows }
    };
    let at_once = concurrency.map(|limit| rule("concurrency", limit.key.as_ref(), Allows::AtOnce(limit.limit)));
    let in_time = rate.map(|limit| rule("rate", limit.key.as_ref(), Allows::Rate(limit.limit, limit.per)));
    at_once.into_iter().chain(in_time).collect()
}

/// A key is a text with references to the task's input: it is known before any step has run.
fn key_template(text: &str) -> Result<InputTemplate, String> {
    if text.is_empty() {
        return Err("is empty; write a text such as ${input.customer_id}".into());
    }
    let template =
        InputTemplate::parse(&Value::String(text.to_owned())).map_err(|mut errors| errors.swap_remove(0).message)?;
    if template.references().next().is_some() || template.reads_item().is_some() {
        return Err("reads the output of a step; a key may read the task's input only, as ${input.…}".into());
    }
    Ok(template)
}

/// The steps as a DAG, or everything that is wrong with it.
pub(super) fn graph(template: &Template) -> Result<Graph, Vec<GraphError>> {
    Graph::check(template.steps.iter().map(|step| (step.name.as_str(), step.depends_on.as_slice())))
}

impl Compiled {
    /// Compiles a definition as the database stores it. It was checked when it was registered, so
    /// only what must be read is checked again.
    pub(super) fn of_stored(template_id: i32, template: &Template) -> Result<Self, Error> {
        let graph = graph(template).map_err(|mut errors| errors.swap_remove(0))?;
        let (expressions, findings) = Expressions::parse(template);
        if let Some(Finding { path, message }) = findings.into_iter().next() {
            let (of, rest) = match &path[..] {
                [_, Segment::Index(index), rest @ ..] => (format!("step {}", template.steps[*index].name), rest),
                all => ("the template".to_owned(), all),
            };
            let key = Path(rest).to_string().trim_start_matches('.').to_owned();
            return Err(Error::ReadStoredExpression { of, key, message });
        }
        let schema = template.input_schema.as_ref().map(InputSchema::compile).transpose();
        let schema = schema.map_err(|_| Error::CompileStoredSchema { template_id })?;
        Ok(Self::new(template_id, template, graph, expressions, schema))
    }

    pub(super) fn new(
        template_id: i32,
        template: &Template,
        graph: Graph,
        expressions: Expressions,
        schema: Option<InputSchema>,
    ) -> Self {
        let definition = definition(template_id, template, graph, expressions);
        let signals = (0_u32..).zip(&definition.steps);
        let signals =
            signals.filter_map(|(index, step)| Some((index, step.work.signal()?.name.as_str().into()))).collect();
        let starts_tasks = definition.steps.iter().any(|step| matches!(step.work, Work::Task(_)));
        let has_timers = definition.total.is_some() || definition.steps.iter().any(StepDefinition::has_timers);
        Self {
            definition: Arc::new(definition),
            signals,
            starts_tasks,
            has_timers,
            schema,
            keep: template.trace.keep.clone(),
        }
    }
}

fn definition(template_id: i32, template: &Template, graph: Graph, expressions: Expressions) -> Definition {
    let names: Vec<Arc<str>> = template.steps.iter().map(|step| step.name.as_str().into()).collect();
    let by_name: HashMap<Arc<str>, u32> = names.iter().cloned().zip(0_u32..).collect();
    let mut steps = Vec::with_capacity(template.steps.len());
    for (index, (step, expressions)) in (0_u32..).zip(template.steps.iter().zip(expressions.steps)) {
        let StepExpressions { input, when, for_each, limits } = expressions;
        let work = step.work();
        let mut needs: Vec<u32> = match &input {
            _ if !work.takes_input() => Vec::new(),
            Some(input) => input.references().filter_map(|name| by_name.get(name).copied()).collect(),
            None if for_each.is_some() => Vec::new(),
            None => graph.parents(index).to_vec(),
        };
        let looked_at = when.as_ref().and_then(|when| by_name.get(when.reference().step()?).copied());
        needs.extend(looked_at.filter(|step| !needs.contains(step)));
        let item_needs = if input.is_some() { needs.clone() } else { Vec::new() };
        if let Some(list) = &for_each {
            needs.extend(list.step().and_then(|name| by_name.get(name).copied()));
        }
        let for_each = for_each.map(|reference| ForEach {
            reference,
            max_parallel: step.max_parallel.unwrap_or(MAX_PARALLEL),
            on_item_failure: step.on_item_failure,
            needs: item_needs,
        });
        steps.push(StepDefinition {
            name: names[index as usize].clone(),
            work,
            handler: step.handler.as_str().into(),
            queue: step_queue(&template.namespace, step).into(),
            priority: step.priority,
            retry: step.retry.clone(),
            queue_timeout: step.timeouts.queue,
            total: step.timeouts.total,
            run_timeout: Some(step.timeouts.run),
            input,
            needs,
            when,
            branches: step.branches.iter().filter_map(|name| by_name.get(name.as_str()).copied()).collect(),
            join: step.join,
            limits,
            for_each,
        });
    }
    let reaches_far = steps.iter().any(|step| {
        step.when.is_some() || step.for_each.is_some() || !step.branches.is_empty() || step.join == Join::Any
    });
    Definition {
        template_id,
        namespace: template.namespace.as_str().into(),
        name: template.name.as_str().into(),
        version: template.version.as_str().into(),
        block_on_failure: template.on_failure == OnFailure::Block,
        total: template.timeouts.total,
        fair_key: expressions.fair_key,
        steps,
        graph,
        by_name,
        reaches_far,
    }
}
