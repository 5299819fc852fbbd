//! Each rule finds its breach, and a drawing shows where.

use serde_json::{Value, json};

use crate::{Rules, Trace, assert_trace, compare, expect, expected, span};

/// `(id, parent, name, start, end, attributes)`
type Row = (u8, u8, &'static str, u64, u64, Value);

fn document(rows: &[Row]) -> Value {
    let spans: Vec<Value> = rows
        .iter()
        .map(|(id, parent, name, start, end, attributes)| {
            let mut all = json!({"correlation_id": "c", "task_uuid": "t", "namespace": "n"});
            all.as_object_mut().unwrap().extend(attributes.as_object().unwrap().clone());
            let links = all.as_object_mut().unwrap().remove("links").unwrap_or(json!([]));
            let attributes: Vec<Value> = all
                .as_object()
                .unwrap()
                .iter()
                .map(|(key, value)| match value {
                    Value::Number(n) => json!({"key": key, "value": {"intValue": n.to_string()}}),
                    other => json!({"key": key, "value": {"stringValue": other}}),
                })
                .collect();
            let links: Vec<Value> = links
                .as_array()
                .unwrap()
                .iter()
                .map(|to| json!({"traceId": "07".repeat(16), "spanId": format!("{:016x}", to.as_u64().unwrap())}))
                .collect();
            let mut span = json!({
                "traceId": "07".repeat(16), "spanId": format!("{id:016x}"), "name": name, "kind": 1,
                "startTimeUnixNano": (start * 1_000_000).to_string(), "endTimeUnixNano": (end * 1_000_000).to_string(),
                "attributes": attributes, "links": links,
            });
            if *parent > 0 {
                span["parentSpanId"] = format!("{parent:016x}").into();
            }
            span
        })
        .collect();
    json!({"resourceSpans": [{"resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "s"}}]},
                              "scopeSpans": [{"spans": spans}]}]})
}

fn rows() -> Vec<Row> {
    vec![
        (1, 0, "task.orchestration", 0, 100, json!({"generation": 1, "outcome": "success"})),
        (2, 1, "task.state_transition", 0, 5, json!({"event": "Start"})),
        (3, 2, "step.enqueuing", 0, 5, json!({})),
        (
            4,
            1,
            "step.execution",
            5,
            40,
            json!({"step_uuid": "a", "step_name": "a", "handler_name": "demo.a", "attempt_number": 1, "links": [3]}),
        ),
        (5, 4, "handler.execution", 10, 30, json!({})),
        (
            6,
            1,
            "step.execution",
            50,
            90,
            json!({"step_uuid": "a", "step_name": "a", "handler_name": "demo.a", "attempt_number": 2, "links": [3, 4]}),
        ),
        (7, 6, "handler.execution", 60, 80, json!({})),
    ]
}

fn read(rows: &[Row]) -> Trace {
    Trace::from_value(&document(rows)).unwrap()
}

/// A change of the good trace, and what the rules then say.
fn breaches(change: impl FnOnce(&mut Vec<Row>)) -> Vec<String> {
    let mut rows = rows();
    change(&mut rows);
    Rules::new().well_formed().links().breaches(&read(&rows))
}

#[test]
fn a_good_trace_breaks_no_rule() {
    assert_eq!(breaches(|_| {}), [""; 0]);
    let attempt = |n: i64| span("step.execution").with("attempt_number", n);
    Rules::new()
        .before(attempt(1), attempt(2))
        .after(attempt(2), attempt(1))
        .inside(span("handler.execution"), span("task.orchestration"))
        .linked(attempt(2), attempt(1))
        .requires("step.execution", &["step_name"])
        .assert(&read(&rows()));
}

#[test]
fn each_rule_finds_its_breach() {
    let only = |found: Vec<String>, words: &str| assert!(found.len() == 1 && found[0].contains(words), "{found:#?}");
    only(breaches(|rows| rows[4].1 = 99), "an orphan, its parent 0000000000000063 never came: handler.execution");
    only(
        breaches(|rows| rows.push((9, 0, "task.orchestration", 0, 100, json!({"generation": 1})))),
        "2 roots of generation 1",
    );
    only(
        breaches(|rows| rows[4].4 = 41),
        "outside its parent step.execution (begins +5000000 ns from its start, ends +1000000 ns",
    );
    only(breaches(|rows| rows[5].5["attempt_number"] = json!(3)), "the attempts of step a are [1, 3]");
    only(breaches(|rows| rows[3].5["links"] = json!([3, 99])), "links to 0000000000000063, which is not there");
    only(breaches(|rows| rows[3].5["links"] = json!([])), "is not linked to its step.enqueuing");
    only(breaches(|rows| rows[5].5["links"] = json!([3])), "is not linked to the attempt before");
    let twice = breaches(|rows| {
        let again = rows[6].clone();
        rows.push(again);
    });
    only(twice, "is there twice: handler.execution");
    let trace = read(&rows());
    let attempt = |n: i64| span("step.execution").with("attempt_number", n);
    let says = |rules: Rules, words: &str| only(rules.breaches(&trace), words);
    says(Rules::new().before(attempt(2), attempt(1)), "not before step.execution attempt_number=1");
    says(Rules::new().inside(span("step.enqueuing"), attempt(1)), "not inside step.execution attempt_number=1");
    says(Rules::new().linked(attempt(1), attempt(2)), "not linked to step.execution attempt_number=2");
    says(Rules::new().before(span("nothing"), attempt(1)), "there is no nothing");
    says(Rules::new().requires("step.enqueuing", &["ready"]), "without ready: step.enqueuing");
}

#[test]
fn expected_trees_match_whatever_the_order_and_the_vagueness() {
    let trace = read(&rows());
    assert_trace!(trace, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "a"],
            "step.execution" [attempt_number = 1] { "handler.execution" {} },
            "task.state_transition" { "step.enqueuing" },
        }
    });
    assert_trace!(trace, { "task.orchestration" { "step.execution" * 2 [step_name = "a"], .. } });
    assert_trace!(trace, { .. });
    assert!(expect::compare(&trace, &expected! { "task.orchestration" { "step.execution" * 2 } }).is_err());
    assert!(expect::compare(&trace, &expected! { "task.orchestration" { "step.execution" * 3, .. } }).is_err());
    assert!(expect::compare(&trace, &expected! { "task.orchestration" {} }).is_err());
}

