//! `tasker trace enable`, `disable` and `status`.

use std::collections::BTreeMap;

use anyhow::bail;
use serde_json::{Value, json};
use tasker_api::sampling;
use tasker_orchestration::export::batches;
use tasker_shared::store::trace_settings;
use tasker_shared::telemetry::settings::{self, EVERYWHERE};
use tasker_shared::trace::config::{Key, Sources, Stored};

use crate::Global;
use crate::output::{self, Format, Table, cell};
use crate::run;
use crate::trace_flags::TraceFlags;

/// Switch the export of traces on for every process, also those that run, and keep it so.
///
/// What a process's own flags and environment say comes before it. Headers with secrets are never
/// stored: give them to the processes as `TASKER_TRACING_HEADERS`, or in the file that `TASKER_CONFIG`
/// names.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker trace enable --exporter otlp --otlp-endpoint http://localhost:4317
  tasker trace enable --exporter jaeger --jaeger-endpoint http://jaeger:4317 --sample-rate 0.1
  tasker trace enable --exporter file --trace-file /var/log/tasker/traces.jsonl
  tasker trace enable --detail full --areas db,messaging
  tasker trace enable --namespace orders --detail full
  tasker trace enable --set max_export_lag=6h --set query_url=http://jaeger:16686")]
pub struct Enable {
    #[command(flatten)]
    flags: TraceFlags,
    /// `tree`, or `full` for our own live spans too
    #[arg(long, value_name = "LEVEL", value_parser = ["tree", "full"])]
    detail: Option<String>,
    /// Which live spans of ours `full` makes: db, http, messaging, or none
    #[arg(long, value_name = "AREAS")]
    areas: Option<String>,
    /// Only for this namespace: its detail and areas
    #[arg(long, value_name = "NAME", conflicts_with_all = ["exporter", "otlp_endpoint", "jaeger_endpoint", "sample_rate", "service_name", "trace_file"])]
    namespace: Option<String>,
    /// Any setting of docs/reference/settings.md by its key; `KEY=default` forgets it; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Switch the export of traces off for every process, also those that run, and keep it so.
///
/// The trace of every task stays in the log: `tasker trace show` and `tasker trace replay` have it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tasker trace disable")]
pub struct Disable {}

/// Show what is stored, what it gives here, and what every running process makes of it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tasker trace status\n  tasker trace status -o json")]
pub struct Status {}

impl Enable {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let mut flags = self.flags.settings();
        flags.extend(self.detail.map(|detail| (Key::Detail, "--detail", detail)));
        flags.extend(self.areas.map(|areas| (Key::Areas, "--areas", areas)));
        let mut forgotten = Vec::new();
        for pair in &self.set {
            let Some((name, value)) = pair.split_once('=') else {
                bail!("--set {pair:?}: write KEY=VALUE");
            };
            let key = tasker_shared::trace::config::STORED.into_iter().find(|key| key.setting().name == name);
            let Some(key) = key else {
                bail!(
                    "--set {name}: there is no such setting, or it cannot be stored; docs/reference/settings.md lists them"
                );
            };
            match value {
                "default" => forgotten.push(key),
                value => flags.push((key, "--set", value.to_owned())),
            }
        }
        let scope = self.namespace.as_deref().unwrap_or(EVERYWHERE);
        if self.namespace.is_none() && !flags.iter().any(|(key, ..)| *key == Key::Enabled) {
            flags.push((Key::Enabled, "enable", "true".to_owned()));
        }
        let values = check(flags)?;
        let mut changes: BTreeMap<&str, Option<String>> =
            values.iter().map(|(key, value)| (key.setting().name, Some(value.clone()))).collect();
        changes.extend(forgotten.into_iter().map(|key| (key.setting().name, None)));
        if scope != EVERYWHERE && changes.keys().any(|key| !matches!(*key, "detail" | "areas")) {
            bail!("--namespace: only detail and areas are set for a namespace");
        }

