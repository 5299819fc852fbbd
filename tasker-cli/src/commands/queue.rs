//! `tasker queue`.

use chrono::TimeDelta;
use serde_json::json;
use sqlx::PgConnection;
use tasker_shared::duration::in_words;
use tasker_shared::store::details::{self, QuarantineFilter};
use tasker_shared::store::{requests, views};

use crate::Global;
use crate::failure::{NOT_FOUND, failure};
use crate::output::{self, Format, Table};
use crate::run;
use crate::run::actor;

/// Look at queues, and at messages that nobody could use.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  tasker queue list
  tasker queue pause worker_shop --reason 'the payment provider is down'
  tasker queue resume worker_shop
  tasker queue quarantine --queue task_requests -o json
  tasker queue quarantine requeue 17")]
pub enum Queue {
    /// List the queues: how deep, how old, how much is held back
    List,
    /// Send nothing more to a queue of steps and claim nothing from it; what runs runs on
    Pause(Pause),
    /// Let a paused queue go on
    Resume(Pause),
    /// List the messages in quarantine, or deal with one
    Quarantine(Quarantine),
}

/// Which queue, and why.
#[derive(Debug, clap::Args)]
pub struct Pause {
    /// As `tasker queue list` shows it, such as `worker_shop`
    queue: String,
    /// Why, for the audit and for whoever asks what a task waits for
    #[arg(long)]
    reason: Option<String>,
}

/// Messages that could not become a task or be tied to one, each with its reason.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Quarantine {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Of this queue only
    #[arg(long)]
    queue: Option<String>,
    /// How many at most, newest first
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
}

/// What to do with a message in quarantine.
#[derive(Debug, Clone, Copy, clap::Subcommand)]
pub enum Verb {
    /// Send it to its queue again, after what it needs was put right
    Requeue {
        /// The number in the first column of the list
        id: i64,
    },
    /// Delete it for good
    Discard {
        /// The number in the first column of the list
        id: i64,
    },
}

impl Queue {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let connected = run::connect(global).await?;
        let mut conn = connected.client.pool().acquire().await?;
        match self {
            Self::List => list(global, &mut conn).await,
            Self::Pause(Pause { queue, reason }) => {
                connected.client.pause_queue(&queue, actor().as_deref(), reason.as_deref()).await?;
                accepted(global, &queue, "nothing more is sent to it or claimed from it; what runs runs on")
            }
            Self::Resume(Pause { queue, reason }) => {
                connected.client.resume_queue(&queue, actor().as_deref(), reason.as_deref()).await?;
                accepted(global, &queue, "it goes on")
            }
            Self::Quarantine(Quarantine { verb: Some(Verb::Requeue { id }), .. }) => {
                match requests::requeue(&mut conn, id, actor().as_deref(), None).await? {
                    Some(queue) if global.output == Format::Json => {
                        output::json(&json!({"requeued": id, "queue": queue}))
                    }
                    Some(queue) => output::line(format!("message {id} is in queue {queue} again")),
                    None => Err(unknown(id)),
                }
            }
            Self::Quarantine(Quarantine { verb: Some(Verb::Discard { id }), .. }) => {
                match requests::discard(&mut conn, id, actor().as_deref(), None).await? {
                    true if global.output == Format::Json => output::json(&json!({"discarded": id})),
                    true => output::line(format!("message {id} is deleted")),
                    false => Err(unknown(id)),
                }
            }
            Self::Quarantine(Quarantine { verb: None, queue, limit }) => {
                list_quarantine(global, &mut conn, queue.as_deref(), limit).await
            }
        }
    }
}

fn accepted(global: &Global, queue: &str, text: &str) -> anyhow::Result<()> {
    if global.output == Format::Json {
        return output::json(&json!({"queue": queue, "accepted": true}));
    }
    output::line(format!("accepted: {text}"))
}

async fn list(global: &Global, conn: &mut PgConnection) -> anyhow::Result<()> {
    let queues = views::queues(conn).await?;
    let unusable = details::workers(conn, None).await?.into_iter().filter(|worker| worker.live);
    let unusable: Vec<(String, String)> =
        unusable.filter_map(|worker| Some((worker.worker, worker.problem?))).collect();
    if global.output == Format::Json {
        return output::json(&queues);
    }
    let mut table = Table::new(["QUEUE", "DEPTH", "VISIBLE", "OLDEST", "HELD", "WORKERS", "QUARANTINED", "PAUSED BY"]);
    for queue in queues {
        let of_workers = queue.queue.starts_with("worker_");
        table.row([
            queue.queue,
            queue.depth.to_string(),
            queue.visible.to_string(),
            queue.oldest_s.map_or("-".into(), |seconds| in_words(TimeDelta::seconds(seconds.into()))),
            if of_workers { queue.held.to_string() } else { "-".into() },
            if of_workers { queue.workers.to_string() } else { "-".into() },
            queue.quarantined.to_string(),
            output::cell(queue.paused.as_deref()),
        ]);
    }
    table.print("there is no queue")?;
    for (worker, problem) in unusable {
        output::line(format!(
            "worker {} is not counted, or not for all it says: {problem}",
            output::clip(&worker, 60)
        ))?;
    }
    Ok(())
}

async fn list_quarantine(
    global: &Global,
    conn: &mut PgConnection,
    queue: Option<&str>,
    limit: u32,
) -> anyhow::Result<()> {
    let filter = QuarantineFilter { queue, ..QuarantineFilter::default() };
    let messages = details::quarantine(conn, filter, true, limit.into()).await?;
    let count = details::quarantined(conn, queue).await?;
    if global.output == Format::Json {
        return output::json(&json!({"count": count, "messages": messages}));
    }
    let mut table = Table::new(["ID", "QUEUE", "SINCE (UTC)", "FAILURES", "REASON", "MESSAGE"]);
    let shown = messages.len();
    for message in messages {
        let original = message.message.map(|original| output::clip(&original.to_string(), 100));
        table.row([
            message.quarantine_id.to_string(),
            message.queue,
            output::time(message.quarantined_at),
            message.failures.to_string(),
            output::cell(Some(&message.reason)),
            output::cell(original.as_deref()),
        ]);
    }
    table.print("nothing is in quarantine")?;
    if shown > 0 {
        output::line(format!("{shown} of {count}; -o json shows whole messages and their headers"))?;
    }
    Ok(())
}

fn unknown(id: i64) -> anyhow::Error {
    failure(NOT_FOUND, format!("no message {id} is in quarantine; `tasker queue quarantine` lists them"))
}
