//! Listens, cuts off what is too slow, and ends when it is told to.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State as Extract;
use axum::middleware;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, Request, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tasker_shared::client::Client;
use tasker_shared::store;
use tasker_shared::store::outage::Outage;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_http::compression::CompressionLayer;

use crate::auth::keys;
use crate::gauges::Scrape;
use crate::guard::Peer;
use crate::operation::Api;
use crate::problem::{METHOD_NOT_ALLOWED, Problem};
use crate::shares::{Room, Shares, no_connection};
use crate::{Config, Inner, State, guard, page, routes, traced};

/// The longest that a client may take to finish its TLS handshake.
const LONGEST_HANDSHAKE: Duration = Duration::from_secs(10);
/// The longest from the end of one request to the end of the next one's head. Clients and proxies
/// keep an unused connection for up to a minute: whoever closed it sooner would now and then close
/// it while the next request travels, and that request would get no answer.
const LONGEST_SILENCE: Duration = Duration::from_secs(75);
/// The longest that a connection over a limit may take to be told so.
const LONGEST_REFUSAL: Duration = Duration::from_secs(1);
/// So many are told at once; further ones are closed at once.
const MOST_REFUSALS: usize = 64;
/// How long requests that have begun may go on when the server ends.
const LONGEST_END: Duration = Duration::from_secs(5);

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Anybody on the network could read keys and payloads.
    #[error(
        "{0} is reachable from other machines, and keys would travel in the clear: give --tls-cert and --tls-key, \
         or --behind-tls-proxy if a proxy in front of this server ends TLS, or bind to 127.0.0.1"
    )]
    NeedsTls(SocketAddr),
    /// Nobody says which names are its own.
    #[error(
        "{0} is reachable from other machines: name the host that people use, such as --allow-host tasks.example.com"
    )]
    NeedsHost(SocketAddr),
    /// Nobody could sign in.
    #[error("{0} is reachable from other machines, and there is no API key yet: make one with `tasker key create`")]
    NeedsKey(SocketAddr),
    /// The certificate or its key.
    #[error("TLS: {what}: {problem}")]
    Tls {
        /// Which file.
        what: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Under a proxy's path.
    #[error("--base-path: must begin with / and not end with it, such as /tasker")]
    BasePath,
    /// The port is taken, or not ours to take.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The database.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// A server that listens and does not answer yet.
pub struct Server {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    state: State,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("url", &self.url()).finish_non_exhaustive()
    }
}

impl Server {
    /// Checks the configuration and listens. What would be unsafe does not start.
    ///
    /// # Errors
    /// The field of the configuration that is not valid or not safe, [`Error::Tls`] or [`Error::Listen`] with the
    /// system's reason, [`Error::Store`] if the database fails.
    pub async fn bind(client: Client, config: Config) -> Result<Self, Error> {
        let base = &config.base_path;
        let well_formed = base.starts_with('/')
            && !base.ends_with('/')
            && base.bytes().all(|b| b.is_ascii_graphic() && !b"\"'<>\\?#{}*".contains(&b));
        if !base.is_empty() && !well_formed {
            return Err(Error::BasePath);
        }
        if !config.bind.ip().is_loopback() {
            if !config.is_secure() {
                return Err(Error::NeedsTls(config.bind));
            }
            if config.hosts.is_empty() {
                return Err(Error::NeedsHost(config.bind));
            }
            if !keys::any_valid(&mut *client.pool().acquire().await.map_err(store::Error::from)?).await? {
                return Err(Error::NeedsKey(config.bind));
            }
        }
        let tls = config.tls.as_ref().map(|(cert, key)| acceptor(cert, key)).transpose()?;
        let listener =
            TcpListener::bind(config.bind).await.map_err(|source| Error::Listen { address: config.bind, source })?;
        let (router, state) = build(client, config);
        Ok(Self { listener, tls, router, state })
    }

    /// Where it is, without a slash at the end; the port is the one that it got.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}{}", self.address(), self.state.config().base_path)
    }

    /// Where it listens; the port is the one that it got.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap_or(self.state.config().bind)
    }

    /// What its requests share.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Answers until `stop` fires, then finishes what has begun.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, tls, router, state } = self;
        let (open, refusals) = (TaskTracker::new(), Arc::new(Semaphore::new(MOST_REFUSALS)));
        let end = state.stop().clone();
        let looks = state.clone();
        tokio::spawn(async move { looks.hub().run(looks.pool().clone(), looks.known(), looks.stop().clone()).await });
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, peer)) = accepted else {
                // Out of file descriptors, most likely: some must be closed first.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let (tls, peer) = (tls.clone(), Peer(peer.ip()));
            match state.room().connections.one(guard::network(peer.0)) {
                Ok(place) => {
                    let (router, end) = (router.clone(), end.clone());
                    open.spawn(async move {
                        let _place = place;
                        connection(stream, peer, tls, router, end).await;
                    });
                }
                Err(full) => {
                    let refusal = no_connection(full);
                    // Without a turn it is merely closed.
                    if let Ok(turn) = Arc::clone(&refusals).try_acquire_owned() {
                        open.spawn(async move {
                            let _turn = turn;
                            let router = Router::new().fallback(move || async { refusal });
                            let _ = tokio::time::timeout(
                                LONGEST_REFUSAL,
                                connection(stream, peer, tls, router, CancellationToken::new()),
                            )
                            .await;
                        });
                    }
                }
            }
        }
        drop(listener);
        end.cancel();
        open.close();
        let _ = tokio::time::timeout(LONGEST_END, open.wait()).await;
    }
}

