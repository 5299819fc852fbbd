//! `tasker trace doctor`.

use std::time::Instant;

use serde_json::json;
use tasker_orchestration::export::batches;
use tasker_shared::store::trace_settings;
use tasker_shared::telemetry::settings;
use tasker_shared::trace::config::Sources;
use tasker_shared::trace::otlp::hex;
use tasker_shared::trace::transport::{self, Transport};

use crate::Global;
use crate::failure::{FAILED, failure};
use crate::output::{self, Format};
use crate::run;
use crate::trace_flags::TraceFlags;

/// Spans older than this that still wait are worth a word.
const LATE_SECONDS: f64 = 60.0;

/// Check the way of traces: what is configured here, whether the receiver can be reached, whether
/// it takes a span, and whether spans wait. Exit code 1 if anything is wrong.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker trace doctor
  tasker trace doctor --otlp-endpoint http://localhost:4317")]
pub struct Doctor {
    #[command(flatten)]
    flags: TraceFlags,
}

struct Finding {
    what: &'static str,
    ok: bool,
    words: String,
}

impl Doctor {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let (sources, warnings) = Sources::of_process(self.flags.settings());
        let connected = run::connect(global).await?;
        let mut conn = connected.client.pool().acquire().await?;
        let mut findings = Vec::new();
        let mut find = |what, ok, words: String| findings.push(Finding { what, ok, words });
        match settings::read(&mut conn, &sources).await {
            Err(error) => find("settings", false, error.to_string()),
            Ok((resolved, _)) => {
                for warning in warnings.iter().chain(&resolved.warnings) {
                    find("settings", false, warning.to_string());
                }
                let config = &resolved.config;
                let (source, label) = resolved.origin(tasker_shared::trace::config::Key::Enabled);
                if config.enabled {
                    find("settings", true, format!("{} to {}", config.exporter, config.destination()));
                    if config.exporter.is_remote() {
                        match transport::reach(config).await {
                            Ok(place) => find("connection", true, format!("{place} accepts connections")),
                            Err(error) => find(
                                "connection",
                                false,
                                format!("{}; is the collector running, and is the port right?", error.message),
                            ),
                        }
                    }
                    let (ok, words) = export(config).await;
                    find("a probe span", ok, words);
                } else {
                    let because = match label {
                        "" => "nothing switches it on".to_owned(),
                        label => format!("{label}, {source}"),
                    };
                    let words = format!("tracing is off ({because}); `tasker trace enable` switches it on");
                    find("settings", false, words);
                }
            }
        }
        let waiting = batches::waiting(&mut conn).await?;
        let late = waiting.oldest_seconds.unwrap_or(0.0);
        find(
            "spans that wait",
            late < LATE_SECONDS,
            match waiting.batches {
                0 => "none".to_owned(),
                n => format!("{n} batch{}, the oldest for {late:.0} s", if n == 1 { "" } else { "es" }),
            },
        );
        let aside = batches::set_aside(&mut conn).await?;
        if let Some(reason) = &aside.reason {
            let words = format!(
                "{} of {} transactions; the last because: {reason}; `tasker trace replay --refused` sends them again",
                aside.spans, aside.batches
            );
            find("spans that were refused", false, words);
        }
        for process in trace_settings::processes(&mut conn).await? {
            let problem = process.state["problem"].as_str().map(str::to_owned);
            let down = (process.state["health"]["receiver"] == "down").then(|| {
                let why = process.state["health"]["problem"].as_str().unwrap_or("it does not answer");
                format!("its receiver does not take spans: {why}")
            });
            if let Some(problem) = problem.or(down) {
                find("a running process", false, format!("{}: {problem}", process.name));
            }
        }
        report(global, &findings)
    }
}

fn report(global: &Global, findings: &[Finding]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        let rows: Vec<_> =
            findings.iter().map(|found| json!({"what": found.what, "ok": found.ok, "words": found.words})).collect();
        output::json(&rows)?;
    } else {
        for found in findings {
            let mark = if found.ok { "ok  " } else { "BAD " };
            output::line(format!("{mark} {}: {}", found.what, output::cell(Some(&found.words))))?;
        }
    }
    match findings.iter().filter(|found| !found.ok).count() {
        0 => Ok(()),
        1 => Err(failure(FAILED, "one thing is wrong with the way of traces")),
        n => Err(failure(FAILED, format!("{n} things are wrong with the way of traces"))),
    }
}

/// Exports one span, and says how to find it.
async fn export(config: &tasker_shared::trace::config::TraceConfig) -> (bool, String) {
    let transport = match Transport::connect(config) {
        Ok(transport) => transport,
        Err(error) => return (false, error.to_string()),
    };
    let (request, trace_id) = transport::probe(&config.service_names.orchestration);
    let began = Instant::now();
    match transport.send(request).await {
        Ok(accepted) if accepted.rejected_spans > 0 => {
            (false, format!("the receiver answered and refused it: {}", accepted.message.unwrap_or_default()))
        }
        Ok(_) => (true, format!("acknowledged in {} ms; its trace is {}", began.elapsed().as_millis(), hex(&trace_id))),
        Err(error) => (false, error.to_string()),
    }
}
