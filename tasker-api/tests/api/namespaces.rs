//! What is of one namespace stays there: a key of `shop` gets nothing of `billing`, wherever a request
//! names an object inside another. The cases are made from the `OpenAPI` document and from the list of
//! page routes, so a new operation, parameter, field or page without a case fails.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use tasker_api::Config;
use tasker_api::auth::{self, Role};
use uuid::Uuid;

use crate::harness::{Answer, World, order, send};

/// In whatever billing's rows say: inputs, outputs, errors, reasons.
const SECRET: &str = "zqsecret";
/// In whatever billing's rows are called. Only a request that says it may be answered with it.
const NAME: &str = "zqname";

const OF_BILLING: &str = "
select tasker.create_queue('worker_billing__zqname');
select tasker.worker_hello('zqname-worker', 'billing', array['worker_billing'], array['zqname.pay'], 4, 1);
select tasker.set_limit('billing', 'zqname.pay', 3);
select tasker.set_limit('billing', null, 9);
select tasker.set_retention('billing', interval '2 h', interval '2 h');
select tasker.set_schedule('billing', 'zqname_daily', 'zqname_tpl', cron => '@daily', input => '{\"a\": \"zqsecret\"}');
select tasker.pause_queue('worker_billing', 'zqsecret', 'zqname-operator');
insert into tasker.audit (task_uuid, action, actor, reason, details)
  select task_uuid, 'cancel', 'zqname-operator', 'zqsecret', '{\"a\": \"zqsecret\"}' from tasker.tasks where namespace = 'billing';
insert into tasker.quarantine (queue, msg_id, read_ct, reason, message, enqueued_at)
  values ('worker_billing', 1, 1, 'zqsecret', '{\"a\": \"zqsecret\"}', clock_timestamp());
insert into tasker.steps (step_uuid, task_uuid, step_index, queue, remaining_dependencies, state, attempt, failures, last_at, input, progress)
  select gen_random_uuid(), task_uuid, 0, 'worker_billing', 0, 'error', 1, 1, created_at, '{\"a\": \"zqsecret\"}', '{\"a\": \"zqsecret\"}'
  from tasker.tasks where namespace = 'billing';
insert into tasker.attempts (task_uuid, step_uuid, attempt, generation, claim_token, worker, claim_began_at, claimed_at, reported_at, outcome, output, error, usage)
  select s.task_uuid, s.step_uuid, 1, 1, gen_random_uuid(), 'zqname-worker', s.last_at, s.last_at, s.last_at, 'error', '\"zqsecret\"',
    '{\"type\": \"ZqnameError\", \"message\": \"zqsecret\"}', '{\"a\": 1}'
  from tasker.steps s join tasker.tasks t on t.task_uuid = s.task_uuid where t.namespace = 'billing';
update tasker.tasks set state = 'blocked_by_failures', version = 2, open_steps = 1, failed_steps = 1, error_type = 'ZqnameError',
  reason = 'step zqname_step failed: zqsecret' where namespace = 'billing';
insert into tasker.transitions (task_uuid, entity_uuid, version, generation, from_state, to_state, event, actor, began_at, at, detail)
  select task_uuid, task_uuid, 1, 1, 'pending', 'initializing', 'Start', 'zqname-operator', created_at, created_at, '{\"reason\": \"zqsecret\"}'
  from tasker.tasks where namespace = 'billing';
";

/// Everything of billing that an act could change.
const STATE_OF_BILLING: &str = "
select md5(concat_ws('|',
  (select string_agg(t::text, ';' order by t.task_uuid) from tasker.tasks t where t.namespace = 'billing'),
  (select string_agg(s::text, ';' order by s.step_uuid) from tasker.steps s join tasker.tasks t on t.task_uuid = s.task_uuid where t.namespace = 'billing'),
  (select string_agg(s::text, ';' order by s.name) from tasker.schedules s where s.namespace = 'billing'),
  (select string_agg(l::text, ';' order by l.name) from tasker.limits l where l.namespace = 'billing'),
  (select string_agg(r::text, ';') from tasker.retention r where r.namespace = 'billing'),
  (select string_agg(p::text, ';' order by p.queue) from tasker.paused_queues p where p.queue like 'worker_billing%'),
  (select string_agg(q::text, ';' order by q.quarantine_id) from tasker.quarantine q where q.queue like 'worker_billing%'),
  (select count(*) from tasker.audit a where a.actor like 'test-%' and a.subject like '%billing%'),
  (select count(*) from tasker.templates p where p.namespace = 'billing'),
  (select count(*) from tasker.signals),
  (select count(*) from pgmq.q_task_requests q join tasker.tasks t on t.task_uuid::text = q.message->>'task'
     where t.namespace = 'billing' and q.message->>'type' <> 'start')))
