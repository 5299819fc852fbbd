//! One attempt, from its claim to its report.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tasker_worker::{StepContext, StepError};
use tokio::sync::mpsc;

use crate::bench::{Bench, PATIENCE, TRACE_ID, start, step, told};

#[derive(Deserialize)]
struct Charge {
    amount: u64,
}

#[derive(Serialize, Deserialize)]
struct Receipt {
    charged: u64,
    key: String,
}

async fn charge(ctx: StepContext, input: Charge) -> Result<Receipt, StepError> {
    Ok(Receipt { charged: input.amount, key: ctx.idempotency_key() })
}

#[tokio::test]
async fn a_success_is_on_the_attempt_in_the_log_and_in_the_results_queue() {
    let bench = Bench::new().await;
    let (task, steps) = bench.enqueue(&[step("charge", json!({"amount": 5}))]).await;
    let worker = start(bench.worker().handler("charge", charge));
    let attempt = bench.reported(steps[0]).await;

    assert_eq!(attempt.outcome.as_deref(), Some("success"));
    assert_eq!(attempt.output, Some(json!({"charged": 5, "key": steps[0]})));
    assert_eq!(
        (attempt.error, attempt.worker, attempt.worker_version.as_deref()),
        (None, worker.name.clone(), Some("7.1"))
    );
    let (offset, run) = (attempt.start_offset_ms.expect("an offset"), attempt.run_ms.expect("a duration"));
    assert!((0.0..5_000.0).contains(&offset) && (0.0..5_000.0).contains(&run), "{offset} {run}");
    assert!(((run * 1e3).round() - run * 1e3).abs() < 1e-6, "to the microsecond: {run}");

    let moves: Vec<(String, String, String, String)> = sqlx::query_as(
        "select from_state, event, to_state, actor from tasker.transitions where entity_uuid = $1 order by version",
    )
    .bind(steps[0])
    .fetch_all(&bench.pool)
    .await
    .expect("the log");
    let row =
        |from: &str, event: &str, to: &str| (from.to_owned(), event.to_owned(), to.to_owned(), worker.name.clone());
    assert_eq!(
        moves,
        [row("enqueued", "Claim", "in_progress"), row("in_progress", "Report", "enqueued_for_orchestration")]
    );

    let (message, headers): (Value, Value) = sqlx::query_as("select message, headers from pgmq.q_step_results")
        .fetch_one(&bench.pool)
        .await
        .expect("one result");
    assert_eq!(
        (&message["task"], &message["step"], &message["outcome"]),
        (&json!(task), &json!(steps[0]), &json!("success"))
    );
    assert_eq!(
        headers["traceparent"],
        format!("00-{TRACE_ID}-0102030405060708-01"),
        "a result carries the root's span"
    );
    let beats: i64 = bench.ask("select count(*) from tasker.steps where last_heartbeat_at is not null").await;
    assert_eq!(beats, 0, "a short step costs no heartbeat");
    worker.drained().await;
}

#[tokio::test]
async fn each_way_to_fail_is_reported_as_what_it_is() {
    let bench = Bench::new().await;
    let handlers =
        ["charge", "retry", "fail", "cancel", "panic", "question_mark", "nul_output", "nul_message", "hangs"];
    let steps: Vec<_> = handlers
        .iter()
        .map(|name| step(name, json!({"amount": "secret"})))
        .map(|s| if s.handler == "hangs" { crate::bench::Step { run_ms: Some(40), ..s } } else { s })
        .collect();
    let (_, uuids) = bench.enqueue(&steps).await;
    let worker = start(
        bench
            .worker()
            .handler("charge", charge)
            .handler("retry", async |_, _: Value| {
                Err::<(), _>(StepError::retry_after("BankAway", "busy", Duration::from_millis(1500)))
            })
            .handler("fail", async |_, _: Value| Err::<(), _>(StepError::fail("CardDeclined", "é".repeat(1000))))
            .handler("cancel", async |_, _: Value| Err::<(), _>(StepError::Cancel))
            .handler("panic", async |_, _: Value| -> Result<(), StepError> { panic!("no {}", "way") })
            .handler("question_mark", async |_, _: Value| -> Result<i32, StepError> { Ok("x".parse::<i32>()?) })
            .handler("nul_output", async |_, _: Value| Ok::<_, StepError>("a\0b"))
            .handler("nul_message", async |_, _: Value| Err::<(), _>(StepError::retry("a\0b", "c\0d")))
            .handler("hangs", async |_, _: Value| -> Result<(), StepError> { std::future::pending().await }),
    );
    let mut errors = Vec::new();
    for (step, handler) in uuids.iter().zip(handlers) {
        let attempt = bench.reported(*step).await;
        assert_eq!((attempt.outcome.as_deref(), &attempt.output), (Some("error"), &None), "{handler}");
        errors.push(attempt.error.expect(handler));
    }
    let error = |kind: &str, retryable: bool, after: Option<u64>, message: &str| json!({"type": kind, "retryable": retryable, "retry_after_ms": after, "message": message});
    assert_eq!(errors[0], error("invalid_input", false, None, "input.amount: is a string; the handler needs u64"));
    assert_eq!(errors[1], error("BankAway", true, Some(1500), "busy"));
    assert_eq!(errors[2], error("CardDeclined", false, None, &"é".repeat(512)));
    assert_eq!((&errors[3]["type"], &errors[3]["retryable"]), (&json!("cancelled"), &json!(false)));
    assert_eq!(errors[4], error("panic", true, None, "no way"));
    assert_eq!(errors[5], error("ParseIntError", true, None, "invalid digit found in string"));
    assert_eq!((&errors[6]["type"], &errors[6]["retryable"]), (&json!("invalid_output"), &json!(false)));
    assert_eq!(errors[7], error("a\u{fffd}b", true, None, "c\u{fffd}d"));
    assert_eq!(errors[8], error("timeout", true, None, "the handler ran longer than its run timeout of 40ms"));
    worker.drained().await;
}

