//! A strict OTLP receiver on loopback, gRPC and HTTP/protobuf on one port.
//!
//! It keeps every span it accepted, refuses what the protocol forbids, and
//! can be told to misbehave like collectors and proxies do.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use prost::bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codec::CompressionEncoding;
use tonic::codegen::Service;
use tonic::{Code, Status};

/// Longest a test waits for spans before it fails.
const DEADLINE: Duration = Duration::from_mins(1);

/// How the receiver behaves from now on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Behaviour {
    /// Takes what is valid.
    #[default]
    Accept,
    /// Says that it rejected so many spans of each request, and keeps the rest.
    Partial(i64),
    /// Reads the request and never answers.
    Hang,
    /// Answers this gRPC code, or the HTTP status with `Retry-After: 7`.
    Refuse(Code, StatusCode),
    /// Takes no request of more bytes: 413, or what gRPC servers say of such.
    TooLarge(usize),
    /// Refuses a request for good, 400 or `INVALID_ARGUMENT`, if any of its spans has this correlation id.
    RefuseSpans(&'static str),
    /// Answers 500 or INTERNAL if any span of the request has this correlation id.
    BreakAt(&'static str),
    /// Answers success with a body that is no protobuf.
    Garbage,
    /// Answers success with a web page, like a proxy that routes elsewhere.
    WebPage,
    /// Answers something that is not even HTTP.
    GarbageBytes,
    /// Reads the head of the request, then closes the connection.
    CloseMidStream,
}

/// A span as it arrived, with what its request said around it.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// `service.name` of its resource.
    pub service: String,
    /// Name of its instrumentation scope.
    pub scope: String,
    /// The span itself.
    pub span: Span,
}

impl Received {
    /// The value of a string attribute.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.attribute(key)? {
            any_value::Value::StringValue(text) => Some(text),
            _ => None,
        }
    }

    /// The value of an integer attribute.
    pub fn int(&self, key: &str) -> Option<i64> {
        match self.attribute(key)? {
            any_value::Value::IntValue(value) => Some(*value),
            _ => None,
        }
    }

    fn attribute(&self, key: &str) -> Option<&any_value::Value> {
        let found = self.span.attributes.iter().find(|kv| kv.key == key)?;
        found.value.as_ref()?.value.as_ref()
    }
}

/// What arrived so far.
#[derive(Debug, Default)]
struct State {
    behaviour: Behaviour,
    spans: Vec<Received>,
    violations: Vec<String>,
    requests: u64,
    compressed: u64,
    headers: Vec<HeaderMap>,
}

/// A running receiver; it stops when dropped.
#[derive(Debug)]
pub struct Receiver {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Ends the listener and its connections.
    up: CancellationToken,
    listening: Option<tokio::task::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Ticks with every change of the state.
    changed: watch::Sender<u64>,
}

impl Shared {
    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        // A test that panicked elsewhere has its own message.
        let result = f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.send_modify(|n| *n += 1);
        result
    }

    fn behaviour(&self) -> Behaviour {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).behaviour.clone()
    }
}

