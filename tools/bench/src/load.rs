//! One load: an orchestrator and a worker of their own, tasks submitted as fast as it goes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::postgres::PgListener;
use sqlx::{PgPool, Row};
use tasker_orchestration::{Options, Orchestrator};
use tasker_shared::store;
use tasker_shared::trace::config::TraceConfig;
use tasker_worker::{StepContext, StepError, Worker};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::limits::{commit_times, median, percentile};
use super::sink::Sink;

/// The items of the template `map_10k`.
pub const MAP_ITEMS: usize = 10_000;

/// What to run.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub url: String,
    pub template: &'static str,
    pub tasks: usize,
    pub steps_per_task: usize,
    pub traced: bool,
    pub slots: usize,
    pub counts_statements: bool,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Run {
    pub seconds: f64,
    pub tasks_per_second: f64,
    pub steps_per_second: f64,
    /// Submit to complete by the database's clock, all tasks submitted at once.
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub spans: u64,
    pub spans_per_second: f64,
    pub span_bytes: u64,
    pub export_requests: u64,
    /// Part of `seconds`: waiting for the last acknowledgement after the last task.
    pub drain_seconds: f64,
    pub statements_per_step: Option<f64>,
    pub commits_per_step: f64,
    pub wal_bytes_per_step: f64,
    pub row_writes_per_step: f64,
    pub row_writes_by_table: BTreeMap<String, f64>,
    /// Client statements of a settled and of a claimed batch, on average.
    pub statements_per_settle: Option<f64>,
    pub statements_per_claim: Option<f64>,
    pub settles: Option<u64>,
}

/// An orchestrator and a worker that run until they are stopped.
pub(super) struct Pair {
    orchestrator: Orchestrator,
    worker: JoinHandle<()>,
    stop: CancellationToken,
    ran: Arc<AtomicUsize>,
    sink: Option<Sink>,
}

impl Pair {
    pub(super) async fn start(scenario: &Scenario) -> Result<Self> {
        let sink = if scenario.traced { Some(Sink::start().await?) } else { None };
        let trace = match &sink {
            Some(sink) => {
                let endpoint = sink.endpoint();
                TraceConfig::from_vars(&|name| match name {
                    "OTEL_EXPORTER_OTLP_ENDPOINT" => Some(endpoint.clone()),
                    "OTEL_EXPORTER_OTLP_PROTOCOL" => Some("grpc".to_owned()),
                    _ => None,
                })?
                .0
            }
            None => TraceConfig::default(),
        };
        let orchestrator = Orchestrator::start(&scenario.url, &Options { trace, ..Options::default() }).await?;
        let ran = Arc::new(AtomicUsize::new(0));
        let count = ran.clone();
        let noop = move |_: StepContext, _: Value| {
            count.fetch_add(1, Ordering::Relaxed);
            async { Ok::<Value, StepError>(Value::Null) }
        };
        let worker = Worker::builder(&scenario.url)
            .namespace("bench")
            .handler("bench.noop", noop)
            .handler("bench.flaky", async |ctx: StepContext, _: Value| match ctx.attempt() {
                1 => Err(StepError::retry("Hiccup", "on purpose")),
                _ => Ok(Value::Null),
            })
            .slots(scenario.slots)
            .build()?;
        let stop = CancellationToken::new();
        let running = tokio::spawn({
            let stop = stop.clone();
            async move {
                if let Err(error) = worker.run(stop).await {
                    eprintln!("bench: the worker stopped: {error}");
                }
            }
        });
        Ok(Self { orchestrator, worker: running, stop, ran, sink })
    }

    pub(super) async fn stop(self) -> Result<Option<Sink>> {
        self.stop.cancel();
        self.worker.await?;
        self.orchestrator.shutdown(Duration::from_secs(30)).await;
        Ok(self.sink)
    }
}

/// The key is read by templates that limit by it.
fn input(scenario: &Scenario, n: usize) -> Value {
    if scenario.template == "map_10k" {
        json!({"items": (0..MAP_ITEMS).collect::<Vec<_>>()})
    } else {
        json!({"n": n, "key": n % 100})
    }
}

