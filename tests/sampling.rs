//! Sampling decides once, for whole traces; what ends badly is exported all the same; and what no
//! receiver takes may be given up, counted.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::StatusCode;
use serde_json::json;
use tasker_orchestration::export::{log, sampling};
use tasker_orchestration::{Options, Orchestrator};
use tasker_shared::store::transitions;
use tasker_shared::trace::otlp::ServiceNames;
use tasker_testing::{Rules, Trace, assert_trace, compare};
use tasker_tests::receiver::Behaviour;
use tasker_tests::trace_config;
use tonic::Code;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually, trace};

const TASKS: i64 = 10_000;

async fn sample(world: &World, namespace: &str, ratio: f64) -> f64 {
    let set = sqlx::query_scalar("select tasker.set_sampling($1, $2)").bind(namespace).bind(ratio);
    set.fetch_one(&world.pool).await.expect("set")
}

/// How many of 10,000 new tasks are sampled.
async fn sampled_of_many(world: &World, traceparent: Option<&str>) -> i64 {
    let request = json!({"namespace": "tests", "template": "one", "traceparent": traceparent});
    let submitted = sqlx::query_scalar::<_, i64>(
        "with s as (select tasker.submit_tasks((select jsonb_agg($1::jsonb) from generate_series(1, $2))) as r)
         select count((r).task_uuid) from s",
    );
    assert_eq!(submitted.bind(&request).bind(TASKS).fetch_one(&world.pool).await.expect("submitted"), TASKS);
    let sampled = world.number("select count(*) from tasker.tasks where trace_flags & 1 = 1").await;
    for table in ["tasker.tasks", "pgmq.q_task_requests"] {
        sqlx::query(sqlx::AssertSqlSafe(format!("truncate {table}"))).execute(&world.pool).await.expect("emptied");
    }
    sampled
}

