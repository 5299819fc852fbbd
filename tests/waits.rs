//! A step without a handler waits for a time or a signal, costs its row, and loses nothing.

use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{Setup, World, assert_tree, eventually};

/// Sends a signal; answers `accepted`, or why not.
async fn signal(world: &World, task: Uuid, name: &str, payload: Value) -> String {
    sqlx::query_scalar("select tasker.signal_task(task => $1, name => $2, payload => $3, actor => 'ada')")
        .bind(task)
        .bind(name)
        .bind(payload)
        .fetch_one(&world.pool)
        .await
        .expect("signal_task")
}

async fn until_waiting(world: &World, task: Uuid, steps: i64) {
    eventually(&format!("{steps} steps wait"), async || {
        let query = sqlx::query_scalar("select count(*) from tasker.steps where task_uuid = $1 and state = 'waiting'");
        let waiting: i64 = query.bind(task).fetch_one(&world.pool).await.expect("steps");
        (waiting == steps).then_some(())
    })
    .await;
}

async fn output(world: &World, task: Uuid, step: &str) -> Option<Value> {
    sqlx::query_scalar("select tasker.step_output($1, $2)")
        .bind(task)
        .bind(step)
        .fetch_one(&world.pool)
        .await
        .expect("an output")
}

const APPROVAL: &str = "
steps:
  - {name: quote, handler: ok}
  - {name: approval, wait: {signal: approved, allowed: [approve, reject], timeout: 1h}, depends_on: [quote]}
  - {name: ship, handler: ok, depends_on: [approval], input: {answer: '${steps.approval.output.answer}'}}";

