//! Namespaces do not leak: a step starts a task in another one only by right of who registered its
//! template, what that task says of its failure stays there, and no namespace has more open tasks than
//! it may.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Executor};
use tasker_shared::client::Client;
use tasker_shared::schedule::{Overlap, Schedule};
use tasker_shared::store::templates::{self, Registration, TemplateError};
use tasker_shared::template;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

const SECRET: &str = "zqsecret";

/// One namespace with workers, and `billing`, whose task ends when somebody sends it `go`.
async fn world() -> World {
    let world = World::start(Setup::default()).await;
    world.register_as("billing", "charge", "1", "steps: [{name: hold, wait: {signal: go}}]").await;
    world.register_steps("one", "a: ok").await;
    world
}

/// A template of `tests` that awaits one of `billing`.
fn crossing(name: &str) -> template::Checked {
    let yaml = format!(
        "namespace: tests\nname: {name}\nversion: \"1\"\nsteps: [{{name: pay, task: {{template: charge, namespace: billing}}, input: {{}}}}]\n"
    );
    template::parse("test.yaml", &yaml).expect("a good template")
}

async fn apply(world: &World, name: &str, key: Option<&str>) -> Result<Registration, TemplateError> {
    templates::apply(&mut world.pool.acquire().await.expect("a connection"), &crossing(name), key, key).await
}

async fn key(world: &World, name: &str, namespaces: Option<&[&str]>) {
    let made = "select tasker.create_api_key(md5(random()::text), $1, sha256(md5(random()::text)::bytea), 'admin', null, $2, null, 'test')";
    sqlx::query(made).bind(name).bind(namespaces).execute(&world.pool).await.expect("a key");
}

async fn revoke(world: &World, name: &str) {
    sqlx::query("select tasker.revoke_api_key($1, 'test')").bind(name).execute(&world.pool).await.expect("revoked");
}

async fn child(world: &World, task: Uuid) -> Uuid {
    eventually("a task was started", async || {
        let query = sqlx::query_scalar(
            "select child_uuid from tasker.children where task_uuid = $1 and child_uuid is not null",
        );
        query.bind(task).fetch_optional(&world.pool).await.expect("children")
    })
    .await
}

/// Runs a task of this template, ends the task that it starts, and answers what came back.
async fn crosses(world: &World, template: &str) -> Value {
    let task = world.submit(template).await;
    let child = child(world, task).await;
    let client = Client::from_pool(world.pool.clone());
    eventually("it waits", async || client.signal(child, "go", &json!({"paid": SECRET}), None).await.ok()).await;
    assert_eq!(world.finish(&[task]).await, ["complete"], "{template}");
    client.result(task).await.expect("a result")["pay"].clone()
}

/// Runs a task of this template, which may not start the other, and answers why.
async fn is_barred(world: &World, template: &str) -> String {
    let task = world.submit(template).await;
    assert_eq!(world.finish(&[task]).await, ["error"], "{template}");
    assert_eq!(world.of_task(task, "error_type").await.as_deref(), Some("child_not_created"));
    world.of_task(task, "reason").await.expect("a reason")
}

