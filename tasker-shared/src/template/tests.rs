//! Whole templates: what is read of a file, and what of the database.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::*;

mod mistakes;
mod published;

/// Four lines before the steps, so that the table below can count lines.
const GOOD: &str = r#"namespace: shop
name: order
version: "1.0.0"
steps:
  - name: a
    handler: orders.a
  - name: b
    handler: orders.b
    depends_on: [a]
"#;

/// [`GOOD`] with one text replaced by another.
fn with(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    GOOD.replacen(from, to, 1)
}

/// [`GOOD`] with more keys at the root, from line 4 on.
fn root(keys: &str) -> String {
    with("steps:", &format!("{keys}\nsteps:"))
}

/// [`GOOD`] with more keys in step `b`, from line 10 on.
fn step(keys: &str) -> String {
    format!("{GOOD}    {}\n", keys.replace('\n', "\n    "))
}

fn good(yaml: &str) -> Checked {
    parse("order.yaml", yaml).unwrap_or_else(|problems| panic!("{}\n{yaml}", told(&problems)))
}

fn told(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn whole_format_is_read() {
    let Checked { template, compiled } = good(
        r#"
namespace: fulfillment
name: order
version: "1.2.0"
description: one line
input_schema: {type: object, required: [order_id]}
on_failure: block
timeouts: {total: 7d}
trace: {incoming: link, keep: [failed, retried, slower_than: 5s]}
steps:
  - name: reserve
    handler: inventory.reserve
  - name: fraud_check
    handler: fraud.check
  - name: charge
    handler: payments.charge
    depends_on: [reserve, fraud_check]
    join: taken
    when: ${input.total} > 0
    input: {amount: "${input.total}", hold: "${steps.reserve.output.hold_id}"}
    queue: slow
    priority: -5
    retry: {max_attempts: 5, initial_interval: 250ms, backoff_coefficient: 1.5, max_interval: 1h30m,
            jitter: 0, non_retryable_errors: [CardDeclined], on_exhausted: continue}
    timeouts: {queue: 1h, run: 45s, total: 1d, heartbeat: 5s}
"#,
    );
    let seconds = Duration::from_secs;
    assert_eq!(template.on_failure, OnFailure::Block);
    assert_eq!(template.timeouts.total, Some(seconds(7 * 86_400)));
    assert_eq!(template.trace.incoming, Incoming::Link);
    let keep = [Keep::Failed, Keep::Retried, Keep::SlowerThan(seconds(5))];
    assert_eq!(template.trace.keep, keep);
    let charge = &template.steps[2];
    assert_eq!(
        *charge,
        Step {
            name: "charge".into(),
            handler: "payments.charge".into(),
            wait: None,
            task: None,
            depends_on: vec!["reserve".into(), "fraud_check".into()],
            join: Join::Taken,
            when: Some("${input.total} > 0".into()),
            branches: Vec::new(),
            for_each: None,
            max_parallel: None,
            on_item_failure: OnItemFailure::Fail,
            input: Some(json!({
                "amount": "${input.total}",
                "hold": "${steps.reserve.output.hold_id}"
            })),
            queue: Some("slow".into()),
            priority: -5,
            concurrency: None,
            rate: None,
            retry: RetryPolicy {
                max_attempts: 5,
                initial_interval: Duration::from_millis(250),
                backoff_coefficient: 1.5,
                max_interval: seconds(5400),
                jitter: 0.0,
                non_retryable_errors: vec!["CardDeclined".into()],
                on_exhausted: OnExhausted::Continue,
            },
            timeouts: StepTimeouts {
                queue: Some(seconds(3600)),
                run: seconds(45),
                total: Some(seconds(86_400)),
                heartbeat: seconds(5),
            },
        }
    );
    assert_eq!(compiled.definition.graph.parents(2), [0, 1]);
    assert_eq!(step_queue("fulfillment", charge), "worker_fulfillment__slow");
    assert_eq!(step_queue("fulfillment", &template.steps[0]), "worker_fulfillment");
}

#[test]
fn what_is_left_out_takes_the_published_defaults() {
    let template = good(GOOD).template;
    assert_eq!(template.on_failure, OnFailure::Fail);
    assert_eq!(template.timeouts.total, None);
    assert_eq!((template.trace.incoming, template.trace.keep.len()), (Incoming::Join, 0));
    let retry = &template.steps[0].retry;
    assert_eq!((retry.max_attempts, retry.on_exhausted), (3, OnExhausted::Fail));
    assert_eq!(retry.initial_interval, Duration::from_secs(1));
    assert_eq!(retry.max_interval, Duration::from_mins(1));
    assert_eq!((retry.backoff_coefficient, retry.jitter), (2.0, 0.2));
    let timeouts = &template.steps[0].timeouts;
    assert_eq!((timeouts.queue, timeouts.total), (None, None));
    assert_eq!((timeouts.run, timeouts.heartbeat), (Duration::from_secs(30), Duration::from_secs(10)));
}

#[test]
fn json_text_is_a_template_too() {
    let json = r#"{"namespace": "shop", "name": "order", "version": "1",
                   "steps": [{"name": "a", "handler": "echo"}]}"#;
    assert_eq!(good(json).compiled.definition.graph.len(), 1);
}

