//! A step that starts a task: it waits for the task's end or only starts it, in one transaction
//! with its own move, and in one trace.

use std::sync::Arc;

use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use tasker_tests::worker::{Answer, Claim, answer};
use uuid::Uuid;

use crate::harness::{DEADLINE, Setup, World, assert_tree, eventually};

const PARENT: &str = "
steps:
  - {name: before, handler: ok}
  - {name: child, task: {template: chain}, depends_on: [before], input: {from: parent}}
  - {name: after, handler: ok, depends_on: [child], input: {got: '${steps.child.output}'}}
";

/// A step that is given something of its own hands it on.
fn work(claim: &Claim) -> Answer {
    let own = ["got", "n", "all"].iter().any(|key| claim.input.get(key).is_some());
    if own { Answer::Success(claim.input.clone()) } else { answer(claim) }
}

async fn world() -> World {
    let world = World::start(Setup { orchestrators: 2, workers: 2, work: Arc::new(work), ..Setup::default() }).await;
    world.register_steps("chain", "a: ok\nb: ok <- a\nc: ok <- a").await;
    world.register("parent", PARENT).await;
    world
}

/// The tasks that a task started, in order.
async fn children(world: &World, task: Uuid) -> Vec<Uuid> {
    sqlx::query_scalar(
        "select child_uuid from tasker.children where task_uuid = $1 and child_uuid is not null order by number",
    )
    .bind(task)
    .fetch_all(&world.pool)
    .await
    .expect("children")
}

/// The first task that a task starts, once it has.
async fn first_child(world: &World, task: Uuid) -> Uuid {
    eventually("a task was started", async || children(world, task).await.pop()).await
}

async fn output(world: &World, task: Uuid, step: &str) -> Option<Value> {
    let query = sqlx::query_scalar("select tasker.step_output($1, $2)");
    query.bind(task).bind(step).fetch_one(&world.pool).await.expect("an output")
}

