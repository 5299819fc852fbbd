//! The one way to make a route of the API: its parts are typed, and the router, the checks and
//! the `OpenAPI` document all come from the same declaration, so none of them can lie.
//!
//! An operation without a scope cannot be declared, except by saying [`Api::public`].

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts as _, Path, Query, Request};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodFilter, on};
use futures_util::StreamExt as _;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use schemars::generate::{Contract, SchemaSettings};
use schemars::{JsonSchema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tasker_shared::redact;
use tasker_shared::store::tx;
use tasker_shared::template::InputSchema;

use crate::State;
use crate::auth::{Scope, sha256};
use crate::guard::{Caller, CsrfIn, identify};
use crate::problem::{self, Details, MALFORMED_BODY, Problem, TOO_LARGE, UNSUPPORTED_MEDIA_TYPE, plain};
use crate::shares::{Share, no_body};

/// The most bytes of a body, unless the operation says otherwise: a payload and what surrounds it.
pub const MAX_BODY: usize = 1024 * 1024 + 64 * 1024;
/// A body of so many bytes takes no room of others.
const SMALL_BODY: usize = 64 * 1024;
/// The deepest nesting of a body: a payload's own limit, and what surrounds it.
const MAX_DEPTH: usize = 72;

/// No path parameters, no query, or no body.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// A request that may go on: its caller has the operation's scope, its parts were read.
///
/// The namespaces are the handler's to check, since only it knows what the request is about.
#[derive(Debug)]
pub struct Call<P, Q, B> {
    /// The server.
    pub state: State,
    /// Who asks.
    pub who: Caller,
    /// As they came.
    pub headers: HeaderMap,
    /// From the path.
    pub path: P,
    /// From the query.
    pub query: Q,
    /// From the body.
    pub body: B,
    /// The way to the database.
    pub(crate) database: Database,
}

/// How a request gets connections.
#[derive(Debug, Clone)]
pub(crate) struct Database {
    pub(crate) pool: PgPool,
    /// Whether the request may change something.
    pub(crate) writes: bool,
}

impl Database {
    /// A connection. Nobody holds one while asking for another: give it to what needs it, or let go
    /// of it first. For a request that may change something it has just answered.
    pub(crate) async fn conn(&self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        if self.writes { tx::live(&self.pool).await } else { self.pool.acquire().await }
    }
}

/// A good answer.
#[derive(Debug)]
pub struct Reply<T> {
    headers: HeaderMap,
    body: T,
}

impl<T> From<T> for Reply<T> {
    fn from(body: T) -> Self {
        Self { headers: HeaderMap::new(), body }
    }
}

impl<T> Reply<T> {
    /// With one more header; a value that is no header value is left out.
    #[must_use]
    pub fn header(mut self, name: &'static str, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }
}

/// What a handler answers.
pub type Answer<T> = Result<Reply<T>, Problem>;

/// What is said of an operation beside its types.
#[derive(Debug, Clone)]
pub struct Operation {
    method: Method,
    path: &'static str,
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    scope: Option<Scope>,
    status: StatusCode,
    writes: bool,
    max_body: usize,
    headers: &'static [(&'static str, &'static str)],
    /// What the document says of the body.
    body: Option<Arc<InputSchema>>,
}

impl Operation {
    fn new(method: Method, path: &'static str, id: &'static str, summary: &'static str) -> Self {
        let tag = path.trim_start_matches("/v1/").split('/').next().unwrap_or_default();
        let writes = method != Method::GET;
        Self {
            method,
            path,
            id,
            tag,
            summary,
            scope: None,
            status: StatusCode::OK,
            writes,
            max_body: MAX_BODY,
            headers: &[],
            body: None,
        }
    }

    /// Reads something.
    pub fn get(path: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self::new(Method::GET, path, id, summary)
    }

    /// Does something.
    pub fn post(path: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self::new(Method::POST, path, id, summary)
    }

    /// Sets something to what the body says.
    pub fn put(path: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self::new(Method::PUT, path, id, summary)
    }

    /// Removes something.
    pub fn delete(path: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self::new(Method::DELETE, path, id, summary)
    }

    /// The status of a good answer, if it is not 200.
    #[must_use]
    pub fn answers(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    /// A POST that changes nothing, such as a check.
    #[must_use]
    pub fn only_reads(self) -> Self {
        Self { writes: false, ..self }
    }

    /// The most bytes of its body.
    #[must_use]
    pub fn body_up_to(self, max_body: usize) -> Self {
        Self { max_body, ..self }
    }

    /// Request headers that it reads, each with what it means.
    #[must_use]
    pub fn reads_headers(self, headers: &'static [(&'static str, &'static str)]) -> Self {
        Self { headers, ..self }
    }

    fn filter(&self) -> MethodFilter {
        match self.method {
            Method::POST => MethodFilter::POST,
            Method::PUT => MethodFilter::PUT,
            Method::DELETE => MethodFilter::DELETE,
            _ => MethodFilter::GET,
        }
    }
}

/// The operations of the API while they are put together.
pub struct Api {
    router: Router<State>,
    outputs: SchemaGenerator,
    inputs: SchemaGenerator,
    paths: BTreeMap<&'static str, Map<String, Value>>,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("paths", &self.paths.keys()).finish_non_exhaustive()
    }
}

impl Default for Api {
    fn default() -> Self {
        let outputs = SchemaSettings::draft2020_12().with(|settings| {
            settings.meta_schema = None;
            settings.definitions_path = "/components/schemas".into();
            settings.contract = Contract::Serialize;
        });
        let inputs = SchemaSettings::draft2020_12().with(|settings| {
            settings.meta_schema = None;
            settings.inline_subschemas = true;
            settings.contract = Contract::Deserialize;
        });
        Self {
            router: Router::new(),
            outputs: outputs.into_generator(),
            inputs: inputs.into_generator(),
            paths: BTreeMap::new(),
        }
    }
}

impl Api {
    /// Adds an operation that answers JSON to callers with this scope.
    pub fn add<P, Q, B, T, H, F>(&mut self, operation: Operation, scope: Scope, handler: H)
    where
        P: DeserializeOwned + JsonSchema + Send + 'static,
        Q: DeserializeOwned + JsonSchema + Send + 'static,
        B: DeserializeOwned + JsonSchema + Send + 'static,
        T: Serialize + JsonSchema + Send + 'static,
        H: Fn(Call<P, Q, B>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Answer<T>> + Send,
    {
        let schema = self.outputs.subschema_for::<T>().to_value();
        let operation = Operation { scope: Some(scope), body: self.body::<B>(&operation), ..operation };
        self.document::<P, Q, B>(&operation, "application/json", &schema);
        let declared = Arc::new(operation);
        self.route(&Arc::clone(&declared), move |state: State, request: Request| {
            let (operation, handler) = (Arc::clone(&declared), handler.clone());
            async move {
                let if_none_match = request.headers().get(header::IF_NONE_MATCH).cloned();
                let (call, _room) = Box::pin(read::<P, Q, B>(&operation, state, request)).await?;
                let Reply { headers, body } = handler(call).await?;
                json_response(&operation, headers, &body, if_none_match.as_ref())
            }
        });
    }

    /// Adds an operation that makes its response itself, of this media type.
    pub fn add_raw<P, Q, B, H, F>(&mut self, operation: Operation, scope: Scope, media: &str, handler: H)
    where
        P: DeserializeOwned + JsonSchema + Send + 'static,
        Q: DeserializeOwned + JsonSchema + Send + 'static,
        B: DeserializeOwned + JsonSchema + Send + 'static,
        H: Fn(Call<P, Q, B>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Response, Problem>> + Send,
    {
        let operation = Operation { scope: Some(scope), body: self.body::<B>(&operation), ..operation };
        self.document::<P, Q, B>(&operation, media, &json!({"type": "string"}));
        let declared = Arc::new(operation);
        self.route(&Arc::clone(&declared), move |state: State, request: Request| {
            let (operation, handler) = (Arc::clone(&declared), handler.clone());
            async move {
                let (call, _room) = Box::pin(read::<P, Q, B>(&operation, state, request)).await?;
                handler(call).await
            }
        });
    }

    /// Adds an operation for anybody, without a credential. It must say nothing about tasks.
    pub fn public<T, H, F>(&mut self, operation: &Operation, handler: H)
    where
        T: JsonSchema,
        H: Fn(State) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response> + Send,
    {
        let schema = self.outputs.subschema_for::<T>().to_value();
        self.document::<Nothing, Nothing, Nothing>(operation, "application/json", &schema);
        self.route(operation, move |state: State, _: Request| {
            let handler = handler.clone();
            async move { Ok(handler(state).await) }
        });
    }

    fn route<H, F>(&mut self, operation: &Operation, handler: H)
    where
        H: Fn(State, Request) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Response, Problem>> + Send,
    {
        let handle = move |axum::extract::State(state): axum::extract::State<State>, request: Request| {
            let answer = handler(state, request);
            async move { answer.await.unwrap_or_else(Problem::into_response) }
        };
        let router = std::mem::take(&mut self.router);
        self.router = router.route(operation.path, on(operation.filter(), handle));
    }

    /// The schema of a body, ready to be asked. One that does not compile is a mistake in the
    /// declaration, which a test that builds the API finds.
    fn body<B: JsonSchema>(&mut self, operation: &Operation) -> Option<Arc<InputSchema>> {
        let schema = self.inputs.subschema_for::<B>().to_value();
        if operation.method == Method::GET {
            return None;
        }
        match InputSchema::compile(&schema) {
            Ok(schema) => Some(Arc::new(schema)),
            Err(error) => panic!("the body of {}: {error}", operation.id),
        }
    }

    fn document<P: JsonSchema, Q: JsonSchema, B: JsonSchema>(
        &mut self,
        operation: &Operation,
        media: &str,
        answer: &Value,
    ) {
        let mut parameters = parameters(&self.inputs.subschema_for::<P>().to_value(), "path");
        parameters.extend(parameters_of_query(self.inputs.subschema_for::<Q>().to_value()));
        for (name, about) in operation.headers {
            parameters.push(json!({"name": name, "in": "header", "description": about, "schema": {"type": "string"}}));
        }
        let mut entry = json!({
            "operationId": operation.id,
            "summary": operation.summary,
            "tags": [operation.tag],
            "responses": {
                operation.status.as_str(): {
                    "description": "It worked",
                    "content": {media: {"schema": answer}},
                },
                "default": {"$ref": "#/components/responses/Problem"},
            },
        });
        if operation.method == Method::GET && media == "application/json" && operation.scope.is_some() {
            entry["responses"]["304"] = json!({"description": "It is what If-None-Match names"});
            parameters.push(json!({"name": "If-None-Match", "in": "header", "description": "The ETag of an earlier answer", "schema": {"type": "string"}}));
        }
        if !parameters.is_empty() {
            entry["parameters"] = Value::Array(parameters);
        }
        let body = self.inputs.subschema_for::<B>().to_value();
        if operation.method != Method::GET && has_properties(&body) {
            let required = body.get("required").and_then(Value::as_array).is_some_and(|names| !names.is_empty());
            entry["requestBody"] = json!({"required": required, "content": {"application/json": {"schema": body}}});
        }
        match operation.scope {
            Some(scope) => {
                entry["security"] = json!([{"key": [scope.as_str()]}, {"session": []}]);
                entry["x-scope"] = scope.as_str().into();
            }
            None => entry["security"] = json!([]),
        }
        let methods = self.paths.entry(operation.path).or_default();
        methods.insert(operation.method.as_str().to_lowercase(), entry);
    }

    /// The routes, and the document that describes them.
    pub fn finish(mut self, server: &str) -> (Router<State>, Value) {
        let problem = self.outputs.subschema_for::<Details>().to_value();
        let codes: Vec<&str> = problem::CODES.iter().map(|code| code.code).collect();
        let scopes: Vec<String> =
            Scope::ALL.iter().map(|scope| format!("- `{}`: {}", scope.as_str(), scope.about())).collect();
        let document = json!({
            "openapi": "3.1.0",
            "info": {
                "title": "Tasker",
                "version": env!("CARGO_PKG_VERSION"),
                "description": format!(
                    "Durable tasks on PostgreSQL, each with one complete trace. A task is one run of a workflow.\n\n\
                     Scopes:\n{}\n\nCodes of problems: {}.", scopes.join("\n"), codes.join(", ")),
            },
            "servers": [{"url": server}],
            "paths": self.paths,
            "components": {
                "schemas": self.outputs.take_definitions(true),
                "responses": {
                    "Problem": {
                        "description": "It was refused, or failed: problem details (RFC 9457) with a stable code",
                        "content": {"application/problem+json": {"schema": problem}},
                    },
                },
                "securitySchemes": {
                    "key": {"type": "http", "scheme": "bearer", "bearerFormat": "tsk_<id>_<secret>"},
                    "session": {"type": "apiKey", "in": "cookie", "name": crate::auth::SESSION_COOKIE,
                        "description": "Writes also need the header x-tasker-csrf"},
                },
            },
        });
        (self.router, document)
    }
}

fn has_properties(schema: &Value) -> bool {
    schema.get("properties").and_then(Value::as_object).is_none_or(|properties| !properties.is_empty())
}

fn parameters(schema: &Value, place: &str) -> Vec<Value> {
    let required: Vec<String> =
        schema.get("required").and_then(|names| serde_json::from_value(names.clone()).ok()).unwrap_or_default();
    let Some(Value::Object(properties)) = schema.get("properties").cloned() else {
        return Vec::new();
    };
    properties
        .into_iter()
        .map(|(name, mut schema)| {
            let about = schema.as_object_mut().and_then(|schema| schema.remove("description"));
            let required = place == "path" || required.contains(&name);
            json!({"name": name, "in": place, "required": required, "schema": schema, "description": about.unwrap_or_default()})
        })
        .collect()
}

/// A parameter of the query is there or not; it is never null.
fn parameters_of_query(mut schema: Value) -> Vec<Value> {
    if let Some(Value::Object(properties)) = schema.get_mut("properties") {
        for property in properties.values_mut() {
            if let Some(Value::Array(types)) = property.get_mut("type") {
                types.retain(|word| word != "null");
                if let [one] = types.as_slice() {
                    property["type"] = one.clone();
                }
            }
        }
    }
    parameters(&schema, "query")
}

/// Checks who asks and reads the parts of a request, the body last. The room of the body is kept
/// until the request has been answered.
async fn read<P, Q, B>(
    operation: &Operation,
    state: State,
    request: Request,
) -> Result<(Call<P, Q, B>, Share<String>), Problem>
where
    P: DeserializeOwned + Send + 'static,
    Q: DeserializeOwned + 'static,
    B: DeserializeOwned + 'static,
{
    let (mut parts, body) = request.into_parts();
    let csrf = if operation.method == Method::GET { CsrfIn::NotNeeded } else { CsrfIn::Header };
    let who = identify(&state, &parts, csrf).await?;
    if let Some(scope) = operation.scope {
        who.require_scope(scope)?;
    }
    if operation.writes && state.config().read_only {
        return Err(problem::READ_ONLY.because("this server was started with --read-only; it changes nothing"));
    }
    let path = path(&mut parts).await?;
    let query = query(&parts.uri)?;
    let mut room = state.room().bodies.none(who.key_id.clone());
    let writes = operation.method != Method::GET;
    let body = if writes {
        json_body(operation, &parts.headers, body, &mut room).await?
    } else {
        serde_json::from_value(json!({})).map_err(|error| MALFORMED_BODY.because(plain(error)))?
    };
    let database = Database { pool: state.pool().clone(), writes };
    Ok((Call { state, who, headers: parts.headers, path, query, body, database }, room))
}

async fn path<P: DeserializeOwned + Send + 'static>(parts: &mut Parts) -> Result<P, Problem> {
    let Path(path) = Path::<P>::from_request_parts(parts, &())
        .await
        .map_err(|error| problem::INVALID_REQUEST.because(plain(error.body_text())).field("path"))?;
    Ok(path)
}

fn query<Q: DeserializeOwned + 'static>(uri: &Uri) -> Result<Q, Problem> {
    let Query(query) = Query::<Q>::try_from_uri(uri)
        .map_err(|error| problem::INVALID_REQUEST.because(plain(error.body_text())).field("query"))?;
    Ok(query)
}

/// A whole body. Once it is no small one any more it takes room, so that many who send large ones
/// at once do not take all memory.
pub(crate) async fn whole(body: Body, max: usize, room: &mut Share<String>) -> Result<Vec<u8>, Problem> {
    let too_large = || TOO_LARGE.because(format!("the body has more than {max} bytes, or broke off"));
    let (mut bytes, mut counted) = (Vec::new(), 0);
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| too_large())?;
        let size = bytes.len() + chunk.len();
        if size > max {
            return Err(too_large());
        }
        if size > SMALL_BODY {
            room.grow(size - counted).map_err(no_body)?;
            counted = size;
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

async fn json_body<B: DeserializeOwned>(
    operation: &Operation,
    headers: &HeaderMap,
    body: Body,
    room: &mut Share<String>,
) -> Result<B, Problem> {
    let bytes = whole(body, operation.max_body, room).await?;
    let value = if bytes.iter().all(u8::is_ascii_whitespace) {
        json!({})
    } else {
        let media = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media = media.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if media != "application/json" && !media.ends_with("+json") {
            return Err(UNSUPPORTED_MEDIA_TYPE.because("content-type: must be application/json").field("content-type"));
        }
        if depth(&bytes) > MAX_DEPTH {
            return Err(MALFORMED_BODY.because(format!("the body nests deeper than {MAX_DEPTH} levels; flatten it")));
        }
        serde_json::from_slice(&bytes).map_err(|error| MALFORMED_BODY.because(plain(error)))?
    };
    if let Some(Err(problems)) = operation.body.as_ref().map(|schema| schema.check(&value)) {
        return Err(Problem::violations(&problems, "input"));
    }
    serde_json::from_value(value).map_err(|error| MALFORMED_BODY.because(plain(error)))
}

/// How deep JSON nests, without parsing it.
fn depth(json: &[u8]) -> usize {
    let (mut now, mut deepest, mut text, mut escaped) = (0_usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if text => escaped = true,
            b'"' => text = !text,
            _ if text => {}
            b'{' | b'[' => {
                now += 1;
                deepest = deepest.max(now);
            }
            b'}' | b']' => now = now.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// JSON with an `ETag`, or 304 if the caller has it.
fn json_response<T: Serialize>(
    operation: &Operation,
    headers: HeaderMap,
    body: &T,
    if_none_match: Option<&HeaderValue>,
) -> Result<Response, Problem> {
    let written = |error: serde_json::Error| {
        tracing::error!(%error, operation = operation.id, "an answer could not be written");
        problem::INTERNAL.because("the server made a mistake; its log says more")
    };
    // Whatever the operation, no secret of a payload leaves.
    let bytes = match redact::shown(&serde_json::to_value(body).map_err(written)?) {
        Some(clean) => serde_json::to_vec(&clean),
        None => serde_json::to_vec(body),
    }
    .map_err(written)?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = operation.status;
    *response.headers_mut() = headers;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    if operation.method == Method::GET {
        // Weak: a compressed answer has the same one.
        let tag = format!("W/\"{}\"", tasker_shared::trace::otlp::hex(&sha256(&bytes)[..12]));
        let known = if_none_match
            .and_then(|value| value.to_str().ok())
            .is_some_and(|list| list.split(',').map(str::trim).any(|one| one == "*" || one == tag || one == &tag[2..]));
        if let Ok(tag) = HeaderValue::from_str(&tag) {
            headers.insert(header::ETAG, tag);
        }
        headers.insert(header::VARY, HeaderValue::from_static("authorization, cookie"));
        if known {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            return Ok(response);
        }
    }
    *response.body_mut() = Body::from(bytes);
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::depth;

    #[test]
    fn brackets_in_texts_are_not_depth() {
        assert_eq!(depth(br#"{"a":[1,{"b":2}]}"#), 3);
        assert_eq!(depth(br#"{"a":"[[[[\"[[["}"#), 1);
        assert_eq!(depth(b"]]]["), 1);
    }
}
