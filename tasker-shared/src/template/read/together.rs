//! What only several values together can get wrong: names that lead nowhere, cycles, branches and
//! references that no order of the steps fulfils.

use std::collections::HashSet;

use super::values::{did_you_mean, shown};
use super::{MAX_NAMESPACE_AND_QUEUE_BYTES, MAX_PROBLEMS, MAX_SUGGESTIONS, Read, ReadStep, key};
use crate::state_machine::condition::Condition;
use crate::state_machine::graph::{Graph, GraphError};
use crate::state_machine::input::{InputTemplate, Path, Reference, Segment};
use crate::template::yaml::{Node, Place};
use crate::template::{Join, OnExhausted};

impl Read<'_> {
    pub(super) fn queue_lengths(&mut self, namespace: &str, steps: &[ReadStep<'_>]) {
        for step in steps {
            let Some(queue) = &step.definition.queue else {
                continue;
            };
            let bytes = namespace.len() + queue.len();
            if bytes > MAX_NAMESPACE_AND_QUEUE_BYTES {
                let message = format!(
                    "`{queue}` and the namespace `{namespace}` have {bytes} characters together, \
                     more than {MAX_NAMESPACE_AND_QUEUE_BYTES}; shorten one"
                );
                let key_path = format!("steps[{}].queue", step.index);
                self.wrong(step.place(&[key("queue")]), key_path, message);
            }
        }
    }

    pub(super) fn graph(&mut self, steps: &[ReadStep<'_>], list: Option<&Node>) -> Option<Graph> {
        let edges = steps.iter().map(|step| (step.definition.name.as_str(), step.definition.depends_on.as_slice()));
        let errors = match Graph::check(edges) {
            Ok(graph) => return Some(graph),
            Err(errors) => errors,
        };
        for error in errors.iter().take(MAX_PROBLEMS) {
            let mut message = error.to_string();
            let (step, path) = match error {
                GraphError::TooManySteps { .. } => {
                    let place = list.map_or(Place { line: 1, column: 1 }, |list| list.place);
                    self.wrong(place, "steps", message);
                    continue;
                }
                GraphError::DuplicateStep { first, step, .. } => {
                    let line = steps[*first].place(&[key("name")]).line;
                    message = format!("{message} (the other is on line {line})");
                    (*step, vec![key("name")])
                }
                GraphError::UnknownDependency { step, position, dependency, .. } => {
                    let names = steps.iter().map(|step| step.definition.name.as_str());
                    if self.problems.len() < MAX_SUGGESTIONS {
                        message.push_str(&did_you_mean(dependency, names));
                    }
                    (*step, vec![key("depends_on"), Segment::Index(*position)])
                }
                GraphError::DuplicateDependency { step, position, .. }
                | GraphError::SelfDependency { step, position, .. }
                | GraphError::Cycle { step, position, .. } => {
                    (*step, vec![key("depends_on"), Segment::Index(*position)])
                }
            };
            let step = &steps[step];
            let key_path = format!("steps[{}]{}", step.index, Path(&path));
            self.wrong(step.place(&path), key_path, message);
        }
        None
    }

    /// A decision chooses among its direct dependents, and must have an output to choose by.
    pub(super) fn branches(&mut self, steps: &[ReadStep<'_>], graph: &Graph) {
        for (index, step) in (0..).zip(steps) {
            let definition = &step.definition;
            let dependents: Vec<&str> = graph.children(index).iter().map(|child| graph.name(*child)).collect();
            for (position, branch) in definition.branches.iter().enumerate() {
                let path = [key("branches"), Segment::Index(position)];
                let key_path = format!("steps[{}]{}", step.index, Path(&path));
                if definition.branches[..position].contains(branch) {
                    self.wrong(step.place(&path), key_path, format!("names `{}` a second time", shown(branch)));
                } else if !dependents.contains(&branch.as_str()) {
                    let near = did_you_mean(branch, dependents.iter().copied());
                    let message = format!(
                        "`{}` does not depend on `{}`, so it cannot be one of its branches; add `{}` to its depends_on{near}",
                        shown(branch),
                        definition.name,
                        definition.name
                    );
                    self.wrong(step.place(&path), key_path, message);
                }
            }
            if !definition.branches.is_empty() && definition.retry.on_exhausted == OnExhausted::Continue {
                let path = [key("retry"), key("on_exhausted")];
                let message = "a decision that has failed chooses nothing to continue with; use fail or block";
                self.wrong(step.place(&path), format!("steps[{}]{}", step.index, Path(&path)), message);
            }
            if definition.join != Join::All && definition.depends_on.is_empty() {
                let message = "there is nothing to join: the step has no depends_on";
                self.wrong(step.place(&[key("join")]), format!("steps[{}].join", step.index), message);
            }
        }
    }

    /// A map runs over a list, and only its own input reads an item of it.
    pub(super) fn maps(&mut self, steps: &[ReadStep<'_>], schema: Option<&serde_json::Value>) {
        for step in steps {
            let definition = &step.definition;
            let place = |name: &str| (step.place(&[key(name)]), format!("steps[{}].{name}", step.index));
            if let Some(text) = &definition.for_each {
                let (at, key_path) = place("for_each");
                match Reference::parse_whole(text) {
                    Err(message) => self.wrong(at, key_path, message),
                    Ok(reference) if reference.is_of_item() => {
                        self.wrong(at, key_path, "reads an item before there is one; read the list itself");
                    }
                    Ok(reference) => {
                        let declared = reference.input_path().and_then(|path| declared(schema?, path));
                        if let Some(declared) = declared.filter(|types| !types.contains(&"array")) {
                            let declared = declared.join(" or ");
                            let message =
                                format!("runs over a list, but the input_schema says that this is of type {declared}");
                            self.wrong(at, key_path, message);
                        }
                    }
                }
                if !definition.branches.is_empty() {
                    let (at, key_path) = place("branches");
                    self.wrong(at, key_path, "the items of a map cannot decide together; let a step behind it decide");
                }
                continue;
            }
            let template = definition.input.as_ref().and_then(|input| InputTemplate::parse(input).ok());
            if let Some(at) = template.as_ref().and_then(InputTemplate::reads_item) {
                let path: Vec<Segment> = [key("input")].into_iter().chain(at.to_vec()).collect();
                let message = "reads an item, but the step has no `for_each`";
                self.wrong(step.place(&path), format!("steps[{}]{}", step.index, Path(&path)), message);
            }
        }
    }

    /// A template that starts itself would nest for ever, and a task's input is an object.
    pub(super) fn nested(&mut self, steps: &[ReadStep<'_>], namespace: &str, name: &str) {
        for step in steps {
            let Some(task) = &step.definition.task else {
                continue;
            };
            if task.template == name && task.namespace.as_deref().is_none_or(|of| of == namespace) {
                let message = "starts the template that it stands in, which would nest without end; \
                               name another, or use for_each to do something often";
                let path = [key("task"), key("template")];
                self.wrong(step.place(&path), format!("steps[{}]{}", step.index, Path(&path)), message);
            }
            let whole = |text: &str| text.starts_with("${");
            let is_object = match &step.definition.input {
                None | Some(serde_json::Value::Object(_)) => true,
                Some(serde_json::Value::String(text)) => whole(text),
                Some(_) => false,
            };
            if !is_object {
                let message = "must come to an object, which is the input of the task that the step starts";
                self.wrong(step.place(&[key("input")]), format!("steps[{}].input", step.index), message);
            }
        }
    }

    /// Conditions must parse, and compare with what the input's schema allows there to be.
    pub(super) fn conditions(&mut self, steps: &[ReadStep<'_>], schema: Option<&serde_json::Value>) {
        for step in steps {
            let Some(text) = &step.definition.when else {
                continue;
            };
            let problem = match Condition::parse(text) {
                Err(message) => Some(message),
                Ok(condition) if condition.reference().is_of_item() => {
                    Some("is decided once for the whole step, so it cannot read an item; let the handler decide".into())
                }
                Ok(condition) => mismatch(&condition, schema),
            };
            if let Some(message) = problem {
                self.wrong(step.place(&[key("when")]), format!("steps[{}].when", step.index), message);
            }
        }
    }

    /// References must parse, and may read the outputs of ancestors only.
    pub(super) fn references(&mut self, steps: &[ReadStep<'_>], graph: Option<&Graph>) {
        let index_of: std::collections::HashMap<&str, u32> =
            (0..).zip(steps).map(|(index, step)| (step.definition.name.as_str(), index)).collect();
        // Each pair with the place of the reference, for the check afterwards.
        let mut pairs = Vec::new();
        let mut places = Vec::new();
        for (index, step) in (0..).zip(steps) {
            let when = step.definition.when.as_deref().and_then(|when| Condition::parse(when).ok());
            let list = step.definition.for_each.as_deref().and_then(|list| Reference::parse_whole(list).ok());
            for (name, reference) in [("when", when.as_ref().map(Condition::reference)), ("for_each", list.as_ref())] {
                let Some(read) = reference.and_then(Reference::step) else {
                    continue;
                };
                let at = (step.place(&[key(name)]), format!("steps[{}].{name}", step.index));
                if let Some(&target) = index_of.get(read) {
                    pairs.push((index, target));
                    places.push(at);
                } else {
                    self.wrong(at.0, at.1, format!("reads the output of `{}`, which is not a step", shown(read)));
                }
            }
            let Some(input) = &step.definition.referring() else {
                continue;
            };
            let within = if step.definition.wait.is_some() { "wait" } else { "input" };
            let locate = |at: &[Segment]| {
                let path: Vec<Segment> = [key(within)].into_iter().chain(at.to_vec()).collect();
                (step.place(&path), format!("steps[{}]{}", step.index, Path(&path)))
            };
            let template = match InputTemplate::parse(input) {
                Ok(template) => template,
                Err(errors) => {
                    for error in errors {
                        let (place, key_path) = locate(&error.at);
                        self.wrong(place, key_path, error.message);
                    }
                    continue;
                }
            };
            let mut told = HashSet::new();
            template.visit_steps(|at, read| {
                if let Some(&target) = index_of.get(read) {
                    pairs.push((index, target));
                    places.push(locate(at));
                } else if told.insert(read) {
                    let (place, key_path) = locate(at);
                    let names = index_of.keys().copied();
                    let mut message = format!("reads the output of `{}`, which is not a step", shown(read));
                    if self.problems.len() < MAX_SUGGESTIONS {
                        message.push_str(&did_you_mean(read, names));
                    }
                    self.wrong(place, key_path, message);
                }
            });
        }
        for wrong in graph.map_or_else(Vec::new, |graph| graph.not_ancestors(&pairs)) {
            let (step, read) = pairs[wrong];
            let name = &steps[step as usize].definition.name;
            let read = &steps[read as usize].definition.name;
            let message = if name == read {
                format!("step `{name}` reads its own output, which exists only after it ran")
            } else {
                format!(
                    "step `{name}` reads the output of `{read}` without waiting for it; \
                     add `{read}` to its depends_on"
                )
            };
            let (place, key_path) = &places[wrong];
            self.wrong(*place, key_path, message);
        }
    }
}

/// Why a condition on the task's input can never be what its author meant: the schema allows only
/// values of another type there.
fn mismatch(condition: &Condition, schema: Option<&serde_json::Value>) -> Option<String> {
    let (wanted, path) = (condition.types()?, condition.reference().input_path()?);
    let declared = declared(schema?, path)?;
    let fits = declared.iter().any(|declared| wanted.contains(declared));
    (!fits).then(|| {
        format!("compares with a {}, but the input_schema says that this is a {}", wanted[0], declared.join(" or "))
    })
}

/// The types that a schema declares for what stands at a path; `None` if it says nothing.
fn declared<'s>(mut schema: &'s serde_json::Value, path: &[Segment]) -> Option<Vec<&'s str>> {
    for segment in path {
        schema = match segment {
            Segment::Key(key) => schema.get("properties")?.get(key)?,
            Segment::Index(_) => schema.get("items")?,
        };
    }
    match schema.get("type")? {
        serde_json::Value::String(one) => Some(vec![one]),
        serde_json::Value::Array(some) => Some(some.iter().filter_map(serde_json::Value::as_str).collect()),
        _ => None,
    }
}
