//! The HTTP API of Tasker, its sign-in, and the web page.
//!
//! It asks the database and sends requests to the orchestrators; it decides nothing, and imports
//! neither of the two kinds of process. [`operation::Api`] is the one way to make a route.

pub mod auth;
pub mod gauges;
pub mod guard;
pub mod hub;
pub mod operation;
pub mod page;
pub mod problem;
pub mod routes;
pub mod sampling;
mod serve;
mod shares;
pub mod trace;
mod traced;

use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use sqlx::PgPool;
use tasker_shared::client::Client;
use tasker_shared::store::outage::Outage;
use tokio_util::sync::CancellationToken;

use self::gauges::Scrape;
pub use self::guard::Caller;
pub use self::serve::{Error, Server};

/// Connections that one address may have open, unless it is told otherwise.
const CONNECTIONS_PER_ADDRESS: usize = 500;

/// How a server is started.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it listens. Beyond this machine only with TLS, its own or a proxy's.
    pub bind: SocketAddr,
    /// The certificate chain and the key, as PEM files.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// A proxy in front of it ends TLS.
    pub behind_tls_proxy: bool,
    /// Host names that it answers to, besides this machine's own when it listens there.
    pub hosts: Vec<String>,
    /// The path under which a proxy shows it, such as `/tasker`; empty for none.
    pub base_path: String,
    /// Refuses whatever changes something.
    pub read_only: bool,
    /// Whether pages show timelines.
    pub ui_trace: bool,
    /// Where a trace can be looked at, with `{trace_id}` in its place, such as
    /// `http://localhost:16686/trace/{trace_id}`.
    pub trace_url: Option<String>,
    /// What the button "Run an example" submits.
    pub example: Option<Example>,
    /// Requests a second that one principal may send.
    pub rate_per_s: u32,
    /// Requests that one principal may send at once, after a pause.
    pub burst: u32,
    /// Keys and links that are not valid, which one address may show at once; then one every 5 s.
    pub failed_sign_ins: u32,
    /// Connections that may be open at once.
    pub max_connections: usize,
    /// The same from one address; `None`: 500, and behind a proxy, which has them all, no limit of its own.
    pub connections_per_address: Option<usize>,
    /// Event streams that may be open at once.
    pub max_streams: usize,
    /// The same with one key, by itself or by browsers that signed in with it.
    pub streams_per_key: usize,
    /// Bytes of bodies that all requests together may hold; those of small ones do not count.
    pub max_body_bytes: usize,
    /// The same of the requests of one key.
    pub body_bytes_per_key: usize,
}

/// A template that is there to be tried.
#[derive(Debug, Clone)]
pub struct Example {
    /// Who owns it.
    pub namespace: String,
    /// Its name.
    pub template: String,
    /// Inputs to choose from, one for each run.
    pub inputs: Vec<serde_json::Value>,
}

impl Default for Config {
    /// On this machine only.
    fn default() -> Self {
        Self {
            bind: SocketAddr::from(([127, 0, 0, 1], 7878)),
            tls: None,
            behind_tls_proxy: false,
            hosts: Vec::new(),
            base_path: String::new(),
            read_only: false,
            ui_trace: true,
            trace_url: None,
            example: None,
            rate_per_s: 200,
            burst: 1000,
            failed_sign_ins: 20,
            max_connections: 2000,
            connections_per_address: None,
            max_streams: 1000,
            streams_per_key: 250,
            max_body_bytes: 64 * 1024 * 1024,
            body_bytes_per_key: 32 * 1024 * 1024,
        }
    }
}

impl Config {
    /// Connections that one address may have open.
    pub(crate) fn most_of_address(&self) -> usize {
        let usual = if self.behind_tls_proxy { self.max_connections } else { CONNECTIONS_PER_ADDRESS };
        self.connections_per_address.unwrap_or(usual)
    }

    /// Whether browsers reach it over TLS.
    pub fn is_secure(&self) -> bool {
        self.tls.is_some() || self.behind_tls_proxy
    }

    /// Whether it answers to this `Host`, with or without a port.
    pub(crate) fn answers_to(&self, host: &str) -> bool {
        let end = if host.starts_with('[') {
            host.find(']').map_or(host.len(), |end| end + 1)
        } else {
            host.find(':').unwrap_or(host.len())
        };
        let (name, port) = host.split_at(end);
        if !(port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok())) {
            return false;
        }
        let own = match self.bind.ip() {
            IpAddr::V6(ip) => format!("[{ip}]"),
            ip @ IpAddr::V4(_) => ip.to_string(),
        };
        let local = ["localhost", "127.0.0.1", "[::1]"];
        self.hosts.iter().any(|known| known.eq_ignore_ascii_case(name) || known.eq_ignore_ascii_case(host))
            || (!self.bind.ip().is_unspecified() && own.eq_ignore_ascii_case(name))
            || (self.bind.ip().is_loopback() && local.iter().any(|known| known.eq_ignore_ascii_case(name)))
    }
}

/// What every request shares. Cheap to clone.
#[derive(Debug, Clone)]
pub struct State(Arc<Inner>);

/// The insides of a [`State`].
#[derive(Debug)]
pub struct Inner {
    client: Client,
    config: Config,
    known: guard::Known,
    /// Requests, by key.
    rates: guard::Buckets<String>,
    /// Failed sign-ins, by address.
    failures: guard::Buckets<(IpAddr, guard::Kind)>,
    hub: Arc<hub::Hub>,
    room: shares::Room,
    outage: Arc<Outage>,
    scrape: Scrape,
    document: Vec<u8>,
    stop: CancellationToken,
}

impl Deref for State {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Inner {
    /// What asks and acts.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Connections for statements.
    pub fn pool(&self) -> &PgPool {
        self.client.pool()
    }

    /// How this server was started.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Fires when the server is told to end: answers that would not end by themselves end then.
    pub fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// The viewers, and what they are sent.
    pub fn hub(&self) -> &Arc<hub::Hub> {
        &self.hub
    }

    /// This process's metrics, and those of the database.
    pub(crate) fn scrape(&self) -> &Scrape {
        &self.scrape
    }

    /// What requests share.
    pub(crate) fn room(&self) -> &shares::Room {
        &self.room
    }

    /// Whether the database is away, and what was said of it.
    pub(crate) fn outage(&self) -> &Outage {
        &self.outage
    }

    pub(crate) fn known(&self) -> &guard::Known {
        &self.known
    }

    pub(crate) fn rates(&self) -> &guard::Buckets<String> {
        &self.rates
    }

    pub(crate) fn failures(&self) -> &guard::Buckets<(IpAddr, guard::Kind)> {
        &self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_answers_to_this_machine_and_to_names_it_was_told() {
        let config = Config { hosts: vec!["tasks.example.com".into()], ..Config::default() };
        for good in ["localhost:7878", "127.0.0.1", "[::1]:7878", "tasks.example.com", "TASKS.example.com:443"] {
            assert!(config.answers_to(good), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "localhost.evil.example",
            "localhost:x",
            "127.0.0.1:99999",
            "[::1",
            "tasks.example.com.evil",
        ] {
            assert!(!config.answers_to(bad), "{bad}");
        }
        let wide = Config { bind: SocketAddr::from(([0, 0, 0, 0], 7878)), ..Config::default() };
        assert!(!wide.answers_to("0.0.0.0") && !wide.answers_to("localhost"));
    }
}
