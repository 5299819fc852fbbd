//! `tasker demo`: the whole product on 24 orders, checked against an independent expectation.
//!
//! It fails if anything is off: a result, an attempt too many or too few, an orphan span.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use anyhow::{Context as _, bail};
use order_fulfillment_example::expected::expected;
use order_fulfillment_example::{Order, TEMPLATE, handlers, orders};
use serde_json::{Value, json};
use tasker_orchestration::{Options, Orchestrator};
use tasker_shared::client::{Client, ClientError, Submit};
use tasker_shared::duration::in_words;
use tasker_shared::store::views::{self, AttemptView, TaskView};
use tasker_shared::store::{templates, transitions, tx};
use tasker_shared::telemetry::Role;
use tasker_shared::template;
use tasker_shared::trace::context::inject_current;
use tasker_shared::trace::span::TaskSpans;
use tasker_shared::trace::tree;
use tasker_worker::{StepContext, StepError, Worker};
use tracing::Instrument as _;
use uuid::Uuid;

use super::orchestrator::FLUSH;
use super::task::progress;
use super::trace::output_width;
use crate::Global;
use crate::failure::{FAILED, TIMEOUT, failure};
use crate::output::{self, Format, Table};
use crate::run;
use crate::trace_flags::TraceFlags;
use crate::waterfall::{Detail, Waterfall};

/// The target of the spans that stand for user code: they are exported as a user's spans are.
const SHOP: &str = "order_fulfillment";

/// Run 24 orders through a real PostgreSQL, an orchestrator and a worker, check each result
/// against an independent computation, and show one whole trace.
///
/// It may be run again and again; each run has correlation ids of its own. With
/// `OTEL_EXPORTER_OTLP_ENDPOINT` set the traces are sent there too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tasker demo\n  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 tasker demo")]
pub struct Demo {
    /// Give up after this time, with exit code 5
    #[arg(long, default_value = "60s", value_parser = template::parse_duration, value_name = "DURATION")]
    timeout: Duration,
    /// Do not draw the trace
    #[arg(long)]
    no_tree: bool,
}

/// How an order gets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Client,
    Sql,
    Message,
}

impl Way {
    /// One order as a raw message, every sixth from SQL, the others through the Rust client.
    fn of(place: usize) -> Self {
        match place {
            4 => Self::Message,
            _ if place.is_multiple_of(6) => Self::Sql,
            _ => Self::Client,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Client => "Rust client",
            Self::Sql => "SQL, traceparent",
            Self::Message => "pgmq.send",
        }
    }
}

struct Sent {
    order: Order,
    way: Way,
    task: Uuid,
    correlation_id: String,
    /// The caller's trace id and span id in hex, where one was sent.
    caller: Option<(String, String)>,
}

/// What one order came to, and what is wrong with it.
struct Checked {
    sent: Sent,
    task: TaskView,
    attempts: usize,
    spans: TaskSpans,
    problems: Vec<String>,
}

impl Demo {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let stop = run::stop_signal()?;
        let run::Traced { config: trace, telemetry, .. } =
            run::telemetry(global, Role::Cli, "warn", &TraceFlags::default())?;
        let endpoint = trace.enabled.then(|| trace.printable_endpoint());
        eprintln!("starting the database");
        let Some(connected) = run::connect_until(global, &stop).await? else {
            return Err(failure(130, "interrupted"));
        };
        let client = &connected.client;
        let template = template::parse("order.yaml", TEMPLATE).map_err(|problems| anyhow::anyhow!("{problems:?}"))?;
        tx::in_tx(client.pool(), async |conn| templates::register(conn, &template).await).await?;

        eprintln!("starting an orchestrator and a worker");
        let orchestrator = Orchestrator::start(&connected.url, &Options { trace, ..Options::default() }).await?;
        let stop_worker = stop.child_token();
        let worker = tokio::spawn(worker(&connected.url)?.run(stop_worker.clone()));

