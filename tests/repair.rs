//! A person repairs what failed: by hand, one step at a time, from a chosen step, or many at once.

use serde_json::{Value, json};
use sqlx::Row;
use tasker_tests::worker::Answer;
use uuid::Uuid;

use crate::harness::{Setup, World};

async fn ask(world: &World, statement: &'static str, task: Uuid) -> String {
    sqlx::query_scalar(statement).bind(task).fetch_one(&world.pool).await.expect("asked")
}

/// Two failures that block, and a step behind each.
async fn blocked(world: &World, name: &str) -> Uuid {
    world
        .register(
            name,
            "on_failure: block\nsteps:
  - {name: a, handler: broken}
  - {name: b, handler: broken}
  - {name: c, handler: ok, depends_on: [a], input: {n: \"${steps.a.output.n}\"}}
  - {name: d, handler: ok, depends_on: [b]}",
        )
        .await;
    let task = world.submit(name).await;
    let mut claims = Vec::new();
    for step in ["a", "b"] {
        let claim = world.claim_named(&mut claims, step).await;
        world.report(&claim, &Answer::Error("Broken", false)).await;
    }
    assert_eq!(world.finish(&[task]).await, ["blocked_by_failures"]);
    task
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_are_settled_by_hand_and_those_behind_them_read_what_was_given() {
    let world = World::start(Setup::by_hand()).await;
    let task = blocked(&world, "broken").await;
    let complete = "select tasker.complete_step($1, 'a', '{\"n\": 7}', 'did it by hand', 'ann')";
    assert_eq!(ask(&world, complete, task).await, "accepted");
    let c = world.claim().await;
    assert_eq!((&*c.step_name, &c.input), ("c", &json!({"n": 7})));
    world.succeed(&c).await;
    assert_eq!(ask(&world, complete, task).await, "step a is complete already");
    assert_eq!(
        ask(&world, "select tasker.skip_step($1, 'nothing')", task).await,
        "step: the template has no step nothing"
    );
    assert_eq!(ask(&world, "select tasker.retry_task($1, 'again', 'ann', '{b}')", task).await, "accepted");
    let b = world.claim().await;
    assert_eq!((&*b.step_name, b.attempt), ("b", 2));
    // While it runs, it is skipped: its claim is gone, and what stands behind it goes on.
    assert_eq!(ask(&world, "select tasker.skip_step($1, 'b', 'not needed', 'ann')", task).await, "accepted");
    let d = world.claim().await;
    assert_eq!(&*d.step_name, "d");
    assert_eq!(world.report(&b, &Answer::Success(json!({}))).await, (false, true), "too late");
    world.succeed(&d).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    assert_eq!(world.steps(task).await, ["a: complete", "b: skipped", "c: complete", "d: complete"]);
    world.assert_complete().await;
    let audit = world
        .words("select format('%s %s: %s', action, details->'steps'->>0, reason) from tasker.audit order by audit_id")
        .await;
    assert_eq!(audit, ["complete_step a: did it by hand", "retry b: again", "skip_step b: not needed"]);
    for statement in ["update tasker.audit set actor = 'bob'", "delete from tasker.audit", "truncate tasker.audit"] {
        let refused = sqlx::query(statement).execute(&world.pool).await.expect_err("it is append-only");
        assert!(refused.to_string().contains("append-only"), "{refused}");
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_task_is_given_up_or_resolved() {
    let world = World::start(Setup::by_hand()).await;
    for (statement, state, status) in [
        ("select tasker.give_up_task($1, 'no use', 'ann')", "error", "failed"),
        ("select tasker.resolve_task($1, 'paid by phone', 'ann')", "resolved_manually", "completed"),
    ] {
        let task = blocked(&world, state).await;
        assert_eq!(ask(&world, statement, task).await, "accepted");
        crate::harness::eventually("it has ended", async || {
            (world.of_task(task, "state").await.as_deref() == Some(state)).then_some(())
        })
        .await;
        assert_eq!(ask(&world, statement, task).await, format!("the task has already ended ({status})"));
        let reason = world.of_task(task, "reason").await.unwrap_or_default();
        assert!(reason.contains(" by ann ("), "{reason}");
    }
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rerun_begins_at_the_chosen_step_and_keeps_the_rest() {
    let world = World::start(Setup { orchestrators: 2, workers: 1, rust_workers: 1, ..Setup::default() }).await;
    world.register_steps("diamond", "a: ok\nb: ok <- a\nc: ok <- a\nd: ok <- b c").await;
    let task = world.submit("diamond").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    let rerun = "select tasker.rerun_task($1, '{b}', 'other data', 'ann')";
    assert_eq!(ask(&world, rerun, task).await, "accepted");
    crate::harness::eventually("the second generation has ended", async || {
        let now = (world.of_task(task, "generation").await, world.of_task(task, "state").await);
        (now == (Some("2".into()), Some("complete".into()))).then_some(())
    })
    .await;
    let attempts: Vec<i32> = sqlx::query("select attempt from tasker.steps where task_uuid = $1 order by step_index")
        .bind(task)
        .fetch_all(&world.pool)
        .await
        .expect("steps")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(attempts, [1, 2, 1, 2]);
    world.assert_complete().await;
    let spans = world.spans_of(task);
    let roots: Vec<_> = spans.iter().filter(|span| span.span.name == "task.orchestration").collect();
    let second = roots.iter().find(|span| span.int("generation") == Some(2)).expect("a root of its own");
    let first = roots.iter().find(|span| span.int("generation") == Some(1)).expect("the first one");
    assert_eq!(second.span.links[0].span_id, first.span.span_id);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_are_asked_at_once_and_a_dry_run_changes_nothing() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let mut tasks = Vec::new();
    for _ in 0..5 {
        tasks.push(world.submit("one").await);
    }
    let act = async |dry_run: bool, page: i32| -> Value {
        sqlx::query_scalar("select tasker.act_on_tasks('{\"template\": \"one\"}', 'cancel', 'too many', 'ann', $1, $2)")
            .bind(dry_run)
            .bind(page)
            .fetch_one(&world.pool)
            .await
            .expect("asked")
    };
    let dry = act(true, 3).await;
    assert_eq!((&dry["matched"], &dry["asked"], &dry["next"]), (&json!(3), &json!(0), &json!(tasks[2])));
    assert_eq!(world.number("select count(*) from tasker.audit").await, 0);
    let done = act(false, 100).await;
    assert_eq!((&done["matched"], &done["asked"], &done["next"]), (&json!(5), &json!(5), &Value::Null));
    assert_eq!(world.finish(&tasks).await, ["cancelled"; 5]);
    assert_eq!(act(false, 100).await["matched"], json!(0), "what has ended does not match any more");
    assert_eq!(world.number("select count(*) from tasker.audit").await, 5);
    let everything = sqlx::query("select tasker.act_on_tasks('{}', 'cancel')").execute(&world.pool).await;
    assert!(everything.expect_err("it must say which").to_string().contains("must say which tasks"));
    world.assert_complete().await;
    world.end().await;
}
