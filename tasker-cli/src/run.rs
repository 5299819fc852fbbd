//! What commands share: the database, the trace configuration, and how a process is told to stop.

use std::time::Duration;

use anyhow::Context as _;
use sqlx::{Connection as _, PgConnection, PgPool};
use tasker_api::gauges::Scrape;
use tasker_shared::client::Client;
use tasker_shared::metrics::{self, Listen, Serving};
use tasker_shared::migrate;
use tasker_shared::postgres::Database;
use tasker_shared::server;
use tasker_shared::store::redaction;
use tasker_shared::store::tx::{self, PoolOptions};
use tasker_shared::telemetry::{self, Role, Telemetry};
use tasker_shared::trace::config::{Sources, Stored, TraceConfig};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::Global;
use crate::failure::{NOT_FOUND, UNREACHABLE, failure};
use crate::trace_flags::TraceFlags;

/// A migrated database, and a client of it. The managed server runs as long as this lives.
pub struct Connected {
    /// For processes that open connections of their own.
    pub url: String,
    /// For everything else.
    pub client: Client,
    _server: Database,
}

/// Who is asking, for the audit; the database's user otherwise.
pub fn actor() -> Option<String> {
    std::env::var("USER").ok().filter(|user| !user.is_empty())
}

/// Opens the database that the flags or the environment name, and migrates it.
pub async fn connect(global: &Global) -> anyhow::Result<Connected> {
    let (server, pool, _) = migrated(global).await?;
    redaction::load(&pool).await?;
    Ok(Connected { url: server.url(), client: Client::from_pool(pool), _server: server })
}

/// As [`connect`], for a command that works until it is told to stop: also looks whether everything
/// that it needs is there. `None` if it was told before.
pub async fn connect_until(global: &Global, stop: &CancellationToken) -> anyhow::Result<Option<Connected>> {
    let connecting = async {
        let connected = connect(global).await?;
        server::ready(connected.client.pool()).await?;
        anyhow::Ok(connected)
    };
    let connected = stop.run_until_cancelled(Box::pin(connecting)).await.transpose()?;
    if connected.is_none() {
        tracing::info!("told to stop before it was connected");
    }
    Ok(connected)
}

/// Opens the database that the flags or the environment name, and migrates it; says what that did.
pub async fn migrated(global: &Global) -> anyhow::Result<(Database, PgPool, migrate::Report)> {
    // A command whose own output says everything else neither waits nor panics in silence. This is
    // of no effect where a command has asked for more.
    let quiet = "off,tasker_shared::migrate=warn,tasker_shared::telemetry=error";
    telemetry::init_at(Role::Cli, &TraceConfig::default(), global.log_format.into(), quiet);
    let server = open(global).await?;
    let url = server.url();
    // A pool would try again until its time is up, and then not say why.
    let first = tokio::time::timeout(Duration::from_secs(10), PgConnection::connect(&url)).await;
    first
        .map_err(|_| failure(UNREACHABLE, "the database does not answer within 10 s"))?
        .map_err(server::Error::from)
        .context("the database cannot be reached")?
        .close()
        .await?;
    let options = PoolOptions { application_name: "tasker-cli", ..PoolOptions::default() };
    let pool = tx::pool(&url, &options).await.map_err(server::Error::from).context("the database cannot be reached")?;
    let report = migrate::migrate(&pool).await?;
    Ok((server, pool, report))
}

/// Opens the database without connecting to it.
pub async fn open(global: &Global) -> anyhow::Result<Database> {
    if let Some(url) = global.database_url.clone().filter(|url| !url.is_empty()) {
        return Ok(Database::External { url });
    }
    Ok(tokio::task::spawn_blocking(Database::open).await??)
}

/// The trace configuration of a process, the sources that it follows, and its telemetry.
pub struct Traced {
    /// What holds until the stored settings are read.
    pub config: TraceConfig,
    /// What comes before and after the stored settings.
    pub sources: Sources,
    /// Shut it down before exit.
    pub telemetry: Telemetry,
}

/// Reads the trace configuration, says what is wrong with it, and starts logging.
pub fn telemetry(global: &Global, role: Role, default_level: &str, flags: &TraceFlags) -> anyhow::Result<Traced> {
    let (sources, warnings) = Sources::of_process(flags.settings());
    let resolved = sources.resolve(&Stored::new())?;
    let telemetry = telemetry::init_at(role, &resolved.config, global.log_format.into(), default_level);
    for warning in warnings.iter().chain(&resolved.warnings) {
        tracing::warn!("{warning}");
    }
    Ok(Traced { config: resolved.config, sources, telemetry })
}

/// The flag of every long-running command.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Metrics {
    /// Serve metrics at /metrics here: a port (this machine only) or ADDRESS:PORT
    #[arg(long, env = "TASKER_METRICS_LISTEN", value_name = "ADDRESS")]
    metrics_listen: Option<Listen>,
}

impl Metrics {
    /// Serves this process's metrics until the answer is dropped, if that was asked for. With a
    /// pool, also what only the database knows.
    pub async fn serve(self, pool: Option<PgPool>) -> anyhow::Result<Option<Serving>> {
        let Some(listen) = self.metrics_listen else {
            return Ok(None);
        };
        let serving = metrics::serve(listen, Scrape::new(pool).served()).await;
        Ok(Some(serving.with_context(|| format!("--metrics-listen: {listen} cannot be listened on"))?))
    }
}

/// Fires on the first SIGINT or SIGTERM; the second ends the process at once.
pub fn stop_signal() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        token.cancel();
        tokio::select! { _ = interrupt.recv() => std::process::exit(130), _ = terminate.recv() => std::process::exit(143) }
    });
    Ok(stop)
}

/// Finds a task by its uuid or by its correlation id.
pub async fn find_task(client: &Client, text: &str) -> anyhow::Result<Uuid> {
    if let Ok(task) = text.parse() {
        return Ok(task);
    }
    let mut conn = client.pool().acquire().await?;
    match tasker_shared::store::views::by_correlation(&mut conn, text).await?.as_slice() {
        [task] => Ok(*task),
        [] => Err(failure(NOT_FOUND, format!("no task has the uuid or the correlation id {text:?}"))),
        several => {
            let list: Vec<String> = several.iter().map(|task| format!("  {task}")).collect();
            Err(failure(
                NOT_FOUND,
                format!("several tasks have the correlation id {text:?}; name one, newest first:\n{}", list.join("\n")),
            ))
        }
    }
}
