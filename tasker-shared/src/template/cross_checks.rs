//! What no field shows alone: names that lead nowhere, cycles, branches and references that no
//! order of the steps fulfils, keys that contradict each other.
//!
//! Most of it looks at the typed document and its expressions and names the path to each problem.
//! Which keys a step may have beside each other is read from the file itself: a key that spells a
//! default out is a mistake too where it means nothing.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::compile::{Expressions, Finding, in_step, input_key, key};
use super::document::{Step, Template};
use super::problems::MAX_PROBLEMS;
use super::suggestions::{did_you_mean, shown};
use super::yaml::{Kind, Node};
use super::{InputSchema, format_duration, parse_duration};
use crate::state_machine::condition::Condition;
use crate::state_machine::definition::Join;
use crate::state_machine::graph::{Graph, GraphError};
use crate::state_machine::input::{Reference, Segment};
use crate::state_machine::retry::{OnExhausted, RetryPolicy};

/// Comparing a misspelt step name with 20,000 others takes its time, so only
/// the first few problems of a file come with a suggestion.
const MAX_SUGGESTIONS: usize = 10;
/// `worker_`, both parts and `__` must fit PGMQ's 47 bytes of a queue name.
const MAX_NAMESPACE_AND_QUEUE_BYTES: usize = 38;

/// A template to check, and what was found wrong with it so far.
pub(super) struct CrossChecks<'t> {
    root: &'t Node,
    template: &'t Template,
    expressions: &'t Expressions,
    findings: Vec<Finding>,
    suggestions: usize,
}

impl<'t> CrossChecks<'t> {
    pub fn new(root: &'t Node, template: &'t Template, expressions: &'t Expressions) -> Self {
        Self { root, template, expressions, findings: Vec::new(), suggestions: 0 }
    }

    /// Everything that is wrong. A graph is an argument because it is built from the same steps.
    pub fn run(mut self, graph: Result<&Graph, &[GraphError]>, schema: Option<&Value>) -> Vec<Finding> {
        match graph {
            Ok(graph) => self.branches(graph),
            Err(errors) => self.dependencies(errors),
        }
        self.queue_lengths();
        self.references(graph.ok());
        self.conditions(schema);
        self.maps(schema);
        self.nested();
        self.findings
    }

    fn wrong(&mut self, path: Vec<Segment>, message: impl Into<String>) {
        if self.findings.len() < MAX_PROBLEMS {
            self.findings.push(Finding { path, message: message.into() });
        }
    }

    fn steps(&self) -> impl Iterator<Item = (usize, &'t Step)> + use<'t> {
        self.template.steps.iter().enumerate()
    }

    fn suggestion<'c>(&mut self, word: &str, candidates: impl Iterator<Item = &'c str>) -> String {
        self.suggestions += 1;
        if self.suggestions > MAX_SUGGESTIONS { String::new() } else { did_you_mean(word, candidates) }
    }

    fn dependencies(&mut self, errors: &[GraphError]) {
        let dependency =
            |step: usize, position: usize| [in_step(step, &["depends_on"]), vec![Segment::Index(position)]].concat();
        for error in errors.iter().take(MAX_PROBLEMS) {
            let message = error.to_string();
            let (path, message) = match error {
                GraphError::TooManySteps { .. } => (vec![key("steps")], message),
                GraphError::DuplicateStep { first, step, .. } => {
                    let line = self.root.position_of(&in_step(*first, &["name"])).line;
                    (in_step(*step, &["name"]), format!("{message} (the other is on line {line})"))
                }
                GraphError::UnknownDependency { step, position, dependency: unknown, .. } => {
                    let near = self.suggestion(unknown, self.steps().map(|(_, step)| step.name.as_str()));
                    (dependency(*step, *position), message + &near)
                }
                GraphError::DuplicateDependency { step, position, .. }
                | GraphError::SelfDependency { step, position, .. }
                | GraphError::Cycle { step, position, .. } => (dependency(*step, *position), message),
            };
            self.wrong(path, message);
        }
    }

    fn queue_lengths(&mut self) {
        let namespace = &self.template.namespace;
        for (index, step) in self.steps() {
            let Some(queue) = step.queue.as_ref().filter(|_| !namespace.is_empty()) else {
                continue;
            };
            let bytes = namespace.len() + queue.len();
            if bytes > MAX_NAMESPACE_AND_QUEUE_BYTES {
                let message = format!(
                    "`{queue}` and the namespace `{namespace}` have {bytes} characters together, \
                     more than {MAX_NAMESPACE_AND_QUEUE_BYTES}; shorten one"
                );
                self.wrong(in_step(index, &["queue"]), message);
            }
        }
    }

