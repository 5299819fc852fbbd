//! A database with steps to run, and a worker that runs them.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::postgres::PgListener;
use sqlx::{AssertSqlSafe, Executor as _, PgPool};
use tasker_testing::TestDatabase;
use tasker_worker::{Builder, CancellationToken, Error, Worker};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// Longer than anything here takes: a test that gets here has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// Tells on the channel `test` whatever happens to the rows that tests look at.
const TELL: &str = "
    create function tell() returns trigger language plpgsql as $$ begin perform pg_notify('test', tg_table_name); return null; end $$;
    create trigger tell after insert or update or delete on tasker.steps for each statement execute function tell();
    create trigger tell after insert or update or delete on tasker.workers for each statement execute function tell();
    create trigger tell after insert or update or delete on tasker.readers for each statement execute function tell();
    insert into tasker.templates (namespace, name, version, definition) values ('shop', 'order', '1', '{}');
    select tasker.create_queue('worker_shop'), tasker.create_queue('worker_shop__slow');";

/// A bench has about ten connections, and a server has a hundred.
static BENCHES: Semaphore = Semaphore::const_new(6);

pub struct Bench {
    pub pool: PgPool,
    pub db: TestDatabase,
    _place: SemaphorePermit<'static>,
}

/// A step to put into a queue.
#[derive(Clone)]
pub struct Step<'a> {
    pub handler: &'a str,
    pub input: Value,
    pub queue: &'a str,
    pub attempt: i32,
    pub run_ms: Option<i64>,
    pub lease_ms: i64,
}

pub fn step(handler: &str, input: Value) -> Step<'_> {
    Step { handler, input, queue: "worker_shop", attempt: 1, run_ms: Some(30_000), lease_ms: 10_000 }
}

/// What an attempt left behind.
#[derive(Debug, sqlx::FromRow)]
pub struct Attempt {
    pub worker: String,
    pub worker_version: Option<String>,
    pub outcome: Option<String>,
    pub output: Option<Value>,
    pub error: Option<Value>,
    pub start_offset_ms: Option<f64>,
    pub run_ms: Option<f64>,
}

impl Bench {
    pub async fn new() -> Self {
        let place = BENCHES.acquire().await.expect("never closed");
        let db = TestDatabase::fresh().await;
        let pool = db.pool().await;
        pool.execute(TELL).await.expect("the bench");
        Self { pool, db, _place: place }
    }

    /// Enqueues steps of a new task, each with its message; the steps' names are `s0`, `s1`, ….
    pub async fn enqueue(&self, steps: &[Step<'_>]) -> (Uuid, Vec<Uuid>) {
        let task: Uuid = sqlx::query_scalar(
            "insert into tasker.tasks (task_uuid, namespace, template_id, state, correlation_id, trace_id, root_span_id,
               created_at, generation_began_at, last_at)
             select tasker.uuid7(), 'shop', 1, 'steps_in_process', 'order-4711', decode($1, 'hex'), '\\x0102030405060708',
               t, t, t from clock_timestamp() t
             returning task_uuid",
        )
        .bind(TRACE_ID)
        .fetch_one(&self.pool)
        .await
        .expect("a task");
        (task, self.enqueue_in(task, steps).await)
    }