/// Submits all tasks, waits until the last has ended and its spans are acknowledged.
pub async fn run(pool: &PgPool, scenario: &Scenario) -> Result<Run> {
    // As a vacuum that happens to run would cost one run and not the other.
    sqlx::query("vacuum (analyze)").execute(pool).await?;
    sqlx::query("checkpoint").execute(pool).await.ok();
    let before = Counters::read(pool, scenario.counts_statements).await?;
    let pair = Pair::start(scenario).await?;
    let last: uuid::Uuid = sqlx::query_scalar("select tasker.uuid7()").fetch_one(pool).await?;
    // Ids of one millisecond are in no order.
    tokio::time::sleep(Duration::from_millis(2)).await;

    let started = Instant::now();
    let mut conn = pool.acquire().await?;
    for first in (0..scenario.tasks).step_by(200) {
        let requests: Vec<Value> = (first..scenario.tasks.min(first + 200))
            .map(|n| json!({"namespace": "bench", "template": scenario.template, "input": input(scenario, n)}))
            .collect();
        let answers = store::tasks::submit(&mut conn, &requests).await?;
        ensure!(answers.iter().all(|answer| answer.error.is_none()), "submit was refused: {:?}", answers[0].error);
    }
    let total = scenario.tasks * scenario.steps_per_task;
    while pair.ran.load(Ordering::Relaxed) < total {
        ensure!(
            started.elapsed() < Duration::from_mins(10),
            "only {} of {total} steps ran",
            pair.ran.load(Ordering::Relaxed)
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // Every handler has run; the last results are on their way.
    loop {
        let open: bool =
            sqlx::query_scalar("select exists (select from tasker.tasks where finished_at is null and task_uuid > $1)")
                .bind(last)
                .fetch_one(&mut *conn)
                .await?;
        if !open {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let worked = started.elapsed();
    ensure!(
        pair.orchestrator.flush(Duration::from_mins(1)).await,
        "spans were not acknowledged within 60 s of the last task"
    );
    let seconds = started.elapsed().as_secs_f64();
    drop(conn);
    let spans = pair.orchestrator.export_stats().map_or(0, |stats| stats.exported.load(Ordering::Relaxed));
    let sink = pair.stop().await?;
    let after = Counters::read(pool, scenario.counts_statements).await?;

    let latencies: Vec<f64> = sqlx::query_scalar(
        "select (extract(epoch from finished_at - created_at) * 1000)::float8 from tasker.tasks
         where task_uuid > $1 and finished_at is not null and parent_task_uuid is null",
    )
    .bind(last)
    .fetch_all(pool)
    .await?;
    ensure!(latencies.len() == scenario.tasks, "{} of {} tasks ended", latencies.len(), scenario.tasks);
    let steps = total as f64;
    let by_table: BTreeMap<String, f64> = after
        .row_writes
        .iter()
        .map(|(table, n)| (table.clone(), (n - before.row_writes.get(table).unwrap_or(&0)) as f64 / steps))
        .filter(|(_, n)| *n > 0.005)
        .collect();
    let difference = |name: &str| Some(after.calls.get(name)? - before.calls.get(name).unwrap_or(&0));
    let settles = difference("apply");
    Ok(Run {
        seconds,
        tasks_per_second: scenario.tasks as f64 / seconds,
        steps_per_second: steps / seconds,
        p50_ms: percentile(latencies.clone(), 0.5),
        p99_ms: percentile(latencies, 0.99),
        spans,
        spans_per_second: spans as f64 / seconds,
        export_requests: sink.as_ref().map_or(0, Sink::requests),
        span_bytes: sink.map_or(0, |sink| Sink::bytes(&sink)),
        drain_seconds: seconds - worked.as_secs_f64(),
        statements_per_step: scenario.counts_statements.then(|| (after.statements - before.statements) as f64 / steps),
        commits_per_step: (after.commits - before.commits) as f64 / steps,
        wal_bytes_per_step: (after.wal - before.wal) as f64 / steps,
        row_writes_per_step: by_table.values().sum(),
        row_writes_by_table: by_table,
        statements_per_settle: settles
            .filter(|n| *n > 0)
            .zip(difference("settling"))
            .map(|(n, all)| all as f64 / n as f64),
        statements_per_claim: difference("claiming")
            .zip(difference("claims"))
            .filter(|(_, n)| *n > 0)
            .map(|(all, n)| all as f64 / n as f64),
        settles: settles.map(i64::unsigned_abs),
    })
}

/// What the database counted so far.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub statements: i64,
    calls: BTreeMap<&'static str, i64>,
    pub commits: i64,
    wal: i64,
    row_writes: BTreeMap<String, i64>,
}

impl Counters {
    pub(super) async fn read(pool: &PgPool, counts_statements: bool) -> Result<Self> {
        // A server process hands its counts over when it ends or after a second.
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        let mut counters = Self {
            commits: sqlx::query_scalar("select xact_commit from pg_stat_database where datname = current_database()")
                .fetch_one(pool)
                .await?,
            wal: sqlx::query_scalar("select (pg_current_wal_insert_lsn() - '0/0')::bigint").fetch_one(pool).await?,
            ..Self::default()
        };
        for row in sqlx::query(
            r"select regexp_replace(relname, '_(\d{8}|default)$', '') as name, sum(n_tup_ins + n_tup_upd + n_tup_del)::bigint as n
              from pg_stat_user_tables where schemaname in ('tasker', 'pgmq') group by 1",
        )
        .fetch_all(pool)
        .await?
        {
            counters.row_writes.insert(row.get("name"), row.get("n"));
        }
        if counts_statements {
            let of =
                "from pg_stat_statements s join pg_database d on d.oid = s.dbid where d.datname = current_database()";
            let count = |filter: &str| format!("select coalesce(sum(calls), 0)::bigint {of} {filter}");
            counters.statements = sqlx::query_scalar(sqlx::AssertSqlSafe(count(""))).fetch_one(pool).await?;
            for (name, filter) in STATEMENTS {
                counters
                    .calls
                    .insert(name, sqlx::query_scalar(sqlx::AssertSqlSafe(count(filter))).fetch_one(pool).await?);
            }
        }
        Ok(counters)
    }
}

/// Which statements make up a settle and a claim. BEGIN and COMMIT are counted with the settle
/// although some of them are of other transactions: the average errs against us.
const STATEMENTS: &[(&str, &str)] = &[
    ("apply", "and query like '-- A batch of plans%'"),
    (
        "settling",
        "and (query like '-- A batch of plans%' or query like '-- The steps that events%' or query like '-- Steps by their place%'
          or query like 'with picked as materialized%' or query like '%for no key update skip locked%'
          or query like '%tasker.conclude(%' or query like 'insert into tasker.steps%' or query like '%unnest($1::uuid[], $2::int[]) w%a.output%'
          or query in ('BEGIN', 'COMMIT'))",
    ),
    ("claims", "and query like '%tasker.claim_steps(%'"),
    ("claiming", "and query like '%tasker.claim_steps(%'"),
];

/// Latency of one task at a time, and of a commit beside it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Latency {
    pub tasks: usize,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub commit_p50_ms: f64,
    /// 4 commits + 3 ms: what the p50 must not exceed.
    pub bound_ms: f64,
}

/// Submits one task, waits until it is seen complete, submits the next.
pub async fn latency(pool: &PgPool, scenario: &Scenario) -> Result<Latency> {
    let pair = Pair::start(scenario).await?;
    sqlx::query("insert into tasker.readers (queue, reader) values ('finished', 'bench')").execute(pool).await?;
    let mut listener = PgListener::connect(&scenario.url).await?;
    listener.listen("tasker_finished").await?;
    let mut commits = commit_times(pool, Duration::from_millis(500)).await?;
    let mut times = Vec::new();
    // As an application that is about to submit has one: giving it back costs a round trip.
    let mut conn = pool.acquire().await?;
    for n in 0..scenario.tasks + 20 {
        if n % 50 == 0 {
            sqlx::query("update tasker.readers set seen_at = clock_timestamp() where queue = 'finished'")
                .execute(pool)
                .await?;
        }
        let started = Instant::now();
        let task: uuid::Uuid =
            sqlx::query_scalar("select tasker.submit_task('bench', 'one')").fetch_one(&mut *conn).await?;
        loop {
            let told = tokio::time::timeout(Duration::from_secs(20), listener.recv())
                .await
                .context("a task was not seen complete within 20 s")??;
            if told.payload() == task.to_string() {
                break;
            }
        }
        if n >= 20 {
            times.push(started.elapsed().as_secs_f64() * 1000.0);
        }
        // Long enough for every loop to find nothing and lie down.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(conn);
    commits.extend(commit_times(pool, Duration::from_millis(500)).await?);
    sqlx::query("delete from tasker.readers where queue = 'finished'").execute(pool).await?;
    pair.stop().await?;
    let commit_p50_ms = median(commits);
    Ok(Latency {
        tasks: scenario.tasks,
        p50_ms: median(times.clone()),
        p99_ms: percentile(times, 0.99),
        commit_p50_ms,
        bound_ms: 4.0 * commit_p50_ms + 3.0,
    })
}

/// Statements per second of the idle system, `wait` after the last work, over `wait`.
pub async fn idle(pool: &PgPool, scenario: &Scenario, wait: Duration) -> Result<Option<f64>> {
    if !scenario.counts_statements {
        return Ok(None);
    }
    let pair = Pair::start(scenario).await?;
    tokio::time::sleep(wait).await;
    let before = Counters::read(pool, true).await?.statements;
    let started = Instant::now();
    tokio::time::sleep(wait).await;
    let after = Counters::read(pool, true).await?.statements;
    let seconds = started.elapsed().as_secs_f64();
    pair.stop().await?;
    // What reading the counters cost is ours, not the system's.
    let own = 3 + STATEMENTS.len() as i64 + 2;
    Ok(Some((after - before - own).max(0) as f64 / seconds))
}
