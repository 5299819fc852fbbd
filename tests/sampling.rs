//! Sampling decides once, for whole traces; what ends badly is exported all the same; and what no
//! receiver takes may be given up, counted.

use std::sync::atomic::Ordering;
use std::time::Duration;

use http::StatusCode;
use serde_json::json;
use tasker_orchestration::{Options, Orchestrator};
use tasker_tests::receiver::Behaviour;
use tasker_tests::trace_config;
use tasker_trace_testing::{Rules, assert_trace};
use tonic::Code;

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
