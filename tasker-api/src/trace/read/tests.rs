use chrono::{DateTime, Utc};
use serde_json::{Map, json};

use super::*;

fn at(ms: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(1_700_000_000_000 + ms).unwrap()
}

fn span(id: &str, parent: Option<&str>, name: &str, from: i64, to: i64) -> Flat {
    Flat {
        trace_id: "aa".into(),
        span_id: id.into(),
        parent_span_id: parent.map(str::to_owned),
        name: name.to_owned().into(),
        service: "s".into(),
        kind: "internal",
        start: at(from),
        end: at(to),
        attributes: Attributes::Backend(Map::new()),
        events: Vec::new(),
        links: Vec::new(),
        error: None,
        of_log: true,
    }
}

fn outline(nodes: &[Node], level: usize, out: &mut Vec<String>) {
    for node in nodes {
        let more = if node.omitted > 0 { format!(" +{}", node.omitted) } else { String::new() };
        out.push(format!("{}{}{more}", "  ".repeat(level), node.span_id));
        outline(&node.children, level + 1, out);
    }
}

fn drawn(view: &TraceView) -> Vec<String> {
    let mut out = Vec::new();
    outline(&view.roots, 0, &mut out);
    out
}

fn sample() -> Vec<Flat> {
    vec![
        span("moved", Some("root"), names::TASK_STATE_TRANSITION, 0, 1),
        span("late", Some("try"), "charge", 30, 40),
        span("root", Some("caller"), names::TASK_ORCHESTRATION, 0, 100),
        span("try", Some("root"), names::STEP_EXECUTION, 20, 50),
    ]
}

#[test]
fn spans_nest_whatever_their_order_and_a_parent_that_is_not_here_makes_a_root() {
    let view = view(sample(), true, &Include::default(), Sources::default(), &Policy::default());
    assert_eq!(drawn(&view), ["root", "  moved", "  try", "    late"]);
    assert_eq!((view.spans, view.shown, view.duration_ms), (4, 4, 100.0));
    assert_eq!(view.roots[0].parent_span_id.as_deref(), Some("caller"));
    assert!((view.roots[0].children[1].offset_ms - 20.0).abs() < 1e-9);
}

#[test]
fn limits_leave_the_first_spans_and_count_the_rest() {
    let limited = |max_spans, depth| {
        let include = Include { max_spans, depth, ..Include::default() };
        drawn(&view(sample(), true, &include, Sources::default(), &Policy::default()))
    };
    assert_eq!(limited(2, 30), ["root +2", "  moved"]);
    assert_eq!(limited(10, 2), ["root +1", "  moved", "  try +1"]);
    let under = Include { under: Some("try".into()), ..Include::default() };
    assert_eq!(drawn(&view(sample(), true, &under, Sources::default(), &Policy::default())), ["try", "  late"]);
    let plain = Include::default().only("attributes, links").unwrap();
    assert_eq!(
        drawn(&view(sample(), true, &plain, Sources::default(), &Policy::default())),
        ["root", "  try", "    late"]
    );
    assert_eq!(Include::default().only("links,prompts").unwrap_err(), "prompts");
}

#[test]
fn times_without_any_span_are_gaps() {
    let view = view(sample(), true, &Include::default(), Sources::default(), &Policy::default());
    let gaps: Vec<_> = view.gaps.iter().map(|gap| (gap.offset_ms, gap.duration_ms)).collect();
    assert_eq!(gaps, [(1.0, 19.0), (50.0, 50.0)]);
}

#[test]
fn the_log_wins_where_a_backend_has_the_same_span_and_cycles_of_a_backend_hurt_nobody() {
    let mut theirs = vec![span("try", Some("root"), "other", 0, 1), span("own", Some("late"), "query", 31, 32)];
    theirs.push(span("a", Some("b"), "cycle", 0, 1));
    theirs.push(span("b", Some("a"), "cycle", 0, 1));
    for span in &mut theirs {
        span.of_log = false;
    }
    let (all, added) = merge(sample(), theirs);
    assert_eq!((all.len(), added), (7, 3));
    let view = view(all, true, &Include::default(), Sources::default(), &Policy::default());
    assert_eq!(drawn(&view), ["root", "  moved", "  try", "    late", "      own"]);
    assert_eq!(view.roots[0].children[1].children[0].children[0].source, "backend");
}

#[test]
fn waits_and_summary_add_up() {
    let mut spans = sample();
    for n in 0..3 {
        let mut wait = span(&format!("w{n}"), Some("root"), names::STEP_WAIT, 50 + n * 10, 55 + n * 10);
        wait.attributes = Attributes::Backend(Map::from_iter([(names::WAIT_REASON.to_owned(), json!("retry"))]));
        spans.push(wait);
    }
    let view = view(spans, true, &Include::default(), Sources::default(), &Policy::default());
    assert_eq!(view.waits, [WaitLine { reason: "retry".into(), count: 3, total_ms: 15.0 }]);
    assert_eq!((view.summary[0].name.as_str(), view.summary[0].count), (names::TASK_ORCHESTRATION, 1));
    assert!(view.summary.iter().any(|line| line.name == names::STEP_WAIT && line.count == 3));
}

#[test]
fn a_span_of_a_backend_belongs_where_the_nearest_above_it_does() {
    let of = |id: &str, parent: Option<&str>, namespace: Option<&str>| {
        let mut span = span(id, parent, "x", 0, 1);
        let named = namespace.map(|namespace| (names::NAMESPACE.to_owned(), json!(namespace)));
        span.attributes = Attributes::Backend(named.into_iter().collect());
        span
    };
    let log = vec![of("root", None, Some("shop")), of("pay", Some("root"), None)];
    let backend = vec![
        of("own", Some("pay"), None),
        of("child", Some("pay"), Some("billing")),
        of("theirs", Some("child"), None),
        of("query", Some("theirs"), None),
        of("nowhere", Some("not exported yet"), None),
        of("around", Some("around"), None),
    ];
    let kept = within_reach(backend, &log, &|namespace| namespace == "shop");
    assert_eq!(kept.iter().map(|span| span.span_id.as_str()).collect::<Vec<_>>(), ["own"]);
}
