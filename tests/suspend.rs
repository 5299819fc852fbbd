//! A suspended task finishes what runs and begins nothing; resumed, it goes on as if nothing had been.

use serde_json::json;
use tasker_orchestration::lifecycle::queue::{self, TASK_REQUESTS};
use tasker_orchestration::lifecycle::{Shared, inbox};

use tasker_tests::worker::{self, Answer, HANDLERS, answer};
use uuid::Uuid;

use crate::harness::{DEADLINE, Setup, World, eventually};
use crate::two_orchestrators_two_workers::{assert_outcomes, register_mix, submit_mix};

/// Asks by one of the functions that take a task, a reason and an actor.
async fn ask(world: &World, function: &str, task: Uuid) -> String {
    let query =
        sqlx::AssertSqlSafe(format!("select tasker.{function}(task => $1, reason => 'wait for ann', actor => 'ann')"));
    sqlx::query_scalar(query).bind(task).fetch_one(&world.pool).await.expect("asked")
}

async fn until_state(world: &World, task: Uuid, state: &str) {
    eventually(&format!("the task is {state}"), async || {
        (world.of_task(task, "state").await.as_deref() == Some(state)).then_some(())
    })
    .await;
}

async fn suspend(world: &World, task: Uuid) {
    assert_eq!(ask(world, "suspend_task", task).await, "accepted");
    until_state(world, task, "suspended").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_finishes_and_nothing_new_is_sent() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("chain", "a: ok\nb: ok <- a").await;
    let task = world.submit("chain").await;
    let a = world.claim().await;
    suspend(&world, task).await;
    assert_eq!(world.of_task(task, "suspended_from").await.as_deref(), Some("steps_in_process"));
    assert_eq!(ask(&world, "suspend_task", task).await, "the task is suspended already");
    world.succeed(&a).await;
    assert_eq!(world.steps(task).await, ["a: complete", "b: pending"]);
    assert_eq!(world.of_task(task, "state").await.as_deref(), Some("suspended"));
    world.queues_drained().await;
    world.assert_sound().await;

    assert_eq!(ask(&world, "resume_task", task).await, "accepted");
    let b = world.claim().await;
    assert_eq!((&*b.step_name, b.attempt), ("b", 1));
    assert_eq!(ask(&world, "resume_task", task).await, "the task is running; only a suspended task can be resumed");
    world.succeed(&b).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    assert_eq!(world.of_task(task, "suspended_from").await, None);
    world.assert_complete().await;
    let spans = world.spans_of(task);
    for event in ["Suspend", "Resume"] {
        let moved = spans.iter().find(|span| span.text("event") == Some(event)).expect("it is in the trace");
        assert_eq!(moved.text("actor"), Some("ann"));
    }
    assert!(spans.iter().any(|span| span.text("wait.reason") == Some("suspended")), "b waited for the resume");
    let audit =
        world.words("select format('%s by %s: %s', action, actor, reason) from tasker.audit order by audit_id").await;
    assert_eq!(audit, ["suspend by ann: wait for ann", "resume by ann: wait for ann"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_was_dropped_meanwhile_is_sent_again() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    eventually("its step is enqueued", async || (world.steps(task).await == ["a: enqueued"]).then_some(())).await;
    suspend(&world, task).await;
    let mut conn = world.pool.acquire().await.expect("a connection");
    assert!(worker::claim(&mut conn, "hand", None, &HANDLERS, 1).await.expect("asked").is_empty());
    drop(conn);
    world.queues_drained().await;
    assert_eq!(world.steps(task).await, ["a: enqueued"]);

    ask(&world, "resume_task", task).await;
    let a = world.claim().await;
    assert_eq!((a.task, a.attempt), (task, 1), "the same attempt");
    world.succeed(&a).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_came_due_meanwhile_and_a_failure_are_made_up_for() {
    let world = World::start(Setup::by_hand()).await;
    world.register("flaky", "steps: [{name: a, handler: flaky, retry: {initial_interval: 10ms}}]").await;
    world.register_steps("fails", "a: broken\nb: ok").await;
    let flaky = world.submit("flaky").await;
    let claim = world.claim().await;
    suspend(&world, flaky).await;
    world.report(&claim, &answer(&claim)).await;
    world.until_step(claim.step, &["waiting_for_retry"]).await;
    eventually("the hint of its retry is gone", async || {
        (world.number("select count(*) from tasker.due where kind = 'retry'").await == 0).then_some(())
    })
    .await;
    ask(&world, "resume_task", flaky).await;
    let again = world.claim().await;
    assert_eq!((again.task, again.attempt), (flaky, 2));
    world.succeed(&again).await;
    assert_eq!(world.finish(&[flaky]).await, ["complete"]);

    let fails = world.submit("fails").await;
    let mut claims = Vec::new();
    let a = world.claim_named(&mut claims, "a").await;
    suspend(&world, fails).await;
    world.report(&a, &Answer::Error("Broken", false)).await;
    world.until_step(a.step, &["error"]).await;
    assert_eq!(world.of_task(fails, "state").await.as_deref(), Some("suspended"), "it does not end by itself");
    ask(&world, "resume_task", fails).await;
    assert_eq!(world.finish(&[fails]).await, ["error"]);
    assert_eq!(world.of_task(fails, "error_type").await.as_deref(), Some("Broken"));
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_has_not_begun_is_suspended_too() {
    let world = World::start(Setup { orchestrators: 0, ..Setup::by_hand() }).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    assert_eq!(ask(&world, "suspend_task", task).await, "accepted");
    let mut world = world;
    world.add_orchestrator().await;
    // Whichever comes first, the start or the request: it stands still until it is resumed.
    until_state(&world, task, "suspended").await;
    world.assert_sound().await;
    assert_eq!(ask(&world, "resume_task", task).await, "accepted");
    let claim = world.claim().await;
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delayed_task_that_is_suspended_before_its_time_begins_when_it_is_resumed() {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    let task: Uuid =
        sqlx::query_scalar("select tasker.submit_task('tests', 'one', run_at => clock_timestamp() + interval '1 h')")
            .fetch_one(&world.pool)
            .await
            .expect("submitted");
    suspend(&world, task).await;
    assert_eq!(world.of_task(task, "suspended_from").await.as_deref(), Some("pending"));
    // Its time comes while it is suspended, and the hint with it.
    for statement in
        ["update tasker.tasks set run_at = clock_timestamp()", "update tasker.due set due_at = clock_timestamp()"]
    {
        sqlx::query(statement).execute(&world.pool).await.expect("an hour later");
    }
    eventually("the hint is gone", async || {
        sqlx::query("select tasker.wake('due')").execute(&world.pool).await.expect("woken");
        (world.number("select count(*) from tasker.due where kind = 'start'").await == 0).then_some(())
    })
    .await;
    ask(&world, "resume_task", task).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_task_can_be_cancelled_terminated_and_timed_out() {
    let world = World::start(Setup::by_hand()).await;
    world.register("limited", "timeouts: {total: 1s}\nsteps: [{name: a, handler: ok}]").await;
    world.register_steps("one", "a: ok").await;
    for terminate in [false, true] {
        let task = world.submit("one").await;
        suspend(&world, task).await;
        let answered: String = sqlx::query_scalar("select tasker.cancel_task($1, 'enough', $2, 'ann')")
            .bind(task)
            .bind(terminate)
            .fetch_one(&world.pool)
            .await
            .expect("asked");
        assert_eq!(answered, "accepted");
        assert_eq!(world.finish(&[task]).await, ["cancelled"]);
    }
    let limited = world.submit("limited").await;
    suspend(&world, limited).await;
    assert_eq!(world.finish(&[limited]).await, ["error"]);
    assert_eq!(world.of_task(limited, "error_type").await.as_deref(), Some("timeout"));
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_wishes_that_come_twice_change_nothing_more() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    let claim = world.claim().await;
    for _ in 0..2 {
        world.send("task_requests", &json!({"v": 1, "type": "suspend", "task": task, "actor": "ann"}), None).await;
    }
    until_state(&world, task, "suspended").await;
    world.queues_drained().await;
    for _ in 0..2 {
        world.send("task_requests", &json!({"v": 1, "type": "resume", "task": task, "actor": "ann"}), None).await;
    }
    until_state(&world, task, "steps_in_process").await;
    world.queues_drained().await;
    let acts = world.words("select action from tasker.audit order by audit_id").await;
    assert_eq!(acts, ["suspend", "resume"]);
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_load_that_is_suspended_and_resumed_loses_nothing() {
    let world = World::start(Setup { orchestrators: 2, workers: 1, rust_workers: 1, ..Setup::default() }).await;
    register_mix(&world).await;
    let tasks = submit_mix(&world, 100).await;
    for round in 0..4 {
        for task in tasks.iter().skip(round).step_by(3) {
            ask(&world, "suspend_task", *task).await;
        }
        for task in tasks.iter().skip(round).step_by(3) {
            ask(&world, "resume_task", *task).await;
        }
    }
    // A request to resume may have been refused because the request to suspend was not read yet.
    eventually("nothing is suspended and no wish is left", async || {
        for task in &tasks {
            ask(&world, "resume_task", *task).await;
        }
        let left = "select (select count(*) from tasker.tasks where state = 'suspended') + (select count(*) from pgmq.q_task_requests)";
        (world.number(left).await == 0).then_some(())
    })
    .await;
    assert_outcomes(&world.finish_within(&tasks, DEADLINE * 2).await);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_takes_back_a_suspension_that_nobody_has_read() {
    let mut world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    for (act, wanted) in [
        ("suspend", "accepted"),
        ("resume", "accepted"),
        ("resume", "the task is queued; only a suspended task can be resumed"),
    ] {
        let said: String =
            sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select tasker.{act}_task($1, 'because', 'ann')")))
                .bind(task)
                .fetch_one(&world.pool)
                .await
                .expect("asked");
        assert_eq!(said, wanted);
    }
    world.add_orchestrator().await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    let moves = world.words("select event from tasker.transitions where event in ('Suspend', 'Resume')").await;
    assert_eq!(moves, [""; 0]);
    let audit =
        world.words("select concat_ws(' ', action, actor, reason, details->>'suspension') from tasker.audit").await;
    assert_eq!(audit, ["resume ann because taken back before it began"]);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspension_that_two_orchestrators_read_happens_once() {
    let mut world = World::start(Setup { orchestrators: 0, ..Setup::by_hand() }).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    assert_eq!(ask(&world, "suspend_task", task).await, "accepted");
    // Both hold it: the reading of the first ran out before it came to settle.
    let mut conn = world.pool.acquire().await.expect("a connection");
    let first = queue::receive(&mut conn, TASK_REQUESTS, "slow", 0, 10).await.expect("read");
    let second = queue::receive(&mut conn, TASK_REQUESTS, "quick", 0, 10).await.expect("read");
    drop(conn);
    assert_eq!((first.len(), second.len()), (2, 2), "the start and the suspension");
    assert_eq!(
        ask(&world, "resume_task", task).await,
        "the task is just being suspended; ask again in a moment",
        "what somebody holds is not taken back"
    );

    let shared = Shared::new(world.pool.clone(), world.pool.clone(), Uuid::new_v4(), None);
    inbox::settle_requests(&shared, second).await.expect("settled");
    assert_eq!(world.of_task(task, "state").await.as_deref(), Some("suspended"));
    assert_eq!(ask(&world, "resume_task", task).await, "accepted");
    world.add_orchestrator().await;
    let a = world.claim().await;
    inbox::settle_requests(&shared, first).await.expect("settled");
    assert_eq!(world.of_task(task, "state").await.as_deref(), Some("steps_in_process"));
    shared.connections.give_back();
    world.succeed(&a).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    let moves =
        world.words("select event from tasker.transitions where event in ('Suspend', 'Resume') order by at").await;
    assert_eq!(moves, ["Suspend", "Resume"]);
    world.assert_sound().await;
    world.end().await;
}
