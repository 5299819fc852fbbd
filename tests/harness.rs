//! A world of its own for each promise: a fresh database, real orchestrators, workers that
//! speak SQL, and a receiver that keeps every span; and the checks that end every test.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value};
use prost::Message;
use serde_json::{Value, json};
use sqlx::postgres::{PgListener, PgPool};
use sqlx::{AssertSqlSafe, Row};
use tasker_orchestration::{Options, Orchestrator};
use tasker_shared::store::tx::{self, PoolOptions};
use tasker_shared::store::{templates, transitions};
use tasker_shared::template;
use tasker_shared::trace::otlp::{Encoder, ServiceNames};
use tasker_shared::trace::tree;
use tasker_testing::TestDatabase;
use tasker_testing::{Rules, Span, Trace};
use tasker_tests::receiver::{Received, Receiver};
use tasker_tests::rust_worker::RustWorker;
use tasker_tests::trace_config;
use tasker_tests::worker::{self, Answer, Claim, HANDLERS, NAMESPACE, Work, Worker, answer};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use uuid::Uuid;

/// The longest that anything may take before a test gives up.
pub const DEADLINE: Duration = Duration::from_mins(1);
/// States from which a task does not move by itself.
const ENDED: &str = "('complete', 'error', 'cancelled', 'resolved_manually', 'blocked_by_failures')";

/// The everyday number, or the stormy one with `TASKER_STORM=1`.
pub fn storm(everyday: usize, stormy: usize) -> usize {
    if std::env::var_os("TASKER_STORM").is_some_and(|v| v == "1") { stormy } else { everyday }
}

/// What a world has when it begins.
pub struct Setup {
    /// Orchestrators in this process.
    pub orchestrators: usize,
    /// Workers in this process that speak SQL.
    pub workers: usize,
    /// Rust workers in this process.
    pub rust_workers: usize,
    /// `grpc` or `http/protobuf`.
    pub protocol: &'static str,
    /// What the workers do with a claim.
    pub work: Work,
    /// Whether a worker called `hand` says hello, whose claims and reports are the test's own.
    pub hand: bool,
}

impl Default for Setup {
    /// One orchestrator, one worker, over gRPC.
    fn default() -> Self {
        Self { orchestrators: 1, workers: 1, rust_workers: 0, protocol: "grpc", work: Arc::new(answer), hand: false }
    }
}

impl Setup {
    /// One orchestrator, and no worker but the test itself.
    pub fn by_hand() -> Self {
        Self { workers: 0, hand: true, ..Self::default() }
    }
}

/// Everything a test needs.
pub struct World {
    /// Where everybody connects.
    pub url: String,
    /// The test's own connections.
    pub pool: PgPool,
    /// Where the spans arrive.
    pub receiver: Receiver,
    /// Those in this process.
    pub orchestrators: Vec<Orchestrator>,
    /// Those in this process.
    pub workers: Vec<Worker>,
    rust_workers: Vec<RustWorker>,
    protocol: &'static str,
    /// Dropped last; none if the test brought its own server.
    _database: Option<TestDatabase>,
}

impl World {
    /// On a fresh database of the common server.
    pub async fn start(setup: Setup) -> Self {
        let database = TestDatabase::fresh().await;
        Self::on(database.url(), Some(database), setup).await
    }

    /// On a migrated database that the test keeps.
    pub async fn on(url: String, database: Option<TestDatabase>, setup: Setup) -> Self {
        let options = PoolOptions { acquire_timeout: DEADLINE, ..PoolOptions::default() };
        let pool = tx::pool(&url, &options).await.expect("a pool");
        let receiver = Receiver::start().await;
        let mut world = Self {
            url,
            pool,
            receiver,
            orchestrators: vec![],
            workers: vec![],
            rust_workers: vec![],
            protocol: setup.protocol,
            _database: database,
        };
        // Before the orchestrators, so that they know of room from the start and hold nothing.
        sqlx::query("select tasker.create_queue($1)")
            .bind(format!("worker_{NAMESPACE}"))
            .execute(&world.pool)
            .await
            .expect("a queue");
        if setup.hand {
            world.hello("hand", None, &HANDLERS, 100).await;
        }
        for n in 0..setup.workers {
            let started = Worker::start(&world.url, &format!("worker-{n}"), 8, setup.work.clone()).await;
            world.workers.push(started.expect("a worker"));
        }
        for n in 0..setup.rust_workers {
            world.rust_workers.push(RustWorker::start(&world.url, &format!("rust-worker-{n}"), 8, |_| false));
        }
        for _ in 0..setup.orchestrators {
            world.add_orchestrator().await;
        }
        world
    }

