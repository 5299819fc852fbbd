use proptest::prelude::*;
use serde_json::json;

use super::*;

fn task_input() -> Value {
    json!({"total": 4200, "name": "Ada", "gift": true, "note": null, "rate": 0.5,
           "items": [{"sku": "A-1"}, {"sku": "B-2"}], "größe": "L"})
}

fn reserve() -> Value {
    json!({"hold_id": "h-7", "lines": [1, 2]})
}

fn resolve(template: &Value) -> Result<Value, MissingPath> {
    let (input, reserve) = (task_input(), reserve());
    let outputs = |step: &str| (step == "reserve").then_some(&reserve);
    InputTemplate::parse(template).unwrap().resolve(&input, &outputs)
}

#[test]
fn whole_references_keep_their_type_and_inner_ones_become_text() {
    let cases = [
        (json!("${input.total}"), json!(4200)),
        (json!("${input.gift}"), json!(true)),
        (json!("${input.note}"), json!(null)),
        (json!("${input.items}"), json!([{"sku": "A-1"}, {"sku": "B-2"}])),
        (json!("${input.items[1].sku}"), json!("B-2")),
        (json!("${input.größe}"), json!("L")),
        (json!("${input}"), task_input()),
        (json!("${steps.reserve.output}"), reserve()),
        (json!("${steps.reserve.output.lines[0]}"), json!(1)),
        (json!(" ${input.total}"), json!(" 4200")),
        (json!("${input.name}: ${input.total} at ${input.rate}, ${input.gift}"), json!("Ada: 4200 at 0.5, true")),
        (json!("${input.name}${steps.reserve.output.hold_id}"), json!("Adah-7")),
        (json!("$${input.total}"), json!("${input.total}")),
        (json!("$$${input.total}"), json!("$${input.total}")),
        (json!("costs $5 and $${x} and ${input.total}$"), json!("costs $5 and ${x} and 4200$")),
        (json!("$"), json!("$")),
        (json!("}"), json!("}")),
        (
            json!({"a": [1, "${input.total}", {"b": "x"}], "c": {"d": []}}),
            json!({"a": [1, 4200, {"b": "x"}], "c": {"d": []}}),
        ),
    ];
    for (template, expected) in cases {
        assert_eq!(resolve(&template), Ok(expected), "{template}");
    }
}

#[test]
fn every_missing_path_says_what_was_found() {
    let cases = [
        ("${input.nope}", "input has no key `nope`"),
        ("${input.items[2]}", "input.items has only 2 items"),
        ("${input.items[0].price}", "input.items[0] has no key `price`"),
        ("${input.items.sku}", "input.items is a list, not an object"),
        ("${input.name[0]}", "input.name is a string, not a list"),
        ("${input.total.cents}", "input.total is a number, not an object"),
        ("${input.gift.a}", "input.gift is a boolean, not an object"),
        ("${input.note.a}", "input.note is null, not an object"),
        ("${input[0]}", "input is an object, not a list"),
        ("${steps.reserve.output.nope.x}", "steps.reserve.output has no key `nope`"),
        ("${steps.skipped.output.x}", "step skipped has no output"),
        (
            "hold ${steps.reserve.output}",
            "steps.reserve.output is an object, not a string, number or boolean that fits \
                 inside a text",
        ),
        ("${input.note}!", "input.note is null, not a string, number or boolean that fits inside a text"),
    ];
    for (template, expected) in cases {
        let error = resolve(&json!({"a": [template]})).unwrap_err();
        assert_eq!(error.at, [Segment::Key("a".into()), Segment::Index(0)]);
        let reference = &error.reference;
        let expected = format!("input.a[0] reads ${{{reference}}}, but {expected}");
        assert_eq!(error.to_string(), expected);
        assert!(template.contains(reference.as_str()));
    }
}

#[test]
fn unreadable_references_are_all_reported_with_their_place() {
    let input = json!({"b": ["${inptu.x}", "ok", "${input.x"], "k${input.x}": 1});
    let errors = InputTemplate::parse(&input).unwrap_err();
    let shown: Vec<String> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            "input.b[0]: ${inptu.x} starts with neither `input` nor `steps`; write \
                 ${input.key} or ${steps.name.output.key}, with [0] for a list item",
            "input.b[2]: `${` is not closed; add `}`, or write `$${` for a literal `${`",
            "input.k${input.x}: references are read in values only; use a plain key",
        ]
    );
}

