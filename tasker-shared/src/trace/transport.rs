//! OTLP over gRPC, over HTTP, or as lines of JSON: one request out, one acknowledgement back.
//!
//! Never retries (its caller owns the order and the pace of retries), never
//! follows a redirect, and never prints a header value. Connections are made
//! when needed and made again when lost.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use prost::Message;
use prost::bytes::{Buf, BufMut, Bytes, BytesMut};
use reqwest::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tonic::client::Grpc;
use tonic::codec::{Codec, CompressionEncoding, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::config::{Compression, Exporter, Protocol, TraceConfig};
use crate::tls;

const EXPORT_PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
const USER_AGENT: &str = concat!("Tasker-OTLP-Exporter/", env!("CARGO_PKG_VERSION"));
const PROTOBUF: &str = "application/x-protobuf";
/// An acknowledgement holds a number and a sentence.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// A collector may ask us to wait, but not for ever.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A way to one collector. Cheap to clone; clones share connections.
#[derive(Debug, Clone)]
pub struct Transport {
    way: Way,
    timeout: Duration,
    compression: Compression,
}

#[derive(Debug, Clone)]
enum Way {
    Grpc { channel: Channel, metadata: MetadataMap },
    Http { client: reqwest::Client, url: reqwest::Url },
    JsonLines(JsonLines),
}

/// Where requests go as lines of OTLP JSON: a file, or standard output.
#[derive(Debug, Clone)]
pub(crate) struct JsonLines(Option<Arc<Mutex<File>>>);

impl JsonLines {
    /// `None` unless `config` asks for lines.
    pub(crate) fn open(config: &TraceConfig) -> Result<Option<Self>, Error> {
        match config.exporter {
            Exporter::Stdout => Ok(Some(Self(None))),
            Exporter::File => {
                let open = File::options().create(true).append(true).open(&config.file);
                let refuse =
                    |e: std::io::Error| Error::File { path: config.file.clone(), problem: e.kind().to_string() };
                Ok(Some(Self(Some(Arc::new(Mutex::new(open.map_err(refuse)?))))))
            }
            _ => Ok(None),
        }
    }

    /// Writes one request as one line.
    pub(crate) fn write(&self, request: &ExportTraceServiceRequest) -> std::io::Result<()> {
        if request.resource_spans.is_empty() {
            return Ok(());
        }
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        // One write a line: several processes may append to one file.
        match &self.0 {
            Some(file) => file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line),
            None => std::io::stdout().lock().write_all(&line),
        }
    }
}

/// Why there is no way to the collector. Nothing was sent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The endpoint is no URL.
    #[error("the trace endpoint {endpoint} cannot be used: {problem}")]
    Endpoint {
        /// Without credentials.
        endpoint: String,
        /// In words.
        problem: String,
    },
    /// The certificate file cannot be read.
    #[error("the certificate file {path} cannot be used: {problem}; give a PEM file with at least one certificate")]
    Certificate {
        /// As configured.
        path: String,
        /// In words.
        problem: String,
    },
    /// A header name or value is not allowed in HTTP.
    #[error("the trace header {name} cannot be sent; check its name and value")]
    Header {
        /// Its name; the value is a secret.
        name: String,
    },
    /// The file for spans cannot be written.
    #[error("the trace file {path} cannot be opened: {problem}; name one that this process may write")]
    File {
        /// As configured.
        path: String,
        /// In words.
        problem: String,
    },
    /// The HTTP client cannot be set up.
    #[error("the HTTP client for traces cannot be set up: {0}")]
    Client(String),
}

/// What the collector acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// Spans of the request that it refused; sending them again is pointless.
    pub rejected_spans: u64,
    /// Its words about that, or a warning.
    pub message: Option<String>,
}

/// The request was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct SendError {
    /// What happened.
    pub kind: ErrorKind,
    /// True if the same bytes may succeed later, by the rules of OTLP.
    pub retryable: bool,
    /// What to do with the bytes.
    pub verdict: Verdict,
    /// How long the collector asked us to wait.
    pub retry_after: Option<Duration>,
    /// In words, without header values.
    pub message: String,
}