    /// A decision chooses among its direct dependents, and must have an output to choose by.
    fn branches(&mut self, graph: &Graph) {
        for (number, (index, step)) in (0..).zip(self.steps()) {
            let dependents: Vec<&str> = graph.children(number).iter().map(|child| graph.name(*child)).collect();
            for (position, branch) in step.branches.iter().enumerate() {
                let path = [in_step(index, &["branches"]), vec![Segment::Index(position)]].concat();
                if step.branches[..position].contains(branch) {
                    self.wrong(path, format!("names `{}` a second time", shown(branch)));
                } else if !dependents.contains(&branch.as_str()) {
                    let near = did_you_mean(branch, dependents.iter().copied());
                    let (branch, name) = (shown(branch), &step.name);
                    let message = format!(
                        "`{branch}` does not depend on `{name}`, so it cannot be one of its branches; \
                         add `{name}` to its depends_on{near}"
                    );
                    self.wrong(path, message);
                }
            }
            if !step.branches.is_empty() && step.retry.on_exhausted == OnExhausted::Continue {
                let message = "a decision that has failed chooses nothing to continue with; use fail or block";
                self.wrong(in_step(index, &["retry", "on_exhausted"]), message);
            }
            if step.join != Join::All && step.depends_on.is_empty() {
                self.wrong(in_step(index, &["join"]), "there is nothing to join: the step has no depends_on");
            }
        }
    }

    /// A map runs over a list, and only its own input reads an item of it.
    fn maps(&mut self, schema: Option<&Value>) {
        for ((index, step), expressions) in self.steps().zip(&self.expressions.steps) {
            if step.for_each.is_none() {
                if let Some(at) = expressions.input.as_ref().and_then(|input| input.reads_item()) {
                    let path = [in_step(index, &[input_key(step)]), at.to_vec()].concat();
                    self.wrong(path, "reads an item, but the step has no `for_each`");
                }
                continue;
            }
            let path = || in_step(index, &["for_each"]);
            if let Some(list) = &expressions.for_each {
                let types = list.input_path().and_then(|path| declared(schema?, path));
                if list.is_of_item() {
                    self.wrong(path(), "reads an item before there is one; read the list itself");
                } else if let Some(types) = types.filter(|types| !types.contains(&"array")) {
                    let types = types.join(" or ");
                    let message = format!("runs over a list, but the input_schema says that this is of type {types}");
                    self.wrong(path(), message);
                }
            }
            if !step.branches.is_empty() {
                let message = "the items of a map cannot decide together; let a step behind it decide";
                self.wrong(in_step(index, &["branches"]), message);
            }
        }
    }

    /// A template that starts itself would nest for ever, and a task's input is an object.
    fn nested(&mut self) {
        for (index, step) in self.steps() {
            let Some(task) = &step.task else {
                continue;
            };
            let own = &self.template.namespace;
            if task.template == self.template.name && task.namespace.as_ref().is_none_or(|of| of == own) {
                let message = "starts the template that it stands in, which would nest without end; \
                               name another, or use for_each to do something often";
                self.wrong(in_step(index, &["task", "template"]), message);
            }
            let is_object = match &step.input {
                None | Some(Value::Object(_)) => true,
                Some(Value::String(text)) => text.starts_with("${"),
                Some(_) => false,
            };
            if !is_object {
                let message = "must come to an object, which is the input of the task that the step starts";
                self.wrong(in_step(index, &["input"]), message);
            }
        }
    }

    /// Conditions compare with what the input's schema allows there to be.
    fn conditions(&mut self, schema: Option<&Value>) {
        for ((index, _), expressions) in self.steps().zip(&self.expressions.steps) {
            let problem = match &expressions.when {
                Some(condition) if condition.reference().is_of_item() => {
                    Some("is decided once for the whole step, so it cannot read an item; let the handler decide".into())
                }
                Some(condition) => mismatch(condition, schema),
                None => None,
            };
            if let Some(message) = problem {
                self.wrong(in_step(index, &["when"]), message);
            }
        }
    }

