//! `tasker trace`.

mod doctor;
mod export;
mod open;
mod replay;
mod sample;
pub mod settings;
mod verify;

use std::collections::HashSet;
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use tasker_shared::client::Client;
use tasker_shared::store::{transitions, views};
use tasker_shared::telemetry::settings as trace_settings;
use tasker_shared::template::parse_duration;
use tasker_shared::trace::config::{Sources, TraceConfig};
use tasker_shared::trace::log::TaskLog;
use tasker_shared::trace::{otlp, tree};
use uuid::Uuid;

use crate::Global;
use crate::failure::{NOT_FOUND, failure};
use crate::output::{self, Format};
use crate::run;
use crate::waterfall::{self, Detail, Waterfall};

/// Look at traces, write them, compare them with a backend, send them again.
#[derive(Debug, clap::Subcommand)]
pub enum Trace {
    /// Draw the trace of a task, also while it runs
    Show(Show),
    /// Show a trace on the page of your own backend
    Open(open::Open),
    /// Write traces as OTLP JSON or as Jaeger reads them
    Export(export::Export),
    /// Compare the log with what a backend or a file holds
    Verify(verify::Verify),
    /// Send traces again
    Replay(replay::Replay),
    /// Say what share of a namespace's new traces is recorded
    Sample(sample::Sample),
    /// Export traces from now on, in every process
    Enable(settings::Enable),
    /// Export no traces from now on
    Disable(settings::Disable),
    /// Show the settings, and what running processes make of them
    Status(settings::Status),
    /// Check the way of traces to their receiver
    Doctor(doctor::Doctor),
}

/// Draw the trace of a task from the committed log, also while it runs. It is the trace that is
/// exported, span for span.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker trace show ORD-4711                     attempts, handlers and waits
  tasker trace show ORD-4711 --tree              every span
  tasker trace show ORD-4711 --follow            again and again until the task has ended
  tasker trace show --correlation-id ORD-4711    every task with that correlation id
  tasker trace show ORD-4711 --json              OTLP JSON, as any OpenTelemetry tool reads it")]
pub struct Show {
    /// Uuid or correlation id
    #[arg(required_unless_present = "correlation_id", conflicts_with = "correlation_id")]
    task: Option<String>,
    /// Every task with this correlation id, the oldest first
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
    /// Every span, state transitions too
    #[arg(long, conflicts_with = "json")]
    tree: bool,
    /// Draw again whenever something has moved, until every task has ended
    #[arg(long, conflicts_with = "json")]
    follow: bool,
    /// OTLP JSON of the spans that have ended, as they are exported; same as -o json
    #[arg(long)]
    json: bool,
}

impl Trace {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        match self {
            Self::Show(show) => show.run(global).await,
            Self::Open(open) => open.run(global).await,
            Self::Export(export) => export.run(global).await,
            Self::Verify(verify) => verify.run(global).await,
            Self::Replay(replay) => replay.run(global).await,
            Self::Sample(sample) => sample.run(global).await,
            Self::Enable(enable) => enable.run(global).await,
            Self::Disable(disable) => disable.run(global).await,
            Self::Status(status) => status.run(global).await,
            Self::Doctor(doctor) => doctor.run(global).await,
        }
    }
}

