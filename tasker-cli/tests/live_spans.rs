//! Context in and out, and the live spans of detail `full`, as a receiver gets them: the HTTP API,
//! an orchestrator and a worker in one process, because what is live is of a process.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::PgPool;
use tasker_api::auth::{self, KeySpec, Role};
use tasker_api::{Config, Server};
use tasker_orchestration::{Options, Orchestrator};
use tasker_shared::client::Client;
use tasker_shared::metrics;
use tasker_shared::store::templates;
use tasker_shared::telemetry::{self, LogFormat};
use tasker_shared::template;
use tasker_shared::trace::config::{Detail, Incoming, TraceConfig};
use tasker_shared::trace::otlp::hex;
use tasker_testing::TestDatabase;
use tasker_tests::receiver::{Received, Receiver};
use tasker_tests::trace_config;
use tasker_worker::{StepContext, StepError, Worker};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const TEMPLATE: &str = r#"
namespace: live
name: calls
version: "1"
steps:
  - {name: call, handler: http, input: {url: "${input.url}"}}
  - {name: ask, handler: asks, depends_on: [call], input: {}}
  - {name: child, task: {template: small}, depends_on: [ask], input: {}}
  - {name: answer, wait: {signal: go}, depends_on: [child]}
"#;
const SMALL: &str = "namespace: live\nname: small\nversion: \"1\"\nsteps: [{name: a, handler: noop}]\n";

/// Takes requests and keeps their heads.
struct Echo {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Echo {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let (address, heads) = (listener.local_addr().expect("bound"), Arc::<Mutex<Vec<String>>>::default());
        let kept = Arc::clone(&heads);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => break,
                    }
                }
                kept.lock().expect("no panic").push(String::from_utf8_lossy(&head).to_ascii_lowercase());
                let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
                let _ = stream.write_all(answer).await;
            }
        });
        Self { address, heads }
    }

    /// A header of the last request.
    fn header(&self, name: &str) -> Option<String> {
        header(self.heads.lock().expect("no panic").last()?, name)
    }
}

fn header(head: &str, name: &str) -> Option<String> {
    let prefix = format!("{name}: ");
    head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix(&prefix).map(str::to_owned))
}

static POOL: OnceLock<PgPool> = OnceLock::new();
static INJECTED: Mutex<Option<HashMap<String, String>>> = Mutex::new(None);

/// Calls others with a client of its own, asks a database, and says too much.
async fn asks(ctx: StepContext, _: Value) -> Result<Value, StepError> {
    let call = ctx.external_call("stock", "stock.example");
    let mut headers = HashMap::new();
    call.inject(&mut headers);
    *INJECTED.lock().expect("no panic") = Some(headers);
    call.finish();
    let pool = POOL.get().expect("set");
    sqlx::query("select correlation_id from tasker.tasks where correlation_id = 'c4n4ry'").execute(pool).await?;
    let long = "x".repeat(1 << 20);
    tracing::info_span!("says too much", long, bell = "\u{7}").in_scope(|| ());
    Ok(json!({}))
}

