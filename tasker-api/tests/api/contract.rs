//! What the `OpenAPI` document says is so: every answer of every operation has its schema, and every
//! operation lets in whom it says and nobody else. Both tests are made from the document, so a new
//! operation is in them as soon as it is in the API.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};
use tasker_api::Config;
use tasker_api::auth::{Role, Scope};
use uuid::Uuid;

use crate::harness::{Answer, World, order, send};

const TEMPLATE: &str = "namespace: shop\nname: order\nversion: \"2\"\nsteps: [{name: only, handler: noop}]\n";

/// One operation of the document.
struct Operation {
    id: String,
    method: Method,
    path: String,
    scope: Option<Scope>,
    has_body: bool,
}

fn operations(document: &Value) -> Vec<Operation> {
    let mut found = Vec::new();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            found.push(Operation {
                id: operation["operationId"].as_str().expect("an id").to_owned(),
                method: method.to_uppercase().parse().expect("a method"),
                path: path.clone(),
                scope: operation["x-scope"].as_str().map(|word| word.parse().expect("a scope")),
                has_body: operation["requestBody"]["required"] == true,
            });
        }
    }
    assert!(found.len() > 40, "the document lists {} operations", found.len());
    found
}

/// Something of everything, all of it in namespace `shop`.
struct Fixture {
    world: World,
    document: Value,
    task: Uuid,
    /// The task's trace, 32 hex digits.
    trace: String,
    message: i64,
}