    /// One more orchestrator in this process.
    pub async fn add_orchestrator(&mut self) {
        let options = Options { trace: trace_config(&self.receiver.endpoint(), self.protocol), ..Options::default() };
        self.orchestrators.push(Orchestrator::start(&self.url, &options).await.expect("an orchestrator"));
    }

    /// An orchestrator as a process of its own, once it runs.
    pub async fn orchestrator_process(&self) -> Process {
        Process::start(&["orchestrator", &self.url, &self.receiver.endpoint(), self.protocol]).await
    }

    /// The same, with its log.
    pub async fn logged_orchestrator(&self) -> (Process, UnboundedReceiver<String>) {
        Process::logged(&["orchestrator", &self.url, &self.receiver.endpoint(), self.protocol]).await
    }

    /// A worker of eight slots as a process of its own, once it runs, with its log.
    pub async fn logged_crew(&self, name: &str) -> (Process, UnboundedReceiver<String>) {
        Process::logged(&["crew", &self.url, name]).await
    }

    /// A worker as a process of its own, once it runs; it hangs inside the handler of this step.
    pub async fn worker_process(&self, name: &str, stuck_in: &str) -> Process {
        Process::start(&["worker", &self.url, name, stuck_in]).await
    }

    /// A worker of eight slots as a process of its own, once it runs.
    pub async fn crew_process(&self, name: &str) -> Process {
        Process::start(&["crew", &self.url, name]).await
    }

    // Asking for things.

    /// Registers a template of the namespace `tests` from the rest of its YAML.
    pub async fn register(&self, name: &str, rest: &str) {
        self.register_as(NAMESPACE, name, "1", rest).await;
    }

    /// Registers a template from the rest of its YAML.
    pub async fn register_as(&self, namespace: &str, name: &str, version: &str, rest: &str) {
        let yaml = format!("namespace: {namespace}\nname: {name}\nversion: \"{version}\"\n{rest}");
        let checked = template::parse("test.yaml", &yaml).unwrap_or_else(|problems| panic!("{problems:#?}\n{yaml}"));
        let mut conn = self.pool.acquire().await.expect("a connection");
        templates::register(&mut conn, &checked).await.expect("registered");
    }