#[tokio::test]
async fn an_output_that_only_the_database_refuses_costs_no_other_result() {
    let bench = Bench::new().await;
    // jsonb holds numbers of up to 131,072 digits before the point; JSON has no such limit.
    let refused = async |_, _: Value| {
        Ok::<_, StepError>(serde_json::value::RawValue::from_string("1e200000".into()).expect("JSON"))
    };
    let mut steps = vec![step("echo", json!("fine")); 9];
    steps[4] = step("refused", json!(null));
    let (_, uuids) = bench.enqueue(&steps).await;
    let worker = start(bench.worker().builtins().handler("refused", refused));
    for (at, step) in uuids.iter().enumerate() {
        let attempt = bench.reported(*step).await;
        if at == 4 {
            let error = attempt.error.expect("an error");
            assert_eq!((&error["type"], &error["retryable"]), (&json!("invalid_output"), &json!(false)), "{error}");
        } else {
            assert_eq!(attempt.output, Some(json!("fine")), "{at}");
        }
    }
    worker.drained().await;
}

#[tokio::test]
async fn a_cancelled_task_asks_its_handler_to_stop_within_a_second() {
    let bench = Bench::new().await;
    let (tell, mut heard) = mpsc::unbounded_channel();
    let (task, _) = bench.enqueue(&[step("wait", json!(null))]).await;
    let worker = start(bench.worker().handler("wait", move |ctx: StepContext, _: Value| {
        let tell = tell.clone();
        async move {
            tell.send("started").expect("a listener");
            ctx.cancellation_token().cancelled().await;
            tell.send("asked to stop").expect("a listener");
            Err::<(), _>(StepError::Cancel)
        }
    }));
    assert_eq!(told(&mut heard).await, "started");
    let asked = std::time::Instant::now();
    bench.end_task(task, "cancel", &worker.name).await;
    assert_eq!(told(&mut heard).await, "asked to stop");
    // Far below a second on a quiet machine; the next heartbeat, after 3.3 s, would be too late on any.
    println!("it was told after {:?}", asked.elapsed());
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    worker.drained().await;
    let reports: i64 = bench.ask("select count(*) from tasker.attempts where reported_at is not null").await;
    let unmatched: i64 = bench.ask("select count(*) from tasker.counters").await;
    assert_eq!((reports, unmatched), (0, 0), "nobody wants the result of a cancelled attempt");
}

