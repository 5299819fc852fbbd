//! `tasker task`.

use std::io::{IsTerminal as _, Read as _};
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tasker_shared::client::{Client, Submit as Request};
use tasker_shared::duration::in_words;
use tasker_shared::state_machine::decide::ByHand;
use tasker_shared::store::details::STATUSES;
use tasker_shared::store::views::{self, TaskFilter, TaskView};
use tasker_shared::template::parse_duration;
use uuid::Uuid;

use super::act::{self, Which, WhichStep};
use super::template::TemplateName;
use crate::Global;
use crate::failure::{FAILED, WRONG, failure};
use crate::output::{self, Format, Table};
use crate::run;

/// Submit and follow tasks (a task is one run of a workflow).
///
/// A task is named by its uuid, or by its correlation id if no other task has the same.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  tasker task submit shop/order --input '{\"order_id\": \"4711\"}' --correlation-id ORD-4711 --wait
  tasker task list --status failed
  tasker task why ORD-4711
  tasker task cancel --namespace shop --status waiting --dry-run
  tasker task rerun ORD-4711 --from charge --reason 'wrong account'
  tasker task complete-step ORD-4711 charge --result '{\"receipt\": \"R-1\"}'
  tasker task wait ORD-4711 --timeout 30s && echo completed")]
pub enum Task {
    /// Ask for a task
    Submit(Submit),
    /// List tasks, newest first
    List(List),
    /// Show a task, its steps, and what it came to
    Get {
        /// Uuid or correlation id
        task: String,
    },
    /// Wait until tasks have ended; fails unless all have completed
    Wait {
        /// Uuids or correlation ids
        #[arg(required = true)]
        tasks: Vec<String>,
        /// Give up after this time, with exit code 5
        #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
        timeout: Option<Duration>,
    },
    /// End a task; what is not done will not be done
    Cancel {
        #[command(flatten)]
        which: Which,
        /// Drop running handlers instead of asking them to stop
        #[arg(long)]
        terminate: bool,
    },
    /// End a task and drop its running handlers
    Terminate {
        #[command(flatten)]
        which: Which,
    },
    /// Let running attempts finish and send nothing more until it is resumed
    Suspend {
        #[command(flatten)]
        which: Which,
    },
    /// Let a suspended task go on
    Resume {
        #[command(flatten)]
        which: Which,
    },
    /// Try again what failed or was cancelled, keeping what is done
    Retry {
        #[command(flatten)]
        which: Which,
        /// Only this step of a blocked task; may be given several times
        #[arg(long = "step", value_name = "NAME")]
        steps: Vec<String>,
    },
    /// Run a finished task again from chosen steps, keeping what the others came to
    Rerun {
        /// Uuid or correlation id
        task: String,
        /// This step and all that follow from it; may be given several times
        #[arg(long, value_name = "STEP", required = true)]
        from: Vec<String>,
        /// Why; kept in the audit
        #[arg(long)]
        reason: Option<String>,
    },
    /// End a blocked task as failed
    GiveUp {
        #[command(flatten)]
        which: Which,
    },
    /// End a blocked task as resolved by hand
    Resolve {
        #[command(flatten)]
        which: Which,
    },
    /// Skip a step by hand; what stands behind it goes on
    SkipStep(WhichStep),
    /// Say that a step was settled outside, perhaps with an output
    ResolveStep {
        #[command(flatten)]
        which: WhichStep,
        /// What the steps behind it read, as JSON
        #[arg(long, value_name = "JSON")]
        result: Option<String>,
    },
    /// Complete a step by hand, with its output
    CompleteStep {
        #[command(flatten)]
        which: WhichStep,
        /// What the steps behind it read, as JSON
        #[arg(long, value_name = "JSON", default_value = "null")]
        result: String,
    },
    /// Send a signal to a task: the step that waits for it completes
    #[command(after_help = "\
Examples:
  tasker task signal ORD-4711 approved --answer approve
  tasker task signal ORD-4711 paid --payload '{\"amount\": 100}'")]
    Signal {
        /// Uuid or correlation id
        task: String,
        /// The name that the template's `wait: {signal: …}` gives it
        name: String,
        /// JSON, @FILE, or - for stdin: the output of the step
        #[arg(long, default_value = "{}", value_name = "JSON")]
        payload: String,
        /// Short for --payload '{"answer": ANSWER}'
        #[arg(long, conflicts_with = "payload")]
        answer: Option<String>,
    },
    /// Say in one sentence what a task waits for
    Why {
        /// Uuid or correlation id
        task: String,
    },
}