    /// Registers a template of steps `name: handler <- parents`, one a line, with quick retries.
    pub async fn register_steps(&self, name: &str, lines: &str) {
        let mut yaml = String::from("steps:\n");
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (step, rest) = line.split_once(':').expect("step: handler <- parents");
            let (handler, parents) = rest.split_once("<-").unwrap_or((rest, ""));
            let _ = writeln!(
                yaml,
                "  - {{name: {step}, handler: {}, depends_on: [{}], retry: {{initial_interval: 10ms}}}}",
                handler.trim(),
                parents.trim().split(' ').filter(|parent| !parent.is_empty()).collect::<Vec<_>>().join(", ")
            );
        }
        self.register(name, &yaml).await;
    }

    /// Submits a task of a template with `{}`.
    pub async fn submit(&self, template: &str) -> Uuid {
        self.submit_with(json!({"template": template})).await.expect("submitted")
    }

    /// Submits a task; the request has the keys of a `submit` message.
    pub async fn submit_with(&self, request: Value) -> Result<Uuid, String> {
        let text = |key: &str| request.get(key).and_then(Value::as_str).map(str::to_owned);
        sqlx::query_scalar(
            "select tasker.submit_task(namespace => $1, template => $2, input => coalesce($3, '{}'::jsonb), correlation_id => $4,
               idempotency_key => $5, priority => $6, traceparent => $7, tracestate => $8, baggage => $9)",
        )
        .bind(text("namespace").unwrap_or_else(|| NAMESPACE.to_owned()))
        .bind(text("template"))
        .bind(request.get("input"))
        .bind(text("correlation_id"))
        .bind(text("idempotency_key"))
        .bind(request.get("priority").and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok()))
        .bind(text("traceparent"))
        .bind(text("tracestate"))
        .bind(text("baggage"))
        .fetch_one(&self.pool)
        .await
        .map_err(|error| error.as_database_error().map_or_else(|| error.to_string(), |error| error.message().to_owned()))
    }

    /// Puts a message on a queue, as any client of PGMQ would.
    pub async fn send(&self, queue: &str, message: &Value, headers: Option<Value>) -> i64 {
        sqlx::query_scalar("select pgmq.send($1, $2, $3::jsonb)")
            .bind(queue)
            .bind(message)
            .bind(headers)
            .fetch_one(&self.pool)
            .await
            .expect("sent")
    }

    // Working by hand.

    /// Says hello for a worker.
    pub async fn hello(&self, name: &str, queue: Option<&str>, handlers: &[&str], slots: i32) {
        let mut conn = self.pool.acquire().await.expect("a connection");
        worker::hello(&mut conn, name, queue, handlers, slots).await.expect("hello");
    }

    /// The next claim for the worker `hand`, waiting until there is one.
    pub async fn claim(&self) -> Claim {
        self.claim_as("hand").await
    }

    /// The next claim for this worker, waiting until there is one.
    pub async fn claim_as(&self, name: &str) -> Claim {
        eventually("a step can be claimed", async || {
            let mut conn = self.pool.acquire().await.expect("a connection");
            worker::hello(&mut conn, name, None, &HANDLERS, 100).await.expect("hello");
            worker::claim(&mut conn, name, None, &HANDLERS, 1).await.expect("claimed").pop()
        })
        .await
    }

    /// The claim of the step of that name: claims all that is there and puts it in `claims`.
    pub async fn claim_named(&self, claims: &mut Vec<Claim>, name: &str) -> Claim {
        loop {
            if let Some(place) = claims.iter().position(|claim| claim.step_name == name) {
                return claims.swap_remove(place);
            }
            claims.push(self.claim().await);
        }
    }

    /// Reports once: `(accepted, stale)`.
    pub async fn report(&self, claim: &Claim, answer: &Answer) -> (bool, bool) {
        let result = worker::result(claim, answer).expect("something to report");
        self.report_raw(&[result]).await[0]
    }

    /// Reports these items.
    pub async fn report_raw(&self, results: &[Value]) -> Vec<(bool, bool)> {
        worker::report(&mut self.pool.acquire().await.expect("a connection"), results).await.expect("reported")
    }

    /// Reports success and waits until it is settled.
    pub async fn succeed(&self, claim: &Claim) {
        let output = json!({"step": claim.step_name, "attempt": claim.attempt});
        assert_eq!(self.report(claim, &Answer::Success(output)).await, (true, false));
        self.until_step(claim.step, &["complete"]).await;
    }

    // Waiting and looking.

    /// Waits until the step is in one of these states.
    pub async fn until_step(&self, step: Uuid, states: &[&str]) {
        eventually(&format!("step {step} is {states:?}"), async || {
            let state: String = sqlx::query_scalar("select state from tasker.steps where step_uuid = $1")
                .bind(step)
                .fetch_one(&self.pool)
                .await
                .expect("a step");
            states.contains(&&*state).then_some(())
        })
        .await;
    }

    /// Waits until these tasks have ended, and answers their states in order.
    pub async fn finish(&self, tasks: &[Uuid]) -> Vec<String> {
        self.finish_within(tasks, DEADLINE).await
    }

    /// The same with another deadline.
    pub async fn finish_within(&self, tasks: &[Uuid], deadline: Duration) -> Vec<String> {
        let waiting = async {
            loop {
                // A database that is away is waited for as well.
                if let Ok(states) = self.wait_for_end(tasks).await {
                    return states;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let Ok(states) = tokio::time::timeout(deadline, waiting).await else {
            let open = self.open_tasks().await;
            panic!("tasks have not ended within {deadline:?}: {open:#?}");
        };
        states
    }

    async fn wait_for_end(&self, tasks: &[Uuid]) -> Result<Vec<String>, sqlx::Error> {
        let mut listener = PgListener::connect(&self.url).await?;
        listener.listen("tasker_finished").await?;
        loop {
            sqlx::query(
                "insert into tasker.readers (queue, reader) values ('finished', 'harness')
                 on conflict (queue, reader) do update set seen_at = clock_timestamp()",
            )
            .execute(&self.pool)
            .await?;
            let rows = sqlx::query(AssertSqlSafe(format!(
                "select task_uuid, state from tasker.tasks where task_uuid = any($1) and state in {ENDED}"
            )))
            .bind(tasks)
            .fetch_all(&self.pool)
            .await?;
            if rows.len() == tasks.len() {
                let states: HashMap<Uuid, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
                return Ok(tasks.iter().map(|task| states[task].clone()).collect());
            }
            let _ = tokio::time::timeout(Duration::from_secs(1), listener.recv()).await;
        }
    }

    /// For the message of a test that waits in vain.
    async fn open_tasks(&self) -> Vec<String> {
        self.words(
            "select format('%s %s: %s', t.task_uuid, t.state, (select string_agg(format('%s %s#%s %s', s.step_index, s.state, s.attempt,
                coalesce('held by ' || s.held_by, '')), ', ' order by s.step_index) from tasker.steps s where s.task_uuid = t.task_uuid))
             from tasker.tasks t where t.finished_at is null limit 20",
        )
        .await
    }

    /// The first column of a query, as text.
    pub async fn words(&self, query: &'static str) -> Vec<String> {
        sqlx::query_scalar(query).fetch_all(&self.pool).await.expect("a query of the harness")
    }

    /// A number.
    pub async fn number(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.pool).await.expect("a number")
    }

    /// How often something rare was counted.
    pub async fn counter(&self, name: &str) -> i64 {
        sqlx::query_scalar("select coalesce(sum(n), 0)::bigint from tasker.counters where name = $1")
            .bind(name)
            .fetch_one(&self.pool)
            .await
            .expect("counters")
    }

    /// A column of the task's row as text.
    pub async fn of_task(&self, task: Uuid, column: &str) -> Option<String> {
        sqlx::query_scalar(AssertSqlSafe(format!("select {column}::text from tasker.tasks where task_uuid = $1")))
            .bind(task)
            .fetch_one(&self.pool)
            .await
            .expect("a task")
    }

    /// `step name: state` of every step, in file order.
    pub async fn steps(&self, task: Uuid) -> Vec<String> {
        sqlx::query_scalar(
            "select d.name || ': ' || s.state from tasker.steps s join tasker.tasks t on t.task_uuid = s.task_uuid
             join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
             where s.task_uuid = $1 and s.item = -1 order by s.step_index",
        )
        .bind(task)
        .fetch_all(&self.pool)
        .await
        .expect("steps")
    }

    /// Waits until no message is left on any queue.
    pub async fn queues_drained(&self) {
        eventually("all queues are empty", async || {
            for queue in self.words("select queue_name::text from pgmq.meta").await {
                let left: i64 = sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from pgmq.q_{queue}")))
                    .fetch_one(&self.pool)
                    .await
                    .expect("a queue");
                if left > 0 {
                    return None;
                }
            }
            Some(())
        })
        .await;
    }

    // What must hold at the end.

    /// Nothing is stuck, everything adds up, and exactly the spans of the log have arrived.
    pub async fn assert_complete(&self) {
        self.assert_sound().await;
        self.assert_spans_arrived().await;
    }

    /// Nothing is stuck and everything adds up.
    pub async fn assert_sound(&self) {
        assert_eq!(self.words("select task_uuid || ' ' || state from tasker.stuck_tasks()").await, [""; 0], "stuck");
        assert_eq!(self.words(include_str!("consistency.sql")).await, [""; 0]);
    }

    /// The receiver has exactly the spans of the log, each at least once and always the same.
    pub async fn assert_spans_arrived(&self) {
        eventually("every export batch is acknowledged", async || {
            (self.number("select count(*) from tasker.export_batches").await == 0).then_some(())
        })
        .await;
        self.assert_all_spans_there().await;
    }

    /// The same, without waiting for it.
    pub async fn assert_all_spans_there(&self) {
        let expected = self.expected_spans().await;
        let mut arrived: BTreeMap<SpanKey, Received> = BTreeMap::new();
        for received in self.receiver.spans() {
            let known = arrived.entry(key(&received)).or_insert_with(|| received.clone());
            assert_eq!(*known, received, "a span arrived twice with different contents");
        }
        let names = |these: &BTreeMap<SpanKey, Received>, but: &BTreeMap<SpanKey, Received>| -> Vec<String> {
            these.iter().filter(|(key, _)| !but.contains_key(*key)).map(|(_, span)| describe(span)).take(20).collect()
        };
        assert_eq!(names(&expected, &arrived), [""; 0], "spans of the log that did not arrive");
        assert_eq!(names(&arrived, &expected), [""; 0], "spans that arrived and are not in the log");
        for (key, span) in &expected {
            assert_eq!(arrived[key], *span, "a span differs from what its log says");
        }
        assert_eq!(self.receiver.violations(), [""; 0]);
        let mut traces: BTreeMap<Vec<u8>, Vec<Received>> = BTreeMap::new();
        for ((trace, _), span) in arrived {
            traces.entry(trace).or_default().push(span);
        }
        let open: Vec<Vec<u8>> = sqlx::query_scalar("select trace_id from tasker.tasks where finished_at is null")
            .fetch_all(&self.pool)
            .await
            .expect("tasks");
        // Until its task ends, a root has not come.
        for (_, spans) in traces.iter().filter(|(trace, _)| !open.contains(trace)) {
            Rules::new().well_formed().links().assert(&trace(spans));
        }
    }

    /// What the log says must have been exported, as it looks on the wire.
    async fn expected_spans(&self) -> BTreeMap<SpanKey, Received> {
        let tasks: Vec<Uuid> = sqlx::query_scalar("select task_uuid from tasker.tasks where trace_flags & 1 = 1")
            .fetch_all(&self.pool)
            .await
            .expect("tasks");
        let mut expected = BTreeMap::new();
        let logs =
            transitions::logs(&mut self.pool.acquire().await.expect("a connection"), &tasks).await.expect("the log");
        for log in logs {
            let spans = tree::spans(&log);
            let count = spans.spans.len();
            let mut encoder = Encoder::new(&ServiceNames::default());
            encoder.push(&spans);
            let own: Vec<Received> = decode(&encoder.finish());
            let own: BTreeMap<SpanKey, Received> = own.into_iter().map(|span| (key(&span), span)).collect();
            assert_eq!(own.len(), count, "two spans of a task have one id");
            expected.extend(own);
        }
        expected
    }

    /// The spans of a task that arrived.
    pub fn spans_of(&self, task: Uuid) -> Vec<Received> {
        let task = task.to_string();
        self.receiver.spans().into_iter().filter(|span| span.text("task_uuid") == Some(&*task)).collect()
    }

    /// Ends everything in good order.
    pub async fn end(self) {
        for worker in self.workers {
            worker.stop().await;
        }
        for worker in self.rust_workers {
            worker.stop().await;
        }
        for orchestrator in self.orchestrators {
            orchestrator.shutdown(DEADLINE).await;
        }
        self.pool.close().await;
    }
}

