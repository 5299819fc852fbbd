//! `tasker trace`.

use tasker_shared::trace::config::TraceConfig;
use tasker_shared::trace::{otlp, tree};

use crate::Global;
use crate::output::{self, Format};
use crate::run;
use crate::waterfall::{Detail, Waterfall};

/// Look at the trace of a task.
#[derive(Debug, clap::Subcommand)]
pub enum Trace {
    /// Draw the trace of a task, also while it runs
    Show(Show),
}

/// Draw the trace of a task from the committed log, also while it runs. It is the trace that is
/// exported, span for span.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker trace show ORD-4711            attempts, handlers and waits
  tasker trace show ORD-4711 --tree     every span
  tasker trace show ORD-4711 --json     OTLP JSON, as any OpenTelemetry tool reads it")]
pub struct Show {
    /// Uuid or correlation id
    task: String,
    /// Every span, state transitions too
    #[arg(long, conflicts_with = "json")]
    tree: bool,
    /// OTLP JSON of the spans that have ended, as they are exported; same as -o json
    #[arg(long)]
    json: bool,
}

impl Trace {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let Self::Show(Show { task, tree: every, json }) = self;
        let connected = run::connect(global).await?;
        let id = run::find_task(&connected.client, &task).await?;
        let (log, now) = connected.client.log(id).await?;
        if json || global.output == Format::Json {
            let (config, _) = TraceConfig::from_env()?;
            return output::json(&otlp::to_json(&[tree::spans(&log)], &config.service_names));
        }
        let detail = if every { Detail::Every } else { Detail::Main };
        output::line(Waterfall::new(&tree::spans_so_far(&log, now), detail).text(output_width()))
    }
}

/// The terminal's width; 120 where there is none.
pub fn output_width() -> usize {
    let term = console::Term::stdout();
    term.size_checked().map_or(120, |(_, columns)| usize::from(columns)).max(60)
}
