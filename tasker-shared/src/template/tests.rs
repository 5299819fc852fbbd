//! Whole templates: what is read, and what every kind of mistake is told.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use serde_json::json;

use super::*;

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

/// Every problem as `line key: message`.
fn problems(yaml: &str) -> Vec<String> {
    let problems = parse("order.yaml", yaml).expect_err(yaml);
    problems.iter().map(|p| format!("{} {}: {}", p.line, p.key, p.message)).collect()
}

#[test]
fn whole_format_is_read() {
    let Checked { template, graph } = good(
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
        StepDefinition {
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
    assert_eq!(graph.parents(2), [0, 1]);
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
    assert_eq!(good(json).graph.len(), 1);
}

#[test]
fn template_without_steps_is_allowed() {
    assert!(good("{namespace: shop, name: order, version: v1, steps: []}").graph.is_empty());
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
    let back = from_json(json).unwrap();
    assert_eq!(back, full.template);
    assert_eq!(back.graph().unwrap(), full.graph);
}

#[test]
fn stored_definitions_of_another_shape_are_refused() {
    let newer = json!({"namespace": "shop", "name": "order", "version": "1", "steps": [],
                       "invented_later": true});
    let error = from_json(newer).unwrap_err().to_string();
    assert!(error.contains("invented_later") && error.contains("upgrade"), "{error}");
    let mut broken = good(GOOD).template;
    broken.steps[0].depends_on = vec!["b".into()];
    assert!(matches!(broken.graph(), Err(Error::CheckStoredGraph(_))));
    broken.steps[0].input = Some(json!("${x}"));
    assert!(broken.steps[0].input_template().unwrap_err().to_string().contains("step a"));
    assert_eq!(broken.steps[1].input_template().unwrap(), None);
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

/// Every kind of mistake: the template, the line, the key and a part of the
/// message.
#[test]
#[expect(clippy::too_many_lines, reason = "a table reads best in one piece")]
fn every_kind_of_mistake_is_told_with_line_and_key() {
    let long = "a".repeat(41);
    let cases = [
        // The file.
        (String::new(), 1, "", "the file is empty"),
        ("# nothing\n".into(), 1, "", "the file is empty"),
        ("- a\n".into(), 1, "", "is a list, not a mapping with keys such as `namespace:`"),
        ("just text\n".into(), 1, "", "is a text, not a mapping"),
        (with("[a]", "[a"), 9, "", "cannot be read as YAML: unclosed bracket"),
        (with("name: order", "name: order\nname: order"), 3, "", "duplicate mapping key: name"),
        (format!("{GOOD}---\n{GOOD}"), 10, "", "more than one document"),
        (" ".repeat(MAX_FILE_BYTES + 1), 1, "", "move data into the tasks' inputs"),
        (step(&format!("input: {}{}", "[".repeat(62), "]".repeat(62))), 10, "", "nest deeper than 64 levels here"),
        (step(&format!("input: {}", "[".repeat(5000))), 10, "", "nest too deep"),
        (
            step(&format!("input: {}", "x".repeat(MAX_DEFINITION_BYTES))),
            1,
            "",
            "more than 1048576; shorten names and inputs",
        ),
        // Keys.
        (root("retries: 3"), 4, "retries", "is not a known key; known here: namespace, name,"),
        (root("descripton: x"), 4, "descripton", "did you mean `description`?"),
        (step("handlr: x"), 10, "steps[1].handlr", "did you mean `handler`?"),
        (
            step("retry:\n  max_attempts: 2\n  max_atempts: 2"),
            12,
            "steps[1].retry.max_atempts",
            "did you mean `max_attempts`?",
        ),
        (step("timeouts: {runs: 5s}"), 10, "steps[1].timeouts.runs", "did you mean `run`?"),
        (root("timeouts: {run: 5s}"), 4, "timeouts.run", "known here: total"),
        (root("trace: {keeps: []}"), 4, "trace.keeps", "did you mean `keep`?"),
        (with("namespace: shop\n", ""), 1, "namespace", "is missing; add `namespace:`"),
        (with("name: order\n", ""), 1, "name", "is missing"),
        (with("version: \"1.0.0\"\n", ""), 1, "version", "is missing"),
        (GOOD.lines().take(3).collect::<Vec<_>>().join("\n"), 1, "steps", "is missing"),
        (with("- name: b\n    handler", "- handler"), 7, "steps[1].name", "is missing"),
        (with("    handler: orders.a\n", ""), 5, "steps[0].handler", "is missing"),
        (with("depends_on: [a]", "depends_on:"), 9, "steps[1].depends_on", "is empty; give it a value"),
        (step("input: ~"), 10, "steps[1].input", "is empty"),
        // Names.
        (with("shop", "Shop"), 1, "namespace", "`Shop` may hold only a-z, 0-9 and single _"),
        (with("shop", "my__shop"), 1, "namespace", "single _ between them"),
        (with("shop", "shop_"), 1, "namespace", "single _ between them"),
        (with("shop", "9shop"), 1, "namespace", "start with a letter"),
        (with("shop", &long), 1, "namespace", "at most 40 characters"),
        (with("shop", "12"), 1, "namespace", "is a number, not a text; put it in quotes"),
        (with("name: order", "name: big-order"), 2, "name", "`big-order` may hold only"),
        (with("name: order", "name: ''"), 2, "name", "`` may hold only"),
        (with("name: order", &format!("name: {long}")), 2, "name", "at most 40 characters"),
        (with("name: a", "name: A"), 5, "steps[0].name", "may hold only a-z"),
        (with("name: a", "name: true"), 5, "steps[0].name", "is a boolean, not a text"),
        (with("\"1.0.0\"", "1.10"), 3, "version", "is a number, in which 1.10 and 1.1 are the same"),
        (with("\"1.0.0\"", "1 beta"), 3, "version", "without spaces"),
        (with("\"1.0.0\"", "''"), 3, "version", "1 to 64 printable"),
        (with("\"1.0.0\"", "é1"), 3, "version", "1 to 64 printable"),
        (with("\"1.0.0\"", &"v".repeat(65)), 3, "version", "1 to 64 printable"),
        (with("orders.a", "orders..a"), 6, "steps[0].handler", "in parts separated by dots"),
        (with("orders.a", "Orders.a"), 6, "steps[0].handler", "start with a letter"),
        (with("orders.a", "orders/a"), 6, "steps[0].handler", "may hold only"),
        (with("orders.a", &"a".repeat(101)), 6, "steps[0].handler", "at most 100"),
        (step("queue: slow__er"), 10, "steps[1].queue", "single _ between them"),
        (
            step(&format!("queue: {}", "q".repeat(35))),
            10,
            "steps[1].queue",
            "have 39 characters together, more than 38",
        ),
        // Values of the template.
        (root("description: [x]"), 4, "description", "is a list, not a text"),
        (root(&format!("description: {}", "d".repeat(1001))), 4, "description", "more than 1000"),
        (root("on_failure: stop"), 4, "on_failure", "`stop` is not one of: fail, block"),
        (root("on_failure: true"), 4, "on_failure", "is a boolean, not one of: fail, block"),
        (root("timeouts: 5s"), 4, "timeouts", "is a text, not a mapping with keys such as `total:`"),
        (root("timeouts: {total: 30}"), 4, "timeouts.total", "`30` has no unit; write 30s"),
        (root("timeouts: {total: 0s}"), 4, "timeouts.total", "must be more than zero"),
        (root("timeouts: {total: 4000d}"), 4, "timeouts.total", "is longer than 3650d"),
        (root("timeouts: {total: [1s]}"), 4, "timeouts.total", "is a list, not a duration"),
        (root("trace: {incoming: follow}"), 4, "trace.incoming", "not one of: join, link"),
        (root("trace: {keep: failed}"), 4, "trace.keep", "is a text, not a list"),
        (root("trace: {keep: [slow]}"), 4, "trace.keep[0]", "not one of: failed, retried"),
        (root("trace: {keep: [slower_than]}"), 4, "trace.keep[0]", "write `slower_than: 5s`"),
        (
            root("trace:\n  keep:\n    - failed\n    - slower_than: fast"),
            7,
            "trace.keep[1].slower_than",
            "`fast` is not a duration",
        ),
        (root("input_schema: {type: objekt}"), 4, "input_schema.type", "not valid JSON Schema"),
        (
            root("input_schema:\n  properties:\n    a: {minimum: low}"),
            6,
            "input_schema.properties.a.minimum",
            "not valid JSON Schema 2020-12",
        ),
        (root("input_schema: text"), 4, "input_schema", "a JSON Schema is an object"),
        (
            root("input_schema:\n  $schema: http://json-schema.org/draft-07/schema#"),
            5,
            "input_schema.$schema",
            "must be https://json-schema.org/draft/2020-12/schema",
        ),
        (root("input_schema: {$ref: 'https://example.com/a'}"), 4, "input_schema", "example.com"),
        // Values of a step.
        ("namespace: shop\nname: o\nversion: v1\nsteps: {a: 1}\n".into(), 4, "steps", "not a list of steps"),
        (format!("{GOOD}  - just_a_name\n"), 10, "steps[2]", "is a text, not a mapping"),
        (with("[a]", "a"), 9, "steps[1].depends_on", "is a text, not a list; write it as [a, b]"),
        (with("[a]", "[a, 1]"), 9, "steps[1].depends_on[1]", "is a number, not a text"),
        // The graph.
        (step("join: some"), 10, "steps[1].join", "`some` is not one of: all, taken, any"),
        (with("    handler: orders.a", "    handler: orders.a\n    join: any"), 7, "steps[0].join", "nothing to join"),
        (step("branches: []"), 10, "steps[1].branches", "is an empty list"),
        (
            step("branches: [a]"),
            10,
            "steps[1].branches[0]",
            "`a` does not depend on `b`, so it cannot be one of its branches",
        ),
        (
            with("    handler: orders.a", "    handler: orders.a\n    branches: [bb]"),
            7,
            "steps[0].branches[0]",
            "did you mean `b`?",
        ),
        (
            with("    handler: orders.a", "    handler: orders.a\n    branches: [b, b]"),
            7,
            "steps[0].branches[1]",
            "a second time",
        ),
        (
            with(
                "    handler: orders.a",
                "    handler: orders.a\n    branches: [b]\n    retry: {on_exhausted: continue}",
            ),
            8,
            "steps[0].retry.on_exhausted",
            "chooses nothing to continue with",
        ),
        (step("when: input.total > 3"), 10, "steps[1].when", "does not begin with a reference"),
        (step("when: '${input.total} > true'"), 10, "steps[1].when", "has no order"),
        (step("when: '${steps.b.output.x} > 3'"), 10, "steps[1].when", "reads its own output"),
        (step("when: '${steps.c.output.x} > 3'"), 10, "steps[1].when", "`c`, which is not a step"),
        // Maps.
        (step("for_each: items"), 10, "steps[1].for_each", "is not one reference"),
        (step("for_each: 'x ${input.items}'"), 10, "steps[1].for_each", "is not one reference"),
        (step("for_each: '${item}'"), 10, "steps[1].for_each", "before there is one"),
        (step("for_each: '${steps.b.output}'"), 10, "steps[1].for_each", "reads its own output"),
        (step("for_each: '${input.items}'\nmax_parallel: 0"), 11, "steps[1].max_parallel", "from 1 to 1000"),
        (step("for_each: '${input.items}'\nmax_parallel: 1001"), 11, "steps[1].max_parallel", "from 1 to 1000"),
        (step("max_parallel: 2"), 10, "steps[1].max_parallel", "only in a step with `for_each`"),
        (step("on_item_failure: continue"), 10, "steps[1].on_item_failure", "only in a step with `for_each`"),
        (
            step("for_each: '${input.i}'\non_item_failure: stop"),
            11,
            "steps[1].on_item_failure",
            "not one of: fail, continue",
        ),
        (
            step("for_each: '${input.i}'\non_item_failure: {threshold: 100%}"),
            11,
            "steps[1].on_item_failure.threshold",
            "neither a count of items nor a share",
        ),
        (
            step("for_each: '${input.i}'\non_item_failure: {threshold: 0}"),
            11,
            "steps[1].on_item_failure.threshold",
            "0 is not a whole number from 1 to 100000",
        ),
        (step("input: {a: '${item.b}'}"), 10, "steps[1].input.a", "the step has no `for_each`"),
        (step("input: '${item_index.b}'"), 10, "steps[1].input", "reads inside a number"),
        (
            with("steps:", "input_schema: {properties: {i: {type: object}}}\nsteps:")
                .replace("[a]", "[a]\n    for_each: ${input.i}"),
            11,
            "steps[1].for_each",
            "runs over a list, but the input_schema says that this is of type object",
        ),
        (
            with("    handler: orders.a", "    handler: orders.a\n    branches: [b]\n    for_each: ${input.i}"),
            7,
            "steps[0].branches",
            "cannot decide together",
        ),
        (step("when: 3"), 10, "steps[1].when", "is a number, not a text"),
        (
            with("steps:", "input_schema: {properties: {total: {type: string}}}\nsteps:")
                .replace("[a]", "[a]\n    when: ${input.total} > 3"),
            11,
            "steps[1].when",
            "compares with a number, but the input_schema says that this is a string",
        ),
        (step("concurrency: {limit: 0}"), 10, "steps[1].concurrency.limit", "0 would let nothing run, ever; pause"),
        (step("concurrency: {limit: -1}"), 10, "steps[1].concurrency.limit", "-1 is not a whole number from 1"),
        (step("concurrency: {key: '${input.a}'}"), 10, "steps[1].concurrency.limit", "is missing"),
        (
            step("concurrency: {key: '${steps.a.output.b}', limit: 1}"),
            10,
            "steps[1].concurrency.key",
            "a key may read the task's input only",
        ),
        (step("concurrency: {key: '${input.', limit: 1}"), 10, "steps[1].concurrency.key", ""),
        (step("concurrency: {key: '', limit: 1}"), 10, "steps[1].concurrency.key", "is empty"),
        (step("rate: {limit: 0, per: 1s}"), 10, "steps[1].rate.limit", "would let nothing run"),
        (step("rate: {limit: 5}"), 10, "steps[1].rate.per", "is missing"),
        (step("rate: {limit: 5, per: 0s}"), 10, "steps[1].rate.per", "must be more than zero"),
        (root("concurrency: 3"), 4, "concurrency", "is a number, not a mapping"),
        (root("fair_key: [a]"), 4, "fair_key", "is a list, not a text"),
        (step("priority: high"), 10, "steps[1].priority", "is a text, not a whole number"),
        (step("priority: 1.5"), 10, "steps[1].priority", "1.5 is not a whole number from -2147483648"),
        (step("priority: 2147483648"), 10, "steps[1].priority", "to 2147483647"),
        (step("retry: 3"), 10, "steps[1].retry", "is a number, not a mapping"),
        (step("retry:\n  max_attempts: 0"), 11, "steps[1].retry.max_attempts", "0 is not a whole number from 1"),
        (step("retry: {max_attempts: -1}"), 10, "steps[1].retry.max_attempts", "-1 is not"),
        (step("retry: {max_attempts: 1e9}"), 10, "steps[1].retry.max_attempts", "from 1 to 1000000"),
        (step("retry: {initial_interval: 0ms}"), 10, "steps[1].retry.initial_interval", "more than zero"),
        (step("retry: {initial_interval: -1s}"), 10, "steps[1].retry.initial_interval", "`-1s` is not a duration"),
        (step("retry: {initial_interval: 1.5s}"), 10, "steps[1].retry.initial_interval", "write whole numbers"),
        (
            step("retry: {backoff_coefficient: 0.5}"),
            10,
            "steps[1].retry.backoff_coefficient",
            "0.5 is not from 1 to 1000",
        ),
        (step("retry: {backoff_coefficient: x}"), 10, "steps[1].retry.backoff_coefficient", "not a number"),
        (step("retry: {jitter: 1.1}"), 10, "steps[1].retry.jitter", "1.1 is not from 0 to 1"),
        (step("retry: {jitter: -0.1}"), 10, "steps[1].retry.jitter", "-0.1 is not from 0 to 1"),
        (
            step("retry:\n  initial_interval: 10s\n  max_interval: 5s"),
            12,
            "steps[1].retry.max_interval",
            "5s is shorter than initial_interval, 10s",
        ),
        (
            step("retry:\n  initial_interval: 5m"),
            11,
            "steps[1].retry.initial_interval",
            "5m is longer than the default max_interval, 1m; set that too",
        ),
        (step("retry: {non_retryable_errors: CardDeclined}"), 10, "steps[1].retry.non_retryable_errors", "not a list"),
        (
            step("retry: {non_retryable_errors: [ok, ' ']}"),
            10,
            "steps[1].retry.non_retryable_errors[1]",
            "1 to 100 characters",
        ),
        (
            step(&format!("retry: {{non_retryable_errors: [{}]}}", vec!["e"; 101].join(", "))),
            10,
            "steps[1].retry.non_retryable_errors",
            "lists 101 error types",
        ),
        (step("retry: {on_exhausted: ignore}"), 10, "steps[1].retry.on_exhausted", "not one of: fail, block, continue"),
        (step("timeouts: {run: 0s}"), 10, "steps[1].timeouts.run", "more than zero"),
        (step("timeouts: {queue: soon}"), 10, "steps[1].timeouts.queue", "`soon` is not a duration"),
        (step("timeouts: {total: 99999999999999999999d}"), 10, "steps[1].timeouts.total", "longer than"),
        (step("timeouts: {heartbeat: 900ms}"), 10, "steps[1].timeouts.heartbeat", "at least 1s"),
        // The graph.
        (with("name: b", "name: a"), 7, "steps[1].name", "named `a` exists already"),
        (with("[a]", "[aa]"), 9, "steps[1].depends_on[0]", "depends on `aa`, which is not a step; did you mean `a`?"),
        (with("[a]", "[a, b]"), 9, "steps[1].depends_on[1]", "step `b` depends on itself"),
        (with("[a]", "[a, a]"), 9, "steps[1].depends_on[1]", "depends on `a` twice"),
        (
            with("handler: orders.a", "handler: orders.a\n    depends_on: [b]"),
            7,
            "steps[0].depends_on[0]",
            "in a circle: a -> b -> a; remove one",
        ),
        (
            format!("namespace: shop\nname: o\nversion: v1\nsteps: [{}]\n", "0, ".repeat(MAX_STEPS + 1)),
            4,
            "steps",
            "20001 steps are more than the 20000",
        ),
        // References.
        (step("input: {x: '${inptu.a}'}"), 10, "steps[1].input.x", "starts with neither `input` nor `steps`"),
        (step("input:\n  x:\n    - ok\n    - 'a ${input.b'"), 13, "steps[1].input.x[1]", "is not closed"),
        (step("input: {x: '${steps.a.result}'}"), 10, "steps[1].input.x", "other than the step's output"),
        (step("input: {'${input.a}': 1}"), 10, "steps[1].input.${input.a}", "in values only"),
        (
            step("input: '${steps.aa.output}'"),
            10,
            "steps[1].input",
            "reads the output of `aa`, which is not a step; did you mean `a`?",
        ),
        (step("input: '${steps.b.output}'"), 10, "steps[1].input", "reads its own output"),
        (
            with("handler: orders.a", "handler: orders.a\n    input: {x: '${steps.b.output}'}"),
            7,
            "steps[0].input.x",
            "step `a` reads the output of `b` without waiting for it; add `b` to its depends_on",
        ),
    ];
    assert!(cases.len() >= 100);
    for (yaml, line, key, message) in cases {
        let shown: String = yaml.chars().take(400).collect();
        let problems = parse("order.yaml", &yaml).expect_err(&shown);
        let [problem] = &problems[..] else {
            panic!("one problem expected, not:\n{}\nin\n{shown}", told(&problems));
        };
        assert_eq!((problem.line, problem.key.as_str()), (line, key), "{problem}\nin\n{shown}");
        assert!(problem.message.contains(message), "{problem}\nin\n{shown}");
        assert!(problem.column > 0 && problem.file == "order.yaml");
        assert!(problem.message.chars().count() < 400, "{problem}");
    }
}

#[test]
fn problems_read_like_a_compiler_message() {
    let problems = parse("order.yaml", &step("timeouts: {run: 30}")).unwrap_err();
    assert_eq!(
        told(&problems),
        "order.yaml:10:21: steps[1].timeouts.run: `30` has no unit; write 30s for seconds or 30ms"
    );
}

#[test]
fn all_problems_of_a_file_are_told_at_once_in_its_order() {
    let yaml = r"namespace: Shop
name: order
version: 1.0
colour: red
steps:
  - name: a
    handler: x
    retry: {max_attempts: 0, jitter: 2}
    input: ${steps.b.output}
  - name: b
    handlr: x
    depends_on: [c]
";
    let lines: Vec<u64> = parse("f", yaml).unwrap_err().iter().map(|p| p.line).collect();
    assert_eq!(lines, [1, 3, 4, 8, 8, 10, 11, 12], "{}", problems(yaml).join("\n"));
}

#[test]
fn a_flood_of_problems_is_cut_off() {
    let steps: Vec<String> = (0..5000).map(|n| format!("  - {{name: S{n}, handler: x}}\n")).collect();
    let steps = steps.concat();
    assert_eq!(problems(&format!("namespace: a\nname: b\nversion: v\nsteps:\n{steps}")).len(), 100);
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
    assert_eq!(checked.graph.len(), 2000);
    let edges: usize = (0..2000).map(|step| checked.graph.parents(step).len()).sum();
    assert_eq!(edges, 3 * 2000 - 1 - 3 - 40);
    assert_eq!(from_json(to_json(&checked.template)).unwrap(), checked.template);
}

// The document.

fn document() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/templates.md");
    std::fs::read_to_string(path).expect("docs/templates.md is part of the repository")
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
            panic!("docs/templates.md:{line}\n{}", told(&problems));
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
        assert_eq!(told(&problems) + "\n", *expected, "docs/templates.md:{line}");
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
    let mut list = |prefix: &str, keys: &[&str]| {
        known.extend(keys.iter().map(|key| format!("{prefix}{key}")));
    };
    list("", &read::TEMPLATE_KEYS);
    list("timeouts.", &read::TASK_TIMEOUT_KEYS);
    list("trace.", &read::TRACE_KEYS);
    list("steps[].", &read::STEP_KEYS);
    for of in ["", "steps[]."] {
        list(&format!("{of}concurrency."), &read::CONCURRENCY_KEYS);
        list(&format!("{of}rate."), &read::RATE_KEYS);
    }
    list("steps[].wait.", &read::WAIT_KEYS);
    list("steps[].task.", &read::TASK_KEYS);
    list("steps[].retry.", &read::RETRY_KEYS);
    list("steps[].timeouts.", &read::STEP_TIMEOUT_KEYS);
    for parent in ["timeouts", "trace", "steps[].wait", "steps[].task", "steps[].retry", "steps[].timeouts"] {
        known.remove(parent);
    }
    for parent in ["concurrency", "rate", "steps[].concurrency", "steps[].rate"] {
        known.remove(parent);
    }
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
