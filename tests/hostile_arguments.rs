//! What a stranger says costs nobody but the stranger: every argument of every public function is
//! checked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection, Row};
use tasker_tests::worker::{Answer, HANDLERS};
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};
use crate::hostile_roles::{OTHER, Stranger, ask, other_namespace};

/// What a public function takes.
struct Function {
    name: String,
    arguments: Vec<(String, String)>,
}

async fn public_functions(world: &World) -> Vec<Function> {
    let rows = sqlx::query(
        "select p.proname::text, coalesce(array_agg(a.name order by a.place) filter (where a.place <= p.pronargs), '{}') as names,
           coalesce(array_agg(format_type(p.proargtypes[a.place - 1], null) order by a.place) filter (where a.place <= p.pronargs), '{}') as types
         from pg_proc p left join lateral unnest(p.proargnames) with ordinality a(name, place) on true
         where p.pronamespace = 'tasker'::regnamespace and p.prosecdef
         group by p.oid, p.proname order by p.proname",
    )
    .fetch_all(&world.pool)
    .await
    .expect("the catalog");
    let read = |row: &sqlx::postgres::PgRow| {
        let (names, types): (Vec<String>, Vec<String>) = (row.get(1), row.get(2));
        Function { name: row.get(0), arguments: names.into_iter().zip(types).collect() }
    };
    rows.iter().map(read).collect()
}

/// What makes a call good, so that only the argument in question is bad.
fn good(function: &str, argument: &str, task: Uuid) -> String {
    let of_function = match (function, argument) {
        ("set_retention" | "set_sampling", "namespace") => Some("'tests'"),
        ("worker_hello", "version") => Some("'1'"),
        ("signal_task", "name") => Some("'go'"),
        ("set_schedule", "cron") => Some("'0 0 1 1 *'"),
        ("set_schedule", "paused") => Some("true"),
        _ => None,
    };
    let common = || match argument {
        "worker" | "p_worker" => "'stranger'",
        "namespace" | "p_namespace" => "'other'",
        "queues" => "'{worker_other}'",
        "queue" => "'worker_other'",
        "handlers" | "p_handlers" => "'{ok}'",
        "slots" | "concurrency" | "p_open_tasks" => "3",
        "p_max" => "2",
        "p_lease" => "'10 s'",
        "p_claims" | "p_results" | "p_requests" => "'[]'",
        "p_step_name" | "step" => "'a'",
        "steps" | "from_steps" => "'{a}'",
        "handler" => "'ok'",
        "template" => "'mine'",
        "name" => "'nightly'",
        "terminate" | "archive" => "false",
        "pause" | "p_dry_run" => "true",
        "priority" => "0",
        "missed" => "'run_once'",
        "overlap" => "'allow'",
        "input" | "output" | "payload" | "settings" => "'{}'",
        "p_filter" => "'{\"namespace\": \"other\"}'",
        "p_action" => "'suspend'",
        "keep" | "keep_quarantine" => "'1 day'",
        "ratio" | "p_template_id" => "1",
        "scope" => "'*'",
        "policy" => "'{\"version\": \"1\"}'",
        "reason" | "p_reason" | "actor" | "p_actor" => "'me'",
        "p_queue" | "lock_key" | "version" | "rate" | "per" | "cron" | "time_zone" | "every" | "once_at"
        | "traceparent" | "tracestate" | "baggage" | "correlation_id" | "idempotency_key" | "run_at" | "p_key" => {
            "null"
        }
        other => panic!("{function} has an argument {other}: say here what it is called with"),
    };
    match argument {
        "task" | "p_task" => format!("'{task}'"),
        _ => of_function.unwrap_or_else(common).to_owned(),
    }
}

