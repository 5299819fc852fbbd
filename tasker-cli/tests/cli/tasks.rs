//! Tasks, and what is done to them.

use serde_json::{Value, json};
use tasker_shared::store::templates;
use tasker_shared::template;
use tasker_testing::TestDatabase;

use crate::shop::{Shop, Up, command, run};
use crate::traces::{both_views_show_the_same_spans, traces_are_verified_opened_and_replayed};

#[tokio::test]
async fn a_task_is_submitted_once_for_each_idempotency_key() {
    let shop = Shop::new().await;
    let submit = |input: &str| {
        let arguments = [
            "task",
            "submit",
            "shop/order@1",
            "--input",
            input,
            "--idempotency-key",
            "k",
            "--correlation-id",
            "ORD-1",
            "-o",
            "json",
        ];
        shop.tasker(&arguments)
    };
    let first = submit(r#"{"order_id": 1}"#).exits_with(0).json();
    assert_eq!(first["is_new"], true);
    assert_eq!(
        submit(r#"{"order_id": 1}"#).exits_with(0).json(),
        json!({"task_uuid": first["task_uuid"], "is_new": false})
    );
    assert!(submit(r#"{"order_id": 2}"#).exits_with(1).stderr.contains("idempotency_key: was used"));
    assert!(submit("{}").exits_with(1).stderr.contains("order_id"));
    let unknown = shop.tasker(&["task", "submit", "shop/nothing"]).exits_with(1);
    assert!(unknown.stderr.contains("no template nothing"), "{}", unknown.stderr);

    // By its correlation id, and with nobody to run it.
    let task = shop.json(&["task", "get", "ORD-1"]);
    assert_eq!(
        (&task["task_uuid"], &task["status"], &task["input"]),
        (&first["task_uuid"], &json!("queued"), &json!({"order_id": 1}))
    );
    let why = shop.tasker(&["task", "why", "ORD-1"]).exits_with(0).stdout;
    assert_eq!(why, "queued: no orchestrator is running; start one with `tasker orchestrator run`\n");
    assert_eq!(shop.json(&["task", "why", "ORD-1"])["why"], why.trim_end());
    let late = shop.tasker(&["task", "wait", "ORD-1", "--timeout", "100ms"]).exits_with(5);
    assert!(late.stderr.contains("1 of 1 tasks have not ended"), "{}", late.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn up_runs_tasks_to_their_end_and_drains() {
    let shop = Shop::new().await;
    let mut up = Up::start(&shop);
    let submit = |input: &str, id: &str| {
        shop.tasker(&[
            "task",
            "submit",
            "shop/order",
            "--input",
            input,
            "--correlation-id",
            id,
            "--wait",
            "--timeout",
            "60s",
            "-o",
            "json",
        ])
    };
    let good = submit(r#"{"order_id": 1, "times": 1, "then": "ok"}"#, "GOOD").exits_with(0).json();
    assert_eq!((&good["status"], &good["steps"][0]["attempt"]), (&json!("completed"), &json!(2)), "{good}");
    assert_eq!(good["result"]["done"]["try"], "ok", "{good}");
    let bad = submit(r#"{"order_id": 2, "permanent": true}"#, "BAD").exits_with(1);
    assert!(bad.stderr.contains("1 of 1 did not complete"), "{}", bad.stderr);
    let bad = bad.json();
    assert_eq!((&bad["status"], &bad["error_type"]), (&json!("failed"), &json!("FailedOnPurpose")));
    shop.tasker(&["task", "wait", "GOOD", "BAD"]).exits_with(1);
    shop.tasker(&["task", "wait", "GOOD"]).exits_with(0);
    assert!(shop.tasker(&["task", "cancel", "GOOD"]).exits_with(1).stderr.contains("already ended (completed)"));

    let live: Vec<Value> = (0..2).map(|_| up.next_line()["correlation_id"].clone()).collect();
    assert_eq!(live, ["GOOD", "BAD"], "each end is printed");
    assert_eq!(shop.json(&["task", "list", "--status", "failed"])[0]["correlation_id"], "BAD");

    both_views_show_the_same_spans(&shop, &good["trace_id"]);

    assert_eq!(up.stop(), 0);
    traces_are_verified_opened_and_replayed(&shop).await;
    let workers = shop.json(&["queue", "list"]);
    let queue = workers.as_array().unwrap().iter().find(|queue| queue["queue"] == "worker_shop").unwrap();
    assert_eq!((&queue["workers"], &queue["depth"]), (&json!(0), &json!(0)), "the worker has said goodbye");
}

#[tokio::test]
async fn a_quarantined_message_can_be_looked_at_sent_again_or_deleted() {
    let mut shop = Shop::new().await;
    for reason in ["type: is missing", "v: is missing"] {
        shop.sql(&format!(
            r#"insert into tasker.quarantine (queue, msg_id, read_ct, failures, reason, message, headers, enqueued_at)
               values ('task_requests', 1, 2, 3, '{reason}', '{{"order": 17}}', '{{"traceparent": "x"}}', now())"#
        ))
        .await;
    }
    let listed = shop.json(&["queue", "quarantine", "--limit", "1"]);
    assert_eq!((&listed["count"], listed["messages"].as_array().unwrap().len()), (&json!(2), 1));
    let latest = &listed["messages"][0];
    assert_eq!(
        (&latest["reason"], &latest["failures"], &latest["message"]),
        (&json!("v: is missing"), &json!(3), &json!({"order": 17}))
    );
    let table = shop.tasker(&["queue", "quarantine"]).exits_with(0).stdout;
    assert!(table.contains("type: is missing") && table.contains("2 of 2"), "{table}");

    let id = latest["quarantine_id"].to_string();
    assert_eq!(shop.json(&["queue", "quarantine", "requeue", &id])["queue"], "task_requests");
    shop.tasker(&["queue", "quarantine", "requeue", &id]).exits_with(3);
    let sent: (Value, Value) =
        sqlx::query_as("select message, headers from pgmq.q_task_requests").fetch_one(&mut shop.conn).await.unwrap();
    assert_eq!(sent, (json!({"order": 17}), json!({"traceparent": "x"})));

    let other = shop.json(&["queue", "quarantine"])["messages"][0]["quarantine_id"].to_string();
    shop.tasker(&["queue", "quarantine", "discard", &other]).exits_with(0);
    assert_eq!(shop.json(&["queue", "quarantine"])["count"], 0);
}

#[tokio::test]
async fn the_demo_says_in_json_that_every_order_is_as_expected() {
    let database = TestDatabase::empty().await;
    let demo = run(&mut command(&database.url(), &["demo", "-o", "json"])).exits_with(0).json();
    assert_eq!(demo["ok"], true);
    let orders = demo["orders"].as_array().unwrap();
    assert_eq!(orders.len(), 24);
    for order in orders {
        assert_eq!(
            (&order["status"], &order["attempts"], &order["problems"]),
            (&json!("completed"), &json!(10), &json!([]))
        );
    }
    for way in ["SQL, traceparent", "pgmq.send", "Rust client"] {
        assert!(orders.iter().any(|order| order["submitted_by"] == way), "{way}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_is_set_looked_at_triggered_and_deleted() {
    let shop = Shop::new().await;
    let input = r#"{"order_id": "${schedule.at}"}"#;
    let cron = ["--cron", "30 2 * * *", "--time-zone", "Europe/Paris", "--overlap", "skip", "--input", input];
    let set =
        |extra: &[&str]| shop.tasker(&[&["schedule", "set", "shop/nightly", "--template", "order"], extra].concat());
    assert_eq!(set(&cron).exits_with(0).stdout, "shop/nightly is created\n");
    assert_eq!(set(&cron).exits_with(0).stdout, "shop/nightly is unchanged\n");
    assert!(set(&["--cron", "0 0 30 2 *"]).exits_with(1).stderr.contains("never fires"));
    assert!(set(&["--cron", "@daily", "--every", "1h"]).exits_with(2).stderr.contains("cannot be used with"));
    let shown = shop.json(&["schedule", "show", "shop/nightly"]);
    assert_eq!(
        (&shown["overlap"], &shown["time_zone"], &shown["planned"]),
        (&json!("skip"), &json!("Europe/Paris"), &json!(false))
    );
    let task = shop.json(&["schedule", "trigger", "shop/nightly", "--reason", "try it"])["task_uuid"].clone();
    assert!(shop.tasker(&["schedule", "trigger", "shop/nightly"]).exits_with(1).stderr.contains("is still queued"));
    let listed = shop.json(&["schedule", "list", "--namespace", "shop"]);
    assert_eq!((&listed[0]["runs"], &listed[0]["last_task"]), (&json!(1), &task));
    assert!(shop.tasker(&["schedule", "list"]).exits_with(0).stdout.contains("30 2 * * * (Europe/Paris)"));
    shop.tasker(&["schedule", "pause", "shop/nightly"]).exits_with(0);
    assert!(shop.tasker(&["schedule", "show", "shop/nightly"]).exits_with(0).stdout.contains("next: paused"));
    shop.tasker(&["schedule", "resume", "shop/nightly"]).exits_with(0);
    shop.tasker(&["schedule", "delete", "shop/nightly"]).exits_with(0);
    shop.tasker(&["schedule", "delete", "shop/nightly"]).exits_with(3);
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_is_set_counted_and_run() {
    let mut shop = Shop::new().await;
    assert!(shop.tasker(&["retention", "list"]).exits_with(0).stdout.starts_with("there is no policy"));
    for n in 0..3 {
        let input = format!("{{\"order_id\": \"{n}\"}}");
        shop.tasker(&["task", "submit", "shop/order", "--input", &input]).exits_with(0);
    }
    // Two of the three ended long ago.
    shop.sql(
        "with old as (select task_uuid, tasker.uuid7_floor(created_at - interval '9 days') as new_uuid from tasker.tasks order by task_uuid limit 2)
         update tasker.tasks t set task_uuid = encode(substring(uuid_send(old.new_uuid) from 1 for 6) || substring(uuid_send(t.task_uuid) from 7), 'hex')::uuid,
           state = 'complete', finished_at = created_at - interval '8 days'
         from old where old.task_uuid = t.task_uuid",
    )
    .await;
    assert!(
        shop.tasker(&["retention", "set", "--namespace", "shop", "--keep", "1m"])
            .exits_with(1)
            .stderr
            .contains("an hour at least")
    );
    shop.tasker(&["retention", "set", "--namespace", "*", "--keep", "7d", "--quarantine", "1d", "--archive"])
        .exits_with(0);
    let listed = shop.json(&["retention", "list"]);
    assert_eq!(
        listed["policies"],
        json!([{"namespace": "*", "keep_s": 604_800, "keep_quarantine_s": 86_400, "archive": true}])
    );
    assert_eq!(shop.json(&["retention", "run", "--dry-run"])["tasks"], 0, "an archive is required");
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    assert_eq!(shop.json(&["retention", "run", "--dry-run", "--archive", path])["tasks"], 2);
    assert_eq!(shop.json(&["retention", "run", "--archive", path])["tasks"], 2);
    let archived = std::fs::read_to_string(path).unwrap();
    assert_eq!(
        archived
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["task"]["namespace"].clone())
            .collect::<Vec<_>>(),
        ["shop", "shop"]
    );
    assert_eq!(shop.json(&["task", "list"]).as_array().unwrap().len(), 1);
    shop.tasker(&["retention", "unset", "--namespace", "*"]).exits_with(0);
}

#[tokio::test]
async fn limits_and_pauses_are_set_shown_and_taken_back() {
    let shop = Shop::new().await;
    shop.tasker(&["limit", "set", "shop", "--handler", "echo", "--concurrency", "2", "--reason", "slow"]).exits_with(0);
    shop.tasker(&["limit", "set", "shop", "--rate", "5", "--per", "1s"]).exits_with(0);
    let refused = shop.tasker(&["limit", "set", "shop", "--concurrency", "0"]).exits_with(1);
    assert!(refused.stderr.contains("concurrency"), "{}", refused.stderr);
    let limits = shop.json(&["limit", "list", "--namespace", "shop"]);
    let names: Vec<&str> = limits.as_array().unwrap().iter().filter_map(|limit| limit["name"].as_str()).collect();
    assert_eq!(names.len(), 2, "{limits}");
    shop.tasker(&["limit", "remove", "shop", "--handler", "echo"]).exits_with(0);
    assert_eq!(shop.json(&["limit", "list"]).as_array().unwrap().len(), 1);
    shop.tasker(&["limit", "set", "shop", "--open-tasks", "1", "--reason", "it floods"]).exits_with(0);
    shop.tasker(&["limit", "set", "shop", "--open-tasks", "1", "--concurrency", "1"]).exits_with(2);
    let open = &shop.json(&["limit", "list"])[1];
    assert_eq!((&open["kind"], &open["concurrency"]), (&json!("open_tasks"), &json!(1)));
    shop.tasker(&["limit", "remove", "shop", "--open-tasks"]).exits_with(0);
    shop.tasker(&["limit", "remove", "shop", "--open-tasks"]).exits_with(3);

    let row = |queues: &Value| {
        let all = queues.as_array().unwrap().iter();
        all.clone().find(|queue| queue["queue"] == "worker_shop").unwrap().to_string()
    };
    shop.tasker(&["queue", "pause", "worker_shop", "--reason", "the bank is away"]).exits_with(0);
    assert!(row(&shop.json(&["queue", "list"])).contains("the bank is away"));
    shop.tasker(&["queue", "resume", "worker_shop"]).exits_with(0);
    assert!(!row(&shop.json(&["queue", "list"])).contains("the bank is away"));
    assert_ne!(shop.tasker(&["queue", "pause", "worker_nowhere"]).code, 0);
    let table = shop.tasker(&["audit", "list"]).exits_with(0).stdout;
    assert!(table.contains("queue worker_shop") && table.contains("limit shop:echo"), "{table}");
    shop.tasker(&["limit", "remove", "shop", "--handler", "echo"]).exits_with(3);
    let audit = shop.json(&["audit", "list"]).to_string();
    for word in ["ada", "slow", "the bank is away"] {
        assert!(audit.contains(word), "{word}: {audit}");
    }
}

/// Runs until a command says that the task has this status.
fn until_status(shop: &Shop, task: &str, status: &str) -> Value {
    let until = std::time::Instant::now() + std::time::Duration::from_mins(1);
    loop {
        let seen = shop.json(&["task", "get", task]);
        if seen["status"] == status {
            return seen;
        }
        assert!(std::time::Instant::now() < until, "{task} is not {status}: {seen}");
    }
}

#[tokio::test]
async fn operators_repair_tasks_from_the_command_line() {
    let mut shop = Shop::new().await;
    for (name, yaml) in [
        (
            "repair",
            "on_failure: block\nsteps:\n  - {name: a, handler: fail, input: {permanent: true}}\n  - {name: b, handler: echo, depends_on: [a], input: {got: '${steps.a.output}'}}",
        ),
        (
            "nest",
            "steps:\n  - {name: wait, wait: {signal: go}}\n  - {name: child, task: {template: leaf}, depends_on: [wait], input: {}}",
        ),
        ("leaf", "steps: [{name: only, handler: noop}]"),
    ] {
        let yaml = format!("namespace: shop\nname: {name}\nversion: \"1\"\n{yaml}\n");
        templates::register(&mut shop.conn, &template::parse("t.yaml", &yaml).unwrap()).await.unwrap();
    }
    let up = Up::start(&shop);
    let submit = |template: &str, id: &str| {
        shop.tasker(&["task", "submit", &format!("shop/{template}"), "--correlation-id", id]).exits_with(0);
    };
    for (id, act) in [
        ("SKIP", &["task", "skip-step", "SKIP", "a", "--reason", "not needed"][..]),
        ("RESOLVE", &["task", "resolve-step", "RESOLVE", "a", "--result", "{\"by\": \"hand\"}"]),
        ("COMPLETE", &["task", "complete-step", "COMPLETE", "a", "--result", "[1]"]),
        ("WHOLE", &["task", "resolve", "WHOLE"]),
    ] {
        submit("repair", id);
        until_status(&shop, id, "waiting");
        let refused = shop.tasker(&["task", "skip-step", id, "nowhere"]).exits_with(1);
        assert!(refused.stderr.contains("no step nowhere"), "{}", refused.stderr);
        shop.tasker(act).exits_with(0);
        let done = until_status(&shop, id, "completed");
        let got = &done["result"]["b"]["got"];
        let wanted = match id {
            "RESOLVE" => json!({"by": "hand"}),
            "COMPLETE" => json!([1]),
            _ => Value::Null,
        };
        assert_eq!(*got, wanted, "{done}");
    }
    submit("repair", "AGAIN");
    until_status(&shop, "AGAIN", "waiting");
    shop.tasker(&["task", "retry", "AGAIN", "--step", "a"]).exits_with(0);
    until_status(&shop, "AGAIN", "waiting");
    let dry = shop.json(&["task", "give-up", "--status", "waiting", "--dry-run"]);
    assert_eq!(dry["matched"], 1, "{dry}");
    shop.tasker(&["task", "give-up", "AGAIN", "--reason", "no use"]).exits_with(0);
    until_status(&shop, "AGAIN", "failed");
    shop.tasker(&["task", "rerun", "AGAIN", "--from", "a"]).exits_with(0);
    until_status(&shop, "AGAIN", "waiting");
    shop.tasker(&["task", "cancel", "--template", "repair", "--status", "waiting", "--reason", "enough"]).exits_with(0);
    until_status(&shop, "AGAIN", "cancelled");

    submit("nest", "NEST");
    until_status(&shop, "NEST", "waiting");
    shop.tasker(&["task", "suspend", "NEST"]).exits_with(0);
    until_status(&shop, "NEST", "suspended");
    shop.tasker(&["task", "signal", "NEST", "go"]).exits_with(0);
    shop.tasker(&["task", "resume", "NEST"]).exits_with(0);
    // The correlation id is the child's too, so from here on the task goes by its uuid.
    let parents = shop.json(&["task", "list", "--template", "nest"]);
    let parent = parents[0]["task_uuid"].as_str().unwrap();
    let done = until_status(&shop, parent, "completed");
    assert_eq!((&done["children"][0]["step"], &done["children"][0]["status"]), (&json!("child"), &json!("completed")));
    let child = done["children"][0]["task_uuid"].as_str().unwrap();
    assert_eq!(shop.json(&["task", "get", child])["parent_task_uuid"], *parent);
    let drawn = shop.tasker(&["trace", "show", parent, "--tree"]).exits_with(0).stdout;
    let (outer, inner) = (drawn.find("nest 1").expect("the parent"), drawn.find("leaf 1").expect("its child"));
    assert!(outer < inner, "{drawn}");
    let audit = shop.json(&["audit", "list"]).to_string();
    for action in [
        "skip_step",
        "resolve_step",
        "complete_step",
        "resolve",
        "retry",
        "give_up",
        "rerun",
        "cancel",
        "suspend",
        "resume",
    ] {
        assert!(audit.contains(&format!("\"action\":\"{action}\"")), "{action}: {audit}");
    }
    assert_eq!(up.stop(), 0);
}
