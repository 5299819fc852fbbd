//! Every limit of time that a template can set, and what handlers say of their own time.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use tasker_shared::store::views;
use tasker_tests::worker::{Answer, NAMESPACE, answer};
use tasker_worker::{StepContext, StepError, Worker};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::harness::{DEADLINE, Setup, World, eventually};

/// What a task failed of: the class and the words.
async fn failure(world: &World, task: Uuid) -> (String, String) {
    let class = world.of_task(task, "error_type").await.unwrap_or_default();
    (class, world.of_task(task, "reason").await.unwrap_or_default())
}

async fn until_steps(world: &World, task: Uuid, wanted: &[&str]) {
    eventually(&format!("steps are {wanted:?}"), async || (world.steps(task).await == wanted).then_some(())).await;
}

async fn ask(world: &World, call: &str, task: Uuid) {
    let query = sqlx::query_scalar(AssertSqlSafe(format!("select tasker.{call}")));
    let said: String = query.bind(task).fetch_one(&world.pool).await.expect("asked");
    assert_eq!(said, "accepted", "{call}");
}

/// A worker in this process whose one handler `slow` tells its context, beats, and ends when it is
/// asked to.
fn slow_worker(world: &World, stop: &CancellationToken) -> mpsc::UnboundedReceiver<(StepContext, &'static str)> {
    let (tell, heard) = mpsc::unbounded_channel();
    let slow = move |ctx: StepContext, _: Value| {
        let tell = tell.clone();
        async move {
            ctx.heartbeat(json!({"page": 3}));
            tell.send((ctx.clone(), "begun")).expect("a listener");
            ctx.cancellation_token().cancelled().await;
            tell.send((ctx, "asked to stop")).expect("a listener");
            Err::<(), _>(StepError::fail("Stopped", "it was asked to stop"))
        }
    };
    let worker = Worker::builder(&world.url).namespace(NAMESPACE).name("slow-worker").slots(4).handler("slow", slow);
    tokio::spawn(worker.build().expect("a worker").run(stop.clone()));
    heard
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_reaches_a_running_handler_within_a_second_and_its_progress_is_seen_before() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    world.register("slow", "steps: [{name: a, handler: slow, timeouts: {run: 1h}}]").await;
    let stop = CancellationToken::new();
    let mut heard = slow_worker(&world, &stop);
    let task = world.submit("slow").await;
    assert_eq!(heard.recv().await.expect("the handler runs").1, "begun");
    let progress = eventually("its progress is seen", async || {
        let mut conn = world.pool.acquire().await.expect("a connection");
        views::steps(&mut conn, task).await.expect("steps")[0].progress.clone()
    })
    .await;
    assert_eq!(progress, json!({"page": 3}));
    let asked_at = Instant::now();
    ask(&world, "cancel_task($1, 'no more')", task).await;
    assert_eq!(heard.recv().await.expect("the handler is told").1, "asked to stop");
    // Far below a second on a quiet machine; the next heartbeat, after 3.3 s, would be too late on any.
    println!("it was told after {:?}", asked_at.elapsed());
    assert!(asked_at.elapsed() < Duration::from_secs(3), "after {:?}", asked_at.elapsed());
    assert_eq!(world.finish(&[task]).await, ["cancelled"]);
    stop.cancel();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_has_its_total_time_for_all_its_attempts_and_waits() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::by_hand() }).await;
    world.register("sleeper", "steps: [{name: nap, wait: {sleep: 1h}}]").await;
    world
        .register(
            "totals",
            "on_failure: block
steps:
  - {name: retried, handler: broken, retry: {max_attempts: 1000, initial_interval: 1h, max_interval: 1h}, timeouts: {total: 4s}}
  - {name: running, handler: ok, timeouts: {total: 4s, run: 1h}}
  - {name: waiting, wait: {signal: go}, timeouts: {total: 4s}}
  - {name: nested, task: {template: sleeper}, input: {}, timeouts: {total: 4s}}
  - {name: each, handler: ok, for_each: '${input.items}', max_parallel: 2, timeouts: {total: 4s}}
  - {name: quick, handler: ok, timeouts: {total: 4s}}
  - {name: later, handler: ok, depends_on: [waiting], timeouts: {total: 1ms}}",
        )
        .await;
    let request = json!({"template": "totals", "input": {"items": [1, 2, 3, 4]}});
    let task = world.submit_with(request).await.expect("submitted");
    let mut claims = Vec::new();
    let running = world.claim_named(&mut claims, "running").await;
    let retried = world.claim_named(&mut claims, "retried").await;
    let mistake = Answer::Error("Hiccup", true);
    assert_eq!(world.report(&retried, &mistake).await, (true, false));
    world.succeed(&world.claim_named(&mut claims, "quick").await).await;
    let item = world.claim_named(&mut claims, "each").await;
    world.succeed(&item).await;
    assert_eq!(world.finish(&[task]).await, ["blocked_by_failures"]);
    let steps = world.steps(task).await;
    assert_eq!(
        steps,
        [
            "retried: error",
            "running: error",
            "waiting: error",
            "nested: error",
            "each: error",
            "quick: complete",
            "later: pending"
        ]
    );
    let (class, _) = failure(&world, task).await;
    assert_eq!(class, "step_timeout");
    let said = world
        .words(
            "select distinct detail->>'reason' from tasker.transitions where event = 'TotalTimeout' and to_state = 'error'",
        )
        .await;
    assert_eq!(said, ["it took longer than the 4s its template allows, retries and waits included"]);
    // What ran was told, what was started is ended, and so are the items of the map.
    assert_eq!(world.report(&running, &answer(&running)).await, (false, true));
    let nested = eventually("the nested task ends", async || {
        let query = "select state from tasker.tasks where parent_task_uuid is not null and finished_at is not null";
        world.words(query).await.pop()
    })
    .await;
    assert_eq!(nested, "cancelled");
    let items = world.words("select item || ' ' || state from tasker.steps where item >= 0 order by item").await;
    assert_eq!(items, ["0 complete", "1 cancelled", "2 cancelled"]);
    world.assert_sound().await;
    // A retry begins to count anew.
    ask(&world, "retry_task($1, 'once more', null, array['waiting'])", task).await;
    until_waiting(&world, task, "waiting").await;
    ask(&world, "signal_task($1, 'go')", task).await;
    let later = eventually("the step behind it was late at once, or could be claimed", async || {
        let steps = world.steps(task).await;
        (steps[2] == "waiting: complete").then(|| steps[6].clone())
    })
    .await;
    assert!(later == "later: enqueued" || later == "later: error", "{later}");
    ask(&world, "cancel_task($1, 'enough')", task).await;
    // Had the step behind it been late once more, the task would be blocked first, and then cancelled.
    eventually("the task is cancelled", async || {
        (world.words("select state from tasker.tasks where parent_task_uuid is null").await == ["cancelled"])
            .then_some(())
    })
    .await;
    world.assert_complete().await;
    world.end().await;
}

