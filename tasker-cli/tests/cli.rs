//! The command as scripts see it: exit codes, JSON, help. Each test has a database of its own.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tasker_shared::postgres::testing::TestDatabase;
use tasker_shared::store::templates;
use tasker_shared::template;
use tasker_tests::receiver::Receiver;

/// One step for each built-in way to end.
const TEMPLATE: &str = r#"
namespace: shop
name: order
version: "1"
input_schema: {type: object, required: [order_id]}
steps:
  - {name: try, handler: fail, input: "${input}", retry: {initial_interval: 10ms}}
  - {name: done, handler: echo, depends_on: [try], input: {try: "${steps.try.output}"}}
"#;

struct Answer {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Answer {
    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {} {}", self.stdout, self.stderr))
    }

    #[track_caller]
    fn exits_with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }
}

fn command(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tasker"));
    command
        .args(arguments)
        .env("DATABASE_URL", url)
        .env_remove("TRACEPARENT")
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
    command.env("USER", "ada").env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// A command that needs no database: it fails if it looks for one.
fn offline(arguments: &[&str]) -> Answer {
    run(&mut command("postgresql://nobody@127.0.0.1:1/nothing", arguments))
}

fn run(command: &mut Command) -> Answer {
    let output = command.output().expect("the command starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Answer { code: output.status.code().expect("no signal"), stdout: text(output.stdout), stderr: text(output.stderr) }
}

struct Shop {
    database: TestDatabase,
    conn: PgConnection,
}

impl Shop {
    async fn new() -> Self {
        let database = TestDatabase::fresh().await;
        let mut conn = PgConnection::connect(&database.url()).await.unwrap();
        let checked = template::parse("order.yaml", TEMPLATE).unwrap();
        templates::register(&mut conn, &checked.template).await.unwrap();
        Self { database, conn }
    }

    fn tasker(&self, arguments: &[&str]) -> Answer {
        run(&mut command(&self.database.url(), arguments))
    }

    fn json(&self, arguments: &[&str]) -> Value {
        self.tasker(&[arguments, &["-o", "json"]].concat()).exits_with(0).json()
    }

    async fn sql(&mut self, statement: &str) {
        sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&mut self.conn).await.unwrap();
    }
}

/// `tasker up`, told to stop when the test is done with it.
struct Up {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Up {
    fn start(shop: &Shop) -> Self {
        let mut child = command(&shop.database.url(), &["up", "-o", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("tasker up");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        // A pipe that nobody reads would fill up, so it is read to its end.
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if line.starts_with("worker") {
                    let _ = ready.send(());
                }
            }
        });
        is_ready.recv().expect("`tasker up` starts a worker");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, lines }
    }

    fn next_line(&mut self) -> Value {
        serde_json::from_str(&self.lines.next().expect("a line").unwrap()).unwrap()
    }

    fn stop(mut self) -> i32 {
        let id = i32::try_from(self.child.id()).ok().filter(|id| *id > 1).and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(id.expect("the id of a child"), rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().code().expect("it ends by itself")
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn help_names_every_noun_and_every_exit_code() {
    insta::assert_snapshot!(offline(&["--help"]).exits_with(0).stdout);
}

#[test]
fn every_verb_has_help_with_examples() {
    for arguments in [
        "demo",
        "up",
        "orchestrator run",
        "worker run",
        "template",
        "task",
        "task submit",
        "task list",
        "schedule",
        "schedule set",
        "retention",
        "trace show",
        "queue",
        "limit",
        "migrate",
        "db",
    ] {
        let words: Vec<&str> = arguments.split(' ').chain(["--help"]).collect();
        let help = offline(&words).exits_with(0).stdout;
        assert!(help.contains("Examples:\n  ") || help.contains("Examples:"), "{arguments}: {help}");
        assert!(help.lines().all(|line| line.chars().count() <= 125), "{arguments}: {help}");
    }
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    for arguments in [
        &["tusk"][..],
        &["task"],
        &["task", "submit", "order"],
        &["task", "list", "--status", "nice"],
        &["task", "wait", "x", "--timeout", "30"],
        &["task", "submit", "shop/order", "--input", "{"],
        &["trace", "show", "x", "--tree", "--json"],
    ] {
        let answer = offline(arguments).exits_with(2);
        assert!(!answer.stderr.is_empty() && answer.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn an_unreachable_database_exits_with_4_and_says_why() {
    let answer = offline(&["task", "list"]).exits_with(4);
    assert!(
        answer.stderr.contains("the database cannot be reached") && answer.stderr.contains("refused"),
        "{}",
        answer.stderr
    );
}

#[test]
fn lint_names_file_line_and_key_of_every_problem() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("order.yaml");
    let bad = "namespace: shop\nname: order\nversion: \"1\"\nsteps:\n  - {name: a, handler: noop, depends_on: [b]}\n  - {name: c, handlers: noop}\n";
    std::fs::write(&path, bad).unwrap();
    let path = path.to_str().unwrap();
    let answer = offline(&["template", "lint", path]).exits_with(1);
    let lines: Vec<&str> = answer.stdout.lines().collect();
    assert!(
        lines[0].starts_with(&format!("{path}:5:"))
            && lines[0].contains("steps[0].depends_on[0]")
            && lines[0].contains("`b`"),
        "{lines:?}"
    );
    assert!(lines.iter().any(|line| line.starts_with(&format!("{path}:6:")) && line.contains("handlers")), "{lines:?}");

    let problems = offline(&["template", "lint", path, "-o", "json"]).exits_with(1).json();
    assert_eq!(problems["ok"], false);
    assert_eq!(problems["problems"].as_array().unwrap().len(), lines.len());
    let first = &problems["problems"][0];
    assert_eq!(
        (&first["file"], &first["line"], &first["key"]),
        (&json!(path), &json!(5), &json!("steps[0].depends_on[0]"))
    );

    std::fs::write(path, TEMPLATE).unwrap();
    let answer = offline(&["template", "lint", path]).exits_with(0);
    assert!(answer.stdout.ends_with("ok, shop/order 1 with 2 steps\n"), "{}", answer.stdout);
    assert_eq!(
        offline(&["template", "lint", path, "-o", "json"]).exits_with(0).json(),
        json!({"ok": true, "problems": []})
    );
}

#[test]
fn the_schema_is_printed_without_a_database() {
    let sql = offline(&["migrate", "--print"]).exits_with(0).stdout;
    for part in ["create table tasker.tasks", "create function tasker.submit_task"] {
        assert!(sql.contains(part), "{part} is missing");
    }
}

#[tokio::test]
async fn a_database_without_a_schema_is_migrated_once() {
    let database = TestDatabase::empty().await;
    let migrate = || run(&mut command(&database.url(), &["migrate", "-o", "json"])).exits_with(0).json();
    assert!(migrate()["applied"].as_array().unwrap().len() > 3);
    assert_eq!(migrate()["applied"], json!([]));
    let listed = run(&mut command(&database.url(), &["task", "list", "-o", "json"])).exits_with(0).json();
    assert_eq!(listed, json!([]));
}

#[tokio::test]
async fn what_does_not_exist_exits_with_3() {
    let shop = Shop::new().await;
    let nobody = "00000000-0000-7000-8000-000000000000";
    for arguments in [
        &["task", "get", nobody][..],
        &["task", "why", "ORD-unknown"],
        &["task", "wait", nobody],
        &["task", "cancel", nobody],
        &["trace", "show", nobody],
        &["template", "show", "shop/nothing"],
        &["template", "show", "shop/order@9"],
        &["queue", "quarantine", "requeue", "77"],
        &["queue", "quarantine", "discard", "77"],
    ] {
        shop.tasker(arguments).exits_with(3);
    }
}

#[tokio::test]
async fn a_registered_version_never_changes() {
    let shop = Shop::new().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("order.yaml");
    std::fs::write(&path, TEMPLATE).unwrap();
    let apply = ["template", "apply", path.to_str().unwrap()];
    assert_eq!(shop.json(&apply), json!([{"namespace": "shop", "name": "order", "version": "1", "is_new": false}]));
    std::fs::write(&path, TEMPLATE.replace("10ms", "20ms")).unwrap();
    let refused = shop.tasker(&apply).exits_with(1);
    assert!(refused.stderr.contains("give this one a new version"), "{}", refused.stderr);
    assert_eq!(shop.json(&["template", "list"]).as_array().unwrap().len(), 1);
    assert_eq!(shop.json(&["template", "show", "shop/order"])["name"], "order");
}

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

#[tokio::test]
async fn a_submitted_trace_context_is_joined() {
    let shop = Shop::new().await;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let mut submit = command(&shop.database.url(), &["task", "submit", "shop/order", "--input", r#"{"order_id": 1}"#]);
    let task = run(submit.env("TRACEPARENT", traceparent)).exits_with(0).stdout;
    assert_eq!(shop.json(&["task", "get", task.trim()])["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
}

/// What was exported is compared, opened and sent again.
async fn traces_are_verified_opened_and_replayed(shop: &Shop) {
    let folder = tempfile::tempdir().unwrap();
    let (file, less) = (folder.path().join("all.jsonl"), folder.path().join("less.jsonl"));
    let exported = shop.tasker(&["trace", "export", "--since", "1h"]).exits_with(0).stdout;
    std::fs::write(&file, &exported).unwrap();
    let against = |file: &std::path::Path, more: &[&str]| {
        shop.tasker(&[&["trace", "verify", "--since", "1h", "--against", file.to_str().unwrap()], more].concat())
    };
    let same = against(&file, &[]).exits_with(0).stdout;
    assert!(
        same.contains("2 tasks,") && same.contains("0 missing, 0 extra, 0 orphan, 0 misparented, 0 differing"),
        "{same}"
    );
    // Without the attempts, what hangs below them is an orphan.
    let mut documents: Vec<Value> = exported.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for resource in documents.iter_mut().flat_map(|document| document["resourceSpans"].as_array_mut().unwrap()) {
        let spans = resource["scopeSpans"][0]["spans"].as_array_mut().unwrap();
        spans.retain(|span| span["name"] != "step.execution");
    }
    std::fs::write(
        &less,
        documents.iter().flat_map(|document| [document.to_string(), "\n".into()]).collect::<String>(),
    )
    .unwrap();
    let differs = against(&less, &["-o", "json"]).exits_with(1);
    assert!(differs.stderr.contains("does not hold what the log says"), "{}", differs.stderr);
    let differs = differs.json();
    assert_eq!((&differs["missing"]["count"], &differs["extra"]["count"]), (&json!(4), &json!(0)), "{differs}");
    assert!(differs["orphan"]["count"].as_u64() > Some(4), "{differs}");
    assert!(against(&folder.path().join("none"), &[]).exits_with(1).stderr.contains("none"));

    let open = |more: &[&str]| shop.tasker(&[&["trace", "open", "GOOD", "--print"], more].concat());
    assert!(open(&[]).exits_with(1).stderr.contains("--trace-url"));
    let trace = shop.json(&["task", "get", "GOOD"])["trace_id"].as_str().unwrap().to_owned();
    let link = open(&["--trace-url", "http://traces/{trace_id}?x=1"]).exits_with(0).stdout;
    assert_eq!(link.trim(), format!("http://traces/{trace}?x=1"));
    open(&["--trace-url", "http://traces/"]).exits_with(2);
    shop.tasker(&["trace", "open", "NOBODY", "--print", "--trace-url", "http://t/{trace_id}"]).exits_with(3);

    assert!(shop.tasker(&["trace", "replay", "--task", "GOOD"]).exits_with(1).stderr.contains("tracing is off"));
    let receiver = Receiver::start().await;
    let endpoint = receiver.endpoint();
    let enable = ["trace", "enable", "--exporter", "otlp", "--otlp-endpoint", &endpoint];
    shop.tasker(&[&enable[..], &["--set", "protocol=grpc", "--set", "query_url=http://jaeger:16686"]].concat())
        .exits_with(0);
    assert_eq!(open(&[]).exits_with(0).stdout.trim(), format!("http://jaeger:16686/trace/{trace}"));
    let replayed = shop.tasker(&["trace", "replay", "--task", "GOOD"]).exits_with(0).stdout;
    assert!(replayed.contains("of 1 tasks were sent and acknowledged"), "{replayed}");
    let own = exported.matches(&format!("\"traceId\":\"{trace}\"")).count();
    assert!(receiver.spans().len() > 10 && own >= receiver.spans().len(), "{own}");
    shop.tasker(&["trace", "disable"]).exits_with(0);
}

/// The drawing and the OTLP JSON of the task GOOD, which was tried twice.
fn both_views_show_the_same_spans(shop: &Shop, trace_id: &Value) {
    let drawn = shop.tasker(&["trace", "show", "GOOD", "--tree"]).exits_with(0).stdout;
    for part in [
        "task.orchestration order 1",
        "step.execution try attempt 1/3",
        "✗ FailedOnPurpose",
        "step.wait retry of try",
        "handler.execution echo",
    ] {
        assert!(drawn.contains(part), "{part} is missing:\n{drawn}");
    }
    let otlp = shop.json(&["trace", "show", "GOOD"]);
    let spans: Vec<&Value> = otlp["resourceSpans"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|r| r["scopeSpans"][0]["spans"].as_array().unwrap())
        .collect();
    let roots = spans.iter().filter(|span| span.get("parentSpanId").is_none()).count();
    assert_eq!((roots, spans.iter().all(|span| span["traceId"] == *trace_id)), (1, true));
    assert_eq!(
        drawn
            .lines()
            .filter(|line| line.contains("task.")
                || line.contains("step.")
                || line.contains("handler.")
                || line.contains("result."))
            .count(),
        spans.len()
    );
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
    assert!(shop.tasker(&["task", "cancel", "GOOD"]).exits_with(1).stderr.contains("already ended as complete"));

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
async fn the_demo_sends_every_span_to_the_collector() {
    let database = TestDatabase::empty().await;
    let receiver = Receiver::start().await;
    let mut demo = command(&database.url(), &["demo", "-o", "json"]);
    demo.env("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint());
    let demo = tokio::task::spawn_blocking(move || run(&mut demo)).await.unwrap().exits_with(0).json();
    assert_eq!(receiver.violations(), [""; 0]);
    let spans = receiver.spans();
    let in_tree: u64 = demo["orders"].as_array().unwrap().iter().map(|order| order["spans"].as_u64().unwrap()).sum();
    assert_eq!(demo["exported_spans"], in_tree);
    let named = |name: &str| spans.iter().filter(|span| span.span.name == name).count();
    assert_eq!(named("task.orchestration"), 24);
    // The user's own spans: one below each attempt to charge, one above each order from SQL.
    assert_eq!((named("gateway.charge"), named("POST /checkout")), (48, 4));
    let ids: std::collections::HashSet<&Vec<u8>> = spans.iter().map(|span| &span.span.span_id).collect();
    let orphans: Vec<&str> = spans
        .iter()
        .filter(|span| !span.span.parent_span_id.is_empty() && !ids.contains(&span.span.parent_span_id))
        .map(|span| span.span.name.as_str())
        .collect();
    assert_eq!(orphans, [""; 0]);
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
    assert!(shop.tasker(&["schedule", "trigger", "shop/nightly"]).exits_with(1).stderr.contains("is still pending"));
    let listed = shop.json(&["schedule", "list", "--namespace", "shop"]);
    assert_eq!((&listed[0]["runs"], &listed[0]["last_task"]), (&json!(1), &task));
    assert!(shop.tasker(&["schedule", "list"]).exits_with(0).stdout.contains("30 2 * * * (Europe/Paris)"));
    shop.tasker(&["schedule", "pause", "shop/nightly"]).exits_with(0);
    assert!(shop.tasker(&["schedule", "show", "shop/nightly"]).exits_with(0).stdout.contains("next: paused"));
    shop.tasker(&["schedule", "resume", "shop/nightly"]).exits_with(0);
    shop.tasker(&["schedule", "delete", "shop/nightly"]).exits_with(0);
    shop.tasker(&["schedule", "delete", "shop/nightly"]).exits_with(3);
}

#[test]
fn every_schedule_file_of_the_examples_is_a_schedule() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/schedules");
    let mut count = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let schedule = tasker_shared::schedule::Schedule::from_yaml(&text).unwrap();
        schedule.timing("2026-01-01T00:00:00Z".parse().unwrap()).unwrap();
        count += 1;
    }
    assert!(count > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_diff_says_what_changed() {
    let mut shop = Shop::new().await;
    let later = TEMPLATE
        .replace("version: \"1\"", "version: \"2\"")
        .replace("depends_on: [try], ", "")
        .replace("handler: echo, input: {try: \"${steps.try.output}\"}", "handler: noop");
    let checked = template::parse("order.yaml", &later).unwrap();
    templates::register(&mut shop.conn, &checked.template).await.unwrap();
    let text = shop.tasker(&["template", "diff", "shop/order", "1", "2"]).exits_with(0).stdout;
    assert!(text.contains("handler: \"echo\" → \"noop\"") && text.contains("- done depends on try"), "{text}");
    let json = shop.json(&["template", "diff", "shop/order", "2", "1"]);
    assert_eq!(json["edges_added"], json!([{"from": "try", "to": "done"}]));
    assert!(shop.tasker(&["template", "diff", "shop/order", "1", "1"]).exits_with(0).stdout.starts_with("nothing but"));
    shop.tasker(&["template", "diff", "shop/order", "1", "9"]).exits_with(3);
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

#[tokio::test(flavor = "multi_thread")]
async fn trace_settings_are_stored_shown_refused_and_checked() {
    let shop = Shop::new().await;
    let mut receiver = Receiver::start().await;
    let endpoint = receiver.endpoint();
    let status = shop.json(&["trace", "status"]);
    assert_eq!((&status["stored"], &status["here"]["enabled"]), (&json!([]), &json!(false)));
    assert!(shop.tasker(&["trace", "doctor"]).exits_with(1).stdout.contains("tracing is off"));

    for (flags, words) in [
        (vec!["--otlp-endpoint", "ftp://c"], "--otlp-endpoint: only http:// and https:// are supported"),
        (vec!["--sample-rate", "half"], "--sample-rate=half: it must be a number from 0 to 1"),
        (vec!["--areas", "walls"], "--areas=walls: it must be any of db, http, messaging"),
        (vec!["--set", "headers=authorization=x"], "--set headers: there is no such setting, or it cannot be stored"),
    ] {
        let refused = shop.tasker(&[&["trace", "enable"], flags.as_slice()].concat()).exits_with(1);
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    assert_eq!(shop.json(&["trace", "status"])["stored"], json!([]), "nothing of it was stored");

    let enable = ["trace", "enable", "--exporter", "otlp", "--otlp-endpoint", &endpoint, "--set", "protocol=grpc"];
    let answer = shop.tasker(&[&enable[..], &["--sample-rate", "7", "--service-name", "shop"]].concat()).exits_with(0);
    assert!(answer.stderr.contains("--sample-rate=7 is used as 1: it must be from 0 to 1"), "{}", answer.stderr);
    let status = shop.json(&["trace", "status"]);
    assert_eq!(status["here"]["to"], json!(endpoint));
    assert_eq!(status["here"]["from"]["endpoint"], json!({"source": "database", "as": "endpoint in the database"}));
    assert_eq!(status["shares"], json!([{"namespace": "*", "share": 1.0}]));
    let mut secretive = command(&shop.database.url(), &["trace", "status"]);
    let shown = run(secretive
        .env("TASKER_TRACING_ENDPOINT", "http://me:hunter2@c:4318")
        .env("TASKER_TRACING_HEADERS", "a=hunter2"));
    let shown = shown.exits_with(0).stdout;
    assert!(
        shown.contains("otlp to http://c:4318") && !shown.contains("hunter2"),
        "the environment comes first: {shown}"
    );

    let seen = receiver.requests();
    assert!(shop.tasker(&["trace", "doctor"]).exits_with(0).stdout.contains("acknowledged in"));
    assert_eq!(receiver.requests(), seen + 1);
    assert_eq!(receiver.spans()[0].span.name, "tasker.trace.doctor");
    receiver.down().await;
    let down = shop.tasker(&["trace", "doctor"]).exits_with(1);
    assert!(down.stdout.contains("is the collector running"), "{}", down.stdout);

    shop.tasker(&["trace", "disable"]).exits_with(0);
    assert_eq!(shop.json(&["trace", "status"])["here"]["enabled"], json!(false));
    shop.tasker(&["trace", "enable"]).exits_with(0);
    assert_eq!(shop.json(&["trace", "status"])["here"]["to"], json!(endpoint), "where was not forgotten");
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

    let row = |queues: &Value| {
        let all = queues.as_array().unwrap().iter();
        all.clone().find(|queue| queue["queue"] == "worker_shop").unwrap().to_string()
    };
    shop.tasker(&["queue", "pause", "worker_shop", "--reason", "the bank is away"]).exits_with(0);
    assert!(row(&shop.json(&["queue", "list"])).contains("the bank is away"));
    shop.tasker(&["queue", "resume", "worker_shop"]).exits_with(0);
    assert!(!row(&shop.json(&["queue", "list"])).contains("the bank is away"));
    assert_ne!(shop.tasker(&["queue", "pause", "worker_nowhere"]).code, 0);
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
        templates::register(&mut shop.conn, &template::parse("t.yaml", &yaml).unwrap().template).await.unwrap();
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
