//! `tasker retention`.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use tasker_api::gauges::{OldestRow, oldest_rows};
use tasker_orchestration::retention;
use tasker_shared::store::retention as policies;
use tasker_shared::template::{format_duration, parse_duration};
use tokio_util::sync::CancellationToken;

use crate::Global;
use crate::failure::{WRONG, failure};
use crate::output::{self, Format, Table};
use crate::run;
use crate::run::actor;

/// Say how long finished tasks are kept, and remove what is past its time.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Without a policy everything is kept for ever. Orchestrators remove by themselves, slowly; the audit stays.

Examples:
  tasker retention set --namespace shop --keep 30d --quarantine 90d
  tasker retention set --namespace '*' --keep 1d --archive
  tasker retention run --dry-run
  tasker retention run --archive tasks.jsonl")]
pub enum Retention {
    /// Set the policy of a namespace
    Set {
        /// The namespace, or * for all that have no policy of their own
        #[arg(long)]
        namespace: String,
        /// How long a finished task is kept, such as 30d; for ever if not given
        #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
        keep: Option<Duration>,
        /// How long a quarantined message is kept; for ever if not given
        #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
        quarantine: Option<Duration>,
        /// Remove only where an archive is written: `orchestrator run --archive-dir`, or `run --archive`
        #[arg(long)]
        archive: bool,
    },
    /// Remove the policy of a namespace
    Unset {
        /// The namespace, or *
        #[arg(long)]
        namespace: String,
    },
    /// List the policies, and the oldest row of each table
    List,
    /// Remove what is past its time now
    Run {
        /// Only count it
        #[arg(long)]
        dry_run: bool,
        /// Append each task to this file, as a line of JSON, before it is removed
        #[arg(long, value_name = "FILE")]
        archive: Option<PathBuf>,
    },
}

impl Retention {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        if matches!(&self, Self::Set { keep: None, quarantine: None, .. }) {
            return Err(failure(
                WRONG,
                "say what is kept how long: --keep DURATION for finished tasks, --quarantine DURATION \
                for quarantined messages, or both; `tasker retention unset` removes a policy",
            ));
        }
        let connected = run::connect(global).await?;
        let pool = connected.client.pool();
        match self {
            Self::Set { namespace, keep, quarantine, archive } => {
                let actor = actor();
                connected.client.set_retention(&namespace, keep, quarantine, archive, actor.as_deref()).await?;
                if global.output == Format::Json {
                    return output::json(&json!({"namespace": namespace, "set": true}));
                }
                output::line(format!("the policy of {namespace} is set"))
            }
            Self::Unset { namespace } => {
                connected.client.set_retention(&namespace, None, None, false, actor().as_deref()).await?;
                if global.output == Format::Json {
                    return output::json(&json!({"namespace": namespace, "set": false}));
                }
                output::line(format!("{namespace} has no policy of its own now"))
            }
            Self::List => {
                let mut conn = pool.acquire().await?;
                list(global, &policies::list(&mut conn).await?, &oldest_rows(&mut conn).await?)
            }
            Self::Run { dry_run: true, archive } => {
                let tasks = retention::expired(pool, archive.is_some()).await?;
                if global.output == Format::Json {
                    return output::json(&json!({"tasks": tasks, "dry_run": true}));
                }
                output::line(format!("{tasks} tasks would be removed"))
            }
            Self::Run { archive, .. } => {
                let stop = CancellationToken::new();
                let mut removed = retention::pass(pool, archive.as_deref(), Duration::ZERO, &stop).await?;
                retention::tidy(pool, &mut removed).await?;
                let retention::Removed { tasks, messages, weeks, busy, put_off: _ } = removed;
                if global.output == Format::Json {
                    return output::json(&json!({"tasks": tasks, "messages": messages, "weeks": weeks, "busy": busy}));
                }
                if busy {
                    output::line("another process is removing right now; it goes on with the rest")?;
                }
                output::line(format!(
                    "removed {tasks} tasks and {messages} quarantined messages; dropped {weeks} whole weeks of the log"
                ))
            }
        }
    }
}

fn list(global: &Global, policies: &[policies::Policy], oldest: &[OldestRow]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        return output::json(&json!({"policies": policies, "oldest": oldest}));
    }
    let mut table = Table::new(["NAMESPACE", "KEEP", "KEEP QUARANTINED", "ARCHIVE"]);
    let time = |seconds: Option<i64>| {
        seconds.map_or("for ever".into(), |seconds| format_duration(Duration::from_secs(seconds.unsigned_abs())))
    };
    for policy in policies {
        let archive = if policy.archive { "required" } else { "-" };
        table.row([policy.namespace.clone(), time(policy.keep_s), time(policy.keep_quarantine_s), archive.into()]);
    }
    table.print("there is no policy: everything is kept for ever")?;
    for row in oldest {
        output::line(format!("oldest of {}: {} UTC", row.what, output::time(row.oldest_at)))?;
    }
    Ok(())
}