";

/// A world of two namespaces. A task of `shop` waits for one of `billing`; the rest of billing has
/// nothing to do with shop.
struct Fixture {
    world: World,
    document: Value,
    /// Of shop: it waits for `child`.
    parent: Uuid,
    parent_trace: String,
    /// Of billing.
    child: Uuid,
    /// Of billing alone.
    task: Uuid,
    trace: String,
    message: i64,
}

impl Fixture {
    async fn new() -> Self {
        let world = World::with(Config { rate_per_s: 10_000, burst: 10_000, ..Config::default() }).await;
        world.register(&order("shop")).await;
        for yaml in [
            "namespace: billing\nname: charge\nversion: \"1\"\nsteps: [{name: zqname_step, handler: zqname.pay}]\n",
            "namespace: billing\nname: zqname_tpl\nversion: \"1\"\ndescription: zqsecret\nsteps: [{name: zqname_step, handler: zqname.pay, input: {a: zqsecret}}]\n",
            "namespace: billing\nname: zqname_tpl\nversion: \"2\"\ndescription: zqsecret\nsteps: [{name: zqname_step, handler: zqname.pay}]\n",
            "namespace: shop\nname: outer\nversion: \"1\"\nsteps: [{name: pay, task: {template: charge, namespace: billing}, input: {}}]\n",
        ] {
            world.register(yaml).await;
        }
        let submitted = async |namespace: &str, template: &str, correlation: &str, key: Option<&str>| -> Uuid {
            sqlx::query_scalar(
                "select tasker.submit_task($1, $2, input => $3, correlation_id => $4, idempotency_key => $5)",
            )
            .bind(namespace)
            .bind(template)
            .bind(if namespace == "billing" { json!({"a": SECRET}) } else { json!({}) })
            .bind(correlation)
            .bind(key)
            .fetch_one(world.pool())
            .await
            .expect("submitted")
        };
        let parent = submitted("shop", "outer", "ORD-1", None).await;
        let task = submitted("billing", "zqname_tpl", "their-1", Some("their-key")).await;
        let trace_of = async |task: Uuid| -> String {
            let query = sqlx::query_scalar("select encode(trace_id, 'hex') from tasker.tasks where task_uuid = $1");
            query.bind(task).fetch_one(world.pool()).await.expect("a trace id")
        };
        let (parent_trace, trace) = (trace_of(parent).await, trace_of(task).await);
        // As a settle does it.
        sqlx::query(
            "with s as (insert into tasker.steps (step_uuid, task_uuid, step_index, queue, remaining_dependencies, state, attempt, last_at, input)
               values (gen_random_uuid(), $1, 0, 'worker_shop', 0, 'waiting', 1, clock_timestamp(), '{}'))
             update tasker.tasks set state = 'waiting_for_dependencies', version = 1, open_steps = 1 where task_uuid = $1",
        )
        .bind(parent)
        .execute(world.pool())
        .await
        .expect("waits");
        sqlx::query(
            "select tasker.start_children(jsonb_build_array(jsonb_build_object('task', s.task_uuid, 'step', s.step_uuid, 'attempt', 1,
               'awaited', true, 'namespace', 'billing', 'template', 'charge', 'correlation_id', 'ORD-1',
               'traceparent', format('00-%s-00f067aa0ba902b7-01', encode(t.trace_id, 'hex')))))
             from tasker.steps s join tasker.tasks t on t.task_uuid = s.task_uuid where s.task_uuid = $1",
        )
        .bind(parent)
        .execute(world.pool())
        .await
        .expect("started");
        let child = sqlx::query_scalar("select child_uuid from tasker.children where task_uuid = $1")
            .bind(parent)
            .fetch_one(world.pool())
            .await
            .expect("a child");
        sqlx::raw_sql(AssertSqlSafe(OF_BILLING)).execute(world.pool()).await.expect("billing");
        let message = sqlx::query_scalar("select quarantine_id from tasker.quarantine")
            .fetch_one(world.pool())
            .await
            .expect("a message");
        let document = send(world.request(Method::GET, "/openapi.json")).await.json();
        Self { world, document, parent, parent_trace, child, task, trace, message }
    }

    async fn state(&self) -> String {
        sqlx::query_scalar(STATE_OF_BILLING).fetch_one(self.world.pool()).await.expect("billing's state")
    }

    /// What a parameter of the path names: of billing, or of shop.
    fn in_path(&self, path: &str, name: &str, billing: bool) -> String {
        let of = |theirs: String, own: &str| if billing { theirs } else { own.to_owned() };
        match name {
            "task" => of(self.task.to_string(), &self.parent.to_string()),
            "trace_id" => of(self.trace.clone(), &self.parent_trace),
            "step" => of("zqname_step".into(), "pay"),
            "namespace" => of("billing".into(), "shop"),
            "name" if path.contains("schedules") => of("zqname_daily".into(), "daily"),
            "name" => of("zqname_tpl".into(), "outer"),
            "queue" => of("worker_billing".into(), "worker_shop"),
            "message" | "id" => of(self.message.to_string(), "999"),
            other => panic!("{path}: say here what {other} names"),
        }
    }

    fn path(&self, path: &str, billing: bool) -> String {
        let mut filled = String::new();
        for (n, part) in path.split(['{', '}']).enumerate() {
            filled += &if n % 2 == 0 { part.to_owned() } else { self.in_path(path, part, billing) };
        }
        filled
    }

    /// What a parameter of the query names in billing; nothing, if it names no object.
    fn in_query(&self, id: &str, name: &str) -> Vec<String> {
        match name {
            "namespace" => vec!["billing".into()],
            "task" => vec![self.task.to_string(), self.child.to_string()],
            "template" => vec!["zqname_tpl".into()],
            "correlation_id" => vec!["their-1".into(), "ORD-1".into()],
            "idempotency_key" => vec!["their-key".into()],
            "error_type" => vec!["ZqnameError".into()],
            "queue" => vec!["worker_billing".into()],
            "handler" => vec!["zqname.pay".into()],
            "after" if id == "list_tasks" => vec!["ffffffff-ffff-7fff-bfff-ffffffffffff".into()],
            "after" | "before" | "limit" | "status" | "version" | "include" | "max_spans" | "depth" | "under"
            | "created_from" | "created_to" | "reason" | "open_tasks" => Vec::new(),
            other => panic!("{id}: say here what the parameter {other} names"),
        }
    }

    /// What a request of one's own must say in its query.
    fn query(id: &str) -> Vec<(&'static str, &'static str)> {
        match id {
            "diff_template" => vec![("before", "1"), ("after", "1")],
            "remove_limit" | "remove_retention" => vec![("namespace", "shop")],
            "list_traces" => vec![("correlation_id", "ORD-1")],
            _ => Vec::new(),
        }
    }

    /// A good body about one's own.
    fn body(id: &str) -> Value {
        let task = json!({"namespace": "shop", "template": "order", "input": {"order_id": "1"}});
        match id {
            "submit_task" => task,
            "submit_tasks" => json!({"tasks": [task]}),
            "act_on_tasks" => json!({"filter": {"namespace": "shop"}, "action": "cancel"}),
            "rerun_task" => json!({"from": ["pay"]}),
            "signal_task" => json!({"name": "approve"}),
            "apply_template" | "lint_template" => json!({"yaml": order("shop")}),
            "set_schedule" => {
                json!({"namespace": "shop", "name": "daily", "template": "order", "cron": "@daily", "input": {"order_id": "1"}})
            }
            "set_retention" => json!({"namespace": "shop", "keep_s": 86400}),
            "set_limit" => json!({"namespace": "shop", "concurrency": 5}),
            _ => json!({}),
        }
    }

    /// What a field of a body names in billing, each the value of that field in a good body.
    fn in_body(id: &str, field: &str) -> Vec<Value> {
        let yaml = |task: &str| {
            json!(format!(
                "namespace: shop\nname: thief{}\nversion: \"1\"\nsteps: [{{name: take, {task}, input: {{}}}}]\n",
                task.len()
            ))
        };
        match (id, field) {
            ("apply_template", "yaml") => vec![
                json!("namespace: billing\nname: thief\nversion: \"1\"\nsteps: [{name: take, handler: noop}]\n"),
                yaml("task: {template: zqname_tpl, namespace: billing}"),
                yaml("for_each: '${input.items}', task: {template: zqname_tpl, namespace: billing, await: false}"),
            ],
            ("lint_template", "yaml") => vec![yaml("task: {template: zqname_tpl, namespace: billing}")],
            ("submit_tasks", "tasks") => vec![
                json!([{"namespace": "billing", "template": "zqname_tpl"}]),
                json!([{"namespace": "shop", "template": "zqname_tpl"}]),
                json!([{"namespace": "shop", "template": "order", "input": {"order_id": "1"}, "idempotency_key": "their-key"}]),
            ],
            ("act_on_tasks", "filter") => vec![
                json!({"namespace": "billing"}),
                json!({"correlation_id": "their-1"}),
                json!({"namespace": "shop", "template": "zqname_tpl"}),
                json!({"namespace": "shop", "correlation_id": "ORD-1"}),
                json!({"namespace": null, "status": "waiting"}),
            ],
            (_, "namespace") => vec![json!("billing")],
            ("submit_task" | "set_schedule", "template") => vec![json!("zqname_tpl"), json!("charge")],
            ("submit_task", "idempotency_key") => vec![json!("their-key")],
            ("submit_task", "correlation_id") => vec![json!("their-1")],
            (
                _,
                "input" | "version" | "priority" | "run_at" | "traceparent" | "tracestate" | "baggage" | "action"
                | "dry_run" | "reason" | "steps" | "from" | "name" | "payload" | "output" | "cron" | "time_zone"
                | "every" | "every_ms" | "once_at" | "missed" | "overlap" | "paused" | "keep_s" | "keep_quarantine_s"
                | "archive" | "handler" | "concurrency" | "rate" | "per_ms" | "open_tasks",
            ) => Vec::new(),
            (id, field) => panic!("{id}: say here what the field {field} names"),
        }
    }

    /// Every operation about one's own, then with each of its places filled from billing.
    fn cases(&self) -> Vec<(String, RequestBuilder, String)> {
        let mut cases = Vec::new();
        for (path, methods) in self.document["paths"].as_object().expect("paths") {
            for (method, operation) in methods.as_object().expect("methods") {
                let id = operation["operationId"].as_str().expect("an id");
                // It has a test of its own; there are no tasks in the others.
                if id == "events" || operation["security"] == json!([]) {
                    continue;
                }
                let parameters: Vec<(&str, &str)> = operation["parameters"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|one| (one["in"].as_str().expect("a place"), one["name"].as_str().expect("a name")))
                    .collect();
                let fields = &operation["requestBody"]["content"]["application/json"]["schema"]["properties"];
                let has_body = method != "get";
                let method: Method = method.to_uppercase().parse().expect("a method");
                let mut add = |what: String, path: String, query: Vec<(&str, String)>, body: Value| {
                    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
                    let mut said = format!("{path}?{query}");
                    let mut request = self.world.request(method.clone(), &said);
                    if has_body {
                        let _ = write!(said, " {body}");
                        request = request.json(&body);
                    }
                    cases.push((format!("{id}: {what}"), request, said));
                };
                let query =
                    || Self::query(id).into_iter().map(|(name, value)| (name, value.to_owned())).collect::<Vec<_>>();
                add("one's own".into(), self.path(path, false), query(), Self::body(id));
                if path.contains('{') {
                    add("path".into(), self.path(path, true), query(), Self::body(id));
                }
                for (_, name) in parameters.iter().filter(|(place, _)| *place == "query") {
                    for value in self.in_query(id, name) {
                        let mut query = query();
                        query.retain(|(known, _)| known != name);
                        query.push((name, value));
                        if id == "remove_limit" && *name == "handler" {
                            query = vec![("namespace", "billing".into()), ("handler", "zqname.pay".into())];
                        }
                        add(format!("query {name}"), self.path(path, false), query, Self::body(id));
                    }
                }
                for field in fields.as_object().into_iter().flatten().map(|(name, _)| name) {
                    for value in Self::in_body(id, field) {
                        let mut body = Self::body(id);
                        body[field] = value;
                        add(format!("body {field}"), self.path(path, false), query(), body);
                    }
                }
            }
        }
        cases
    }
}

