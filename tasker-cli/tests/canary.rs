//! Secrets in the forms that the built-in policy names are planted wherever a task can carry them,
//! and are found nowhere that people look.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tasker_api::auth::{self, KeySpec, Role};
use tasker_api::{Config, Server};
use tasker_shared::client::{Client, Submit};
use tasker_shared::store::templates;
use tasker_shared::telemetry::{self, LogFormat};
use tasker_shared::template;
use tasker_testing::TestDatabase;
use tasker_tests::receiver::Receiver;
use tasker_tests::trace_config;
use tasker_worker::{Artifact, Capture, StepContext, StepError, Worker};
use tokio_util::sync::CancellationToken;

/// What is said, and the part of it that must not be seen.
const SECRETS: [(&str, &str); 22] = [
    ("Authorization: Bearer c4n4ry-token-0001", "c4n4ry-token-0001"),
    ("proxy-authorization: Basic dXNlcjpjNG40cnk=", "dXNlcjpjNG40cnk="),
    ("refused with Bearer c4n4ry0003abc", "c4n4ry0003abc"),
    ("postgres://app:c4n4ry0004@db:5432/shop", "c4n4ry0004"),
    ("https://c4n4ry0005@git.example.com/x.git", "c4n4ry0005"),
    ("password=c4n4ry0006", "c4n4ry0006"),
    ("{\"client_secret\": \"c4n4ry 0007\"}", "c4n4ry 0007"),
    ("X-Api-Key: c4n4ry0008", "c4n4ry0008"),
    ("Cookie: a=1; session=c4n4ry0009", "c4n4ry0009"),
    ("Set-Cookie: sid=c4n4ry0010; HttpOnly", "c4n4ry0010"),
    ("GET /x?page=2&access_token=c4n4ry0011&y=1", "c4n4ry0011"),
    ("GET https://s3.example.com/x?X-Amz-Signature=c4n4ry0012", "c4n4ry0012"),
    ("-----BEGIN RSA PRIVATE KEY-----\nc4n4ry0013\n-----END RSA PRIVATE KEY-----", "c4n4ry0013"),
    ("-----BEGIN PRIVATE KEY----- c4n4ry0014, cut off", "c4n4ry0014"),
    ("jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjNG40cnkifQ.c4n4ry15", "eyJzdWIiOiJjNG40cnkifQ"),
    ("AKIAC4N4RY0016ABCDEF", "AKIAC4N4RY0016ABCDEF"),
    ("ghp_c4n4ry0017abcdefghijklmn", "ghp_c4n4ry0017abcdefghijklmn"),
    ("sk_live_c4n4ry0018abcd", "sk_live_c4n4ry0018abcd"),
    ("xoxb-c4n4ry0019-abcdef", "xoxb-c4n4ry0019-abcdef"),
    ("sk-proj-c4n4ry0020abcdef", "sk-proj-c4n4ry0020abcdef"),
    ("card 4111 1111 1111 1111 was refused", "4111 1111 1111 1111"),
    ("https://hooks.slack.com/services/T0/B0/c4n4ry0022", "c4n4ry0022"),
];

const TEMPLATE: &str = r#"
namespace: canary
name: cage
version: "1"
steps:
  - {name: sings, handler: sings, input: "${input}", retry: {initial_interval: 10ms, max_attempts: 3}}
  - {name: dies, handler: dies, input: "${input}", depends_on: [sings]}
"#;

