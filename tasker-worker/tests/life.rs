//! A worker's life: what it takes, how it wakes, and how it ends.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::Executor as _;
use tasker_worker::{StepContext, StepError, handlers};
use tokio::sync::mpsc;

use crate::bench::{Bench, Step, start, step, told};

#[tokio::test]
async fn what_is_not_offered_stays_in_its_queue() {
    let bench = Bench::new().await;
    let slow = Step { queue: "worker_shop__slow", ..step("echo", json!("slow")) };
    let (_, steps) = bench.enqueue(&[step("elsewhere", json!(null)), slow, step("echo", json!("fast"))]).await;
    let worker = start(bench.worker().handler("echo", handlers::echo));
    bench.reported(steps[2]).await;
    worker.drained().await;
    let left: Vec<String> = sqlx::query_scalar("select state from tasker.steps order by step_index")
        .fetch_all(&bench.pool)
        .await
        .expect("steps");
    assert_eq!(left, ["enqueued", "enqueued", "enqueued_for_orchestration"]);
    let messages: (i64, i64) = sqlx::query_as(
        "select (select count(*) from pgmq.q_worker_shop), (select count(*) from pgmq.q_worker_shop__slow)",
    )
    .fetch_one(&bench.pool)
    .await
    .expect("queues");
    assert_eq!(messages, (1, 1));

    let both = bench.worker().queue(None).queue(Some("slow")).handler("echo", handlers::echo);
    let worker = start(both.handler("elsewhere", handlers::noop));
    assert_eq!(bench.reported(steps[1]).await.output, Some(json!("slow")));
    bench.reported(steps[0]).await;
    worker.drained().await;
}

#[tokio::test]
async fn a_worker_says_hello_holds_its_lock_and_says_bye() {
    let bench = Bench::new().await;
    let worker = start(bench.worker().builtins().queue(None).queue(Some("slow")).slots(9));
    bench.until("select count(*) = 1 from tasker.workers").await;
    let (queues, slots, handlers): (Vec<String>, i32, Vec<String>) =
        sqlx::query_as("select queues, slots, handlers from tasker.workers")
            .fetch_one(&bench.pool)
            .await
            .expect("a worker");
    assert_eq!((queues, slots), (vec!["worker_shop".to_owned(), "worker_shop__slow".to_owned()], 9));
    assert_eq!(handlers, ["echo", "fail", "http", "noop", "sleep"]);
    let free: bool = bench.ask("select pg_try_advisory_lock(lock_key) from tasker.workers").await;
    assert!(!free, "the lock says that the worker lives");
    bench.until("select count(*) = 2 from tasker.readers where asleep").await;
    let lock_key: i64 = bench.ask("select lock_key from tasker.workers").await;
    worker.drained().await;
    let left: i64 =
        bench.ask("select (select count(*) from tasker.workers) + (select count(*) from tasker.readers)").await;
    assert_eq!(left, 0);
    // The server ends a session, and frees its lock, a moment after the worker has closed it.
    let taken = sqlx::query("select pg_advisory_lock($1)").bind(lock_key).execute(&bench.pool);
    tokio::time::timeout(Duration::from_secs(30), taken).await.expect("it is free after it").expect("taken");
}

#[tokio::test]
async fn a_drain_finishes_what_runs_and_takes_nothing_more() {
    let bench = Bench::new().await;
    let (tell, mut heard) = mpsc::unbounded_channel();
    let (_, first) = bench.enqueue(&[step("slow", json!(null))]).await;
    let worker = start(bench.worker().handler("slow", move |ctx: StepContext, _: Value| {
        let tell = tell.clone();
        async move {
            tell.send(ctx.clone()).expect("a listener");
            ctx.cancellation_token().cancelled().await;
            Ok::<_, StepError>("finished")
        }
    }));
    let ctx = told(&mut heard).await;
    worker.stop.cancel();
    bench.until("select count(*) = 0 from tasker.workers").await;
    let (_, second) = bench.enqueue(&[step("slow", json!(null))]).await;
    ctx.cancellation_token().cancel();
    worker.drained().await;
    assert_eq!(bench.attempt(first[0]).await.output, Some(json!("finished")));
    let state: String = sqlx::query_scalar("select state from tasker.steps where step_uuid = $1")
        .bind(second[0])
        .fetch_one(&bench.pool)
        .await
        .expect("it");
    assert_eq!(state, "enqueued");
}

#[tokio::test]
async fn a_drain_ends_although_a_handler_does_not() {
    let bench = Bench::new().await;
    let (tell, mut heard) = mpsc::unbounded_channel();
    bench.enqueue(&[step("endless", json!(null))]).await;
    let builder = bench.worker().drain_timeout(Duration::from_millis(50)).handler("endless", move |_, _: Value| {
        tell.send(()).expect("a listener");
        std::future::pending::<Result<(), StepError>>()
    });
    let worker = start(builder);
    told(&mut heard).await;
    worker.drained().await;
    let state: String = bench.ask("select state from tasker.steps").await;
    assert_eq!(state, "in_progress", "its lease will expire");
}

