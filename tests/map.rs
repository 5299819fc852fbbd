//! A step run once for each item of a list that is known only at run time.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use tasker_tests::worker::{Answer, Claim};

use crate::harness::{DEADLINE, Setup, World, assert_tree, storm};

/// Items say what is to become of them: a number is doubled, `flaky` fails once, `broken` always.
fn work(claim: &Claim) -> Answer {
    match &claim.input["value"] {
        Value::Number(n) => Answer::Success(json!(n.as_i64().unwrap_or_default() * 2)),
        Value::String(word) if word == "flaky" && claim.attempt == 1 => Answer::Error("Hiccup", true),
        Value::String(word) if word == "flaky" => Answer::Success(json!("late")),
        Value::String(_) => Answer::Error("Broken", false),
        // Every other step hands on what it was given.
        _ => Answer::Success(claim.input.clone()),
    }
}

fn template(map: &str) -> String {
    format!(
        "
steps:
  - {{name: list, handler: ok, input: {{items: '${{input.items}}'}}}}
  - {{name: each, handler: ok, depends_on: [list], for_each: '${{steps.list.output.items}}',
     input: {{value: '${{item}}', place: '${{item_index}}'}}, retry: {{initial_interval: 10ms}}{map}}}
  - {{name: sum, handler: ok, depends_on: [each], input: {{all: '${{steps.each.output}}'}}}}
"
    )
}

async fn world(orchestrators: usize, workers: usize) -> World {
    World::start(Setup { orchestrators, workers, work: Arc::new(work), ..Setup::default() }).await
}

async fn submit(world: &World, template: &str, items: Value) -> uuid::Uuid {
    world.submit_with(json!({"template": template, "input": {"items": items}})).await.expect("submitted")
}