/// Tells when it is dropped.
struct Telltale(mpsc::UnboundedSender<&'static str>);

impl Drop for Telltale {
    fn drop(&mut self) {
        let _ = self.0.send("dropped");
    }
}

async fn ended_by(by: &str, grace: Duration) -> Duration {
    let bench = Bench::new().await;
    let (tell, mut heard) = mpsc::unbounded_channel();
    let (task, _) = bench.enqueue(&[step("deaf", json!(null))]).await;
    let worker = start(bench.worker().cancel_grace(grace).handler("deaf", move |_, _: Value| {
        let tell = Telltale(tell.clone());
        async move {
            tell.0.send("started").expect("a listener");
            std::future::pending::<Result<(), StepError>>().await
        }
    }));
    assert_eq!(told(&mut heard).await, "started");
    let asked = std::time::Instant::now();
    bench.end_task(task, by, &worker.name).await;
    assert_eq!(told(&mut heard).await, "dropped");
    let took = asked.elapsed();
    worker.drained().await;
    took
}

#[tokio::test]
async fn a_handler_deaf_to_its_cancellation_is_dropped_after_the_grace() {
    let grace = Duration::from_millis(300);
    assert!(ended_by("cancel", grace).await >= grace);
}

#[tokio::test]
async fn the_handler_of_a_terminated_task_is_dropped_at_once() {
    assert!(ended_by("terminate", PATIENCE).await < PATIENCE / 2);
}

#[tokio::test]
async fn heartbeats_keep_a_claim_beyond_its_lease_and_carry_the_progress() {
    let bench = Bench::new().await;
    let (tell, mut heard) = mpsc::unbounded_channel();
    let lease_ms = 600;
    let (_, steps) = bench.enqueue(&[crate::bench::Step { lease_ms, ..step("long", json!(null)) }]).await;
    let worker = start(bench.worker().handler("long", move |ctx: StepContext, _: Value| {
        let tell = tell.clone();
        async move {
            ctx.heartbeat(json!({"done": 1}));
            ctx.heartbeat(json!({"done": 2}));
            tell.send(ctx.clone()).expect("a listener");
            ctx.cancellation_token().cancelled().await;
            Ok::<_, StepError>(())
        }
    }));
    let ctx = told(&mut heard).await;
    bench.until("select progress = '{\"done\": 2}' and last_heartbeat_at is not null from tasker.steps").await;
    // Renewed often enough that the claim outlives its first lease twice over.
    bench.until("select last_heartbeat_at > last_at + interval '1.2 s' and lease_expires_at > clock_timestamp() from tasker.steps").await;
    let progress: Value = bench.ask("select progress from tasker.steps").await;
    assert_eq!(progress, json!({"done": 2}), "a heartbeat without news keeps the last progress");
    ctx.cancellation_token().cancel();
    assert_eq!(bench.reported(steps[0]).await.outcome.as_deref(), Some("success"));
    worker.drained().await;
}

#[tokio::test]
async fn progress_that_the_database_cannot_keep_costs_no_lease() {
    let bench = Bench::new().await;
    let (tell, mut heard) = mpsc::unbounded_channel();
    let short = crate::bench::Step { lease_ms: 600, ..step("long", json!(null)) };
    let (_, steps) = bench.enqueue(&[short.clone(), short.clone(), short]).await;
    let worker = start(bench.worker().handler("long", move |ctx: StepContext, _: Value| {
        let tell = tell.clone();
        async move {
            match ctx.step_name() {
                "s0" => ctx.heartbeat(json!({"a\0b": ["c\0d"]})),
                "s1" => {
                    ctx.heartbeat(json!("first"));
                    ctx.heartbeat(json!("x".repeat(5000)));
                    ctx.heartbeat((0..100).fold(json!(1), |value, _| json!([value])));
                }
                _ => ctx.heartbeat(json!("fine")),
            }
            tell.send(ctx.clone()).expect("a listener");
            ctx.cancellation_token().cancelled().await;
            Ok::<_, StepError>(())
        }
    }));
    let contexts = [told(&mut heard).await, told(&mut heard).await, told(&mut heard).await];
    bench
        .until(
            "select bool_and(coalesce(last_heartbeat_at > last_at + interval '1.2 s' and lease_expires_at > clock_timestamp(), false))
             from tasker.steps",
        )
        .await;
    let progress: Vec<Value> = sqlx::query_scalar("select progress from tasker.steps order by step_index")
        .fetch_all(&bench.pool)
        .await
        .expect("what is kept");
    assert_eq!(progress, [json!({"a\u{fffd}b": ["c\u{fffd}d"]}), json!("first"), json!("fine")]);
    for ctx in &contexts {
        ctx.cancellation_token().cancel();
    }
    for step in steps {
        assert_eq!(bench.reported(step).await.outcome.as_deref(), Some("success"));
    }
    worker.drained().await;
}

#[tokio::test]
async fn what_a_handler_tells_of_itself_costs_no_result() {
    let bench = Bench::new().await;
    let (_, steps) = bench.enqueue(&[step("teller", json!(true)), step("teller", json!(false))]).await;
    let worker = start(bench.worker().handler("teller", async |ctx: StepContext, good: bool| {
        ctx.milestone("a\0b", [("c\0d", json!("e\0f")), ("list", json!(["g\0h"]))]);
        ctx.add_usage("i\0j", 1.0);
        if good { Ok("done") } else { Err(StepError::fail("Bad", "no")) }
    }));
    assert_eq!(bench.reported(steps[0]).await.output, Some(json!("done")));
    assert_eq!(bench.reported(steps[1]).await.error.expect("an error")["type"], "Bad");
    let told: Vec<(Value, Value)> = sqlx::query_as(
        "select milestones->0->'name', usage->(select k from jsonb_object_keys(usage) k limit 1) from tasker.attempts",
    )
    .fetch_all(&bench.pool)
    .await
    .expect("what was told");
    assert_eq!(told, [(json!("a\u{fffd}b"), json!(1)), (json!("a\u{fffd}b"), json!(1))]);
    worker.drained().await;
}

#[tokio::test]
async fn a_result_of_a_lost_claim_changes_nothing_and_is_counted() {
    let bench = Bench::new().await;
    let (tell, mut heard) = mpsc::unbounded_channel();
    let (_, steps) = bench.enqueue(&[step("late", json!(null))]).await;
    let worker = start(bench.worker().handler("late", move |ctx: StepContext, _: Value| {
        let tell = tell.clone();
        async move {
            tell.send(ctx.clone()).expect("a listener");
            ctx.cancellation_token().cancelled().await;
            Ok::<_, StepError>("late")
        }
    }));
    let ctx = told(&mut heard).await;
    sqlx::query("update tasker.steps set claim_token = gen_random_uuid(), claimed_by = 'other'")
        .execute(&bench.pool)
        .await
        .expect("taken by another");
    ctx.cancellation_token().cancel();
    worker.drained().await;
    let counted: i64 = bench.ask("select sum(n)::bigint from tasker.counters where name = 'unmatched_reports'").await;
    let state: String = bench.ask("select state from tasker.steps").await;
    assert_eq!((counted, state.as_str(), bench.attempt(steps[0]).await.outcome), (1, "in_progress", None));
}

#[tokio::test]
async fn a_handler_reads_the_outputs_of_completed_steps_by_name() {
    let bench = Bench::new().await;
    let (task, steps) = bench.enqueue(&[step("charge", json!({"amount": 5}))]).await;
    let (tell, mut heard) = mpsc::unbounded_channel();
    let worker = start(bench.worker().handler("charge", charge).handler("reads", move |ctx: StepContext, _: Value| {
        let tell = tell.clone();
        async move {
            let found = ctx.parent_output::<Receipt>("s0").await.map(|receipt| receipt.charged);
            let misfit = ctx.parent_output::<Charge>("s0").await.map(|charge| charge.amount);
            tell.send([found, misfit, ctx.parent_output::<u64>("nobody").await]).expect("a listener");
            Ok::<_, StepError>((
                ctx.attempt(),
                ctx.max_attempts(),
                ctx.step_name().to_owned(),
                ctx.correlation_id().to_owned(),
            ))
        }
    }));
    bench.reported(steps[0]).await;
    sqlx::query("update tasker.steps set state = 'complete'").execute(&bench.pool).await.expect("settled");
    let own = bench.enqueue_in(task, &[step("reads", json!(null))]).await;
    let nobody = "no step \"nobody\" of this task has completed; name one that this step depends on";
    assert_eq!(
        told(&mut heard).await,
        [
            Ok(5),
            Err(StepError::fail("invalid_parent_output", "the output of step \"s0\" does not fit at .")),
            Err(StepError::fail("no_parent_output", nobody)),
        ]
    );
    assert_eq!(bench.reported(own[0]).await.output, Some(json!([1, 3, "s1", "order-4711"])));
    // The same name in another task is another step.
    bench.enqueue(&[step("reads", json!(null))]).await;
    assert!(told(&mut heard).await[0].is_err());
    worker.drained().await;
}

#[tokio::test]
async fn the_built_in_handlers_do_what_they_say() {
    let bench = Bench::new().await;
    let second = |s| crate::bench::Step { attempt: 2, ..s };
    let fails = json!({"times": 1, "then": {"ok": true}});
    let (_, steps) = bench
        .enqueue(&[
            step("noop", json!({"anything": [1]})),
            step("echo", json!({"a": [1, null]})),
            step("sleep", json!({"ms": 5})),
            step("fail", fails.clone()),
            second(step("fail", fails)),
            second(step("fail", json!({"permanent": true}))),
            step("sleep", json!({"ms": "long"})),
        ])
        .await;
    let worker = start(bench.worker().builtins());
    let mut seen = Vec::new();
    for step in steps {
        let attempt = bench.reported(step).await;
        let error = attempt.error.map(|error| (error["type"].clone(), error["retryable"].clone()));
        seen.push((attempt.output, error, attempt.run_ms.expect("a duration")));
    }
    let failed = |kind: &str, retryable: bool| (None, Some((json!(kind), json!(retryable))));
    let outcomes: Vec<_> = seen.iter().map(|(output, error, _)| (output.clone(), error.clone())).collect();
    assert_eq!(
        outcomes,
        [
            (Some(json!(null)), None),
            (Some(json!({"a": [1, null]})), None),
            (Some(json!(null)), None),
            failed("FailedOnPurpose", true),
            (Some(json!({"ok": true})), None),
            failed("FailedOnPurpose", false),
            failed("invalid_input", false),
        ]
    );
    assert!(seen[2].2 >= 5.0, "slept for {} ms", seen[2].2);
    worker.drained().await;
}