/// Asks by one of the SQL functions of operators.
async fn ask(world: &World, call: &str, task: Uuid) {
    let query = sqlx::query_scalar(AssertSqlSafe(format!("select tasker.{call}")));
    let said: String = query.bind(task).fetch_one(&world.pool).await.expect("asked");
    assert_eq!(said, "accepted", "{call}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_awaited_task_hands_over_the_outputs_of_its_last_steps() {
    let world = world().await;
    let mut tasks = Vec::new();
    for n in 0..20 {
        let request = json!({"template": "parent", "correlation_id": format!("order-{n}"), "priority": 3});
        tasks.push(world.submit_with(request).await.expect("submitted"));
    }
    assert_eq!(world.finish(&tasks).await, ["complete"; 20]);
    for (n, task) in tasks.iter().enumerate() {
        let child = children(&world, *task).await;
        assert_eq!(child.len(), 1, "one attempt starts one task");
        let got = output(&world, *task, "child").await.expect("an output");
        assert_eq!(
            got.as_object().map(|got| got.keys().cloned().collect::<Vec<_>>()),
            Some(vec!["b".into(), "c".into()])
        );
        assert_eq!(got["b"], output(&world, child[0], "b").await.expect("an output"));
        for (column, wanted) in [
            ("correlation_id", format!("order-{n}")),
            ("parent_correlation_id", format!("order-{n}")),
            ("parent_task_uuid", task.to_string()),
            ("parent_attempt", "1".into()),
            ("priority", "3".into()),
            ("input", r#"{"from": "parent"}"#.into()),
        ] {
            assert_eq!(world.of_task(child[0], column).await, Some(wanted), "{column}");
        }
        assert_eq!(world.of_task(child[0], "trace_id").await, world.of_task(*task, "trace_id").await);
    }
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_awaited_task_hangs_below_the_attempt_that_waits_for_it() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    world.register("parent", "steps: [{name: child, task: {template: one}, input: {}}]").await;
    let task = world.submit("parent").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    let child = first_child(&world, task).await;
    let mut spans = world.spans_of(task);
    spans.extend(world.spans_of(child));
    assert_tree(
        &spans,
        &["task_name", "step_name", "to_state", "wait.reason", "handler_name", "outcome"],
        "
        task.orchestration task_name=parent outcome=success
          task.state_transition to_state=initializing
          task.state_transition to_state=waiting_for_dependencies
          task.state_transition to_state=evaluating_results
          task.state_transition to_state=complete
          step.execution step_name=child outcome=success
            step.state_transition to_state=waiting
            step.state_transition to_state=complete
            task.orchestration task_name=one outcome=success
              task.state_transition to_state=initializing
              task.state_transition to_state=enqueuing_steps
                step.discovery
              task.state_transition to_state=steps_in_process
                step.enqueuing
              task.state_transition to_state=evaluating_results
                result.evaluation
              task.state_transition to_state=complete
              step.execution step_name=a handler_name=ok outcome=success
                step.state_transition to_state=enqueued
                step.state_transition to_state=in_progress
                step.state_transition to_state=enqueued_for_orchestration
                step.state_transition to_state=complete
                step.wait wait.reason=queue
                handler.execution handler_name=ok
                result.submission
          step.wait wait.reason=child",
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_task_has_a_trace_of_its_own_linked_both_ways() {
    let world = world().await;
    world.register("launcher", "steps: [{name: start, task: {template: chain, await: false}, input: {}}]").await;
    let task = world.submit("launcher").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    let child = first_child(&world, task).await;
    assert_eq!(output(&world, task, "start").await, Some(json!({"task": child})));
    assert_eq!(world.finish(&[child]).await, ["complete"]);
    world.queues_drained().await;
    world.assert_complete().await;
    let (ours, theirs) = (world.spans_of(task), world.spans_of(child));
    let named = |spans: &[tasker_tests::receiver::Received], name: &str| {
        spans.iter().find(|span| span.span.name == name).expect("a span").span.clone()
    };
    let (execution, wait) = (named(&ours, "step.execution"), named(&ours, "step.wait"));
    let root = named(&theirs, "task.orchestration");
    assert_ne!(root.trace_id, execution.trace_id);
    assert_eq!((&root.links[0].trace_id, &root.links[0].span_id), (&execution.trace_id, &execution.span_id));
    assert_eq!((&wait.links[0].trace_id, &wait.links[0].span_id), (&root.trace_id, &root.span_id));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_task_is_an_error_of_the_attempt_and_a_retry_starts_another() {
    // The first child of each parent fails for good, the next one does not.
    let work = |claim: &Claim| match claim.handler.as_str() {
        "broken" if claim.input["try"] == json!("first") => Answer::Error("Broken", false),
        "broken" => Answer::Success(json!("well")),
        _ => answer(claim),
    };
    let world = World::start(Setup { orchestrators: 2, workers: 2, work: Arc::new(work), ..Setup::default() }).await;
    world.register("fragile", "steps: [{name: a, handler: broken, input: {try: '${input.try}'}}]").await;
    let parent = |retry: &str| {
        format!(
            "steps: [{{name: child, task: {{template: fragile}}, input: {{try: '${{input.try}}'}}, retry: {{initial_interval: 10ms, {retry}}}}}]"
        )
    };
    world.register("failing", &parent("max_attempts: 2")).await;
    world.register("going_on", &parent("max_attempts: 1, on_exhausted: continue")).await;
    world.register("lacking", "steps: [{name: child, task: {template: nowhere}, input: {}}]").await;
    let with = |template: &str, word: &str| json!({"template": template, "input": {"try": word}});
    let failing = world.submit_with(with("failing", "first")).await.expect("submitted");
    let well = world.submit_with(with("failing", "second")).await.expect("submitted");
    let going_on = world.submit_with(with("going_on", "first")).await.expect("submitted");
    let lacking = world.submit("lacking").await;
    let tasks = [failing, well, going_on, lacking];
    assert_eq!(world.finish(&tasks).await, ["error", "complete", "complete", "error"]);
    let started = children(&world, failing).await;
    assert_eq!(started.len(), 2, "each attempt starts a task of its own");
    assert_eq!(world.of_task(failing, "error_type").await.as_deref(), Some("child_failed"));
    let reason = world.of_task(failing, "reason").await.expect("a reason");
    let wanted = format!("step child failed: task {} of template fragile failed: step a failed: ", started[1]);
    assert!(reason.starts_with(&wanted), "{reason}");
    assert_eq!(world.of_task(lacking, "error_type").await.as_deref(), Some("child_not_created"));
    let reason = world.of_task(lacking, "reason").await.expect("a reason");
    assert!(reason.contains("no template nowhere is registered in namespace tests"), "{reason}");
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_ends_the_wait_ends_the_awaited_task() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::default() }).await;
    world.register("sleeper", "steps: [{name: nap, wait: {sleep: 1h}}]").await;
    world.register("middle", "steps: [{name: inner, task: {template: sleeper}, input: {}}]").await;
    world
        .register(
            "parent",
            "on_failure: block
steps:
  - {name: child, task: {template: middle}, input: {}}
  - {name: free, task: {template: sleeper, await: false}, input: {}}
  - {name: after, handler: ok, depends_on: [child], input: {}}",
        )
        .await;
    let mut ended = Vec::new();
    for act in ["cancel_task($1, 'enough')", "cancel_task($1, 'enough', true)", "skip_step($1, 'child', 'not needed')"]
    {
        let task = world.submit("parent").await;
        let middle = eventually("two tasks were started", async || {
            let started = children(&world, task).await;
            (started.len() == 2).then(|| started[0])
        })
        .await;
        let sleeper = first_child(&world, middle).await;
        ask(&world, act, task).await;
        let state = if act.starts_with("skip") { "complete" } else { "cancelled" };
        assert_eq!(world.finish(&[task, middle, sleeper]).await, [state, "cancelled", "cancelled"], "{act}");
        let reason = world.of_task(middle, "reason").await.expect("a reason");
        assert!(reason.contains(&task.to_string()), "{reason}");
        let free = children(&world, task).await[1];
        assert_eq!(world.of_task(free, "finished_at").await, None, "nobody waits for it");
        ask(&world, "cancel_task($1, 'the test is over')", free).await;
        ended.push(free);
    }
    world.finish(&ended).await;
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_map_starts_a_task_for_each_item_and_keeps_their_order() {
    let world = world().await;
    world.register("double", "steps: [{name: out, handler: ok, input: {n: '${input.n}'}}]").await;
    world
        .register(
            "many",
            "steps:
  - {name: each, for_each: '${input.items}', max_parallel: 4, task: {template: double}, input: {n: '${item}'}}
  - {name: sum, handler: ok, depends_on: [each], input: {all: '${steps.each.output}'}}",
        )
        .await;
    let mut tasks = Vec::new();
    for size in [0, 1, 4, 23] {
        let items: Value = (0..size).collect();
        tasks.push(world.submit_with(json!({"template": "many", "input": {"items": items}})).await.expect("submitted"));
    }
    assert_eq!(world.finish_within(&tasks, DEADLINE * 2).await, ["complete"; 4]);
    for (task, size) in tasks.iter().zip([0, 1, 4, 23]) {
        let wanted: Value = (0..size).map(|n| json!({"out": {"n": n}})).collect();
        assert_eq!(output(&world, *task, "sum").await, Some(json!({"all": wanted})));
        assert_eq!(children(&world, *task).await.len(), size);
    }
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_parent_takes_what_its_task_came_to_and_goes_on_when_it_is_resumed() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    world
        .register(
            "parent",
            "steps:
  - {name: child, task: {template: one}, input: {}}
  - {name: after, handler: ok, depends_on: [child], input: {}}",
        )
        .await;
    let task = world.submit("parent").await;
    let child = first_child(&world, task).await;
    ask(&world, "suspend_task($1, 'a moment')", task).await;
    eventually("it is suspended", async || {
        (world.of_task(task, "state").await.as_deref() == Some("suspended")).then_some(())
    })
    .await;
    let claim = world.claim().await;
    assert_eq!(claim.task, child, "a task of its own goes on");
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[child]).await, ["complete"]);
    eventually("the parent knows", async || {
        (world.steps(task).await == ["child: complete", "after: pending"]).then_some(())
    })
    .await;
    world.assert_sound().await;
    ask(&world, "resume_task($1, 'go on')", task).await;
    let claim = world.claim().await;
    assert_eq!((claim.task, &*claim.step_name), (task, "after"));
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_nest_sixteen_deep_and_no_deeper() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::default() }).await;
    world.register_steps("t17", "a: ok").await;
    for n in 0..17 {
        let next = n + 1;
        world
            .register(
                &format!("t{n}"),
                &format!("steps: [{{name: child, task: {{template: t{next}}}, input: {{}}, retry: {{on_exhausted: continue}}}}, {{name: after, handler: ok, depends_on: [child], input: {{}}}}]"),
            )
            .await;
    }
    let task = world.submit("t0").await;
    assert_eq!(world.finish_within(&[task], DEADLINE * 2).await, ["complete"]);
    assert_eq!(world.number("select max(depth)::bigint from tasker.children where child_uuid is not null").await, 16);
    let refused = world.words("select error from tasker.children where child_uuid is null").await;
    assert_eq!(refused, ["it would be nested more than 16 deep; does a template start itself?"]);
    assert_eq!(world.number("select count(*) from tasker.tasks where state = 'complete'").await, 17);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_starts_ten_thousand_tasks_and_no_more() {
    let world = World::start(Setup::default()).await;
    world.register("sleeper", "steps: [{name: nap, wait: {sleep: 1h}}]").await;
    world
        .register(
            "parent",
            "on_failure: block
steps:
  - {name: ready, wait: {signal: go}}
  - {name: child, task: {template: sleeper}, depends_on: [ready], input: {}}",
        )
        .await;
    let task = world.submit("parent").await;
    eventually("it waits", async || (world.steps(task).await == ["ready: waiting", "child: pending"]).then_some(()))
        .await;
    // As if its steps had started so many before.
    let before = "insert into tasker.children (task_uuid, step_uuid, attempt, number, depth, awaited, error)
                  select $1, gen_random_uuid(), 1, 10000, 1, true, 'a test'";
    sqlx::query(before).bind(task).execute(&world.pool).await.expect("inserted");
    ask(&world, "signal_task($1, 'go')", task).await;
    assert_eq!(world.finish(&[task]).await, ["blocked_by_failures"]);
    let reason = world.of_task(task, "reason").await.expect("a reason");
    assert!(reason.ends_with("its task has started 10000 tasks, the limit; start them from several tasks"), "{reason}");
    assert_eq!(world.number("select count(*) from tasker.tasks").await, 1);
    world.queues_drained().await;
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_look_says_what_a_task_waits_for() {
    let world = World::start(Setup::default()).await;
    world.register("sleeper", "steps: [{name: nap, wait: {signal: wake}}]").await;
    world.register("parent", "steps: [{name: child, task: {template: sleeper}, input: {}}]").await;
    let task = world.submit("parent").await;
    let child = first_child(&world, task).await;
    eventually("the child waits", async || (world.steps(child).await == ["nap: waiting"]).then_some(())).await;
    let mut conn = world.pool.acquire().await.expect("a connection");
    let seen = tasker_shared::store::why::situation(&mut conn, task).await.expect("looked").expect("it is there");
    let sentence = seen.sentence();
    let wanted = format!("waiting: child waits for task {child} of template sleeper (");
    assert!(sentence.starts_with(&wanted), "{sentence}");
    assert!(sentence.contains("; that is waiting: nap waits for the signal wake"), "{sentence}");
    drop(conn);
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_that_start_each_other_end_at_the_limit_whatever_their_retries() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::default() }).await;
    let starts = |other: &str| {
        format!(
            "steps: [{{name: child, task: {{template: {other}}}, retry: {{max_attempts: 5, initial_interval: 1ms}}}}]"
        )
    };
    world.register("ping", &starts("pong")).await;
    world.register("pong", &starts("ping")).await;
    let task = world.submit("ping").await;
    assert_eq!(world.finish(&[task]).await, ["error"]);
    assert_eq!(world.of_task(task, "error_type").await.as_deref(), Some("nested_too_deep"));
    assert_eq!(world.number("select count(*) from tasker.tasks").await, 17, "nothing was tried again");
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}
