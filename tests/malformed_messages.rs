//! Bad input costs only itself: a hundred kinds of it, beside good work on the same queues.

use serde_json::{Value, json};
use tasker_tests::worker::{Claim, answer};
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

/// Puts text on a queue as it is: JSON that no careful client would write.
async fn send_text(world: &World, queue: &str, message: &str, headers: Option<&str>) {
    sqlx::query("select pgmq.send($1, $2::text::jsonb, $3::text::jsonb)")
        .bind(queue)
        .bind(message)
        .bind(headers)
        .execute(&world.pool)
        .await
        .unwrap_or_else(|error| panic!("{message:.80}: {error}"));
}

fn deep(levels: usize) -> String {
    format!("{}1{}", "[".repeat(levels), "]".repeat(levels))
}

/// What is bad on every queue.
fn anywhere() -> Vec<String> {
    let mut bad: Vec<String> =
        ["null", "true", "0", "-1", "1e400", "\"text\"", "\"\"", "[]", "[1, 2]", "{}", "[{\"v\": 1}]"]
            .map(str::to_owned)
            .to_vec();
    bad.extend(
        ["0", "2", "1e400", "\"1\"", "null", "true", "[1]", "{}", "-1", "1.5"]
            .map(|v| format!("{{\"v\": {v}, \"type\": \"submit\"}}")),
    );
    bad.push(format!("{{\"v\": 1, \"deep\": {}}}", deep(200)));
    bad.push(deep(2000));
    bad.push(format!("{{\"v\": {}}}", "9".repeat(1000)));
    bad.push(format!("{{\"v\": 1, \"big\": \"{}\"}}", "x".repeat(2_000_000)));
    bad
}

fn bad_requests(task: Uuid) -> Vec<String> {
    let submit = |more: Value| {
        let mut message = json!({"v": 1, "type": "submit", "namespace": "tests", "template": "one"});
        message.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        message.to_string()
    };
    let mut bad = vec![
        json!({"v": 1}).to_string(),
        json!({"v": 1, "type": null}).to_string(),
        json!({"v": 1, "type": 7}).to_string(),
        json!({"v": 1, "type": "SUBMIT"}).to_string(),
        json!({"v": 1, "type": "explode"}).to_string(),
        json!({"v": 1, "type": "submit"}).to_string(),
        json!({"v": 1, "type": "start"}).to_string(),
        json!({"v": 1, "type": "start", "task": "not a uuid"}).to_string(),
        json!({"v": 1, "type": "start", "task": 5}).to_string(),
        json!({"v": 1, "type": "start", "task": Uuid::nil()}).to_string(),
        json!({"v": 1, "type": "cancel", "task": Uuid::nil()}).to_string(),
        json!({"v": 1, "type": "terminate"}).to_string(),
        json!({"v": 1, "type": "retry", "task": [task]}).to_string(),
        submit(json!({"template": "unknown"})),
        submit(json!({"template": null})),
        submit(json!({"template": ["one"]})),
        submit(json!({"template": {"name": "one"}})),
        submit(json!({"template": "x".repeat(100_000)})),
        submit(json!({"version": "99"})),
        submit(json!({"version": 7})),
        submit(json!({"namespace": "elsewhere"})),
        submit(json!({"namespace": null})),
        submit(json!({"namespace": 4})),
        submit(json!({"namespace": "'; drop table tasker.tasks; --"})),
        submit(json!({"input": "text"})),
        submit(json!({"input": [1]})),
        submit(json!({"input": 7})),
        submit(json!({"input": {"big": "x".repeat(2_000_000)}})),
        submit(json!({"correlation_id": ""})),
        submit(json!({"correlation_id": "x".repeat(300)})),
        submit(json!({"correlation_id": "two\nlines"})),
        submit(json!({"idempotency_key": ""})),
        submit(json!({"idempotency_key": "x".repeat(300)})),
        submit(json!({"idempotency_key": "tab\there"})),
        submit(json!({"priority": "urgent"})),
        submit(json!({"priority": 1.5})),
        submit(json!({"priority": 100_000})),
        submit(json!({"priority": [1]})),
        submit(json!({"run_at": "tomorrow, maybe"})),
        submit(json!({"run_at": 17})),
        submit(json!({"run_at": "2030-13-45T99:00:00Z"})),
    ];
    bad.push(format!("{{\"v\": 1, \"type\": \"submit\", \"namespace\": \"tests\", \"template\": \"one\", \"input\": {{\"deep\": {}}}}}", deep(100)));
    bad.push("{\"v\": 1, \"type\": \"submit\", \"namespace\": \"tests\", \"template\": \"one\", \"input\": {\"huge\": 1e400}}".to_owned());
    bad.push("{\"v\": 1, \"type\": \"submit\", \"namespace\": \"tests\", \"template\": \"one\", \"input\": {\"huge\": -1e309}}".to_owned());
    bad
}