impl Show {
    async fn run(self, global: &Global) -> anyhow::Result<()> {
        let connected = run::connect(global).await?;
        let client = &connected.client;
        let tasks = match (&self.task, &self.correlation_id) {
            (Some(task), _) => vec![run::find_task(client, task).await?],
            (None, id) => correlated(client, id.as_deref().unwrap_or_default()).await?,
        };
        if self.json || global.output == Format::Json {
            let config = config(client).await?;
            let mut spans = Vec::with_capacity(tasks.len());
            for task in tasks {
                spans.extend(in_trace_of(client, task).await?.0.iter().map(tree::spans));
            }
            return output::json(&otlp::to_json(&spans, &config.service_names));
        }
        let detail = if self.tree { Detail::Every } else { Detail::Main };
        let terminal = console::Term::stdout();
        let mut drawn = None;
        loop {
            let (mut texts, mut moves) = (Vec::with_capacity(tasks.len()), 0);
            for task in &tasks {
                let (logs, now) = in_trace_of(client, *task).await?;
                moves += logs.iter().map(|log| log.transitions.len()).sum::<usize>();
                let mut trees = logs.iter().map(|log| tree::spans_so_far(log, now));
                let mut whole = trees.next().context("the task is gone")?;
                whole.spans.extend(trees.flat_map(|tree| tree.spans));
                let reported = waterfall::reported(&whole, output_width());
                texts.push(format!("{}{reported}", Waterfall::new(&whole, detail).text(output_width())));
            }
            // On a terminal the open bars grow; elsewhere only what has moved is worth a drawing.
            if drawn.replace(moves) != Some(moves) || terminal.is_term() {
                if self.follow && terminal.is_term() {
                    terminal.clear_screen()?;
                }
                output::line(texts.join("\n\n"))?;
            }
            let mut conn = client.pool().acquire().await?;
            if !self.follow || views::finished(&mut conn, &tasks).await?.len() == tasks.len() {
                return Ok(());
            }
            drop(conn);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

/// The logs of a task and of those that it awaits, the task's own first, and the database's time.
async fn in_trace_of(client: &Client, task: Uuid) -> anyhow::Result<(Vec<TaskLog>, DateTime<Utc>)> {
    let mut conn = client.pool().acquire().await?;
    let tasks = views::in_trace_of(&mut conn, task).await?;
    let mut logs = transitions::logs(&mut conn, &tasks).await?;
    logs.sort_by_key(|log| tasks.iter().position(|task| *task == log.head.task_uuid));
    if logs.first().is_none_or(|log| log.head.task_uuid != task) {
        return Err(failure(NOT_FOUND, format!("there is no task {task}")));
    }
    Ok((logs, views::now(&mut conn).await?))
}

/// What holds here: the environment, then what is stored, then a file.
async fn config(client: &Client) -> anyhow::Result<TraceConfig> {
    let (sources, _) = Sources::of_process(Vec::new());
    Ok(trace_settings::read(&mut *client.pool().acquire().await?, &sources).await?.0.config)
}

/// The tasks with this correlation id, the oldest first.
async fn correlated(client: &Client, id: &str) -> anyhow::Result<Vec<Uuid>> {
    let mut tasks = views::by_correlation(&mut *client.pool().acquire().await?, id).await?;
    if tasks.is_empty() {
        return Err(failure(NOT_FOUND, format!("no task has the correlation id {id:?}")));
    }
    tasks.reverse();
    Ok(tasks)
}

/// Which tasks a command is about.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// Uuids or correlation ids
    #[arg(value_name = "TASK")]
    tasks: Vec<String>,
    /// Every task with this correlation id
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
    /// Every task created since: a time such as 2030-01-31T12:00:00Z, or how long ago, such as 2h
    #[arg(long, value_name = "WHEN", conflicts_with_all = ["tasks", "correlation_id"])]
    since: Option<String>,
}

/// Tasks that are looked at together.
const PAGE: i64 = 100;

impl Which {
    /// The tasks in pages, so that no command holds them all.
    async fn pages(&self, client: &Client) -> anyhow::Result<Pages> {
        if let Some(since) = &self.since {
            let now = views::now(&mut *client.pool().acquire().await?).await?;
            return Ok(Pages::Since { at: time_of(since, now)?, after: Uuid::nil() });
        }
        let mut tasks = Vec::new();
        for task in &self.tasks {
            tasks.push(run::find_task(client, task).await?);
        }
        if let Some(id) = &self.correlation_id {
            tasks.extend(correlated(client, id).await?);
        }
        anyhow::ensure!(!tasks.is_empty(), "name a task, or give --correlation-id or --since");
        let mut seen = HashSet::new();
        tasks.retain(|task| seen.insert(*task));
        Ok(Pages::Named(tasks))
    }
}

enum Pages {
    Named(Vec<Uuid>),
    Since { at: DateTime<Utc>, after: Uuid },
}

impl Pages {
    /// The next tasks; none at the end.
    async fn next(&mut self, client: &Client) -> anyhow::Result<Vec<Uuid>> {
        match self {
            Self::Named(tasks) => Ok(std::mem::take(tasks)),
            Self::Since { at, after } => {
                let mut conn = client.pool().acquire().await?;
                let page = views::created_since(&mut conn, *at, *after, PAGE).await?;
                *after = page.last().copied().unwrap_or(*after);
                Ok(page)
            }
        }
    }
}

fn time_of(text: &str, now: DateTime<Utc>) -> anyhow::Result<DateTime<Utc>> {
    if let Ok(at) = DateTime::parse_from_rfc3339(text) {
        return Ok(at.to_utc());
    }
    let ago = parse_duration(text).map_err(|problem| {
        anyhow::anyhow!(
            "--since {text:?}: {problem}; write a time such as 2030-01-31T12:00:00Z, or how long ago, such as 2h"
        )
    })?;
    Ok(now - chrono::TimeDelta::from_std(ago)?)
}

/// The terminal's width; 120 where there is none.
pub fn output_width() -> usize {
    let term = console::Term::stdout();
    term.size_checked().map_or(120, |(_, columns)| usize::from(columns)).max(60)
}