/// What is wrong with answers, all of it: one leak seldom comes alone.
#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    /// The answer says nothing of billing that the request did not.
    fn silent(&mut self, what: &str, asked: &str, answer: &Answer) {
        let said = format!("{} {:?}", answer.body, answer.headers).to_lowercase();
        let names = if asked.to_lowercase().contains(NAME) { None } else { said.find(NAME) };
        if let Some(at) = said.find(SECRET).or(names) {
            let around: String = said.chars().skip(at.saturating_sub(200)).take(300).collect();
            self.0.push(format!("{what} tells: {} … {around} …", answer.status));
        }
        self.check(!answer.status.is_server_error(), what, answer);
    }

    fn check(&mut self, is_good: bool, what: &str, answer: &Answer) {
        if !is_good {
            let body: String = answer.body.chars().take(300).collect();
            self.0.push(format!("{what}: {} {body}", answer.status));
        }
    }

    fn none(self) {
        assert!(self.0.is_empty(), "{} findings:\n{}", self.0.len(), self.0.join("\n"));
    }
}

#[tokio::test]
async fn no_operation_tells_or_does_anything_in_another_namespace() {
    let fixture = Fixture::new().await;
    let mut state = fixture.state().await;
    let (mut cases, mut findings) = (0, Findings::default());
    for role in [Role::Admin, Role::Viewer] {
        let key = fixture.world.key_of(role, None, Some(&["shop"])).await;
        for (what, request, asked) in fixture.cases() {
            let answer = send(request.bearer_auth(&key)).await;
            let status = answer.status.as_u16();
            findings.silent(&what, &asked, &answer);
            findings.check(!what.ends_with(": path") || matches!(status, 403 | 404), &what, &answer);
            let names_it = what.ends_with("namespace") || asked.contains("namespace: billing");
            findings.check(!names_it || status == 403 || what.starts_with("lint"), &what, &answer);
            let now = fixture.state().await;
            findings.check(now == state, &format!("{what} did something"), &answer);
            state = now;
            cases += 1;
        }
    }
    findings.none();
    assert!(cases > 200, "{cases} cases");
}