async fn given_to_sum(world: &World, task: uuid::Uuid) -> Value {
    sqlx::query_scalar("select input from tasker.steps where task_uuid = $1 and step_index = 2")
        .bind(task)
        .fetch_one(&world.pool)
        .await
        .expect("the last step")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_item_runs_once_and_the_outputs_come_in_order() {
    let world = world(2, 2).await;
    world.register("map", &template(", max_parallel: 7")).await;
    let sizes = [1, 2, 7, 8, 100, storm(250, 5000)];
    let mut tasks = Vec::new();
    for size in sizes {
        tasks.push(submit(&world, "map", (0..size).collect::<Value>()).await);
    }
    assert_eq!(world.finish_within(&tasks, DEADLINE * 5).await, ["complete"; 6]);
    for (size, task) in sizes.into_iter().zip(&tasks) {
        let doubled: Value = (0..size).map(|n| n * 2).collect();
        assert_eq!(given_to_sum(&world, *task).await["all"], doubled);
    }
    let most_open = world
        .number(
            "with moves as (
               select r.task_uuid, r.at, case when r.from_state = 'pending' then 1 else -1 end as n
               from tasker.transitions r join tasker.steps s on s.step_uuid = r.entity_uuid and s.item >= 0
               where r.from_state = 'pending' or r.event = 'Complete')
             select max(open) from (select sum(n) over (partition by task_uuid order by at) as open from moves) m",
        )
        .await;
    assert_eq!(most_open, 7, "max_parallel");
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_items_mean_what_the_template_says() {
    let world = world(1, 1).await;
    world.register("fail", &template("")).await;
    world.register("continue", &template(", on_item_failure: continue")).await;
    world.register("count", &template(", on_item_failure: {threshold: 1}")).await;
    world.register("share", &template(", on_item_failure: {threshold: 50%}")).await;
    world.register("block", &format!("on_failure: block\n{}", template(", max_parallel: 2"))).await;
    let one = json!([1, "broken", "flaky", 4]);
    let two = json!([1, "broken", "broken", 4]);
    let three = json!(["broken", "broken", "broken", 4]);
    let mut tasks = BTreeMap::new();
    for (template, items, ends) in [
        ("fail", &one, "error"),
        ("continue", &three, "complete"),
        ("count", &one, "complete"),
        ("count", &two, "error"),
        ("share", &two, "complete"),
        ("share", &three, "error"),
        ("block", &one, "blocked_by_failures"),
    ] {
        tasks.insert(submit(&world, template, items.clone()).await, (template, ends));
    }
    let uuids: Vec<_> = tasks.keys().copied().collect();
    let ends: Vec<_> = tasks.values().map(|(_, ends)| *ends).collect();
    assert_eq!(world.finish(&uuids).await, ends);
    for (task, (template, ends)) in &tasks {
        if *ends == "complete" {
            let expected = match *template {
                "continue" => json!([null, null, null, 8]),
                "count" => json!([2, null, "late", 8]),
                _ => json!([2, null, null, 8]),
            };
            assert_eq!(given_to_sum(&world, *task).await["all"], expected, "{template}");
        } else {
            assert_eq!(world.of_task(*task, "error_type").await.as_deref(), Some("items_failed"));
            let reason = world.of_task(*task, "reason").await.unwrap_or_default();
            assert!(reason.starts_with("step each failed: ") && reason.contains("items failed"), "{reason}");
        }
    }
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_list_fails_the_map_alone_and_an_empty_list_is_done() {
    let world = world(1, 1).await;
    world.register("map", &template("")).await;
    let empty = submit(&world, "map", json!([])).await;
    let text = submit(&world, "map", json!("text")).await;
    let missing = world.submit_with(json!({"template": "map", "input": {"items": null}})).await.expect("submitted");
    world.register("root", "steps: [{name: a, handler: ok, for_each: '${input.list}'}]").await;
    let root = world.submit_with(json!({"template": "root", "input": {"list": []}})).await.expect("submitted");
    assert_eq!(world.finish(&[empty, text, missing, root]).await, ["complete", "error", "error", "complete"]);
    assert_eq!(world.steps(text).await, ["list: complete", "each: error", "sum: cancelled"]);
    assert_eq!(world.of_task(text, "error_type").await.as_deref(), Some("not_a_list"));
    let reason = world.of_task(text, "reason").await.unwrap_or_default();
    assert_eq!(reason, "step each failed: for_each reads ${steps.list.output.items}, but it is a string, not a list");
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_map_keeps_the_items_that_are_done() {
    let broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let cured = broken.clone();
    let work = move |claim: &Claim| match &claim.input["value"] {
        Value::Number(n) if n.as_i64() == Some(3) && cured.load(std::sync::atomic::Ordering::Relaxed) => {
            Answer::Error("Broken", false)
        }
        _ => work(claim),
    };
    let world = World::start(Setup { work: Arc::new(work), ..Setup::default() }).await;
    world.register("map", &template(", max_parallel: 1")).await;
    let task = submit(&world, "map", json!([1, 2, 3, 4, 5])).await;
    assert_eq!(world.finish(&[task]).await, ["error"]);
    broken.store(false, std::sync::atomic::Ordering::Relaxed);
    let answer: String = sqlx::query_scalar("select tasker.retry_task($1, 'cured')")
        .bind(task)
        .fetch_one(&world.pool)
        .await
        .expect("asked");
    assert_eq!(answer, "accepted");
    crate::harness::eventually("the next generation", async || {
        (world.of_task(task, "generation").await.as_deref() == Some("2")).then_some(())
    })
    .await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    assert_eq!(given_to_sum(&world, task).await["all"], json!([2, 4, 6, 8, 10]));
    assert_eq!(
        world.words("select attempt::text from tasker.steps where item >= 0 order by item").await,
        ["1", "1", "2", "1", "1"]
    );
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_reaches_the_items() {
    let world = World::start(Setup::by_hand()).await;
    world.register("map", "steps: [{name: each, handler: ok, for_each: '${input.items}', max_parallel: 2}]").await;
    let task = submit(&world, "map", json!([1, 2, 3])).await;
    let claim = world.claim().await;
    assert_eq!(claim.input["item"], claim.input["item_index"].as_i64().map(|n| json!(n + 1)).unwrap_or_default());
    let _: String =
        sqlx::query_scalar("select tasker.cancel_task($1)").bind(task).fetch_one(&world.pool).await.expect("asked");
    assert_eq!(world.finish(&[task]).await, ["cancelled"]);
    assert_eq!(world.words("select state from tasker.steps order by item").await, ["cancelled"; 3]);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_maps_spans_are_its_wait_and_an_attempt_for_each_item() {
    let world = world(1, 1).await;
    world
        .register("map", "steps: [{name: each, handler: ok, for_each: '${input.items}', input: {value: '${item}'}}]")
        .await;
    let task = submit(&world, "map", json!([1, 2])).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    let spans: Vec<_> = world
        .spans_of(task)
        .into_iter()
        .filter(|span| {
            !matches!(
                span.span.name.as_str(),
                "task.state_transition"
                    | "step.discovery"
                    | "step.enqueuing"
                    | "result.evaluation"
                    | "handler.execution"
                    | "result.submission"
            )
        })
        .filter(|span| {
            span.text("event") != Some("Claim")
                && span.text("event") != Some("Report")
                && span.text("wait.reason") != Some("queue")
        })
        .collect();
    assert_tree(
        &spans,
        &["step_name", "step_index", "event", "wait.reason", "outcome"],
        "
        task.orchestration outcome=success
          step.execution step_name=each step_index=0 outcome=success
            step.state_transition event=Complete
            step.state_transition event=Enqueue
          step.execution step_name=each step_index=1 outcome=success
            step.state_transition event=Complete
            step.state_transition event=Enqueue
          step.state_transition event=BeginWait
          step.state_transition event=ItemsDone
          step.wait wait.reason=items
    ",
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_map_that_is_settled_by_hand_ends_its_open_items_and_may_be_run_again() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::by_hand() }).await;
    world.register("map", &template(", max_parallel: 3")).await;
    for (act, output) in [("complete_step($1, 'each', '[1]')", json!([1])), ("skip_step($1, 'each')", Value::Null)] {
        let task = submit(&world, "map", json!([1, 2, 3, 4, 5])).await;
        let list = world.claim().await;
        let items = json!({"items": [1, 2, 3, 4, 5]});
        assert_eq!(world.report(&list, &Answer::Success(items)).await, (true, false));
        let (done, running, failed) = (world.claim().await, world.claim().await, world.claim().await);
        world.succeed(&done).await;
        assert_eq!(world.report(&failed, &Answer::Error("Hiccup", true)).await, (true, false));
        world.until_step(failed.step, &["waiting_for_retry", "enqueued"]).await;
        let asked: String = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select tasker.{act}")))
            .bind(task)
            .fetch_one(&world.pool)
            .await
            .expect("asked");
        assert_eq!(asked, "accepted");
        world.until_step(running.step, &["cancelled"]).await;
        assert_eq!(world.report(&running, &work(&running)).await, (false, true), "its worker was told");
        let sum = world.claim().await;
        assert_eq!((&*sum.step_name, &sum.input["all"]), ("sum", &output));
        world.succeed(&sum).await;
        assert_eq!(world.finish(&[task]).await, ["complete"]);
        let open = "select count(*) from tasker.steps where item >= 0 and state not in ('complete', 'cancelled')";
        assert_eq!(world.number(open).await, 0);
        world.queues_drained().await;
        world.assert_complete().await;
        // What was cancelled, and what was never created, runs now.
        let asked: String = sqlx::query_scalar("select tasker.rerun_task($1, array['each'], 'do it after all')")
            .bind(task)
            .fetch_one(&world.pool)
            .await
            .expect("asked");
        assert_eq!(asked, "accepted");
        for _ in 0..5 {
            let item = world.claim().await;
            assert_eq!(item.step_name, "each");
            assert_eq!(world.report(&item, &work(&item)).await, (true, false));
        }
        let sum = world.claim().await;
        assert_eq!(sum.input["all"], json!([2, 4, 6, 8, 10]));
        world.succeed(&sum).await;
        assert_eq!(world.finish(&[task]).await, ["complete"]);
        world.queues_drained().await;
        world.assert_complete().await;
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rerun_from_before_a_map_reads_the_new_list_and_runs_its_items_after_it() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::by_hand() }).await;
    world.register("map", &template(", max_parallel: 2")).await;
    let task = submit(&world, "map", json!([])).await;
    for (items, doubled) in
        [(json!([1, 2, 3]), json!([2, 4, 6])), (json!([5, 6]), json!([10, 12])), (json!([]), json!([]))]
    {
        let list = world.claim().await;
        assert_eq!(list.step_name, "list", "nothing runs before the list is there");
        assert_eq!(world.report(&list, &Answer::Success(json!({"items": items}))).await, (true, false));
        for _ in 0..items.as_array().map_or(0, Vec::len) {
            let item = world.claim().await;
            assert_eq!(item.step_name, "each");
            assert_eq!(world.report(&item, &work(&item)).await, (true, false));
        }
        let sum = world.claim().await;
        assert_eq!(sum.input["all"], doubled);
        world.succeed(&sum).await;
        assert_eq!(world.finish(&[task]).await, ["complete"]);
        world.queues_drained().await;
        world.assert_complete().await;
        let asked: String = sqlx::query_scalar("select tasker.rerun_task($1, array['list'], 'another list')")
            .bind(task)
            .fetch_one(&world.pool)
            .await
            .expect("asked");
        assert_eq!(asked, "accepted");
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_list_holds_up_what_follows_until_somebody_settles_it() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::by_hand() }).await;
    let steps = "on_failure: block\nsteps:\n  - {name: each, handler: ok, for_each: '${input.items}', retry: {on_exhausted: continue}}\n  \
                 - {name: sum, handler: ok, depends_on: [each], input: {all: '${steps.each.output}'}}\n";
    world.register("map", steps).await;
    let task = submit(&world, "map", json!(7)).await;
    assert_eq!(world.finish(&[task]).await, ["blocked_by_failures"]);
    let asked: String = sqlx::query_scalar("select tasker.complete_step($1, 'each', '[1]', 'counted by hand')")
        .bind(task)
        .fetch_one(&world.pool)
        .await
        .expect("asked");
    assert_eq!(asked, "accepted");
    let sum = world.claim().await;
    assert_eq!(sum.input["all"], json!([1]));
    world.succeed(&sum).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}
