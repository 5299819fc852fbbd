//! What the machine and its PostgreSQL can do at most, measured beside us.

use std::time::{Duration, Instant};

use anyhow::Result;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgPool;

/// Limits of this machine, each over about a second.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Limits {
    /// One client inserting one row a transaction.
    pub commits_per_second: f64,
    /// Median time of such a commit.
    pub commit_ms: f64,
    /// Rows inserted 100 a statement.
    pub batched_rows_per_second: f64,
    /// PGMQ messages read and deleted 100 at a time by one client.
    pub pgmq_messages_per_second: f64,
    /// The same by one client for each core, each with a queue of its own, together: what the cores
    /// add up to when all of them work, as they do under our load.
    pub pgmq_messages_per_second_all_cores: f64,
}

const ENOUGH: Duration = Duration::from_secs(1);

/// Measures them in tables of its own.
pub async fn measure(pool: &PgPool) -> Result<Limits> {
    let mut conn = pool.acquire().await?;
    sqlx::query("create table if not exists bench_rows (id bigint generated always as identity primary key, at timestamptz, body jsonb)")
        .execute(&mut *conn)
        .await?;
    let commits = commit_times(pool, ENOUGH).await?;
    let commits_per_second = commits.len() as f64 / commits.iter().sum::<f64>() * 1000.0;

    let started = Instant::now();
    let mut rows = 0;
    while started.elapsed() < ENOUGH {
        sqlx::query(
            "insert into bench_rows (at, body) select clock_timestamp(), '{\"a\": 1}' from generate_series(1, 100)",
        )
        .execute(&mut *conn)
        .await?;
        rows += 100;
    }
    let batched_rows_per_second = f64::from(rows) / started.elapsed().as_secs_f64();

    drop(conn);
    Ok(Limits {
        commits_per_second,
        commit_ms: median(commits),
        batched_rows_per_second,
        pgmq_messages_per_second: pgmq_rate(pool).await?,
        pgmq_messages_per_second_all_cores: all_cores(pool).await?,
    })
}

async fn all_cores(pool: &PgPool) -> Result<f64> {
    let clients = std::thread::available_parallelism().map_or(1, usize::from);
    let mut rates = tokio::task::JoinSet::new();
    for client in 0..clients {
        let pool = pool.clone();
        rates.spawn(async move { pgmq_rate_of(&pool, &format!("bench_limit_{client}")).await });
    }
    let mut all = 0.0;
    while let Some(rate) = rates.join_next().await {
        all += rate??;
    }
    Ok(all)
}

/// Messages a second that PGMQ's own functions read and delete, 100 at a time, for about a second.
pub async fn pgmq_rate(pool: &PgPool) -> Result<f64> {
    pgmq_rate_of(pool, "bench_limit").await
}

async fn pgmq_rate_of(pool: &PgPool, queue: &str) -> Result<f64> {
    let mut conn = pool.acquire().await?;
    sqlx::query("select pgmq.create($1)").bind(queue).execute(&mut *conn).await?;
    let (mut messages, mut spent) = (0_usize, Duration::ZERO);
    while spent < ENOUGH {
        // Messages of the size of ours, read whole, as any consumer reads them.
        sqlx::query(
            "select pgmq.send_batch($1,
               array_agg(jsonb_build_object('v', 1, 'task', gen_random_uuid(), 'step', gen_random_uuid(),
                 'generation', 1, 'attempt', 1, 'handler', 'bench.noop')),
               array_agg(jsonb_build_object('traceparent', '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01',
                 'x-tasker-sender', '00f067aa0ba902b7')))
             from generate_series(1, 5000)",
        )
        .bind(queue)
        .execute(&mut *conn)
        .await?;
        let started = Instant::now();
        loop {
            let read: Vec<(i64, i32, DateTime<Utc>, Value, Value)> =
                sqlx::query_as("select msg_id, read_ct, enqueued_at, message, headers from pgmq.read($1, 30, 100)")
                    .bind(queue)
                    .fetch_all(&mut *conn)
                    .await?;
            if read.is_empty() {
                break;
            }
            let ids: Vec<i64> = read.iter().map(|message| message.0).collect();
            sqlx::query("select pgmq.delete($1, $2::bigint[])").bind(queue).bind(&ids).execute(&mut *conn).await?;
            messages += ids.len();
        }
        spent += started.elapsed();
    }
    sqlx::query("select pgmq.drop_queue($1)").bind(queue).execute(&mut *conn).await?;
    Ok(messages as f64 / spent.as_secs_f64())
}

/// Milliseconds of one-row insert commits, for about that long.
pub async fn commit_times(pool: &PgPool, how_long: Duration) -> Result<Vec<f64>> {
    let mut conn = pool.acquire().await?;
    let started = Instant::now();
    let mut times = Vec::new();
    while started.elapsed() < how_long {
        let commit = Instant::now();
        sqlx::query("insert into bench_rows (at, body) values (clock_timestamp(), '{\"a\": 1}')")
            .execute(&mut *conn)
            .await?;
        times.push(commit.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(times)
}

/// The middle of the values; 0 of none.
pub fn median(values: Vec<f64>) -> f64 {
    percentile(values, 0.5)
}

/// The value below which that share of the values lies; 0 of none.
pub fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let place = (values.len().saturating_sub(1)) as f64 * share;
    values.get(place.round() as usize).copied().unwrap_or(0.0)
}