type SpanKey = (Vec<u8>, Vec<u8>);

fn key(received: &Received) -> SpanKey {
    (received.span.trace_id.clone(), received.span.span_id.clone())
}

fn decode(request: &[u8]) -> Vec<Received> {
    let request = ExportTraceServiceRequest::decode(request).expect("our own bytes");
    let mut received = Vec::new();
    for resource in request.resource_spans {
        let attributes = resource.resource.unwrap_or_default().attributes;
        let service = attributes
            .iter()
            .find(|kv| kv.key == "service.name")
            .and_then(|kv| kv.value.as_ref())
            .map(plain)
            .unwrap_or_default();
        for scope in resource.scope_spans {
            let name = scope.scope.map(|scope| scope.name).unwrap_or_default();
            received.extend(scope.spans.into_iter().map(|span| Received {
                service: service.clone(),
                scope: name.clone(),
                span,
            }));
        }
    }
    received
}

fn plain(value: &AnyValue) -> String {
    match &value.value {
        Some(any_value::Value::StringValue(text)) => text.clone(),
        other => format!("{other:?}"),
    }
}

// Trees.

/// What arrived, as the rules of traces look at it.
pub fn trace<'a>(spans: impl IntoIterator<Item = &'a Received>) -> Trace {
    let span = |received: &Received| Span::from_proto(&received.service, &received.span);
    Trace { spans: spans.into_iter().map(span).collect() }
}

