//! What every kind of mistake is told.

use super::*;

/// Every problem as `line key: message`.
fn problems(yaml: &str) -> Vec<String> {
    let problems = parse("order.yaml", yaml).expect_err(yaml);
    problems.iter().map(|p| format!("{} {}: {}", p.line, p.key, p.message)).collect()
}

/// The template, the line, the key and a part of the message.
type Mistake = (String, u64, &'static str, &'static str);

/// [`GOOD`], whose first step waits for this, from line 6 on.
fn waiting(wait: &str) -> String {
    with("handler: orders.a", &format!("wait: {wait}"))
}

/// [`GOOD`], whose first step starts this task, from line 6 on.
fn starting(task: &str) -> String {
    with("handler: orders.a", &format!("task: {task}"))
}

/// Every kind of mistake.
#[expect(clippy::too_many_lines, reason = "a table reads best in one piece")]
pub(super) fn mistakes() -> Vec<Mistake> {
    let long = "a".repeat(41);
    vec![
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
        // Waits and nested tasks.
        (waiting("{}"), 6, "steps[0].wait", "needs exactly one of sleep, until and signal, such as `sleep: 5s`"),
        (waiting("{sleep: 3d, signal: go}"), 6, "steps[0].wait", "needs exactly one of"),
        (waiting("3d"), 6, "steps[0].wait", "is a text, not a mapping with keys such as `sleep:`"),
        (waiting("{sleep: 3}"), 6, "steps[0].wait.sleep", "`3` has no unit"),
        (waiting("{sleep: 3d, timeout: 2d}"), 6, "steps[0].wait.timeout", "belongs to `signal`, not to `sleep`"),
        (waiting("{until: tomorrow}"), 6, "steps[0].wait.until", "neither a reference such as \"${input.at}\""),
        (waiting("{until: 2030-02-31T12:00:00Z}"), 6, "steps[0].wait.until", "is not a time"),
        (waiting("{until: '${inptu.at}'}"), 6, "steps[0].wait.until", "starts with neither"),
        (waiting("{signal: Go}"), 6, "steps[0].wait.signal", "`Go` may hold only"),
        (
            waiting("{signal: go, allowed: []}"),
            6,
            "steps[0].wait.allowed",
            "is an empty list; name at least one answer",
        ),
        (waiting("{signal: go, allowed: ['']}"), 6, "steps[0].wait.allowed[0]", "such as approve"),
        (
            waiting("{signal: go, on_timeout: continue}"),
            6,
            "steps[0].wait.on_timeout",
            "means something only in a wait with `timeout`; add it",
        ),
        (waiting("{sleep: 3d}\n    handler: x"), 7, "steps[0].handler", "either waits or runs a handler"),
        (waiting("{sleep: 3d}\n    retry: {}"), 7, "steps[0].retry", "a wait is not tried again"),
        (waiting("{sleep: 3d}\n    timeouts: {run: 3s}"), 7, "steps[0].timeouts.run", "only timeouts.total applies"),
        (
            waiting("{sleep: 3d}\n    task: {template: pay}"),
            7,
            "steps[0].task",
            "either waits or starts a task; put the task into a step",
        ),
        (starting("{}"), 6, "steps[0].task.template", "is missing"),
        (starting("{template: order}"), 6, "steps[0].task.template", "would nest without end"),
        (starting("{template: pay, await: 'no'}"), 6, "steps[0].task.await", "is a text, not true or false"),
        (starting("{template: pay, version: 2}"), 6, "steps[0].task.version", "put it in quotes"),
        (starting("{template: pay}\n    input: [1]"), 7, "steps[0].input", "must come to an object"),
        (starting("{template: pay}\n    queue: slow"), 7, "steps[0].queue", "is in no queue"),
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
    ]
}

#[test]
fn every_kind_of_mistake_is_told_with_line_and_key() {
    let cases = mistakes();
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