/// What kept a request from being acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ErrorKind {
    /// No connection, or it broke before the answer.
    #[error("the collector cannot be reached")]
    Connection,
    /// No answer in time.
    #[error("the collector did not answer in time")]
    Timeout,
    /// A definite answer that is not success.
    #[error("the collector refused the spans")]
    Refused,
    /// An answer of success that is no OTLP: something else listens there.
    #[error("the collector's answer is not OTLP")]
    BadAnswer,
}

/// What an answer says of the bytes that were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing: the way is closed, or somebody who may open it has not yet (credentials, the path).
    Later,
    /// The receiver failed. It may be over them.
    Unclear,
    /// They are too many.
    TooLarge,
    /// They are bad, now and for ever.
    BadData,
}

impl SendError {
    fn new(kind: ErrorKind, retryable: bool, message: impl AsRef<str>) -> Self {
        Self { kind, retryable, verdict: Verdict::Later, retry_after: None, message: short(message.as_ref()) }
    }

    /// What kind of error it is, without what differs from one to the next, such as times and ids.
    pub fn sort(&self) -> String {
        format!("{} {}", self.kind, self.message.split(' ').next().unwrap_or_default())
    }
}

impl Transport {
    /// Prepares the way that `config` describes. No I/O beyond reading the
    /// certificate file: the first [`send`](Self::send) connects.
    ///
    /// Must be called inside a tokio runtime.
    pub fn connect(config: &TraceConfig) -> Result<Self, Error> {
        let way = match config.protocol {
            _ if !config.exporter.is_remote() && config.exporter != Exporter::None => match JsonLines::open(config)? {
                Some(lines) => Way::JsonLines(lines),
                None => unreachable!("every exporter that is not remote writes lines"),
            },
            Protocol::Grpc => Way::Grpc { channel: channel(config)?, metadata: metadata(config)? },
            Protocol::HttpProtobuf => {
                let mut headers = header_map(config)?;
                headers.insert(CONTENT_TYPE, HeaderValue::from_static(PROTOBUF));
                if config.compression == Compression::Gzip {
                    headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                }
                let client = reqwest::Client::builder()
                    .tls_backend_preconfigured(tls_config(config)?)
                    .user_agent(USER_AGENT)
                    .default_headers(headers)
                    // A redirect would carry the headers to another host.
                    .redirect(reqwest::redirect::Policy::none())
                    .connect_timeout(CONNECT_TIMEOUT)
                    .tcp_nodelay(true)
                    .build()
                    .map_err(|e| Error::Client(chain(&e.without_url())))?;
                let url = config.endpoint.parse().map_err(|e| bad_endpoint(config, &e))?;
                Way::Http { client, url }
            }
        };
        Ok(Self { way, timeout: config.timeout, compression: config.compression })
    }

    /// Sends the bytes of one `ExportTraceServiceRequest` and waits for the
    /// acknowledgement, at most for the configured timeout. Safe to drop at
    /// any point; the request may then have arrived or not.
    pub async fn send(&self, request: Bytes) -> Result<Accepted, SendError> {
        let answer = async {
            match &self.way {
                Way::Grpc { channel, metadata } => self.send_grpc(channel, metadata, request).await,
                Way::Http { client, url } => self.send_http(client, url, request).await,
                Way::JsonLines(lines) => write_line(lines.clone(), request).await,
            }
        };
        tokio::time::timeout(self.timeout, answer).await.unwrap_or_else(|_| {
            let message = format!("nothing within {} ms", self.timeout.as_millis());
            Err(SendError::new(ErrorKind::Timeout, true, message))
        })
    }

    async fn send_grpc(
        &self,
        channel: &Channel,
        metadata: &MetadataMap,
        request: Bytes,
    ) -> Result<Accepted, SendError> {
        let mut grpc = Grpc::new(channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES);
        if self.compression == Compression::Gzip {
            grpc = grpc.send_compressed(CompressionEncoding::Gzip);
        }
        grpc.ready().await.map_err(|e| SendError::new(ErrorKind::Connection, true, chain(&e)))?;
        let mut request = tonic::Request::new(request);
        *request.metadata_mut() = metadata.clone();
        let answer = grpc
            .unary(request, PathAndQuery::from_static(EXPORT_PATH), RawCodec)
            .await
            .map_err(|status| grpc_error(&status))?;
        answer.into_inner().map(accepted).map_err(|e| bad_answer(&e))
    }

