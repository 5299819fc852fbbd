//! Tasks that are asked for over HTTP.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tasker_api::Config;
use tasker_api::auth::{self, Role};

use crate::harness::{World, order, send};

fn body() -> Value {
    json!({"namespace": "shop", "template": "order", "input": {"order_id": "1"}})
}

async fn shop() -> (World, String) {
    let world = World::start().await;
    world.register(&order("shop")).await;
    let key = world.key(Role::Operator).await;
    (world, key)
}

#[tokio::test]
async fn a_task_joins_its_callers_trace_and_says_so() {
    let (world, key) = shop().await;
    let request = world.request(Method::POST, "/v1/tasks").bearer_auth(&key).json(&body());
    let submitted = send(
        request
            .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
            .header("baggage", "team=blue"),
    )
    .await;
    assert_eq!(submitted.status, 200, "{submitted:?}");
    let traceparent = submitted.headers["traceparent"].to_str().unwrap();
    assert!(
        traceparent.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && traceparent.ends_with("-01"),
        "{traceparent}"
    );
    assert!(!traceparent.contains("00f067aa0ba902b7"), "it names the task's own span");
    let task = submitted.at("/task_uuid").as_str().unwrap().to_owned();
    assert_eq!(submitted.headers["location"], format!("/v1/tasks/{task}"));
    assert_eq!(world.get(&key, &format!("/v1/tasks/{task}")).await.at("/trace_id"), "4bf92f3577b34da6a3ce929d0e0e4736");
    let baggage: String = sqlx::query_scalar("select baggage from tasker.tasks").fetch_one(world.pool()).await.unwrap();
    assert_eq!(baggage, "team=blue");
}

#[tokio::test]
async fn the_same_idempotency_key_answers_the_first_task() {
    let (world, key) = shop().await;
    let keyed = |body: Value, name: &str| {
        send(world.request(Method::POST, "/v1/tasks").bearer_auth(&key).header("idempotency-key", name).json(&body))
    };
    let first = keyed(body(), "k").await;
    let again = keyed(body(), "k").await;
    assert_eq!((first.at("/is_new"), again.at("/is_new")), (json!(true), json!(false)));
    assert_eq!(first.at("/task_uuid"), again.at("/task_uuid"));
    let mut other = body();
    other["input"]["order_id"] = "2".into();
    let conflict = keyed(other.clone(), "k").await;
    assert_eq!(
        (conflict.status.as_u16(), &*conflict.code(), conflict.at("/field")),
        (409, "idempotency_conflict", json!("idempotency_key"))
    );
    other["idempotency_key"] = "not k".into();
    assert_eq!(keyed(other, "k").await.at("/field"), "idempotency-key");
    let found = world.get(&key, "/v1/tasks?idempotency_key=k").await;
    assert_eq!(found.at("/items/0/task_uuid"), first.at("/task_uuid"));
}

#[tokio::test]
async fn in_a_batch_a_bad_task_costs_only_itself() {
    let (world, key) = shop().await;
    let bad = json!({"namespace": "shop", "template": "order"});
    let unknown = json!({"namespace": "shop", "template": "nothing"});
    let answer = world.post(&key, "/v1/tasks/batch", json!({"tasks": [body(), bad, unknown, body()]})).await;
    let codes: Vec<Value> = answer.at("/results").as_array().unwrap().iter().map(|item| item["code"].clone()).collect();
    assert_eq!(codes, [json!(null), json!("invalid_request"), json!("invalid_request"), json!(null)], "{answer:?}");
    assert!(answer.at("/results/1/detail").as_str().unwrap().contains("order_id"));
    assert_eq!(world.post(&key, "/v1/tasks/batch", json!({"tasks": []})).await.at("/field"), "tasks");
}

