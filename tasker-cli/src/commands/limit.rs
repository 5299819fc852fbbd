//! `tasker limit`.

use std::time::Duration;

use chrono::TimeDelta;
use serde_json::json;
use tasker_shared::duration::in_words;
use tasker_shared::store::flow::{LimitUse, SetLimit};
use tasker_shared::template::parse_duration;

use crate::Global;
use crate::failure::{WRONG, failure};
use crate::output::{self, Format, Table};
use crate::run;
use crate::run::actor;

/// Limit how much of a namespace or a handler is in flight, or begins in a time.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  tasker limit set shop --concurrency 50
  tasker limit set shop --handler payments.charge --concurrency 5 --rate 100 --per 1s
  tasker limit set shop --open-tasks 10000
  tasker limit list
  tasker limit remove shop --handler payments.charge")]
pub enum Limit {
    /// Set a limit; it takes effect at once for what is not yet sent
    Set {
        #[command(flatten)]
        of: Of,
        /// At most so many attempts in flight at once
        #[arg(long, value_name = "N")]
        concurrency: Option<i32>,
        /// At most so many attempts sent in each --per
        #[arg(long, value_name = "N", requires = "per")]
        rate: Option<i32>,
        /// In which time, such as 1s
        #[arg(long, value_parser = parse_duration, value_name = "DURATION", requires = "rate")]
        per: Option<Duration>,
        /// At most so many open tasks in the namespace; submits beyond it are refused
        #[arg(long, value_name = "N", conflicts_with_all = ["handler", "concurrency", "rate"])]
        open_tasks: Option<i32>,
        /// Why, for the audit
        #[arg(long)]
        reason: Option<String>,
    },
    /// List the limits and what of them is used, those of templates among them
    List {
        /// Of this namespace only
        #[arg(long)]
        namespace: Option<String>,
    },
    /// Remove a limit; what it held back goes on
    Remove {
        #[command(flatten)]
        of: Of,
        /// The one on open tasks
        #[arg(long, conflicts_with = "handler")]
        open_tasks: bool,
        /// Why, for the audit
        #[arg(long)]
        reason: Option<String>,
    },
}

/// What is limited.
#[derive(Debug, clap::Args)]
pub struct Of {
    /// Its namespace
    namespace: String,
    /// One handler of it, instead of all its steps together
    #[arg(long)]
    handler: Option<String>,
}

impl Limit {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        if matches!(&self, Self::Set { concurrency: None, rate: None, open_tasks: None, .. }) {
            return Err(failure(
                WRONG,
                "say what the limit is: --concurrency N, or --rate N --per DURATION, or all of them, or --open-tasks N; \
                --handler HANDLER limits one handler instead of the whole namespace",
            ));
        }
        let connected = run::connect(global).await?;
        let client = &connected.client;
        match self {
            Self::Set { of, open_tasks: Some(most), reason, .. } => {
                client.set_open_tasks_limit(&of.namespace, Some(most), actor().as_deref(), reason.as_deref()).await?;
                accepted(global, "what is open stays; submits beyond it are refused")
            }
            Self::Set { of, concurrency, rate, per, reason, .. } => {
                let rate = rate.zip(per);
                let limit = SetLimit { namespace: of.namespace, handler: of.handler, concurrency, rate };
                client.set_limit(&limit, actor().as_deref(), reason.as_deref()).await?;
                accepted(global, "it takes effect for what is not yet sent")
            }
            Self::List { namespace } => list(global, &client.limits(namespace.as_deref()).await?),
            Self::Remove { of, open_tasks: true, reason } => {
                client.set_open_tasks_limit(&of.namespace, None, actor().as_deref(), reason.as_deref()).await?;
                accepted(global, "nothing more is refused for it")
            }
            Self::Remove { of, reason, .. } => {
                let limit = (of.namespace.as_str(), of.handler.as_deref());
                client.remove_limit(limit, actor().as_deref(), reason.as_deref()).await?;
                accepted(global, "what it held back goes on")
            }
        }
    }
}

fn accepted(global: &Global, text: &str) -> anyhow::Result<()> {
    if global.output == Format::Json {
        return output::json(&json!({"accepted": true}));
    }
    output::line(format!("accepted: {text}"))
}

fn list(global: &Global, limits: &[LimitUse]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        return output::json(&limits);
    }
    let mut table = Table::new(["LIMIT", "OF A", "IN USE", "CONCURRENCY", "RATE", "LEFT NOW"]);
    for limit in limits {
        let per = in_words(TimeDelta::milliseconds(limit.per_ms.unwrap_or_default()));
        table.row([
            output::cell(Some(&limit.name)),
            limit.kind.clone(),
            if limit.concurrency.is_some() { limit.in_use.to_string() } else { "-".into() },
            limit.concurrency.map_or("-".into(), |most| most.to_string()),
            limit.rate.map_or("-".into(), |rate| format!("{rate} per {per}")),
            limit.free().left().max(0).to_string(),
        ]);
    }
    table.print("nothing is limited")
}