fn bad_results(claim: &Claim) -> Vec<String> {
    let hint = |more: Value| {
        let mut message = json!({"v": 1, "task": claim.task, "step": claim.step, "generation": 1, "attempt": 1, "outcome": "success"});
        message.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        message.to_string()
    };
    vec![
        hint(json!({"task": null})),
        hint(json!({"task": "x"})),
        hint(json!({"task": 3})),
        hint(json!({"task": Uuid::nil()})),
        hint(json!({"task": [claim.task]})),
        hint(json!({"step": null})),
        hint(json!({"step": "step_one"})),
        hint(json!({"step": 3.5})),
        hint(json!({"step": Uuid::nil()})),
        hint(json!({"step": Uuid::from_u128(u128::MAX)})),
        hint(json!({"attempt": null})),
        hint(json!({"attempt": 0})),
        hint(json!({"attempt": -1})),
        hint(json!({"attempt": "1"})),
        hint(json!({"attempt": 1.5})),
        hint(json!({"attempt": 3_000_000_000_u64})),
        hint(json!({"v": 3})),
    ]
}

fn bad_step_messages(claim: &Claim) -> Vec<String> {
    vec![
        json!({"v": 1, "handler": "ok"}).to_string(),
        json!({"v": 1, "handler": "ok", "step": "x", "attempt": 1}).to_string(),
        json!({"v": 1, "handler": "ok", "step": claim.step}).to_string(),
        json!({"v": 1, "handler": "ok", "step": claim.step, "attempt": "one"}).to_string(),
        json!({"v": 1, "handler": "ok", "step": claim.step, "attempt": -1}).to_string(),
        json!({"v": 1, "handler": "ok", "step": claim.step, "attempt": 1e30}).to_string(),
        json!({"v": 2, "handler": "ok", "step": claim.step, "attempt": 1}).to_string(),
        json!({"v": 1, "handler": "ok", "step": [claim.step], "attempt": 1}).to_string(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn hundred_kinds_of_bad_messages_cost_only_themselves() {
    let mut world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    world.register_steps("chain", "a: ok\nb: flaky <- a\nc: ok <- b").await;
    let known = world.submit("one").await;
    let claim = world.claim().await;
    let bad: Vec<(&str, String)> = [
        ("task_requests", [anywhere(), bad_requests(known)].concat()),
        ("step_results", [anywhere(), bad_results(&claim)].concat()),
        ("worker_tests", [anywhere(), bad_step_messages(&claim)].concat()),
    ]
    .into_iter()
    .flat_map(|(queue, messages)| messages.into_iter().map(move |message| (queue, message)))
    .collect();
    assert!(bad.len() > 100, "{}", bad.len());

    let mut good = vec![known];
    for (n, (queue, message)) in bad.iter().enumerate() {
        send_text(
            &world,
            queue,
            message,
            [None, Some("{}"), Some("7"), Some("{\"traceparent\": 1e400}"), Some("{\"traceparent\": [1]}")][n % 5],
        )
        .await;
        if n % 5 == 0 {
            good.push(world.submit("chain").await);
        }
    }
    world.workers.push(
        tasker_tests::worker::Worker::start(&world.url, "worker", 8, std::sync::Arc::new(answer))
            .await
            .expect("a worker"),
    );
    world.report(&claim, &answer(&claim)).await;
    assert!(world.finish(&good).await.iter().all(|state| state == "complete"));
    world.queues_drained().await;

    let quarantined = world.words("select queue || ': ' || reason || ' | ' || coalesce(left(message::text, 100), '-') from tasker.quarantine order by quarantine_id").await;
    assert_eq!(quarantined.len(), bad.len(), "every bad one and nothing else: {quarantined:#?}");
    for (queue, message) in &bad {
        let kept: i64 = sqlx::query_scalar(
            "select count(*) from tasker.quarantine where queue = $1 and message = $2::text::jsonb and reason <> ''",
        )
        .bind(queue)
        .bind(message)
        .fetch_one(&world.pool)
        .await
        .expect("asked");
        assert!(kept >= 1, "not kept as it was: {queue} {message:.100}");
    }
    let tasks = world.number("select count(*) from tasker.tasks").await;
    assert_eq!(usize::try_from(tasks), Ok(good.len()), "no bad message became a task");
    world.assert_complete().await;
    world.end().await;
}

/// What a worker may report that is no good: each ends its attempt with an error that says why.
#[tokio::test(flavor = "multi_thread")]
async fn hundredfold_bad_report_ends_its_own_step_with_a_reason() {
    let world = World::start(Setup::by_hand()).await;
    world
        .register(
            "strict",
            "steps: [{name: a, handler: ok, retry: {max_attempts: 1}}, {name: b, handler: ok, depends_on: [a]}]",
        )
        .await;
    let reports = [
        "\"outcome\": \"success\", \"output\": {\"huge\": 1e400}".to_owned(),
        format!("\"outcome\": \"success\", \"output\": {}", deep(100)),
        format!("\"outcome\": \"success\", \"output\": {}", deep(2000)),
        format!("\"outcome\": \"success\", \"output\": \"{}\"", "x".repeat(2_000_000)),
        "\"outcome\": \"maybe\"".to_owned(),
        "\"outcome\": 7".to_owned(),
        "\"result\": true".to_owned(),
        "\"outcome\": \"error\"".to_owned(),
        "\"outcome\": \"error\", \"error\": \"text\"".to_owned(),
        "\"outcome\": \"error\", \"error\": {\"type\": 7, \"message\": [1], \"retryable\": \"no\", \"retry_after_ms\": 1e400}".to_owned(),
        format!("\"outcome\": \"error\", \"error\": {{\"type\": \"{}\", \"message\": {}, \"retry_after_ms\": -5}}", "t".repeat(5000), deep(300)),
    ];
    for report in &reports {
        let task = world.submit("strict").await;
        let claim = world.claim().await;
        let item = format!("[{{\"step\": \"{}\", \"token\": \"{}\", {report}}}]", claim.step, claim.token);
        let accepted: bool = sqlx::query_scalar("select accepted from tasker.report_results($1::text::jsonb)")
            .bind(&item)
            .fetch_one(&world.pool)
            .await
            .expect("reported");
        assert!(accepted, "{report:.80}");
        assert_eq!(world.finish(&[task]).await, ["error"], "{report:.80}");
        let reason = world.of_task(task, "reason").await.expect("a reason");
        assert!(reason.starts_with("step a failed: "), "{reason}");
    }
    // What only describes the attempt is dropped where it cannot be kept, and the result counts.
    let more = [
        "\"start_offset_ms\": 1e400, \"run_ms\": -1e400".to_owned(),
        "\"start_offset_ms\": \"x\", \"run_ms\": {}".to_owned(),
        format!("\"usage\": {}, \"milestones\": {{\"huge\": 1e400}}", deep(500)),
    ];
    for report in &more {
        let task = world.submit("strict").await;
        let claim = world.claim().await;
        let item = format!(
            "[{{\"step\": \"{}\", \"token\": \"{}\", \"outcome\": \"success\", \"output\": 1, {report}}}]",
            claim.step, claim.token
        );
        sqlx::query("select tasker.report_results($1::text::jsonb)")
            .bind(&item)
            .execute(&world.pool)
            .await
            .expect("reported");
        let claim = world.claim().await;
        world.succeed(&claim).await;
        assert_eq!(world.finish(&[task]).await, ["complete"], "{report:.80}");
    }
    world.queues_drained().await;
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_submit_by_sql_is_refused_at_once() {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    let refused = |input: String| {
        let pool = world.pool.clone();
        async move {
            let submitted = sqlx::query("select tasker.submit_task('tests', 'one', input => $1::text::jsonb)")
                .bind(input)
                .execute(&pool)
                .await;
            submitted.expect_err("refused").as_database_error().expect("by the database").message().to_owned()
        }
    };
    let message = refused(format!("{{\"deep\": {}}}", deep(64))).await;
    assert_eq!(message, "input: nests deeper than 64 levels; flatten it, or store it elsewhere and pass a reference");
    let message = refused("{\"huge\": 1e309}".to_owned()).await;
    assert_eq!(message, "input: holds a number beyond 1.797e308; write it as text");
    let message = refused(format!("{{\"big\": \"{}\"}}", "x".repeat(2_000_000))).await;
    assert!(message.contains("the limit is 1048576"), "{message}");
    assert_eq!(world.submit_with(json!({"template": "two"})).await.unwrap_err().split(' ').next(), Some("template:"));

    // As deep, as big and as many digits as may be.
    let digits = "9".repeat(2000);
    let fine = world
        .submit_with(json!({"template": "one", "input": {"digits": digits, "large": 1.7e308}}))
        .await
        .expect("submitted");
    let text = format!("{{\"deep\": {}}}", deep(63));
    let edge: Uuid = sqlx::query_scalar("select tasker.submit_task('tests', 'one', input => $1::text::jsonb)")
        .bind(text)
        .fetch_one(&world.pool)
        .await
        .expect("submitted");
    assert_eq!(world.finish(&[fine, edge]).await, ["complete", "complete"]);
    eventually("nothing waits", async || {
        (world.number("select count(*) from tasker.export_batches").await == 0).then_some(())
    })
    .await;
    world.assert_complete().await;
    world.end().await;
}
