//! Traces at the command line.

use serde_json::{Value, json};
use tasker_testing::TestDatabase;
use tasker_tests::receiver::Receiver;

use crate::shop::{Shop, command, run};

#[tokio::test]
async fn a_submitted_trace_context_is_joined() {
    let shop = Shop::new().await;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let mut submit = command(&shop.database.url(), &["task", "submit", "shop/order", "--input", r#"{"order_id": 1}"#]);
    let task = run(submit.env("TRACEPARENT", traceparent)).exits_with(0).stdout;
    assert_eq!(shop.json(&["task", "get", task.trim()])["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
}

/// What was exported is compared, opened and sent again.
pub async fn traces_are_verified_opened_and_replayed(shop: &Shop) {
    let folder = tempfile::tempdir().unwrap();
    let (file, less) = (folder.path().join("all.jsonl"), folder.path().join("less.jsonl"));
    let exported = shop.tasker(&["trace", "export", "--since", "1h"]).exits_with(0).stdout;
    std::fs::write(&file, &exported).unwrap();
    let against = |file: &std::path::Path, more: &[&str]| {
        shop.tasker(&[&["trace", "verify", "--since", "1h", "--against", file.to_str().unwrap()], more].concat())
    };
    let same = against(&file, &[]).exits_with(0).stdout;
    assert!(
        same.contains("2 tasks,") && same.contains("0 missing, 0 extra, 0 orphan, 0 misparented, 0 differing"),
        "{same}"
    );
    // Without the attempts, what hangs below them is an orphan.
    let mut documents: Vec<Value> = exported.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for resource in documents.iter_mut().flat_map(|document| document["resourceSpans"].as_array_mut().unwrap()) {
        let spans = resource["scopeSpans"][0]["spans"].as_array_mut().unwrap();
        spans.retain(|span| span["name"] != "step.execution");
    }
    std::fs::write(
        &less,
        documents.iter().flat_map(|document| [document.to_string(), "\n".into()]).collect::<String>(),
    )
    .unwrap();
    let differs = against(&less, &["-o", "json"]).exits_with(1);
    assert!(differs.stderr.contains("does not hold what the log says"), "{}", differs.stderr);
    let differs = differs.json();
    assert_eq!((&differs["missing"]["count"], &differs["extra"]["count"]), (&json!(4), &json!(0)), "{differs}");
    assert!(differs["orphan"]["count"].as_u64() > Some(4), "{differs}");
    assert!(against(&folder.path().join("none"), &[]).exits_with(1).stderr.contains("none"));

    let open = |more: &[&str]| shop.tasker(&[&["trace", "open", "GOOD", "--print"], more].concat());
    assert!(open(&[]).exits_with(1).stderr.contains("--trace-url"));
    let trace = shop.json(&["task", "get", "GOOD"])["trace_id"].as_str().unwrap().to_owned();
    let link = open(&["--trace-url", "http://traces/{trace_id}?x=1"]).exits_with(0).stdout;
    assert_eq!(link.trim(), format!("http://traces/{trace}?x=1"));
    open(&["--trace-url", "http://traces/"]).exits_with(2);
    shop.tasker(&["trace", "open", "NOBODY", "--print", "--trace-url", "http://t/{trace_id}"]).exits_with(3);

    assert!(shop.tasker(&["trace", "replay", "--task", "GOOD"]).exits_with(1).stderr.contains("tracing is off"));
    let receiver = Receiver::start().await;
    let endpoint = receiver.endpoint();
    let enable = ["trace", "enable", "--exporter", "otlp", "--otlp-endpoint", &endpoint];
    shop.tasker(&[&enable[..], &["--set", "protocol=grpc", "--set", "query_url=http://jaeger:16686"]].concat())
        .exits_with(0);
    assert_eq!(open(&[]).exits_with(0).stdout.trim(), format!("http://jaeger:16686/trace/{trace}"));
    let replayed = shop.tasker(&["trace", "replay", "--task", "GOOD"]).exits_with(0).stdout;
    assert!(replayed.contains("of 1 tasks were sent and acknowledged"), "{replayed}");
    let own = exported.matches(&format!("\"traceId\":\"{trace}\"")).count();
    assert!(receiver.spans().len() > 10 && own >= receiver.spans().len(), "{own}");
    shop.tasker(&["trace", "disable"]).exits_with(0);
}

/// The drawing and the OTLP JSON of the task GOOD, which was tried twice.
pub fn both_views_show_the_same_spans(shop: &Shop, trace_id: &Value) {
    let drawn = shop.tasker(&["trace", "show", "GOOD", "--tree"]).exits_with(0).stdout;
    for part in [
        "task.orchestration order 1",
        "step.execution try attempt 1/3",
        "✗ FailedOnPurpose",
        "step.wait retry of try",
        "handler.execution echo",
    ] {
        assert!(drawn.contains(part), "{part} is missing:\n{drawn}");
    }
    let otlp = shop.json(&["trace", "show", "GOOD"]);
    let spans: Vec<&Value> = otlp["resourceSpans"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|r| r["scopeSpans"][0]["spans"].as_array().unwrap())
        .collect();
    let roots = spans.iter().filter(|span| span.get("parentSpanId").is_none()).count();
    assert_eq!((roots, spans.iter().all(|span| span["traceId"] == *trace_id)), (1, true));
    assert_eq!(
        drawn
            .lines()
            .filter(|line| line.contains("task.")
                || line.contains("step.")
                || line.contains("handler.")
                || line.contains("result."))
            .count(),
        spans.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_sends_every_span_to_the_collector() {
    let database = TestDatabase::empty().await;
    let receiver = Receiver::start().await;
    let mut demo = command(&database.url(), &["demo", "-o", "json"]);
    demo.env("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint());
    let demo = tokio::task::spawn_blocking(move || run(&mut demo)).await.unwrap().exits_with(0).json();
    assert_eq!(receiver.violations(), [""; 0]);
    let spans = receiver.spans();
    let in_tree: u64 = demo["orders"].as_array().unwrap().iter().map(|order| order["spans"].as_u64().unwrap()).sum();
    assert_eq!(demo["exported_spans"], in_tree);
    let named = |name: &str| spans.iter().filter(|span| span.span.name == name).count();
    assert_eq!(named("task.orchestration"), 24);
    // The user's own spans: one below each attempt to charge, one above each order from SQL.
    assert_eq!((named("gateway.charge"), named("POST /checkout")), (48, 4));
    let ids: std::collections::HashSet<&Vec<u8>> = spans.iter().map(|span| &span.span.span_id).collect();
    let orphans: Vec<&str> = spans
        .iter()
        .filter(|span| !span.span.parent_span_id.is_empty() && !ids.contains(&span.span.parent_span_id))
        .map(|span| span.span.name.as_str())
        .collect();
    assert_eq!(orphans, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn trace_settings_are_stored_shown_refused_and_checked() {
    let shop = Shop::new().await;
    let mut receiver = Receiver::start().await;
    let endpoint = receiver.endpoint();
    let status = shop.json(&["trace", "status"]);
    assert_eq!((&status["stored"], &status["here"]["enabled"]), (&json!([]), &json!(false)));
    assert!(shop.tasker(&["trace", "doctor"]).exits_with(1).stdout.contains("tracing is off"));

    for (flags, words) in [
        (vec!["--otlp-endpoint", "ftp://c"], "--otlp-endpoint: only http:// and https:// are supported"),
        (vec!["--sample-rate", "half"], "--sample-rate=half: it must be a number from 0 to 1"),
        (vec!["--areas", "walls"], "--areas=walls: it must be any of db, http, messaging"),
        (vec!["--set", "headers=authorization=x"], "--set headers: there is no such setting, or it cannot be stored"),
    ] {
        let refused = shop.tasker(&[&["trace", "enable"], flags.as_slice()].concat()).exits_with(1);
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    assert_eq!(shop.json(&["trace", "status"])["stored"], json!([]), "nothing of it was stored");

    let enable = ["trace", "enable", "--exporter", "otlp", "--otlp-endpoint", &endpoint, "--set", "protocol=grpc"];
    let answer = shop.tasker(&[&enable[..], &["--sample-rate", "7", "--service-name", "shop"]].concat()).exits_with(0);
    assert!(answer.stderr.contains("--sample-rate=7 is used as 1: it must be from 0 to 1"), "{}", answer.stderr);
    let status = shop.json(&["trace", "status"]);
    assert_eq!(status["here"]["to"], json!(endpoint));
    assert_eq!(status["here"]["from"]["endpoint"], json!({"source": "database", "as": "endpoint in the database"}));
    assert_eq!(status["shares"], json!([{"namespace": "*", "share": 1.0}]));
    let mut secretive = command(&shop.database.url(), &["trace", "status"]);
    let shown = run(secretive
        .env("TASKER_TRACING_ENDPOINT", "http://me:hunter2@c:4318")
        .env("TASKER_TRACING_HEADERS", "a=hunter2"));
    let shown = shown.exits_with(0).stdout;
    assert!(
        shown.contains("otlp to http://c:4318") && !shown.contains("hunter2"),
        "the environment comes first: {shown}"
    );

    let seen = receiver.requests();
    assert!(shop.tasker(&["trace", "doctor"]).exits_with(0).stdout.contains("acknowledged in"));
    assert_eq!(receiver.requests(), seen + 1);
    assert_eq!(receiver.spans()[0].span.name, "tasker.trace.doctor");
    receiver.down().await;
    let down = shop.tasker(&["trace", "doctor"]).exits_with(1);
    assert!(down.stdout.contains("is the collector running"), "{}", down.stdout);

    shop.tasker(&["trace", "disable"]).exits_with(0);
    assert_eq!(shop.json(&["trace", "status"])["here"]["enabled"], json!(false));
    shop.tasker(&["trace", "enable"]).exits_with(0);
    assert_eq!(shop.json(&["trace", "status"])["here"]["to"], json!(endpoint), "where was not forgotten");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_receiver_refused_is_shown_and_given_back() {
    let mut shop = Shop::new().await;
    assert_eq!(shop.json(&["trace", "status"])["set_aside"]["batches"], json!(0));
    for n in 1..3 {
        let row = format!(
            "insert into tasker.refused_exports (batch_id, task_uuids, at, refused_at, spans, reason)
             values (gen_random_uuid(), '{{}}', clock_timestamp(), clock_timestamp() + interval '{n} s', {n}, '400 reason {n}')"
        );
        shop.sql(&row).await;
    }
    let aside = &shop.json(&["trace", "status"])["set_aside"];
    assert_eq!((&aside["batches"], &aside["spans"]), (&json!(2), &json!(3)), "{aside}");
    assert_eq!(aside["newest_reason"], json!("400 reason 2"));
    let shown = shop.tasker(&["trace", "status"]).exits_with(0).stdout;
    assert!(shown.contains("set aside: 3 spans of 2 transactions"), "{shown}");
    assert!(shown.contains("the last because: 400 reason 2"), "{shown}");
    assert!(shop.tasker(&["trace", "doctor"]).exits_with(1).stdout.contains("BAD  spans that were refused"));
    shop.tasker(&["trace", "replay", "--refused", "--since", "1h"]).exits_with(2);
    let given = shop.tasker(&["trace", "replay", "--refused"]).exits_with(0).stdout;
    assert!(given.starts_with("2 transactions were given back"), "{given}");
    assert_eq!(shop.json(&["trace", "status"])["set_aside"]["batches"], json!(0));
    assert!(shop.tasker(&["trace", "doctor"]).exits_with(1).stdout.contains("2 batches"));
}