#[test]
fn template_without_steps_is_allowed() {
    assert!(good("{namespace: shop, name: order, version: v1, steps: []}").compiled.definition.graph.is_empty());
}

#[test]
fn canonical_json_leaves_defaults_out_and_reads_back() {
    let spelled_out = with(
        "handler: orders.a",
        "handler: orders.a\n    priority: 0\n    \
        retry: {max_attempts: 3, jitter: 0.2}\n    timeouts: {run: 30s}",
    );
    let template = good(&spelled_out).template;
    assert_eq!(
        to_json(&template),
        json!({"namespace": "shop", "name": "order", "version": "1.0.0", "steps": [
            {"name": "a", "handler": "orders.a"},
            {"name": "b", "handler": "orders.b", "depends_on": ["a"]}]})
    );
    assert_eq!(from_json(to_json(&template)).unwrap(), template);
    let full = good(&step("timeouts: {total: 2s}\nretry: {initial_interval: 50ms}\ninput: [1]"));
    let json = to_json(&full.template);
    assert_eq!(json["steps"][1]["timeouts"], json!({"run": 30_000, "total": 2000, "heartbeat": 10_000}));
    assert_eq!(json["steps"][1]["retry"]["initial_interval"], 50);
    assert_eq!(from_json(json.clone()).unwrap(), full.template);
    let back = load(7, json).unwrap().definition;
    assert_eq!(back.template_id, 7);
    assert_eq!(back.graph, full.compiled.definition.graph);
}

#[test]
fn stored_definitions_of_another_shape_are_refused() {
    let newer = json!({"namespace": "shop", "name": "order", "version": "1", "steps": [],
                       "invented_later": true});
    let error = from_json(newer).unwrap_err().to_string();
    assert!(error.contains("invented_later") && error.contains("upgrade"), "{error}");
    let mut broken = good(GOOD).template;
    broken.steps[0].depends_on = vec!["b".into()];
    let stored = |template: &Template| load(1, to_json(template)).map(drop);
    assert!(matches!(stored(&broken), Err(Error::CheckStoredGraph(_))));
    broken.steps[0].depends_on.clear();
    broken.steps[0].input = Some(json!({"list": ["${x}"]}));
    let error = stored(&broken).unwrap_err().to_string();
    assert!(error.contains("step a") && error.contains("input.list[0]"), "{error}");
    broken.steps[0].input = None;
    stored(&broken).unwrap();
    broken.input_schema = Some(json!({"type": "objekt"}));
    assert!(matches!(stored(&broken), Err(Error::CompileStoredSchema { template_id: 1 })));
}

/// Names and what stands for their limits, each as large as allowed.
#[test]
fn largest_allowed_values_pass() {
    let long = "a".repeat(40);
    good(&with("namespace: shop", &format!("namespace: {long}")));
    good(&with("name: order", &format!("name: {long}")));
    good(&with("\"1.0.0\"", &"9".repeat(64).replace("9999", "1.a-")));
    good(&with("orders.a", &format!("{}.9", "a".repeat(98))));
    good(&step(&format!("queue: {}", "q".repeat(34))));
    good(&step("retry: {max_attempts: 1000000, jitter: 1, backoff_coefficient: 1000}"));
    good(&step("priority: -2147483648"));
    good(&step("timeouts: {heartbeat: 1s, total: 3650d}"));
    good(&step(&format!("retry: {{non_retryable_errors: [{}]}}", "e".repeat(100))));
    good(&root(&format!("description: {}", "é".repeat(1000))));
}

