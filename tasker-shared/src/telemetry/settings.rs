//! Stored settings, and the process that follows them.
//!
//! Each process reads what is stored when it starts, when it is woken and every few seconds,
//! makes its tracing so, and says in a row of its own what it does. A change that cannot be used
//! leaves everything as it is, and the row says why.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::live;
use crate::store;
use crate::store::trace_settings::{self, ByScope};
use crate::trace::config::{Areas, Resolved, SETTINGS, Sources, Stored, TraceConfig};

/// The scope of what holds for every process.
pub const EVERYWHERE: &str = "*";
/// How long a change takes to reach a process that could not be woken.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The settings given to a process, and those it finds stored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A value that cannot be used.
    #[error(transparent)]
    Config(#[from] crate::trace::config::ConfigError),
}

/// The configuration that `sources` and the database give now, and what is stored by scope.
pub async fn read(conn: &mut PgConnection, sources: &Sources) -> Result<(Resolved, ByScope), Error> {
    let scopes = trace_settings::by_scope(conn).await?;
    let resolved = sources.resolve(scopes.get(EVERYWHERE).unwrap_or(&Stored::new()))?;
    Ok((resolved, scopes))
}

/// A new configuration being made to hold; it says why it cannot.
pub type Applying = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// One process that follows the stored settings and says what it does.
#[derive(Debug)]
pub struct Follower {
    /// Any pool of the process; one connection is taken for a moment every few seconds.
    pub pool: PgPool,
    /// `orchestrator`, `worker` or `api`.
    pub kind: &'static str,
    /// The process's name for people.
    pub name: String,
    /// Of the program.
    pub version: String,
    /// Where the configuration comes from; `None` if it was given in code and never changes.
    pub sources: Option<Sources>,
    /// What the process does when it begins to follow.
    pub now: Resolved,
    /// Someone changed the settings.
    pub wake: Arc<Notify>,
}

impl Follower {
    /// Follows until `stop` fires. `apply` makes a new configuration hold, or says why it cannot;
    /// `health` is what the process has to say about its exports.
    pub async fn run(
        mut self,
        apply: impl Fn(TraceConfig) -> Applying,
        health: impl Fn() -> Value,
        stop: CancellationToken,
    ) {
        let process = Uuid::new_v4();
        let mut seen: Option<ByScope> = None;
        let mut problem = None;
        while !stop.is_cancelled() {
            let turn = async {
                let mut conn = self.pool.acquire().await?;
                if self.sources.is_some() {
                    let scopes = trace_settings::by_scope(&mut conn).await?;
                    if seen.as_ref() != Some(&scopes) {
                        problem = self.take_over(&scopes, &apply).await.err();
                        if let Some(problem) = &problem {
                            tracing::warn!(problem, "the trace settings could not be taken over; the former ones hold");
                        }
                        seen = Some(scopes);
                    }
                }
                let state = self.state(problem.as_deref(), health());
                trace_settings::report(&mut conn, process, self.kind, &self.name, &self.version, &state).await
            };
            if let Err(error) = turn.await {
                tracing::debug!(%error, "the trace settings could not be read; trying again");
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.wake.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
        if let Ok(Ok(mut conn)) = tokio::time::timeout(Duration::from_secs(1), self.pool.acquire()).await {
            let _ = trace_settings::ended(&mut conn, process).await;
        }
    }

    async fn take_over(&mut self, scopes: &ByScope, apply: &impl Fn(TraceConfig) -> Applying) -> Result<(), String> {
        let Some(sources) = &self.sources else { return Ok(()) };
        let stored = scopes.get(EVERYWHERE).cloned().unwrap_or_default();
        let resolved = sources.resolve(&stored).map_err(|error| error.to_string())?;
        for warning in resolved.warnings.iter().filter(|warning| !self.now.warnings.contains(warning)) {
            tracing::warn!("{warning}");
        }
        let own: BTreeMap<String, Areas> = scopes
            .iter()
            .filter(|(scope, _)| *scope != EVERYWHERE)
            .filter_map(|(scope, values)| {
                let mut merged = stored.clone();
                merged.extend(values.clone());
                Some((scope.clone(), sources.resolve(&merged).ok()?.config.areas()))
            })
            .collect();
        live::set_namespaces(&own);
        if resolved.config != self.now.config {
            apply(resolved.config.clone()).await?;
            tracing::info!(
                enabled = resolved.config.enabled,
                to = resolved.config.destination(),
                "the trace settings were changed"
            );
        }
        self.now = resolved;
        Ok(())
    }

    /// What `tasker trace status` shows of this process. No secret, and no header.
    fn state(&self, problem: Option<&str>, health: Value) -> Value {
        let mut state = describe(&self.now);
        state["given_in_code"] = json!(self.sources.is_none());
        state["problem"] = json!(problem);
        state["health"] = health;
        state
    }
}

/// A configuration for people: values by the names of settings, and where they came from.
pub fn describe(resolved: &Resolved) -> Value {
    let config = &resolved.config;
    let from: serde_json::Map<String, Value> = SETTINGS
        .iter()
        .filter_map(|setting| {
            let (source, label) = resolved.origin(setting.key);
            (!label.is_empty()).then(|| (setting.name.to_owned(), json!({"source": source.to_string(), "as": label})))
        })
        .collect();
    json!({
        "enabled": config.enabled,
        "exporter": config.exporter.to_string(),
        "to": config.destination(),
        "protocol": match config.protocol {
            crate::trace::config::Protocol::Grpc => "grpc",
            crate::trace::config::Protocol::HttpProtobuf => "http/protobuf",
        },
        "headers": config.headers.iter().map(|(name, _)| format!("{name}=***")).collect::<Vec<_>>(),
        "timeout_ms": u64::try_from(config.timeout.as_millis()).unwrap_or(u64::MAX),
        "max_export_lag_s": config.max_export_lag.map(|lag| lag.as_secs()),
        "sample_rate": config.sample_rate,
        "service_name": config.service_name,
        "service_orchestration": config.service_names.orchestration,
        "service_worker": config.service_names.worker,
        "detail": match config.detail {
            crate::trace::config::Detail::Tree => "tree",
            crate::trace::config::Detail::Full => "full",
        },
        "areas": config.areas().to_string(),
        "baggage": config.baggage_keys,
        "from": from,
        "warnings": resolved.warnings.iter().map(|warning| warning.0.clone()).collect::<Vec<_>>(),
    })
}

/// A name for this process that people can find: host and process id.
pub fn process_name() -> String {
    let system = rustix::system::uname();
    format!("{}-{}", system.nodename().to_string_lossy(), std::process::id())
}