        let connected = run::connect(global).await?;
        let mut conn = connected.client.pool().acquire().await?;
        trace_settings::set(&mut conn, scope, &changes).await?;
        if let Some((_, rate)) = values.iter().find(|(key, _)| *key == Key::SampleRate) {
            sampling::set(&mut conn, EVERYWHERE, Some(rate.parse()?)).await?;
        }
        show(&mut conn, global).await
    }
}

/// The values as they are stored; refuses what no process could use, with the flag that gave it.
fn check(flags: Vec<(Key, &'static str, String)>) -> anyhow::Result<Vec<(Key, String)>> {
    let sources = Sources { flags: flags.clone(), environment: false, file: None };
    let resolved = sources.resolve(&Stored::new())?;
    for warning in &resolved.warnings {
        if warning.0.contains(" is ignored: ") {
            bail!("{}", warning.0.replace(" is ignored", ""));
        }
        eprintln!("warning: {warning}");
    }
    Ok(flags
        .into_iter()
        .map(|(key, _, value)| match key {
            Key::SampleRate => (key, resolved.config.sample_rate.to_string()),
            _ => (key, value),
        })
        .collect())
}

impl Disable {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let connected = run::connect(global).await?;
        let mut conn = connected.client.pool().acquire().await?;
        let off = BTreeMap::from([("enabled", Some("false".to_owned()))]);
        trace_settings::set(&mut conn, EVERYWHERE, &off).await?;
        show(&mut conn, global).await
    }
}

impl Status {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let connected = run::connect(global).await?;
        let mut conn = connected.client.pool().acquire().await?;
        show(&mut conn, global).await
    }
}

/// What is stored, what it gives here, and the processes.
async fn show(conn: &mut sqlx::PgConnection, global: &Global) -> anyhow::Result<()> {
    let (sources, mut warnings) = Sources::of_process(Vec::new());
    let stored = trace_settings::all(conn).await?;
    let shares = sampling::all(conn).await?;
    let processes = trace_settings::processes(conn).await?;
    let aside = batches::set_aside(conn).await?;
    let here = settings::read(conn, &sources).await.map(|(resolved, _)| resolved);
    if let Ok(here) = &here {
        warnings.extend(here.warnings.clone());
    }
    if global.output == Format::Json {
        return output::json(&json!({
            "stored": stored.iter().map(|row| json!({
                "scope": row.scope, "key": row.key, "value": row.value, "set_at": row.set_at, "set_by": row.set_by,
            })).collect::<Vec<_>>(),
            "shares": shares.iter().map(|(namespace, share)| json!({"namespace": namespace, "share": share})).collect::<Vec<_>>(),
            "here": match &here {
                Ok(resolved) => settings::describe(resolved),
                Err(error) => json!({"problem": error.to_string()}),
            },
            "processes": processes.iter().map(|process| json!({
                "process": process.process, "kind": process.kind, "name": process.name, "version": process.version,
                "started_at": process.started_at, "seen_seconds": process.seen_seconds, "state": process.state,
            })).collect::<Vec<_>>(),
            "set_aside": {
                "batches": aside.batches, "spans": aside.spans, "oldest_at": aside.oldest_at,
                "newest_at": aside.newest_at, "newest_reason": aside.reason,
            },
        }));
    }
    let mut table = Table::new(["stored", "value", "for", "by", "at"]);
    for row in &stored {
        let scope =
            if row.scope == EVERYWHERE { "every process".to_owned() } else { format!("namespace {}", row.scope) };
        table.row([row.key.clone(), cell(Some(&row.value)), scope, cell(Some(&row.set_by)), output::time(row.set_at)]);
    }
    for (namespace, share) in &shares {
        let scope = if namespace == EVERYWHERE { "new tasks".to_owned() } else { format!("new tasks of {namespace}") };
        table.row(["share".into(), share.to_string(), scope, "-".into(), "-".into()]);
    }
    table.print("nothing is stored; a process goes by its flags, its environment and its file")?;
    output::line("")?;
    match &here {
        Ok(resolved) => output::line(format!("here: {}", words(&settings::describe(resolved))))?,
        Err(error) => output::line(format!("here: {error}"))?,
    }
    for warning in warnings {
        output::line(format!("  warning: {warning}"))?;
    }
    output::line("")?;
    let mut table = Table::new(["process", "kind", "traces", "because of", "receiver", "exported", "waiting", "seen"]);
    for process in &processes {
        let (state, health) = (&process.state, &process.state["health"]);
        let because = match (&state["problem"], state["given_in_code"].as_bool()) {
            (Value::String(problem), _) => problem.clone(),
            (_, Some(true)) => "given in code".into(),
            _ => origins(state),
        };
        let figure = |key: &str, live: &str| {
            let found = if health[key].is_null() { &health[live] } else { &health[key] };
            if found.is_null() { "-".to_owned() } else { found.to_string() }
        };
        table.row([
            cell(Some(&process.name)),
            process.kind.clone(),
            words(state),
            cell(Some(&because)),
            cell(health["receiver"].as_str()),
            figure("exported", "live_exported"),
            figure("waiting_rows", ""),
            format!("{:.0}s ago", process.seen_seconds),
        ]);
    }
    table.print("no process runs")?;
    for process in &processes {
        let health = &process.state["health"];
        for (key, what) in [
            ("problem", "its receiver does not take spans"),
            ("rejected_because", "its receiver dropped spans that it took, or warned"),
        ] {
            if let Some(said) = health[key].as_str() {
                output::line(format!("{}: {what}: {}", process.name, cell(Some(said))))?;
            }
        }
    }
    if let (Some(oldest), Some(newest)) = (aside.oldest_at, aside.newest_at) {
        output::line(format!(
            "set aside: {} spans of {} transactions, which a receiver refused for good, from {} to {} UTC; the last because: {}\n  \
             `tasker trace replay --refused` sends them again",
            aside.spans,
            aside.batches,
            output::time(oldest),
            output::time(newest),
            cell(aside.reason.as_deref())
        ))?;
    }
    Ok(())
}