/// Status and head of an answer, both as text.
async fn post(address: SocketAddr, key: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> (u16, String) {
    let body = body.to_string();
    let mut request = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n\
         user-agent: a test\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        request.extend([name, ": ", value, "\r\n"]);
    }
    let mut stream = TcpStream::connect(address).await.expect("connected");
    stream.write_all(format!("{request}\r\n{body}").as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("text");
    let (head, _) = answer.split_once("\r\n\r\n").expect("a head");
    (head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status"), head.to_owned())
}

struct World {
    address: SocketAddr,
    key: String,
    client: Client,
    receiver: Receiver,
    echo: Echo,
}

impl World {
    /// Submits over HTTP with these headers, lets the task run to its end, and answers its trace id.
    async fn run(&self, headers: &[(&str, &str)]) -> String {
        let url = format!("http://{}/stock", self.echo.address);
        let body = json!({"namespace": "live", "template": "calls", "input": {"url": url}});
        let (status, head) = post(self.address, &self.key, "/v1/tasks", headers, &body).await;
        assert!(status < 300, "{head}");
        let trace = header(&head, "traceparent").expect("the answer names the task's trace")[3..35].to_owned();
        let task = header(&head, "location").expect("a location").rsplit('/').next().expect("an id").to_owned();
        let signal = json!({"name": "go", "payload": {}});
        let (status, head) = post(self.address, &self.key, &format!("/v1/tasks/{task}/signal"), &[], &signal).await;
        assert!(status < 300, "{head}");
        let root =
            |span: &Received| span.span.name == "task.orchestration" && span.text("task_uuid") == Some(task.as_str());
        self.receiver.wait_for(|spans| spans.iter().any(root)).await;
        let waiting = "select count(*) from tasker.export_batches";
        let acknowledged = async {
            while sqlx::query_scalar::<_, i64>(waiting).fetch_one(self.client.pool()).await.expect("a number") > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_mins(1), acknowledged).await.expect("the whole tree arrives");
        trace
    }

    fn of(&self, trace: &str) -> Vec<Received> {
        self.receiver.spans().into_iter().filter(|span| hex(&span.span.trace_id) == trace).collect()
    }

    /// The live span of that name in a trace, once it has come.
    async fn live(&self, trace: &str, name: &str) -> Received {
        let is = |span: &Received| span.span.name == name && hex(&span.span.trace_id) == trace;
        let spans = self.receiver.wait_for(|spans| spans.iter().any(is)).await;
        spans.into_iter().find(is).expect("it is there")
    }
}

/// Whether a span is below another, at whatever depth.
fn is_below(spans: &[Received], span: &Received, above: &[u8]) -> bool {
    let mut at = span;
    for _ in 0..spans.len() {
        if at.span.parent_span_id == above {
            return true;
        }
        match spans.iter().find(|parent| parent.span.span_id == at.span.parent_span_id) {
            Some(parent) => at = parent,
            None => return false,
        }
    }
    false
}

fn the<'a>(spans: &'a [Received], name: &str, key: &str, value: &str) -> &'a Received {
    spans
        .iter()
        .find(|span| span.span.name == name && span.text(key) == Some(value))
        .unwrap_or_else(|| panic!("{name} {key}={value}"))
}

/// Trace ids that a span links to.
fn links(span: &Received) -> Vec<String> {
    span.span.links.iter().map(|link| hex(&link.trace_id)).collect()
}

fn numbered(n: u8) -> (String, String) {
    let trace = format!("4bf92f3577b34da6a3ce929d0e0e47{n:02x}");
    (format!("00-{trace}-00f067aa0ba902b7-01"), trace)
}

const SERVER: i32 = 2;
const CLIENT: i32 = 3;