async fn sings(ctx: StepContext, input: Value) -> Result<Value, StepError> {
    let note = input["note"].as_str().unwrap_or_default().to_owned();
    tracing::warn!(note, "about to say {note}");
    match ctx.attempt() {
        1 => return Err(StepError::retry("Refused", format!("the other side said: {note}"))),
        2 => panic!("panicked over {note}"),
        _ => {}
    }
    let span = ctx.external_call("sing", "sing.example.com");
    span.set("note", note.clone()).event("said", [("note", note.clone())]);
    span.record_error(&StepError::fail("Off", note.clone()));
    span.finish();
    tracing::info_span!("in my own words", note).in_scope(|| tracing::info!("said"));
    ctx.heartbeat(json!({"note": note, "password": "c4n4ry-field"}));
    ctx.milestone("sang", [("note", json!(note)), ("api_key", json!("c4n4ry-field"))]);
    ctx.artifact(Artifact { name: note.clone(), uri: "https://u:c4n4ry-field@x/y".into(), ..Artifact::default() });
    Ok(json!({"note": note, "password": "c4n4ry-field", "lines": [input]}))
}

async fn dies(_: StepContext, input: Value) -> Result<(), StepError> {
    Err(StepError::fail("Dead", input["note"].as_str().unwrap_or_default()))
}

/// Not a test by itself: the worker of the test below, in a process whose output is read.
#[test]
fn a_worker_of_its_own() {
    let (Ok(url), Ok(endpoint)) = (std::env::var("CANARY_DATABASE"), std::env::var("CANARY_ENDPOINT")) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let config = trace_config(&endpoint, "grpc");
        let telemetry = telemetry::init(telemetry::Role::Worker, &config, LogFormat::Json);
        let stop = CancellationToken::new();
        let worker = Worker::builder(url)
            .namespace("canary")
            .capture(Capture { input: true, output: true })
            .handler("sings", sings)
            .handler("dies", dies)
            .build()
            .unwrap();
        let told = stop.clone();
        std::thread::spawn(move || {
            // Until the test closes our stdin.
            let _ = std::io::stdin().read(&mut [0]);
            told.cancel();
        });
        worker.run(stop).await.unwrap();
        telemetry.shutdown(Duration::from_secs(5)).await;
    });
}

/// A process, and all that it says.
struct Speaking {
    child: Child,
    said: Arc<Mutex<String>>,
}

impl Speaking {
    fn start(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let said = Arc::new(Mutex::new(String::new()));
        let out: Box<dyn std::io::Read + Send> = Box::new(child.stdout.take().expect("piped"));
        let err: Box<dyn std::io::Read + Send> = Box::new(child.stderr.take().expect("piped"));
        for stream in [out, err] {
            let said = Arc::clone(&said);
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    let mut said = said.lock().unwrap();
                    said.push_str(&line);
                    said.push('\n');
                }
            });
        }
        Self { child, said }
    }

    fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }
}

impl Drop for Speaking {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tasker(url: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tasker"));
    command.env("DATABASE_URL", url).env("NO_COLOR", "1").env_remove("TRACEPARENT").stdin(Stdio::null());
    command
}

async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), asking).await.unwrap_or_else(|_| panic!("in vain: {what}"))
}

/// Every place where it was looked, and what stood there.
#[derive(Default)]
struct Seen(Vec<(String, String)>);

impl Seen {
    fn look(&mut self, place: impl Into<String>, text: impl Into<String>) {
        self.0.push((place.into(), text.into()));
    }

