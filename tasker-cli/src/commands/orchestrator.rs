//! `tasker orchestrator`.

use std::path::PathBuf;
use std::time::Duration;

use tasker_orchestration::{Options, Orchestrator as Running};
use tasker_shared::telemetry::Role;

use crate::trace_flags::TraceFlags;
use crate::{Global, run};

/// How long the spans of the last batches may take to be acknowledged.
pub const FLUSH: Duration = Duration::from_secs(10);

/// Run orchestrators: they decide what happens next.
#[derive(Debug, clap::Subcommand)]
pub enum Orchestrator {
    /// Run one until Ctrl-C or SIGTERM; any number may share a database
    Run(Run),
}

/// Run one orchestrator until it is told to stop; then it finishes what it has begun.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker orchestrator run
  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 tasker orchestrator run
  DATABASE_URL=postgresql://localhost/tasker tasker orchestrator run --log-format json")]
pub struct Run {
    /// Messages settled in one transaction, at most
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    batch: i32,
    /// Loops that settle results side by side
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    settlers: u16,
    /// Where retention archives tasks before it removes them, as JSON lines, a file a day
    #[arg(long, env = "TASKER_ARCHIVE_DIR", value_name = "FOLDER")]
    archive_dir: Option<PathBuf>,
    #[command(flatten)]
    metrics: run::Metrics,
    #[command(flatten)]
    trace: TraceFlags,
}

impl Orchestrator {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let Self::Run(Run { batch, settlers, archive_dir, metrics, trace }) = self;
        let stop = run::stop_signal()?;
        let run::Traced { config, sources, telemetry } = run::telemetry(global, Role::Orchestrator, "info", &trace)?;
        let Some(connected) = run::connect_until(global, &stop).await? else {
            return Ok(());
        };
        let _metrics = metrics.serve(Some(connected.client.pool().clone())).await?;
        let options = Options { trace: config, settings: Some(sources), batch, settlers: settlers.into(), archive_dir };
        let orchestrator = Running::start(&connected.url, &options).await?;
        tracing::info!("the orchestrator runs");
        stop.cancelled().await;
        tracing::info!("stopping: the batches that have begun are finished");
        orchestrator.shutdown(FLUSH).await;
        telemetry.shutdown(FLUSH).await;
        Ok(())
    }
}
