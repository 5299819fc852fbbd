//! `tasker schedule`.

use std::path::PathBuf;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use clap::ValueEnum;
use serde_json::json;
use tasker_shared::client::{Client, ClientError};
use tasker_shared::schedule::{Missed, Overlap, Schedule as Definition};
use tasker_shared::store::schedules::ScheduleView;
use tasker_shared::template::format_duration;

use super::task::read_input;
use super::template::TemplateName;
use crate::Global;
use crate::failure::{FAILED, NOT_FOUND, WRONG, failure};
use crate::output::{self, Format, Table};
use crate::run;
use crate::run::actor;

/// Submit tasks by the clock: cron, an interval, or once.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  tasker schedule set shop/nightly --template report --cron '30 2 * * *' --time-zone Europe/Paris
  tasker schedule set shop/poll --template poll --every 15m --overlap skip
  tasker schedule set --file nightly.yaml
  tasker schedule show shop/nightly
  tasker schedule trigger shop/nightly")]
pub enum Schedule {
    /// Create a schedule, or change the one of that name
    Set(Box<Set>),
    /// List schedules
    List {
        /// Of this namespace only
        #[arg(long)]
        namespace: Option<String>,
    },
    /// Show a schedule and its next ticks
    Show {
        /// NAMESPACE/NAME
        schedule: ScheduleName,
        /// How many ticks to come
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
        ticks: u16,
    },
    /// Let a schedule rest; what would have run meanwhile never runs
    Pause(Act),
    /// Let a paused schedule go on with its next tick
    Resume(Act),
    /// Run a schedule now; its next tick comes as planned
    Trigger(Act),
    /// Delete a schedule; the tasks it has submitted stay
    Delete(Act),
}

/// What an operator does to one schedule.
#[derive(Debug, clap::Args)]
pub struct Act {
    /// NAMESPACE/NAME
    schedule: ScheduleName,
    /// Why, for the audit
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

/// Create a schedule, or change the one of that name.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The input may use ${schedule.at}, the tick's time such as 2026-03-29T01:00:00Z, and ${schedule.name}.

Examples:
  tasker schedule set shop/nightly --template report --cron '30 2 * * MON-FRI' --time-zone Europe/Paris
  tasker schedule set shop/poll --template poll --every 15m --missed skip --input '{\"at\": \"${schedule.at}\"}'
  tasker schedule set shop/launch --template launch@2.0.0 --at 2030-01-31T12:00:00Z
  tasker schedule set --file nightly.yaml")]
pub struct Set {
    /// NAMESPACE/NAME
    #[arg(required_unless_present = "file")]
    schedule: Option<ScheduleName>,
    /// A YAML file with the keys namespace, name, template, cron …, instead of all else
    #[arg(long, value_name = "FILE", conflicts_with_all = ["schedule", "template", "timing", "time_zone", "input", "priority", "missed", "overlap"])]
    file: Option<PathBuf>,
    /// NAME, or NAME@VERSION, of a template of the same namespace; the latest version at each tick if none is given
    #[arg(long, required_unless_present = "file", value_name = "NAME")]
    template: Option<String>,
    #[command(flatten)]
    timing: Option<Timing>,
    /// Of the cron pattern: an IANA name such as Europe/Paris [default: UTC]
    #[arg(long, value_name = "ZONE", requires = "cron")]
    time_zone: Option<String>,
    /// A JSON object, or @FILE, or - for stdin
    #[arg(long, default_value = "{}", value_name = "JSON", hide_default_value = true)]
    input: String,
    /// Higher runs first
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
    /// Of ticks that no orchestrator saw in time
    #[arg(long, value_enum, default_value_t = MissedArg::RunOnce)]
    missed: MissedArg,
    /// When the task of the last tick is still open
    #[arg(long, value_enum, default_value_t = OverlapArg::Allow)]
    overlap: OverlapArg,
}

#[derive(Debug, clap::Args)]
#[group(id = "timing", multiple = false)]
struct Timing {
    /// Five fields, six with seconds first, or @daily
    #[arg(long, value_name = "PATTERN")]
    cron: Option<String>,
    /// An interval such as 15m, a second at least
    #[arg(long, value_name = "DURATION")]
    every: Option<String>,
    /// Once, at this time, such as 2030-01-31T12:00:00Z
    #[arg(long, visible_alias = "once-at", value_name = "TIME")]
    at: Option<DateTime<Utc>>,
}

/// The choices of `--missed`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum MissedArg {
    /// None of them runs
    Skip,
    /// The latest of them runs
    #[value(name = "run_once", alias = "run-once")]
    RunOnce,
    /// They all run, at most the latest 100
    #[value(name = "run_all", alias = "run-all")]
    RunAll,
}