fn hostile(argument: &str, kind: &str, task: Uuid, step: Uuid) -> Vec<String> {
    let list = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>();
    let (task, step) = (format!("{task}"), format!("{step}"));
    let mut values = match kind {
        // What people say is kept as it is, so a few suffice.
        "text" if ["reason", "p_reason", "actor", "p_actor"].contains(&argument) => {
            return list(&["''", "repeat('x', 100000)", "E'a\\nb'", "null"]);
        }
        "text" => list(&[
            "''",
            "' '",
            "repeat('x', 100000)",
            "E'a\\nb'",
            "'step_results'",
            "'task_requests'",
            "'tests'",
            "'worker_tests'",
            "'worker-0'",
            "'*'",
            "'results__x'",
            "'infinity'",
            "'-1'",
            "E'\\'; drop schema tasker; --'",
        ]),
        "text[]" => list(&[
            "'{}'",
            "'{NULL}'",
            "'{ok,NULL}'",
            "'{\"\"}'",
            "'{{a,b},{c,d}}'",
            "'{step_results}'",
            "'{task_requests}'",
            "'{worker_tests}'",
            "'{worker_other,worker_tests}'",
            "'{worker_other__a__b}'",
            "array[repeat('x', 100000)]",
            "array_fill('x'::text, array[20000])",
        ]),
        "integer" => list(&["0", "-1", "-2147483648", "2147483647"]),
        "bigint" => list(&["0", "-9223372036854775808", "9223372036854775807"]),
        "boolean" => list(&["true", "false"]),
        "double precision" => list(&["'NaN'", "'Infinity'", "'-Infinity'", "1e308", "-1", "1e-300"]),
        "interval" => list(&["'0'", "'-1 s'", "'178000000 years'", "'-178000000 years'", "'1 us'"]),
        "timestamp with time zone" => list(&["'infinity'", "'-infinity'", "'294276-12-31'", "'4713-01-01 BC'"]),
        "uuid" => list(&["'00000000-0000-0000-0000-000000000000'"]),
        "jsonb" => list(&[
            "'null'",
            "'1'",
            "'\"x\"'",
            "'[]'",
            "'{}'",
            "'[null]'",
            "'[1, \"x\", [], {}]'",
            "'{\"namespace\": null}'",
            "'{\"namespace\": \"tests\"}'",
            "'{\"namespace\": \"other\", \"after\": \"x\"}'",
            "'{\"status\": [1]}'",
            "(repeat('[', 2000) || repeat(']', 2000))::jsonb",
            "'[1e131071, -1e-16000]'",
            "'[{\"namespace\": \"tests\", \"template\": \"stream\"}]'",
            "'[{\"namespace\": \"other\", \"template\": \"mine\", \"priority\": 1e9, \"run_at\": \"infinity\"}]'",
            "jsonb_build_object('x', repeat('x', 3000000))",
            "jsonb_build_array(jsonb_build_object('x', repeat('x', 3000000)))",
        ]),
        other => panic!("a value of type {other}: say here what of it is hostile"),
    };
    if kind == "jsonb" {
        values.push(format!(
            "'[{{\"step\": \"{step}\", \"token\": \"{step}\", \"outcome\": \"success\", \"output\": 1}}]'"
        ));
    }
    if matches!(kind, "uuid" | "text") {
        values.push(format!("'{task}'"));
    }
    values.push("null".into());
    values
}

/// Every function with each of its arguments hostile in turn; `(function, argument, call)`.
fn calls(functions: &[Function], own: Uuid, (task, step): (Uuid, Uuid)) -> Vec<(String, String, String)> {
    let mut calls = Vec::new();
    for Function { name, arguments } in functions {
        for (argument, kind) in arguments {
            for value in hostile(argument, kind, task, step) {
                let given: Vec<String> = arguments
                    .iter()
                    .map(|(other, kind)| {
                        let value = if other == argument { value.clone() } else { good(name, other, own) };
                        format!("{other} => ({value})::{kind}")
                    })
                    .collect();
                calls.push((name.clone(), argument.clone(), format!("select tasker.{name}({})", given.join(", "))));
            }
        }
    }
    calls
}

/// Ours, and about the argument; whoever lacks a right need not be told more.
fn is_fair(argument: &str, why: &str) -> bool {
    let (code, message) = why.split_once(' ').expect("a code");
    let names_it = message.contains(argument.trim_start_matches("p_"));
    match code {
        "22023" => names_it,
        "42501" => message.contains(':'),
        "42P01" => message.starts_with("queue "),
        _ => false,
    }
}

/// What others have that is not a task's.
const BELONGINGS: &str = "
    select format('worker %s %s %s %s %s', worker, namespace, queues, handlers, slots) from tasker.workers where namespace = 'tests'
    union all select format('reader %s %s', queue, reader) from tasker.readers where queue not like 'worker\\_other%'
    union all select format('limit %s %s', name, concurrency) from tasker.limits where namespace = 'tests'
    union all select format('paused %s', queue) from tasker.paused_queues where queue not like 'worker\\_other%'
    union all select format('schedule %s %s %s', name, cron, paused) from tasker.schedules where namespace = 'tests'
    union all select format('retention %s %s', namespace, keep) from tasker.retention
    union all select format('sampling %s %s', namespace, ratio) from tasker.sampling
    union all select format('tracing %s %s %s', scope, key, value) from tasker.trace_settings
    union all select format('redaction %s', policy) from tasker.redaction
    union all select format('bystander %s %s %s', correlation_id, state, reason) from tasker.tasks where correlation_id like 'bystander%'
    order by 1";

