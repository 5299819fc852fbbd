//! `tasker api`, and the part of `tasker up` that is the same.

use std::net::SocketAddr;
use std::path::PathBuf;

use chrono::{TimeDelta, Utc};
use tasker_api::auth::keys;
use tasker_api::auth::{self, KeySpec, Role};
use tasker_api::{Config, Error, Example, Server};
use tasker_shared::client::Client;
use tasker_shared::store::tx::{self, PoolOptions};
use tasker_shared::telemetry::Role as Process;

use crate::trace_flags::TraceFlags;
use crate::{Global, run};

/// Serve the HTTP API and the web page.
#[derive(Debug, clap::Subcommand)]
pub enum Api {
    /// Serve until Ctrl-C or SIGTERM; any number may share a database
    Run(Run),
}

/// Serve the HTTP API and the web page until told to stop.
///
/// On this machine only, unless told otherwise: then keys come from `tasker key create`, and TLS is
/// needed, its own or a proxy's.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker api run
  tasker api run --listen 0.0.0.0:8443 --tls-cert chain.pem --tls-key key.pem --allow-host tasks.example.com
  tasker api run --listen 0.0.0.0:7878 --behind-tls-proxy --allow-host tasks.example.com --base-path /tasker")]
pub struct Run {
    #[command(flatten)]
    serve: Serve,
}

/// Where and how the HTTP API is served.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "HTTP")]
pub struct Serve {
    /// Where it listens; 127.0.0.1:7878, or another free port there if that one is taken
    #[arg(long, env = "TASKER_LISTEN", value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// The certificate chain, as a PEM file
    #[arg(long, env = "TASKER_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, as a PEM file
    #[arg(long, env = "TASKER_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// A proxy in front of it ends TLS
    #[arg(long, conflicts_with = "tls_cert")]
    behind_tls_proxy: bool,
    /// A host name that people reach it by; may be repeated
    #[arg(long = "allow-host", value_name = "HOST")]
    hosts: Vec<String>,
    /// The path under which a proxy shows it, such as /tasker
    #[arg(long, default_value = "", value_name = "PATH", hide_default_value = true)]
    base_path: String,
    /// Refuse whatever changes something
    #[arg(long)]
    read_only: bool,
    /// Whether the page shows timelines
    #[arg(long, env = "TASKER_UI_TRACE", default_value_t = true, action = clap::ArgAction::Set, value_name = "true|false")]
    ui_trace: bool,
    /// Where a trace can be looked at, such as `http://localhost:16686/trace/{trace_id}`
    #[arg(long, env = "TASKER_TRACE_URL", value_name = "URL", value_parser = trace_url)]
    trace_url: Option<String>,
    /// Requests a second that one key or browser may send; a tenth of it is how many failed sign-ins one address has
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Connections that one address may have open (500; with --behind-tls-proxy no limit)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    connections_per_address: Option<u32>,
}

/// A server, and the key of the browser on this machine.
pub struct Serving {
    /// Answers once it runs.
    pub server: Server,
    /// What to open in a browser; only on this machine.
    pub link: Option<String>,
    client: Client,
    key_id: Option<String>,
}

/// A link that leads to a trace: nothing but the web, and with a place for the trace's id.
pub fn trace_url(text: &str) -> Result<String, String> {
    if !(text.starts_with("http://") || text.starts_with("https://")) {
        return Err("must begin with http:// or https://".into());
    }
    if !text.contains("{trace_id}") {
        return Err("must have {trace_id} where the trace's id belongs".into());
    }
    Ok(text.to_owned())
}

impl Serve {
    /// Listens; on this machine a link that signs a browser in goes with it.
    ///
    /// `example` is what the page's button submits.
    pub async fn start(&self, url: &str, example: Option<Example>) -> anyhow::Result<Serving> {
        let options = PoolOptions { max_connections: 16, application_name: "tasker-api", ..PoolOptions::default() };
        let client = Client::from_pool(tx::pool(url, &options).await?);
        let mut config = Config {
            tls: self.tls_cert.clone().zip(self.tls_key.clone()),
            behind_tls_proxy: self.behind_tls_proxy,
            hosts: self.hosts.clone(),
            base_path: self.base_path.clone(),
            read_only: self.read_only,
            ui_trace: self.ui_trace,
            trace_url: self.trace_url.clone(),
            example,
            rate_per_s: self.rate,
            burst: self.rate.saturating_mul(5),
            failed_sign_ins: (self.rate / 10).max(5),
            connections_per_address: self.connections_per_address.and_then(|most| most.try_into().ok()),
            ..Config::default()
        };
        config.bind = self.listen.unwrap_or(config.bind);
        let mut bound = Server::bind(client.clone(), config.clone()).await;
        if let Err(Error::Listen { source, .. }) = &bound
            && self.listen.is_none()
            && source.kind() == std::io::ErrorKind::AddrInUse
        {
            config.bind.set_port(0);
            bound = Server::bind(client.clone(), config.clone()).await;
        }
        let server = bound?;
        if !config.bind.ip().is_loopback() {
            return Ok(Serving { server, link: None, client, key_id: None });
        }
        let spec = KeySpec {
            name: format!("local-{:08x}", rand::random::<u32>()),
            role: Role::Admin,
            scopes: None,
            namespaces: None,
            expires_at: Some(Utc::now() + TimeDelta::days(30)),
        };
        let key = auth::create_key(&mut *client.pool().acquire().await?, &spec, &spec.name).await?;
        let once = auth::once_link(client.pool(), &key.key_id).await?;
        let link = format!("{}/login?once={once}", server.url());
        Ok(Serving { server, link: Some(link), client, key_id: Some(key.key_id) })
    }
}

impl Serving {
    /// What revokes the key that was made for this process, once it has ended.
    pub fn farewell(&self) -> impl Future<Output = ()> + use<> {
        let (client, key_id) = (self.client.clone(), self.key_id.clone());
        async move {
            if let Some(key_id) = key_id
                && let Ok(mut conn) = client.pool().acquire().await
            {
                let _ = keys::revoke(&mut conn, &key_id, "the end of the process").await;
            }
        }
    }
}

impl Api {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let Self::Run(Run { serve }) = self;
        let stop = run::stop_signal()?;
        let run::Traced { telemetry, .. } =
            run::telemetry(global, Process::Orchestrator, "info", &TraceFlags::default())?;
        let Some(connected) = run::connect_until(global, &stop).await? else {
            return Ok(());
        };
        let serving = serve.start(&connected.url, None).await?;
        match &serving.link {
            Some(link) => eprintln!("open      {link}"),
            None => eprintln!("open      {} and sign in with a key", serving.server.url()),
        }
        let farewell = serving.farewell();
        serving.server.run(stop).await;
        farewell.await;
        telemetry.shutdown(super::orchestrator::FLUSH).await;
        Ok(())
    }
}
