//! A server that would be unsafe does not start, and says what to do.

use std::net::SocketAddr;

use reqwest::Method;
use tasker_api::auth::Role;
use tasker_api::{Config, Error, Server};

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