/// Ask for a task. With an idempotency key that is known, the first task comes back.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker task submit shop/order --input @order.json
  jq .order event.json | tasker task submit shop/order@1.2.0 --input - --idempotency-key evt-17
  tasker task submit shop/order --traceparent 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")]
pub struct Submit {
    /// NAMESPACE/NAME, or NAMESPACE/NAME@VERSION; the version registered last if none is given
    template: TemplateName,
    /// A JSON object, @FILE, or - for stdin
    #[arg(long, default_value = "{}", value_name = "JSON")]
    input: String,
    /// What people will search by; the task's uuid if not given
    #[arg(long, value_name = "TEXT")]
    correlation_id: Option<String>,
    /// Submitting it again returns the first task
    #[arg(long, value_name = "TEXT")]
    idempotency_key: Option<String>,
    /// Higher runs first, from -9999 to 9999
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-9999..=9999))]
    priority: Option<i32>,
    /// Not before this time, such as 2030-01-31T12:00:00Z
    #[arg(long, value_name = "TIME")]
    run_at: Option<DateTime<Utc>>,
    /// W3C trace context of the caller: the task's trace continues it
    #[arg(long, env = "TRACEPARENT", hide_env_values = true, value_name = "VALUE")]
    traceparent: Option<String>,
    /// Goes with the traceparent
    #[arg(long, env = "TRACESTATE", hide_env_values = true, value_name = "VALUE")]
    tracestate: Option<String>,
    /// Wait until it has ended, print it, and fail unless it completed
    #[arg(long)]
    wait: bool,
    /// With --wait: give up after this time, with exit code 5
    #[arg(long, value_parser = parse_duration, value_name = "DURATION", requires = "wait")]
    timeout: Option<Duration>,
}

/// List tasks, newest first.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  tasker task list --namespace shop --status waiting\n  tasker task list --correlation-id ORD-4711 -o json"
)]
pub struct List {
    /// Of this namespace only
    #[arg(long)]
    namespace: Option<String>,
    /// Of this template only
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// With this status only
    #[arg(long, value_parser = STATUSES)]
    status: Option<String>,
    /// With this correlation id only
    #[arg(long, value_name = "TEXT")]
    correlation_id: Option<String>,
    /// Older than this task: the next page
    #[arg(long, value_name = "UUID")]
    before: Option<Uuid>,
    /// How many at most
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

impl Task {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        if let Self::Cancel { which, .. }
        | Self::Terminate { which }
        | Self::Suspend { which }
        | Self::Resume { which }
        | Self::Retry { which, .. }
        | Self::GiveUp { which }
        | Self::Resolve { which } = &self
        {
            which.check()?;
        }
        // Read before anything is started: a bad file should cost nothing.
        let input = match &self {
            Self::Submit(submit) => Some(read_input(&submit.input)?),
            Self::Signal { answer: Some(answer), .. } => Some(json!({"answer": answer})),
            Self::Signal { payload, .. } => Some(read_input(payload)?),
            _ => None,
        };
        let connected = run::connect(global).await?;
        let client = &connected.client;
        match self {
            Self::Submit(command) => submit(global, client, command, input.unwrap_or_default()).await,
            Self::List(List { namespace, template, status, correlation_id, before, limit }) => {
                let filter = TaskFilter { namespace, template, status, correlation_id, before, limit };
                list(global, &client.list(&filter).await?)
            }
            Self::Get { task } => get(global, client, run::find_task(client, &task).await?).await,
            Self::Wait { tasks, timeout } => {
                let mut ids = Vec::new();
                for task in &tasks {
                    ids.push(run::find_task(client, task).await?);
                }
                let ended = wait(client, &ids, timeout).await?;
                list(global, &ended)?;
                all_completed(&ended)
            }
            Self::Cancel { which, terminate } => {
                act::act(global, client, if terminate { "terminate" } else { "cancel" }, which, &[]).await
            }
            Self::Terminate { which } => act::act(global, client, "terminate", which, &[]).await,
            Self::Suspend { which } => act::act(global, client, "suspend", which, &[]).await,
            Self::Resume { which } => act::act(global, client, "resume", which, &[]).await,
            Self::Retry { which, steps } => act::act(global, client, "retry", which, &steps).await,
            Self::GiveUp { which } => act::act(global, client, "give_up", which, &[]).await,
            Self::Resolve { which } => act::act(global, client, "resolve", which, &[]).await,
            Self::Rerun { task, from, reason } => act::rerun(global, client, &task, &from, reason.as_deref()).await,
            Self::SkipStep(which) => act::settle_step(global, client, which, ByHand::Skip, None).await,
            Self::ResolveStep { which, result } => {
                act::settle_step(global, client, which, ByHand::Resolve, result).await
            }
            Self::CompleteStep { which, result } => {
                act::settle_step(global, client, which, ByHand::Complete, Some(result)).await
            }
            Self::Signal { task, name, .. } => {
                let id = run::find_task(client, &task).await?;
                client.signal(id, &name, &input.unwrap_or_default(), run::actor().as_deref()).await?;
                act::accepted(global, id)
            }
            Self::Why { task } => {
                let situation = client.why(run::find_task(client, &task).await?).await?;
                let sentence = situation.sentence();
                if global.output == Format::Json {
                    return output::json(
                        &json!({"task_uuid": situation.task.task_uuid, "why": sentence, "situation": situation}),
                    );
                }
                output::line(sentence)
            }
        }
    }
}