    async fn send_http(
        &self,
        client: &reqwest::Client,
        url: &reqwest::Url,
        request: Bytes,
    ) -> Result<Accepted, SendError> {
        let body = match self.compression {
            Compression::None => request,
            Compression::Gzip => gzip(request).await?,
        };
        let mut answer = client.post(url.clone()).body(body).send().await.map_err(http_error)?;
        let status = answer.status();
        let retry_after = answer.headers().get(RETRY_AFTER).and_then(|v| retry_after(v, Utc::now()));
        let json = answer.headers().get(CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"application/json"));
        let mut body = BytesMut::new();
        while let Some(chunk) = answer.chunk().await.map_err(http_error)? {
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(bad_answer(&format!("more than {MAX_ANSWER_BYTES} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            let words = std::str::from_utf8(&body).unwrap_or_default();
            let retryable = matches!(status.as_u16(), 429 | 502 | 503 | 504);
            let verdict = match status.as_u16() {
                413 => Verdict::TooLarge,
                400 | 422 => Verdict::BadData,
                500.. if !retryable => Verdict::Unclear,
                _ => Verdict::Later,
            };
            let error = SendError::new(ErrorKind::Refused, retryable, format!("{status} {words}"));
            return Err(SendError { verdict, retry_after: retry_after.filter(|_| retryable), ..error });
        }
        if json {
            return serde_json::from_slice(&body).map(|v| accepted_json(&v)).map_err(|e| bad_answer(&e));
        }
        ExportTraceServiceResponse::decode(body).map(accepted).map_err(|e| bad_answer(&e))
    }
}

/// Connects to the endpoint's host and port and says nothing; `Ok` names them. A file is always
/// reached.
pub async fn reach(config: &TraceConfig) -> Result<String, SendError> {
    if !config.exporter.is_remote() {
        return Ok(config.destination());
    }
    let unusable = || SendError::new(ErrorKind::Connection, false, "the endpoint is not a URL");
    let uri: http::Uri = config.endpoint.parse().map_err(|_| unusable())?;
    let host = uri.host().ok_or_else(unusable)?.trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    match tokio::time::timeout(CONNECT_TIMEOUT, tokio::net::TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => Ok(format!("{host}:{port}")),
        Ok(Err(error)) => Err(SendError::new(ErrorKind::Connection, true, format!("{host}:{port}: {error}"))),
        Err(_) => {
            let message = format!("{host}:{port} does not answer within {} s", CONNECT_TIMEOUT.as_secs());
            Err(SendError::new(ErrorKind::Timeout, true, message))
        }
    }
}

/// A request with one span, `tasker.trace.doctor`, and the span's trace id.
pub fn probe(service: &str) -> (Bytes, super::span::TraceId) {
    use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
    use opentelemetry_proto::tonic::resource::v1::Resource;
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, span};

    let (trace_id, span_id): ([u8; 16], [u8; 8]) = (rand::random(), rand::random());
    let now = u64::try_from(Utc::now().timestamp_nanos_opt().unwrap_or(0)).unwrap_or(0);
    let name = KeyValue {
        key: "service.name".into(),
        value: Some(AnyValue { value: Some(any_value::Value::StringValue(service.into())) }),
        ..KeyValue::default()
    };
    let span = Span {
        trace_id: trace_id.to_vec(),
        span_id: span_id.to_vec(),
        name: "tasker.trace.doctor".into(),
        kind: span::SpanKind::Internal.into(),
        start_time_unix_nano: now,
        end_time_unix_nano: now + 1_000_000,
        flags: 1,
        ..Span::default()
    };
    let scope = InstrumentationScope { name: super::otlp::SCOPE_NAME.into(), ..InstrumentationScope::default() };
    let request = ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(Resource { attributes: vec![name], ..Resource::default() }),
            scope_spans: vec![ScopeSpans { scope: Some(scope), spans: vec![span], ..ScopeSpans::default() }],
            ..ResourceSpans::default()
        }],
    };
    (request.encode_to_vec().into(), trace_id)
}

