//! The HTTP API: what it costs over SQL, and how quick lists are when the tables are full.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::PgPool;
use tasker_api::auth::{KeySpec, Role, create_key};
use tasker_api::page::rows;
use tasker_api::{Config, Server};
use tasker_shared::client::http::{HttpClient, TaskQuery};
use tasker_shared::client::{Client, Submit};
use tasker_shared::store;
use tasker_shared::store::details::STATUSES;
use tasker_shared::store::tx::{PoolOptions, pool};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::limits::{median, percentile};

/// Tasks of a batch, as the bench itself submits them.
const BATCH: usize = 200;
/// Batches of one round, and rounds of each way.
const BATCHES: usize = 10;
const ROUNDS: usize = 5;
/// Single submissions of each way.
const SINGLES: usize = 1000;
/// Times that each list is asked for.
const LOOKS: usize = 200;
/// What the tables are filled by at once.
const FILL: i64 = 100_000;
/// How old the oldest of the generated tasks is.
const DAYS: i64 = 30;

/// What was measured of the API.
#[derive(Debug, Default, Clone, Serialize)]
pub struct ApiFigures {
    /// One task a request, one after the other: `select tasker.submit_task(…)`, and `POST /v1/tasks`.
    pub sql_p50_ms: f64,
    pub sql_p99_ms: f64,
    pub http_p50_ms: f64,
    pub http_p99_ms: f64,
    /// 200 tasks at a time on one connection, the median of the rounds.
    pub sql_batched_per_second: f64,
    pub http_batched_per_second: f64,
    /// The same with two requests under way at once.
    pub http_batched_by_two_per_second: f64,
    /// Tasks in the tables while lists were read.
    pub tasks: i64,
    pub lists: Vec<ListFigure>,
}

/// A list, or another look.
#[derive(Debug, Clone, Serialize)]
pub struct ListFigure {
    pub what: String,
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// How many tasks the last answer held.
    pub found: usize,
}

/// Measures it in the bench's database, with a server of its own on this machine.
pub(super) async fn measure(bench: &PgPool, url: &str, tasks: i64) -> Result<ApiFigures> {
    let options = PoolOptions { max_connections: 16, application_name: "tasker-api", ..PoolOptions::default() };
    let client = Client::from_pool(pool(url, &options).await?);
    let spec = KeySpec { name: "bench".into(), role: Role::Admin, scopes: None, namespaces: None, expires_at: None };
    let key = create_key(&mut *bench.acquire().await?, &spec, "bench").await?.key;
    let config = Config {
        bind: SocketAddr::from(([127, 0, 0, 1], 0)),
        rate_per_s: 1_000_000,
        burst: 1_000_000,
        ..Config::default()
    };
    let server = Server::bind(client, config).await?;
    let http = HttpClient::new(&server.url(), &key)?;
    let stop = CancellationToken::new();
    let running = tokio::spawn(server.run(stop.clone()));
    let measured = measured(bench, &http, tasks).await;
    stop.cancel();
    running.await?;
    measured
}

async fn measured(bench: &PgPool, http: &HttpClient, tasks: i64) -> Result<ApiFigures> {
    let mut figures = ApiFigures { tasks, ..ApiFigures::default() };
    eprintln!("bench: submitting over SQL and over HTTP …");
    singles(bench, http, &mut figures).await?;
    batches(bench, http, &mut figures).await?;
    eprintln!("bench: filling the tables with {tasks} tasks …");
    fill(bench, tasks).await?;
    eprintln!("bench: lists and searches …");
    figures.lists = lists(bench, http, tasks).await?;
    Ok(figures)
}

fn task(n: usize) -> Submit {
    Submit::new("bench", "one", json!({"n": n}))
}