/// One line about a configuration.
fn words(state: &Value) -> String {
    let text = |key: &str| state[key].as_str().unwrap_or_default().to_owned();
    if state["enabled"] != Value::Bool(true) {
        return "off".into();
    }
    let areas =
        if text("detail") == "full" { format!(", live spans of ours: {}", text("areas")) } else { String::new() };
    format!("{} to {}{areas}", text("exporter"), text("to"))
}

/// Which sources decided, in few words.
fn origins(state: &Value) -> String {
    let of = |key: &str| state["from"][key]["as"].as_str();
    let mut found: Vec<&str> = ["enabled", "exporter", "endpoint"].into_iter().filter_map(of).collect();
    found.dedup();
    if found.is_empty() { "default".into() } else { found.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(endpoint: &str, rate: &str) -> Vec<(Key, &'static str, String)> {
        TraceFlags { otlp_endpoint: Some(endpoint.into()), sample_rate: Some(rate.into()), ..TraceFlags::default() }
            .settings()
    }

    #[test]
    fn what_no_process_could_use_is_refused_with_its_flag() {
        assert!(check(flags("http://c:4317", "0.5")).is_ok());
        let refused = |endpoint: &str, rate: &str| check(flags(endpoint, rate)).unwrap_err().to_string();
        assert!(refused("ftp://c", "1").starts_with("--otlp-endpoint: only http"), "{}", refused("ftp://c", "1"));
        assert_eq!(refused("http://c", "half"), "--sample-rate=half: it must be a number from 0 to 1");
    }

    #[test]
    fn a_share_outside_is_clamped_before_it_is_stored() {
        let values = check(flags("http://c:4317", "7")).unwrap();
        assert!(values.contains(&(Key::SampleRate, "1".to_owned())), "{values:?}");
    }

    #[test]
    fn an_endpoint_names_its_exporter() {
        let settings = TraceFlags { jaeger_endpoint: Some("http://j:4317".into()), ..TraceFlags::default() }.settings();
        assert_eq!(settings[0], (Key::Enabled, "--jaeger-endpoint", "true".to_owned()));
        assert_eq!(settings[1], (Key::Exporter, "--jaeger-endpoint", "jaeger".to_owned()));
        assert_eq!(TraceFlags::default().settings(), []);
    }
}
