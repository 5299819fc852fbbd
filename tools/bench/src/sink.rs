//! A collector that acknowledges everything and decodes nothing.
//!
//! For the bench: what it costs is not what is measured, so it reads frames,
//! counts bytes and answers. gRPC and HTTP on one port of loopback. Never a
//! model of a collector: a request that is no OTLP is acknowledged, too.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::{HeaderMap, HeaderValue, Response};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Windows wide enough that a request of any size needs no update on its way.
const WINDOW_BYTES: u32 = 16 << 20;
/// First bytes of every HTTP/2 connection, and of no HTTP/1 request.
const HTTP2: &[u8] = b"PRI ";
const HTTP1_ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
/// An empty `ExportTraceServiceResponse` as a gRPC frame: not compressed, length 0.
const GRPC_ANSWER: &[u8] = &[0; 5];

/// A running sink; it stops when dropped.
#[derive(Debug)]
pub struct Sink {
    address: SocketAddr,
    counts: Arc<Counts>,
    _stop: DropGuard,
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Counts {
    fn took(&self, bytes: u64) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Sink {
    /// Listens on a free port of loopback, on the current runtime.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let counts = Arc::new(Counts::default());
        let stop = CancellationToken::new();
        tokio::spawn(listen(listener, Arc::clone(&counts), stop.clone()));
        Ok(Self { address, counts, _stop: stop.drop_guard() })
    }

    /// `http://127.0.0.1:<port>`, for gRPC and as the base for HTTP.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests acknowledged so far.
    pub fn requests(&self) -> u64 {
        self.counts.requests.load(Ordering::Relaxed)
    }

    /// Bytes of their bodies, as they came over the wire.
    pub fn bytes(&self) -> u64 {
        self.counts.bytes.load(Ordering::Relaxed)
    }
}

async fn listen(listener: TcpListener, counts: Arc<Counts>, stop: CancellationToken) {
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = stream else { continue };
        let (counts, stop) = (Arc::clone(&counts), stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                // A connection that breaks is for its client to notice.
                _ = serve(stream, &counts) => {}
            }
        });
    }
}

async fn serve(stream: TcpStream, counts: &Arc<Counts>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0; HTTP2.len()];
    loop {
        match stream.peek(&mut first).await? {
            0 => return Ok(()),
            n if n == first.len() => break,
            // Never seen on loopback: the first packet holds the whole first line.
            _ => tokio::task::yield_now().await,
        }
    }
    if first == HTTP2 { grpc(stream, counts).await.map_err(io::Error::other) } else { http1(stream, counts).await }
}

async fn grpc(stream: TcpStream, counts: &Arc<Counts>) -> Result<(), h2::Error> {
    let mut connection = h2::server::Builder::new()
        .initial_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size((1 << 20) - 1)
        .handshake(stream)
        .await?;
    while let Some(request) = connection.accept().await {
        let (request, respond) = request?;
        let counts = Arc::clone(counts);
        tokio::spawn(async move {
            // As above: a stream that breaks is for its client to notice.
            let _ = acknowledge(request.into_body(), respond, &counts).await;
        });
    }
    Ok(())
}

async fn acknowledge(
    mut body: h2::RecvStream,
    mut respond: h2::server::SendResponse<&'static [u8]>,
    counts: &Counts,
) -> Result<(), h2::Error> {
    let mut bytes = 0;
    while let Some(chunk) = body.data().await {
        let len = chunk?.len();
        bytes += len as u64;
        body.flow_control().release_capacity(len)?;
    }
    let mut head = Response::new(());
    head.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    let mut answer = respond.send_response(head, false)?;
    answer.send_data(GRPC_ANSWER, false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    answer.send_trailers(trailers)?;
    counts.took(bytes);
    Ok(())
}

/// HTTP/1.1 with `content-length`, which is all our exporter sends.
async fn http1(stream: TcpStream, counts: &Counts) -> io::Result<()> {
    let mut stream = BufReader::with_capacity(64 * 1024, stream);
    let mut line = String::new();
    loop {
        let mut length = 0;
        loop {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
        }
        let read = tokio::io::copy_buf(&mut (&mut stream).take(length), &mut tokio::io::sink()).await?;
        if read < length {
            return Ok(());
        }
        stream.write_all(HTTP1_ANSWER).await?;
        counts.took(length);
    }
}