/// Alternately, so that both ways meet the same machine.
async fn singles(bench: &PgPool, http: &HttpClient, figures: &mut ApiFigures) -> Result<()> {
    let (mut sql, mut over_http) = (Vec::new(), Vec::new());
    let mut conn = bench.acquire().await?;
    for n in 0..SINGLES + 50 {
        let began = Instant::now();
        sqlx::query_scalar::<_, Uuid>("select tasker.submit_task('bench', 'one', input => $1)")
            .bind(json!({"n": n}))
            .fetch_one(&mut *conn)
            .await?;
        let between = Instant::now();
        http.submit(&task(n)).await?;
        // The first ones make connections and plans.
        if n >= 50 {
            sql.push((between - began).as_secs_f64() * 1000.0);
            over_http.push(between.elapsed().as_secs_f64() * 1000.0);
        }
    }
    (figures.sql_p50_ms, figures.sql_p99_ms) = (median(sql.clone()), percentile(sql, 0.99));
    (figures.http_p50_ms, figures.http_p99_ms) = (median(over_http.clone()), percentile(over_http, 0.99));
    Ok(())
}

async fn batches(bench: &PgPool, http: &HttpClient, figures: &mut ApiFigures) -> Result<()> {
    let (mut sql, mut over_http, mut by_two) = (Vec::new(), Vec::new(), Vec::new());
    let mut conn = bench.acquire().await?;
    let rate = |began: Instant| (BATCH * BATCHES) as f64 / began.elapsed().as_secs_f64();
    for round in 0..=ROUNDS {
        let began = Instant::now();
        for _ in 0..BATCHES {
            let requests: Vec<Value> =
                (0..BATCH).map(|n| json!({"namespace": "bench", "template": "one", "input": {"n": n}})).collect();
            let answers = store::tasks::submit(&mut conn, &requests).await?;
            ensure!(answers.iter().all(|answer| answer.error.is_none()), "submit was refused: {:?}", answers[0].error);
        }
        let own = rate(began);
        let began = Instant::now();
        post(http, BATCHES).await?;
        let one = rate(began);
        let began = Instant::now();
        tokio::try_join!(post(http, BATCHES / 2), post(http, BATCHES - BATCHES / 2))?;
        if round > 0 {
            sql.push(own);
            over_http.push(one);
            by_two.push(rate(began));
        }
    }
    (figures.sql_batched_per_second, figures.http_batched_per_second) = (median(sql), median(over_http));
    figures.http_batched_by_two_per_second = median(by_two);
    Ok(())
}

async fn post(http: &HttpClient, batches: usize) -> Result<()> {
    for _ in 0..batches {
        let tasks: Vec<Submit> = (0..BATCH).map(task).collect();
        let answers = http.submit_many(&tasks).await?;
        ensure!(answers.iter().all(|answer| answer.code.is_none()), "submit was refused: {:?}", answers[0]);
    }
    Ok(())
}

/// Tasks as they are found after a month: nearly all completed, some failed, a few open, ten
/// templates in each of four namespaces, and what is rare: a namespace of ten old tasks, an error
/// type of three, five that are suspended.
async fn fill(bench: &PgPool, tasks: i64) -> Result<()> {
    for namespace in ["shop", "depot", "billing", "mail", "rare"] {
        for template in 0..10 {
            super::register_in(bench, namespace, &format!("t{template}"), &super::chain(1)).await?;
        }
    }
    // What was submitted before would stand in front of every list.
    sqlx::query("truncate tasker.tasks, pgmq.q_task_requests").execute(bench).await?;
    let mut from = 0;
    while from < tasks {
        let to = tasks.min(from + FILL);
        sqlx::query(FILL_SQL).bind(from).bind(to).bind(tasks).bind(DAYS as f64).execute(bench).await?;
        from = to;
    }
    sqlx::query(
        "insert into tasker.idempotency_keys (namespace, key, task_uuid, request_hash)
         select namespace, idempotency_key, task_uuid, sha256('') from tasker.tasks where idempotency_key is not null",
    )
    .execute(bench)
    .await?;
    sqlx::query("vacuum (analyze)").execute(bench).await?;
    Ok(())
}