/// A schema nested to the limit is compiled, and an input checked, on the
/// small stack of a test or worker thread.
#[test]
fn deep_schemas_and_inputs_fit_an_ordinary_stack() {
    let deep = |levels: usize| (0..levels).fold(json!({"type": "integer"}), |inner, _| json!({"items": inner}));
    let schema = InputSchema::compile(&deep(61)).unwrap();
    let input = (0..61).fold(json!("x"), |inner, _| json!([inner]));
    assert_eq!(schema.check(&input).unwrap_err().len(), 1);
    let tree = InputSchema::compile(&json!({"items": {"$ref": "#"}, "not": {"type": "string"}}));
    let input = (0..120).fold(json!("x"), |inner, _| json!([inner]));
    assert_eq!(tree.unwrap().check(&input).unwrap_err().len(), 1);
}

#[test]
fn two_thousand_steps_with_six_thousand_edges_are_ordinary() {
    let steps: Vec<String> = (0_usize..2000)
        .map(|n| {
            let parents = [1, 3, 40].iter().filter(|&&back| back <= n);
            let parents: Vec<String> = parents.map(|back| format!("s{}", n - back)).collect();
            let first = if n > 0 { "'${steps.s0.output.id}'" } else { "1" };
            format!(
                "  - name: s{n}\n    handler: work\n    depends_on: [{}]\n    input: {{x: {first}}}\n",
                parents.join(", ")
            )
        })
        .collect();
    let yaml = GOOD.split_once("  - ").unwrap().0.to_owned() + &steps.concat();
    let checked = good(&yaml);
    assert_eq!(checked.compiled.definition.graph.len(), 2000);
    let edges: usize = (0..2000).map(|step| checked.compiled.definition.graph.parents(step).len()).sum();
    assert_eq!(edges, 3 * 2000 - 1 - 3 - 40);
    assert_eq!(from_json(to_json(&checked.template)).unwrap(), checked.template);
}

// Random files.

fn line() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("retry: {max_attempts: 2}".to_owned()),
        Just("depends_on: [a]".to_owned()),
        Just("  - name: z".to_owned()),
        Just("input: {a: '${steps.a.output.x}'}".to_owned()),
        "[ ]{0,6}[a-z_]{0,10}:? ?[\\[\\]{}a-z0-9&*!|>'\"#%@`,-]{0,12}",
        any::<String>(),
    ]
}

proptest! {
    /// Whatever a file holds, it is read or refused with places.
    #[test]
    fn any_file_is_read_or_refused(at in 0_usize..9, lines in proptest::collection::vec(line(), 1..4)) {
        let mut all: Vec<String> = GOOD.lines().map(str::to_owned).collect();
        all.splice(at..at, lines);
        if let Err(problems) = parse("f", &all.join("\n")) {
            prop_assert!(!problems.is_empty());
            for problem in problems {
                prop_assert!(problem.line >= 1 && problem.column >= 1, "{problem:?}");
                prop_assert!(!problem.message.is_empty());
            }
        }
    }

    /// What was read is the same after a trip through the database's form.
    #[test]
    fn definitions_survive_the_database(
        attempts in 1_u32..1_000_000,
        initial in 1_u64..1_000_000,
        longer in 0_u64..1_000_000,
        coefficient in 1.0_f64..1000.0,
        jitter in 0.0_f64..=1.0,
        priority: i32,
        heartbeat in 1000_u64..1_000_000,
    ) {
        let yaml = step(&format!(
            "priority: {priority}\nretry: {{max_attempts: {attempts}, initial_interval: {initial}ms, \
             max_interval: {}ms, backoff_coefficient: {coefficient:?}, jitter: {jitter:?}}}\n\
             timeouts: {{heartbeat: {heartbeat}ms}}",
            initial + longer
        ));
        let template = good(&yaml).template;
        let retry = &template.steps[1].retry;
        prop_assert_eq!(retry.jitter.to_bits(), jitter.to_bits());
        prop_assert_eq!(retry.backoff_coefficient.to_bits(), coefficient.to_bits());
        let text = to_json(&template).to_string();
        prop_assert_eq!(from_json(serde_json::from_str(&text).unwrap()).unwrap(), template);
    }
}