    /// Fails with each place in which any of it is found.
    fn assert_clean(&self) {
        let mut found = Vec::new();
        for (place, text) in &self.0 {
            for secret in SECRETS.iter().map(|(_, secret)| *secret).chain(["c4n4ry-field"]) {
                if let Some(at) = text.find(secret) {
                    let (from, to) =
                        (text.floor_char_boundary(at.saturating_sub(120)), text.floor_char_boundary(at + 60));
                    found.push(format!("{place}: {secret}\n    …{}…", &text[from..to]));
                }
            }
        }
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one walk past every place")]
async fn no_planted_secret_is_seen_anywhere() {
    let (database, receiver) = (TestDatabase::fresh().await, Receiver::start().await);
    let (url, client) = (database.url(), Client::from_pool(database.pool().await));
    let mut conn = client.pool().acquire().await.expect("a connection");
    let checked = template::parse("cage.yaml", TEMPLATE).expect("a template");
    templates::register(&mut conn, &checked).await.expect("registered");

    let log = "info,tasker=debug,tasker_orchestration=debug,tasker_worker=debug,tasker_shared=debug";
    let orchestrator = Speaking::start(
        tasker(&url)
            .args(["orchestrator", "run", "--log-format", "json", "--metrics-listen", "127.0.0.1:0"])
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint())
            .env("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
            .env("TASKER_LOG", log),
    );
    let worker = Speaking::start(
        Command::new(std::env::current_exe().expect("this test"))
            .args(["a_worker_of_its_own", "--exact", "--nocapture"])
            .env("CANARY_DATABASE", &url)
            .env("CANARY_ENDPOINT", receiver.endpoint())
            .env("TASKER_LOG", log),
    );

    let mut tasks = Vec::new();
    for (place, (said, _)) in SECRETS.iter().enumerate() {
        let input = json!({"note": said, "password": "c4n4ry-field", "deep": [{"text": format!("so it said: {said}"), "all": SECRETS.map(|(said, _)| said)}]});
        let request =
            Submit { correlation_id: Some(format!("canary-{place}")), ..Submit::new("canary", "cage", input) };
        tasks.push(client.submit(request).await.expect("submitted"));
        sqlx::query("select pgmq.send('task_requests', $1::jsonb, $2::jsonb)")
            .bind(json!({"v": 99, "note": said}))
            .bind(json!({"traceparent": said, "authorization": "Bearer c4n4ry-field", "baggage": said}))
            .execute(&mut *conn)
            .await
            .expect("sent");
    }
    until("every task has ended", async || {
        let open: i64 = sqlx::query_scalar("select count(*) from tasker.tasks where finished_at is null")
            .fetch_one(client.pool())
            .await
            .expect("a number");
        let bad: i64 = sqlx::query_scalar("select count(*) from tasker.quarantine")
            .fetch_one(client.pool())
            .await
            .expect("a number");
        (open == 0 && usize::try_from(bad) == Ok(SECRETS.len())).then_some(())
    })
    .await;
    until("every span was delivered", async || {
        let left: i64 = sqlx::query_scalar("select count(*) from tasker.export_batches")
            .fetch_one(client.pool())
            .await
            .expect("a number");
        let live = receiver.spans().iter().filter(|span| span.span.name == "in my own words").count();
        (left == 0 && live == SECRETS.len()).then_some(())
    })
    .await;
    // They are there: a worker must get its input as it was given.
    let kept: i64 = sqlx::query_scalar("select count(*) from tasker.tasks where input::text like '%c4n4ry%'")
        .fetch_one(&mut *conn)
        .await
        .expect("a number");
    assert_eq!(usize::try_from(kept), Ok(SECRETS.len()), "inputs are kept as they are");

    let mut seen = Seen::default();
    let spans: Vec<String> = receiver.spans().iter().map(|received| format!("{:?}", received.span)).collect();
    assert!(spans.iter().any(|span| span.contains("sang")) && spans.iter().any(|span| span.contains("[redacted]")));
    seen.look("spans", spans.join("\n"));

    let address = until("the metrics' address", async || {
        let said = orchestrator.said();
        let line = said.lines().find(|line| line.contains("metrics are served"))?;
        let line: Value = serde_json::from_str(line).expect("a JSON line");
        line["address"].as_str().map(str::to_owned)
    })
    .await;
    let _ = rustls_provider();
    let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build().expect("a client");
    let metrics = http.get(format!("http://{address}/metrics")).send().await.expect("an answer");
    let metrics = metrics.text().await.expect("text");
    assert!(metrics.contains("tasker_attempts_total"));
    seen.look("metrics", metrics);

    let task = |at: usize| tasks[at].to_string();
    let mut commands: Vec<Vec<String>> = ["task list", "queue list", "queue quarantine", "audit list", "limit list"]
        .iter()
        .map(|line| line.split(' ').map(str::to_owned).collect())
        .collect();
    for at in 0..tasks.len() {
        // A command takes a quarter of a second: some look at every task, some at every fifth.
        let some = ["task why", "trace show --tree", "trace export --format otlp-json"];
        for line in ["task get"].into_iter().chain(some.into_iter().filter(|_| at % 5 == 0)) {
            commands.push(line.split(' ').map(str::to_owned).chain([task(at)]).collect());
        }
    }
    commands.push(vec!["trace".into(), "export".into(), "--format".into(), "jaeger-json".into(), task(0)]);
    for command in commands {
        let json: &[&str] = if command[0] == "trace" || command[1] == "why" { &[] } else { &["-o", "json"] };
        for more in [&[][..], json] {
            let output = tasker(&url).args(&command).args(more).output().expect("the command runs");
            assert!(output.status.code().is_some_and(|code| code < 2), "{command:?}: {output:?}");
            let place = format!("tasker {} {}", command.join(" "), more.join(" "));
            seen.look(place.clone(), String::from_utf8_lossy(&output.stdout));
            seen.look(place, String::from_utf8_lossy(&output.stderr));
        }
    }

    let shown = tasker(&url).args(["trace", "show", &task(0)]).output().expect("the command runs");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("reported by handlers") && shown.contains("api_key=[redacted]"), "{shown}");

    let config = Config { bind: SocketAddr::from(([127, 0, 0, 1], 0)), ..Config::default() };
    let server = Server::bind(client.clone(), config).await.expect("a server");
    let (base, stop) = (server.url(), CancellationToken::new());
    let serving = tokio::spawn(server.run(stop.clone()));
    let spec = KeySpec { name: "canary".into(), role: Role::Admin, scopes: None, namespaces: None, expires_at: None };
    let key = auth::create_key(&mut conn, &spec, "the test").await.expect("a key").key;
    let document: Value = http.get(format!("{base}/openapi.json")).send().await.unwrap().json().await.unwrap();
    let mut paths: BTreeSet<String> = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().expect("paths") {
        if operations.get("get").is_none() {
            continue;
        }
        for at in &tasks {
            let path =
                path.replace("{task}", &at.to_string()).replace("{namespace}", "canary").replace("{step}", "sings");
            if !path.contains('{') {
                paths.insert(path);
            }
        }
    }
    for page in [
        "/",
        "/queues",
        "/audit",
        "/tasks/{task}",
        "/tasks/{task}/log",
        "/tasks/{task}/log.json",
        "/tasks/{task}/log.csv",
        "/tasks/{task}/timeline.json",
    ] {
        paths.extend(tasks.iter().map(|task| page.replace("{task}", &task.to_string())));
    }
    let mut good = 0;
    for path in &paths {
        let Ok(answer) = http.get(format!("{base}{path}")).bearer_auth(&key).send().await else {
            continue;
        };
        good += usize::from(answer.status().is_success());
        let status = answer.status();
        // A stream never ends: what has come by then is looked at.
        let (mut answer, mut text) = (answer, Vec::new());
        while let Ok(Ok(Some(chunk))) = tokio::time::timeout(Duration::from_millis(500), answer.chunk()).await {
            text.extend_from_slice(&chunk);
        }
        seen.look(format!("GET {path} ({status})"), String::from_utf8_lossy(&text));
    }
    assert!(good > tasks.len() * 4, "{good} of {} answered well", paths.len());
    stop.cancel();
    let _ = serving.await;

    for (name, process) in [("the orchestrator's log", &orchestrator), ("the worker's log", &worker)] {
        let said = process.said();
        assert!(name != "the worker's log" || (said.contains("about to say") && said.contains("panicked")), "{said}");
        for line in said.lines().filter(|line| line.starts_with('{')) {
            let _: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        }
        seen.look(name, said);
    }
    seen.assert_clean();
}

fn rustls_provider() -> Result<(), std::sync::Arc<rustls::crypto::CryptoProvider>> {
    rustls::crypto::ring::default_provider().install_default()
}
