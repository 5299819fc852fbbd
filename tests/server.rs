//! What stands around us (a server's settings, an older PGMQ) does not change what happens.

use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use tasker_shared::migrate::migrate;
use tasker_testing::TestDatabase;
use uuid::Uuid;

use crate::harness::{Setup, World};

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_role_or_the_database_change_nothing() {
    let database = TestDatabase::empty().await;
    let pool = database.pool().await;
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&pool).await.expect("its name");
    for setting in [
        "standard_conforming_strings = off",
        "search_path = nowhere",
        "default_transaction_isolation = serializable",
        "lock_timeout = '1ms'",
        "datestyle = 'German'",
        "intervalstyle = 'sql_standard'",
        "timezone = 'Pacific/Auckland'",
        "bytea_output = 'escape'",
        "extra_float_digits = -15",
    ] {
        sqlx::query(AssertSqlSafe(format!("alter database {name} set {setting}"))).execute(&pool).await.expect("set");
    }
    migrate(&pool).await.expect("migrated");
    pool.close().await;

    let url = database.url();
    // One worker of ours, and one that brings its own sessions, with those settings.
    let world = World::on(url.clone(), Some(database), Setup { rust_workers: 1, ..Setup::default() }).await;
    world.register_steps("diamond", "a: ok\nb: ok <- a\nc: ok <- a\nd: ok <- b c").await;
    let mut tasks = Vec::new();
    let mut stranger = PgConnection::connect(&url).await.expect("connected");
    // How long it waits for locks is the caller's own affair, and on a busy machine 1 ms is little.
    stranger.execute("set lock_timeout = 0").await.expect("set");
    for n in 0..6 {
        let task: Uuid = sqlx::query_scalar(
            "select tasker.submit_task('tests', 'diamond', input => $1, traceparent => $2, tracestate => $3)",
        )
        .bind(json!({ "n": n }))
        .bind(TRACEPARENT)
        .bind("vendor=x")
        .fetch_one(&mut stranger)
        .await
        .expect("submitted");
        tasks.push(task);
    }
    assert_eq!(world.finish(&tasks).await, ["complete"; 6]);
    // The ids of all spans, too, are what they are elsewhere.
    world.assert_complete().await;
    assert_eq!(world.counter("invalid_traceparent").await + world.counter("invalid_tracestate").await, 0);
    world.end().await;
}

/// PGMQ has `last_read_at` since 1.10.0; from 1.5.0 on everything that we need is there.
#[tokio::test(flavor = "multi_thread")]
async fn queues_without_the_time_of_the_last_read_are_read() {
    let database = TestDatabase::fresh().await;
    let pool = database.pool().await;
    for queue in ["q_task_requests", "q_step_results"] {
        let drop = format!("alter table pgmq.{queue} drop column last_read_at");
        sqlx::query(AssertSqlSafe(drop)).execute(&pool).await.expect("dropped");
    }
    let world = World::on(database.url(), Some(database), Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    world
        .send("task_requests", &json!({"v": 1, "type": "submit", "namespace": "tests", "template": "one"}), None)
        .await;
    let task = crate::harness::eventually("the message became a task", async || {
        let query = sqlx::query_scalar("select task_uuid from tasker.tasks");
        query.fetch_optional(&world.pool).await.expect("tasks")
    })
    .await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.end().await;
}
