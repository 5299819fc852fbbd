//! The listener of `/metrics`.

use std::convert::Infallible;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{ALLOW, CONTENT_TYPE as CONTENT_TYPE_HEADER};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};

/// The media type of what is served.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Connections at one time; a scraper needs one.
const MOST: usize = 32;
/// A client that sends or takes nothing is let go.
const PATIENCE: Duration = Duration::from_secs(15);

/// Where metrics are served: `9464` (loopback only) or `0.0.0.0:9464`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen(pub SocketAddr);

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if let Ok(port) = text.strip_prefix(':').unwrap_or(text).parse::<u16>() {
            return Ok(Self(SocketAddr::from((Ipv4Addr::LOCALHOST, port))));
        }
        let resolved = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
        resolved
            .as_deref()
            .unwrap_or(text)
            .parse()
            .map(Self)
            .map_err(|_| "is not an address; use a port, such as 9464 (this machine only), or ADDRESS:PORT".to_owned())
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A listener that runs; dropping it stops it.
#[derive(Debug)]
pub struct Serving {
    /// Where it listens, with the port that a port of 0 became.
    pub address: SocketAddr,
    _stop: DropGuard,
}

/// What is read at each scrape: [`text`](super::text), or more than that.
pub trait Text<T>: Fn() -> T + Clone + Send + Sync + 'static {}

impl<T, F: Fn() -> T + Clone + Send + Sync + 'static> Text<T> for F {}

/// Serves `GET /metrics` until the answer is dropped.
///
/// Errors if the address cannot be listened on.
pub async fn serve<T>(Listen(address): Listen, text: impl Text<T>) -> std::io::Result<Serving>
where
    T: Future<Output = String> + Send + 'static,
{
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let stop = CancellationToken::new();
    tokio::spawn(stop.clone().run_until_cancelled_owned(accept(listener, text)));
    tracing::info!(%address, "metrics are served at /metrics");
    Ok(Serving { address, _stop: stop.drop_guard() })
}

async fn accept<T: Future<Output = String> + Send + 'static>(listener: TcpListener, text: impl Text<T>) {
    let room = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let text = text.clone();
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(PATIENCE * 20, talk(stream, text)).await;
                    drop(place);
                });
            }
            // Too many open files, or a client that has left already.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn talk<T: Future<Output = String> + Send + 'static>(stream: TcpStream, text: impl Text<T>) {
    let answer = service_fn(|request| {
        let text = text.clone();
        async move { Ok::<_, Infallible>(answer(&request, &text).await) }
    });
    // A client that breaks off is no concern of ours.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
}

async fn answer<T: Future<Output = String> + Send + 'static>(
    request: &Request<Incoming>,
    text: &impl Text<T>,
) -> Response<Full<Bytes>> {
    let plain = |status, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "there is only /metrics here\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "use GET\n");
        response.headers_mut().insert(ALLOW, http::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let mut response = Response::new(Full::from(text().await));
    response.headers_mut().insert(CONTENT_TYPE_HEADER, http::HeaderValue::from_static(CONTENT_TYPE));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_of_this_machine_only() {
        for (text, address) in [
            ("9464", "127.0.0.1:9464"),
            (":9464", "127.0.0.1:9464"),
            ("localhost:1", "127.0.0.1:1"),
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("[::1]:9464", "[::1]:9464"),
        ] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), address);
        }
        for bad in ["", "70000", "example.com:80", "127.0.0.1"] {
            assert!(bad.parse::<Listen>().is_err(), "{bad}");
        }
    }
}