fn describe(received: &Received) -> String {
    Span::from_proto(&received.service, &received.span).describe(&["step_name", "attempt_number", "event", "task_uuid"])
}

/// Compares trees, whatever the order of siblings: `expected` is an outline with two spaces a level.
pub fn assert_tree(spans: &[Received], keys: &[&str], expected: &str) {
    let trace = trace(spans);
    Rules::new().well_formed().assert(&trace);
    trace.assert_outline(keys, expected);
}

/// Asks again and again until there is an answer; panics after a minute.
pub async fn eventually<T>(what: &str, ask: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(DEADLINE, what, ask).await
}

/// The same with another deadline.
pub async fn eventually_within<T>(deadline: Duration, what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(deadline, asking).await.unwrap_or_else(|_| panic!("in vain for {deadline:?}: {what}"))
}

// Processes.

/// A process that a test may kill; it is killed when dropped.
pub struct Process {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    async fn start(arguments: &[&str]) -> Self {
        Self::of(Command::new(env!("CARGO_BIN_EXE_tasker-test-process")).args(arguments)).await
    }

    /// The same, with the lines of its log as they come.
    async fn logged(arguments: &[&str]) -> (Self, UnboundedReceiver<String>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tasker-test-process"));
        command.arg("logged").args(arguments).env("TASKER_LOG", "info").stderr(Stdio::piped());
        let mut process = Self::of(&mut command).await;
        let mut log = BufReader::new(process.child.stderr.take().expect("piped")).lines();
        let (sender, lines) = unbounded_channel();
        tokio::spawn(async move {
            while let Ok(Some(line)) = log.next_line().await {
                let _ = sender.send(line);
            }
        });
        (process, lines)
    }

    async fn of(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("the test process");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut process = Self { child, lines };
        assert_eq!(process.line().await, "ready");
        process
    }

    /// The next line it says.
    pub async fn line(&mut self) -> String {
        let line = tokio::time::timeout(DEADLINE, self.lines.next_line()).await.expect("the process speaks in time");
        line.expect("its stdout").expect("the process is alive")
    }

    /// SIGKILL; returns when it is gone.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("killed");
    }

    /// Lets it end in good order.
    pub async fn end(mut self) {
        drop(self.child.stdin.take());
        let ended = tokio::time::timeout(DEADLINE, self.child.wait()).await.expect("the process ends in time");
        assert!(ended.expect("waited for").success());
    }
}