const FILL_SQL: &str = r"
with numbered as (
  select n,
    clock_timestamp() - make_interval(secs => (1 - n::float8 / $3) * $4 * 86400 + 60) as at,
    case when n % ($3 / 20 + 1) = 7 and n < $3 / 2 then 'rare'
      else (array['shop', 'depot', 'billing', 'mail'])[1 + n % 4] end as namespace,
    't' || (n / 4) % 10 as template,
    -- The latest are open, and five old ones are suspended.
    case when n >= $3 - 100 then (array['pending', 'steps_in_process'])[1 + n % 2]
      when n >= $3 - 130 then 'waiting_for_retry'
      when n % ($3 / 5 + 1) = 11 then 'suspended'
      when n % 50 = 3 then 'error'
      when n % 200 = 9 then 'cancelled'
      when n % 5000 = 17 then 'blocked_by_failures'
      when n % 5000 = 19 then 'resolved_manually'
      else 'complete' end as state
  from generate_series($1::bigint, $2::bigint - 1) n)
insert into tasker.tasks (task_uuid, namespace, template_id, state, version, correlation_id, idempotency_key, input, open_steps,
  failed_steps, error_type, reason, ended_by, suspended_from, trace_id, root_span_id, created_at, generation_began_at, last_at, finished_at)
select
  encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
    placing substring(int8send((extract(epoch from at) * 1000)::bigint) from 3) from 1 for 6), 52, 1), 53, 1), 'hex')::uuid,
  s.namespace, p.template_id, state, 4, 'ORD-' || n / 2, case when n % 10 = 0 then 'key-' || n end,
  jsonb_build_object('order_id', n, 'text', repeat('x', 100)),
  (state in ('steps_in_process', 'waiting_for_retry', 'suspended', 'blocked_by_failures'))::int,
  (state in ('error', 'blocked_by_failures'))::int,
  case when state in ('error', 'blocked_by_failures') then
    case when n in (53, 5053, 10053) then 'NobodyExpectedThis' else 'Type' || n % 20 end end,
  case when state = 'error' then 'step s0 failed after 3 attempts' end,
  case when state = 'cancelled' then 'cancel' end,
  case when state = 'suspended' then 'steps_in_process' end,
  uuid_send(gen_random_uuid()), substring(uuid_send(gen_random_uuid()) from 1 for 8), at, at, at,
  case when state in ('complete', 'error', 'cancelled', 'resolved_manually') then at + interval '2 s' end
from numbered s
join lateral (select template_id from tasker.templates p where p.namespace = s.namespace and p.name = s.template) p on true";

