//! Every example of a feature is a good template, names built-in handlers only, and runs in the
//! test kit to a sound trace.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tasker_shared::template;
use tasker_shared::testing::{Harness, MockError, Run};
use tasker_trace_testing::{Rules, Trace, assert_trace};

/// Name and text of each file.
fn examples() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/features");
    let files = std::fs::read_dir(folder).expect("the folder");
    let mut examples: Vec<(String, String)> = files
        .map(|entry| entry.expect("an entry").path())
        .map(|path| {
            let name = path.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
            (name, std::fs::read_to_string(&path).expect("a readable file"))
        })
        .collect();
    examples.sort();
    examples
}

#[test]
fn every_feature_example_lints_clean() {
    for (name, text) in examples() {
        let checked = template::parse(&name, &text).unwrap_or_else(|problems| panic!("{name}: {problems:#?}"));
        for step in checked.template.steps.iter().filter(|step| !step.handler.is_empty()) {
            let known = ["noop", "echo", "sleep", "fail"].contains(&&*step.handler);
            assert!(known, "{name}: {} is no built-in handler", step.handler);
        }
    }
}

/// Runs an example as the built-in handlers would, with an input that suits it.
fn run(name: &str, text: &str) -> Run {
    let mut harness = Harness::from_yaml(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    harness.answers("noop", Value::Null).answers("sleep", Value::Null);
    harness.handler("echo", |call| Ok(call.input.clone()));
    harness.handler("fail", |_| Err(MockError::fail("Failed", "as it was asked to")));
    harness.task("nested_payment", |call| Ok(json!({"capture": {"amount": call.input["amount"]}})));
    let input = json!({
        "amount": 12, "total": 700, "country": "de", "customer_id": "c-42", "tenant": "acme", "until": "2026-01-06T00:00:00Z",
        "rows": {"rows": [1]}, "by": "me", "parcels": ["a", "b"], "items": [1, 2], "pages": ["a"], "order_id": "4711",
        "kind": "parcel", "route": "express", "at": "2026-01-06T00:00:00Z", "orders": [{"id": 1}], "weights": [1, 2], "urls": ["a"],
    });
    let mut task = harness.start(input);
    match name {
        "approval" => {
            task.advance(Duration::from_hours(47)).signal("approved", json!({"answer": "approve"}));
        }
        "signal" => {
            task.signal("paid", json!({"amount": 12}));
        }
        "repair" => {
            task.complete_step("charge", json!({"receipt": "R-1"}));
        }
        _ => {}
    }
    task.finish()
}

#[test]
fn every_feature_example_runs_and_its_trace_is_sound() {
    for (name, text) in examples() {
        let run = run(&name, &text);
        assert_eq!(run.status(), "completed", "{name}: {:?}", run.reason());
        Rules::new().well_formed().assert(&Trace::of_log(&run.log()));
    }
}

#[test]
fn the_trace_of_a_run_in_the_test_kit_can_be_asserted() {
    let (name, text) = examples().into_iter().find(|(name, _)| name == "repair").expect("the example");
    let trace = Trace::of_log(&run(&name, &text).log());
    assert_trace!(trace, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "charge", outcome = "failure"],
            "step.state_transition" [event = "CompleteManually", actor = "test"],
            "step.execution" [step_name = "ship", outcome = "success"],
            ..
        }
    });
}