#[tokio::test]
async fn events_of_another_namespace_are_not_heard() {
    let fixture = Fixture::new().await;
    let world = &fixture.world;
    let key = world.key_of(Role::Admin, None, Some(&["shop"])).await;
    let mut findings = Findings::default();
    for refused in [format!("task={}", fixture.task), format!("task={}", fixture.child), "namespace=billing".into()] {
        let answer = world.get(&key, &format!("/v1/events?{refused}")).await;
        findings.check(matches!(answer.status.as_u16(), 403 | 404), &refused, &answer);
        findings.silent(&refused, &refused, &answer);
    }
    findings.none();
    let mut heard = world.request(Method::GET, "/v1/events").bearer_auth(&key).send().await.expect("a stream");
    let mut text = String::new();
    let own = fixture.parent.to_string();
    let listening = async {
        while !text.contains(&own) {
            let moved = "insert into tasker.transitions (task_uuid, entity_uuid, version, generation, from_state, to_state, event, began_at, at, detail)
                 select task_uuid, gen_random_uuid(), 1, 1, 'pending', 'initializing', 'Start', clock_timestamp(), clock_timestamp(), '{\"reason\": \"zqsecret\"}'
                 from tasker.tasks order by task_uuid desc";
            sqlx::query(moved).execute(world.pool()).await.expect("moved");
            let chunk = heard.chunk().await.expect("a stream").expect("it goes on");
            text += &String::from_utf8_lossy(&chunk);
        }
    };
    tokio::time::timeout(Duration::from_secs(30), listening).await.expect("its own task is heard of");
    for theirs in [SECRET, NAME, &fixture.task.to_string(), &fixture.child.to_string()] {
        assert!(!text.contains(theirs), "{theirs}: {text}");
    }
}