#[tokio::test]
async fn every_refusal_names_the_field_and_the_rule() {
    let (world, key) = shop().await;
    let with = |field: &str, value: Value| {
        let mut body = body();
        body[field] = value;
        body
    };
    for (body, code, says) in [
        (with("colour", json!("red")), "invalid_request", "'colour'"),
        (with("input", json!([])), "invalid_request", "input: "),
        (with("input", json!({})), "invalid_request", "order_id"),
        (with("priority", json!(99_999)), "invalid_request", "priority: "),
        (with("run_at", json!("soon")), "malformed_body", "input contains invalid characters"),
        (with("template", json!("nothing")), "invalid_request", "template: "),
        (with("correlation_id", json!("")), "invalid_request", "correlation_id: "),
        (json!({"namespace": "shop"}), "invalid_request", "template"),
        (json!([]), "invalid_request", "the body: "),
    ] {
        let refused = world.post(&key, "/v1/tasks", body.clone()).await;
        assert_eq!((refused.status.as_u16(), &*refused.code()), (400, code), "{body}: {refused:?}");
        assert!(refused.at("/detail").as_str().unwrap().contains(says), "{body}: {refused:?}");
    }
    let batch = world.post(&key, "/v1/tasks/batch", json!({"tasks": [body(), with("priority", json!("high"))]})).await;
    assert_eq!(batch.at("/field"), "tasks[1].priority", "{batch:?}");
    let post = |text: String, media: &'static str| {
        send(world.request(Method::POST, "/v1/tasks").bearer_auth(&key).header("content-type", media).body(text))
    };
    assert_eq!(post("{".into(), "application/json").await.code(), "malformed_body");
    assert_eq!(post(body().to_string(), "text/plain").await.code(), "unsupported_media_type");
    assert_eq!(post(" ".repeat(2 << 20), "application/json").await.code(), "too_large");
    let deep = format!(
        r#"{{"namespace": "shop", "template": "order", "input": {{"a": {}{}}}}}"#,
        "[".repeat(100),
        "]".repeat(100)
    );
    assert!(post(deep, "application/json").await.at("/detail").as_str().unwrap().contains("deeper than"));
    assert_eq!(
        post(
            r#"{"namespace": "shop", "template": "order", "input": {"order_id": "\u0000"}}"#.into(),
            "application/json"
        )
        .await
        .status,
        400
    );
    let unknown = send(world.request(Method::GET, "/nowhere").bearer_auth(&key)).await;
    assert_eq!((unknown.status.as_u16(), &*unknown.code()), (404, "not_found"));
    let patched = send(world.request(Method::PATCH, "/v1/tasks").bearer_auth(&key)).await;
    assert_eq!((patched.status.as_u16(), &*patched.code()), (405, "method_not_allowed"));
}

#[tokio::test]
async fn an_act_is_audited_with_the_name_of_the_key() {
    let (world, key) = shop().await;
    let task = world.submit("shop", "A").await;
    let path = format!("/v1/tasks/{task}");
    let asked = world.post(&key, &format!("{path}/cancel"), json!({"reason": "changed my mind"})).await;
    assert_eq!((asked.status.as_u16(), asked.at("/accepted")), (202, json!(true)));
    let message: Value =
        sqlx::query_scalar("select message from pgmq.q_task_requests where message->>'type' = 'cancel'")
            .fetch_one(world.pool())
            .await
            .unwrap();
    assert!(message["actor"].as_str().unwrap().starts_with("test-"), "{message}");
    let refused = world.post(&key, &format!("{path}/resume"), json!({})).await;
    assert_eq!((refused.status.as_u16(), &*refused.code()), (409, "conflict"));
    let dry = world.post(&key, "/v1/tasks/bulk", json!({"filter": {"status": "queued"}, "action": "cancel"})).await;
    assert_eq!((dry.at("/matched"), dry.at("/asked"), dry.at("/dry_run")), (json!(1), json!(0), json!(true)));
    let done = world
        .post(&key, "/v1/tasks/bulk", json!({"filter": {"status": "queued"}, "action": "cancel", "dry_run": false}))
        .await;
    assert_eq!(done.at("/asked"), json!(1), "{done:?}");
    let nothing = world.post(&key, "/v1/tasks/bulk", json!({"filter": {}, "action": "cancel"})).await;
    assert_eq!((nothing.status.as_u16(), nothing.at("/field")), (400, json!("filter")));
}

#[tokio::test]
async fn a_server_that_only_reads_refuses_every_write() {
    let world = World::with(Config { read_only: true, ..Config::default() }).await;
    world.register(&order("shop")).await;
    let key = world.key(Role::Admin).await;
    assert_eq!(world.post(&key, "/v1/tasks", body()).await.code(), "read_only");
    assert_eq!(world.post(&key, "/v1/templates/lint", json!({"yaml": order("shop")})).await.at("/ok"), json!(true));
    assert_eq!(world.get(&key, "/v1/tasks").await.status, 200);
}