pub fn read_input(text: &str) -> anyhow::Result<Value> {
    let read = match text.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("input: cannot read {path}"))?,
        None if text == "-" => {
            let mut all = String::new();
            std::io::stdin().read_to_string(&mut all).context("input: cannot read stdin")?;
            all
        }
        None => text.to_owned(),
    };
    serde_json::from_str(&read).map_err(|error| {
        failure(WRONG, format!("input: is not JSON: {error}; give an object such as '{{\"a\": 1}}', or @FILE"))
    })
}

async fn submit(global: &Global, client: &Client, command: Submit, input: Value) -> anyhow::Result<()> {
    let TemplateName { namespace, name, version } = command.template;
    let request = Request {
        namespace,
        template: name,
        version,
        input,
        correlation_id: command.correlation_id,
        idempotency_key: command.idempotency_key,
        priority: command.priority,
        run_at: command.run_at,
        traceparent: command.traceparent,
        tracestate: command.tracestate,
        baggage: None,
    };
    let mut answers = client.submit_many(vec![request]).await?;
    let submitted = answers.pop().context("no answer")?.map_err(|refusal| failure(FAILED, refusal))?;
    if !command.wait {
        if global.output == Format::Json {
            return output::json(&submitted);
        }
        if !submitted.is_new {
            eprintln!("the idempotency key is known: this is the first task with it");
        }
        return output::line(submitted.task_uuid.to_string());
    }
    wait(client, &[submitted.task_uuid], command.timeout).await?;
    get(global, client, submitted.task_uuid).await?;
    all_completed(&[client.get(submitted.task_uuid).await?])
}

async fn wait(client: &Client, tasks: &[Uuid], timeout: Option<Duration>) -> anyhow::Result<Vec<TaskView>> {
    let bar = progress(tasks.len(), "ended");
    let ended = client.wait_many(tasks, timeout, |_| bar.inc(1)).await;
    bar.finish_and_clear();
    Ok(ended?)
}

