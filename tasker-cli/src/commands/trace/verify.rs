//! `tasker trace verify`.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
use serde_json::json;
use tasker_orchestration::export::{log, sampling};
use tasker_shared::store::{transitions, views};
use tasker_shared::trace::config::TraceConfig;
use tasker_shared::trace::otlp::hex;
use tasker_shared::trace::span::TraceId;
use tasker_shared::trace::transport::tls_config;
use tasker_testing::{Difference, Trace, compare};

use super::Which;
use crate::Global;
use crate::failure::{FAILED, failure};
use crate::output::{self, Format};
use crate::run;

/// Sentences shown of each kind.
const SHOWN: usize = 20;

/// Compare what the log says of ended tasks with what a backend or a file holds: missing, extra,
/// orphan, misparented and differing spans. Exit code 1 if there is any.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker trace verify --since 1h --against http://localhost:16686    Jaeger's query API, or Tempo's
  tasker trace verify ORD-4711 --against spans.otlp.json             what a collector's file exporter wrote
  tasker trace verify --since 1h --against 'http://traces:3200/api/traces/{trace_id}'")]
pub struct Verify {
    #[command(flatten)]
    which: Which,
    /// A file of OTLP JSON or Jaeger JSON, or the URL of a query API; `{trace_id}` in it is
    /// replaced, else `/api/traces/{trace_id}` is asked for
    #[arg(long, value_name = "FILE|URL")]
    against: String,
}

impl Verify {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let backend = Backend::open(&self.against)?;
        let connected = run::connect(global).await?;
        let config = super::config(&connected.client).await?;
        let mut pages = self.which.pages(&connected.client).await?;
        let (mut found, mut tasks, mut running, mut unsampled) = (Difference::default(), 0, 0, 0);
        loop {
            let page = pages.next(&connected.client).await?;
            if page.is_empty() {
                break;
            }
            let mut conn = connected.client.pool().acquire().await?;
            let ended = views::finished(&mut conn, &page).await?;
            running += page.len() - ended.len();
            let logs = transitions::logs(&mut conn, &ended).await?;
            let kept = log::kept(&mut conn, &logs).await?;
            for log in logs {
                let Some(spans) = sampling::exported(&log, kept.get(&log.head.task_uuid)) else {
                    unsampled += 1;
                    continue;
                };
                tasks += 1;
                let there = backend.trace(log.head.trace_id).await?;
                found.add(compare(&Trace::of_spans(&spans, &config.service_names), &there));
            }
        }
        self.report(global, &found, tasks, running, unsampled)
    }

    fn report(
        &self,
        global: &Global,
        found: &Difference,
        tasks: usize,
        running: usize,
        unsampled: usize,
    ) -> anyhow::Result<()> {
        let lists = [&found.missing, &found.extra, &found.orphan, &found.misparented, &found.differing];
        if global.output == Format::Json {
            let mut out = json!({
                "tasks": tasks, "matched": found.matched, "duplicates": found.duplicates,
                "remote_parents_missing": found.remote_parents_missing,
                "still_running": running, "not_sampled": unsampled,
            });
            for ((name, n), list) in found.counts().iter().zip(lists) {
                out[*name] = json!({"count": n, "spans": list.iter().take(SHOWN).collect::<Vec<_>>()});
            }
            output::json(&out)?;
        } else {
            for ((name, n), list) in found.counts().iter().zip(lists) {
                for sentence in list.iter().take(SHOWN) {
                    output::line(format!("{name}: {sentence}"))?;
                }
                if *n > SHOWN {
                    output::line(format!("{name}: and {} more", n - SHOWN))?;
                }
            }
            let counts: Vec<String> = found.counts().iter().map(|(name, n)| format!("{n} {name}")).collect();
            output::line(format!(
                "{tasks} tasks, {} spans as the log has them; {}; {} harmless duplicates, {} callers' spans not there",
                found.matched,
                counts.join(", "),
                found.duplicates,
                found.remote_parents_missing
            ))?;
            if running + unsampled > 0 {
                output::line(format!(
                    "not compared: {running} tasks that still run, {unsampled} that are not sampled"
                ))?;
            }
        }
        if found.is_none() {
            return Ok(());
        }
        Err(failure(FAILED, format!("{} does not hold what the log says", self.against)))
    }
}

enum Backend {
    File(HashMap<TraceId, Trace>),
    Url { client: reqwest::Client, url: String },
}

impl Backend {
    fn open(against: &str) -> anyhow::Result<Self> {
        if against.starts_with("http://") || against.starts_with("https://") {
            let client = reqwest::Client::builder()
                .tls_backend_preconfigured(tls_config(&TraceConfig::from_env()?.0)?)
                .timeout(std::time::Duration::from_secs(30))
                .build()?;
            let url = if against.contains("{trace_id}") {
                against.to_owned()
            } else {
                format!("{}/api/traces/{{trace_id}}", against.trim_end_matches('/'))
            };
            return Ok(Self::Url { client, url });
        }
        let mut traces: HashMap<TraceId, Trace> = HashMap::new();
        for span in Trace::from_file(Path::new(against))?.spans {
            traces.entry(span.trace_id).or_default().spans.push(span);
        }
        Ok(Self::File(traces))
    }

    async fn trace(&self, id: TraceId) -> anyhow::Result<Trace> {
        match self {
            Self::File(traces) => Ok(traces.get(&id).cloned().unwrap_or_default()),
            Self::Url { client, url } => {
                let url = url.replace("{trace_id}", &hex(&id));
                let asked = client.get(&url).header("accept", "application/json").send().await;
                let answer = asked.with_context(|| format!("{url} does not answer"))?;
                // It holds nothing of it: every span is missing.
                if answer.status() == reqwest::StatusCode::NOT_FOUND {
                    return Ok(Trace::default());
                }
                let text = answer.error_for_status()?.text().await?;
                Ok(Trace::from_json(&text)?.only(|span| span.trace_id == id))
            }
        }
    }
}
