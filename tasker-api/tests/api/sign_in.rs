//! Who is let in, and how.

use std::time::{Duration, Instant};

use reqwest::Method;
use tasker_api::Config;
use tasker_api::auth::keys;
use tasker_api::auth::{self, Role};

use crate::harness::{World, order, send};

#[tokio::test]
async fn nobody_sees_anything_without_a_key() {
    let world = World::start().await;
    for (name, value) in [
        ("x", ""),
        ("authorization", "Bearer tsk_0_0"),
        ("authorization", "Basic YTpi"),
        ("cookie", "tasker_session=1"),
    ] {
        let refused = send(world.request(Method::GET, "/v1/tasks").header(name, value)).await;
        assert_eq!((refused.status.as_u16(), &*refused.code()), (401, "unauthenticated"), "{name}: {value}");
        assert_eq!(refused.headers["www-authenticate"], "Bearer");
    }
    for open in ["/health/live", "/health/ready", "/openapi.json"] {
        assert_eq!(send(world.request(Method::GET, open)).await.status, 200, "{open}");
    }
}

#[tokio::test]
async fn a_revoked_key_is_refused_within_a_second() {
    let world = World::start().await;
    let key = world.key(Role::Viewer).await;
    assert_eq!(world.get(&key, "/v1/tasks").await.status, 200);
    let id = key.split('_').nth(1).unwrap();
    assert!(keys::revoke(&mut world.pool().acquire().await.unwrap(), id, "the test").await.unwrap());
    let revoked = Instant::now();
    loop {
        // However long the answer takes: what is asked a second later is refused.
        let asked = revoked.elapsed();
        if world.get(&key, "/v1/tasks").await.status != 200 {
            break;
        }
        assert!(asked < Duration::from_secs(1), "let in {asked:?} after the key was revoked");
    }
    assert_eq!(world.get(&key, "/v1/tasks").await.code(), "unauthenticated");
}

#[tokio::test]
async fn a_task_of_another_namespace_does_not_exist() {
    let world = World::start().await;
    world.register(&order("shop")).await;
    world.register(&order("depot")).await;
    let (own, other) = (world.submit("shop", "A").await, world.submit("depot", "B").await);
    let key = world.key_of(Role::Admin, None, Some(&["shop"])).await;
    assert_eq!(world.get(&key, &format!("/v1/tasks/{own}")).await.status, 200);
    assert_eq!(world.get(&key, &format!("/v1/tasks/{other}")).await.code(), "not_found");
    let all = world.get(&key, "/v1/tasks").await;
    assert_eq!(all.at("/items/0/task_uuid"), own.to_string());
    assert_eq!(all.at("/items/1"), serde_json::Value::Null);
    assert_eq!(world.get(&key, "/v1/tasks?namespace=depot").await.code(), "forbidden");
}

#[tokio::test]
async fn a_link_signs_one_browser_in_once() {
    let world = World::start().await;
    let key = world.key(Role::Admin).await;
    let once = auth::once_link(world.pool(), key.split('_').nth(1).unwrap()).await.unwrap();
    let login = format!("/login?once={once}");
    let signed_in = send(world.request(Method::GET, &login)).await;
    assert_eq!((signed_in.status.as_u16(), &signed_in.headers["location"]), (303, &"/".parse().unwrap()));
    let cookie = signed_in.headers["set-cookie"].to_str().unwrap().to_owned();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap().to_owned();
    let seen = send(world.request(Method::GET, "/v1/tasks").header("cookie", &cookie)).await;
    assert_eq!(seen.status, 200);
    let again = send(world.request(Method::GET, &login)).await;
    assert!(!again.headers.contains_key("set-cookie"), "{again:?}");
    // The session ends with its key.
    keys::revoke(&mut world.pool().acquire().await.unwrap(), key.split('_').nth(1).unwrap(), "the test").await.unwrap();
    let revoked = Instant::now();
    loop {
        let asked = revoked.elapsed();
        if send(world.request(Method::GET, "/v1/tasks").header("cookie", &cookie)).await.status != 200 {
            break;
        }
        assert!(asked < Duration::from_secs(1), "let in {asked:?} after the session's key was revoked");
    }
}

