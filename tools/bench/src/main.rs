//! `tasker-bench`: what this machine does, beside what it could do at most, from one run.
//!
//! Absolute figures on a shared machine mean little, so every figure of ours stands beside a
//! limit measured in the same run. Works in a database of its own and drops it at the end.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "counts become rates"
)]

mod api;
mod limits;
mod load;
mod report;
mod sink;
mod timers;

use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use sqlx::PgPool;
use tasker_shared::postgres::Database;
use tasker_shared::store::tx::{PoolOptions, pool};
use tasker_shared::template::parse;
use tasker_shared::{migrate, store};

use crate::load::{Run, Scenario};

/// Which graph the tasks have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shape {
    /// Five steps, one after the other.
    #[value(name = "linear_5")]
    Linear5,
    /// 1 → 2 → 1.
    #[value(name = "diamond")]
    Diamond,
    /// 1 → 20 → 1.
    #[value(name = "fanout_20")]
    Fanout20,
    /// Two steps, one after the other; of the first at most two at once for each of 100 keys.
    #[value(name = "limited")]
    Limited,
    /// One map over 10,000 items.
    #[value(name = "map_10k")]
    Map10k,
    /// Three steps, the second of which starts a task of one step and awaits it.
    #[value(name = "nested")]
    Nested,
    /// A sleep and a step; all tasks sleep until the same moment.
    #[value(name = "timers_10k")]
    Timers10k,
}

/// How the figures are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people
    Table,
    /// For scripts
    Json,
}

/// Measure throughput, latency and cost, beside this machine's limits.
#[derive(Debug, Parser)]
#[command(name = "tasker-bench", version, max_term_width = 100)]
struct BenchArgs {
    /// The database to use, instead of the managed local one
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
    /// How results are printed
    #[arg(short, long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    output: Format,
    /// The graph of the tasks.
    #[arg(long, value_enum, default_value = "linear_5")]
    template: Shape,
    /// Tasks per run; 2000, 1 of `map_10k`, or 10,000 of `timers_10k`, if none are given.
    #[arg(long)]
    tasks: Option<usize>,
    /// Also run this many pairs with tracing off and on, alternately, and print the median ratio.
    #[arg(long, default_value_t = 0)]
    pairs: usize,
    /// Also measure one-step tasks on the idle system, this many.
    #[arg(long, default_value_t = 0)]
    latency: usize,
    /// Also run again after this many tasks have finished, and compare.
    #[arg(long, default_value_t = 0)]
    backlog: usize,
    /// Also compare one task that fans out to this many steps with many that fan out to 20.
    #[arg(long, default_value_t = 0)]
    fanout: usize,
    /// Also count the statements of the idle system for this many seconds.
    #[arg(long, default_value_t = 0)]
    idle: u64,
    /// Also measure how late a due timer and a due retry start on the idle system, this many of each.
    #[arg(long, default_value_t = 0)]
    due: usize,
    /// Also measure what this many sleeping tasks cost.
    #[arg(long, default_value_t = 0)]
    sleepers: usize,
    /// Only the HTTP API: what a submission costs over SQL, and lists and searches with full tables.
    #[arg(long)]
    api: bool,
    /// Tasks in the tables while lists and searches are measured
    #[arg(long, default_value_t = 1_000_000, requires = "api", value_parser = clap::value_parser!(i64).range(1000..))]
    listed: i64,
    /// Everything: 5 pairs, 200 latencies, a backlog of 50,000, a fan-out of 10,000, 60 s idle, 100 timers
    /// and retries one by one, 100,000 sleepers.
    #[arg(long)]
    all: bool,
    /// Attempts that run at once in the worker.
    #[arg(long, default_value_t = 4000)]
    slots: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = BenchArgs::parse();
    // The managed server runs as long as this lives.
    let database = match args.database_url.take().filter(|url| !url.is_empty()) {
        Some(url) => Database::External { url },
        None => tokio::task::spawn_blocking(Database::open).await??,
    };
    let server_url = database.url();
    if args.all {
        (args.pairs, args.latency, args.backlog, args.fanout, args.idle) = (5, 200, 50_000, 10_000, 60);
        (args.due, args.sleepers) = (100, 100_000);
    }
    let name = format!("tasker_bench_{}", std::process::id());
    let server = pool(&server_url, &PoolOptions { application_name: "tasker-bench", ..PoolOptions::default() }).await?;
    sqlx::query(sqlx::AssertSqlSafe(format!("create database {name}")))
        .execute(&server)
        .await
        .context("creating a database for the bench")?;
    let url = with_database(&server_url, &name)?;
    let result = measure(&args, &url).await;
    sqlx::query(sqlx::AssertSqlSafe(format!("drop database {name} with (force)")))
        .execute(&server)
        .await
        .context("dropping the bench's database")?;
    let report = result?;
    match args.output {
        Format::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        Format::Table => println!("{}", report.table().trim_end()),
    }
    Ok(())
}