/// The routes of `page::routes`, by their paths, each with whether it takes a form.
fn page_routes() -> Vec<(String, bool, bool)> {
    let source = include_str!("../../src/page/mod.rs");
    let routes: Vec<_> = source
        .lines()
        .filter_map(|line| line.trim().strip_prefix(".route(\""))
        .map(|rest| {
            let (path, handlers) = rest.split_once('"').expect("a path");
            (path.to_owned(), handlers.contains("get("), handlers.contains("post("))
        })
        .collect();
    assert!(routes.len() > 15, "{routes:?}");
    routes
}

#[tokio::test]
async fn no_page_tells_or_does_anything_in_another_namespace() {
    let fixture = Fixture::new().await;
    let mut state = fixture.state().await;
    let mut findings = Findings::default();
    let world = &fixture.world;
    let step: Uuid = sqlx::query_scalar("select step_uuid from tasker.steps where task_uuid = $1")
        .bind(fixture.task)
        .fetch_one(world.pool())
        .await
        .unwrap();
    let own_step: Uuid = sqlx::query_scalar("select step_uuid from tasker.steps where task_uuid = $1")
        .bind(fixture.parent)
        .fetch_one(world.pool())
        .await
        .unwrap();
    let fill = |path: &str, billing: bool| {
        let step = if billing { step } else { own_step };
        fixture.path(&path.replace("{step}", &step.to_string()), billing)
    };
    for role in [Role::Admin, Role::Viewer] {
        let key = world.key_of(role, None, Some(&["shop"])).await;
        let cookie = world.session(&key).await;
        let csrf = auth::csrf_of(cookie.split_once('=').unwrap().1);
        let mut seen = BTreeSet::new();
        for (path, reads, writes) in page_routes() {
            if reads {
                let mut asks = vec![(fill(&path, false), false), (fill(&path, true), path.contains('{'))];
                let more: &[&str] = match path.as_str() {
                    "/" => &[
                        "?namespace=billing",
                        "?template=zqname_tpl",
                        "?correlation_id=their-1",
                        "?correlation_id=ORD-1",
                        "?error_type=ZqnameError",
                    ],
                    "/search" => &["?q=their-1", "?q=their-key", "?q=ORD-1"],
                    "/audit" => &["?actor=zqname-operator"],
                    "/templates/{namespace}/{name}" => &["?version=1", "?since=1"],
                    _ => &[],
                };
                asks.extend(more.iter().map(|query| (format!("{}{query}", fill(&path, false)), false)));
                if path == "/search" || path == "/audit" {
                    let parameter = if path == "/search" { "q" } else { "task" };
                    asks.extend(
                        [fixture.task, fixture.child].map(|task| (format!("{path}?{parameter}={task}"), false)),
                    );
                }
                for (asked, is_theirs) in asks {
                    let answer = send(world.request(Method::GET, &asked).header("cookie", &cookie)).await;
                    findings.silent(&asked, &asked, &answer);
                    findings.check(!is_theirs || matches!(answer.status.as_u16(), 403 | 404), &asked, &answer);
                    seen.insert(answer.status.as_u16());
                }
            }
            if writes {
                let task = fixture.task.to_string();
                let fields: &[&str] = match path.as_str() {
                    "/bulk" => &["action=cancel&confirm=yes&task=TASK"],
                    "/example" => &["input=0"],
                    "/tasks/{task}/act" => &["action=cancel", "action=skip_step&step=zqname_step"],
                    "/tasks/{task}/signal" => &["name=approve&payload={}"],
                    "/queues/act" => {
                        &["queue=worker_billing&action=resume", "queue=worker_billing__zqname&action=pause"]
                    }
                    "/quarantine/{id}" => &["action=requeue", "action=discard"],
                    "/templates/{namespace}/{name}" => &["version=1"],
                    "/schedules/act" => &[
                        "namespace=billing&name=zqname_daily&action=trigger",
                        "namespace=billing&name=zqname_daily&action=pause",
                    ],
                    other => panic!("say here what the form of {other} names"),
                };
                for form in fields {
                    let form = format!("csrf={csrf}&{}", form.replace("TASK", &task));
                    let asked = fill(&path, true);
                    let request = world
                        .request(Method::POST, &asked)
                        .header("cookie", &cookie)
                        .header("content-type", "application/x-www-form-urlencoded")
                        .body(form.clone());
                    let answer = send(request).await;
                    let asked = format!("{asked} {form}");
                    findings.silent(&asked, &asked, &answer);
                    let now = fixture.state().await;
                    findings.check(now == state, &format!("{asked} did something"), &answer);
                    state = now;
                }
            }
        }
        assert!(seen.contains(&200) && seen.contains(&404), "{seen:?}");
    }
    findings.none();
}

