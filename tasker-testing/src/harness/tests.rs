use super::*;
use tasker_shared::state_machine::states::{StepState, TaskState};

const DIAMOND: &str = r#"
namespace: shop
name: order
version: "1"
on_failure: block
input_schema: {type: object, required: [id]}
steps:
  - {name: a, handler: a, input: {id: "${input.id}"}}
  - {name: b, handler: b, depends_on: [a]}
  - {name: c, handler: c, depends_on: [a], timeouts: {run: 30s}}
  - {name: d, handler: d, depends_on: [b, c], input: {b: "${steps.b.output}", c: "${steps.c.output}"}}
"#;

fn diamond() -> Harness {
    let mut harness = Harness::from_yaml(DIAMOND).unwrap();
    for name in ["a", "b", "c", "d"] {
        harness.handler(name, |call| Ok(json!({"did": call.step})));
    }
    harness
}

#[test]
fn a_task_runs_to_its_end_and_inputs_are_resolved() {
    let run = diamond().run(json!({"id": 7}));
    assert_eq!((run.status(), run.reason()), ("completed", None));
    assert_eq!(run.calls("a")[0].input, json!({"id": 7}));
    assert_eq!(run.calls("b")[0].input, json!({"input": {"id": 7}, "steps": {"a": {"did": "a"}}}));
    assert_eq!(run.calls("d")[0].input, json!({"b": {"did": "b"}, "c": {"did": "c"}}));
    assert_eq!(run.all_calls().len(), 4);
}

#[test]
fn bad_input_fails_the_task_and_calls_nobody() {
    let run = diamond().run(json!({}));
    assert_eq!((run.status(), run.all_calls().len(), run.step_state("a")), ("failed", 0, None));
    assert!(run.reason().is_some_and(|reason| reason.contains("id")), "{:?}", run.reason());
}

#[test]
fn a_lost_worker_costs_its_lease_and_no_retry() {
    let mut harness = diamond();
    harness.handler("c", |call| if call.attempt == 1 { Err(MockError::Lost) } else { Ok(json!(1)) });
    let run = harness.run(json!({"id": 7}));
    assert_eq!((run.status(), run.calls("c").len()), ("completed", 2));
    assert!(run.took() >= Duration::from_secs(10));
}

#[test]
fn a_failure_for_good_waits_for_a_person() {
    let mut harness = diamond();
    harness.handler("b", |_| Err(MockError::fail("CardDeclined", "no money")));
    let run = harness.run(json!({"id": 7}));
    assert_eq!((run.state(), run.status()), (TaskState::BlockedByFailures, "waiting"));
    assert_eq!((run.step_state("b"), run.step_state("c")), (Some(StepState::Error), Some(StepState::Complete)));
    assert_eq!((run.output("b"), run.calls("b").len()), (None, 1));
}

#[test]
fn a_task_that_a_step_starts_is_a_mock_too() {
    let yaml = DIAMOND.replace("{name: b, handler: b,", "{name: b, task: {template: refund},");
    let mut harness = Harness::from_yaml(&yaml).unwrap();
    for name in ["a", "c", "d"] {
        harness.answers(name, json!(name));
    }
    harness.task("refund", |call| match call.attempt {
        1 => Err(MockError::fail("Broken", "no")),
        _ => Ok(json!({"paid": call.input["steps"]["a"]})),
    });
    let run = harness.run(json!({"id": 7}));
    assert_eq!((run.status(), run.output("b")), ("completed", Some(&json!({"paid": "a"}))));
    assert_eq!((run.calls("b").len(), &*run.calls("b")[0].handler), (2, "refund"));
}

#[test]
fn large_values_reach_the_mock_whole() {
    let mut harness = diamond();
    let big = json!({"text": "x".repeat(200_000), "a/b~c": 1});
    harness.answers("b", big.clone());
    let run = harness.run(json!({"id": 7}));
    assert!(run.calls("d")[0].input == json!({"b": big, "c": {"did": "c"}}));
}