#[tokio::test(flavor = "multi_thread")]
async fn two_orchestrators_give_each_of_many_waits_its_end_once() {
    let world = World::start(Setup { orchestrators: 2, workers: 2, ..Setup::default() }).await;
    world.register("approval", APPROVAL).await;
    world.register("nap", "steps: [{name: a, handler: ok}, {name: b, wait: {sleep: 200ms}, depends_on: [a]}, {name: c, handler: ok, depends_on: [b]}]").await;
    let mut tasks = Vec::new();
    for n in 0..40 {
        let task = world.submit(if n % 2 == 0 { "approval" } else { "nap" }).await;
        if n % 2 == 0 {
            // Some come before the task has begun, some while it waits.
            assert_eq!(signal(&world, task, "approved", json!({"answer": "approve", "n": n})).await, "accepted");
        }
        tasks.push(task);
    }
    assert_eq!(world.finish(&tasks).await, ["complete"; 40]);
    world.queues_drained().await;
    world.assert_complete().await;
    for (n, task) in tasks.iter().enumerate().step_by(2) {
        assert_eq!(output(&world, *task, "approval").await, Some(json!({"answer": "approve", "n": n})));
    }
    assert_eq!(world.number("select count(*) from tasker.signals").await, 0);
    let timers = world.number("select count(*) from tasker.due where kind = 'timer'").await;
    assert_eq!(timers, 0, "the timeouts of the approvals went with their waits");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_is_a_span_below_the_root_that_names_who_ended_it() {
    let world = World::start(Setup::default()).await;
    world
        .register("ask", "steps: [{name: a, wait: {signal: go}}, {name: b, wait: {sleep: 1ms}, depends_on: [a]}]")
        .await;
    let task = world.submit("ask").await;
    until_waiting(&world, task, 1).await;
    assert_eq!(world.of_task(task, "state").await.as_deref(), Some("waiting_for_dependencies"));
    world.assert_sound().await;
    assert_eq!(signal(&world, task, "go", json!([1, 2])).await, "accepted");
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    assert_eq!(output(&world, task, "a").await, Some(json!([1, 2])));
    world.assert_complete().await;
    assert_tree(
        &world.spans_of(task),
        &["from_state", "to_state", "event", "wait.reason", "actor"],
        "
        task.orchestration
          task.state_transition from_state=pending to_state=initializing event=Start
          task.state_transition from_state=initializing to_state=waiting_for_dependencies event=NoDependenciesReady
          task.state_transition from_state=waiting_for_dependencies to_state=evaluating_results event=StepCompleted
          task.state_transition from_state=waiting_for_dependencies to_state=evaluating_results event=StepCompleted
          task.state_transition from_state=evaluating_results to_state=waiting_for_dependencies event=NoDependenciesReady
          task.state_transition from_state=evaluating_results to_state=complete event=AllStepsSuccessful
          step.state_transition from_state=pending to_state=waiting event=BeginWait
          step.state_transition from_state=waiting to_state=complete event=SignalReceived actor=ada
          step.state_transition from_state=pending to_state=waiting event=BeginWait
          step.state_transition from_state=waiting to_state=complete event=TimerFired
          step.wait wait.reason=signal actor=ada
          step.wait wait.reason=timer",
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_that_cannot_help_is_refused_with_the_reason() {
    let world = World::start(Setup::default()).await;
    world.register("approval", APPROVAL).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("approval").await;
    until_waiting(&world, task, 1).await;
    let refused = signal(&world, task, "paid", json!({})).await;
    assert!(refused.ends_with("it waits for: approved"), "{refused}");
    let refused = signal(&world, task, "approved", json!({"answer": "perhaps"})).await;
    assert_eq!(refused, "payload: answer must be one of: approve, reject");
    // The same as a raw message is quarantined.
    world.send("task_requests", &json!({"v": 1, "type": "signal", "task": task, "name": "paid"}), None).await;
    eventually("the raw signal is in quarantine", async || {
        (world.number("select count(*) from tasker.quarantine where reason like '%waits for: approved'").await == 1)
            .then_some(())
    })
    .await;
    let raw = json!({"v": 1, "type": "signal", "task": task, "name": "approved", "payload": {"answer": "reject"}, "actor": "carl"});
    world.send("task_requests", &raw, None).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    assert_eq!(output(&world, task, "approval").await, Some(json!({"answer": "reject"})));
    assert_eq!(signal(&world, task, "approved", json!({})).await, "the task has already ended (completed)");
    let other = world.submit("one").await;
    world.finish(&[other]).await;
    assert_eq!(signal(&world, Uuid::nil(), "approved", json!({})).await, "no such task");
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_in_vain_fails_or_goes_on_and_a_cancelled_one_ends() {
    let world = World::start(Setup::default()).await;
    world.register("fails", "steps: [{name: a, wait: {signal: go, timeout: 20ms}}]").await;
    world.register("goes_on", "steps: [{name: a, wait: {signal: go, timeout: 20ms, on_timeout: continue}}]").await;
    world.register("sleeps", "steps: [{name: a, wait: {sleep: 30d}}]").await;
    world.register("until", "steps: [{name: a, wait: {until: '${input.at}'}}]").await;
    let (fails, goes_on, sleeps) =
        (world.submit("fails").await, world.submit("goes_on").await, world.submit("sleeps").await);
    let until =
        async |at: &str| world.submit_with(json!({"template": "until", "input": {"at": at}})).await.expect("submitted");
    let (past, nonsense) = (until("2001-01-01T00:00:00Z").await, until("soon").await);
    assert_eq!(world.finish(&[fails, goes_on, past, nonsense]).await, ["error", "complete", "complete", "error"]);
    assert_eq!(output(&world, goes_on, "a").await, Some(json!({"timed_out": true})));
    assert_eq!(world.of_task(fails, "error_type").await.as_deref(), Some("timeout"));
    assert_eq!(world.of_task(nonsense, "error_type").await.as_deref(), Some("invalid_until"));
    until_waiting(&world, sleeps, 1).await;
    world.send("task_requests", &json!({"v": 1, "type": "cancel", "task": sleeps}), None).await;
    assert_eq!(world.finish(&[sleeps]).await, ["cancelled"]);
    world.queues_drained().await;
    world.assert_complete().await;
    let waits: Vec<_> =
        world.spans_of(sleeps).iter().filter_map(|span| span.text("wait.reason").map(str::to_owned)).collect();
    assert_eq!(waits, ["timer"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleep_goes_on_after_the_orchestrator_that_began_it_is_killed() {
    let mut world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    world.register("nap", "steps: [{name: a, wait: {sleep: 300ms}}, {name: b, handler: ok, depends_on: [a]}]").await;
    let killed = world.orchestrator_process().await;
    let task = world.submit("nap").await;
    until_waiting(&world, task, 1).await;
    killed.kill().await;
    world.add_orchestrator().await;
    assert_eq!(world.finish_within(&[task], Duration::from_secs(30)).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}