#[tokio::test]
async fn a_key_that_asks_too_often_is_told_to_wait() {
    let world = World::with(Config { rate_per_s: 1, burst: 3, ..Config::default() }).await;
    let (key, other) = (world.key(Role::Viewer).await, world.key(Role::Viewer).await);
    for _ in 0..3 {
        assert_eq!(world.get(&key, "/v1/tasks").await.status, 200);
    }
    let refused = world.get(&key, "/v1/tasks").await;
    assert_eq!((refused.status.as_u16(), &*refused.code()), (429, "rate_limited"));
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(world.get(&other, "/v1/tasks").await.status, 200, "others are not held back");
}

#[tokio::test]
async fn a_browser_writes_only_from_a_page_of_its_own_session() {
    let (world, key) = shop().await;
    let once = auth::once_link(world.pool(), key.split('_').nth(1).unwrap()).await.unwrap();
    let signed_in = send(world.request(Method::GET, &format!("/login?once={once}"))).await;
    let cookie = signed_in.headers["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();
    let csrf = auth::csrf_of(cookie.split_once('=').unwrap().1);
    let submit = |headers: &[(&'static str, &str)]| {
        let request = world.request(Method::POST, "/v1/tasks").header("cookie", &cookie).json(&body());
        send(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)))
    };
    assert_eq!(submit(&[]).await.code(), "cross_site");
    assert_eq!(submit(&[("x-tasker-csrf", "0")]).await.code(), "cross_site");
    assert_eq!(submit(&[("x-tasker-csrf", &csrf), ("origin", "https://evil.example")]).await.code(), "cross_site");
    assert_eq!(submit(&[("x-tasker-csrf", &csrf), ("origin", "null")]).await.code(), "cross_site");
    assert_eq!(submit(&[("x-tasker-csrf", &csrf), ("sec-fetch-site", "cross-site")]).await.code(), "cross_site");
    assert_eq!(submit(&[("x-tasker-csrf", &csrf), ("origin", &world.url)]).await.status, 200);
}

#[tokio::test]
async fn who_watches_hears_of_every_task_that_is_theirs() {
    let (world, key) = shop().await;
    world.register(&order("depot")).await;
    let own = world.key_of(Role::Viewer, None, Some(&["shop"])).await;
    let mut all = world.request(Method::GET, "/v1/events").bearer_auth(&key).send().await.unwrap();
    let mut some = world.request(Method::GET, "/v1/events").bearer_auth(&own).send().await.unwrap();
    assert_eq!(all.headers()["content-type"], "text/event-stream");
    // What is submitted after the hello is heard of, however soon.
    let hello = |chunk: &[u8]| String::from_utf8_lossy(chunk).contains("event: hello");
    assert!(hello(&all.chunk().await.unwrap().unwrap()) && hello(&some.chunk().await.unwrap().unwrap()));
    let (shop, depot) = (world.submit("shop", "A").await.to_string(), world.submit("depot", "B").await.to_string());
    let hear = async |stream: &mut reqwest::Response, wanted: &str| {
        let mut heard = String::new();
        while !heard.contains(wanted) {
            let chunk = tokio::time::timeout(Duration::from_secs(30), stream.chunk()).await.expect("heard in time");
            heard.push_str(&String::from_utf8_lossy(&chunk.unwrap().expect("the stream goes on")));
        }
        heard
    };
    hear(&mut all, &depot).await;
    let heard = hear(&mut some, &shop).await;
    assert!(!heard.contains(&depot), "{heard}");
    // A revoked key hears no more.
    let id = own.split('_').nth(1).unwrap();
    tasker_api::auth::keys::revoke(&mut world.pool().acquire().await.unwrap(), id, "the test").await.unwrap();
    let ended = async { while some.chunk().await.unwrap().is_some() {} };
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("it ends");
    world.stop.cancel();
    tokio::time::timeout(Duration::from_secs(20), async { while let Ok(Some(_)) = all.chunk().await {} })
        .await
        .expect("all end");
    world.running.await.unwrap();
}