#[tokio::test]
async fn a_namespace_at_its_limit_on_open_tasks_is_told_so() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    world.register(&order("depot")).await;
    let (admin, own) = (world.key(Role::Admin).await, world.key_of(Role::Admin, None, Some(&["shop"])).await);
    let put = |key: &str, body: Value| send(world.request(Method::PUT, "/v1/limits").bearer_auth(key).json(&body));
    let most = json!({"namespace": "shop", "open_tasks": 2, "reason": "it floods"});
    assert_eq!(put(&own, most.clone()).await.code(), "forbidden", "it protects the others from this namespace");
    assert_eq!(put(&admin, most).await.status, 200);
    for wrong in
        [json!({"open_tasks": 0}), json!({"open_tasks": 2, "concurrency": 1}), json!({"open_tasks": 2, "handler": "a"})]
    {
        let mut body = wrong.clone();
        body["namespace"] = json!("shop");
        let refused = put(&admin, body).await;
        assert_eq!((refused.status.as_u16(), refused.at("/field")), (400, json!("open_tasks")), "{wrong}: {refused:?}");
    }

    let task = |namespace: &str, key: &str| json!({"namespace": namespace, "template": "order", "input": {"order_id": "1"}, "idempotency_key": key});
    let first = world.post(&own, "/v1/tasks", task("shop", "a")).await;
    assert_eq!(first.status, 200, "{first:?}");
    let batch = json!({"tasks": [task("shop", "b"), task("shop", "c"), task("shop", "a"), task("depot", "d")]});
    let batch = world.post(&admin, "/v1/tasks/batch", batch).await;
    let codes: Vec<Value> = batch.at("/results").as_array().unwrap().iter().map(|row| row["code"].clone()).collect();
    assert_eq!(codes, [Value::Null, json!("too_many_open_tasks"), Value::Null, Value::Null], "{batch:?}");
    let refused = world.post(&own, "/v1/tasks", task("shop", "c")).await;
    assert_eq!(
        (refused.status.as_u16(), &*refused.code(), refused.at("/field")),
        (429, "too_many_open_tasks", json!("namespace"))
    );
    let detail = "namespace: shop has 2 open tasks, its limit; submit again when some have ended, or raise it: `tasker limit set shop --open-tasks N`";
    assert_eq!(refused.at("/detail"), detail);
    let again = world.post(&own, "/v1/tasks", task("shop", "a")).await;
    assert_eq!((again.at("/task_uuid"), again.at("/is_new")), (first.at("/task_uuid"), json!(false)));
    let listed = world.get(&own, "/v1/limits").await;
    assert_eq!((listed.at("/items/0/kind"), listed.at("/items/0/in_use")), (json!("open_tasks"), json!(2)));

    let delete =
        |key: &str| send(world.request(Method::DELETE, "/v1/limits?namespace=shop&open_tasks=true").bearer_auth(key));
    assert_eq!(delete(&own).await.code(), "forbidden");
    assert_eq!(
        (delete(&admin).await.status, delete(&admin).await.status),
        (200.try_into().unwrap(), 404.try_into().unwrap())
    );
    assert_eq!(world.post(&own, "/v1/tasks", task("shop", "c")).await.status, 200);
}