#[tokio::test]
async fn lost_connections_lose_no_result_and_the_lock_is_taken_again() {
    let bench = Bench::new().await;
    let (tell, mut heard) = mpsc::unbounded_channel();
    let (_, first) = bench.enqueue(&[step("slow", json!(null)), step("slow", json!(null))]).await;
    let worker = start(bench.worker().handler("slow", move |ctx: StepContext, _: Value| {
        let tell = tell.clone();
        async move {
            tell.send(ctx.clone()).expect("a listener");
            ctx.cancellation_token().cancelled().await;
            Ok::<_, StepError>("kept")
        }
    }));
    let contexts = [told(&mut heard).await, told(&mut heard).await];
    for ctx in &contexts {
        // Before each result, whichever connections were made meanwhile are cut.
        bench
            .pool
            .execute(
                "select pg_terminate_backend(pid) from pg_stat_activity
                 where datname = current_database() and application_name = 'tasker-worker'",
            )
            .await
            .expect("cut");
        ctx.cancellation_token().cancel();
        bench.reported(ctx.step_uuid()).await;
    }
    for step in first {
        assert_eq!(bench.attempt(step).await.output, Some(json!("kept")));
    }
    // The database never hears of a lock that is not held.
    bench
        .until(
            "select count(*) = 1 from tasker.workers w join pg_locks l
               on l.locktype = 'advisory' and l.granted and (l.classid::bigint << 32 | l.objid::bigint) = w.lock_key",
        )
        .await;
    // And it goes on working.
    let (_, more) = bench.enqueue(&[step("slow", json!(null))]).await;
    told(&mut heard).await.cancellation_token().cancel();
    bench.reported(more[0]).await;
    worker.drained().await;
}

#[tokio::test]
async fn a_worker_waits_for_a_queue_that_does_not_exist_yet() {
    let bench = Bench::new().await;
    bench.pool.execute("select pgmq.drop_queue('worker_shop')").await.expect("dropped");
    let worker = start(bench.worker().builtins());
    bench.until("select count(*) = 1 from tasker.workers").await;
    bench.pool.execute("select tasker.create_queue('worker_shop')").await.expect("made");
    let (_, steps) = bench.enqueue(&[step("echo", json!(1))]).await;
    assert_eq!(bench.reported(steps[0]).await.output, Some(json!(1)));
    worker.drained().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_steps_are_each_run_and_reported_once_by_two_workers() {
    let bench = Bench::new().await;
    bench.enqueue(&[step("noop", json!(null))]).await;
    fill(&bench, 999).await;
    let workers = [start(bench.worker().builtins()), start(bench.worker().builtins().slots(7))];
    bench.until("select count(*) = 0 from tasker.steps where state in ('enqueued', 'in_progress')").await;
    for worker in workers {
        worker.drained().await;
    }
    let (attempts, reports, results): (i64, i64, i64) = sqlx::query_as(
        "select (select count(*) from tasker.attempts where outcome = 'success'),
           (select count(*) from tasker.transitions where event = 'Report'),
           (select count(distinct message->>'step') from pgmq.q_step_results)",
    )
    .fetch_one(&bench.pool)
    .await
    .expect("counts");
    assert_eq!((attempts, reports, results), (1000, 1000, 1000));
    let beaten: i64 = bench.ask("select count(*) from tasker.counters").await;
    assert_eq!(beaten, 0, "no report was stale");
}

/// More steps like the first, in bulk.
async fn fill(bench: &Bench, count: i32) {
    sqlx::query(
        "with task as (
           insert into tasker.tasks (task_uuid, namespace, template_id, state, correlation_id, trace_id, root_span_id,
             created_at, generation_began_at, last_at)
           select gen_random_uuid(), 'shop', 1, 'steps_in_process', 'bulk', '\\x4bf92f3577b34da6a3ce929d0e0e4736', '\\x0102030405060708',
             clock_timestamp(), clock_timestamp(), clock_timestamp()
           from generate_series(1, $1) returning task_uuid
         ), step as (
           insert into tasker.steps (step_uuid, task_uuid, step_index, queue, state, version, attempt, remaining_dependencies, last_at)
           select gen_random_uuid(), task_uuid, 0, 'worker_shop', 'enqueued', 1, 1, 0, clock_timestamp() from task
           returning step_uuid, task_uuid
         )
         select pgmq.send_batch('worker_shop', (select array_agg(jsonb_build_object(
           'v', 1, 'task', task_uuid, 'step', step_uuid, 'generation', 1, 'attempt', 1, 'handler', 'noop')) from step))",
    )
    .bind(count)
    .execute(&bench.pool)
    .await
    .expect("filled");
}