#[test]
fn failure_draws_both_trees_and_marks_what_differs() {
    let wanted = expected! {
        "task.orchestration" [outcome = "success"] {
            "task.state_transition" [event = "Start"] { "step.enqueuing" },
            "step.execution" [attempt_number = 1] { "handler.execution", "result.submission" },
            "step.wait" ["wait.reason" = "retry"],
        }
    };
    let difference = expect::compare(&read(&rows()), &wanted).unwrap_err();
    assert_eq!(
        difference,
        "the trace is not as expected (+ not expected, - missing, ~ differs below or in an attribute)
--- arrived
~ task.orchestration outcome=success
    task.state_transition event=Start
      step.enqueuing
~   step.execution attempt_number=1
      handler.execution
+   step.execution attempt_number=2
+     handler.execution
--- expected
~ task.orchestration outcome=success
    task.state_transition event=Start
      step.enqueuing
~   step.execution attempt_number=1
      handler.execution
-     result.submission
-   step.wait wait.reason=retry
"
    );
}

#[test]
fn files_hold_one_document_or_one_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.otlp.json");
    let (first, second) = (document(&rows()[..3]).to_string(), document(&rows()[3..]).to_string());
    std::fs::write(&path, format!("{first}\n{second}\n")).unwrap();
    assert_eq!(Trace::from_file(&path).unwrap(), read(&rows()));
    assert!(Trace::from_json("{\"a\": 1}").unwrap_err().to_string().contains("expected OTLP JSON"));
    assert!(Trace::from_file(folder.path().join("none")).unwrap_err().to_string().contains("cannot be read"));
}

#[test]
fn ids_in_base64_and_tempos_frame_are_read_as_well() {
    let document = json!({"batches": [{"scopeSpans": [{"spans": [
        {"traceId": "BwcHBwcHBwcHBwcHBwcHBw==", "spanId": "AAAAAAAAAAE=", "name": "x", "kind": "SPAN_KIND_SERVER",
         "startTimeUnixNano": "1", "endTimeUnixNano": "2", "status": {"code": "STATUS_CODE_ERROR", "message": "no"}}]}]}]});
    let trace = Trace::from_value(&document).unwrap();
    let read = &trace.spans[0];
    assert_eq!((read.trace_id, read.span_id), ([7; 16], [0, 0, 0, 0, 0, 0, 0, 1]));
    assert_eq!(
        (read.describe(&["kind", "status"]), read.error.as_deref()),
        ("x kind=SERVER status=ERROR".into(), Some("no"))
    );
}

#[test]
fn comparison_tells_missing_extra_orphan_and_misparented_apart() {
    let log = read(&rows());
    assert!(compare(&log, &log).is_none());
    let mut changed = rows();
    changed.remove(3);
    changed[1].1 = 3;
    changed.push((20, 1, "step.wait", 0, 1, json!({})));
    changed.push((21, 7, "the user's own", 61, 62, json!({})));
    let mut there = read(&changed);
    let again = there.spans[0].clone();
    there.spans.push(again);
    let found = compare(&log, &there);
    let counts: Vec<usize> = found.counts().iter().map(|(_, n)| *n).collect();
    // Attempt 1 is missing, so that its handler is an orphan.
    assert_eq!(counts, [1, 1, 1, 1, 0], "{found:#?}");
    assert_eq!(found.duplicates, 1);
    let mut differing = rows();
    differing[4].4 = 31;
    assert_eq!(compare(&log, &read(&differing)).differing.len(), 1);
}

#[cfg(feature = "sdk")]
#[test]
fn spans_of_the_sdk_are_read_as_they_are() {
    use opentelemetry::KeyValue;
    use opentelemetry::trace::{Span as _, Status, Tracer as _, TracerProvider as _};
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};

    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
    let tracer = provider.tracer("test");
    tracer.in_span("outer", |_| {
        let mut inner = tracer.start_with_context("inner", &opentelemetry::Context::current());
        inner.set_attribute(KeyValue::new("n", 3));
        inner.set_status(Status::error("no"));
        inner.end();
    });
    let trace = Trace::from_sdk(&exporter.get_finished_spans().unwrap());
    assert_trace!(trace, { "outer" [kind = "INTERNAL"] { "inner" [n = 3, status = "ERROR"] {} } });
    Rules::new().inside(span("inner"), span("outer")).assert(&trace);
}