    /// The same in a task that is there.
    pub async fn enqueue_in(&self, task: Uuid, steps: &[Step<'_>]) -> Vec<Uuid> {
        let mut uuids = Vec::new();
        for step in steps {
            let index: i32 = sqlx::query_scalar(
                "insert into tasker.template_steps (template_id, step_index, name, handler, queue, max_attempts, run_ms, heartbeat_ms)
                 select 1, n, 's' || n, $1, $2, 3, $3, $4
                 from (select count(*)::int as n from tasker.template_steps) counted
                 returning step_index",
            )
            .bind(step.handler)
            .bind(step.queue)
            .bind(step.run_ms)
            .bind(step.lease_ms)
            .fetch_one(&self.pool)
            .await
            .expect("a template step");
            uuids.push(self.enqueue_at(task, index, step).await);
        }
        uuids
    }

    async fn enqueue_at(&self, task: Uuid, index: i32, step: &Step<'_>) -> Uuid {
        let uuid: Uuid = sqlx::query_scalar(
            "insert into tasker.steps (step_uuid, task_uuid, step_index, queue, state, version, attempt, remaining_dependencies, input, last_at)
             values (tasker.uuid7(), $1, $2, $3, 'enqueued', 1, $4, 0, $5, clock_timestamp()) returning step_uuid",
        )
        .bind(task)
        .bind(index)
        .bind(step.queue)
        .bind(step.attempt)
        .bind(&step.input)
        .fetch_one(&self.pool)
        .await
        .expect("a step");
        sqlx::query(
            "select pgmq.send($1, $2, $3 || jsonb_build_object('traceparent',
               '00-' || $4 || '-' || encode(tasker.span_id(decode($4, 'hex'), $5, 0, $6, 9, 0), 'hex') || '-01')), tasker.wake($1)",
        )
        .bind(step.queue)
        .bind(json!({"v": 1, "task": task, "step": uuid, "generation": 1, "attempt": step.attempt, "handler": step.handler}))
        .bind(json!({"baggage": "correlation_id=order-4711"}))
        .bind(TRACE_ID)
        .bind(uuid)
        .bind(i64::from(step.attempt))
        .execute(&self.pool)
        .await
        .expect("a message");
        uuid
    }

    pub fn worker(&self) -> Builder {
        Worker::builder(self.db.url()).namespace("shop").version("7.1")
    }

    /// Waits until the query says true; it is asked again whenever something happened.
    pub async fn until(&self, query: &str) {
        let mut signals = PgListener::connect_with(&self.pool).await.expect("a listener");
        signals.listen("test").await.expect("listening");
        let waiting = async {
            while !sqlx::query_scalar::<_, bool>(AssertSqlSafe(query)).fetch_one(&self.pool).await.expect(query) {
                signals.recv().await.expect("a signal");
            }
        };
        if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
            let steps: Vec<(String, Option<String>)> = sqlx::query_as("select state, claimed_by from tasker.steps")
                .fetch_all(&self.pool)
                .await
                .expect("steps");
            panic!("never came true: {query}; steps: {steps:?}");
        }
    }

    pub async fn reported(&self, step: Uuid) -> Attempt {
        self.until(&format!("select state like 'enqueued_%' from tasker.steps where step_uuid = '{step}'")).await;
        self.attempt(step).await
    }

    pub async fn attempt(&self, step: Uuid) -> Attempt {
        sqlx::query_as("select * from tasker.attempts where step_uuid = $1 order by attempt desc limit 1")
            .bind(step)
            .fetch_one(&self.pool)
            .await
            .expect("an attempt")
    }

    pub async fn ask<T>(&self, query: &'static str) -> T
    where
        T: Send + Unpin + for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        sqlx::query_scalar(query).fetch_one(&self.pool).await.expect(query)
    }

    /// What an orchestrator does to a task that is cancelled or terminated.
    pub async fn end_task(&self, task: Uuid, by: &str, worker: &str) {
        sqlx::query(
            "with t as (update tasker.tasks set state = 'cancelled', finished_at = clock_timestamp(), ended_by = $2 where task_uuid = $1),
               s as (update tasker.steps set state = 'cancelled', version = version + 1 where task_uuid = $1)
             select pg_notify('tasker', 'cancel:' || $3)",
        )
        .bind(task)
        .bind(by)
        .bind(worker)
        .execute(&self.pool)
        .await
        .expect("ended");
    }
}

pub fn start(builder: Builder) -> Running {
    let worker = builder.build().expect("a worker");
    let (name, stop) = (worker.name().to_owned(), CancellationToken::new());
    let ended = tokio::spawn(worker.run(stop.clone()));
    Running { name, stop, ended }
}

/// A worker at work.
pub struct Running {
    pub name: String,
    pub stop: CancellationToken,
    pub ended: JoinHandle<Result<(), Error>>,
}

impl Running {
    /// Drains it.
    pub async fn drained(self) {
        self.stop.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.ended).await.expect("the drain ends");
        ended.expect("no panic").expect("no error");
    }
}

/// Waits for what a handler tells.
pub async fn told<T>(receiver: &mut tokio::sync::mpsc::UnboundedReceiver<T>) -> T {
    tokio::time::timeout(PATIENCE, receiver.recv()).await.expect("told in time").expect("a sender")
}
