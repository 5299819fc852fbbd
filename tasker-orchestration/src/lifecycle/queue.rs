//! PGMQ: read, send, delete, quarantine. Every function is one statement.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use tasker_shared::store::Error;

/// The queue that asks orchestrators for things.
pub const TASK_REQUESTS: &str = "task_requests";
/// The queue that results travel back on.
pub const STEP_RESULTS: &str = "step_results";

/// A message, read leniently: whatever JSON it is, and even where it is none that we can hold
/// (PostgreSQL keeps numbers and depths that this program cannot read).
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "columns of a PGMQ queue")]
pub struct Message {
    pub msg_id: i64,
    pub read_ct: i32,
    pub enqueued_at: DateTime<Utc>,
    /// Why it cannot be read, if it cannot.
    pub body: Result<Value, String>,
    pub headers: Option<Value>,
}

/// Registers a reader, so that senders know whom to wake.
pub async fn register(conn: &mut PgConnection, queue: &str, reader: &str) -> Result<(), Error> {
    sqlx::query!(
        "insert into tasker.readers (queue, reader) values ($1, $2)
         on conflict (queue, reader) do update set asleep = false, seen_at = clock_timestamp()",
        queue,
        reader
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Reads up to `max` messages, hidden from others for `vt_seconds`; an empty answer marks the
/// reader asleep. May run on a connection that commits asynchronously.
///
/// The statements are those of PGMQ's `read`, planned once; see `docs/adr/0005`.
pub async fn receive(
    conn: &mut PgConnection,
    queue: &str,
    reader: &str,
    vt_seconds: i32,
    max: i32,
) -> Result<Vec<Message>, Error> {
    let vt = f64::from(vt_seconds);
    let max = i64::from(max);
    let rows = if queue == TASK_REQUESTS {
        sqlx::query_file_as!(Row, "src/lifecycle/queue/receive_requests.sql", vt, max, reader).fetch_all(conn).await?
    } else {
        sqlx::query_file_as!(Row, "src/lifecycle/queue/receive_results.sql", vt, max, reader).fetch_all(conn).await?
    };
    Ok(rows
        .into_iter()
        .map(|row| Message {
            msg_id: row.msg_id,
            read_ct: row.read_ct,
            enqueued_at: row.enqueued_at,
            // As text: one value that cannot be decoded must not fail the read of all.
            body: row.message.map_or(Ok(Value::Null), |text| {
                serde_json::from_str(&text).map_err(|error| format!("message: {error}"))
            }),
            headers: row.headers.and_then(|text| serde_json::from_str(&text).ok()),
        })
        .collect())
}

struct Row {
    msg_id: i64,
    read_ct: i32,
    enqueued_at: DateTime<Utc>,
    message: Option<String>,
    headers: Option<String>,
}

/// Messages to send: their queues, bodies and headers, in the order in which they are to be read.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "three columns of one table")]
pub struct Outbox {
    pub queues: Vec<String>,
    pub bodies: Vec<Value>,
    pub headers: Vec<Value>,
}

/// What a settle does to queues; nothing by default.
#[derive(Debug, Default)]
pub struct QueueChanges<'a> {
    /// The queue that the messages came from.
    pub queue: &'a str,
    /// Messages that are dealt with.
    pub done: &'a [i64],
    /// Timers that are dealt with.
    pub due: &'a [i64],
    /// Messages to send.
    pub outbox: Outbox,
}

/// Deletes what is dealt with, sends what is to be sent, and wakes sleeping readers: one statement.
pub async fn conclude(conn: &mut PgConnection, changes: &QueueChanges<'_>) -> Result<(), Error> {
    sqlx::query!(
        "select tasker.conclude($1, $2, $3, $4, $5, $6)::text as done",
        changes.queue,
        changes.done,
        changes.due,
        &changes.outbox.queues,
        &changes.outbox.bodies,
        &changes.outbox.headers
    )
    .fetch_one(conn)
    .await?;
    Ok(())
}

/// Puts messages back for a moment, as if they had not been read: their task is settled by
/// somebody else right now. The jitter keeps two orchestrators from meeting at the same task
/// again and again.
pub async fn put_back(conn: &mut PgConnection, queue: &str, msg_ids: &[i64], delay_ms: i32) -> Result<(), Error> {
    sqlx::query!(
        "select tasker.put_back($1, $2, make_interval(secs => $3::int / 1000.0))::text as done",
        queue,
        msg_ids,
        delay_ms
    )
    .fetch_one(conn)
    .await?;
    Ok(())
}

/// Lets messages be read again later, because somebody else holds a lock: see `tasker.put_off`.
pub async fn put_off(conn: &mut PgConnection, queue: &str, msg_ids: &[i64]) -> Result<(), Error> {
    sqlx::query!("select tasker.put_off($1, $2)::text as done", queue, msg_ids).fetch_one(conn).await?;
    Ok(())
}

/// Locks these requests until the transaction ends; answers those that are still there. One that
/// somebody else has locked counts as gone: it is read again when its reading times out.
pub async fn lock_requests(conn: &mut PgConnection, msg_ids: &[i64]) -> Result<Vec<i64>, Error> {
    Ok(sqlx::query_scalar!(
        "select msg_id from pgmq.q_task_requests where msg_id = any($1) order by msg_id for update skip locked",
        msg_ids
    )
    .fetch_all(conn)
    .await?)
}

/// Notes a deterministic failure of one message and answers how many there were.
pub async fn note_failure(conn: &mut PgConnection, queue: &str, msg_id: i64, reason: &str) -> Result<i32, Error> {
    Ok(sqlx::query_scalar!(
        "insert into tasker.message_failures as f (queue, msg_id, failures, reason) values ($1, $2, 1, $3)
         on conflict (queue, msg_id) do update set failures = f.failures + 1, reason = excluded.reason, last_at = clock_timestamp()
         returning failures",
        queue,
        msg_id,
        reason
    )
    .fetch_one(conn)
    .await?)
}

/// Moves messages to the quarantine, each with its reason and as it is.
pub async fn quarantine(conn: &mut PgConnection, queue: &str, bad: &[(i64, String)]) -> Result<(), Error> {
    let ids: Vec<i64> = bad.iter().map(|(msg_id, _)| *msg_id).collect();
    let reasons: Vec<&str> = bad.iter().map(|(_, reason)| reason.as_str()).collect();
    sqlx::query!("select tasker.quarantine_messages($1, $2, $3)::text as done", queue, &ids, &reasons as &[&str])
        .fetch_one(conn)
        .await?;
    Ok(())
}

/// Puts off a timer that cannot be settled: soon enough for whoever repairs its task, and
/// seldom enough for everybody else.
pub async fn put_off_timer(conn: &mut PgConnection, due_id: i64) -> Result<(), Error> {
    sqlx::query!("update tasker.due set due_at = clock_timestamp() + interval '1 min' where due_id = $1", due_id)
        .execute(conn)
        .await?;
    Ok(())
}

/// Tells workers that steps they hold were cancelled; reaches them when the transaction commits.
pub async fn notify_cancelled(conn: &mut PgConnection, workers: &[String]) -> Result<(), Error> {
    sqlx::query!("select pg_notify('tasker', 'cancel:' || w)::text as told from unnest($1::text[]) w", workers)
        .fetch_all(conn)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Executor, PgConnection};

    use tasker_shared::store::HOT_PATH_SETTINGS;
    use tasker_shared::store::tx::{self, PoolOptions};
    use tasker_testing::TestDatabase;

    /// The plan that a session of the hot path makes and keeps.
    async fn plan(conn: &mut PgConnection, statement: &str, arguments: &str) -> String {
        conn.execute(AssertSqlSafe(format!("prepare it as {statement}"))).await.expect("prepared");
        let explain = AssertSqlSafe(format!("explain (costs off) execute it({arguments})"));
        let lines: Vec<String> = sqlx::query_scalar(explain).fetch_all(&mut *conn).await.expect("a plan");
        conn.execute("deallocate it").await.expect("forgotten");
        lines.join("\n")
    }

    #[tokio::test]
    async fn plan_made_while_a_queue_was_empty_does_not_compare_each_message_with_each() {
        let database = TestDatabase::fresh().await;
        let options = PoolOptions { settings: HOT_PATH_SETTINGS, ..PoolOptions::default() };
        let pool = tx::pool(&database.url(), &options).await.expect("a pool");
        let mut conn = pool.acquire().await.expect("a connection");
        conn.execute("select tasker.create_queue('worker_shop')").await.expect("a queue");
        for queue in ["task_requests", "step_results", "worker_shop"] {
            conn.execute(AssertSqlSafe(format!("vacuum analyze pgmq.q_{queue}"))).await.expect("known to be empty");
        }
        let source: String = sqlx::query_scalar("select prosrc from pg_proc where proname = 'take_worker_shop'")
            .fetch_one(&mut *conn)
            .await
            .expect("the function");
        let taking = source[source.find("with picked").expect("its statement")..source.rfind(';').expect("its end")]
            .replace("into msg_ids, steps, attempts, parents, baggage", "")
            .replace("p_handlers", "$1::text[]")
            .replace("p_max", "$2::int");
        let taking = taking.split(';').next().unwrap_or_default();
        for (statement, arguments) in [
            (include_str!("queue/receive_requests.sql"), "10, 500, 'reader'"),
            (include_str!("queue/receive_results.sql"), "10, 500, 'reader'"),
            (taking, "'{charge}', 500"),
        ] {
            let plan = plan(&mut conn, statement, arguments).await;
            assert!(!plan.contains("Join Filter: (m.msg_id") && !plan.contains("Join Filter: (q_1.msg_id"), "{plan}");
            assert!(plan.contains("Index Cond: (msg_id = ANY"), "{plan}");
        }
    }
}
