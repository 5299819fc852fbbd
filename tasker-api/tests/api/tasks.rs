//! Tasks over HTTP.

use reqwest::Method;
use serde_json::json;
use tasker_api::auth::{Role, Scope};
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
        ("status=failed&namespace=shop", vec![failed]),
        ("status=failed&namespace=depot", vec![]),
        ("status=cancelled&namespace=shop", vec![cancelled]),
        ("status=cancelled,failed,queued&namespace=shop", vec![cancelled, failed, one]),
        ("status=cancelled&namespace=depot", vec![]),
        ("error_type=CardDeclined&namespace=shop&template=order", vec![failed]),
        ("error_type=CardDeclined&namespace=depot", vec![]),
        ("error_type=Card", vec![]),
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

#[tokio::test]
async fn a_child_of_another_namespace_does_not_exist() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    world.register(&order("depot")).await;
    let (parent, own, other) =
        (world.submit("shop", "P").await, world.submit("shop", "A").await, world.submit("depot", "B").await);
    let step = "insert into tasker.steps (step_uuid, task_uuid, step_index, queue, remaining_dependencies, last_at)
                values ($1, $2, 0, 'worker_shop', 0, clock_timestamp())";
    let started = Uuid::new_v4();
    sqlx::query(step).bind(started).bind(parent).execute(world.pool()).await.unwrap();
    let children = [(1, Some(own), None), (2, Some(other), None), (3, None, Some("input: order_id hunter2 is wrong"))];
    for (number, child, error) in children {
        let sql =
            "insert into tasker.children (task_uuid, step_uuid, attempt, number, depth, awaited, child_uuid, error)
                   values ($1, $2, $3, $3, 1, true, $4, $5)";
        sqlx::query(sql)
            .bind(parent)
            .bind(started)
            .bind(number)
            .bind(child)
            .bind(error)
            .execute(world.pool())
            .await
            .unwrap();
    }
    let path = format!("/v1/tasks/{parent}/children");
    let all = world.get(&world.key(Role::Operator).await, &path).await;
    let uuids = |answer: &crate::harness::Answer| -> Vec<serde_json::Value> {
        answer.at("/items").as_array().unwrap().iter().map(|child| child["task_uuid"].clone()).collect()
    };
    assert_eq!(uuids(&all), [json!(own), json!(other), json!(null)], "{all:?}");
    assert_eq!((all.at("/items/0/step"), all.at("/items/0/status")), (json!("charge"), json!("queued")));
    assert!(all.body.contains("hunter2"));
    let some = world.get(&world.key_of(Role::Viewer, None, Some(&["shop"])).await, &path).await;
    assert_eq!(uuids(&some), [json!(own), json!(null)], "{some:?}");
    assert!(!some.body.contains("hunter2"), "what was refused is a payload");
    let stranger = world.key_of(Role::Admin, None, Some(&["depot"])).await;
    assert_eq!(world.get(&stranger, &path).await.status, 404);
}

