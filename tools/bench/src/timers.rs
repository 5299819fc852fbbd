//! What is due: many timers at once, one at a time on the idle system, and very many that are not.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::PgPool;
use tasker_shared::store;

use super::limits::{median, percentile};
use super::load::{Counters, Pair, Scenario};

/// Many tasks that sleep until the same moment.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Timers {
    pub tasks: usize,
    /// From the moment they are due until each timer has fired, and until each task has ended.
    pub fired_p50_ms: f64,
    pub fired_p99_ms: f64,
    pub ended_p99_ms: f64,
    pub fired_per_second: f64,
}

/// How late a timer and a retry are on the idle system, one after the other.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Lateness {
    pub count: usize,
    /// Until the step behind the timer is claimed.
    pub timer_p50_ms: f64,
    pub timer_p99_ms: f64,
    /// Until the next attempt is claimed.
    pub retry_p50_ms: f64,
    pub retry_p99_ms: f64,
}

/// What tasks that sleep for a day cost meanwhile.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Sleepers {
    pub tasks: usize,
    /// `statements`, or `commits` where the server does not count statements.
    pub counted: &'static str,
    pub idle_per_second: f64,
    pub sleeping_per_second: f64,
    /// One look at what is due, without and with the sleeping tasks.
    pub look_before_us: f64,
    pub look_after_us: f64,
}

