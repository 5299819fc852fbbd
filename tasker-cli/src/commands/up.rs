//! `tasker up`: everything in one process, for a laptop.

use std::collections::HashSet;
use std::time::Duration;

use chrono::Utc;
use serde_json::json;
use tasker_orchestration::{Options, Orchestrator};
use tasker_shared::client::Client;
use tasker_shared::duration::in_words;
use tasker_shared::store::views::{self, TaskView};
use tasker_shared::telemetry::Role;
use tasker_shared::telemetry::settings;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::api::Serve;
use super::orchestrator::FLUSH;
use super::worker::BUILTINS;
use crate::Global;
use crate::output::{self, Format};
use crate::run;
use crate::trace_flags::TraceFlags;

/// How often new templates are looked for, so that `template apply` needs no restart.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Run an orchestrator, workers with the built-in handlers, and the HTTP API with its web page in
/// this process, and print every task that ends, until Ctrl-C.
///
/// It brings an example along, which the page has a button for. There is a worker for each queue
/// with a step for a built-in handler, also of templates that are registered meanwhile. Handlers of your own run in a program of your own beside it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tasker up\n  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 tasker up")]
pub struct Up {
    /// Attempts that run at once, for each queue
    #[arg(long, default_value_t = 50)]
    slots: usize,
    /// A host that the `http` handler may talk to, as HOST or HOST:PORT; may be repeated
    #[arg(long = "allow-http-host", value_name = "HOST")]
    http_hosts: Vec<String>,
    /// Leave out the example: its template, its worker, and the button that submits it
    #[arg(long)]
    no_example: bool,
    /// Leave out the example's worker; `tasker worker example` runs it elsewhere
    #[arg(long)]
    no_example_worker: bool,
    #[command(flatten)]
    metrics: run::Metrics,
    #[command(flatten)]
    serve: Serve,
    #[command(flatten)]
    trace: TraceFlags,
}

impl Up {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let stop = run::stop_signal()?;
        let run::Traced { config, sources, telemetry } =
            run::telemetry(global, Role::Orchestrator, "warn", &self.trace)?;
        let Some(connected) = run::connect_until(global, &stop).await? else {
            return Ok(());
        };
        let client = &connected.client;
        eprintln!("database  {}", printable(&connected.url));
        let (stored, _) = settings::read(&mut *client.pool().acquire().await?, &sources).await?;
        if stored.config.enabled {
            eprintln!("traces    {}", stored.config.destination());
        } else {
            eprintln!("traces    not exported; `tasker trace enable` does, and `tasker trace show` needs no export");
        }
        let metrics = self.metrics.serve(Some(client.pool().clone())).await?;
        if let Some(metrics) = &metrics {
            eprintln!("metrics   http://{}/metrics", metrics.address);
        }
        let example = if self.no_example { None } else { Some(super::example::register(client).await?) };
        let brings_worker = example.is_some() && !self.no_example_worker;
        let serving = self.serve.start(&connected.url, example).await?;
        let open = serving.link.clone().unwrap_or_else(|| serving.server.url());
        let farewell = serving.farewell();
        let options = Options { trace: config, settings: Some(sources), ..Options::default() };
        let orchestrator = Orchestrator::start(&connected.url, &options).await?;
        let mut watch = client.watch().await?;
        let mut workers = Workers {
            up: &self,
            url: &connected.url,
            stop: stop.child_token(),
            known: HashSet::new(),
            running: JoinSet::new(),
        };
        if brings_worker {
            let worker = super::example::worker(&connected.url)?;
            eprintln!("worker    {} for the example, fulfillment/order", worker.name());
            workers.running.spawn(worker.run(stop.child_token()));
        }
        let api = tokio::spawn(serving.server.run(stop.clone()));
        eprintln!("open      {open}");
        eprintln!("running; Ctrl-C finishes what has begun and ends");

        let mut look = tokio::time::interval(LOOK_EVERY);
        let mut ended = 0_u64;
        while !stop.is_cancelled() {
            tokio::select! {
                () = stop.cancelled() => {}
                _ = look.tick() => workers.add_new(client).await?,
                Some(result) = workers.running.join_next() => result??,
                task = watch.next() => {
                    ended += 1;
                    print(global, &client.get(task?).await?)?;
                }
            }
        }
        eprintln!("stopping: running handlers finish first");
        while let Some(result) = workers.running.join_next().await {
            result??;
        }
        api.await?;
        farewell.await;
        watch.end().await;
        orchestrator.shutdown(FLUSH).await;
        telemetry.shutdown(FLUSH).await;
        eprintln!("{ended} task{} ended", if ended == 1 { "" } else { "s" });
        Ok(())
    }
}

struct Workers<'a> {
    up: &'a Up,
    url: &'a str,
    stop: CancellationToken,
    known: HashSet<(String, String)>,
    running: JoinSet<Result<(), tasker_worker::Error>>,
}

impl Workers<'_> {
    async fn add_new(&mut self, client: &Client) -> anyhow::Result<()> {
        let wanted = views::queues_of(&mut *client.pool().acquire().await?, &BUILTINS.map(String::from)).await?;
        for (namespace, queue) in wanted {
            if !self.known.insert((namespace.clone(), queue.clone())) {
                continue;
            }
            // `worker_<namespace>` or `worker_<namespace>__<queue>`; neither name holds `__`.
            let named = queue.split_once("__").map(|(_, name)| name);
            let worker = tasker_worker::Worker::builder(self.url)
                .namespace(&namespace)
                .queue(named)
                .slots(self.up.slots)
                .allow_http_hosts(self.up.http_hosts.iter().cloned())
                .builtins()
                .build()?;
            eprintln!("worker    {} for {queue}", worker.name());
            self.running.spawn(worker.run(self.stop.clone()));
        }
        Ok(())
    }
}

fn print(global: &Global, task: &TaskView) -> anyhow::Result<()> {
    let took = task.finished_at.unwrap_or_else(Utc::now) - task.created_at;
    if global.output == Format::Json {
        return output::line(json!(task).to_string());
    }
    let reason = task
        .reason
        .as_deref()
        .map_or_else(String::new, |reason| format!("  {}", output::clip(&output::cell(Some(reason)), 100)));
    output::line(format!(
        "{}  {}  {}/{}  {}  {}{reason}",
        task.finished_at.unwrap_or(task.last_at).format("%H:%M:%S"),
        output::status(task.status),
        task.namespace,
        task.template,
        output::cell(Some(&task.correlation_id)),
        in_words(took),
    ))
}

/// The URL without its password.
fn printable(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    match authority.rsplit_once('@') {
        Some((user, host)) => format!("{scheme}://{}@{host}{path}", user.split(':').next().unwrap_or_default()),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_password_is_not_printed() {
        assert_eq!(super::printable("postgres://me:secret@db:5432/tasker"), "postgres://me@db:5432/tasker");
        assert_eq!(super::printable("postgresql:///tasker?host=/run/pg"), "postgresql:///tasker?host=/run/pg");
    }
}