impl Receiver {
    /// Listens on a free port of loopback.
    pub async fn start() -> Self {
        let (changed, _) = watch::channel(0);
        let mut receiver = Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            shared: Arc::new(Shared { state: Mutex::default(), changed }),
            up: CancellationToken::new(),
            listening: None,
        };
        receiver.up().await;
        receiver
    }

    /// Where it listens: `http://127.0.0.1:<port>`, for gRPC and as HTTP base.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Changes what happens to requests that arrive from now on.
    pub fn behave(&self, behaviour: Behaviour) {
        self.shared.with(|state| state.behaviour = behaviour);
    }

    /// Stops listening and cuts every connection; the port stays its own.
    pub async fn down(&mut self) {
        self.up.cancel();
        if let Some(listening) = self.listening.take() {
            listening.await.expect("the listener does not panic");
        }
    }

    /// Listens again on the same port after [`down`](Self::down).
    pub async fn up(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("the receiver's port is free");
        self.address = listener.local_addr().expect("a bound listener has an address");
        self.up = CancellationToken::new();
        self.listening = Some(tokio::spawn(listen(listener, Arc::clone(&self.shared), self.up.clone())));
    }

    /// All spans accepted so far.
    pub fn spans(&self) -> Vec<Received> {
        self.shared.with(|state| state.spans.clone())
    }

    /// The spans of one trace.
    pub fn trace(&self, trace_id: [u8; 16]) -> Vec<Received> {
        self.spans().into_iter().filter(|r| r.span.trace_id == trace_id).collect()
    }

    /// Requests that reached the receiver, whatever became of them.
    pub fn requests(&self) -> u64 {
        self.shared.with(|state| state.requests)
    }

    /// Requests that came compressed.
    pub fn compressed_requests(&self) -> u64 {
        self.shared.with(|state| state.compressed)
    }

    /// The headers of the requests, in order.
    pub fn headers(&self) -> Vec<HeaderMap> {
        self.shared.with(|state| state.headers.clone())
    }

    /// What was wrong with requests that were refused as invalid.
    pub fn violations(&self) -> Vec<String> {
        self.shared.with(|state| state.violations.clone())
    }

    /// Waits until `enough` is true of the spans, and returns them. Panics
    /// after 60 s with what had arrived by then.
    pub async fn wait_for(&self, enough: impl Fn(&[Received]) -> bool) -> Vec<Received> {
        self.wait(|state| enough(&state.spans).then(|| state.spans.clone())).await
    }

    /// Waits until so many requests have reached the receiver.
    pub async fn wait_for_requests(&self, requests: u64) {
        self.wait(|state| (state.requests >= requests).then_some(())).await;
    }

    async fn wait<T>(&self, done: impl Fn(&State) -> Option<T>) -> T {
        let mut changed = self.shared.changed.subscribe();
        let arrived = async {
            loop {
                changed.borrow_and_update();
                let found = done(&self.shared.state.lock().unwrap_or_else(PoisonError::into_inner));
                if let Some(found) = found {
                    return found;
                }
                changed.changed().await.expect("the receiver owns the sender");
            }
        };
        let found = tokio::time::timeout(DEADLINE, arrived).await;
        found.unwrap_or_else(|_| panic!("not enough within {DEADLINE:?}: {:#?}", self.summary()))
    }

    fn summary(&self) -> (u64, Vec<String>, Vec<String>) {
        self.shared.with(|state| {
            let names = state.spans.iter().map(|r| format!("{} {}", r.service, r.span.name)).collect();
            (state.requests, names, state.violations.clone())
        })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.up.cancel();
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>, up: CancellationToken) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = up.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        // A client that is gone before it is accepted is its own problem.
        let Ok((stream, _)) = accepted else { continue };
        let (shared, closed) = (Arc::clone(&shared), up.child_token());
        connections.spawn(async move {
            tokio::select! {
                () = closed.cancelled() => {}
                () = serve(stream, shared, closed.clone()) => {}
            }
        });
    }
    connections.shutdown().await;
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>, closed: CancellationToken) {
    if shared.behaviour() == Behaviour::GarbageBytes {
        shared.with(|state| state.requests += 1);
        let _ = stream.write_all(b"\xde\xad\xbe\xef this is no HTTP\r\n\r\n").await;
        let _ = stream.shutdown().await;
        return;
    }
    let service = hyper::service::service_fn(move |request| {
        let (shared, closed) = (Arc::clone(&shared), closed.clone());
        async move { Ok::<_, Infallible>(answer(request, shared, closed).await) }
    });
    // A connection that breaks is part of the tests.
    let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>, closed: CancellationToken) -> Response<Body> {
    let grpc = request.headers().get(CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"application/grpc"));
    let behaviour = shared.with(|state| {
        state.requests += 1;
        state.headers.push(request.headers().clone());
        state.compressed += u64::from(
            request.headers().get(CONTENT_ENCODING).is_some_and(|v| v == "gzip")
                || request.headers().get("grpc-encoding").is_some_and(|v| v == "gzip"),
        );
        state.behaviour.clone()
    });
    match behaviour {
        Behaviour::Hang => {
            let _ = request.into_body().collect().await;
            std::future::pending().await
        }
        // A connection that was well when it was made is closed: what is said on the next one is garbage.
        Behaviour::CloseMidStream | Behaviour::GarbageBytes => {
            closed.cancel();
            std::future::pending().await
        }
        Behaviour::Garbage => {
            let _ = request.into_body().collect().await;
            // Field 1 with a length that goes far beyond the message.
            let message: &[u8] = b"\x0a\xff\xff\x03garbage";
            let frame: Bytes = if grpc { [b"\0\0\0\0\x0b", message].concat().into() } else { message.into() };
            let content_type = if grpc { "application/grpc" } else { "application/x-protobuf" };
            let body = Full::new(frame).with_trailers(async {
                let ok = HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), "0".parse().ok()?)]);
                Some(Ok(ok))
            });
            response(StatusCode::OK, content_type, Body::new(body))
        }
        Behaviour::WebPage => {
            let _ = request.into_body().collect().await;
            let page = Full::<Bytes>::from("<html><body>Welcome</body></html>");
            response(StatusCode::OK, "text/html", Body::new(page))
        }
        Behaviour::Refuse(code, _) if grpc => Status::new(code, "told to refuse").into_http(),
        Behaviour::Refuse(_, status) => {
            let mut response = response(status, "text/plain", Body::new(Full::<Bytes>::from("told to refuse")));
            response.headers_mut().insert(RETRY_AFTER, http::HeaderValue::from_static("7"));
            response
        }
        Behaviour::Accept
        | Behaviour::Partial(_)
        | Behaviour::TooLarge(_)
        | Behaviour::RefuseSpans(_)
        | Behaviour::BreakAt(_)
            if grpc =>
        {
            let mut service = TraceServiceServer::new(Collector { shared, behaviour })
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(usize::MAX);
            match service.call(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        }
        _ => over_http(request, Collector { shared, behaviour }).await,
    }
}

