//! The smallest worker there can be: the SQL functions and nothing else, as a worker in any
//! language would call them. The tests also use its parts by hand, to report late, twice or
//! not at all. It must never use the Rust worker.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::postgres::{PgListener, PgPool};
use sqlx::{PgConnection, Row};
use tasker_shared::store::tx::{self, PoolOptions};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The namespace of every test.
pub const NAMESPACE: &str = "tests";
/// The handlers that [`answer`] knows.
pub const HANDLERS: [&str; 4] = ["ok", "flaky", "broken", "silent"];

/// A handler that [`Worker`] offers, and never claims a step of.
pub const IGNORED: &str = "ignored";

/// One row of `claim_steps`.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "columns of tasker.claim_steps")]
pub struct Claim {
    pub task: Uuid,
    pub step: Uuid,
    pub step_name: String,
    pub attempt: i32,
    pub token: Uuid,
    pub handler: String,
    pub input: Value,
    pub correlation_id: String,
    pub traceparent: Option<String>,
    pub baggage: Option<String>,
    pub max_attempts: i32,
}

/// What a handler did.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It returned this.
    Success(Value),
    /// It failed with an error of this class.
    Error(&'static str, bool),
    /// It never came back.
    Silence,
}

/// What each of [`HANDLERS`] does: `flaky` fails its first attempt, `broken` always and for good.
pub fn answer(claim: &Claim) -> Answer {
    match claim.handler.as_str() {
        "flaky" if claim.attempt == 1 => Answer::Error("Hiccup", true),
        "broken" => Answer::Error("Broken", false),
        "silent" => Answer::Silence,
        _ => Answer::Success(json!({"step": claim.step_name, "attempt": claim.attempt})),
    }
}

/// Says that a worker is there; `queue` is the part behind `__` of a step with a queue of its own.
pub async fn hello(
    conn: &mut PgConnection,
    worker: &str,
    queue: Option<&str>,
    handlers: &[&str],
    slots: i32,
) -> Result<(), sqlx::Error> {
    sqlx::query("select tasker.worker_hello($1, $2, array[$3], $4, $5, null, '1.2.3')")
        .bind(worker)
        .bind(NAMESPACE)
        .bind(queue.map_or_else(|| format!("worker_{NAMESPACE}"), |queue| format!("worker_{NAMESPACE}__{queue}")))
        .bind(handlers)
        .bind(slots)
        .execute(conn)
        .await?;
    Ok(())
}

/// Claims up to `max` steps.
pub async fn claim(
    conn: &mut PgConnection,
    worker: &str,
    queue: Option<&str>,
    handlers: &[&str],
    max: i32,
) -> Result<Vec<Claim>, sqlx::Error> {
    let rows = sqlx::query("select * from tasker.claim_steps($1, $2, $3, $4, $5)")
        .bind(NAMESPACE)
        .bind(queue)
        .bind(worker)
        .bind(handlers)
        .bind(max)
        .fetch_all(conn)
        .await?;
    let read = |row: &sqlx::postgres::PgRow| {
        Ok(Claim {
            task: row.try_get("task")?,
            step: row.try_get("step")?,
            step_name: row.try_get("step_name")?,
            attempt: row.try_get("attempt")?,
            token: row.try_get("token")?,
            handler: row.try_get("handler")?,
            input: row.try_get("input")?,
            correlation_id: row.try_get("correlation_id")?,
            traceparent: row.try_get("traceparent")?,
            baggage: row.try_get("baggage")?,
            max_attempts: row.try_get("max_attempts")?,
        })
    };
    rows.iter().map(read).collect()
}

/// The item of `report_results` that tells this; `None` for silence.
pub fn result(claim: &Claim, answer: &Answer) -> Option<Value> {
    let mut result = json!({"step": claim.step, "token": claim.token, "start_offset_ms": 0.1, "run_ms": 0.2});
    match answer {
        Answer::Success(output) => {
            result["outcome"] = "success".into();
            result["output"] = output.clone();
        }
        Answer::Error(kind, retryable) => {
            result["outcome"] = "error".into();
            result["error"] =
                json!({"type": kind, "message": format!("{} said {kind}", claim.handler), "retryable": retryable});
        }
        Answer::Silence => return None,
    }
    Some(result)
}

/// Reports; answers `(accepted, stale)` for each item, in order.
pub async fn report(conn: &mut PgConnection, results: &[Value]) -> Result<Vec<(bool, bool)>, sqlx::Error> {
    let rows = sqlx::query("select accepted, stale from tasker.report_results($1)")
        .bind(Value::Array(results.to_vec()))
        .fetch_all(conn)
        .await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// What a worker does with what it claimed.
pub type Work = Arc<dyn Fn(&Claim) -> Answer + Send + Sync>;

fn offered() -> Vec<&'static str> {
    HANDLERS.into_iter().chain([IGNORED]).collect()
}

/// A worker with a loop of its own; it stops when dropped, without a word.
#[derive(Debug)]
pub struct Worker {
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Worker {
    /// Says hello and works until stopped. Reports are repeated until they are answered, so a
    /// database that was away makes it late and nothing else.
    ///
    /// Errors if the database cannot be reached at the start.
    pub async fn start(url: &str, name: &str, slots: i32, work: Work) -> Result<Self, sqlx::Error> {
        let options =
            PoolOptions { max_connections: 1, acquire_timeout: Duration::from_secs(2), ..PoolOptions::default() };
        let pool = tx::pool(url, &options).await?;
        hello(&mut *pool.acquire().await?, name, None, &offered(), slots).await?;
        let stop = CancellationToken::new();
        let mut state = State { pool, url: url.to_owned(), name: name.to_owned(), slots, work, unreported: Vec::new() };
        let running = tokio::spawn({
            let stop = stop.clone();
            async move {
                while !stop.is_cancelled() {
                    // After a lost connection it begins again, with what it has not yet reported.
                    let _ = state.serve(&stop).await;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        });
        Ok(Self { stop, running })
    }

    /// Finishes what it holds and ends.
    pub async fn stop(mut self) {
        self.stop.cancel();
        let _ = (&mut self.running).await;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

struct State {
    pool: PgPool,
    url: String,
    name: String,
    slots: i32,
    work: Work,
    unreported: Vec<Value>,
}

impl State {
    async fn serve(&mut self, stop: &CancellationToken) -> Result<(), sqlx::Error> {
        let mut listener = PgListener::connect(&self.url).await?;
        listener.listen("tasker").await?;
        let mut said_hello = None::<Instant>;
        while !stop.is_cancelled() {
            let mut conn = self.pool.acquire().await?;
            if !self.unreported.is_empty() {
                report(&mut conn, &self.unreported).await?;
                self.unreported.clear();
            }
            if said_hello.is_none_or(|at| at.elapsed() > Duration::from_secs(5)) {
                hello(&mut conn, &self.name, None, &offered(), self.slots).await?;
                said_hello = Some(Instant::now());
            }
            let claims = claim(&mut conn, &self.name, None, &HANDLERS, self.slots).await?;
            drop(conn);
            if claims.is_empty() {
                // A hint, and the poll that makes it harmless to miss one.
                let _ = tokio::time::timeout(Duration::from_millis(200), listener.recv()).await;
            }
            self.unreported.extend(claims.iter().filter_map(|claim| result(claim, &(self.work)(claim))));
        }
        Ok(())
    }
}
