//! Traces over HTTP.

use reqwest::Method;
use serde_json::{Value, json};
use tasker_api::auth::Role;

use crate::harness::{World, order, send};

#[tokio::test]
async fn a_trace_is_found_by_task_by_its_id_and_by_correlation() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    let key = world.key(Role::Viewer).await;
    let task = world.submit("shop", "ORD-1").await;
    let answer = world.get(&key, &format!("/v1/tasks/{task}/trace")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let view = answer.json();
    assert_eq!(view["tasks"], json!([task.to_string()]));
    assert_eq!(view["correlation_id"], "ORD-1");
    assert_eq!((&view["in_progress"], &view["sampled"]), (&json!(true), &json!(true)));
    assert_eq!(view["roots"][0]["name"], "task.orchestration");
    assert_eq!(view["roots"][0]["attributes"]["namespace"], "shop");
    assert_eq!(view["sources"], json!({"log": view["spans"], "backend": 0, "backend_state": "none"}));

    let id = view["trace_id"].as_str().unwrap();
    let by_id = world.get(&key, &format!("/v1/traces/{id}")).await;
    assert_eq!(by_id.at("/roots/0/span_id"), view["roots"][0]["span_id"]);
    let found = world.get(&key, "/v1/traces?correlation_id=ORD-1").await;
    assert_eq!(found.at("/items/0/trace_id"), json!(id));

    let plain = world.get(&key, &format!("/v1/tasks/{task}/trace?include=links&max_spans=1")).await;
    assert_eq!((plain.at("/shown"), plain.at("/roots/0/attributes")), (json!(1), Value::Null));
    for (query, field) in [("include=prompts", "include"), ("max_spans=0", "max_spans"), ("depth=99", "depth")] {
        let refused = world.get(&key, &format!("/v1/tasks/{task}/trace?{query}")).await;
        assert_eq!((refused.status.as_u16(), refused.at("/field")), (400, json!(field)), "{refused:?}");
    }
    assert_eq!(world.get(&key, "/v1/traces/xyz").await.status, 400);
    assert_eq!(world.get(&key, &format!("/v1/traces/{}", "1".repeat(32))).await.status, 404);
}

#[tokio::test]
async fn an_unchanged_trace_of_an_ended_task_is_not_sent_again() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    let key = world.key(Role::Operator).await;
    let task = world.submit("shop", "ORD-2").await;
    // Nobody runs it: ended by hand, as an orchestrator would.
    let ended = "update tasker.tasks set state = 'cancelled', version = version + 1, finished_at = clock_timestamp(), open_steps = 0 where task_uuid = $1";
    sqlx::query(ended).bind(task).execute(world.client.pool()).await.unwrap();
    let moved = "insert into tasker.transitions (task_uuid, entity_uuid, version, task_version, generation, from_state, to_state, event, began_at, at)
                 select task_uuid, task_uuid, version, version, 1, 'pending', 'cancelled', 'Cancel', last_at, finished_at from tasker.tasks where task_uuid = $1";
    sqlx::query(moved).bind(task).execute(world.client.pool()).await.unwrap();
    let first = world.get(&key, &format!("/v1/tasks/{task}/trace")).await;
    assert_eq!(first.at("/in_progress"), json!(false), "{first:?}");
    let tag = first.headers["etag"].to_str().unwrap().to_owned();
    let url = format!("{}/v1/tasks/{task}/trace", world.url);
    let again = send(world.http.request(Method::GET, url).bearer_auth(&key).header("if-none-match", tag)).await;
    assert_eq!(again.status, 304, "{again:?}");
    let lines = world.get(&key, &format!("/v1/tasks/{task}/trace/otlp")).await;
    let spans: Value = serde_json::from_str(lines.body.lines().next().unwrap()).unwrap();
    assert_eq!(spans["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["name"], "task.orchestration");
    assert_eq!((lines.status.as_u16(), &lines.headers["content-type"]), (200, &"application/jsonl".parse().unwrap()));
    let url = format!("{}/v1/tasks/{task}/trace/otlp", world.url);
    let packed = world.http.get(url).bearer_auth(&key).header("accept-encoding", "gzip").send().await.unwrap();
    assert_eq!(packed.headers()["content-encoding"], "gzip");
    assert!(packed.bytes().await.expect("a whole answer").starts_with(&[0x1f, 0x8b]));
}