async fn write_line(lines: JsonLines, request: Bytes) -> Result<Accepted, SendError> {
    let written = tokio::task::spawn_blocking(move || lines.write(&ExportTraceServiceRequest::decode(request)?));
    match written.await {
        Ok(Ok(())) => Ok(Accepted { rejected_spans: 0, message: None }),
        Ok(Err(error)) => Err(SendError::new(ErrorKind::Connection, true, error.to_string())),
        Err(error) => Err(SendError::new(ErrorKind::Connection, true, error.to_string())),
    }
}

/// A lazily connected gRPC channel to the endpoint of `config`.
///
/// Must be called inside a tokio runtime, which then drives the connection.
pub(crate) fn channel(config: &TraceConfig) -> Result<Channel, Error> {
    let mut endpoint = Endpoint::from_shared(config.endpoint.clone())
        .and_then(|e| e.user_agent(USER_AGENT))
        .map_err(|e| bad_endpoint(config, &e))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10));
    if config.endpoint.starts_with("https:") {
        let tls = match certificate(config)? {
            Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
            None => ClientTlsConfig::new().with_webpki_roots(),
        };
        endpoint = endpoint.tls_config(tls).map_err(|e| bad_endpoint(config, &e))?;
    }
    Ok(endpoint.connect_lazy())
}

/// TLS that trusts the web's certificate authorities, or only those of the configured file.
pub fn tls_config(config: &TraceConfig) -> Result<rustls::ClientConfig, Error> {
    let Some(pem) = certificate(config)? else {
        return tls::web().map_err(|e| Error::Client(e.to_string()));
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        certificate
            .map_err(|e| e.to_string())
            .and_then(|c| roots.add(c).map_err(|e| e.to_string()))
            .map_err(|problem| bad_certificate(config, problem))?;
    }
    tls::trusting(roots).map_err(|e| Error::Client(e.to_string()))
}

/// The configured certificate file, which holds at least one certificate.
fn certificate(config: &TraceConfig) -> Result<Option<Vec<u8>>, Error> {
    let Some(path) = &config.certificate else {
        return Ok(None);
    };
    let pem = std::fs::read(path).map_err(|e| bad_certificate(config, e.to_string()))?;
    CertificateDer::from_pem_slice(&pem).map_err(|e| bad_certificate(config, e.to_string()))?;
    Ok(Some(pem))
}

fn bad_certificate(config: &TraceConfig, problem: String) -> Error {
    Error::Certificate { path: config.certificate.clone().unwrap_or_default(), problem }
}

fn bad_endpoint(config: &TraceConfig, error: &dyn std::error::Error) -> Error {
    Error::Endpoint { endpoint: config.printable_endpoint(), problem: chain(error) }
}

/// The configured headers, marked so that no debug output shows their values.
fn header_map(config: &TraceConfig) -> Result<HeaderMap, Error> {
    let mut headers = HeaderMap::new();
    for (name, value) in &config.headers {
        let refuse = || Error::Header { name: name.clone() };
        let key: HeaderName = name.parse().map_err(|_| refuse())?;
        let mut value = HeaderValue::from_str(value).map_err(|_| refuse())?;
        value.set_sensitive(true);
        headers.insert(key, value);
    }
    Ok(headers)
}