async fn until_waiting(world: &World, task: Uuid, step: &str) {
    let wanted = format!("{step}: waiting");
    eventually("it waits", async || world.steps(task).await.contains(&wanted).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_has_its_total_time_and_a_message_its_time_in_the_queue() {
    let world = World::start(Setup::by_hand()).await;
    world.register("short", "timeouts: {total: 300ms}\nsteps: [{name: nap, wait: {sleep: 1h}}]").await;
    // The hand takes nothing by itself, so it lies in the queue.
    world.register("queued", "steps: [{name: a, handler: ok, timeouts: {queue: 300ms}}]").await;
    world.register("unoffered", "steps: [{name: a, handler: nobody, timeouts: {queue: 300ms}}]").await;
    let (short, queued) = (world.submit("short").await, world.submit("queued").await);
    let unoffered = world.submit("unoffered").await;
    assert_eq!(world.finish(&[short, queued, unoffered]).await, ["error"; 3]);
    let (class, reason) = failure(&world, unoffered).await;
    assert_eq!(class, "queue_timeout");
    assert!(reason.contains("no worker offers its handler"), "{reason}");
    assert_eq!(failure(&world, short).await.0, "timeout");
    assert_eq!(failure(&world, queued).await.0, "queue_timeout");
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_runs_too_long_is_stopped_and_tried_again() {
    let world = World::start(Setup { workers: 0, ..Setup::default() }).await;
    let retry = "retry: {max_attempts: 2, initial_interval: 10ms}";
    world.register("slow", &format!("steps: [{{name: a, handler: slow, timeouts: {{run: 300ms}}, {retry}}}]")).await;
    let stop = CancellationToken::new();
    let mut heard = slow_worker(&world, &stop);
    let task = world.submit("slow").await;
    assert_eq!(world.finish(&[task]).await, ["error"]);
    let (class, reason) = failure(&world, task).await;
    assert_eq!(class, "timeout", "{reason}");
    let mut begun = Vec::new();
    while let Ok((ctx, what)) = heard.try_recv() {
        if what == "begun" {
            begun.push(ctx.attempt());
        }
    }
    assert_eq!(begun, [1, 2]);
    world.assert_complete().await;
    stop.cancel();
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_says_when_to_try_again() {
    let world = World::start(Setup::by_hand()).await;
    world.register("busy", "steps: [{name: a, handler: ok, retry: {initial_interval: 1h, max_interval: 1h}}]").await;
    let task = world.submit("busy").await;
    let claim = world.claim().await;
    let error = json!({"type": "Busy", "message": "come back", "retryable": true, "retry_after_ms": 700});
    let result = json!({"step": claim.step, "token": claim.token, "outcome": "error", "error": error});
    assert_eq!(world.report_raw(&[result]).await, [(true, false)]);
    let asked_at = Instant::now();
    world.until_step(claim.step, &["waiting_for_retry"]).await;
    let again = world.claim().await;
    assert_eq!(again.attempt, 2);
    let waited = asked_at.elapsed();
    assert!(waited > Duration::from_millis(500) && waited < DEADLINE, "{waited:?}");
    world.succeed(&again).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    let due = "select (extract(epoch from (detail->>'until')::timestamptz - began_at) * 1000)::bigint from tasker.transitions where event = 'ScheduleRetry'";
    assert_eq!(world.number(due).await, 700, "as long as the handler said, not what the policy says");
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_exhausted_retries_mean_is_for_the_step_to_say() {
    let world = World::start(Setup::default()).await;
    for policy in ["fail", "block", "continue"] {
        world
            .register(
                policy,
                &format!(
                    "steps:
  - {{name: a, handler: broken, retry: {{on_exhausted: {policy}}}}}
  - {{name: b, handler: ok, depends_on: [a], input: {{}}}}
  - {{name: c, handler: ok}}"
                ),
            )
            .await;
    }
    let mut tasks = Vec::new();
    for policy in ["fail", "block", "continue"] {
        tasks.push(world.submit(policy).await);
    }
    assert_eq!(world.finish(&tasks).await, ["error", "blocked_by_failures", "complete"]);
    assert_eq!(world.steps(tasks[1]).await, ["a: error", "b: pending", "c: complete"]);
    assert_eq!(world.steps(tasks[2]).await, ["a: error", "b: complete", "c: complete"]);
    ask(&world, "skip_step($1, 'a', 'not needed')", tasks[1]).await;
    until_steps(&world, tasks[1], &["a: skipped", "b: complete", "c: complete"]).await;
    assert_eq!(world.finish(&[tasks[1]]).await, ["complete"]);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}