/// Rows that the audit has since this task was submitted under another name than the owner's or the role's.
async fn borrowed_names(world: &World, since: Uuid, role: &str) -> i64 {
    sqlx::query_scalar(
        "select count(*) from tasker.audit where at > (select max(created_at) from tasker.tasks where task_uuid = $1)
           and actor <> session_user and actor <> $2 and actor not like '%(role ' || $2 || ')'",
    )
    .bind(since)
    .bind(role)
    .fetch_one(&world.pool)
    .await
    .expect("the audit")
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_arguments_cost_only_those_who_give_them() {
    let mut world = World::start(Setup::default()).await;
    let own = other_namespace(&world).await;
    world.register_steps("stream", "a: ok\nb: flaky <- a").await;
    world.register("waits", "steps: [{name: a, wait: {signal: go}}]").await;
    world.register("sleeps", "steps: [{name: a, wait: {sleep: 1s}}, {name: b, handler: ok, depends_on: [a]}]").await;
    world.register("held", "steps: [{name: a, handler: silent, queue: late}]").await;
    let owned = "select tasker.set_limit('tests', 'broken', concurrency => 900), tasker.set_limit('tests', 'silent', concurrency => 7),
        tasker.set_schedule('tests', 'yearly', 'stream', cron => '0 0 1 1 *'), tasker.set_retention('tests', '1 day')::text,
        tasker.set_sampling('elsewhere', 0.5)::text";
    world.pool.execute(owned).await.expect("what others have");
    // One that waits for a signal, one that is suspended, and a step that is held.
    let mut bystanders = Vec::new();
    for (name, template) in [("bystander waits", "waits"), ("bystander rests", "waits"), ("bystander is held", "held")]
    {
        bystanders
            .push(world.submit_with(json!({"template": template, "correlation_id": name})).await.expect("submitted"));
    }
    let begun = "select (count(*) = 3)::int::bigint from tasker.steps s join tasker.tasks t using (task_uuid)
        where t.correlation_id like 'bystander%' and (s.state = 'waiting' or s.held_by is not null)";
    eventually("the bystanders have begun", async || (world.number(begun).await == 1).then_some(())).await;
    sqlx::query("select tasker.suspend_task($1)").bind(bystanders[1]).execute(&world.pool).await.expect("asked");
    eventually("one rests", async || {
        (world.of_task(bystanders[1], "state").await.as_deref() == Some("suspended")).then_some(())
    })
    .await;
    let step: Uuid = sqlx::query_scalar("select step_uuid from tasker.steps where task_uuid = $1")
        .bind(bystanders[0])
        .fetch_one(&world.pool)
        .await
        .expect("a step");
    let before = world.words(BELONGINGS).await;

    let mut stranger = Stranger::of(&world, OTHER).await;
    let calls = calls(&public_functions(&world).await, own, (bystanders[0], step));
    assert!(calls.len() > 500, "the matrix has {} calls", calls.len());
    let over = Arc::new(AtomicBool::new(false));
    let stream = async {
        let mut tasks = Vec::new();
        while !over.load(Ordering::Relaxed) {
            tasks.push(world.submit("stream").await);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tasks
    };
    let attack = async {
        let mut unfair: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut session = PgConnection::connect(&world.url).await.expect("a session");
        for (function, argument, call) in &calls {
            let mut note = |who: &str, answer: Result<Option<String>, String>| {
                if let Err(why) = answer
                    && !is_fair(argument, &why)
                {
                    let unfair = unfair.entry(format!("{function}({argument})")).or_default();
                    unfair.push(format!("{who}: {call:.300}: {why:.300}"));
                }
            };
            let answer = stranger.ask(call).await;
            let told_everything = answer.as_ref().is_err_and(|why| why.starts_with("22023"));
            note("stranger", answer);
            if told_everything {
                continue;
            }
            // The owner may do everything, so what it says gets further; nothing of it stays.
            let mut tx = session.begin().await.expect("a transaction");
            note("owner", ask(&mut tx, call).await);
            tx.rollback().await.expect("rolled back");
        }
        session.close().await.expect("closed");
        over.store(true, Ordering::Relaxed);
        unfair
    };
    let (unfair, stream) = tokio::join!(attack, stream);
    assert!(unfair.is_empty(), "{unfair:#?}");

    // The others have lost nothing.
    assert_eq!(world.words(BELONGINGS).await, before);
    assert!(stream.len() > 20, "{} tasks ran meanwhile", stream.len());
    assert!(world.finish(&stream).await.iter().all(|state| state == "complete"));
    // Who begins now begins; timers fire, signals arrive, and what was held is sent.
    world.add_orchestrator().await;
    let slept = world.submit("sleeps").await;
    for task in &bystanders[..2] {
        sqlx::query("select tasker.resume_task($1), tasker.signal_task($1, 'go')")
            .bind(task)
            .execute(&world.pool)
            .await
            .expect("asked");
    }
    world.hello("hand", Some("late"), &HANDLERS, 1).await;
    let held = eventually("the held step is sent", async || {
        let mut conn = world.pool.acquire().await.expect("a connection");
        tasker_tests::worker::claim(&mut conn, "hand", Some("late"), &HANDLERS, 1).await.expect("claimed").pop()
    })
    .await;
    assert_eq!(world.report(&held, &Answer::Success(Value::Null)).await, (true, false));
    bystanders.push(slept);
    assert_eq!(world.finish(&bystanders).await, ["complete"; 4]);
    // Nothing that was accepted is a message that nobody could act on, or a name that was not theirs.
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    assert_eq!(borrowed_names(&world, bystanders[1], &stranger.role).await, 0);
    stranger.end(&world).await;
    world.assert_sound().await;
    world.end().await;
}