/// The configured headers for gRPC.
pub(crate) fn metadata(config: &TraceConfig) -> Result<MetadataMap, Error> {
    let mut metadata = MetadataMap::new();
    for (name, value) in &config.headers {
        let refuse = || Error::Header { name: name.clone() };
        let key: tonic::metadata::AsciiMetadataKey = name.parse().map_err(|_| refuse())?;
        let mut value = MetadataValue::try_from(value).map_err(|_| refuse())?;
        value.set_sensitive(true);
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// Passes request bytes through and reads the acknowledgement. An answer that
/// cannot be read is a value here, since as a status it would look like a
/// refusal by the collector.
#[derive(Debug, Clone, Copy)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Result<ExportTraceServiceResponse, prost::DecodeError>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        dst.reserve(item.len());
        dst.put(item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Result<ExportTraceServiceResponse, prost::DecodeError>;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        // Take the whole frame, or what a failed read leaves is read as the next one.
        let frame = src.copy_to_bytes(src.remaining());
        Ok(Some(ExportTraceServiceResponse::decode(frame)))
    }
}

fn accepted(answer: ExportTraceServiceResponse) -> Accepted {
    let partial = answer.partial_success.unwrap_or_default();
    Accepted {
        rejected_spans: u64::try_from(partial.rejected_spans).unwrap_or(0),
        message: Some(short(&partial.error_message)).filter(|m| !m.is_empty()),
    }
}

/// Some collectors answer in JSON whatever they were sent.
fn accepted_json(answer: &serde_json::Value) -> Accepted {
    let partial = &answer["partialSuccess"];
    let rejected = &partial["rejectedSpans"];
    Accepted {
        rejected_spans: rejected.as_u64().or_else(|| rejected.as_str()?.parse().ok()).unwrap_or(0),
        message: partial["errorMessage"].as_str().map(short).filter(|m| !m.is_empty()),
    }
}

/// Retrying is right here: whatever answered is not the collector, and the
/// spans are nowhere.
fn bad_answer(problem: &dyn std::fmt::Display) -> SendError {
    SendError::new(ErrorKind::BadAnswer, true, problem.to_string())
}

fn http_error(error: reqwest::Error) -> SendError {
    let kind = if error.is_timeout() { ErrorKind::Timeout } else { ErrorKind::Connection };
    // The URL may hold credentials.
    SendError::new(kind, true, chain(&error.without_url()))
}

fn grpc_error(status: &Status) -> SendError {
    // Only a status that was made on this side has a source.
    if let Some(source) = std::error::Error::source(status) {
        return SendError::new(ErrorKind::Connection, true, chain(source));
    }
    // tonic made these, not the collector: what came was no gRPC. It marks
    // them by nothing but their words; a test notices when those change.
    let words = status.message();
    if words.starts_with("protocol error") || words.starts_with("grpc-status header missing") {
        return bad_answer(&words);
    }
    let retry_info = status.get_details_retry_info();
    let is_too_large = matches!(status.code(), Code::ResourceExhausted | Code::OutOfRange)
        && retry_info.is_none()
        && is_about_size(words);
    let retryable = match status.code() {
        Code::OutOfRange => !is_too_large,
        Code::Cancelled | Code::DeadlineExceeded | Code::Aborted | Code::Unavailable | Code::DataLoss => true,
        // Without a hint when to come back, OTLP reads it as "never".
        Code::ResourceExhausted => retry_info.is_some(),
        _ => false,
    };
    let verdict = match status.code() {
        _ if is_too_large => Verdict::TooLarge,
        Code::InvalidArgument => Verdict::BadData,
        Code::Internal | Code::Unknown => Verdict::Unclear,
        _ => Verdict::Later,
    };
    let message = format!("{:?} {}", status.code(), status.message());
    let retry_after = retry_info.and_then(|info| info.retry_delay).map(|d| d.min(MAX_RETRY_AFTER));
    SendError {
        verdict,
        retry_after: retry_after.filter(|_| retryable),
        ..SendError::new(ErrorKind::Refused, retryable, message)
    }
}

/// gRPC has no code for a message that is too large: servers say it in the words of their library
/// (Go "received message larger than max", Java "exceeds maximum size", Rust "length too large").
fn is_about_size(words: &str) -> bool {
    let words = words.to_ascii_lowercase();
    ["larger than", "too large", "exceeds", "too big", "maximum size"].iter().any(|hint| words.contains(hint))
}

/// `Retry-After`: seconds, or a date.
fn retry_after(value: &HeaderValue, now: DateTime<Utc>) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => (DateTime::parse_from_rfc2822(text).ok()?.to_utc() - now).to_std().unwrap_or_default(),
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

/// Compressing a megabyte takes long enough to keep it off the runtime's threads.
async fn gzip(request: Bytes) -> Result<Bytes, SendError> {
    let compressed = tokio::task::spawn_blocking(move || {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&request)?;
        encoder.finish()
    });
    match compressed.await {
        Ok(Ok(bytes)) => Ok(bytes.into()),
        Ok(Err(e)) => Err(SendError::new(ErrorKind::Connection, true, format!("gzip: {e}"))),
        Err(e) => Err(SendError::new(ErrorKind::Connection, true, format!("gzip: {e}"))),
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// One line of bounded length that is safe to print.
fn short(text: &str) -> String {
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(300).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_as_seconds_or_date_and_bounded() {
        let now = DateTime::parse_from_rfc2822("Wed, 21 Oct 2015 07:28:00 GMT").unwrap().to_utc();
        let read = |text: &'static str| retry_after(&HeaderValue::from_static(text), now);
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("99999999"), Some(MAX_RETRY_AFTER));
        assert_eq!(read("Wed, 21 Oct 2015 07:28:09 GMT"), Some(Duration::from_secs(9)));
        assert_eq!(read("Wed, 21 Oct 2015 07:27:00 GMT"), Some(Duration::ZERO));
        assert_eq!(read("soon"), None);
        assert_eq!(read("-1"), None);
    }

    #[test]
    fn grpc_codes_are_retried_as_otlp_says() {
        let retried = |code| grpc_error(&Status::new(code, "x")).retryable;
        for code in [
            Code::Cancelled,
            Code::DeadlineExceeded,
            Code::Aborted,
            Code::OutOfRange,
            Code::Unavailable,
            Code::DataLoss,
        ] {
            assert!(retried(code), "{code:?}");
        }
        for code in [
            Code::InvalidArgument,
            Code::NotFound,
            Code::PermissionDenied,
            Code::Unauthenticated,
            Code::ResourceExhausted,
            Code::FailedPrecondition,
            Code::Unimplemented,
            Code::Internal,
            Code::Unknown,
        ] {
            assert!(!retried(code), "{code:?}");
        }
        let details = tonic_types::ErrorDetails::with_retry_info(Some(Duration::from_secs(3)));
        let error = grpc_error(&Status::with_error_details(Code::ResourceExhausted, "busy", details));
        assert!(error.retryable);
        assert_eq!((error.retry_after, error.verdict), (Some(Duration::from_secs(3)), Verdict::Later));
    }

    #[test]
    fn only_the_size_and_bad_data_are_blamed_on_what_was_sent() {
        let verdict = |code, words| grpc_error(&Status::new(code, words)).verdict;
        for (code, words) in [
            (Code::ResourceExhausted, "grpc: received message larger than max (5000000 vs. 4194304)"),
            (Code::ResourceExhausted, "gRPC message exceeds maximum size 4194304: 5000000"),
            (
                Code::OutOfRange,
                "Error, decoded message length too large: found 5000000 bytes, the limit is: 4194304 bytes",
            ),
        ] {
            assert_eq!(verdict(code, words), Verdict::TooLarge, "{words}");
        }
        assert_eq!(verdict(Code::ResourceExhausted, "quota"), Verdict::Later);
        assert_eq!(verdict(Code::InvalidArgument, "no"), Verdict::BadData);
        assert_eq!(verdict(Code::Internal, "no"), Verdict::Unclear);
        for code in
            [Code::Unauthenticated, Code::PermissionDenied, Code::Unimplemented, Code::NotFound, Code::Unavailable]
        {
            assert_eq!(verdict(code, "no"), Verdict::Later, "{code:?}");
        }
    }

    #[test]
    fn a_json_answer_is_read_in_both_spellings_of_numbers() {
        let read = |text| accepted_json(&serde_json::from_str(text).unwrap());
        assert_eq!(read("{}"), Accepted { rejected_spans: 0, message: None });
        let partial = r#"{"partialSuccess":{"rejectedSpans":"3","errorMessage":"no"}}"#;
        assert_eq!(read(partial), Accepted { rejected_spans: 3, message: Some("no".into()) });
        assert_eq!(read(r#"{"partialSuccess":{"rejectedSpans":3}}"#).rejected_spans, 3);
    }

    #[tokio::test]
    async fn a_certificate_file_that_is_none_is_named() {
        let config = |path: &str, protocol| TraceConfig {
            certificate: Some(path.into()),
            endpoint: "https://collector.invalid".into(),
            protocol,
            ..TraceConfig::default()
        };
        let empty = tempfile::NamedTempFile::new().unwrap();
        let empty = empty.path().to_str().unwrap();
        for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
            for path in ["/nonexistent.pem", empty] {
                let error = Transport::connect(&config(path, protocol)).unwrap_err().to_string();
                assert!(error.contains(path), "{error}");
            }
        }
        let trusted = TraceConfig { certificate: None, ..config("", Protocol::Grpc) };
        Transport::connect(&trusted).unwrap();
    }
}
