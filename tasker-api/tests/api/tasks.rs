//! Tasks over HTTP.

use reqwest::Method;
use serde_json::json;
use tasker_api::auth::Role;
use uuid::Uuid;

use crate::harness::{World, order, send};

#[tokio::test]
async fn a_list_goes_on_where_the_page_before_ended() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    let key = world.key(Role::Viewer).await;
    let mut tasks = Vec::new();
    for n in 0..5 {
        tasks.push(world.submit("shop", &format!("ORD-{n}")).await.to_string());
    }
    tasks.sort_unstable();
    tasks.reverse();
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let page = world.get(&key, &format!("/v1/tasks?limit=2{after}")).await;
        assert_eq!(page.status, 200, "{page:?}");
        let items = page.at("/items");
        seen.extend(items.as_array().unwrap().iter().map(|task| task["task_uuid"].as_str().unwrap().to_owned()));
        match page.at("/next").as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    assert_eq!(seen, tasks);
}

#[tokio::test]
async fn a_list_is_filtered_by_what_people_see() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    world.register(&order("depot")).await;
    let key = world.key(Role::Viewer).await;
    let (one, other) = (world.submit("shop", "A").await, world.submit("depot", "B").await);
    let set = |state: &'static str, rest: &'static str, task: Uuid| {
        let pool = world.pool().clone();
        async move {
            let sql = format!(
                "update tasker.tasks set state = '{state}', finished_at = clock_timestamp(){rest} where task_uuid = $1"
            );
            sqlx::query(sqlx::AssertSqlSafe(sql)).bind(task).execute(&pool).await.unwrap();
        }
    };
    let failed = world.submit("shop", "C").await;
    set("error", ", error_type = 'CardDeclined'", failed).await;
    let cancelled = world.submit("shop", "D").await;
    set("cancelled", ", ended_by = 'cancel'", cancelled).await;
    let done = world.submit("depot", "E").await;
    set("complete", "", done).await;
    for (query, expected) in [
        ("", vec![done, cancelled, failed, other, one]),
        ("namespace=shop", vec![cancelled, failed, one]),
        ("template=order&namespace=depot", vec![done, other]),
        ("template=nothing", vec![]),
        ("status=queued", vec![other, one]),
        ("status=queued&namespace=depot", vec![other]),
        ("status=failed", vec![failed]),
        ("status=cancelled,failed", vec![cancelled, failed]),
        ("status=completed", vec![done]),
        ("status=completed&namespace=depot", vec![done]),
        ("status=running", vec![]),
        ("error_type=CardDeclined", vec![failed]),
        ("error_type=CardDeclined&status=completed", vec![]),
        ("correlation_id=B", vec![other]),
        ("correlation_id=B&namespace=shop", vec![]),
        ("created_to=2020-01-01T00:00:00Z", vec![]),
        ("created_from=2020-01-01T00:00:00Z&status=failed", vec![failed]),
    ] {
        let page = world.get(&key, &format!("/v1/tasks?{query}")).await;
        let mut found: Vec<String> = page
            .at("/items")
            .as_array()
            .unwrap_or_else(|| panic!("{query}: {page:?}"))
            .iter()
            .map(|task| task["task_uuid"].as_str().unwrap().to_owned())
            .collect();
        // Two of one millisecond have no order.
        found.sort_unstable();
        let mut expected: Vec<String> = expected.iter().map(Uuid::to_string).collect();
        expected.sort_unstable();
        assert_eq!(found, expected, "{query}");
        assert_eq!(page.at("/next"), json!(null), "{query}");
    }
    for bad in ["status=done", "limit=0", "limit=501", "limit=x", "colour=red", "after=1", "created_from=yesterday"] {
        let refused = world.get(&key, &format!("/v1/tasks?{bad}")).await;
        assert_eq!((refused.status.as_u16(), &*refused.code()), (400, "invalid_request"), "{bad}: {refused:?}");
    }
}

#[tokio::test]
async fn an_answer_that_has_not_changed_is_not_sent_again() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    let key = world.key(Role::Viewer).await;
    let path = format!("/v1/tasks/{}", world.submit("shop", "A").await);
    let first = world.get(&key, &path).await;
    let tag = first.headers["etag"].clone();
    let again = send(world.request(Method::GET, &path).bearer_auth(&key).header("if-none-match", tag.clone())).await;
    assert_eq!((again.status.as_u16(), &*again.body), (304, ""));
    sqlx::query("update tasker.tasks set priority = 7").execute(world.pool()).await.unwrap();
    let changed = send(world.request(Method::GET, &path).bearer_auth(&key).header("if-none-match", tag)).await;
    assert_eq!((changed.status.as_u16(), changed.at("/priority")), (200, json!(7)));
    let head = send(world.request(Method::HEAD, &path).bearer_auth(&key)).await;
    assert_eq!((head.status.as_u16(), &*head.body), (200, ""));
    assert_eq!(head.headers["etag"], changed.headers["etag"]);
}