#[tokio::test]
async fn what_is_kept_is_set_for_own_namespaces_and_audited() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    let admin = world.key(Role::Admin).await;
    let own = world.key_of(Role::Admin, None, Some(&["shop"])).await;
    let put = |key: &str, body: serde_json::Value| {
        send(world.request(Method::PUT, "/v1/retention").bearer_auth(key).json(&body))
    };
    assert_eq!(put(&admin, json!({"namespace": "*", "keep_s": 86400, "archive": true})).await.status, 200);
    assert_eq!(put(&own, json!({"namespace": "*", "keep_s": 86400})).await.code(), "forbidden");
    assert_eq!(put(&own, json!({"namespace": "depot", "keep_s": 86400})).await.code(), "forbidden");
    assert_eq!(put(&own, json!({"namespace": "shop", "keep_quarantine_s": 7200})).await.status, 200);
    for (body, field) in [
        (json!({"namespace": "shop"}), "keep_s"),
        (json!({"namespace": "shop", "keep_s": 10}), "keep_s"),
        (json!({"namespace": "Shop!", "keep_s": 7200}), "namespace"),
    ] {
        let refused = put(&admin, body.clone()).await;
        assert_eq!((refused.status.as_u16(), refused.at("/field")), (400, json!(field)), "{body}: {refused:?}");
    }
    let listed = world.get(&own, "/v1/retention").await;
    let expected = json!([
        {"namespace": "*", "keep_s": 86400, "keep_quarantine_s": null, "archive": true},
        {"namespace": "shop", "keep_s": null, "keep_quarantine_s": 7200, "archive": false}
    ]);
    assert_eq!(listed.at("/items"), expected);
    let removed = async |what: &str| {
        send(world.request(Method::DELETE, &format!("/v1/retention?namespace={what}")).bearer_auth(&own))
            .await
            .status
            .as_u16()
    };
    assert_eq!((removed("shop").await, removed("shop").await, removed("*").await), (200, 404, 403));
    let audit = world.get(&admin, "/v1/audit").await;
    assert_eq!(
        (audit.at("/items/0/subject"), audit.at("/items/0/action")),
        (json!("retention shop"), json!("retention.set"))
    );
    assert_eq!(audit.at("/items/2/reason"), "keep 1 day, quarantine for ever, archive");
}

#[tokio::test]
async fn a_template_is_registered_once_in_the_audit_and_its_schema_is_whole() {
    let world = World::start().await;
    let admin = world.key(Role::Admin).await;
    let yaml = "namespace: shop\nname: login\nversion: \"1\"\ninput_schema: {type: object, required: [password], \
                properties: {password: {type: string, minLength: 8}}}\nsteps: [{name: only, handler: noop}]\n";
    for is_new in [true, false] {
        let applied = world.post(&admin, "/v1/templates", json!({"yaml": yaml})).await;
        assert_eq!((applied.status.as_u16(), applied.at("/is_new")), (200, json!(is_new)), "{applied:?}");
    }
    let audit = world.get(&admin, "/v1/audit").await;
    let about: Vec<serde_json::Value> = audit
        .at("/items")
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["action"] == "template.apply")
        .cloned()
        .collect();
    assert_eq!(about.len(), 1, "{audit:?}");
    assert_eq!(about[0]["subject"], "template shop/login 1");
    assert!(about[0]["actor"].as_str().unwrap().starts_with("test-"));
    let shown = world.get(&admin, "/v1/templates/shop/login").await;
    let password = shown.at("/definition/input_schema/properties/password");
    assert_eq!(password, json!({"type": "string", "minLength": 8}), "{shown:?}");
}

#[tokio::test]
async fn who_may_not_read_payloads_reads_none_in_the_audit_and_the_quarantine() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    let task = world.submit("shop", "A").await;
    sqlx::query("insert into tasker.audit (task_uuid, action, actor, details) values ($1, 'resolve_step', 'ann', '{\"output\": \"by-hand-7\"}')")
        .bind(task)
        .execute(world.pool())
        .await
        .unwrap();
    sqlx::query(
        "insert into tasker.quarantine (queue, msg_id, reason, failures, read_ct, message, enqueued_at)
         values ('task_requests', 1, 'type: not known', 0, 1, '{\"type\": \"by-hand-7\"}', clock_timestamp())",
    )
    .execute(world.pool())
    .await
    .unwrap();
    let reads = vec![Scope::TasksRead, Scope::AuditRead, Scope::QueuesRead];
    let with = reads.iter().copied().chain([Scope::PayloadsRead]).collect();
    for (scopes, sees) in [(reads, false), (with, true)] {
        let key = world.key_of(Role::Operator, Some(scopes), None).await;
        let cookie = world.session(&key).await;
        for path in ["/v1/audit", "/audit", "/v1/quarantine", "/quarantine/1"] {
            let request = world.request(Method::GET, path);
            let request =
                if path.starts_with("/v1") { request.bearer_auth(&key) } else { request.header("cookie", &cookie) };
            let answer = send(request).await;
            assert_eq!(answer.status, 200, "{path}: {}", answer.body);
            assert_eq!(answer.body.contains("by-hand-7"), sees, "{path}: {}", answer.body);
        }
    }
}