const EVERYTHING: &str = r#"
namespace: shop
name: everything
version: "1"
timeouts: {total: 30d}
fair_key: "${input.tenant}"
steps:
  - {name: route, handler: route, branches: [left, right]}
  - {name: left, handler: ok, depends_on: [route], concurrency: {key: "${input.tenant}", limit: 2}}
  - {name: right, handler: ok, depends_on: [route]}
  - {name: dear, handler: ok, depends_on: [route], when: "${input.total} > 100"}
  - {name: join, handler: ok, depends_on: [left, right, dear], join: taken, rate: {limit: 1, per: 1h}, priority: 3}
  - {name: nap, wait: {sleep: 3d}, depends_on: [join]}
  - {name: until, wait: {until: "${input.at}"}, depends_on: [join]}
  - {name: approval, wait: {signal: approved, allowed: ["y", "n"]}, depends_on: [nap]}
  - {name: hint, wait: {signal: hint, timeout: 1h, on_timeout: continue}}
  - {name: each, handler: pay, depends_on: [approval], for_each: "${input.parts}", max_parallel: 2, on_item_failure: continue, input: {part: "${item}", place: "${item_index}"}}
  - {name: nested, task: {template: child}, for_each: "${input.parts}", depends_on: [approval], input: {part: "${item}"}}
  - {name: slow, handler: slow, timeouts: {run: 30s, total: 10m}, retry: {max_attempts: 2, on_exhausted: continue}}
  - {name: unheard, handler: unheard, timeouts: {queue: 2m}, retry: {on_exhausted: continue}}
  - {name: sum, handler: ok, depends_on: [each, nested, slow, unheard, until, hint], input: {all: "${steps.each.output}", nested: "${steps.nested.output}", hint: "${steps.hint.output.timed_out}"}}
"#;

#[test]
fn every_feature_that_a_template_can_name_runs() {
    let mut harness = Harness::from_yaml(EVERYTHING).unwrap();
    harness.answers("route", json!({"branch": "left"})).answers("ok", json!("ok")).nobody_offers("unheard");
    harness.handler("pay", |call| match call.item {
        Some(1) => Err(MockError::fail("Broke", "no money")),
        item => Ok(json!([item, call.input["part"]])),
    });
    harness.handler("slow", |_| Err(MockError::Hangs));
    harness.task("child", |call| Ok(json!({"got": call.input["part"]})));
    let input = json!({"tenant": "t", "total": 7, "at": "2026-01-08T00:00:00Z", "parts": ["a", "b", "c"]});
    let mut task = harness.start(input);
    task.advance(Duration::from_hours(71));
    assert_eq!(
        (task.step_state("nap"), task.step_state("until")),
        (Some(StepState::Waiting), Some(StepState::Complete))
    );
    task.signal("approved", json!({"answer": "y"}));
    assert_eq!(task.step_state("approval"), Some(StepState::Pending), "the signal is kept");
    task.suspend();
    task.advance(Duration::from_hours(48));
    assert_eq!((task.status(), task.items("each").len()), ("suspended", 0));
    task.resume();
    let run = task.finish();
    assert_eq!((run.status(), run.reason()), ("completed", None));
    assert_eq!(run.step_state("right"), Some(StepState::Skipped));
    assert_eq!(run.step_state("dear"), Some(StepState::Skipped));
    assert_eq!(run.items("each"), [StepState::Complete, StepState::Error, StepState::Complete]);
    assert_eq!((run.calls("slow").len(), run.step_state("slow")), (2, Some(StepState::Error)));
    assert_eq!(run.step_state("unheard"), Some(StepState::Error));
    let sum = &run.calls("sum")[0].input;
    assert_eq!(sum["all"], json!([[0, "a"], null, [2, "c"]]));
    assert_eq!(sum["nested"], json!([{"got": "a"}, {"got": "b"}, {"got": "c"}]));
    assert_eq!(sum["hint"], json!(true));
    assert!(run.took() >= Duration::from_hours(71 + 48));
}

#[test]
fn an_operator_settles_retries_and_runs_again() {
    let mut harness = diamond();
    harness.handler("b", |_| Err(MockError::fail("CardDeclined", "no money")));
    let mut task = harness.start(json!({"id": 7}));
    task.retry();
    assert_eq!((task.status(), task.calls("b").len()), ("waiting", 2));
    task.complete_step("b", json!("by hand"));
    assert_eq!((task.status(), &task.calls("d")[0].input["b"]), ("completed", &json!("by hand")));
    task.rerun("c");
    let run = task.finish();
    assert_eq!(
        (run.status(), run.calls("c").len(), run.calls("d").len(), run.calls("b").len()),
        ("completed", 2, 2, 2)
    );
}

#[test]
#[should_panic(expected = "nothing can happen any more, and it waits for a signal: approved")]
fn a_signal_that_nobody_sends_is_named() {
    let yaml = DIAMOND.replace("handler: b,", "wait: {signal: approved},");
    let mut harness = Harness::from_yaml(&yaml).unwrap();
    harness.answers("a", json!(1)).answers("c", json!(1)).run(json!({"id": 7}));
}

#[test]
#[should_panic(expected = "step a needs handler a, which has no mock")]
fn a_missing_mock_is_named() {
    Harness::from_yaml(DIAMOND).unwrap().run(json!({"id": 7}));
}

#[test]
fn a_bad_template_says_where() {
    let error = Harness::from_yaml(&DIAMOND.replace("[b, c]", "[b, x]")).unwrap_err().to_string();
    assert!(error.starts_with("template.yaml:"), "{error}");
}