fn with_database(url: &str, name: &str) -> Result<String> {
    let (head, query) = url.split_once('?').map_or((url, None), |(head, query)| (head, Some(query)));
    let (base, _) = head.rsplit_once('/').context("the database URL names no database")?;
    Ok(query.map_or_else(|| format!("{base}/{name}"), |query| format!("{base}/{name}?{query}")))
}

async fn measure(args: &BenchArgs, url: &str) -> Result<report::Report> {
    let pool = pool(url, &PoolOptions { application_name: "tasker-bench", ..PoolOptions::default() }).await?;
    migrate::migrate(&pool).await?;
    // Where the server does not preload it, statements are simply not counted.
    let counts_statements =
        sqlx::query("create extension if not exists pg_stat_statements").execute(&pool).await.is_ok()
            && sqlx::query("select count(*) from pg_stat_statements").execute(&pool).await.is_ok();
    let fan = args.fanout.max(1);
    register_all(&pool, fan).await?;

    let mut report = report::Report {
        load_average: load_average(),
        cores: std::thread::available_parallelism()?.get(),
        ..Default::default()
    };
    let progress = |what: &str| eprintln!("bench: {what} …");
    progress("this machine's limits");
    report.limits = limits::measure(&pool).await?;
    if args.api {
        report.api = Some(api::measure(&pool, url, args.listed).await?);
        return Ok(report::Report { load_average_after: load_average(), ..report });
    }
    let scenario = |tasks: usize, template: &'static str, steps: usize, traced: bool| Scenario {
        url: url.to_owned(),
        template,
        tasks,
        steps_per_task: steps,
        traced,
        slots: args.slots,
        counts_statements,
    };
    let (template, steps) = match args.template {
        Shape::Linear5 => ("linear_5", 5),
        Shape::Diamond => ("diamond", 4),
        Shape::Fanout20 => ("fanout_20", 22),
        Shape::Limited => ("limited", 2),
        Shape::Map10k => ("map_10k", load::MAP_ITEMS),
        Shape::Nested => ("nested", 3),
        Shape::Timers10k => ("sleeping", 1),
    };
    let tasks = args.tasks.unwrap_or(match args.template {
        Shape::Map10k => 1,
        Shape::Timers10k => 10_000,
        _ => 2000,
    });
    report.template = template.to_owned();
    if args.due > 0 {
        progress("timers and retries on the idle system");
        report.lateness = Some(timers::one_by_one(&pool, &scenario(args.due, "timer", 1, false)).await?);
    }
    if args.template == Shape::Timers10k {
        progress("timers that are due at once");
        report.timers = Some(timers::due_at_once(&pool, &scenario(tasks, template, steps, false)).await?);
        report.sleepers = sleepers(args, &pool, &scenario(args.sleepers, "day", 0, false)).await?;
        report.load_average_after = load_average();
        return Ok(report);
    }
    progress("warming up");
    load::run(&pool, &scenario(tasks.min(500), template, steps, false)).await?;
    progress("tracing off");
    report.untraced = Some(load::run(&pool, &scenario(tasks, template, steps, false)).await?);
    progress("every span exported");
    report.traced = Some(load::run(&pool, &scenario(tasks, template, steps, true)).await?);
    for pair in 0..args.pairs {
        progress(&format!("pair {} of {}", pair + 1, args.pairs));
        // A shared machine changes its pace from minute to minute: the limit is taken on both sides.
        let before = limits::pgmq_rate(&pool).await?;
        let off = load::run(&pool, &scenario(tasks, template, steps, false)).await?;
        let after = limits::pgmq_rate(&pool).await?;
        report.over_pgmq.push(off.steps_per_second / f64::midpoint(before, after));
        let on = load::run(&pool, &scenario(tasks, template, steps, true)).await?;
        report.pairs.push((off, on));
    }
    if args.latency > 0 {
        progress("one-step tasks on the idle system");
        report.latency = Some(latency(&pool, scenario(args.latency, "one", 1, false)).await?);
    }
    if args.fanout > 0 {
        progress("narrow and wide fan-outs");
        let narrow_tasks = args.fanout.div_ceil(20);
        for _ in 0..3 {
            let narrow: Run = load::run(&pool, &scenario(narrow_tasks, "fanout_20", 22, false)).await?;
            let wide: Run = load::run(&pool, &scenario(1, "fanout_wide", fan + 2, false)).await?;
            report.fanouts.push((narrow, wide));
        }
    }
    if args.idle > 0 {
        progress("idle");
        report.idle_statements_per_second =
            load::idle(&pool, &scenario(0, "one", 1, false), Duration::from_secs(args.idle)).await?;
    }
    if args.backlog > 0 {
        progress("filling the tables with finished tasks");
        let before: Vec<Run> = repeat(&pool, &scenario(tasks, template, steps, false), 3).await?;
        load::run(&pool, &scenario(args.backlog, "one", 1, false)).await?;
        progress("the same load again");
        let after: Vec<Run> = repeat(&pool, &scenario(tasks, template, steps, false), 3).await?;
        report.backlog = Some((args.backlog, before, after));
    }
    // Last, because it leaves the tables full.
    report.sleepers = sleepers(args, &pool, &scenario(args.sleepers, "day", 0, false)).await?;
    report.load_average_after = load_average();
    Ok(report)
}

