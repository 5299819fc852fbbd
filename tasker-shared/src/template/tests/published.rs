//! The documents, the examples and the published schema agree with what is read.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::mistakes::mistakes;
use super::*;

fn document() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/templates.md");
    std::fs::read_to_string(path).expect("docs/reference/templates.md is part of the repository")
}

/// The code blocks with this info string, each with its line number.
fn blocks(document: &str, info: &str) -> Vec<(usize, String)> {
    let mut blocks = Vec::new();
    let mut lines = document.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let Some(found) = line.strip_prefix("```") else {
            continue;
        };
        let block: Vec<&str> = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect();
        if found == info {
            blocks.push((number + 1, block.join("\n") + "\n"));
        }
    }
    blocks
}

/// A block of the document may leave out what it does not talk about.
fn completed(block: &str) -> String {
    let mut yaml = String::new();
    for (key, line) in [
        ("namespace", "namespace: docs\n"),
        ("name", "name: example\n"),
        ("version", "version: \"1\"\n"),
        ("steps", "steps: []\n"),
    ] {
        if !block.lines().any(|have| have.starts_with(&format!("{key}:"))) {
            yaml.push_str(line);
        }
    }
    yaml + block
}

#[test]
fn every_yaml_block_of_the_document_is_a_good_template() {
    let blocks = blocks(&document(), "yaml");
    assert!(blocks.len() >= 5, "{} blocks", blocks.len());
    for (line, block) in blocks {
        if let Err(problems) = parse("block", &completed(&block)) {
            panic!("docs/reference/templates.md:{line}\n{}", told(&problems));
        }
    }
}

#[test]
fn refused_example_of_the_document_is_told_as_it_says() {
    let document = document();
    let (refused, told_there) = (blocks(&document, "yaml refused"), blocks(&document, "text"));
    assert!(!refused.is_empty());
    for ((line, block), (_, expected)) in refused.iter().zip(&told_there) {
        let problems = parse("order.yaml", block).unwrap_err();
        assert_eq!(told(&problems) + "\n", *expected, "docs/reference/templates.md:{line}");
    }
}

#[test]
fn every_example_of_a_feature_lints_clean() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/features");
    let files = std::fs::read_dir(folder).expect("examples/features").map(|file| file.unwrap().path());
    for file in files.filter(|file| file.extension().is_some_and(|extension| extension == "yaml")) {
        let text = std::fs::read_to_string(&file).unwrap();
        if let Err(problems) = parse(&file.to_string_lossy(), &text) {
            panic!("{}", told(&problems));
        }
    }
}

/// Each key of the schema with what it says of it, from `namespace` to `steps[].retry.jitter`; not
/// those of which the value is a mapping.
fn keys(schema: &Value, prefix: &str, visit: &mut impl FnMut(&str, &Value)) {
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{prefix}{name}");
        let alternatives = inner["anyOf"].as_array().filter(|all| all.iter().all(|one| one["type"] == "object"));
        if let Some(alternatives) = alternatives {
            for one in alternatives {
                keys(one, &format!("{path}."), visit);
            }
        } else if inner["type"] == "object" {
            keys(inner, &format!("{path}."), visit);
        } else {
            visit(&path, inner);
            keys(&inner["items"], &format!("{path}[]."), visit);
        }
    }
}

/// The tables list every key with its default, and nothing else.
#[test]
fn tables_of_the_document_list_every_key_with_its_default() {
    let document = document();
    let cell = |text: &str| text.trim().trim_matches('`').to_owned();
    let documented: BTreeMap<String, String> = document
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| {
            let cells: Vec<&str> = line.split('|').collect();
            (cell(cells[1]), cell(cells[2]))
        })
        .collect();

    let mut known = BTreeSet::new();
    keys(schema(), "", &mut |key, _| known.extend([key.to_owned()]));
    assert_eq!(documented.keys().cloned().collect::<BTreeSet<_>>(), known);

    let (retry, timeouts) = (RetryPolicy::default(), StepTimeouts::default());
    for (key, default) in [
        ("steps[].retry.max_attempts", retry.max_attempts.to_string()),
        ("steps[].retry.initial_interval", format_duration(retry.initial_interval)),
        ("steps[].retry.backoff_coefficient", format!("{:.1}", retry.backoff_coefficient)),
        ("steps[].retry.max_interval", format_duration(retry.max_interval)),
        ("steps[].retry.jitter", retry.jitter.to_string()),
        ("steps[].retry.on_exhausted", "fail".to_owned()),
        ("steps[].wait.timeout", "none".to_owned()),
        ("steps[].wait.on_timeout", "fail".to_owned()),
        ("steps[].timeouts.run", format_duration(timeouts.run)),
        ("steps[].timeouts.heartbeat", format_duration(timeouts.heartbeat)),
        ("steps[].timeouts.queue", "none".to_owned()),
        ("steps[].timeouts.total", "none".to_owned()),
        ("steps[].priority", "0".to_owned()),
        ("steps[].join", "all".to_owned()),
        ("steps[].max_parallel", MAX_PARALLEL.to_string()),
        ("steps[].on_item_failure", "fail".to_owned()),
        ("timeouts.total", "none".to_owned()),
        ("on_failure", "fail".to_owned()),
        ("trace.incoming", "join".to_owned()),
        ("namespace", "required".to_owned()),
        ("name", "required".to_owned()),
        ("version", "required".to_owned()),
        ("steps", "required".to_owned()),
        ("steps[].name", "required".to_owned()),
        ("steps[].handler", "required".to_owned()),
    ] {
        assert_eq!(documented[key], default, "{key}");
    }
}