#[tokio::test(flavor = "multi_thread")]
async fn ratios_mean_none_half_and_all_and_callers_decide_for_theirs() {
    let world = World::start(Setup { orchestrators: 0, workers: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    assert_eq!(sampled_of_many(&world, None).await, TASKS, "nothing is set");
    for (namespace, ratio) in [("tests", 0.0), ("*", 0.0)] {
        sample(&world, namespace, ratio).await;
        assert_eq!(sampled_of_many(&world, None).await, 0);
    }
    let yes = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    assert_eq!(sampled_of_many(&world, Some(yes)).await, TASKS, "the caller's flag");
    sample(&world, "tests", 0.5).await;
    // Five standard deviations of a fair coin.
    let half = sampled_of_many(&world, None).await;
    assert!((TASKS / 2 - 250..=TASKS / 2 + 250).contains(&half), "{half}");
    sample(&world, "tests", 1.0).await;
    assert_eq!(sampled_of_many(&world, None).await, TASKS, "its own share goes before that of *");
    assert_eq!(sampled_of_many(&world, Some(&yes.replace("-01", "-00"))).await, 0, "the caller's flag");
    for (asked, used) in [(7.0, 1.0), (-1.0, 0.0), (f64::NAN, 1.0)] {
        assert!((sample(&world, "tests", asked).await - used).abs() < f64::EPSILON, "{asked} is clamped");
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unsampled_trace_is_exported_whole_if_its_end_is_worth_keeping() {
    let world = World::start(Setup::default()).await;
    sample(&world, "tests", 0.0).await;
    let keep = "trace: {keep: [failed, retried]}\nsteps:\n  - {name: a, handler: ok, retry: {initial_interval: 10ms}}\n  - \
                {name: b, depends_on: [a], retry: {initial_interval: 10ms}, handler: ";
    for handler in ["ok", "flaky", "broken"] {
        world.register(handler, &format!("{keep}{handler}}}\n")).await;
    }
    let fine = world.submit("ok").await;
    let retried = world.submit("flaky").await;
    let failed = world.submit("broken").await;
    assert_eq!(world.finish(&[fine, retried, failed]).await, ["complete", "complete", "error"]);
    eventually("everything is acknowledged", async || {
        (world.number("select count(*) from tasker.export_batches").await == 0).then_some(())
    })
    .await;
    assert_eq!(world.spans_of(fine), []);
    for (task, reason) in [(retried, "retried"), (failed, "failed")] {
        let trace = trace(&world.spans_of(task));
        Rules::new().well_formed().links().assert(&trace);
        assert_trace!(trace, {
            "task.orchestration" ["sampling.reason" = reason, "sampling.user_spans" = false] {
                "step.execution" [step_name = "a", attempt_number = 1],
                "step.execution" [step_name = "b", attempt_number = 1],
                ..
            }
        });
    }
    world.end().await;
}

/// A task that awaits one that awaits another, and starts one that it forgets.
const NESTED: &str = "trace: {keep: [failed]}
steps:
  - {name: child, task: {template: middle}}
  - {name: forgotten, task: {template: alone, await: false}}
  - {name: end, depends_on: [child, forgotten], handler: ";

/// The tasks of this trace, and what is due of each by the rule that `tasker trace verify` follows.
async fn due(world: &World, top: Uuid) -> (Vec<Uuid>, Trace) {
    let mut conn = world.pool.acquire().await.expect("a connection");
    let tasks = transitions::awaited_below(&mut conn, top, 100).await.expect("tasks");
    let logs = transitions::logs(&mut conn, &tasks).await.expect("logs");
    let kept = log::kept(&mut conn, &logs).await.expect("kept");
    let spans = logs.iter().filter_map(|log| sampling::exported(log, kept.get(&log.head.task_uuid)));
    let spans = spans.flat_map(|task| Trace::of_spans(&task, &ServiceNames::default()).spans).collect();
    (tasks, Trace { spans })
}

/// What arrived of these tasks is what is due, whole: nothing is missing and nothing hangs loose.
/// Answers how many spans came again.
async fn assert_due(world: &World, top: Uuid, tasks: usize) -> usize {
    let (below, due) = due(world, top).await;
    assert_eq!(below.len(), tasks);
    let there = eventually("all of it has arrived", async || {
        let waiting = world.number("select count(*) from tasker.export_batches").await;
        let spans = || below.iter().flat_map(|task| world.spans_of(*task)).collect::<Vec<_>>();
        (waiting == 0).then(|| trace(&spans()))
    })
    .await;
    let found = compare(&due, &there);
    assert!(found.is_none(), "{found:#?}");
    assert_eq!((found.matched, found.remote_parents_missing), (due.spans.len(), 0));
    let (mut once, mut seen) = (there, HashSet::new());
    once.spans.retain(|span| seen.insert(span.span_id));
    Rules::new().well_formed().links().assert(&once);
    let reasons: Vec<_> = once.spans.iter().filter_map(|span| span.text("sampling.reason")).collect();
    assert_eq!(reasons, ["failed"], "the topmost root says why");
    found.duplicates
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_trace_has_the_tasks_that_it_awaited_also_those_that_ended_after_it() {
    let mut world = World::start(Setup { hand: true, ..Setup::default() }).await;
    sample(&world, "tests", 0.0).await;
    world.register_steps("leaf", "a: ok").await;
    world
        .register("middle", "steps: [{name: a, handler: ok}, {name: leaf, task: {template: leaf}, depends_on: [a]}]\n")
        .await;
    world.register_steps("alone", "a: ok").await;
    for (name, handler) in [("fine", "ok"), ("fails", "broken")] {
        world.register(name, &format!("{NESTED}{handler}}}\n")).await;
    }
    let fine = world.submit("fine").await;
    let fails = world.submit("fails").await;
    assert_eq!(world.finish(&[fine, fails]).await, ["complete", "error"]);
    // Three deep; the forgotten task is no part of the trace, and its own template keeps nothing.
    assert_eq!(assert_due(&world, fails, 3).await, 0, "each span came once");
    let (below, nothing) = due(&world, fine).await;
    assert_eq!((below.len(), nothing.spans.len()), (3, 0));
    let failed = world.of_task(fails, "correlation_id").await;
    assert!(world.receiver.spans().iter().all(|span| span.text("correlation_id") == failed.as_deref()));
    assert!(world.receiver.spans().iter().all(|span| span.span.flags & 0xff == 1), "only W3C's flags are sent");

    // The child is in the hands of nobody when its parent is given up; it ends later.
    world.register("stuck", "steps: [{name: a, handler: silent}]\n").await;
    world.register("waits", "trace: {keep: [failed]}\nsteps: [{name: child, task: {template: stuck}}]\n").await;
    let waits = world.submit("waits").await;
    eventually("the child runs", async || {
        let child = "select count(*) from tasker.tasks t join tasker.templates p on p.template_id = t.template_id
                     where p.name = 'stuck' and t.in_flight_steps = 1";
        (world.number(child).await == 1).then_some(())
    })
    .await;
    // Everything of the trace is derived again by another orchestrator than the one that saw it end.
    world.receiver.behave(Behaviour::Refuse(Code::Unavailable, StatusCode::SERVICE_UNAVAILABLE));
    let cancelled = "select tasker.cancel_task($1, 'too late', null, 'ann')";
    sqlx::query(cancelled).bind(waits).execute(&world.pool).await.expect("asked");
    assert_eq!(world.finish(&[waits]).await, ["cancelled"]);
    eventually("the child has ended", async || {
        (world.number("select count(*) from tasker.tasks where finished_at is null").await == 0).then_some(())
    })
    .await;
    world.orchestrators.remove(0).shutdown(Duration::ZERO).await;
    world.receiver.behave(Behaviour::Accept);
    world.add_orchestrator().await;
    // Both batches were read after both had ended: either may bring the child, with equal content.
    assert_due(&world, waits, 2).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_nobody_awaits_is_kept_for_its_own_end() {
    let world = World::start(Setup::default()).await;
    sample(&world, "tests", 0.0).await;
    world.register("alone", "trace: {keep: [failed]}\nsteps: [{name: a, handler: broken}]\n").await;
    world.register("starts", "steps: [{name: a, task: {template: alone, await: false}}]\n").await;
    let starts = world.submit("starts").await;
    assert_eq!(world.finish(&[starts]).await, ["complete"]);
    let alone = eventually("the other has failed", async || {
        let query = "select task_uuid from tasker.tasks where state = 'error'";
        sqlx::query_scalar::<_, Uuid>(query).fetch_optional(&world.pool).await.expect("asked")
    })
    .await;
    assert_eq!(assert_due(&world, alone, 1).await, 0);
    assert_eq!(world.spans_of(starts), []);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_past_the_longest_lag_are_given_up_and_counted() {
    let mut world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    world.receiver.behave(Behaviour::Refuse(Code::Unavailable, StatusCode::SERVICE_UNAVAILABLE));
    let mut config = trace_config(&world.receiver.endpoint(), "grpc");
    config.max_export_lag = Some(Duration::from_millis(200));
    let options = Options { trace: config, ..Options::default() };
    world.orchestrators.push(Orchestrator::start(&world.url, &options).await.expect("an orchestrator"));
    let task = world.submit("one").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    eventually("everything is given up", async || {
        (world.number("select count(*) from tasker.export_batches").await == 0).then_some(())
    })
    .await;
    let stats = world.orchestrators[0].export_stats().expect("traced");
    assert!(stats.abandoned.load(Ordering::Relaxed) > 0);
    assert_eq!(stats.exported.load(Ordering::Relaxed), 0);
    world.end().await;
}