    /// References may read the outputs of ancestors only.
    fn references(&mut self, graph: Option<&Graph>) {
        let template = self.template;
        let index_of: HashMap<&str, u32> =
            (0..).zip(&template.steps).map(|(index, step)| (step.name.as_str(), index)).collect();
        // Who reads whom, and where the reference stands.
        let mut reads: Vec<((u32, u32), Vec<Segment>)> = Vec::new();
        let mut unknown: Vec<(Vec<Segment>, &str)> = Vec::new();
        for (number, ((index, step), expressions)) in (0..).zip(self.steps().zip(&self.expressions.steps)) {
            let single = [
                ("when", expressions.when.as_ref().map(Condition::reference)),
                ("for_each", expressions.for_each.as_ref()),
            ];
            for (name, reference) in single {
                let Some(read) = reference.and_then(Reference::step) else {
                    continue;
                };
                match index_of.get(read) {
                    Some(&target) => reads.push(((number, target), in_step(index, &[name]))),
                    None => unknown.push((in_step(index, &[name]), read)),
                }
            }
            let Some(input) = &expressions.input else {
                continue;
            };
            let mut reported = HashSet::new();
            input.visit_steps(|at, read| {
                let path = || [in_step(index, &[input_key(step)]), at.to_vec()].concat();
                match index_of.get(read) {
                    Some(&target) => reads.push(((number, target), path())),
                    None if reported.insert(read) => unknown.push((path(), read)),
                    None => {}
                }
            });
        }
        for (path, read) in unknown {
            let near = self.suggestion(read, index_of.keys().copied());
            self.wrong(path, format!("reads the output of `{}`, which is not a step{near}", shown(read)));
        }
        let pairs: Vec<(u32, u32)> = reads.iter().map(|(pair, _)| *pair).collect();
        for wrong in graph.map_or_else(Vec::new, |graph| graph.not_ancestors(&pairs)) {
            let ((step, read), path) = reads[wrong].clone();
            let name = &template.steps[step as usize].name;
            let read = &template.steps[read as usize].name;
            let message = if name == read {
                format!("step `{name}` reads its own output, which exists only after it ran")
            } else {
                format!(
                    "step `{name}` reads the output of `{read}` without waiting for it; \
                     add `{read}` to its depends_on"
                )
            };
            self.wrong(path, message);
        }
    }
}

/// Compiles the schema of a task's input; the error is where in it and what is wrong.
pub(super) fn input_schema(schema: &Value) -> Result<InputSchema, Finding> {
    InputSchema::compile(schema).map_err(|error| {
        let path = std::iter::once(key("input_schema")).chain(pointer_path(&error.pointer, schema)).collect();
        Finding { path, message: error.message }
    })
}

/// A JSON pointer as a path into the value it was made for.
fn pointer_path(pointer: &str, mut value: &Value) -> Vec<Segment> {
    let mut path = Vec::new();
    for part in pointer.split('/').skip(1) {
        let part = part.replace("~1", "/").replace("~0", "~");
        let (segment, inner) = match value {
            Value::Array(items) => {
                match part.parse::<usize>().ok().and_then(|index| Some((index, items.get(index)?))) {
                    Some((index, inner)) => (Segment::Index(index), inner),
                    None => break,
                }
            }
            Value::Object(keys) => match keys.get(&part) {
                Some(inner) => (Segment::Key(part), inner),
                None => break,
            },
            _ => break,
        };
        path.push(segment);
        value = inner;
    }
    path
}

/// Why a condition on the task's input can never be what its author meant: the schema allows only
/// values of another type there.
fn mismatch(condition: &Condition, schema: Option<&Value>) -> Option<String> {
    let (wanted, path) = (condition.types()?, condition.reference().input_path()?);
    let declared = declared(schema?, path)?;
    let fits = declared.iter().any(|declared| wanted.contains(declared));
    (!fits).then(|| {
        format!("compares with a {}, but the input_schema says that this is a {}", wanted[0], declared.join(" or "))
    })
}

/// The types that a schema declares for what stands at a path; `None` if it says nothing.
fn declared<'s>(mut schema: &'s Value, path: &[Segment]) -> Option<Vec<&'s str>> {
    for segment in path {
        schema = match segment {
            Segment::Key(key) => schema.get("properties")?.get(key)?,
            Segment::Index(_) => schema.get("items")?,
        };
    }
    match schema.get("type")? {
        Value::String(one) => Some(vec![one]),
        Value::Array(some) => Some(some.iter().filter_map(Value::as_str).collect()),
        _ => None,
    }
}