async fn connection(stream: TcpStream, peer: Peer, tls: Option<TlsAcceptor>, router: Router, end: CancellationToken) {
    let _ = stream.set_nodelay(true);
    match tls {
        None => http(stream, peer, router, end).await,
        Some(tls) => {
            if let Ok(Ok(stream)) = tokio::time::timeout(LONGEST_HANDSHAKE, tls.accept(stream)).await {
                http(stream, peer, router, end).await;
            }
        }
    }
}

async fn http<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    peer: Peer,
    router: Router,
    end: CancellationToken,
) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        router.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(LONGEST_SILENCE)
        .max_headers(64)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // A client that goes away, or is too slow, is no event of ours.
        _ = connection.as_mut() => return,
        () = end.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// The routes under the base path, and what they share.
pub(crate) fn build(client: Client, config: Config) -> (Router, State) {
    let mut api = Api::default();
    routes::add(&mut api);
    let server = if config.base_path.is_empty() { "/".to_owned() } else { config.base_path.clone() };
    let (operations, document) = api.finish(&server);
    let base_path = config.base_path.clone();
    let scrape = Scrape::new(Some(client.pool().clone()));
    let room = Room {
        connections: Shares::new(config.max_connections, config.most_of_address()),
        streams: Shares::new(config.max_streams, config.streams_per_key),
        bodies: Shares::new(config.max_body_bytes, config.body_bytes_per_key),
    };
    let outage = Outage::of(client.pool());
    let state = State(Arc::new(Inner {
        client,
        config,
        known: guard::Known::default(),
        rates: guard::Buckets::default(),
        failures: guard::Buckets::default(),
        hub: Arc::default(),
        room,
        outage,
        scrape,
        document: document.to_string().into_bytes(),
        stop: CancellationToken::new(),
    }));
    let all = operations
        .layer(middleware::from_fn_with_state(state.clone(), guard::once_more))
        .merge(routes::outside_the_api())
        .merge(page::routes(&state))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed);
    let all = if base_path.is_empty() { all } else { Router::new().nest(&base_path, all).fallback(not_found) };
    let router = all
        .layer(CompressionLayer::new())
        .layer(middleware::from_fn(traced::around))
        .layer(middleware::from_fn_with_state(state.clone(), guard::around))
        .with_state(state.clone());
    (router, state)
}

/// A browser gets a page, everybody else a problem.
async fn not_found(Extract(state): Extract<State>, headers: HeaderMap) -> Response {
    let accepts = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if accepts.contains("text/html") {
        return page::nothing_here(&state, &headers);
    }
    Problem::not_found("such path; /openapi.json lists those that are").into_response()
}

async fn method_not_allowed() -> Response {
    METHOD_NOT_ALLOWED.because("/openapi.json lists the methods of this path").into_response()
}

fn acceptor(cert: &Path, key: &Path) -> Result<TlsAcceptor, Error> {
    let failed = |what| move |problem: String| Error::Tls { what, problem };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect)
        .map_err(|error| failed("the certificate cannot be read")(error.to_string()))?;
    if chain.is_empty() {
        return Err(failed("the certificate")(
            "the file holds none; it must be a PEM file with the whole chain".into(),
        ));
    }
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| failed("the private key cannot be read")(error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| failed("the certificate and the key cannot be used")(error.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    /// A server on the other end of a pipe.
    fn serving() -> DuplexStream {
        let (client, server) = duplex(1024);
        let router = Router::new().fallback(|| async { "here" });
        tokio::spawn(http(server, Peer([127, 0, 0, 1].into()), router, CancellationToken::new()));
        client
    }

    async fn ask(client: &mut DuplexStream) {
        client.write_all(b"GET / HTTP/1.1\r\nhost: it\r\n\r\n").await.expect("an open connection");
        let mut answer = Vec::new();
        while !answer.ends_with(b"here") {
            assert_ne!(client.read_buf(&mut answer).await.expect("an answer"), 0, "it was closed");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_kept_for_a_minute_is_answered_still() {
        let mut client = serving();
        ask(&mut client).await;
        tokio::time::sleep(Duration::from_mins(1)).await;
        ask(&mut client).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_finishes_its_head_is_cut_off() {
        let mut client = serving();
        client.write_all(b"GET / HTTP/1.1\r\nhost: i").await.expect("an open connection");
        let mut rest = Vec::new();
        let cut_off = tokio::time::timeout(2 * LONGEST_SILENCE, client.read_to_end(&mut rest)).await;
        cut_off.expect("cut off").expect("read");
        assert!(!rest.ends_with(b"here"));
    }
}