/// The choices of `--overlap`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum OverlapArg {
    /// Run beside it
    Allow,
    /// Do not run
    Skip,
    /// Cancel it and run
    #[value(name = "cancel_previous", alias = "cancel-previous")]
    CancelPrevious,
}

/// `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduleName {
    namespace: String,
    name: String,
}

impl ScheduleName {
    fn parts(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

impl std::str::FromStr for ScheduleName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<TemplateName>() {
            Ok(TemplateName { namespace, name, version: None }) => Ok(Self { namespace, name }),
            _ => Err("write it as NAMESPACE/NAME".into()),
        }
    }
}

impl std::fmt::Display for ScheduleName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Set {
    fn definition(self) -> anyhow::Result<Definition> {
        if let Some(path) = self.file {
            let name = path.display().to_string();
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {name}"))?;
            return Definition::from_yaml(&text).map_err(|refused| failure(FAILED, format!("{name}: {refused}")));
        }
        let (schedule, template) = self.schedule.zip(self.template).context("clap asks for both")?;
        let (template, version) =
            template.split_once('@').map_or((&*template, None), |(name, version)| (name, Some(version.to_owned())));
        let timing = self.timing.ok_or_else(|| {
            failure(WRONG, "say when it ticks: exactly one of --cron PATTERN, --every DURATION and --at TIME")
        })?;
        Ok(Definition {
            version,
            input: read_input(&self.input)?,
            priority: self.priority,
            cron: timing.cron,
            time_zone: self.time_zone,
            every: timing.every,
            once_at: timing.at,
            missed: match self.missed {
                MissedArg::Skip => Missed::Skip,
                MissedArg::RunOnce => Missed::RunOnce,
                MissedArg::RunAll => Missed::RunAll,
            },
            overlap: match self.overlap {
                OverlapArg::Allow => Overlap::Allow,
                OverlapArg::Skip => Overlap::Skip,
                OverlapArg::CancelPrevious => Overlap::CancelPrevious,
            },
            ..Definition::new(schedule.namespace, schedule.name, template)
        })
    }
}

impl Schedule {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let actor = actor();
        let actor = actor.as_deref();
        let (verb, act) = match self {
            Self::Set(set) => {
                let definition = set.definition()?;
                let connected = run::connect(global).await?;
                let answer = connected.client.set_schedule(&definition, actor).await?;
                let name = format!("{}/{}", definition.namespace, definition.name);
                if global.output == Format::Json {
                    return output::json(&json!({"schedule": name, "answer": answer}));
                }
                return output::line(format!("{name} is {answer}"));
            }
            Self::List { namespace } => {
                let connected = run::connect(global).await?;
                return list(global, &connected.client.schedules(namespace.as_deref()).await?);
            }
            Self::Show { schedule, ticks } => {
                let connected = run::connect(global).await?;
                return show(global, &connected.client, &schedule, ticks.into()).await;
            }
            Self::Pause(act) => (Verb::Pause, act),
            Self::Resume(act) => (Verb::Resume, act),
            Self::Trigger(act) => (Verb::Trigger, act),
            Self::Delete(act) => (Verb::Delete, act),
        };
        let connected = run::connect(global).await?;
        let (client, name, reason) = (&connected.client, act.schedule.parts(), act.reason.as_deref());
        let done = match verb {
            Verb::Pause => client.pause_schedule(name, true, actor, reason).await,
            Verb::Resume => client.pause_schedule(name, false, actor, reason).await,
            Verb::Delete => client.delete_schedule(name, actor, reason).await,
            Verb::Trigger => {
                let task = client.trigger_schedule(name, actor, reason).await.map_err(|e| explain(&act.schedule, e))?;
                if global.output == Format::Json {
                    return output::json(&json!({"task_uuid": task}));
                }
                return output::line(task.to_string());
            }
        };
        done.map_err(|error| explain(&act.schedule, error))?;
        if global.output == Format::Json {
            return output::json(&json!({"schedule": act.schedule.to_string(), "accepted": true}));
        }
        output::line(format!("{} is {}", act.schedule, verb.done()))
    }
}