/// Keys that mean nothing in a step with `wait`, and what to do instead.
pub(super) const NOT_IN_WAITS: [(&str, &str); 11] = [
    ("handler", "a step either waits or runs a handler; put the handler into a step that depends on this one"),
    ("task", "a step either waits or starts a task; put the task into a step that depends on this one"),
    ("input", "a wait has no input; give it to the step that depends on this one"),
    ("queue", "a wait is in no queue; remove the line"),
    ("concurrency", "a wait counts under no limit; remove the line"),
    ("rate", "a wait counts under no limit; remove the line"),
    ("branches", "a wait decides nothing; let the step that depends on it decide"),
    ("retry", "a wait is not tried again; see wait.on_timeout"),
    ("for_each", "a wait is not run for items; put the wait before the map"),
    ("max_parallel", "a wait is not run for items; remove the line"),
    ("on_item_failure", "a wait is not run for items; remove the line"),
];

/// Keys that mean nothing in a step with `task`; the steps of that task may have them.
pub(super) const NOT_IN_TASKS: [(&str, &str); 5] = [
    ("handler", "a step either starts a task or runs a handler; put the handler into a step of its own"),
    ("queue", "a step that starts a task is in no queue; the steps of that task are"),
    ("concurrency", "a step that starts a task counts under no limit; limit the steps of that task"),
    ("rate", "a step that starts a task counts under no limit; limit the steps of that task"),
    ("branches", "a task decides nothing for its parent; let the step that depends on this one decide"),
];

/// Which keys the steps of a file have beside each other, whatever their values are.
pub(super) fn step_keys(root: &Node) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(Kind::List(steps)) = root.get("steps").map(|steps| &steps.kind) else {
        return findings;
    };
    let with_keys = steps.iter().enumerate().filter(|(_, step)| matches!(step.kind, Kind::Map(_)));
    for (index, step) in with_keys {
        let mut wrong = |keys: &[&str], message: String| {
            findings.push(Finding { path: in_step(index, keys), message });
        };
        let (forbidden, timeouts): (&[(&str, &str)], _) = if step.get("wait").is_some() {
            (&NOT_IN_WAITS, Some("a wait has no worker to hurry; only timeouts.total applies"))
        } else if step.get("task").is_some() {
            (&NOT_IN_TASKS, Some("a step that starts a task has no worker to hurry; only timeouts.total applies"))
        } else {
            (&[], None)
        };
        for (name, advice) in forbidden.iter().filter(|(name, _)| step.get(name).is_some()) {
            wrong(&[name], (*advice).to_owned());
        }
        if let (Some(advice), Some(Kind::Map(entries))) = (timeouts, step.get("timeouts").map(|node| &node.kind)) {
            for entry in entries.iter().filter(|entry| entry.key != "total") {
                wrong(&["timeouts", &entry.key], advice.to_owned());
            }
        }
        if timeouts.is_none() && step.get("handler").is_none() {
            wrong(&["handler"], "is missing; add `handler:`".to_owned());
        }
        if let Some(message) = step.get("retry").and_then(intervals) {
            wrong(&["retry", message.0], message.1);
        }
        if findings.len() > MAX_PROBLEMS {
            break;
        }
    }
    findings
}

/// The key of a retry policy whose intervals contradict each other, and what to do.
fn intervals(retry: &Node) -> Option<(&'static str, String)> {
    let given = |name| match &retry.get(name)?.kind {
        Kind::Text(text) => parse_duration(text).ok(),
        _ => None,
    };
    let default = RetryPolicy::default();
    let (initial, max) = (given("initial_interval"), given("max_interval"));
    let shown_initial = format_duration(initial.unwrap_or(default.initial_interval));
    let shown_max = format_duration(max.unwrap_or(default.max_interval));
    if max.unwrap_or(default.max_interval) >= initial.unwrap_or(default.initial_interval) {
        return None;
    }
    Some(match max {
        Some(_) => ("max_interval", format!("{shown_max} is shorter than initial_interval, {shown_initial}; raise it")),
        None => (
            "initial_interval",
            format!("{shown_initial} is longer than the default max_interval, {shown_max}; set that too"),
        ),
    })
}