        let outcome = tokio::select! {
            outcome = self.run_orders(client) => outcome,
            () = stop.cancelled() => Err(failure(130, "interrupted")),
        };
        stop_worker.cancel();
        worker.await??;
        let flushed = orchestrator.flush(FLUSH).await;
        let exported =
            orchestrator.export_stats().map(|stats| stats.exported.load(std::sync::atomic::Ordering::Relaxed));
        orchestrator.shutdown(FLUSH).await;
        let live = telemetry.shutdown(FLUSH).await;
        let checked = outcome?;

        let wrong = checked.iter().filter(|order| !order.problems.is_empty()).count();
        if global.output == Format::Json {
            output::json(&summary(&checked, exported))?;
        } else {
            print_orders(&checked)?;
            if let (Some(first), false) = (checked.first(), self.no_tree) {
                output::line("\nThe whole trace of the first order:\n")?;
                output::line(Waterfall::new(&first.spans, Detail::Every).text(output_width()))?;
            }
            if let (Some(endpoint), Some(exported)) = (&endpoint, exported) {
                output::line(format!(
                    "\n{exported} spans of tasks and {} live spans were acknowledged by {endpoint}",
                    live.exported
                ))?;
            }
            print_next(&checked, endpoint.as_deref())?;
        }
        if !flushed {
            return Err(failure(
                FAILED,
                format!("the collector did not acknowledge all spans within {FLUSH:?}; they are kept and sent later"),
            ));
        }
        if wrong > 0 {
            return Err(failure(FAILED, format!("{wrong} of {} orders are not as expected", checked.len())));
        }
        Ok(())
    }

    async fn run_orders(&self, client: &Client) -> anyhow::Result<Vec<Checked>> {
        tokio::time::timeout(self.timeout, worker_is_live(client))
            .await
            .map_err(|_| failure(TIMEOUT, format!("the worker has not said hello within {:?}", self.timeout)))??;
        let sent = submit(client, self.timeout).await?;
        let ids: Vec<Uuid> = sent.iter().map(|sent| sent.task).collect();
        let bar = progress(ids.len(), "orders done");
        let waited = client.wait_many(&ids, Some(self.timeout), |_| bar.inc(1)).await;
        bar.finish_and_clear();
        let tasks = match waited {
            Err(late @ ClientError::Timeout { .. }) => {
                for &task in &ids {
                    let situation = client.why(task).await?;
                    if !situation.task.is_finished() {
                        eprintln!("{task}  {}", situation.sentence());
                    }
                }
                return Err(late.into());
            }
            waited => waited?,
        };
        check(client, sent, tasks).await
    }
}

