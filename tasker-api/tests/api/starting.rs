//! A server that would be unsafe does not start, and says what to do.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use reqwest::Method;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tasker_api::auth::Role;
use tasker_api::{Config, Error, Server};

use tasker_shared::client::http::{HttpClient, TaskQuery};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{World, send};

#[tokio::test]
async fn beyond_this_machine_it_needs_tls_a_name_and_a_key() {
    let world = World::start().await;
    let start = async |config: Config| Server::bind(world.client.clone(), config).await;
    let wide = Config { bind: SocketAddr::from(([0, 0, 0, 0], 0)), ..Config::default() };
    let refused = start(wide.clone()).await.unwrap_err();
    assert!(matches!(refused, Error::NeedsTls(_)), "{refused}");
    assert!(refused.to_string().contains("--tls-cert") && refused.to_string().contains("--behind-tls-proxy"));
    let proxied = Config { behind_tls_proxy: true, ..wide };
    let refused = start(proxied.clone()).await.unwrap_err();
    assert!(matches!(refused, Error::NeedsHost(_)), "{refused}");
    let named = Config { hosts: vec!["tasks.example.com".into()], ..proxied };
    let refused = start(named.clone()).await.unwrap_err();
    assert!(matches!(refused, Error::NeedsKey(_)), "{refused}");
    world.key(Role::Viewer).await;
    start(named.clone()).await.expect("now it is safe");
    let missing = Config { tls: Some(("/nowhere/a.pem".into(), "/nowhere/b.pem".into())), ..named.clone() };
    assert!(matches!(start(missing).await.unwrap_err(), Error::Tls { .. }));
    let crooked = Config { base_path: "tasker/".into(), ..named };
    assert!(matches!(start(crooked).await.unwrap_err(), Error::BasePath));
}

#[tokio::test]
async fn behind_a_path_everything_is_below_it() {
    let world = World::with(Config { base_path: "/tasker".into(), ..Config::default() }).await;
    let key = world.key(Role::Viewer).await;
    assert!(world.url.ends_with("/tasker"));
    assert_eq!(world.get(&key, "/v1/tasks").await.status, 200);
    let bare = world.url.trim_end_matches("/tasker");
    assert_eq!(
        send(world.http.request(Method::GET, format!("{bare}/v1/tasks")).bearer_auth(&key)).await.code(),
        "not_found"
    );
}

/// A self-made certificate of localhost and its key, as files of these names.
fn certificate(directory: &Path, name: &str) -> (PathBuf, PathBuf) {
    let (cert, key) = (directory.join(format!("{name}.pem")), directory.join(format!("{name}.key")));
    let arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost \
                     -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE";
    let made =
        Command::new("openssl").args(arguments.split(' ')).arg("-keyout").arg(&key).arg("-out").arg(&cert).output();
    let made = made.expect("this test makes certificates with openssl (Debian, Ubuntu: `apt-get install openssl`)");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    (cert, key)
}

/// A client that trusts this certificate and no other.
fn trusting(certificate: &Path) -> reqwest::Client {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificate).expect("a PEM file")).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy().build().expect("an HTTP client")
}

#[tokio::test]
async fn over_tls_it_proves_who_it_is_and_speaks_nothing_else() {
    let directory = tempfile::tempdir().expect("a directory");
    let (cert, key) = certificate(directory.path(), "own");
    let (other_cert, other_key) = certificate(directory.path(), "other");
    let world = World::with(Config { tls: Some((cert.clone(), key)), ..Config::default() }).await;
    assert!(world.url.starts_with("https://127.0.0.1:"), "{}", world.url);
    let url = format!("https://localhost:{}", world.address.port());

    let trusting_http = trusting(&cert);
    let answer = trusting_http.get(format!("{url}/openapi.json")).send().await.expect("a handshake and an answer");
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["strict-transport-security"], "max-age=31536000");
    let client = HttpClient::with(trusting_http, &url, &world.key(Role::Viewer).await).expect("a client");
    assert_eq!(client.tasks(TaskQuery::default()).next().await.expect("a page"), Some(vec![]));

    // Who trusts another certificate, or none of its own, does not talk to it.
    let stranger = trusting(&other_cert);
    let refused = stranger.get(format!("{url}/health/live")).send().await.expect_err("an unknown certificate");
    assert!(refused.is_connect(), "{refused:?}");
    let public =
        HttpClient::new(&url, "tsk_0_0").expect("a client").task(uuid::Uuid::nil()).await.expect_err("unknown");
    assert_eq!(public.code(), None, "{public}");
    // In the clear there is no answer, and a handshake that does not come is cut off.
    let mut plain = tokio::net::TcpStream::connect(world.address).await.expect("a connection");
    plain.write_all(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n").await.expect("sent");
    let mut said = Vec::new();
    let _ = plain.read_to_end(&mut said).await;
    assert!(!String::from_utf8_lossy(&said).contains("HTTP/"), "{said:?}");

    // A key that is not the certificate's does not start.
    let wrong = Config { tls: Some((cert, other_key)), ..Config::default() };
    let wrong = Config { bind: SocketAddr::from(([127, 0, 0, 1], 0)), ..wrong };
    assert!(matches!(Server::bind(world.client.clone(), wrong).await.unwrap_err(), Error::Tls { .. }));
}