impl Fixture {
    async fn new() -> Self {
        // Bad tokens are tried on every operation.
        let world = World::with(Config { failed_sign_ins: 10_000, ..Config::default() }).await;
        world.register(&order("shop")).await;
        world.register(&order("depot")).await;
        let task = world.submit("shop", "the-shop-order").await;
        world.register(TEMPLATE).await;
        let run = async |sql: &'static str| {
            sqlx::query(sql).execute(world.pool()).await.expect(sql);
        };
        run("select tasker.worker_hello('shop-worker', 'shop', array['worker_shop'], array['noop'], 4, 1)").await;
        run("insert into tasker.instances (instance, version) values (gen_random_uuid(), '1')").await;
        run("insert into tasker.audit (task_uuid, action, actor) select task_uuid, 'cancel', 'ada' from tasker.tasks")
            .await;
        run("insert into tasker.transitions (task_uuid, entity_uuid, version, generation, from_state, to_state, event, began_at, at)
             select task_uuid, task_uuid, 1, 1, 'pending', 'initializing', 'Start', created_at, created_at from tasker.tasks").await;
        run("insert into tasker.steps (step_uuid, task_uuid, step_index, queue, remaining_dependencies, state, attempt, last_at, input)
             select gen_random_uuid(), task_uuid, 0, 'worker_shop', 0, 'error', 1, created_at, '{\"a\": 1}' from tasker.tasks").await;
        run("insert into tasker.attempts (task_uuid, step_uuid, attempt, generation, claim_token, worker, claim_began_at, claimed_at, outcome, error)
             select s.task_uuid, s.step_uuid, 1, 1, gen_random_uuid(), 'shop-worker', last_at, last_at, 'error', '{\"type\": \"CardDeclined\", \"message\": \"the-secret\"}' from tasker.steps s").await;
        let admin = world.key(Role::Admin).await;
        for (path, body) in [
            ("/v1/schedules", json!({"namespace": "shop", "name": "daily", "template": "order", "cron": "@daily"})),
            ("/v1/limits", json!({"namespace": "shop", "concurrency": 3})),
            ("/v1/retention", json!({"namespace": "shop", "keep_s": 7200})),
        ] {
            let set = send(world.request(Method::PUT, path).bearer_auth(&admin).json(&body)).await;
            assert_eq!(set.status, 200, "{set:?}");
        }
        let document = send(world.request(Method::GET, "/openapi.json")).await.json();
        let trace = sqlx::query_scalar("select encode(trace_id, 'hex') from tasker.tasks where task_uuid = $1")
            .bind(task)
            .fetch_one(world.pool())
            .await
            .expect("a trace id");
        let mut fixture = Self { world, document, task, trace, message: 0 };
        fixture.quarantine().await;
        fixture
    }

    async fn quarantine(&mut self) {
        self.message = sqlx::query_scalar(
            "insert into tasker.quarantine (queue, msg_id, read_ct, reason, message, enqueued_at)
             values ('worker_shop', 1, 1, 'of shop', '{\"v\": 1}', clock_timestamp()) returning quarantine_id",
        )
        .fetch_one(self.world.pool())
        .await
        .expect("quarantined");
    }

    fn request(&self, operation: &Operation) -> reqwest::RequestBuilder {
        let task = self.task.to_string();
        let message = self.message.to_string();
        let name = if operation.path.starts_with("/v1/schedules") { "daily" } else { "order" };
        let mut path = operation.path.clone();
        for (word, value) in [
            ("{task}", task.as_str()),
            ("{step}", "charge"),
            ("{namespace}", "shop"),
            ("{name}", name),
            ("{queue}", "worker_shop"),
            ("{message}", &message),
            ("{trace_id}", &self.trace),
        ] {
            path = path.replace(word, value);
        }
        let query = match operation.id.as_str() {
            "diff_template" => "?before=1&after=2",
            "remove_limit" | "remove_retention" => "?namespace=shop",
            "list_traces" => "?correlation_id=the-shop-order",
            _ => "",
        };
        let request = self.world.request(operation.method.clone(), &format!("{path}{query}"));
        match Self::body(operation) {
            Some(body) => request.json(&body),
            None => request,
        }
    }

    fn body(operation: &Operation) -> Option<Value> {
        let task = json!({"namespace": "shop", "template": "order", "version": "1", "input": {"order_id": "1"}});
        let body = match operation.id.as_str() {
            "submit_task" => task,
            "submit_tasks" => json!({"tasks": [task]}),
            "act_on_tasks" => json!({"filter": {"namespace": "shop"}, "action": "cancel"}),
            "rerun_task" => json!({"from": ["charge"]}),
            "signal_task" => json!({"name": "approve", "payload": true}),
            "apply_template" | "lint_template" => json!({"yaml": TEMPLATE}),
            "set_schedule" => json!({"namespace": "shop", "name": "daily", "template": "order", "cron": "@hourly"}),
            "set_retention" => json!({"namespace": "shop", "keep_s": 86400}),
            "set_limit" => json!({"namespace": "shop", "concurrency": 5}),
            id => {
                assert!(!operation.has_body, "{id} needs a body; say here which one is good");
                return None;
            }
        };
        Some(body)
    }

    /// Fails unless the answer is what the document says of this operation.
    fn check(&self, operation: &Operation, answer: &Answer) {
        let declared = &self.document["paths"][&operation.path][operation.method.as_str().to_lowercase()]["responses"];
        let status = answer.status.as_u16().to_string();
        let response = match &declared[&status] {
            Value::Null => &self.document["components"]["responses"]["Problem"],
            found => found,
        };
        let media = answer.headers["content-type"].to_str().expect("a media type").split(';').next().unwrap();
        let schema = &response["content"][media]["schema"];
        assert!(!schema.is_null(), "{}: {status} {media} is not in the document: {answer:?}", operation.id);
        if media.ends_with("json") {
            let mut schema = schema.clone();
            schema["components"] = self.document["components"].clone();
            let validator =
                jsonschema::draft202012::options().should_validate_formats(true).build(&schema).expect("a schema");
            let body = answer.json();
            let problems: Vec<String> =
                validator.iter_errors(&body).map(|error| format!("{}: {error}", error.instance_path())).collect();
            assert!(problems.is_empty(), "{}: {problems:#?} in {body:#}", operation.id);
        }
    }
}

/// Streams do not end: only their head is read.
fn streams(operation: &Operation) -> bool {
    operation.id == "events"
}

#[tokio::test]
async fn every_answer_has_the_schema_of_its_operation() {
    let mut fixture = Fixture::new().await;
    let admin = fixture.world.key(Role::Admin).await;
    let mut statuses = BTreeMap::new();
    // What removes something comes last.
    let mut all = operations(&fixture.document);
    all.sort_by_key(|operation| (operation.method == Method::DELETE, operation.id == "discard_message"));
    let manual = include_str!("../../../docs/reference/api.md");
    for operation in &all {
        assert!(
            manual.contains(&format!("`{}`", operation.id)),
            "docs/reference/api.md does not list {}",
            operation.id
        );
    }
    for operation in all.iter().filter(|operation| !streams(operation)) {
        if operation.id == "discard_message" {
            fixture.quarantine().await;
        }
        let answer = send(fixture.request(operation).bearer_auth(&admin)).await;
        fixture.check(operation, &answer);
        statuses.insert(operation.id.clone(), answer.status.as_u16());
        let refused = send(fixture.request(operation).bearer_auth("tsk_0")).await;
        if operation.scope.is_some() {
            assert_eq!(refused.status, 401);
            fixture.check(operation, &refused);
        }
    }
    // Its only task is pending and has nothing to resume, retry or give up.
    let conflicts = [
        "complete_step",
        "give_up_task",
        "rerun_task",
        "resolve_step",
        "resolve_task",
        "resume_queue",
        "resume_task",
        "retry_task",
        "signal_task",
        "skip_step",
    ];
    for (id, status) in statuses {
        let fine = (200..300).contains(&status) || (matches!(status, 400 | 409) && conflicts.contains(&&*id));
        assert!(fine, "{id}: {status}");
    }
}

#[tokio::test]
async fn every_operation_lets_in_whom_it_says_and_nobody_else() {
    let mut fixture = Fixture::new().await;
    let all = operations(&fixture.document);
    let world = &fixture.world;
    let expired = world.key(Role::Admin).await;
    sqlx::query("update tasker.api_keys set expires_at = clock_timestamp() where key_id = $1")
        .bind(expired.split('_').nth(1).unwrap())
        .execute(world.pool())
        .await
        .unwrap();
    let mut roles = Vec::new();
    for role in Role::ALL {
        roles.push((role, world.key(role).await));
    }
    let mut only = BTreeMap::new();
    for &scope in Scope::ALL {
        let others = Scope::ALL.iter().copied().filter(|other| *other != scope).collect();
        let keys = (
            world.key_of(Role::Admin, Some(vec![scope]), None).await,
            world.key_of(Role::Admin, Some(others), None).await,
            world.key_of(Role::Admin, Some(vec![scope]), Some(&["depot"])).await,
        );
        only.insert(scope, keys);
    }
    for operation in &all {
        let Some(scope) = operation.scope else {
            assert!(
                operation.path.starts_with("/health/") || operation.path == "/openapi.json",
                "{} is open",
                operation.id
            );
            continue;
        };
        let id = &operation.id;
        for (what, request) in [
            ("no token", fixture.request(operation)),
            (
                "a bad token",
                fixture.request(operation).bearer_auth(format!("tsk_{}_{}", "0".repeat(16), "0".repeat(64))),
            ),
            ("an expired one", fixture.request(operation).bearer_auth(&expired)),
        ] {
            let refused = send(request).await;
            assert_eq!((refused.status.as_u16(), &*refused.code()), (401, "unauthenticated"), "{id}: {what}");
        }
        let (with, without, elsewhere) = &only[&scope];
        let refused = send(fixture.request(operation).bearer_auth(without)).await;
        assert_eq!((refused.status.as_u16(), &*refused.code()), (403, "forbidden"), "{id}: every other scope");

        // In another namespace: refused, unheard of, or an answer without a word of this one.
        let head = fixture.request(operation).bearer_auth(elsewhere).send().await.expect("an answer");
        let status = head.status().as_u16();
        if !streams(operation) {
            let text = head.text().await.expect("a whole answer");
            let silent =
                !text.contains("shop") && !text.contains(&fixture.task.to_string()) && !text.contains("the-secret");
            // Linting needs no namespace, and answers only what it was given.
            assert!(
                matches!(status, 403 | 404)
                    || (silent && status != 409)
                    || id == "submit_tasks" && text.contains("\"forbidden\""),
                "{id}: {status} {text}"
            );
        }
        for (role, key) in &roles {
            let allowed = role.scopes().contains(&scope);
            let status = fixture.request(operation).bearer_auth(key).send().await.expect("an answer").status().as_u16();
            assert_eq!(!matches!(status, 401 | 403), allowed, "{id}: {} gets {status}", role.as_str());
        }
        fixture.quarantine().await;
        let status = fixture.request(operation).bearer_auth(with).send().await.expect("an answer").status().as_u16();
        assert!(!matches!(status, 401 | 403), "{id}: {status} with its scope");
    }
}

#[test]
fn the_manual_names_every_code_and_every_scope() {
    let manual = include_str!("../../../docs/reference/api.md");
    for code in tasker_api::problem::CODES {
        assert!(
            manual.contains(&format!("`{}`", code.code)),
            "docs/reference/api.md does not name the code {}",
            code.code
        );
    }
    for scope in Scope::ALL {
        assert!(
            manual.contains(&format!("`{}`", scope.as_str())),
            "docs/reference/api.md does not name {}",
            scope.as_str()
        );
    }
}

#[tokio::test]
async fn secrets_are_hidden_even_from_who_sees_payloads() {
    let fixture = Fixture::new().await;
    let admin = fixture.world.key(Role::Admin).await;
    for sql in [
        "update tasker.attempts set error = '{\"type\": \"Refused\", \"message\": \"password=hunter2 was refused\"}'",
        "update tasker.tasks set reason = 'Authorization: Bearer hunter2', input = '{\"api_key\": \"hunter2\"}'",
    ] {
        sqlx::query(sql).execute(fixture.world.pool()).await.unwrap();
    }
    for path in ["", "/input", "/attempts", "/why", "/steps/charge/payloads"] {
        let answer = fixture.world.get(&admin, &format!("/v1/tasks/{}{path}", fixture.task)).await;
        assert!(answer.status == 200 && !answer.body.contains("hunter2"), "{path}: {answer:?}");
    }
}

#[tokio::test]
async fn payloads_are_shown_only_to_who_may_see_them() {
    let fixture = Fixture::new().await;
    let viewer = fixture.world.key(Role::Viewer).await;
    let operator = fixture.world.key(Role::Operator).await;
    for path in ["attempts", "why", "steps", "transitions"] {
        let path = format!("/v1/tasks/{}/{path}", fixture.task);
        let answer = fixture.world.get(&viewer, &path).await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(!answer.body.contains("the-secret"), "{path}: {answer:?}");
    }
    for path in ["input", "result", "steps/charge/payloads"] {
        let refused = fixture.world.get(&viewer, &format!("/v1/tasks/{}/{path}", fixture.task)).await;
        assert_eq!(refused.code(), "forbidden", "{path}");
    }
    let path = format!("/v1/tasks/{}/attempts", fixture.task);
    assert_eq!(fixture.world.get(&operator, &path).await.at("/items/0/error/message"), "the-secret");
    let path = format!("/v1/tasks/{}/steps/charge/payloads", fixture.task);
    assert_eq!(fixture.world.get(&operator, &path).await.at("/input"), json!({"a": 1}));
}
