//! `tasker trace replay`.

use std::time::Duration;

use tasker_orchestration::export::{batches, log, sampling, split};
use tasker_shared::store::transitions;
use tasker_shared::trace::otlp::Encoder;
use tasker_shared::trace::transport::{Transport, Verdict};

use super::Which;
use crate::Global;
use crate::failure::{FAILED, failure};
use crate::output;
use crate::run;

/// A request is closed at this size, as the orchestrators' are.
const MAX_REQUEST_BYTES: usize = 2 * 1024 * 1024;
const TRIES: u32 = 6;

/// Send the spans of tasks to the collector again, with the ids and the content they always have:
/// after a backend lost them, or to fill a new one. What has not ended is not sent. Backends that
/// kept the first copy may show each span twice.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker trace replay --since 2h       every task created in the last two hours
  tasker trace replay --task ORD-4711
  tasker trace replay --refused        what a receiver refused for good, through the orchestrators
  OTEL_EXPORTER_OTLP_ENDPOINT=http://new:4318 tasker trace replay --since 2030-01-31T00:00:00Z")]
pub struct Replay {
    #[command(flatten)]
    which: Which,
    /// Uuid or correlation id; may be given several times
    #[arg(long = "task", value_name = "TASK", conflicts_with = "since")]
    named: Vec<String>,
    /// What was set aside because a receiver refused it: the orchestrators send it where they send everything
    #[arg(long, conflicts_with_all = ["tasks", "named", "correlation_id", "since"])]
    refused: bool,
}

impl Replay {
    /// Runs it.
    pub async fn run(mut self, global: &Global) -> anyhow::Result<()> {
        self.which.tasks.append(&mut self.named);
        let connected = run::connect(global).await?;
        if self.refused {
            let mut conn = connected.client.pool().acquire().await?;
            let mut batches = 0;
            loop {
                match batches::send_again(&mut conn).await? {
                    0 => break,
                    some => batches += some,
                }
            }
            return output::line(format!(
                "{batches} transactions were given back to the orchestrators, which send their spans again; `tasker trace status` says what is refused once more"
            ));
        }
        let config = super::config(&connected.client).await?;
        anyhow::ensure!(
            config.enabled,
            "tracing is off: `tasker trace enable --otlp-endpoint URL`, or set OTEL_EXPORTER_OTLP_ENDPOINT to where the spans are to go"
        );
        let transport = Transport::connect(&config)?;
        let mut encoder = Encoder::new(&config.service_names);
        let mut pages = self.which.pages(&connected.client).await?;
        let (mut tasks, mut spans, mut skipped) = (0, 0, 0);
        loop {
            let page = pages.next(&connected.client).await?;
            if page.is_empty() {
                break;
            }
            for task in page {
                let mut conn = connected.client.pool().acquire().await?;
                let logs = transitions::logs(&mut conn, &[task]).await?;
                let kept = log::kept(&mut conn, &logs).await?;
                for log in logs {
                    let Some(task) = sampling::exported(&log, kept.get(&task)) else {
                        skipped += 1;
                        continue;
                    };
                    tasks += 1;
                    spans += task.spans.len();
                    let mut next = 0;
                    while next < task.spans.len() {
                        next = encoder.push_from(&task, next, MAX_REQUEST_BYTES);
                        if encoder.bytes_len() >= MAX_REQUEST_BYTES {
                            send(&transport, &mut encoder).await?;
                        }
                    }
                }
            }
            send(&transport, &mut encoder).await?;
        }
        output::line(format!(
            "{spans} spans of {tasks} tasks were sent and acknowledged; {skipped} tasks are not sampled"
        ))
    }
}

async fn send(transport: &Transport, encoder: &mut Encoder) -> anyhow::Result<()> {
    if encoder.spans() == 0 {
        return Ok(());
    }
    let mut requests = vec![encoder.finish()];
    while let Some(request) = requests.pop() {
        let mut wait = Duration::from_millis(200);
        for attempt in 1.. {
            match transport.send(request.clone()).await {
                Ok(accepted) if accepted.rejected_spans == 0 => break,
                Ok(accepted) => {
                    let why = accepted.message.unwrap_or_default();
                    let problem = format!("the receiver refused {} spans: {why}", accepted.rejected_spans);
                    return Err(failure(FAILED, problem));
                }
                Err(error)
                    if error.verdict == Verdict::TooLarge
                        && let Some((first, second)) = split(&request) =>
                {
                    requests.extend([second, first]);
                    break;
                }
                Err(error) if error.retryable && attempt < TRIES => {
                    tokio::time::sleep(error.retry_after.unwrap_or(wait).min(Duration::from_secs(30))).await;
                    wait *= 2;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}