/// A caller's trace goes on through server, task, handlers, their calls and their statements.
async fn joined(world: &World) {
    let (caller, wanted) = numbered(1);
    let trace = world.run(&[("traceparent", &caller), ("baggage", "plan=gold,secret=no")]).await;
    assert_eq!(trace, wanted, "the task is in the caller's trace");
    let server = world.live(&trace, "POST /v1/tasks").await;
    assert_eq!((server.span.kind, hex(&server.span.parent_span_id)), (SERVER, "00f067aa0ba902b7".into()));
    assert_eq!(server.text("http.request.method"), Some("POST"));
    assert_eq!((server.text("url.path"), server.text("http.route")), (Some("/v1/tasks"), Some("/v1/tasks")));
    assert!(matches!(server.int("http.response.status_code"), Some(200..300)));
    assert_eq!(server.text("user_agent.original"), Some("a test"));

    let spans = world.of(&trace);
    let root = the(&spans, "task.orchestration", "task_name", "calls");
    assert_eq!(root.span.parent_span_id, server.span.span_id, "the task hangs below the request");
    let handler = |name: &str| the(&spans, "handler.execution", "handler_name", name).span.span_id.clone();
    // The worker's own live span of the handler stands between and comes when it has ended.
    let below = async |span: &Received, above: Vec<u8>| {
        world.receiver.wait_for(|spans| is_below(spans, span, &above)).await;
    };
    let child = the(&spans, "task.orchestration", "task_name", "small");
    let waits = the(&spans, "step.execution", "step_name", "child");
    assert_eq!(child.span.parent_span_id, waits.span.span_id, "the nested task hangs below the attempt");

    // Out of the built-in handler.
    let get = world.live(&trace, "GET").await;
    assert_eq!(get.span.kind, CLIENT);
    below(&get, handler("http")).await;
    assert_eq!((get.text("server.address"), get.int("http.response.status_code")), (Some("127.0.0.1"), Some(200)));
    let sent = world.echo.header("traceparent").expect("the other side is told");
    assert_eq!(sent, format!("00-{trace}-{}-01", hex(&get.span.span_id)));
    let baggage = world.echo.header("baggage").expect("and knows whose it is");
    assert!(baggage.contains("correlation_id=") && !baggage.contains("secret"), "{baggage}");
    // Out of a helper.
    let stock = world.live(&trace, "stock").await;
    assert_eq!(stock.span.kind, CLIENT);
    below(&stock, handler("asks")).await;
    let injected = INJECTED.lock().expect("no panic").clone().expect("it ran");
    assert_eq!(injected["traceparent"], format!("00-{trace}-{}-01", hex(&stock.span.span_id)));
    // Statements.
    let select = world.live(&trace, "select tasker.tasks").await;
    assert_eq!(select.span.kind, CLIENT);
    below(&select, handler("asks")).await;
    assert_eq!((select.text("db.system.name"), select.text("db.operation.name")), (Some("postgresql"), Some("select")));
    assert_eq!(select.text("db.collection.name"), Some("tasker.tasks"));
    assert!(!format!("{:?}", world.receiver.spans()).contains("c4n4ry"), "never a statement's text");
    // A megabyte.
    let much = world.live(&trace, "says too much").await;
    assert_eq!(much.text("long").map(str::len), Some(4096));

    // Batches of the queues link to the tasks that they served.
    for name in ["receive worker_live", "settle worker_live", "receive step_results", "settle step_results"] {
        let is = |span: &Received| span.span.name == name && links(span).contains(&trace);
        let spans = world.receiver.wait_for(|spans| spans.iter().any(is)).await;
        let batch = spans.iter().find(|span| is(span)).expect("it is there");
        assert_eq!((batch.span.kind, batch.text("messaging.system")), (CLIENT, Some("pgmq")), "{name}");
        assert!(batch.int("messaging.batch.message_count") >= Some(1), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn context_comes_in_and_goes_out_and_live_spans_arrive_as_the_settings_say() {
    let (database, receiver, echo) = (TestDatabase::fresh().await, Receiver::start().await, Echo::start().await);
    let config = TraceConfig { detail: Detail::Full, ..trace_config(&receiver.endpoint(), "grpc") };
    let telemetry = telemetry::init_at(telemetry::Role::Orchestrator, &config, LogFormat::Json, "error");
    let (url, client) = (database.url(), Client::from_pool(database.pool().await));
    POOL.set(database.pool().await).expect("once");
    let mut conn = client.pool().acquire().await.expect("a connection");
    for yaml in [SMALL, TEMPLATE] {
        let checked = template::parse("live.yaml", yaml).expect("a template");
        templates::register(&mut conn, &checked).await.expect("registered");
    }
    let spec = KeySpec { name: "live".into(), role: Role::Operator, scopes: None, namespaces: None, expires_at: None };
    let key = auth::create_key(&mut conn, &spec, "the test").await.expect("a key").key;
    drop(conn);
    let bind = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::bind(client.clone(), Config { bind, ..Config::default() }).await.expect("a server");
    let (address, stop) = (server.address(), CancellationToken::new());
    let api = tokio::spawn(server.run(stop.clone()));
    let options = Options { trace: config.clone(), ..Options::default() };
    let orchestrator = Orchestrator::start(&url, &options).await.expect("an orchestrator");
    let worker = Worker::builder(&url)
        .namespace("live")
        .allow_http_hosts([echo.address.to_string()])
        .builtins()
        .handler("asks", asks)
        .build()
        .expect("a worker");
    let working = tokio::spawn(worker.run(stop.clone()));
    let world = World { address, key, client, receiver, echo };

    joined(&world).await;

    // Untrusted callers are linked to, or forgotten.
    telemetry::apply(&TraceConfig { incoming: Incoming::Link, ..config.clone() }).expect("applied");
    let (caller, theirs) = numbered(2);
    let trace = world.run(&[("traceparent", &caller)]).await;
    assert_ne!(trace, theirs);
    let server = world.live(&trace, "POST /v1/tasks").await;
    assert_eq!((links(&server), server.span.parent_span_id.len()), (vec![theirs], 0));
    assert_eq!(
        the(&world.of(&trace), "task.orchestration", "task_name", "calls").span.parent_span_id,
        server.span.span_id
    );
    telemetry::apply(&TraceConfig { incoming: Incoming::Ignore, ..config.clone() }).expect("applied");
    let (caller, theirs) = numbered(3);
    let trace = world.run(&[("traceparent", &caller)]).await;
    assert_ne!(trace, theirs);
    assert_eq!(links(&world.live(&trace, "POST /v1/tasks").await), [""; 0]);
    assert_eq!(world.of(&theirs), []);

    // What is malformed is ignored and counted; the task runs in a trace of its own.
    telemetry::apply(&config).expect("applied");
    let (valid, theirs) = numbered(4);
    let (long_state, long_baggage) = (format!("v={}", "x".repeat(600)), format!("k={}", "x".repeat(9000)));
    for headers in [
        [("traceparent", "nonsense"), ("tracestate", "vendor=theirs")],
        [("traceparent", &*valid), ("tracestate", &*long_state)],
        [("traceparent", &*valid), ("baggage", &*long_baggage)],
    ] {
        let trace = world.run(&headers).await;
        assert_eq!(trace == theirs, headers[0].1 == valid);
        assert!(world.of(&trace).iter().all(|span| span.span.trace_state.is_empty()), "{headers:?}");
    }
    let scrape = metrics::text().await;
    assert!(scrape.contains("tasker_http_context_ignored_total 3"), "{scrape}");

    // Off, nothing is live and everything works; the tree's export is not concerned here.
    telemetry::apply(&TraceConfig::default()).expect("applied");
    telemetry_is_flushed(&world).await;
    let before = telemetry::live_spans();
    let trace = world.run(&[]).await;
    assert!(
        world
            .of(&trace)
            .iter()
            .all(|span| span.span.kind != SERVER && span.scope == "tasker" && span.span.name.contains('.'))
    );
    assert_eq!((telemetry::live_spans(), before.failed, before.dropped), (before, 0, 0));
    let scrape = metrics::text().await;
    assert!(scrape.contains(&format!("tasker_live_spans_exported_total {}", before.exported)), "{scrape}");

    stop.cancel();
    working.await.expect("no panic").expect("it drained");
    api.await.expect("no panic");
    orchestrator.shutdown(Duration::from_secs(20)).await;
    telemetry.shutdown(Duration::from_secs(20)).await;
    assert_eq!(world.receiver.violations(), [""; 0]);
    world.client.pool().close().await;
}

/// The pipeline that was replaced exports what it still has in the background.
async fn telemetry_is_flushed(world: &World) {
    let mut last = (u64::MAX, usize::MAX);
    let quiet = async {
        loop {
            let now = (telemetry::live_spans().exported, world.receiver.spans().len());
            if now == last {
                return;
            }
            last = now;
            // Twice the longest wait of a live span.
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), quiet).await.expect("spans still come");
}