/// A bar on stderr; hidden for a single task, and where nobody would see it.
pub fn progress(count: usize, what: &str) -> ProgressBar {
    if count < 2 || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(&format!("{{bar:40}} {{pos}}/{{len}} {what}, {{elapsed}}"));
    ProgressBar::new(count as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn all_completed(ended: &[TaskView]) -> anyhow::Result<()> {
    let others = ended.iter().filter(|task| task.status != "completed").count();
    if others == 0 {
        return Ok(());
    }
    Err(failure(FAILED, format!("{others} of {} did not complete", ended.len())))
}

fn list(global: &Global, tasks: &[TaskView]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        return output::json(&tasks);
    }
    let mut table = Table::new(["TASK", "TEMPLATE", "STATUS", "CORRELATION ID", "CREATED (UTC)", "TOOK"]);
    for task in tasks {
        table.row([
            task.task_uuid.to_string(),
            format!("{}/{}@{}", task.namespace, task.template, task.version),
            output::status(task.status),
            output::cell(Some(&task.correlation_id)),
            output::time(task.created_at),
            task.finished_at.map_or("-".into(), |end| in_words(end - task.created_at)),
        ]);
    }
    table.print("no task matches")
}

async fn get(global: &Global, client: &Client, id: Uuid) -> anyhow::Result<()> {
    let task = client.get(id).await?;
    let (steps, result) = (client.steps(id).await?, client.result(id).await?);
    let sentence = client.why(id).await?.sentence();
    let usage = views::usage(&mut *client.pool().acquire().await?, id).await?;
    let children = views::children(&mut *client.pool().acquire().await?, id, false).await?;
    if global.output == Format::Json {
        let mut conn = client.pool().acquire().await?;
        let input = views::input(&mut conn, id).await?;
        let reported = views::reported(&mut conn, id).await?;
        let mut value = serde_json::to_value(&task)?;
        let more = json!({"why": sentence, "input": input, "result": result, "steps": steps, "children": children,
            "usage": usage, "told": reported});
        if let (Value::Object(all), Value::Object(more)) = (&mut value, more) {
            all.extend(more);
        }
        return output::json(&value);
    }
    output::line(format!("{}  {}/{}@{}", task.task_uuid, task.namespace, task.template, task.version))?;
    output::line(sentence)?;
    output::line(format!("correlation id  {}", output::cell(Some(&task.correlation_id))))?;
    output::line(format!("trace id        {}", task.trace_id))?;
    output::line(format!("created         {} UTC", output::time(task.created_at)))?;
    if let Some(parent) = task.parent_task_uuid {
        output::line(format!("started by      task {parent}"))?;
    }
    for (name, amount) in &usage.total {
        output::line(format!("used            {amount} {}", output::cell(Some(name))))?;
    }
    let mut table = Table::new(["STEP", "STATE", "ATTEMPT", "HANDLER", "WORKER", "ERROR"]);
    for step in steps {
        let held = step.held_by.as_deref().map_or_else(String::new, |held| format!(" (held: {held})"));
        let items = match (step.items_ended, step.items, step.items_failed.unwrap_or_default()) {
            (Some(ended), Some(items), 0) => format!(" ({ended} of {items} items ended)"),
            (Some(ended), Some(items), failed) => format!(" ({ended} of {items} items ended, {failed} failed)"),
            _ => String::new(),
        };
        let running = step.progress.as_ref().filter(|_| step.state == "in_progress");
        let progress = running.map_or_else(String::new, |said| format!(" ({})", output::clip(&said.to_string(), 40)));
        let error = step.error.map(|error| format!("{}: {}", text(&error["type"]), text(&error["message"])));
        table.row([
            step.name,
            format!("{}{held}{items}{progress}", step.state),
            // The budget is a generation's, the number goes on.
            if step.attempt > step.max_attempts {
                step.attempt.to_string()
            } else {
                format!("{}/{}", step.attempt, step.max_attempts)
            },
            output::cell(Some(&*step.handler).filter(|handler| !handler.is_empty())),
            output::cell(step.worker.as_deref()),
            output::clip(&output::cell(error.as_deref()), 80),
        ]);
    }
    table.print("no step")?;
    if !children.is_empty() {
        let mut table = Table::new(["STEP", "ATTEMPT", "STARTED TASK", "TEMPLATE", "STATUS", "AWAITED"]);
        for child in children {
            let of = |one: Option<&str>| output::cell(one);
            table.row([
                child.step,
                child.attempt.to_string(),
                child.task_uuid.map_or_else(|| output::clip(&of(child.error.as_deref()), 80), |task| task.to_string()),
                of(child.template.as_deref()),
                child.status.map_or_else(|| "-".into(), output::status),
                if child.awaited { "yes" } else { "no" }.into(),
            ]);
        }
        table.print("")?;
    }
    for (step, result) in result {
        output::line(format!("result of {step}: {}", serde_json::to_string_pretty(&result)?))?;
    }
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}