#[derive(Clone, Copy)]
enum Verb {
    Pause,
    Resume,
    Trigger,
    Delete,
}

impl Verb {
    fn done(self) -> &'static str {
        match self {
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Trigger => "triggered",
            Self::Delete => "deleted",
        }
    }
}

fn explain(schedule: &ScheduleName, error: ClientError) -> anyhow::Error {
    match error {
        ClientError::Refused(answer) if answer == "no such schedule" => unknown(schedule),
        other => other.into(),
    }
}

fn unknown(schedule: &ScheduleName) -> anyhow::Error {
    failure(NOT_FOUND, format!("no schedule {schedule}; `tasker schedule list` shows those that are"))
}

fn timing(schedule: &ScheduleView) -> String {
    match (&schedule.cron, schedule.every_ms, schedule.once_at) {
        (Some(cron), ..) => format!("{cron} ({})", schedule.time_zone.as_deref().unwrap_or("UTC")),
        (_, Some(every), _) => {
            format!("every {}", format_duration(std::time::Duration::from_millis(every.unsigned_abs())))
        }
        (.., at) => format!("once at {}", at.map_or("-".into(), output::time)),
    }
}

fn next(schedule: &ScheduleView) -> String {
    if schedule.paused {
        return "paused".into();
    }
    match schedule.next_at {
        Some(next) if schedule.planned => output::time(next),
        Some(_) => "not planned yet".into(),
        None => "never".into(),
    }
}

fn list(global: &Global, schedules: &[ScheduleView]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        return output::json(&schedules);
    }
    let mut table = Table::new(["SCHEDULE", "TEMPLATE", "WHEN", "NEXT (UTC)", "LAST (UTC)", "RUNS", "PROBLEM"]);
    for schedule in schedules {
        table.row([
            format!("{}/{}", schedule.namespace, schedule.name),
            template(schedule),
            timing(schedule),
            next(schedule),
            schedule.last_at.map_or("-".into(), output::time),
            schedule.runs.to_string(),
            output::clip(&output::cell(schedule.problem.as_deref()), 80),
        ]);
    }
    table.print("there is no schedule; `tasker schedule set` makes one")
}

fn template(schedule: &ScheduleView) -> String {
    format!("{}{}", schedule.template, schedule.version.as_ref().map_or(String::new(), |version| format!("@{version}")))
}

async fn show(global: &Global, client: &Client, name: &ScheduleName, ticks: usize) -> anyhow::Result<()> {
    let found = client.schedule(&name.namespace, &name.name).await?.ok_or_else(|| unknown(name))?;
    let next_ticks = found.next_ticks(ticks);
    if global.output == Format::Json {
        let mut value = serde_json::to_value(&found)?;
        value["next_ticks"] = json!(next_ticks);
        return output::json(&value);
    }
    output::line(format!("{name}  {}  {}", template(&found), timing(&found)))?;
    output::line(format!("missed ticks: {}; while the last task is open: {}", found.missed, found.overlap))?;
    output::line(format!("{} runs, {} skipped", found.runs, found.skipped))?;
    if let (Some(last), Some(task)) = (found.last_at, found.last_task) {
        output::line(format!("last tick {} UTC, last task {task}", output::time(last)))?;
    }
    if let Some(problem) = &found.problem {
        output::line(format!("problem: {}", output::cell(Some(problem))))?;
    }
    if next_ticks.is_empty() {
        return output::line(format!("next: {}", next(&found)));
    }
    for tick in next_ticks {
        output::line(format!("next {} UTC", output::time(tick)))?;
    }
    Ok(())
}
