//! A server of its own for each test, and callers with all kinds of keys.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;
use sqlx::PgPool;
use tasker_api::auth::{self, KeySpec, Role, SESSION_COOKIE, Scope};
use tasker_api::{Config, Server};
use tasker_shared::client::{Client, Submit};
use tasker_shared::store::templates;
use tasker_shared::store::tx::{self, PoolOptions};
use tasker_shared::template;
use tasker_testing::TestDatabase;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// A template that needs an `order_id`, in whichever namespace.
pub fn order(namespace: &str) -> String {
    format!(
        "namespace: {namespace}\nname: order\nversion: \"1\"\ninput_schema: {{type: object, required: [order_id]}}\n\
         steps: [{{name: charge, handler: noop}}, {{name: ship, handler: noop, depends_on: [charge]}}]\n"
    )
}

/// The name of the server's sessions, which are not those of the test.
pub const SERVER: &str = "tasker-api";

/// A server that answers, and what it stands on.
pub struct World {
    pub url: String,
    pub address: SocketAddr,
    /// The test's own connections.
    pub client: Client,
    pub http: reqwest::Client,
    pub stop: CancellationToken,
    pub running: JoinHandle<()>,
    _database: TestDatabase,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The value at a JSON pointer.
    pub fn at(&self, pointer: &str) -> Value {
        self.json().pointer(pointer).cloned().unwrap_or(Value::Null)
    }

    /// The code of the problem that it is.
    pub fn code(&self) -> String {
        assert_eq!(self.headers["content-type"], "application/problem+json", "{self:?}");
        self.at("/code").as_str().unwrap_or_default().to_owned()
    }
}

/// Sends it and reads the answer.
pub async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.expect("an answer");
    let (status, headers) = (response.status(), response.headers().clone());
    Answer { status, headers, body: response.text().await.expect("a whole answer") }
}

impl World {
    pub async fn start() -> Self {
        Self::with(Config::default()).await
    }

    /// On a free port of this machine, with one connection to the database: a handler that holds one
    /// while it asks for another never gets it.
    pub async fn with(config: Config) -> Self {
        Self::with_connections(config, 1).await
    }

    /// With so many connections to the database.
    pub async fn with_connections(config: Config, max_connections: u32) -> Self {
        let database = TestDatabase::fresh().await;
        let client = Client::from_pool(database.pool().await);
        let options = PoolOptions { max_connections, application_name: SERVER, ..PoolOptions::default() };
        let pool = tx::pool(&database.url(), &options).await.expect("a pool for the server");
        let config = Config { bind: SocketAddr::from(([127, 0, 0, 1], 0)), ..config };
        let server = Server::bind(Client::from_pool(pool), config).await.expect("a server");
        let (url, address, stop) = (server.url(), server.address(), CancellationToken::new());
        let running = tokio::spawn(server.run(stop.clone()));
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .pool_idle_timeout(Duration::from_mins(1))
            .build()
            .expect("an HTTP client");
        Self { url, address, client, http, stop, running, _database: database }
    }

    pub fn pool(&self) -> &PgPool {
        self.client.pool()
    }

    pub async fn register(&self, yaml: &str) {
        let checked = template::parse("test.yaml", yaml).expect("a good template");
        let mut conn = self.pool().acquire().await.expect("a connection");
        templates::register(&mut conn, &checked).await.expect("registered");
    }

    pub async fn submit(&self, namespace: &str, correlation_id: &str) -> Uuid {
        let input = serde_json::json!({"order_id": correlation_id});
        let request = Submit { correlation_id: Some(correlation_id.into()), ..Submit::new(namespace, "order", input) };
        self.client.submit(request).await.expect("submitted")
    }

    /// A key with this role everywhere.
    pub async fn key(&self, role: Role) -> String {
        self.key_of(role, None, None).await
    }

    pub async fn key_of(&self, role: Role, scopes: Option<Vec<Scope>>, namespaces: Option<&[&str]>) -> String {
        let spec = KeySpec {
            name: format!("test-{}", Uuid::new_v4()),
            role,
            scopes,
            namespaces: namespaces.map(|names| names.iter().map(|&name| name.to_owned()).collect()),
            expires_at: None,
        };
        let mut conn = self.pool().acquire().await.expect("a connection");
        auth::create_key(&mut conn, &spec, "the test").await.expect("a key").key
    }

    /// A cookie of a session of its own.
    pub async fn session(&self, key: &str) -> String {
        let once = auth::once_link(self.pool(), key.split('_').nth(1).unwrap()).await.unwrap();
        let signed_in = send(self.request(Method::GET, &format!("/login?once={once}"))).await;
        let cookie = signed_in.headers["set-cookie"].to_str().unwrap();
        assert!(cookie.starts_with(SESSION_COOKIE));
        cookie.split(';').next().unwrap().to_owned()
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    pub async fn get(&self, key: &str, path: &str) -> Answer {
        send(self.request(Method::GET, path).bearer_auth(key)).await
    }
    pub async fn post(&self, key: &str, path: &str, body: Value) -> Answer {
        send(self.request(Method::POST, path).bearer_auth(key).json(&body)).await
    }
}