#[tokio::test]
async fn a_name_that_points_here_from_elsewhere_is_not_answered() {
    let world = World::start().await;
    let refused = send(world.request(Method::GET, "/health").header("host", "evil.example")).await;
    assert_eq!((refused.status.as_u16(), &*refused.code()), (421, "unknown_host"));
    let good = send(world.request(Method::GET, "/openapi.json").header("host", "localhost:1234")).await;
    assert_eq!(good.status, 200);
    assert!(good.headers["content-security-policy"].to_str().unwrap().contains("frame-ancestors 'none'"));
    assert_eq!(good.headers["x-content-type-options"], "nosniff");
}

#[tokio::test]
async fn a_server_that_is_told_to_end_ends() {
    let world = World::start().await;
    assert_eq!(send(world.request(Method::GET, "/health/live")).await.status, 200);
    world.stop.cancel();
    world.running.await.expect("it ends");
    assert!(tokio::net::TcpStream::connect(world.address).await.is_err());
}

#[tokio::test]
async fn who_fails_to_sign_in_too_often_must_wait_and_nobody_else_has_to() {
    let proxied = Config { failed_sign_ins: 3, behind_tls_proxy: true, ..Config::default() };
    let world = World::with(proxied).await;
    let (key, late) = (world.key(Role::Viewer).await, world.key(Role::Viewer).await);
    let from = |address: &'static str, key: &str| {
        // What a client itself writes into the header stands before what the proxy saw.
        let told = format!("203.0.113.{}, {address}", rand_byte());
        send(world.request(Method::GET, "/v1/tasks").bearer_auth(key).header("x-forwarded-for", told))
    };
    let bad = format!("tsk_{}_{}", "0".repeat(16), "0".repeat(64));
    assert_eq!(from("192.0.2.1", &key).await.status, 200);
    for _ in 0..3 {
        assert_eq!(from("192.0.2.1", &bad).await.code(), "unauthenticated");
    }
    let refused = from("192.0.2.1", &bad).await;
    assert_eq!((refused.status.as_u16(), &*refused.code()), (429, "rate_limited"));
    assert_eq!(refused.headers["retry-after"], "5");
    assert!(refused.at("/detail").as_str().unwrap().contains("failed sign-ins"), "{refused:?}");
    // A good key that is new there waits as well, so that nobody can tell it from a bad one.
    assert_eq!(from("192.0.2.1", &late).await.code(), "rate_limited");
    assert_eq!(from("192.0.2.1", &key).await.status, 200, "who was let in before goes on");
    assert_eq!(from("192.0.2.2", &late).await.status, 200, "another address is not concerned");
    // The page's form and its links count as well.
    let form = |address: &'static str| {
        send(
            world
                .request(Method::POST, "/login")
                .header("x-forwarded-for", address)
                .header("content-type", "application/x-www-form-urlencoded")
                .body("key=nonsense"),
        )
    };
    for _ in 0..3 {
        assert_ne!(form("2001:db8:1::1").await.status, 429);
    }
    let limited = form("2001:db8:1::2").await;
    assert_eq!((limited.status.as_u16(), &limited.headers["retry-after"]), (429, &"5".parse().unwrap()), "one network");
    let link = world.request(Method::GET, "/login?once=x").header("x-forwarded-for", "2001:db8:1::3");
    assert_eq!(send(link).await.status, 429);
}

fn rand_byte() -> u8 {
    uuid::Uuid::new_v4().as_bytes()[0]
}

#[tokio::test]
async fn an_old_page_with_an_ended_session_keeps_nobody_from_signing_in() {
    let world = World::with(Config { failed_sign_ins: 3, ..Config::default() }).await;
    let key = world.key(Role::Viewer).await;
    for _ in 0..10 {
        let refused = send(world.request(Method::GET, "/v1/tasks").header("cookie", "tasker_session=ended")).await;
        assert_eq!(refused.code(), "unauthenticated");
    }
    assert_eq!(world.get(&key, "/v1/tasks").await.status, 200);
    let mut asked = 0;
    while send(world.request(Method::GET, "/v1/tasks").header("cookie", "tasker_session=x")).await.status != 429 {
        asked += 1;
        assert!(asked < 200, "the database is asked without end");
    }
}