#[test]
fn malformed_references_are_refused() {
    for text in [
        "",
        " ",
        "input.",
        ".input",
        "input..a",
        "input .a",
        "input.a b",
        "input[",
        "input[]",
        "input[x]",
        "input[-1]",
        "input[+1]",
        "input[1]a",
        "input.[0]",
        "input]",
        "Input",
        "input[99999999999999999999999]",
        "steps",
        "steps.a",
        "steps.a.input",
        "steps.a.outputs",
        "steps.a[0].output",
        "steps[0].output",
        "input.$a",
        "input.\"a\"",
        "steps..output",
        "env.HOME",
        "input.{a",
    ] {
        let input = json!(format!("${{{text}}}"));
        assert!(InputTemplate::parse(&input).is_err(), "{text:?}");
    }
}

#[test]
fn references_name_each_step_once() {
    let input = json!(["${steps.b.output}", "${steps.a.output.x} ${steps.b.output.y}", "${input}"]);
    let template = InputTemplate::parse(&input).unwrap();
    assert_eq!(template.references().collect::<Vec<_>>(), ["a", "b"]);
    let mut visited = Vec::new();
    template.visit_steps(|at, step| visited.push(format!("{step}{}", Path(at))));
    assert_eq!(visited, ["b[0]", "a[1]", "b[1]"]);
}

#[test]
fn small_template_cannot_multiply_a_payload_without_bound() {
    let input = json!({"big": "x".repeat(1024 * 1024)});
    let template = InputTemplate::parse(&json!(vec!["${input.big}"; 1000])).unwrap();
    let error = template.resolve(&input, &|_| None).unwrap_err();
    assert_eq!(error.found, Found::TooLarge);
    assert!(error.to_string().len() < 200);
}

#[test]
fn resolved_input_nests_no_deeper_than_the_limit() {
    let nested = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!([inner]));
    let template = InputTemplate::parse(&json!({"a": {"b": "${input}"}})).unwrap();
    let resolved = template.resolve(&nested(MAX_INPUT_DEPTH - 2), &|_| None).unwrap();
    assert_eq!(depth(&resolved, 1000), MAX_INPUT_DEPTH);
    let error = template.resolve(&nested(MAX_INPUT_DEPTH - 1), &|_| None).unwrap_err();
    assert_eq!(error.found, Found::TooDeep);
}

#[test]
fn depth_counts_objects_and_lists_and_stops_after_the_limit() {
    assert_eq!(depth(&json!(1), 9), 0);
    assert_eq!(depth(&json!({}), 9), 1);
    assert_eq!(depth(&json!([1, {"a": [2]}]), 9), 3);
    assert_eq!(depth(&json!([[[[[[]]]]]]), 3), 4);
}

#[test]
fn default_input_holds_the_task_input_and_the_parents() {
    let (input, reserve) = (task_input(), reserve());
    let parents = [("reserve", &reserve)];
    assert_eq!(default_input(&input, parents.into_iter()), Ok(json!({"input": input, "steps": {"reserve": reserve}})));
}

#[test]
fn default_input_nests_no_deeper_and_grows_no_larger_than_the_limits() {
    let nested = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!([inner]));
    let (flat, deep, deeper) = (json!({}), nested(MAX_INPUT_DEPTH - 2), nested(MAX_INPUT_DEPTH - 1));
    let with = |input: &Value, parent: &Value| default_input(input, [("reserve", parent)].into_iter());
    assert_eq!(with(&flat, &deep).map(|input| depth(&input, 1000)), Ok(MAX_INPUT_DEPTH));
    assert!(with(&deeper, &flat).is_ok());
    let error = with(&flat, &deeper).unwrap_err();
    assert!(error.starts_with("with the output of reserve the input would nest deeper than 96 levels;"), "{error}");
    assert!(with(&nested(MAX_INPUT_DEPTH), &flat).unwrap_err().starts_with("with the task's input"));
    let big = json!("x".repeat(MAX_RESOLVED_BYTES / 2));
    assert!(with(&big, &big).unwrap_err().contains("would exceed 16777216 bytes"));
}

