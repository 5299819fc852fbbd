//! What the server makes of its connections to the database: nobody locks them up, and those that
//! died are no request's concern.

use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::json;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, Executor as _, PgConnection};
use tasker_api::Config;
use tasker_api::auth::{self, Role};
use tokio::task::JoinSet;

use crate::harness::{SERVER, World, order, send};

/// As many as `tasker api run` has.
const CONNECTIONS: u32 = 16;
/// Enough to meet one dead session after another.
const SESSIONS: u32 = 4;
/// Far longer than a request takes that does not wait for others, and half of what it waits for a connection.
const SOON: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn sixty_who_look_for_traces_at_once_lock_nobody_out() {
    let world = Arc::new(World::with_connections(Config::default(), CONNECTIONS).await);
    world.register(&order("shop")).await;
    for _ in 0..3 {
        world.submit("shop", "ORD-1").await;
    }
    let key = world.key(Role::Viewer).await;
    let mut looks = JoinSet::new();
    for _ in 0..60 {
        let (world, key) = (Arc::clone(&world), key.clone());
        looks.spawn(async move { world.get(&key, "/v1/traces?correlation_id=ORD-1").await });
    }
    let beside = tokio::time::timeout(SOON, world.get(&key, "/v1/tasks")).await;
    let answers = looks.join_all().await;
    let refused = answers.iter().filter(|answer| answer.status != 200).count();
    assert_eq!(refused, 0, "of {}: {:?}", answers.len(), answers.iter().find(|answer| answer.status != 200));
    assert!(answers.iter().all(|answer| answer.at("/items").as_array().is_some_and(|items| items.len() == 3)));
    assert_eq!(beside.expect("another request is answered meanwhile").status, 200);
}

/// Ends the sessions of the server, as a restart of the database does.
async fn end_sessions(world: &World) {
    let ended: i64 = sqlx::query_scalar(
        "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity
         where datname = current_database() and application_name = $1",
    )
    .bind(SERVER)
    .fetch_one(world.pool())
    .await
    .expect("ended");
    assert!(ended > 0, "the server had sessions");
}

/// Opens as many sessions as the server may have.
async fn warm(world: &Arc<World>, key: &str) {
    let mut requests = JoinSet::new();
    for _ in 0..4 * SESSIONS {
        let (world, key) = (Arc::clone(world), key.to_owned());
        requests.spawn(async move { world.get(&key, "/v1/tasks").await.status });
    }
    requests.join_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_the_database_no_request_is_refused_for_a_dead_connection() {
    let world = Arc::new(World::with_connections(Config::default(), SESSIONS).await);
    world.register(&order("shop")).await;
    let key = world.key(Role::Admin).await;
    let cookie = world.session(&key).await;
    let csrf = auth::csrf_of(cookie.split_once('=').unwrap().1);
    let task = world.submit("shop", "ORD-1").await;
    let body = json!({"namespace": "shop", "template": "order", "input": {"order_id": "1"}});
    let get = |path: &str| world.request(Method::GET, path).bearer_auth(&key);
    let post = |path: &str, body: &serde_json::Value| world.request(Method::POST, path).bearer_auth(&key).json(body);
    let page = |path: &str| world.request(Method::GET, path).header("cookie", &cookie);
    let form = |path: &str, fields: String| {
        let form = world.request(Method::POST, path).header("cookie", &cookie);
        form.header("content-type", "application/x-www-form-urlencoded").body(fields)
    };
    let id = key.split('_').nth(1).unwrap();
    let once = auth::once_link(world.pool(), id).await.unwrap();
    let schedule = json!({"namespace": "shop", "name": "daily", "template": "order", "cron": "@daily"});
    let template = json!({"yaml": order("depot")});
    let requests = [
        get("/v1/tasks"),
        get(&format!("/v1/tasks/{task}")),
        get("/v1/traces?correlation_id=ORD-1"),
        get("/health/ready"),
        post("/v1/tasks", &body),
        post("/v1/tasks/batch", &json!({"tasks": [body]})),
        post(&format!("/v1/tasks/{task}/suspend"), &json!({})),
        post(&format!("/v1/tasks/{task}/signal"), &json!({"name": "go"})),
        post("/v1/templates", &template),
        world.request(Method::PUT, "/v1/schedules").bearer_auth(&key).json(&schedule),
        post("/v1/schedules/shop/daily/pause", &json!({})),
        page("/"),
        page(&format!("/tasks/{task}")),
        page(&format!("/tasks/{task}/log")),
        page("/queues"),
        form(&format!("/tasks/{task}/act"), format!("csrf={csrf}&action=cancel")),
        form("/templates/shop/order", format!("csrf={csrf}&order_id=2&input=%7B%22order_id%22%3A%222%22%7D")),
        form("/login", format!("key={key}")),
        world.request(Method::GET, &format!("/login?once={once}")),
    ];
    let mut refused = Vec::new();
    for request in requests {
        warm(&world, &key).await;
        end_sessions(&world).await;
        let asked = request.try_clone().unwrap().build().unwrap();
        let answer = send(request).await;
        if answer.status.is_server_error() {
            refused.push(format!("{} {}: {}", asked.method(), asked.url().path(), answer.status));
        }
    }
    assert!(refused.is_empty(), "{refused:#?}");
    // The same requests one after the other, of which each may meet a dead connection.
    warm(&world, &key).await;
    end_sessions(&world).await;
    let mut statuses = Vec::new();
    for _ in 0..SESSIONS {
        statuses.push(send(post("/v1/tasks", &body)).await.status);
        statuses.push(send(get("/v1/tasks")).await.status);
        statuses.push(send(page("/")).await.status);
    }
    assert!(statuses.iter().all(|status| *status == StatusCode::OK), "{statuses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_a_server_that_only_reads_are_not_kept() {
    let world = Arc::new(World::with_connections(Config::default(), SESSIONS).await);
    world.register(&order("shop")).await;
    let key = world.key(Role::Operator).await;
    let body = json!({"namespace": "shop", "template": "order", "input": {"order_id": "1"}});
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(world.pool()).await.unwrap();
    // A session of its own, which may write whatever the database says.
    let may_write =
        PgConnectOptions::clone(&world.pool().connect_options()).options([("default_transaction_read_only", "off")]);
    let alter = async |what: &str| {
        let mut session = PgConnection::connect_with(&may_write).await.unwrap();
        session.execute(sqlx::AssertSqlSafe(format!("alter database {name} {what}"))).await.unwrap();
    };
    // As at a server that was demoted: what it lets read, it does not let write.
    alter("set default_transaction_read_only = on").await;
    end_sessions(&world).await;
    warm(&world, &key).await;
    let refused = world.post(&key, "/v1/tasks", body.clone()).await;
    assert_eq!((refused.status.as_u16(), &*refused.code()), (503, "unavailable"), "{refused:?}");
    // Another one has its address now.
    alter("reset default_transaction_read_only").await;
    for _ in 0..SESSIONS {
        let answer = world.post(&key, "/v1/tasks", body.clone()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
}
