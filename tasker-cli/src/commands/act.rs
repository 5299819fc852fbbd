//! What operators do to tasks: the acts of `tasker task`, on one task or on all that match.

use serde_json::{Value, json};
use tasker_shared::client::Client;
use tasker_shared::state_machine::decide::ByHand;
use tasker_shared::store::details::STATUSES;
use tasker_shared::store::requests::TaskRequest;
use uuid::Uuid;

use crate::Global;
use crate::failure::{WRONG, failure};
use crate::output::{self, Format, Table};
use crate::run;
use crate::run::actor;

/// One task, or every task that matches.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// Uuid or correlation id
    #[arg(conflicts_with_all = ["namespace", "template", "status"])]
    task: Option<String>,
    /// Every task of this namespace
    #[arg(long)]
    namespace: Option<String>,
    /// Every task of this template
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// Every task with this status
    #[arg(long, value_parser = STATUSES)]
    status: Option<String>,
    /// Only say how many match, and which (20 of them)
    #[arg(long, conflicts_with = "task")]
    dry_run: bool,
    /// Why; kept in the audit
    #[arg(long)]
    reason: Option<String>,
}

/// One step of a task.
#[derive(Debug, clap::Args)]
pub struct WhichStep {
    /// Uuid or correlation id of the task
    task: String,
    /// Name of the step
    step: String,
    /// Why; kept in the audit
    #[arg(long)]
    reason: Option<String>,
}

/// Does an act that the word names to one task, or to all that match.
pub async fn act(global: &Global, client: &Client, word: &str, which: Which, steps: &[String]) -> anyhow::Result<()> {
    let Which { task, namespace, template, status, dry_run, reason } = which;
    let (actor, reason) = (actor(), reason.as_deref());
    let Some(task) = task else {
        if !steps.is_empty() {
            return Err(failure(WRONG, "--step: names steps of one task".to_owned()));
        }
        let mut filter = json!({"namespace": namespace, "template": template, "status": status});
        if let Some(filter) = filter.as_object_mut() {
            filter.retain(|_, value| !value.is_null());
        }
        return bulk(global, client, word, filter, dry_run, reason).await;
    };
    let id = run::find_task(client, &task).await?;
    let of = |act| client.act(id, act, actor.as_deref(), reason);
    match word {
        "cancel" => client.cancel(id, actor.as_deref(), reason).await?,
        "terminate" => client.terminate(id, actor.as_deref(), reason).await?,
        "retry" => client.retry_steps(id, steps, actor.as_deref(), reason).await?,
        "suspend" => of(TaskRequest::Suspend).await?,
        "resume" => of(TaskRequest::Resume).await?,
        "give_up" => of(TaskRequest::GiveUp).await?,
        _ => of(TaskRequest::Resolve).await?,
    }
    accepted(global, id)
}

async fn bulk(
    global: &Global,
    client: &Client,
    word: &str,
    mut filter: Value,
    dry_run: bool,
    reason: Option<&str>,
) -> anyhow::Result<()> {
    let (mut matched, mut asked, mut sample) = (0, 0, Vec::new());
    // A page is a transaction; while it is worked through, no other waits for it.
    loop {
        let page = client.act_on_tasks(&filter, word, dry_run, actor().as_deref(), reason).await?;
        matched += page["matched"].as_i64().unwrap_or(0);
        asked += page["asked"].as_i64().unwrap_or(0);
        let more = page["sample"].as_array().cloned().unwrap_or_default();
        sample.extend(more.into_iter().take(20_usize.saturating_sub(sample.len())));
        if page["next"].is_null() {
            break;
        }
        filter["after"] = page["next"].clone();
    }
    if global.output == Format::Json {
        return output::json(&json!({"matched": matched, "asked": asked, "dry_run": dry_run, "sample": sample}));
    }
    for task in &sample {
        output::line(task.as_str().unwrap_or_default())?;
    }
    let verb = word.replace('_', " ");
    output::line(if dry_run {
        format!("tasks that match: {matched}; without --dry-run each is asked to {verb}")
    } else {
        format!("accepted: {asked} of {matched} asked to {verb}")
    })
}

/// Runs a finished task again from these steps.
pub async fn rerun(
    global: &Global,
    client: &Client,
    task: &str,
    from: &[String],
    reason: Option<&str>,
) -> anyhow::Result<()> {
    let id = run::find_task(client, task).await?;
    client.rerun(id, from, actor().as_deref(), reason).await?;
    accepted(global, id)
}

/// Settles a step by hand.
pub async fn settle_step(
    global: &Global,
    client: &Client,
    which: WhichStep,
    act: ByHand,
    output: Option<String>,
) -> anyhow::Result<()> {
    let output = output.map(|text| serde_json::from_str(&text)).transpose().map_err(|error| {
        failure(WRONG, format!("--result: is not JSON: {error}; give a value such as '{{\"a\": 1}}'"))
    })?;
    let id = run::find_task(client, &which.task).await?;
    client.settle_step(id, &which.step, act, output, actor().as_deref(), which.reason.as_deref()).await?;
    accepted(global, id)
}

/// Look at what operators did.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:\n  tasker audit list --limit 50\n  tasker audit list ORD-4711 -o json")]
pub enum Audit {
    /// List acts, newest first
    List {
        /// Only those on this task: uuid or correlation id
        task: Option<String>,
        /// How many at most
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
}

impl Which {
    /// Refuses what says no task at all, before anything is started.
    pub fn check(&self) -> anyhow::Result<()> {
        if [&self.task, &self.namespace, &self.template, &self.status].iter().all(|named| named.is_none()) {
            return Err(failure(
                WRONG,
                "say which task, by uuid or correlation id; or which tasks, by --namespace, --template, --status or \
                 several of them, first with --dry-run",
            ));
        }
        Ok(())
    }
}

impl Audit {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let Self::List { task, limit } = self;
        let connected = run::connect(global).await?;
        let client = &connected.client;
        let task = match task {
            Some(task) => Some(run::find_task(client, &task).await?),
            None => None,
        };
        let rows = client.audit(task, limit).await?;
        if global.output == Format::Json {
            return output::json(&rows);
        }
        let mut table = Table::new(["AT (UTC)", "ACTION", "ACTOR", "TASK OR OTHER", "DETAILS", "REASON"]);
        for row in rows {
            table.row([
                output::time(row.at),
                row.action,
                output::cell(Some(&row.actor)),
                row.task_uuid.map_or_else(|| output::cell(row.subject.as_deref()), |task| task.to_string()),
                output::clip(&output::cell(row.details.map(|details| details.to_string()).as_deref()), 60),
                output::cell(row.reason.as_deref()),
            ]);
        }
        table.print("nothing was done yet")
    }
}

/// Says that a request was accepted.
pub fn accepted(global: &Global, task: Uuid) -> anyhow::Result<()> {
    if global.output == Format::Json {
        return output::json(&json!({"task_uuid": task, "accepted": true}));
    }
    output::line("accepted: it is done as soon as an orchestrator reads the request")
}