#[test]
fn large_values_are_named_where_they_are_read_whole_and_nowhere_else() {
    let big = json!("x".repeat(MAX_INLINE_BYTES + 1));
    let input = json!({"small": 1, "big": big});
    let output = json!({"lines": [1, big], "id": "h-7"});
    let outputs = |_: &str| Some(&output);
    let stored = |template: Value| {
        let template = InputTemplate::parse(&template).unwrap();
        stored_input(Some(&template), template.resolve(&input, &outputs).unwrap())
    };
    let small = json!({"a": "${input.small}", "b": "${steps.s.output.id}"});
    assert_eq!(stored(small), json!({"a": 1, "b": "h-7"}));
    assert_eq!(
        stored(json!({"a": ["${input.small}", "${steps.s.output.lines[1]}"], "b": "${input}"})),
        json!({BY_REFERENCE: [
            {"at": ["a", "1"], "step": "s", "path": ["lines", "1"]},
            {"at": ["b"], "step": null, "path": []},
        ], "input": {"a": [1, null], "b": null}})
    );
    assert_eq!(
        stored(json!("${steps.s.output}")),
        json!({BY_REFERENCE: [{"at": [], "step": "s", "path": []}], "input": null})
    );
    // Inside a longer text it is a text of its own.
    assert_eq!(stored(json!({"a": "no ${input.big}"})), json!({"a": format!("no {}", big.as_str().unwrap())}));
    assert_eq!(
        stored_input(None, default_input(&input, [("s", &output), ("t", &json!(2))].into_iter()).unwrap()),
        json!({BY_REFERENCE: [
            {"at": ["input"], "step": null, "path": []},
            {"at": ["steps", "s"], "step": "s", "path": []},
        ], "input": {"input": null, "steps": {"s": null, "t": 2}}})
    );
}

#[test]
fn an_input_with_our_own_key_is_never_misread() {
    let strange = json!({BY_REFERENCE: [{"at": [], "step": "s", "path": []}]});
    assert_eq!(stored_input(None, strange.clone()), json!({BY_REFERENCE: [], "input": strange}));
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::btree_map("[a-z_-]{1,6}", inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Every path into a value, with the value it leads to.
fn paths(value: &Value, path: String, to: &mut Vec<(String, Value)>) {
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                paths(item, format!("{path}[{index}]"), to);
            }
        }
        Value::Object(map) => {
            for (key, item) in map {
                paths(item, format!("{path}.{key}"), to);
            }
        }
        _ => {}
    }
    to.push((path, value.clone()));
}

fn escaped(value: &Value) -> Value {
    match value {
        Value::String(text) => text.replace("${", "$${").into(),
        Value::Array(items) => items.iter().map(escaped).collect(),
        Value::Object(map) => Value::Object(map.iter().map(|(k, v)| (k.clone(), escaped(v))).collect()),
        plain => plain.clone(),
    }
}

proptest! {
    #[test]
    fn every_path_reads_exactly_the_value_it_names(value in json_value()) {
        let mut all = Vec::new();
        paths(&value, String::new(), &mut all);
        for (path, expected) in all {
            let template = json!({
                "from_input": format!("${{input{path}}}"),
                "from_step": [format!("${{steps.s.output{path}}}")],
            });
            let template = InputTemplate::parse(&template).unwrap();
            let resolved = template.resolve(&value, &|_| Some(&value)).unwrap();
            prop_assert_eq!(resolved, json!({"from_input": expected, "from_step": [expected]}));
        }
    }

    #[test]
    fn escaped_values_come_out_as_they_were(value in json_value()) {
        let template = InputTemplate::parse(&escaped(&value)).unwrap();
        prop_assert_eq!(template.references().count(), 0);
        prop_assert_eq!(template.resolve(&Value::Null, &|_| None).unwrap(), value);
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in "[$\\{\\}a-z\\.\\[\\]0-9 ]{0,40}") {
        if let Ok(template) = InputTemplate::parse(&Value::String(text)) {
            let _ = template.resolve(&json!({}), &|_| None);
        }
    }
}