/// Submits tasks that sleep, and waits until all of them do.
async fn put_to_sleep(pool: &PgPool, template: &str, tasks: usize, input: &Value) -> Result<()> {
    let mut conn = pool.acquire().await?;
    for first in (0..tasks).step_by(500) {
        let request = json!({"namespace": "bench", "template": template, "input": input});
        let requests = vec![request; tasks.min(first + 500) - first];
        let answers = store::tasks::submit(&mut conn, &requests).await?;
        ensure!(answers.iter().all(|answer| answer.error.is_none()), "submit was refused: {:?}", answers[0].error);
    }
    let started = Instant::now();
    loop {
        let asleep: i64 = sqlx::query_scalar("select count(*) from tasker.steps where state = 'waiting'")
            .fetch_one(&mut *conn)
            .await?;
        if asleep >= tasks as i64 {
            return Ok(());
        }
        ensure!(started.elapsed() < Duration::from_mins(10), "only {asleep} of {tasks} tasks sleep");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Many tasks sleep, and all are due at once.
pub async fn due_at_once(pool: &PgPool, scenario: &Scenario) -> Result<Timers> {
    let pair = Pair::start(scenario).await?;
    let later: String =
        sqlx::query_scalar("select to_jsonb(clock_timestamp() + interval '1 d')#>>'{}'").fetch_one(pool).await?;
    put_to_sleep(pool, "sleeping", scenario.tasks, &json!({"at": later})).await?;
    // How long it takes until they sleep is nobody's to know, so the time comes to them.
    let due: chrono::DateTime<chrono::Utc> =
        sqlx::query_scalar("select clock_timestamp() + interval '1 s'").fetch_one(pool).await?;
    sqlx::query("update tasker.steps set due_at = $1 where state = 'waiting'").bind(due).execute(pool).await?;
    sqlx::query("update tasker.due set due_at = $1 where kind = 'timer'").bind(due).execute(pool).await?;
    sqlx::query("select pg_notify('tasker', 'due')").execute(pool).await?;
    let started = Instant::now();
    loop {
        let open: i64 =
            sqlx::query_scalar("select count(*) from tasker.tasks where finished_at is null").fetch_one(pool).await?;
        if open == 0 {
            break;
        }
        ensure!(started.elapsed() < Duration::from_mins(10), "{open} tasks have not ended");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    pair.stop().await?;
    let fired =
        late(pool, "select r.at from tasker.transitions r where r.event = 'TimerFired' and r.at >= $1", due).await?;
    let ended = late(pool, "select t.finished_at from tasker.tasks t where t.finished_at >= $1", due).await?;
    ensure!(fired.len() == scenario.tasks, "{} of {} timers fired", fired.len(), scenario.tasks);
    let last = fired.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    Ok(Timers {
        tasks: scenario.tasks,
        fired_per_second: scenario.tasks as f64 / last * 1000.0,
        fired_p50_ms: median(fired.clone()),
        fired_p99_ms: percentile(fired, 0.99),
        ended_p99_ms: percentile(ended, 0.99),
    })
}

/// How long after `due` each of these times is, in milliseconds.
async fn late(pool: &PgPool, times: &'static str, due: chrono::DateTime<chrono::Utc>) -> Result<Vec<f64>> {
    let query = format!("select (extract(epoch from at - $1) * 1000)::float8 from ({times}) w(at)");
    Ok(sqlx::query_scalar(sqlx::AssertSqlSafe(query)).bind(due).fetch_all(pool).await?)
}

/// One timer and one retry after the other, each on the idle system.
pub async fn one_by_one(pool: &PgPool, scenario: &Scenario) -> Result<Lateness> {
    let pair = Pair::start(scenario).await?;
    for n in 0..scenario.tasks {
        for template in ["timer", "retry"] {
            let task: uuid::Uuid = sqlx::query_scalar("select tasker.submit_task('bench', $1, input => $2)")
                .bind(template)
                .bind(json!({"n": n}))
                .fetch_one(pool)
                .await?;
            let started = Instant::now();
            while !sqlx::query_scalar::<_, bool>(
                "select finished_at is not null from tasker.tasks where task_uuid = $1",
            )
            .bind(task)
            .fetch_one(pool)
            .await?
            {
                ensure!(started.elapsed() < Duration::from_secs(30), "the task of a {template} has not ended");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    pair.stop().await?;
    // What was waited for stands in the log, the claim on the attempt's row.
    let timers: Vec<f64> = sqlx::query_scalar(
        "select (extract(epoch from a.claimed_at - (w.detail->>'until')::timestamptz) * 1000)::float8
         from tasker.transitions w join tasker.attempts a on a.task_uuid = w.task_uuid and a.worker <> ''
         where w.event = 'BeginWait' and w.task_uuid in (
           select t.task_uuid from tasker.tasks t join tasker.templates p on p.template_id = t.template_id and p.name = 'timer')",
    )
    .fetch_all(pool)
    .await?;
    let retries: Vec<f64> = sqlx::query_scalar(
        "select (extract(epoch from a.claimed_at - (w.detail->>'until')::timestamptz) * 1000)::float8
         from tasker.transitions w join tasker.attempts a on a.task_uuid = w.task_uuid and a.attempt = 2
         where w.event = 'ScheduleRetry'",
    )
    .fetch_all(pool)
    .await?;
    ensure!(timers.len() == scenario.tasks && retries.len() == scenario.tasks, "some timer or retry never came");
    Ok(Lateness {
        count: scenario.tasks,
        timer_p50_ms: median(timers.clone()),
        timer_p99_ms: percentile(timers, 0.99),
        retry_p50_ms: median(retries.clone()),
        retry_p99_ms: percentile(retries, 0.99),
    })
}

/// The idle system without and with so many tasks that sleep for a day.
pub async fn sleepers(pool: &PgPool, scenario: &Scenario) -> Result<Sleepers> {
    let pair = Pair::start(scenario).await?;
    let idle_per_second = per_second(pool, scenario).await?;
    let look_before_us = look(pool).await?;
    put_to_sleep(pool, "day", scenario.tasks, &json!({})).await?;
    sqlx::query("vacuum (analyze)").execute(pool).await?;
    let sleeping_per_second = per_second(pool, scenario).await?;
    let look_after_us = look(pool).await?;
    pair.stop().await?;
    Ok(Sleepers {
        tasks: scenario.tasks,
        counted: if scenario.counts_statements { "statements" } else { "commits" },
        idle_per_second,
        sleeping_per_second,
        look_before_us,
        look_after_us,
    })
}

/// What the system does in a second when it has nothing to do.
async fn per_second(pool: &PgPool, scenario: &Scenario) -> Result<f64> {
    // Long enough for every poll to have backed off.
    tokio::time::sleep(Duration::from_secs(15)).await;
    let count = |counters: &Counters| if scenario.counts_statements { counters.statements } else { counters.commits };
    let before = Counters::read(pool, scenario.counts_statements).await?;
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs(15)).await;
    let after = Counters::read(pool, scenario.counts_statements).await?;
    // What reading the counters cost is in both of the figures that are compared.
    Ok((count(&after) - count(&before)) as f64 / started.elapsed().as_secs_f64())
}

/// The median of looks at what is due, in microseconds.
async fn look(pool: &PgPool) -> Result<f64> {
    let mut conn = pool.acquire().await?;
    let mut times = Vec::new();
    for _ in 0..200 {
        let started = Instant::now();
        sqlx::query("select * from tasker.take_due(500)").execute(&mut *conn).await?;
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    Ok(median(times))
}