/// Every list of the API, and the two looks of the page that are not lists.
async fn lists(bench: &PgPool, http: &HttpClient, tasks: i64) -> Result<Vec<ListFigure>> {
    let all = TaskQuery::default;
    let text = |text: &str| Some(text.to_owned());
    let middle: DateTime<Utc> = sqlx::query_scalar("select clock_timestamp() - make_interval(days => $1)")
        .bind(i32::try_from(DAYS / 2)?)
        .fetch_one(bench)
        .await?;
    let deep: Uuid = sqlx::query_scalar("select tasker.uuid7_floor($1)").bind(middle).fetch_one(bench).await?;
    let mut queries: Vec<(String, TaskQuery)> = vec![
        ("no filter".into(), all()),
        ("no filter, from the middle on".into(), TaskQuery { after: Some(deep), ..all() }),
        ("500 tasks".into(), TaskQuery { limit: Some(500), ..all() }),
        ("namespace".into(), TaskQuery { namespace: text("shop"), ..all() }),
        ("namespace of ten tasks".into(), TaskQuery { namespace: text("rare"), ..all() }),
        ("template".into(), TaskQuery { template: text("t3"), ..all() }),
        ("template and namespace".into(), TaskQuery { template: text("t3"), namespace: text("depot"), ..all() }),
        (
            "an hour, in the middle".into(),
            TaskQuery { created_from: Some(middle), created_to: Some(middle + chrono::TimeDelta::hours(1)), ..all() },
        ),
        (
            "the first day".into(),
            TaskQuery { created_to: Some(middle - chrono::TimeDelta::days(DAYS / 2 - 1)), ..all() },
        ),
        ("error type".into(), TaskQuery { error_type: text("Type3"), ..all() }),
        ("error type of three tasks".into(), TaskQuery { error_type: text("NobodyExpectedThis"), ..all() }),
        ("error type and template".into(), TaskQuery { error_type: text("Type3"), template: text("t3"), ..all() }),
        (
            "failed, in a namespace without".into(),
            TaskQuery { status: text("failed"), namespace: text("rare"), ..all() },
        ),
        ("idempotency key".into(), TaskQuery { idempotency_key: Some(format!("key-{}", tasks / 20 * 10)), ..all() }),
    ];
    for status in STATUSES {
        queries.push((format!("status {status}"), TaskQuery { status: text(status), ..all() }));
    }
    let mut figures = Vec::new();
    for (what, query) in queries {
        figures.push(
            timed(what, async |_| Ok(http.tasks(query.clone()).next().await?.map_or(0, |page| page.len()))).await?,
        );
    }
    let spread = |look: usize| i64::try_from(look).unwrap_or_default() * tasks / i64::try_from(LOOKS).unwrap_or(1) / 2;
    figures.push(
        timed("correlation id, another each time".into(), async |look| {
            let query = TaskQuery { correlation_id: Some(format!("ORD-{}", spread(look))), ..all() };
            Ok(http.tasks(query).next().await?.map_or(0, |page| page.len()))
        })
        .await?,
    );
    figures.push(
        timed("counts by status".into(), async |_| {
            let counts: Value = http.get("/v1/tasks/counts", &()).await?;
            Ok(counts["statuses"].as_array().map_or(0, Vec::len))
        })
        .await?,
    );
    figures.push(
        timed("the page's search box, a correlation id".into(), async |look| {
            let word = format!("ORD-{}", spread(look));
            Ok(rows::search(&mut *bench.acquire().await?, None, &word).await?.len())
        })
        .await?,
    );
    figures.push(
        timed("the page's search box, a word that is nowhere".into(), async |look| {
            Ok(rows::search(&mut *bench.acquire().await?, None, &format!("nowhere-{look}")).await?.len())
        })
        .await?,
    );
    for (what, namespace, status) in [
        ("the page's list", None, None),
        ("the page's list, failed in a namespace without", text("rare"), text("failed")),
    ] {
        let filter = rows::TaskFilter { namespace, status, ..rows::TaskFilter::default() };
        let look = async |_| Ok(rows::tasks(&mut *bench.acquire().await?, None, &filter, 50).await?.0.len());
        figures.push(timed(what.into(), look).await?);
    }
    figures.push(
        timed("the page's counts".into(), async |_| {
            Ok(rows::tally(&mut *bench.acquire().await?, None, None).await?.len())
        })
        .await?,
    );
    figures.push(
        timed("the page's counts of a namespace".into(), async |_| {
            Ok(rows::tally(&mut *bench.acquire().await?, None, Some("rare")).await?.len())
        })
        .await?,
    );
    Ok(figures)
}

async fn timed(what: String, look: impl AsyncFn(usize) -> Result<usize>) -> Result<ListFigure> {
    let mut times = Vec::with_capacity(LOOKS);
    let mut found = 0;
    for n in 0..LOOKS + 5 {
        let began = Instant::now();
        found = look(n % LOOKS).await.with_context(|| what.clone())?;
        if n >= 5 {
            times.push(began.elapsed().as_secs_f64() * 1000.0);
        }
    }
    Ok(ListFigure { what, p50_ms: median(times.clone()), p99_ms: percentile(times, 0.99), found })
}
