//! The numbers of a process: what they count, what their labels may say, and that the dashboard
//! and the alert rules name no other.

#![expect(clippy::float_cmp, reason = "counts are whole numbers")]

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};
use tasker_api::gauges::Scrape;
use tasker_shared::metrics::{CONTENT_TYPE, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Setup, World, eventually};

/// The samples of a scrape: name, labels as they stand, value, exemplar.
fn samples(text: &str) -> impl Iterator<Item = (&str, &str, f64, Option<&str>)> {
    text.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let (sample, exemplar) = line.split_once(" # ").map_or((line, None), |(sample, rest)| (sample, Some(rest)));
        let (name, value) = sample.rsplit_once(' ').expect("a value");
        let (name, labels) = name.split_once('{').unwrap_or((name, ""));
        (name, labels.trim_end_matches('}'), value.parse().expect("a number"), exemplar)
    })
}

/// The sum of the samples of that name whose labels hold all of these.
fn sum(text: &str, name: &str, labels: &[&str]) -> f64 {
    let matching = samples(text).filter(|(n, l, ..)| *n == name && labels.iter().all(|label| l.contains(label)));
    matching.map(|(_, _, value, _)| value).sum()
}

/// Everything that begins with `tasker_` in our files for Grafana and Prometheus.
fn named_in_documents() -> BTreeSet<String> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("docs");
    let mut names = BTreeSet::new();
    let mut expressions = Vec::new();
    let dashboard = std::fs::read_to_string(docs.join("grafana/tasker.json")).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&dashboard).expect("JSON");
    for panel in dashboard["panels"].as_array().expect("panels") {
        for target in panel["targets"].as_array().into_iter().flatten() {
            expressions.push(target["expr"].as_str().expect("an expression").to_owned());
        }
    }
    expressions.push(std::fs::read_to_string(docs.join("alerts/tasker.yaml")).expect("the rules"));
    for text in expressions {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        names.extend(words.filter(|word| word.starts_with("tasker_")).map(str::to_owned));
    }
    assert!(names.len() > 30, "{names:?}");
    names
}

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("text");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrape_counts_what_happened_and_the_dashboard_and_the_alerts_name_nothing_else() {
    let world = World::start(Setup { workers: 0, rust_workers: 1, ..Setup::default() }).await;
    world.register_steps("counted_good", "a: ok\nb: flaky <- a").await;
    world.register_steps("counted_bad", "a: broken").await;
    let correlation = "order-4711-secret-customer";
    let good =
        world.submit_with(json!({"template": "counted_good", "correlation_id": correlation})).await.expect("yes");
    let bad = world.submit("counted_bad").await;
    assert_eq!(world.finish(&[good, bad]).await, ["complete", "error"]);
    world.send("task_requests", &json!({"v": 99}), None).await;
    eventually("the message is in quarantine", async || {
        (world.number("select count(*) from tasker.quarantine").await == 1).then_some(())
    })
    .await;

    sqlx::query("insert into tasker.counters (name, n) values ('invalid_traceparent', 2)")
        .execute(&world.pool)
        .await
        .expect("counted");
    let serving =
        serve("127.0.0.1:0".parse().expect("an address"), Scrape::new(Some(world.pool.clone())).served()).await;
    let serving = serving.expect("a listener");
    let text = eventually("the attempts are counted", async || {
        let answer = get(serving.address, "/metrics").await;
        let (head, text) = answer.split_once("\r\n\r\n").expect("a body");
        (sum(text, "tasker_tasks_ended_total", &["counted_"]) == 2.0).then(|| (head.to_owned(), text.to_owned()))
    })
    .await;
    let (head, text) = (&*text.0, &*text.1);
    assert!(head.starts_with("HTTP/1.1 200") && head.contains(CONTENT_TYPE), "{head}");
    assert!(text.ends_with("# EOF\n"));
    assert!(get(serving.address, "/").await.starts_with("HTTP/1.1 404"));

    let count = |name: &str, labels: &[&str]| sum(text, name, labels);
    assert_eq!(count("tasker_tasks_started_total", &["template=\"counted_good\""]), 1.0);
    assert_eq!(count("tasker_tasks_ended_total", &["template=\"counted_good\"", "outcome=\"completed\""]), 1.0);
    assert_eq!(count("tasker_tasks_ended_total", &["template=\"counted_bad\"", "outcome=\"failed\""]), 1.0);
    assert_eq!(count("tasker_task_duration_seconds_count", &["template=\"counted_good\""]), 1.0);
    // Other tests of this process count as well.
    for (outcome, least) in [("success", 2.0), ("error", 1.0), ("failure", 1.0)] {
        let outcome = format!("outcome=\"{outcome}\"");
        assert!(count("tasker_attempts_total", &["namespace=\"tests\"", &outcome]) >= least, "{outcome}\n{text}");
        assert!(count("tasker_worker_attempts_total", &["namespace=\"tests\"", &outcome]) >= least, "{outcome}");
    }
    assert!(count("tasker_span_errors_total", &["span_name=\"inside\"", "handler=\"broken\""]) >= 1.0);
    assert!(count("tasker_worker_claims_total", &[]) >= 4.0);
    assert!(count("tasker_worker_reports_total", &["result=\"accepted\""]) >= 4.0);
    assert!(count("tasker_worker_slots", &["namespace=\"tests\""]) >= 8.0);
    assert!(count("tasker_step_queue_wait_seconds_count", &[]) >= 4.0);
    assert!(count("tasker_settle_batch_size_sum", &["source=\"step_results\""]) >= 4.0);
    assert!(count("tasker_otlp_spans_exported_total", &[]) > 0.0);
    assert_eq!(count("tasker_quarantined_messages", &["queue=\"task_requests\""]), 1.0);
    assert_eq!(count("tasker_workers_slots", &["namespace=\"tests\""]), 8.0);
    assert_eq!(count("tasker_database_up", &[]), 1.0);
    assert_eq!(count("tasker_counted", &["what=\"invalid_traceparent\""]), 2.0);
    assert!(count("tasker_oldest_row_age_seconds", &["what=\"tasks\""]) > 0.0);

    // A slow bucket leads to its trace.
    let trace_id: String = sqlx::query_scalar("select encode(trace_id, 'hex') from tasker.tasks where task_uuid = $1")
        .bind(good)
        .fetch_one(&world.pool)
        .await
        .expect("a task");
    let exemplar = samples(text).find_map(|(name, labels, _, exemplar)| {
        exemplar.filter(|_| name == "tasker_task_duration_seconds_bucket" && labels.contains("counted_good"))
    });
    assert!(exemplar.expect("an exemplar").contains(&format!("trace_id=\"{trace_id}\"")));

    // Labels are names and words, never ids.
    assert!(!text.contains(correlation) && !text.contains(&good.to_string()));
    let known = [
        "call",
        "handler",
        "le",
        "namespace",
        "outcome",
        "queue",
        "reason",
        "result",
        "source",
        "span_name",
        "state",
        "template",
        "version",
        "what",
    ];
    for (name, labels, ..) in samples(text) {
        for label in labels.split(',').filter(|label| !label.is_empty()) {
            let label = label.split_once('=').expect("name=value").0;
            assert!(known.contains(&label), "{name} has the label {label}");
        }
    }

    let scraped: BTreeSet<&str> = samples(text).map(|(name, ..)| name).collect();
    let missing: Vec<String> =
        named_in_documents().into_iter().filter(|name| !scraped.contains(name.as_str())).collect();
    assert_eq!(missing, [""; 0], "named in docs/grafana or docs/alerts, but no scrape has it");
    drop(serving);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_costs_its_own_numbers_only() {
    let pool = sqlx::postgres::PgPoolOptions::new()
        .acquire_timeout(std::time::Duration::from_millis(200))
        .connect_lazy("postgresql://nobody@127.0.0.1:1/nothing")
        .expect("a pool");
    let text = Scrape::new(Some(pool)).text().await;
    assert_eq!(sum(&text, "tasker_database_up", &[]), 0.0);
    assert!(text.contains("tasker_worker_results_waiting "), "{text}");
    assert!(!text.contains("tasker_queue_messages{"), "what is not known is not said");
}