fn refusal(answer: Result<Registration, TemplateError>) -> (String, String) {
    match answer {
        Err(TemplateError::Store(tasker_shared::store::Error::Database(sqlx::Error::Database(error)))) => {
            (error.code().unwrap_or_default().into_owned(), error.message().to_owned())
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_crosses_by_right_of_the_key_that_registered_it_as_that_right_is_now() {
    let world = world().await;
    // The owner's own, without ceremony.
    world.register("own", "steps: [{name: pay, task: {template: charge, namespace: billing}, input: {}}]").await;
    assert_eq!(crosses(&world, "own").await, json!({"hold": {"paid": SECRET}}));

    key(&world, "shop only", Some(&["tests"])).await;
    let (code, text) = refusal(apply(&world, "thief", Some("shop only")).await);
    assert_eq!(code, "42501");
    assert_eq!(
        text,
        "steps: step pay starts a task in namespace billing, which the API key shop only may not use; \
         let somebody who may use both apply the template"
    );
    assert_eq!(world.number("select count(*) from tasker.templates where name = 'thief'").await, 0);
    assert_eq!(refusal(apply(&world, "own", Some("shop only")).await).0, "42501", "also what is there already");
    crosses(&world, "own").await;

    key(&world, "both", Some(&["tests", "billing"])).await;
    apply(&world, "paying", Some("both")).await.expect("registered");
    crosses(&world, "paying").await;
    let wanted = "step pay failed: the task could not be created: namespace: template tests/paying 1 was registered by \
                  the API key both, who may not use namespace billing; let somebody who may use both apply it again";
    revoke(&world, "both").await;
    assert_eq!(is_barred(&world, "paying").await, wanted);
    // Another of the same name takes its place, with its own right.
    key(&world, "both", Some(&["tests"])).await;
    assert_eq!(is_barred(&world, "paying").await, wanted);
    revoke(&world, "both").await;
    key(&world, "both", None).await;
    crosses(&world, "paying").await;
    sqlx::query("update tasker.api_keys set expires_at = clock_timestamp() where name = 'both'")
        .execute(&world.pool)
        .await
        .unwrap();
    assert_eq!(is_barred(&world, "paying").await, wanted);
    // Who has no right to it cannot apply it again; the owner can, and answers for it then.
    assert_eq!(refusal(apply(&world, "paying", Some("shop only")).await).0, "42501");
    assert_eq!(is_barred(&world, "paying").await, wanted);
    assert!(!apply(&world, "paying", None).await.expect("it is there already").is_new);
    crosses(&world, "paying").await;
    let adopted = world.words("select subject from tasker.audit where action = 'template.adopt'").await;
    assert_eq!(adopted, ["template tests/paying 1"]);
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_crosses_by_right_of_the_role_that_registered_it_as_that_right_is_now() {
    let world = world().await;
    // Roles belong to the whole server, so each run has its own.
    let role = format!("registrar_{}", Uuid::new_v4().simple());
    let grants = format!(
        "create role {role}; grant usage on schema tasker, pgmq to {role}; grant select on pgmq.meta to {role};
         grant select, insert on tasker.templates, tasker.template_steps, tasker.template_edges, tasker.audit to {role};
         grant execute on function tasker.create_queue, tasker.adopt_template to {role};
         insert into tasker.role_namespaces values ('{role}', 'tests')"
    );
    world.pool.execute(AssertSqlSafe(grants)).await.expect("a role");
    let mut session = PgConnection::connect(&world.url).await.expect("a session");
    session.execute(AssertSqlSafe(format!("set session authorization {role}"))).await.expect("the role");

    let (code, text) = refusal(templates::register(&mut session, &crossing("paying")).await);
    assert_eq!(code, "42501");
    assert!(text.contains("step pay starts a task in namespace billing, which the role registrar_"), "{text}");
    let forged = "insert into tasker.templates (namespace, name, version, definition, registered_role)
                  values ('tests', 'forged', '1', '{\"steps\": [{\"name\": \"a\", \"task\": {\"template\": \"charge\", \"namespace\": \"billing\"}}]}', null)";
    session.execute(forged).await.expect_err("nobody says who they are");

    let both = format!("insert into tasker.role_namespaces values ('{role}', 'billing')");
    world.pool.execute(AssertSqlSafe(both)).await.expect("granted");
    templates::register(&mut session, &crossing("paying")).await.expect("registered");
    crosses(&world, "paying").await;
    world.pool.execute("delete from tasker.role_namespaces where namespace = 'billing'").await.expect("taken away");
    let why = is_barred(&world, "paying").await;
    assert!(why.contains(&format!("was registered by the role {role}, who may not use namespace billing")), "{why}");
    session.close().await.expect("closed");
    let gone = format!("drop owned by {role}; drop role {role}");
    world.pool.execute(AssertSqlSafe(gone)).await.expect("tidied up");
    assert!(is_barred(&world, "paying").await.contains("was registered by the role"), "also when the role is gone");
    apply(&world, "paying", None).await.expect("applied again");
    crosses(&world, "paying").await;
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_task_says_of_its_failure_stays_in_its_namespace() {
    let world = world().await;
    for (namespace, told) in [("billing", false), ("tests", true)] {
        world.register_as(namespace, "hold", "1", "steps: [{name: hold, wait: {signal: go}}]").await;
        let name = format!("asks_{namespace}");
        world.register(&name, &format!("steps: [{{name: pay, task: {{template: hold, namespace: {namespace}}}, input: {{}}, retry: {{max_attempts: 1}}}}]")).await;
        let task = world.submit(&name).await;
        let child = child(&world, task).await;
        let client = Client::from_pool(world.pool.clone());
        eventually("it can be cancelled", async || client.cancel(child, None, Some(SECRET)).await.ok()).await;
        assert_eq!(world.finish(&[task]).await, ["error"]);
        let reason = world.of_task(task, "reason").await.expect("a reason");
        assert!(reason.contains(&format!("task {child} of template hold was cancelled")), "{reason}");
        assert_eq!(reason.contains(SECRET), told, "{reason}");
        let said =
            "select string_agg(said, ' ') from (select error::text as said from tasker.attempts where task_uuid = $1
                    union all select detail::text from tasker.transitions where task_uuid = $1) s";
        let said: Option<String> = sqlx::query_scalar(said).bind(task).fetch_one(&world.pool).await.expect("its log");
        assert_eq!(said.expect("it says something").contains(SECRET), told, "in its attempts or its log");
    }
    world.end().await;
}

/// What an argument of a public function names in billing; null of one that may be left out.
fn of_billing(function: &str, argument: &str) -> Option<&'static str> {
    Some(match argument {
        "task" | "p_task" => "(select task_uuid from objects)",
        "step" | "p_step_name" => "'hold'",
        "from_steps" | "steps" => "array['hold']",
        "namespace" | "p_namespace" | "scope" => "'billing'",
        "name" if function == "signal_task" => "'go'",
        "name" => "'daily'",
        "template" => "'charge'",
        "queue" => "'worker_billing'",
        "queues" => "array['worker_billing']",
        "worker" | "p_worker" => "'stranger'",
        "handlers" | "p_handlers" => "array['pay']",
        "handler" => "'pay'",
        "slots" | "p_max" | "concurrency" | "p_open_tasks" => "5",
        "ratio" => "0.5",
        "cron" => "'@daily'",
        "keep" => "interval '5 h'",
        "payload" | "output" => "'{\"a\": 1}'::jsonb",
        "p_template_id" => "(select template_id from objects)",
        "p_action" => "'cancel'",
        "p_dry_run" => "false",
        "p_filter" => "'{\"namespace\": \"billing\"}'::jsonb",
        "p_requests" => "jsonb_build_array('{\"namespace\": \"billing\", \"template\": \"charge\"}'::jsonb)",
        "p_claims" | "p_results" => {
            "jsonb_build_array(jsonb_build_object('step', (select step_uuid from objects), 'token', gen_random_uuid(), 'outcome', 'success'))"
        }
        "policy" | "settings" => "'{}'::jsonb",
        "p_queue" => "null",
        "p_key" | "p_actor" | "actor" | "reason" | "p_reason" | "p_lease" | "lock_key" | "version" | "terminate"
        | "pause" | "rate" | "per" | "keep_quarantine" | "archive" | "time_zone" | "every" | "once_at" | "input"
        | "priority" | "missed" | "overlap" | "paused" | "correlation_id" | "idempotency_key" | "run_at"
        | "traceparent" | "tracestate" | "baggage" => return None,
        other => panic!("{function}: say here what the argument {other} names"),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn no_public_function_tells_or_does_anything_in_another_namespace() {
    let world = World::start(Setup { orchestrators: 0, workers: 0, ..Setup::default() }).await;
    world.register_as("billing", "charge", "1", "steps: [{name: hold, handler: pay}]").await;
    let request =
        json!({"namespace": "billing", "template": "charge", "input": {"a": SECRET}, "correlation_id": SECRET});
    let task = world.submit_with(request).await.expect("submitted");
    let role = format!("stranger_{}", Uuid::new_v4().simple());
    let rows = format!(
        "insert into tasker.steps (step_uuid, task_uuid, step_index, queue, remaining_dependencies, state, attempt, last_at)
           values (gen_random_uuid(), '{task}', 0, 'worker_billing', 0, 'complete', 1, clock_timestamp());
         insert into tasker.attempts (task_uuid, step_uuid, attempt, generation, claim_token, worker, claim_began_at, claimed_at, output)
           select task_uuid, step_uuid, 1, 1, gen_random_uuid(), 'w', last_at, last_at, '\"zqsecret\"' from tasker.steps;
         update tasker.tasks set state = 'blocked_by_failures', reason = 'zqsecret';
         select tasker.set_schedule('billing', 'daily', 'charge', cron => '@daily', input => '{{\"a\": \"zqsecret\"}}');
         select tasker.set_limit('billing', 'pay', 3);
         select tasker.pause_queue('worker_billing', 'zqsecret');
         select tasker.set_retention('billing', interval '2 h');
         create role {role}; grant usage on schema tasker to {role}; grant execute on all functions in schema tasker to {role};
         insert into tasker.role_namespaces values ('{role}', 'tests')"
    );
    sqlx::raw_sql(AssertSqlSafe(rows)).execute(&world.pool).await.expect("billing");
    let state = async || {
        let all = "select md5(concat_ws('|', (select string_agg(t::text, ';' order by t.task_uuid) from tasker.tasks t),
              (select string_agg(s::text, ';') from tasker.steps s), (select string_agg(s::text, ';') from tasker.schedules s),
              (select string_agg(l::text, ';') from tasker.limits l), (select string_agg(l::text, ';') from tasker.open_tasks_limits l),
              (select string_agg(r::text, ';') from tasker.retention r), (select string_agg(p::text, ';') from tasker.paused_queues p),
              (select string_agg(s::text, ';') from tasker.signals s), (select string_agg(p.registered_role || '', ';') from tasker.templates p),
              (select count(*) from tasker.audit), (select count(*) from pgmq.q_task_requests)))";
        world.words(all).await.pop()
    };
    let before = state().await;
    let functions: Vec<(String, Vec<String>, i16)> = sqlx::query_as(
        "select p.proname::text, coalesce(p.proargnames[1:p.pronargs], '{}'), p.pronargs - p.pronargdefaults
         from pg_proc p where p.pronamespace = 'tasker'::regnamespace and p.prosecdef and p.prorettype <> 'trigger'::regtype order by 1",
    )
    .fetch_all(&world.pool)
    .await
    .expect("the catalog");
    assert!(functions.len() > 30, "{functions:?}");
    let mut session = PgConnection::connect(&world.url).await.expect("a session");
    // What the arguments name, since the role may not look.
    let objects = "create temporary table objects as
        select s.task_uuid, s.step_uuid, t.template_id from tasker.steps s join tasker.tasks t on t.task_uuid = s.task_uuid;
        grant select on objects to public";
    sqlx::raw_sql(objects).execute(&mut session).await.expect("objects");
    session.execute(AssertSqlSafe(format!("set session authorization {role}"))).await.expect("the role");
    let mut findings = Vec::new();
    for (function, arguments, required) in functions {
        let named: Vec<String> = (0_i16..)
            .zip(&arguments)
            .filter_map(|(n, argument)| match of_billing(&function, argument) {
                Some(value) => Some(format!("\"{argument}\" => {value}")),
                None if n < required => Some(format!("\"{argument}\" => null")),
                None => None,
            })
            .collect();
        let call = format!("select string_agg(f::text, ' ') from tasker.{function}({}) f", named.join(", "));
        let said: Result<Option<String>, sqlx::Error> =
            sqlx::query_scalar(AssertSqlSafe(call.clone())).fetch_one(&mut session).await;
        let said = match said {
            Ok(said) => said.unwrap_or_default(),
            Err(error) => {
                let error = error.as_database_error().expect("an answer of the database");
                // A call that is no call proves nothing.
                if ["42883", "42601", "42703", "42P01", "42725"].contains(&&*error.code().unwrap_or_default()) {
                    findings.push(format!("{call}: {}", error.message()));
                }
                error.message().to_owned()
            }
        };
        if said.contains(SECRET) || said.contains(&task.to_string()) {
            findings.push(format!("{function} tells: {said}"));
        }
        if state().await != before {
            findings.push(format!("{function} did something: {said}"));
            break;
        }
    }
    // The same question by who may ask it.
    let both = format!("insert into tasker.role_namespaces values ('{role}', 'billing')");
    world.pool.execute(AssertSqlSafe(both)).await.expect("granted");
    let told: Value = sqlx::query_scalar("select tasker.step_output((select task_uuid from objects), 'hold')")
        .fetch_one(&mut session)
        .await
        .expect("an output");
    assert_eq!(told, json!(SECRET));
    session.close().await.expect("closed");
    world.pool.execute(AssertSqlSafe(format!("drop owned by {role}; drop role {role}"))).await.expect("tidied up");
    assert!(findings.is_empty(), "{}", findings.join("\n"));
    world.end().await;
}

// The limit on open tasks.

async fn limit(world: &World, namespace: &str, most: Option<i32>) {
    let client = Client::from_pool(world.pool.clone());
    client.set_open_tasks_limit(namespace, most, Some("ada"), Some("it floods")).await.expect("set");
}

const REFUSED: &str = "namespace: tests has 3 open tasks, its limit; submit again when some have ended, or raise it: `tasker limit set tests --open-tasks N`";

#[tokio::test(flavor = "multi_thread")]
async fn at_its_limit_a_namespace_is_refused_at_every_door_and_no_other() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    world.register_as("billing", "charge", "1", "steps: [{name: hold, wait: {signal: go}}]").await;
    limit(&world, "tests", Some(3)).await;
    let request = |key: &str| json!({"template": "one", "idempotency_key": key});
    let first = world.submit_with(request("first")).await.expect("submitted");
    let second = world.submit("one").await;

    // A batch: the first in order are let through.
    let batch = json!([
        {"namespace": "tests", "template": "none"},
        {"namespace": "tests", "template": "one", "idempotency_key": "last"},
        {"namespace": "tests", "template": "one", "idempotency_key": "beyond"},
        {"namespace": "tests", "template": "one", "idempotency_key": "beyond"},
        {"namespace": "billing", "template": "charge"},
        {"namespace": "tests", "template": "one", "idempotency_key": "last"},
        {"namespace": "tests", "template": "one", "idempotency_key": "first"},
    ]);
    let rows: Vec<(bool, Option<String>)> =
        sqlx::query_as("select is_new, error from tasker.submit_tasks($1) order by ordinal")
            .bind(batch)
            .fetch_all(&world.pool)
            .await
            .expect("answers");
    assert!(rows[0].1.as_deref().is_some_and(|error| error.starts_with("template: ")), "{rows:?}");
    let refused = (false, Some(REFUSED.to_owned()));
    assert_eq!(rows[1..], [(true, None), refused.clone(), refused, (true, None), (false, None), (false, None)]);

    // One task, from SQL; the key of what was refused is still free, that of what exists is known.
    assert_eq!(world.submit_with(request("beyond")).await, Err(REFUSED.to_owned()));
    assert_eq!(world.submit_with(request("first")).await, Ok(first));
    assert_eq!(world.number("select count(*) from tasker.idempotency_keys").await, 2);
    // A raw message stands in quarantine, and says why. What its sender says of itself opens no door.
    let raw =
        json!({"v": 1, "type": "submit", "namespace": "tests", "template": "one", "exempt": true, "awaited": true});
    world.send("task_requests", &raw, None).await;
    let quarantined =
        eventually("it is quarantined", async || world.words("select reason from tasker.quarantine").await.pop()).await;
    assert_eq!(quarantined, REFUSED);
    let client = Client::from_pool(world.pool.clone());
    let refused = client.submit(tasker_shared::client::Submit::new("tests", "one", json!({}))).await.unwrap_err();
    assert_eq!(refused.to_string(), REFUSED);

    // A schedule: the tick is refused and says so, and the run before goes on.
    let schedule = Schedule {
        every: Some("1h".into()),
        overlap: Overlap::CancelPrevious,
        ..Schedule::new("tests", "hourly", "one")
    };
    client.set_schedule(&schedule, None).await.expect("set");
    sqlx::query("update tasker.schedules set last_task = $1").bind(second).execute(&world.pool).await.expect("set");
    let refused = client.trigger_schedule(("tests", "hourly"), None, None).await.unwrap_err().to_string();
    assert!(refused.starts_with("the run of ") && refused.ends_with(REFUSED), "{refused}");
    let view = client.schedule("tests", "hourly").await.expect("read").expect("there");
    assert_eq!(view.problem.as_deref(), Some(&*refused));
    assert_eq!(world.number("select count(*) from pgmq.q_task_requests where message->>'type' = 'cancel'").await, 0);
    assert_eq!(world.number("select count(*) from tasker.tasks where namespace = 'tests'").await, 3);

    // It is seen, and as soon as one has ended the next is let through, everywhere.
    let seen = client.limits(Some("tests")).await.expect("limits");
    assert_eq!((&*seen[0].kind, seen[0].concurrency, seen[0].in_use), ("open_tasks", Some(3), 3));
    let claim = world.claim().await;
    world.succeed(&claim).await;
    world.finish(&[claim.task]).await;
    world.submit_with(request("beyond")).await.expect("there is room");
    assert_eq!(world.submit_with(request("more")).await, Err(REFUSED.to_owned()));
    limit(&world, "tests", Some(4)).await;
    world.submit_with(request("more")).await.expect("it was raised");
    limit(&world, "tests", None).await;
    client.set_open_tasks_limit("tests", None, None, None).await.expect_err("there is none");
    for _ in 0..5 {
        world.submit("one").await;
    }
    let audit = world.words("select action || ' ' || subject || ' ' || actor || ' ' || reason from tasker.audit where actor = 'ada' order by audit_id").await;
    assert_eq!(
        audit,
        [
            "set_open_tasks_limit limit tests, 3 open tasks ada it floods",
            "set_open_tasks_limit limit tests, 4 open tasks ada it floods",
            "remove_open_tasks_limit limit tests ada it floods"
        ]
    );
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_running_task_waits_for_passes_its_limit_and_what_it_only_starts_does_not() {
    let world = world().await;
    world.register("waits", "steps: [{name: child, task: {template: one}, input: {}}]").await;
    world.register("starts", "steps: [{name: child, task: {template: one, await: false}, input: {}}]").await;
    world.register("pays", "steps: [{name: child, task: {template: charge, namespace: billing}, input: {}}]").await;
    limit(&world, "tests", Some(1)).await;
    limit(&world, "billing", Some(1)).await;
    let task = world.submit("waits").await;
    assert_eq!(world.finish(&[task]).await, ["complete"], "a task does not fail by the room that it takes itself");

    let refused = async |template: &str| {
        let task = world.submit(template).await;
        assert_eq!(world.finish(&[task]).await, ["error"], "{template}");
        assert_eq!(world.of_task(task, "error_type").await.as_deref(), Some("child_not_created"));
        world.of_task(task, "reason").await.expect("a reason")
    };
    let reason = refused("starts").await;
    assert!(reason.contains("the task could not be created: namespace: tests has 1 open tasks, its limit"), "{reason}");
    world.submit_with(json!({"namespace": "billing", "template": "charge"})).await.expect("submitted");
    let reason = refused("pays").await;
    assert!(reason.contains("namespace: billing has 1 open tasks, its limit"), "{reason}");
    world.queues_drained().await;
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_owner_sets_the_limit_on_open_tasks_and_only_to_a_number() {
    let world = World::start(Setup { orchestrators: 0, workers: 0, ..Setup::default() }).await;
    for (arguments, field) in [
        ("'tests', 0", "open_tasks: "),
        ("'tests', -1", "open_tasks: "),
        ("'tests', 2147483647", "open_tasks: "),
        ("null, 5", "namespace: "),
        ("'', 5", "namespace: "),
        ("'Tests', 5", "namespace: "),
        ("repeat('a', 41), 5", "namespace: "),
        ("'tests', null", "there is no such limit"),
    ] {
        let query = format!("select tasker.set_open_tasks_limit({arguments})");
        let said: String = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(&world.pool).await.expect("an answer");
        assert!(said.starts_with(field), "{arguments}: {said}");
    }
    let role = format!("limited_{}", Uuid::new_v4().simple());
    let grants = format!(
        "create role {role}; grant usage on schema tasker to {role}; grant execute on function tasker.set_open_tasks_limit to {role};
         insert into tasker.role_namespaces values ('{role}', 'tests')"
    );
    world.pool.execute(AssertSqlSafe(grants)).await.expect("a role");
    let mut session = PgConnection::connect(&world.url).await.expect("a session");
    session.execute(AssertSqlSafe(format!("set session authorization {role}"))).await.expect("the role");
    let said: String = sqlx::query_scalar("select tasker.set_open_tasks_limit('tests', 5)")
        .fetch_one(&mut session)
        .await
        .expect("an answer");
    assert_eq!(said, "open_tasks: only the owner of the schema may set it");
    session.close().await.expect("closed");
    world.pool.execute(AssertSqlSafe(format!("drop owned by {role}; drop role {role}"))).await.expect("tidied up");
    world.end().await;
}

/// Milliseconds from the submit to the claim of the first step that 99 of 100 tasks stay under.
async fn p99_start(world: &World, round: &str) -> f64 {
    let mut tasks = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    for _ in 0..400 {
        tick.tick().await;
        let request = json!({"template": "one", "correlation_id": round});
        tasks.push(world.submit_with(request).await.expect("submitted"));
    }
    world.finish(&tasks).await;
    sqlx::query_scalar(
        "select percentile_cont(0.99) within group (order by extract(epoch from a.claimed_at - t.created_at) * 1000)::float8
         from tasker.tasks t join tasker.attempts a on a.task_uuid = t.task_uuid where t.correlation_id = $1",
    )
    .bind(round)
    .fetch_one(&world.pool)
    .await
    .expect("a figure")
}

/// A flood: 2,000 tasks are wanted, 1,000 are let in and wait for ever, and four clients ask for more,
/// 400 times a second together.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures, and takes a minute: `just flood-proof`"]
async fn a_flood_at_its_limit_at_most_doubles_the_p99_start_of_another_namespace() {
    let world = World::start(Setup { orchestrators: 2, workers: 2, ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    world.register_as("flood", "charge", "1", "steps: [{name: hold, handler: nobody}]").await;
    limit(&world, "flood", Some(1000)).await;
    p99_start(&world, "warm").await;
    let (mut quiet, mut flooded, mut refusals) = (Vec::new(), Vec::new(), 0);
    for round in 0..5 {
        quiet.push(p99_start(&world, &format!("quiet {round}")).await);
        let many: Vec<Value> = vec![json!({"namespace": "flood", "template": "charge"}); 2000];
        sqlx::query("select count(*) from tasker.submit_tasks($1)")
            .bind(json!(many))
            .execute(&world.pool)
            .await
            .expect("asked");
        let stop = tokio_util::sync::CancellationToken::new();
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let (pool, stop) = (world.pool.clone(), stop.clone());
                tokio::spawn(async move {
                    let (mut tick, mut refused) = (tokio::time::interval(Duration::from_millis(10)), 0);
                    while !stop.is_cancelled() {
                        tick.tick().await;
                        let asked = sqlx::query("select tasker.submit_task('flood', 'charge')").execute(&pool).await;
                        refused += u32::from(asked.is_err());
                    }
                    refused
                })
            })
            .collect();
        flooded.push(p99_start(&world, &format!("flooded {round}")).await);
        stop.cancel();
        for client in clients {
            refusals += client.await.expect("a client");
        }
        let open =
            world.number("select count(*) from tasker.tasks where namespace = 'flood' and finished_at is null").await;
        assert!((1000..=1004).contains(&open), "{open} open tasks");
        sqlx::query(
            "update tasker.steps set state = 'cancelled', held_by = null, ready_at = null where queue = 'worker_flood'",
        )
        .execute(&world.pool)
        .await
        .expect("ended");
        sqlx::query("update tasker.tasks set state = 'cancelled', finished_at = clock_timestamp(), open_steps = 0, held_steps = 0, in_flight_steps = 0 where namespace = 'flood' and finished_at is null").execute(&world.pool).await.expect("ended");
    }
    let median = |figures: &mut Vec<f64>| {
        figures.sort_by(f64::total_cmp);
        figures[figures.len() / 2]
    };
    let (quiet, flooded) = (median(&mut quiet), median(&mut flooded));
    println!("p99 start: {quiet:.1} ms, with a flood at its limit {flooded:.1} ms ({refusals} submits refused)");
    assert!(flooded <= 2.0 * quiet, "{flooded} ms, {quiet} ms without the flood");
    world.end().await;
}
