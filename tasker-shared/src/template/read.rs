//! The text of a file -> a checked template, or every problem of it at its position.

use serde_json::{Map, Value};

use super::compile::{self, Compiled, Expressions};
use super::cross_checks::{self, CrossChecks};
use super::problems::{Problem, Problems};
use super::yaml::{self, Kind, Node, Position};
use super::{Checked, MAX_DEFINITION_BYTES, MAX_DEPTH, MAX_FILE_BYTES, Template, shape};

const START: Position = Position { line: 1, column: 1 };

pub(super) fn read(file: &str, text: &str) -> Result<Checked, Vec<Problem>> {
    let mut problems = Problems { file, list: Vec::new() };
    if text.len() > MAX_FILE_BYTES {
        let message =
            format!("the file has {} bytes, more than {MAX_FILE_BYTES}; move data into the tasks' inputs", text.len());
        return Err(problems.only(START, message));
    }
    let root = match yaml::read(text) {
        Ok(root) => root,
        Err((at, message)) => return Err(problems.only(at, format!("cannot be read as YAML: {message}"))),
    };
    if matches!(root.kind, Kind::Null) {
        return Err(problems.only(START, "the file is empty; a template starts with `namespace:`"));
    }
    if let Some(at) = root.deeper_than(MAX_DEPTH) {
        return Err(problems.only(at, format!("lists and mappings nest deeper than {MAX_DEPTH} levels here")));
    }
    let fields = shape::fields(&root, shape::template(), &mut problems);
    let checked = fields.and_then(|fields| checked(&root, fields, &mut problems));
    problems.list.sort_by_key(|problem| (problem.line, problem.column));
    match checked {
        Some(checked) if problems.list.is_empty() => Ok(checked),
        _ => Err(problems.list),
    }
}

/// The template of these fields, compiled; `None`, with the reason, if something is wrong with it.
fn checked(root: &Node, mut fields: Map<String, Value>, problems: &mut Problems<'_>) -> Option<Checked> {
    problems.add_findings(root, cross_checks::step_keys(root));
    // Whatever is missing has been reported; the rest is checked all the same.
    for name in ["namespace", "name", "version"] {
        fields.entry(name).or_insert_with(|| Value::from(""));
    }
    fields.entry("steps").or_insert_with(|| Value::Array(Vec::new()));
    let template: Template = match serde_json::from_value(Value::Object(fields)) {
        Ok(template) => template,
        Err(error) => {
            problems.add(root.at, "", format!("cannot be read as a template: {error}"));
            return None;
        }
    };
    let schema = template.input_schema.as_ref().map(cross_checks::input_schema).transpose();
    let schema = schema.map_err(|finding| problems.add_findings(root, vec![finding])).ok();
    let (expressions, findings) = Expressions::parse(&template);
    problems.add_findings(root, findings);
    let graph = compile::graph(&template);
    let declared = template.input_schema.as_ref().filter(|_| schema.is_some());
    let checks = CrossChecks::new(root, &template, &expressions);
    problems.add_findings(root, checks.run(graph.as_ref().map_err(Vec::as_slice), declared));
    size(root, &template, problems);
    if !problems.list.is_empty() {
        return None;
    }
    let compiled = Compiled::new(0, &template, graph.ok()?, expressions, schema?);
    Some(Checked { template, compiled })
}

fn size(root: &Node, template: &Template, problems: &mut Problems<'_>) {
    let size = serde_json::to_vec(template).map_or(0, |json| json.len());
    if size > MAX_DEFINITION_BYTES {
        let message = format!(
            "the definition has {size} bytes as JSON, more than {MAX_DEFINITION_BYTES}; \
             shorten names and inputs, or split the work into several tasks"
        );
        problems.add(root.at, "", message);
    }
}