/// Returns when the worker has said hello, so that the traces show orders and not our start.
async fn worker_is_live(client: &Client) -> anyhow::Result<()> {
    let handlers = handlers::NAMES.map(String::from);
    while !views::is_offered(&mut *client.pool().acquire().await?, "worker_fulfillment", &handlers).await? {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A worker with the handlers of the example.
fn worker(url: &str) -> anyhow::Result<Worker> {
    let mut builder = Worker::builder(url).namespace("fulfillment");
    for name in handlers::NAMES {
        builder = builder.handler(name, move |ctx: StepContext, input: Value| async move { handle(name, &ctx, input) });
    }
    Ok(builder.build()?)
}

pub(super) fn handle(name: &str, ctx: &StepContext, input: Value) -> Result<Value, StepError> {
    let work = || handlers::call(name, input, ctx.attempt());
    let result = if name == "payments.charge" {
        // A span of the user's own: it hangs below handler.execution of its attempt.
        tracing::info_span!(target: SHOP, "gateway.charge", attempt = ctx.attempt()).in_scope(work)
    } else {
        work()
    };
    result.map_err(|failure| {
        if failure.retryable {
            StepError::retry(failure.error_type, failure.message)
        } else {
            StepError::fail(failure.error_type, failure.message)
        }
    })
}

async fn submit(client: &Client, patience: Duration) -> anyhow::Result<Vec<Sent>> {
    let run = hex_digits(3);
    let all: Vec<(Order, Way, String)> = orders()
        .into_iter()
        .enumerate()
        .map(|(place, order)| {
            let correlation_id = format!("{}-{run}", order.order_id);
            (order, Way::of(place), correlation_id)
        })
        .collect();
    let mut callers: HashMap<String, (String, String)> = HashMap::new();
    let mut tasks: HashMap<String, Uuid> = HashMap::new();

    for (order, way, correlation_id) in &all {
        let input = serde_json::to_value(order)?;
        match way {
            Way::Sql => {
                // As a service would: inside its own request, with its own trace context.
                let checkout = tracing::info_span!(target: SHOP, "POST /checkout", order_id = order.order_id);
                let task = async {
                    let traceparent = current_traceparent();
                    callers.insert(correlation_id.clone(), caller(&traceparent));
                    submit_by_sql(client, &input, correlation_id, &traceparent).await
                };
                tasks.insert(correlation_id.clone(), task.instrument(checkout).await?);
            }
            Way::Message => send_by_pgmq(client, &input, correlation_id).await?,
            Way::Client => {}
        }
    }
    let through_client: Vec<&(Order, Way, String)> = all.iter().filter(|(_, way, _)| *way == Way::Client).collect();
    let requests = through_client
        .iter()
        .map(|(order, _, correlation_id)| {
            let request = Submit::new("fulfillment", "order", serde_json::to_value(order)?);
            Ok(Submit { correlation_id: Some(correlation_id.clone()), ..request })
        })
        .collect::<Result<Vec<_>, serde_json::Error>>()?;
    for ((_, _, correlation_id), answer) in through_client.iter().zip(client.submit_many(requests).await?) {
        let submitted =
            answer.map_err(|refusal| failure(FAILED, format!("{correlation_id} was refused: {refusal}")))?;
        tasks.insert(correlation_id.clone(), submitted.task_uuid);
    }

    let mut sent = Vec::with_capacity(all.len());
    for (order, way, correlation_id) in all {
        let task = match tasks.get(&correlation_id) {
            Some(task) => *task,
            None => tokio::time::timeout(patience, created(client, &correlation_id)).await.with_context(|| {
                format!("{correlation_id}: the message of pgmq.send did not become a task within {patience:?}")
            })??,
        };
        let caller = callers.remove(&correlation_id);
        sent.push(Sent { order, way, task, correlation_id, caller });
    }
    Ok(sent)
}

/// The statement that the README shows, in a transaction of the caller's own.
async fn submit_by_sql(
    client: &Client,
    input: &Value,
    correlation_id: &str,
    traceparent: &str,
) -> anyhow::Result<Uuid> {
    let submit =
        "select tasker.submit_task('fulfillment', 'order', input => $1, correlation_id => $2, traceparent => $3)";
    tx::in_tx(client.pool(), async |conn| {
        Ok::<_, anyhow::Error>(
            sqlx::query_scalar(submit).bind(input).bind(correlation_id).bind(traceparent).fetch_one(conn).await?,
        )
    })
    .await
}

/// A message is enough: nothing of Tasker is called.
async fn send_by_pgmq(client: &Client, input: &Value, correlation_id: &str) -> anyhow::Result<()> {
    let message = json!({
        "v": 1, "type": "submit", "namespace": "fulfillment", "template": "order", "input": input, "correlation_id": correlation_id,
    });
    sqlx::query("select pgmq.send('task_requests', $1)").bind(message).execute(client.pool()).await?;
    Ok(())
}

/// The task that an orchestrator made of a raw message. Nothing is sent when it appears, so this looks now and then.
async fn created(client: &Client, correlation_id: &str) -> anyhow::Result<Uuid> {
    loop {
        let found = views::by_correlation(&mut *client.pool().acquire().await?, correlation_id).await?;
        if let Some(task) = found.first() {
            return Ok(*task);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The context of the current span; without an exporter there is none, and a made-up caller stands in.
fn current_traceparent() -> String {
    let mut headers = HashMap::new();
    inject_current(&mut headers);
    headers.remove("traceparent").unwrap_or_else(|| format!("00-{}-{}-01", hex_digits(16), hex_digits(8)))
}

fn hex_digits(bytes: usize) -> String {
    use std::fmt::Write as _;
    (0..bytes).fold(String::new(), |mut text, _| {
        // Never all zero, which would be no id.
        let _ = write!(text, "{:02x}", rand::random_range(1..=255_u8));
        text
    })
}

fn caller(traceparent: &str) -> (String, String) {
    let mut parts = traceparent.split('-').skip(1).map(str::to_owned);
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

async fn check(client: &Client, sent: Vec<Sent>, tasks: Vec<TaskView>) -> anyhow::Result<Vec<Checked>> {
    let ids: Vec<Uuid> = sent.iter().map(|sent| sent.task).collect();
    let mut conn = client.pool().acquire().await?;
    let mut results = views::results(&mut conn, &ids).await?;
    let attempts = views::attempts(&mut conn, &ids).await?;
    let logs = transitions::logs(&mut conn, &ids).await?;
    let mut trees: HashMap<Uuid, TaskSpans> = logs.iter().map(|log| (log.head.task_uuid, tree::spans(log))).collect();
    let mut checked = Vec::with_capacity(sent.len());
    for (sent, task) in sent.into_iter().zip(tasks) {
        let attempts: Vec<&AttemptView> = attempts.iter().filter(|attempt| attempt.task_uuid == sent.task).collect();
        let Some(spans) = trees.remove(&sent.task) else { bail!("task {} has no log", sent.task) };
        let mut problems = Vec::new();
        check_result(&sent.order, &task, results.remove(&sent.task).unwrap_or_default(), &mut problems);
        check_attempts(&attempts, &mut problems);
        check_tree(&sent, &task, &spans, &mut problems);
        checked.push(Checked { attempts: attempts.len(), sent, task, spans, problems });
    }
    Ok(checked)
}

fn check_result(order: &Order, task: &TaskView, mut results: BTreeMap<String, Value>, problems: &mut Vec<String>) {
    let wanted = expected(order);
    let status = if wanted.is_some() { "completed" } else { "failed" };
    if task.status != status {
        let reason = task.reason.as_deref().unwrap_or("no reason");
        problems.push(format!("is {} ({reason}) and should be {status}", task.status));
        return;
    }
    let found = results.remove("close");
    let wanted = wanted.and_then(|closed| serde_json::to_value(closed).ok());
    if found != wanted {
        let show = |value: Option<Value>| value.map_or_else(|| "nothing".into(), |value| value.to_string());
        problems.push(format!("came to {} and should be {}", show(found), show(wanted)));
    }
}

fn check_attempts(attempts: &[&AttemptView], problems: &mut Vec<String>) {
    let charges: Vec<_> = attempts.iter().filter(|attempt| attempt.step == "charge").collect();
    let outcomes: Vec<&str> = charges.iter().map(|attempt| attempt.outcome.as_deref().unwrap_or("none")).collect();
    let first_error = charges.first().and_then(|attempt| attempt.error.as_ref()?.get("type")?.as_str());
    // A worker that was killed may cost attempts more; the demo's own is not.
    if outcomes != ["error", "success"] || first_error != Some("GatewayTimeout") {
        problems.push(format!("charge ended as {outcomes:?} and should fail once with GatewayTimeout, then succeed"));
    }
}

fn check_tree(sent: &Sent, task: &TaskView, tree: &TaskSpans, problems: &mut Vec<String>) {
    let ids: HashSet<_> = tree.spans.iter().map(|span| span.id).collect();
    if ids.len() != tree.spans.len() {
        problems.push("two spans share an id".into());
    }
    let outside: Vec<_> =
        tree.spans.iter().filter(|span| span.parent.is_none_or(|parent| !ids.contains(&parent))).collect();
    let [root] = outside.as_slice() else {
        problems.push(format!("has {} spans without a parent and should have one, its root", outside.len()));
        return;
    };
    if (root.start, Some(root.end)) != (task.created_at, task.finished_at) {
        problems.push("its root does not span the task's life".into());
    }
    let parent = root.parent.as_ref().map(|parent| tasker_shared::trace::otlp::hex(parent));
    let trace = tasker_shared::trace::otlp::hex(&tree.trace_id);
    match &sent.caller {
        Some((caller_trace, caller_span)) if (&trace, parent.as_ref()) != (caller_trace, Some(caller_span)) => {
            problems.push(format!(
                "belongs to {trace} below {parent:?} and should continue {caller_trace} below {caller_span}"
            ));
        }
        _ => {}
    }
}

fn print_orders(checked: &[Checked]) -> anyhow::Result<()> {
    let mut table =
        Table::new(["ORDER", "SUBMITTED BY", "STATUS", "TOTAL", "ATTEMPTS", "SPANS", "TOOK", "AS EXPECTED"]);
    for Checked { sent, task, attempts, spans, problems } in checked {
        let took = task.finished_at.map_or("-".into(), |end| in_words(end - task.created_at));
        let total = expected(&sent.order).map_or("-".into(), |closed| {
            format!("{}.{:02} {}", closed.total_cents / 100, closed.total_cents % 100, closed.currency)
        });
        let verdict =
            if problems.is_empty() { console::style("yes").green() } else { console::style("NO").red().bold() };
        table.row([
            sent.order.order_id.clone(),
            sent.way.as_str().into(),
            output::status(task.status),
            total,
            attempts.to_string(),
            spans.spans.len().to_string(),
            took,
            verdict.to_string(),
        ]);
    }
    table.print("no order")?;
    for Checked { sent, problems, .. } in checked {
        for problem in problems {
            output::line(format!("{} {problem}", sent.order.order_id))?;
        }
    }
    let right = checked.iter().filter(|order| order.problems.is_empty()).count();
    let complete = checked.iter().filter(|order| order.task.status == "completed").count();
    let attempts: usize = checked.iter().map(|order| order.attempts).sum();
    let spans: usize = checked.iter().map(|order| order.spans.spans.len()).sum();
    let all = checked.len();
    let trees = if right == all {
        "; each charge failed once and was tried again; each trace has one root and no orphan"
    } else {
        ""
    };
    output::line(format!(
        "\n{complete} of {all} orders complete, {right} as expected: {attempts} attempts, {spans} spans{trees}"
    ))
}

fn print_next(checked: &[Checked], endpoint: Option<&str>) -> anyhow::Result<()> {
    let Some(first) = checked.first() else {
        return Ok(());
    };
    let id = &first.sent.correlation_id;
    output::line("\nWhere to look next:")?;
    for (command, what) in [
        (format!("tasker trace show {id}"), "the same trace in short; --tree for every span, --json for OTLP"),
        (format!("tasker task get {id}"), "its steps and its result"),
        ("tasker task list --namespace fulfillment".into(), "all orders"),
        ("psql \"$(tasker db url)\"".into(), "the rows behind it: tasker.tasks, tasker.transitions"),
    ] {
        output::line(format!("  {command:<42} {what}"))?;
    }
    match endpoint {
        Some(_) => output::line(format!(
            "  in your trace backend: search the tag correlation_id={id}, or trace {}",
            first.task.trace_id
        )),
        None => output::line(
            "  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 tasker demo   sends every trace to a collector, such as Jaeger",
        ),
    }
}

fn summary(checked: &[Checked], exported: Option<u64>) -> Value {
    let orders: Vec<Value> = checked
        .iter()
        .map(|order| {
            json!({
                "order_id": order.sent.order.order_id, "submitted_by": order.sent.way.as_str(), "task_uuid": order.sent.task,
                "correlation_id": order.sent.correlation_id, "trace_id": order.task.trace_id, "status": order.task.status,
                "attempts": order.attempts, "spans": order.spans.spans.len(), "problems": order.problems,
            })
        })
        .collect();
    json!({"ok": checked.iter().all(|order| order.problems.is_empty()), "exported_spans": exported, "orders": orders})
}
