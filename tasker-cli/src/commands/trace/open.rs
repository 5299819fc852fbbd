//! `tasker trace open`.

use std::process::{Command, Stdio};

use tasker_shared::store::details;
use tasker_shared::trace::otlp::hex;

use crate::Global;
use crate::commands::api::trace_url;
use crate::failure::{FAILED, NOT_FOUND, failure};
use crate::output;
use crate::run;

/// Show a task's trace on the page of your own backend: print the link, and on a terminal open a
/// browser with it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker trace open ORD-4711 --trace-url 'http://localhost:16686/trace/{trace_id}'
  tasker trace open ORD-4711 --print     the link only; from TASKER_TRACE_URL or the stored query_url")]
pub struct Open {
    /// Uuid or correlation id
    task: String,
    /// Where a trace can be looked at, with `{trace_id}` in it; Jaeger's page at the stored `query_url` if not given
    #[arg(long, env = "TASKER_TRACE_URL", value_name = "URL", value_parser = trace_url)]
    trace_url: Option<String>,
    /// Open no browser
    #[arg(long)]
    print: bool,
}

impl Open {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let connected = run::connect(global).await?;
        let task = run::find_task(&connected.client, &self.task).await?;
        let mut conn = connected.client.pool().acquire().await?;
        let (trace_id, _, flags) = details::root_span(&mut conn, task)
            .await?
            .ok_or_else(|| failure(NOT_FOUND, format!("there is no task {task}")))?;
        let url = match self.trace_url {
            Some(url) => url,
            None => of_query_url(super::config(&connected.client).await?.query_url.as_deref()).ok_or_else(|| {
                failure(
                    FAILED,
                    "nothing says where traces can be looked at: give --trace-url 'http://host/trace/{trace_id}', or store \
                     the backend with `tasker trace enable --set query_url=http://jaeger:16686`",
                )
            })?,
        };
        if flags & 1 == 0 {
            eprintln!("this trace was not sampled: the backend has it only if it was kept for its end");
        }
        let link = url.replace("{trace_id}", &hex(&trace_id));
        output::line(&link)?;
        if !self.print && console::Term::stdout().is_term() && !browse(&link) {
            eprintln!("no browser could be opened; follow the link");
        }
        Ok(())
    }
}

/// Jaeger's page stands beside its query API. A URL with a place for the trace's id is an API's.
fn of_query_url(url: Option<&str>) -> Option<String> {
    let url = url.filter(|url| !url.contains("{trace_id}"))?;
    Some(format!("{}/trace/{{trace_id}}", url.trim_end_matches("/api/v3").trim_end_matches('/')))
}

fn browse(link: &str) -> bool {
    let programs: &[&str] = if cfg!(target_os = "macos") { &["open"] } else { &["xdg-open", "wslview"] };
    let open = |program: &&str| {
        let silent = || Stdio::null();
        Command::new(program).arg(link).stdin(silent()).stdout(silent()).stderr(silent()).spawn().is_ok()
    };
    programs.iter().any(open)
}