/// As an application's code runs, on a thread of the runtime: each answer would otherwise wake one of
/// those first, and that one the main thread.
async fn latency(pool: &PgPool, scenario: Scenario) -> Result<load::Latency> {
    let pool = pool.clone();
    tokio::spawn(async move { load::latency(&pool, &scenario).await }).await?
}

/// Every template that the bench runs; `fan` is the width of the widest.
async fn register_all(pool: &PgPool, fan: usize) -> Result<()> {
    register(pool, "linear_5", &chain(5)).await?;
    register(pool, "one", &chain(1)).await?;
    register(pool, "diamond", &fan_out(2)).await?;
    register(pool, "fanout_20", &fan_out(20)).await?;
    register(pool, "limited", &chain(2).replacen("noop}", "noop, concurrency: {key: '${input.key}', limit: 2}}", 1))
        .await?;
    let noop = "handler: bench.noop, input: {}";
    register(pool, "nested", &format!("  - {{name: s0, {noop}}}\n  - {{name: s1, task: {{template: one}}, input: {{}}, depends_on: [s0]}}\n  - {{name: s2, {noop}, depends_on: [s1]}}\n")).await?;
    register(
        pool,
        "sleeping",
        &format!("  - {{name: nap, wait: {{until: '${{input.at}}'}}}}\n  - {{name: s0, {noop}, depends_on: [nap]}}\n"),
    )
    .await?;
    register(
        pool,
        "timer",
        &format!("  - {{name: nap, wait: {{sleep: 200ms}}}}\n  - {{name: s0, {noop}, depends_on: [nap]}}\n"),
    )
    .await?;
    register(pool, "retry", "  - {name: s0, handler: bench.flaky, retry: {initial_interval: 200ms}}\n").await?;
    register(pool, "day", "  - {name: nap, wait: {sleep: 1d}}\n").await?;
    register(pool, "fanout_wide", &fan_out(fan)).await?;
    register(pool, "map_10k", "  - {name: each, handler: bench.noop, for_each: '${input.items}', input: {}}\n").await?;
    Ok(())
}

async fn sleepers(args: &BenchArgs, pool: &PgPool, scenario: &load::Scenario) -> Result<Option<timers::Sleepers>> {
    if args.sleepers == 0 {
        return Ok(None);
    }
    eprintln!("bench: sleeping tasks …");
    Ok(Some(timers::sleepers(pool, scenario).await?))
}

async fn repeat(pool: &PgPool, scenario: &Scenario, times: usize) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for _ in 0..times {
        runs.push(load::run(pool, scenario).await?);
    }
    Ok(runs)
}

async fn register(pool: &PgPool, name: &str, steps: &str) -> Result<()> {
    register_in(pool, "bench", name, steps).await
}

async fn register_in(pool: &PgPool, namespace: &str, name: &str, steps: &str) -> Result<()> {
    let yaml = format!("namespace: {namespace}\nname: {name}\nversion: \"1\"\nsteps:\n{steps}");
    let checked = parse(name, &yaml).map_err(|problems| anyhow::anyhow!("{}", problems[0]))?;
    store::templates::register(&mut *pool.acquire().await?, &checked).await?;
    Ok(())
}

fn chain(length: usize) -> String {
    (0..length)
        .map(|i| match i.checked_sub(1) {
            Some(before) => {
                format!("  - {{name: s{i}, handler: bench.noop, depends_on: [s{before}]}}\n")
            }
            None => "  - {name: s0, handler: bench.noop}\n".to_owned(),
        })
        .collect()
}

/// 1 → n → 1; the join names its input, so that it does not receive n outputs.
fn fan_out(n: usize) -> String {
    let mut steps = "  - {name: first, handler: bench.noop}\n".to_owned();
    let names: Vec<String> = (0..n).map(|i| format!("s{i}")).collect();
    for name in &names {
        steps += "  - {name: ";
        steps += name;
        steps += ", handler: bench.noop, depends_on: [first], input: {}}\n";
    }
    steps += "  - {name: last, handler: bench.noop, depends_on: [";
    steps += &names.join(", ");
    steps += "], input: {}}\n";
    steps
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .map_or_else(|| "unknown".to_owned(), |text| text.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
}