// The published schema.

fn validator() -> jsonschema::Validator {
    jsonschema::draft202012::options().offline().build(schema()).expect("the published schema is one")
}

fn value(yaml: &str) -> Option<Value> {
    yaml::read(yaml).ok().map(|root| root.to_value())
}

#[test]
fn every_key_of_the_schema_is_described() {
    let mut count = 0;
    keys(schema(), "", &mut |key, schema| {
        count += 1;
        assert!(schema["description"].as_str().is_some_and(|text| text.len() > 10), "{key}: {schema}");
    });
    assert!(count > 50, "{count} keys");
    let text = schema().to_string();
    for null in ["\"null\"", ":null", "[null"] {
        assert!(!text.contains(null), "a file never says null");
    }
    assert!(!text.contains("[`"), "a link of the Rust documentation leads nowhere in an editor");
}

#[test]
fn defaults_stand_in_the_schema_as_a_file_says_them() {
    let steps = &schema()["properties"]["steps"]["items"]["properties"];
    assert_eq!(steps["retry"]["properties"]["max_interval"]["default"], "1m");
    assert_eq!(steps["timeouts"]["properties"]["heartbeat"]["default"], "10s");
    assert_eq!(steps["retry"]["properties"]["on_exhausted"]["default"], "fail");
}

/// Whatever is read is accepted by an editor that has the schema.
#[test]
fn the_schema_accepts_every_template_of_the_documents_and_the_examples() {
    let validator = validator();
    let mut good: Vec<(String, String)> = Vec::new();
    for (line, block) in blocks(&document(), "yaml") {
        good.push((format!("docs/reference/templates.md:{line}"), completed(&block)));
    }
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples");
    let mut folders = vec![std::path::PathBuf::from(examples)];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).expect("examples").map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "yaml") {
                let text = std::fs::read_to_string(&path).unwrap();
                // Not every file there is a template: a retention policy has no steps.
                if text.lines().any(|line| line.starts_with("steps:")) {
                    good.push((path.display().to_string(), text));
                }
            }
        }
    }
    assert!(good.len() > 25, "{} templates", good.len());
    for (name, text) in good {
        let value = value(&text).unwrap();
        let problems: Vec<String> =
            validator.iter_errors(&value).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(problems.is_empty(), "{name}\n{}", problems.join("\n"));
    }
}

/// What the schema cannot know: it takes other steps, an expression, or a sum.
const NOT_OF_SHAPE: [&str; 40] = [
    "",
    "5m is longer than the default max_interval, 1m; set that too",
    "5s is shorter than initial_interval, 10s",
    "`a` does not depend on `b`, so it cannot be one of its branches",
    "`c`, which is not a step",
    "a key may read the task's input only",
    "before there is one",
    "cannot decide together",
    "chooses nothing to continue with",
    "compares with a number, but the input_schema says that this is a string",
    "depends on `aa`, which is not a step; did you mean `a`?",
    "did you mean `b`?",
    "does not begin with a reference",
    "example.com",
    "has no order",
    "have 39 characters together, more than 38",
    "in a circle: a -> b -> a; remove one",
    "in values only",
    "is longer than 3650d",
    "is not a time",
    "is not closed",
    "is not one reference",
    "longer than",
    "more than 1048576; shorten names and inputs",
    "must be https://json-schema.org/draft/2020-12/schema",
    "must come to an object",
    "named `a` exists already",
    "nest deeper than 64 levels here",
    "nothing to join",
    "other than the step's output",
    "reads inside a number",
    "reads its own output",
    "reads the output of `aa`, which is not a step; did you mean `a`?",
    "runs over a list, but the input_schema says that this is of type object",
    "starts with neither",
    "starts with neither `input` nor `steps`",
    "step `a` reads the output of `b` without waiting for it; add `b` to its depends_on",
    "step `b` depends on itself",
    "the step has no `for_each`",
    "would nest without end",
];

#[test]
fn the_schema_refuses_every_mistake_of_shape() {
    let validator = validator();
    let mut accepted: Vec<&str> = mistakes()
        .into_iter()
        .filter(|(yaml, ..)| value(yaml).is_some_and(|value| validator.is_valid(&value)))
        .map(|(.., message)| message)
        .collect();
    accepted.sort_unstable();
    accepted.dedup();
    assert_eq!(accepted, NOT_OF_SHAPE);
}
