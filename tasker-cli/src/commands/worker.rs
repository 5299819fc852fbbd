//! `tasker worker`.

use std::time::Duration;

use tasker_shared::telemetry::Role;

use super::orchestrator::FLUSH;
use crate::trace_flags::TraceFlags;
use crate::{Global, run};

/// The handlers that every `tasker worker` offers.
pub const BUILTINS: [&str; 5] = ["echo", "fail", "http", "noop", "sleep"];

/// Run workers: they execute steps.
#[derive(Debug, clap::Subcommand)]
pub enum Worker {
    /// Run one with the built-in handlers until Ctrl-C or SIGTERM
    Run(Box<Run>),
    /// Run one for the example of `tasker up` until Ctrl-C or SIGTERM
    Example,
}

/// Run one worker with the handlers noop, echo, sleep, fail and http until it is told to stop;
/// then it claims nothing more and lets running handlers finish.
///
/// Handlers of your own go into a program of your own: see examples/hello.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker worker run --namespace shop
  tasker worker run --namespace shop --queue slow --slots 4
  tasker worker run --namespace shop --allow-http-host api.example.com")]
pub struct Run {
    /// The namespace whose steps it runs
    #[arg(long, default_value = "default")]
    namespace: String,
    /// Read this queue (steps with `queue: NAME`) instead of the namespace's own; may be repeated
    #[arg(long = "queue", value_name = "NAME")]
    queues: Vec<String>,
    /// Attempts that run at once
    #[arg(long, default_value_t = 50)]
    slots: usize,
    /// A host that the `http` handler may talk to, as HOST or HOST:PORT; may be repeated
    #[arg(long = "allow-http-host", value_name = "HOST")]
    http_hosts: Vec<String>,
    /// How long running handlers may take to finish at the end
    #[arg(long, default_value = "30s", value_parser = tasker_shared::template::parse_duration, value_name = "DURATION")]
    drain: Duration,
    #[command(flatten)]
    metrics: run::Metrics,
    #[command(flatten)]
    trace: TraceFlags,
}

impl Worker {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let command = match self {
            Self::Run(command) => *command,
            Self::Example => {
                let stop = run::stop_signal()?;
                let Some(connected) = run::connect_until(global, &stop).await? else {
                    return Ok(());
                };
                let worker = super::example::worker(&connected.url)?;
                eprintln!("worker    {} offers the handlers of fulfillment/order; Ctrl-C ends it", worker.name());
                worker.run(stop).await?;
                return Ok(());
            }
        };
        let stop = run::stop_signal()?;
        let run::Traced { sources, telemetry, .. } = run::telemetry(global, Role::Worker, "info", &command.trace)?;
        let Some(connected) = run::connect_until(global, &stop).await? else {
            return Ok(());
        };
        let _metrics = command.metrics.serve(None).await?;
        let mut builder = tasker_worker::Worker::builder(&connected.url)
            .namespace(command.namespace)
            .slots(command.slots)
            .drain_timeout(command.drain)
            .allow_http_hosts(command.http_hosts)
            .trace_settings(sources)
            .builtins();
        for queue in &command.queues {
            builder = builder.queue(Some(queue));
        }
        builder.build()?.run(stop).await?;
        telemetry.shutdown(FLUSH).await;
        Ok(())
    }
}