fn response(status: StatusCode, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

async fn over_http(request: Request<Incoming>, collector: Collector) -> Response<Body> {
    let request = match read_http(request).await {
        Ok(request) => request,
        Err(problem) => return invalid(&collector, problem),
    };
    if let Some((status, _, problem)) = collector.refusal(&request) {
        return response(status, "text/plain", Body::new(Full::<Bytes>::from(problem)));
    }
    match collector.take(request) {
        Ok(answer) => {
            let body = Full::<Bytes>::from(answer.encode_to_vec());
            response(StatusCode::OK, "application/x-protobuf", Body::new(body))
        }
        Err(problem) => invalid(&collector, problem),
    }
}

fn invalid(collector: &Collector, problem: String) -> Response<Body> {
    let body = Full::<Bytes>::from(problem.clone());
    collector.shared.with(|state| state.violations.push(problem));
    response(StatusCode::BAD_REQUEST, "text/plain", Body::new(body))
}

async fn read_http(request: Request<Incoming>) -> Result<ExportTraceServiceRequest, String> {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    if head.method != Method::POST || path != "/v1/traces" {
        return Err(format!("{} {path} is not POST /v1/traces", head.method));
    }
    let content_type = head.headers.get(CONTENT_TYPE);
    if content_type.is_none_or(|v| v != "application/x-protobuf") {
        return Err(format!("content-type is {content_type:?}"));
    }
    let body = body.collect().await.map_err(|e| format!("body: {e}"))?.to_bytes();
    let body = match head.headers.get(CONTENT_ENCODING) {
        None => body.to_vec(),
        Some(encoding) if encoding == "gzip" => {
            let mut plain = Vec::new();
            flate2::read::GzDecoder::new(body.as_ref()).read_to_end(&mut plain).map_err(|e| format!("gzip: {e}"))?;
            plain
        }
        Some(other) => return Err(format!("content-encoding {other:?}")),
    };
    ExportTraceServiceRequest::decode(body.as_slice()).map_err(|e| format!("protobuf: {e}"))
}

/// Takes decoded requests.
#[derive(Debug)]
struct Collector {
    shared: Arc<Shared>,
    behaviour: Behaviour,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, Status> {
        let request = request.into_inner();
        if let Some((_, code, problem)) = self.refusal(&request) {
            return Err(Status::new(code, problem));
        }
        self.take(request).map(tonic::Response::new).map_err(|problem| {
            self.shared.with(|state| state.violations.push(problem.clone()));
            Status::invalid_argument(problem)
        })
    }
}

impl Collector {
    /// How it was told to refuse this valid request, if it was.
    fn refusal(&self, request: &ExportTraceServiceRequest) -> Option<(StatusCode, Code, String)> {
        let has = |id: &str| {
            let scopes = request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
            scopes.flat_map(|scope| &scope.spans).flat_map(|span| &span.attributes).any(|kv| {
                let value = kv.value.as_ref().and_then(|value| value.value.as_ref());
                kv.key == "correlation_id" && value == Some(&any_value::Value::StringValue(id.to_owned()))
            })
        };
        match self.behaviour {
            Behaviour::TooLarge(most) if request.encoded_len() > most => {
                let problem = format!("received message larger than max ({} vs. {most})", request.encoded_len());
                Some((StatusCode::PAYLOAD_TOO_LARGE, Code::ResourceExhausted, problem))
            }
            Behaviour::RefuseSpans(id) if has(id) => {
                Some((StatusCode::BAD_REQUEST, Code::InvalidArgument, "told to refuse".into()))
            }
            Behaviour::BreakAt(id) if has(id) => {
                Some((StatusCode::INTERNAL_SERVER_ERROR, Code::Internal, "told to break".into()))
            }
            _ => None,
        }
    }

    /// Keeps the spans of a valid request; of an invalid one it keeps nothing.
    fn take(&self, request: ExportTraceServiceRequest) -> Result<ExportTraceServiceResponse, String> {
        let mut received = Vec::new();
        for resource_spans in request.resource_spans {
            let resource = resource_spans.resource.ok_or("ResourceSpans without a resource")?;
            unique_keys(&resource.attributes).map_err(|e| format!("resource: {e}"))?;
            let service = resource
                .attributes
                .iter()
                .find(|kv| kv.key == "service.name")
                .and_then(|kv| kv.value.as_ref()?.value.as_ref())
                .and_then(|value| match value {
                    any_value::Value::StringValue(name) if !name.is_empty() => Some(name.clone()),
                    _ => None,
                })
                .ok_or("resource without service.name")?;
            for scope_spans in resource_spans.scope_spans {
                let scope = scope_spans.scope.map(|s| s.name).unwrap_or_default();
                for span in scope_spans.spans {
                    check(&span).map_err(|e| format!("span {:?}: {e}", span.name))?;
                    received.push(Received { service: service.clone(), scope: scope.clone(), span });
                }
            }
        }
        if received.is_empty() {
            return Err("a request without spans".into());
        }
        let rejected = match self.behaviour {
            Behaviour::Partial(rejected) => rejected,
            _ => 0,
        };
        received.truncate(received.len() - usize::try_from(rejected).unwrap_or(0).min(received.len()));
        self.shared.with(|state| state.spans.extend(received));
        let partial_success = (rejected > 0)
            .then(|| ExportTracePartialSuccess { rejected_spans: rejected, error_message: "told to reject".into() });
        Ok(ExportTraceServiceResponse { partial_success })
    }
}

/// What the OTLP data model demands of a span.
fn check(span: &Span) -> Result<(), String> {
    let id = |what: &str, id: &[u8], len: usize| {
        let valid = id.len() == len && id.iter().any(|b| *b != 0);
        if valid { Ok(()) } else { Err(format!("{what} {id:?}")) }
    };
    id("trace id", &span.trace_id, 16)?;
    id("span id", &span.span_id, 8)?;
    if !span.parent_span_id.is_empty() {
        id("parent", &span.parent_span_id, 8)?;
    }
    if span.name.is_empty() {
        return Err("no name".into());
    }
    if !(1..=5).contains(&span.kind) {
        return Err(format!("kind {}", span.kind));
    }
    if span.start_time_unix_nano == 0 || span.end_time_unix_nano < span.start_time_unix_nano {
        return Err(format!("from {} to {}", span.start_time_unix_nano, span.end_time_unix_nano));
    }
    if span.flags >> 10 != 0 {
        return Err(format!("flags {:#x}", span.flags));
    }
    unique_keys(&span.attributes)?;
    for event in &span.events {
        if event.name.is_empty() || event.time_unix_nano == 0 {
            return Err(format!("event {event:?}"));
        }
        unique_keys(&event.attributes)?;
    }
    for link in &span.links {
        id("linked trace", &link.trace_id, 16)?;
        id("linked span", &link.span_id, 8)?;
    }
    Ok(())
}

fn unique_keys(attributes: &[KeyValue]) -> Result<(), String> {
    let mut seen = HashSet::new();
    for KeyValue { key, value, .. } in attributes {
        if key.is_empty() || !seen.insert(key) {
            return Err(format!("attribute {key:?} is empty or there twice"));
        }
        if !matches!(value, Some(AnyValue { value: Some(_) })) {
            return Err(format!("attribute {key:?} has no value"));
        }
    }
    Ok(())
}

/// The names of a trace's spans, indented by depth, siblings by start time.
/// Panics when a span's parent is neither there nor remote.
pub fn outline(spans: &[Received]) -> Vec<String> {
    const IS_REMOTE: u32 = 0x200;
    let ids: HashSet<_> = spans.iter().map(|r| &r.span.span_id).collect();
    let mut children: HashMap<&[u8], Vec<&Span>> = HashMap::new();
    for Received { span, .. } in spans {
        let parent = if ids.contains(&span.parent_span_id) { span.parent_span_id.as_slice() } else { &[] };
        let orphan = parent.is_empty() && !span.parent_span_id.is_empty() && span.flags & IS_REMOTE == 0;
        assert!(!orphan, "{} is an orphan", span.name);
        children.entry(parent).or_default().push(span);
    }
    for siblings in children.values_mut() {
        siblings.sort_by_key(|s| (s.start_time_unix_nano, s.end_time_unix_nano, s.name.clone()));
    }
    let mut lines = Vec::new();
    let mut open: Vec<(usize, &Span)> = Vec::new();
    let root: &[u8] = &[];
    open.extend(children.get(root).into_iter().flatten().rev().map(|s| (0, *s)));
    while let Some((depth, span)) = open.pop() {
        lines.push(format!("{}{}", "  ".repeat(depth), span.name));
        let below = children.get(span.span_id.as_slice()).into_iter().flatten().rev();
        open.extend(below.map(|s| (depth + 1, *s)));
    }
    lines
}
