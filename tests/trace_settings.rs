//! Where traces go is changed while everything runs, survives a restart, and never harms work.

use std::collections::BTreeMap;

use serde_json::Value;
use tasker_orchestration::{Options, Orchestrator};
use tasker_shared::store::trace_settings;
use tasker_shared::trace::config::{Sources, TraceConfig};

use crate::harness::{DEADLINE, Setup, World, eventually};

async fn set(world: &World, scope: &str, values: &[(&'static str, Option<&str>)]) {
    let values: BTreeMap<&str, Option<String>> =
        values.iter().map(|(key, value)| (*key, value.map(str::to_owned))).collect();
    trace_settings::set(&mut world.pool.acquire().await.unwrap(), scope, &values).await.expect("set");
}

/// An orchestrator that follows what is stored, as one started by the command line does.
async fn follower(world: &World) -> Orchestrator {
    let options = Options { trace: TraceConfig::default(), settings: Some(Sources::default()), ..Options::default() };
    Orchestrator::start(&world.url, &options).await.expect("an orchestrator")
}

/// Waits until the one process that runs says so of itself.
async fn until_it_says(world: &World, what: &str, is: impl Fn(&Value) -> bool) {
    eventually(what, async || {
        let mut conn = world.pool.acquire().await.unwrap();
        let processes = trace_settings::processes(&mut conn).await.unwrap();
        (processes.len() == 1 && is(&processes[0].state)).then_some(())
    })
    .await;
}

async fn run_one(world: &World) -> uuid::Uuid {
    let task = world.submit("one").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    task
}

#[tokio::test(flavor = "multi_thread")]
async fn tracing_is_switched_on_moved_and_off_without_a_restart_and_stays_so_after_one() {
    let world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let running = follower(&world).await;
    until_it_says(&world, "it is off", |state| state["enabled"] == false).await;
    run_one(&world).await;
    assert_eq!(world.number("select count(*) from tasker.export_batches").await, 0, "off costs no row");

    let endpoint = world.receiver.endpoint();
    set(&world, "*", &[("enabled", Some("true")), ("endpoint", Some(&endpoint)), ("protocol", Some("grpc"))]).await;
    until_it_says(&world, "it is on", |state| {
        state["enabled"] == true && state["from"]["endpoint"]["source"] == "database"
    })
    .await;
    let traced = run_one(&world).await;
    world.receiver.wait_for(|spans| spans.iter().any(|span| span.span.name == "task.orchestration")).await;
    assert!(!world.spans_of(traced).is_empty());

    set(&world, "*", &[("enabled", Some("false"))]).await;
    until_it_says(&world, "it is off again", |state| state["enabled"] == false).await;
    let untraced = run_one(&world).await;
    assert_eq!(world.number("select count(*) from tasker.export_batches").await, 0);
    running.shutdown(DEADLINE).await;

    let again = follower(&world).await;
    until_it_says(&world, "off survives a restart", |state| state["enabled"] == false).await;
    again.shutdown(DEADLINE).await;
    set(&world, "*", &[("enabled", Some("true"))]).await;
    let again = follower(&world).await;
    until_it_says(&world, "on too", |state| state["enabled"] == true).await;
    run_one(&world).await;
    assert!(again.flush(DEADLINE).await);
    assert!(world.spans_of(untraced).is_empty());
    let audit = world.words("select action from tasker.audit order by audit_id").await;
    assert_eq!(audit, ["set_trace_settings"; 3]);
    again.shutdown(DEADLINE).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_that_wait_for_a_receiver_that_is_not_there_go_to_the_one_that_is_named_later() {
    let mut world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let endpoint = world.receiver.endpoint();
    world.receiver.down().await;
    set(&world, "*", &[("enabled", Some("true")), ("endpoint", Some(&endpoint)), ("protocol", Some("grpc"))]).await;
    let running = follower(&world).await;
    // Nothing was sent yet, and it is known all the same; and work goes on.
    until_it_says(&world, "the receiver is down", |state| state["health"]["receiver"] == "down").await;
    let task = run_one(&world).await;
    assert!(world.number("select count(*) from tasker.export_batches").await > 0);

    let other = tasker_tests::receiver::Receiver::start().await;
    set(&world, "*", &[("endpoint", Some(&other.endpoint()))]).await;
    assert!(running.flush(DEADLINE).await, "what waits goes to the new one");
    let of_task = |span: &tasker_tests::receiver::Received| span.text("task_uuid") == Some(&task.to_string());
    assert!(other.spans().iter().any(|span| of_task(span) && span.span.name == "task.orchestration"));
    until_it_says(&world, "it answers", |state| state["health"]["receiver"] == "up").await;
    running.shutdown(DEADLINE).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_cannot_be_used_leave_everything_as_it_was() {
    let world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    let endpoint = world.receiver.endpoint();
    set(&world, "*", &[("enabled", Some("true")), ("endpoint", Some(&endpoint))]).await;
    let running = follower(&world).await;
    until_it_says(&world, "it is on", |state| state["enabled"] == true).await;
    // Not by our command line, which refuses it, but by somebody's SQL.
    set(&world, "*", &[("endpoint", Some("ftp://nowhere"))]).await;
    until_it_says(&world, "it says why", |state| {
        state["problem"].as_str().is_some_and(|problem| problem.starts_with("endpoint in the database: only http"))
            && state["to"].as_str().is_some_and(|to| to.starts_with(&endpoint))
    })
    .await;
    for (scope, values) in [
        ("*", r#"{"headers": "authorization=secret"}"#),
        ("*", r#"{"endpoint": "http://user:secret@host:4318"}"#),
        ("orders", r#"{"endpoint": "http://host:4318"}"#),
        ("No Scope", r#"{"detail": "full"}"#),
        ("*", "[]"),
    ] {
        let refused = sqlx::query("select tasker.set_trace_settings($1::jsonb, $2)").bind(values).bind(scope);
        let error = refused.execute(&world.pool).await.expect_err(values).to_string();
        assert!(!error.contains("secret"), "{error}");
    }
    running.shutdown(DEADLINE).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_takes_the_same_spans_as_lines_of_otlp_json() {
    let world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("traces.jsonl");
    let name = file.to_str().unwrap();
    set(&world, "*", &[("exporter", Some("file")), ("file", Some(name))]).await;
    let running = follower(&world).await;
    let task = run_one(&world).await;
    let (log, _) = tasker_shared::client::Client::from_pool(world.pool.clone()).log(task).await.unwrap();
    let mut expected: Vec<String> = tasker_shared::trace::tree::spans(&log)
        .spans
        .iter()
        .map(|span| tasker_shared::trace::otlp::hex(&span.id))
        .collect();
    expected.sort();
    // Who is told of the end may look before the last of them is handed over.
    let all = eventually("every span is in the file", async || {
        assert!(running.flush(DEADLINE).await);
        let text = std::fs::read_to_string(&file).unwrap();
        let mut arrived: Vec<String> = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
            .flat_map(|request| request["resourceSpans"].as_array().cloned().expect("spans"))
            .flat_map(|resource| resource["scopeSpans"][0]["spans"].as_array().cloned().expect("spans"))
            .map(|span| span["spanId"].as_str().expect("an id").to_owned())
            .collect();
        arrived.sort();
        (arrived.len() >= expected.len()).then_some(arrived)
    });
    let arrived = all.await;
    assert_eq!(arrived, expected);
    running.shutdown(DEADLINE).await;
    world.end().await;
}
