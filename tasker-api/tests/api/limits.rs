//! What one who takes too much is refused, while others are served.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tasker_api::Config;
use tasker_api::auth::Role;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::{Answer, World, order, send};

/// Far longer than anything here takes.
const LONG: Duration = Duration::from_secs(20);

/// An address of this machine.
fn local(last: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, last).into()
}

/// A connection from an address of this machine.
async fn connect(world: &World, from: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::new(local(from), 0)).expect("an address of this machine");
    socket.connect(world.address).await.expect("connected")
}

/// What is answered to a client at that address.
async fn live(world: &World, from: u8) -> Answer {
    let http = reqwest::Client::builder().local_address(local(from)).no_proxy().build().expect("an HTTP client");
    let answer = tokio::time::timeout(LONG, send(http.get(format!("{}/health/live", world.url))));
    answer.await.unwrap_or_else(|_| panic!("no answer to 127.0.0.{from}"))
}

/// Asks until the answer has this status.
async fn until(status: StatusCode, ask: impl AsyncFn() -> Answer) -> Answer {
    let mut last = None;
    let asking = async {
        loop {
            let answer = ask().await;
            if answer.status == status {
                return answer;
            }
            last = Some(answer);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let answer = tokio::time::timeout(LONG, asking).await;
    answer.unwrap_or_else(|_| panic!("never {status}, but {last:?}"))
}

async fn refused(world: &World, reason: &str) -> bool {
    let key = world.key(Role::Viewer).await;
    let text = world.get(&key, "/metrics").await.body;
    let counted = format!("tasker_http_refused_total{{reason=\"{reason}\"}} ");
    text.lines().any(|line| line.starts_with(&counted) && !line.ends_with(" 0"))
}

#[tokio::test]
async fn an_address_with_too_many_idle_connections_is_refused_and_another_is_answered() {
    let config = Config { connections_per_address: Some(20), max_connections: 30, ..Config::default() };
    let world = World::with(config).await;
    let mut idle = Vec::new();
    for n in 0..20 {
        let mut stream = connect(&world, 2).await;
        if n % 2 == 0 {
            stream.write_all(b"POST /v1/tasks HTTP/1.1\r\nhost: 127").await.expect("half a head");
        }
        idle.push(stream);
    }
    let told = until(StatusCode::TOO_MANY_REQUESTS, async || live(&world, 2).await).await;
    assert_eq!((told.code(), &told.headers["retry-after"]), ("rate_limited".into(), &"1".parse().unwrap()));
    assert!(told.at("/detail").as_str().unwrap().contains("address"), "{told:?}");
    // Who says nothing is not waited for.
    let mut silent = connect(&world, 2).await;
    let end = tokio::time::timeout(LONG, silent.read_to_end(&mut Vec::new())).await.expect("closed soon");
    assert!(end.is_err() || end.unwrap() == 0);
    assert_eq!(live(&world, 3).await.status, 200, "another address is answered");
    assert!(refused(&world, "address_connections").await);

    for _ in 0..10 {
        idle.push(connect(&world, 4).await);
    }
    let told = until(StatusCode::SERVICE_UNAVAILABLE, async || live(&world, 5).await).await;
    assert_eq!(told.code(), "overloaded", "{told:?}");
    drop(idle);
    for address in [2, 4, 5] {
        until(StatusCode::OK, async || live(&world, address).await).await;
    }
}

#[tokio::test]
async fn a_key_has_its_part_of_the_event_streams_and_no_more() {
    let world = World::with(Config { streams_per_key: 3, max_streams: 5, ..Config::default() }).await;
    let (one, other) = (world.key(Role::Viewer).await, world.key(Role::Viewer).await);
    let cookie = world.session(&one).await;
    let listen = |key: &str| world.request(Method::GET, "/v1/events").bearer_auth(key);
    let open = async |request: RequestBuilder| {
        let mut stream = request.send().await.expect("an answer");
        assert_eq!(stream.status(), 200);
        stream.chunk().await.expect("a greeting");
        stream
    };
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(open(listen(&one)).await);
    }
    let with_cookie = world.request(Method::GET, "/v1/events").header("cookie", &cookie);
    for request in [listen(&one), with_cookie] {
        let told = send(request).await;
        assert_eq!((told.status.as_u16(), &*told.code()), (429, "rate_limited"), "{told:?}");
    }
    assert_eq!(world.get(&one, "/v1/tasks").await.status, 200, "the key may do everything else");
    let others = [open(listen(&other)).await, open(listen(&other)).await];
    let told = send(listen(&other)).await;
    assert_eq!((told.status.as_u16(), &*told.code()), (503, "overloaded"), "{told:?}");
    assert!(refused(&world, "key_streams").await && refused(&world, "streams").await);
    drop((streams, others));
    let reopened = async {
        while listen(&one).send().await.expect("an answer").status() != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, reopened).await.expect("what was closed makes room");
}

/// Begins to send a large body, and stops in the middle of it.
async fn stall(world: &World, key: &str, sent: usize) -> TcpStream {
    let mut stream = TcpStream::connect(world.address).await.expect("connected");
    let head = format!(
        "POST /v1/tasks/batch HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: 9000000\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("sent");
    stream.write_all(&vec![b' '; sent]).await.expect("sent");
    stream
}

/// A batch of one task, of so many bytes.
fn batch(bytes: usize) -> Value {
    json!({"tasks": [{"namespace": "shop", "template": "order", "input": {"order_id": "x".repeat(bytes)}}]})
}

#[tokio::test]
async fn large_bodies_have_limited_room_and_small_ones_need_none() {
    const KIB: usize = 1024;
    let config = Config { max_body_bytes: 1000 * KIB, body_bytes_per_key: 600 * KIB, ..Config::default() };
    let world = World::with(config).await;
    world.register(&order("shop")).await;
    let (one, other, third) =
        (world.key(Role::Operator).await, world.key(Role::Operator).await, world.key(Role::Operator).await);
    let post = async |key: &str, bytes: usize| world.post(key, "/v1/tasks/batch", batch(bytes)).await;
    // Whoever's bytes come last is refused: until it is not the stalled request.
    let beside_stalled = async |stalled: &str, sent: usize, key: &str| {
        for patience in 1.. {
            let stalled = stall(&world, stalled, sent).await;
            tokio::time::sleep(Duration::from_millis(50 * patience)).await;
            let answer = post(key, 200 * KIB).await;
            if answer.status != 200 {
                return (stalled, answer);
            }
            assert!(patience < 20, "never refused: {answer:?}");
        }
        unreachable!("it ends before")
    };
    let (first, told) = beside_stalled(&one, 500 * KIB, &one).await;
    assert_eq!((told.status.as_u16(), &*told.code()), (429, "rate_limited"), "{told:?}");
    assert_eq!(told.headers["retry-after"], "1");
    assert_eq!(post(&other, 200 * KIB).await.status, 200, "another key has room");
    let (second, told) = beside_stalled(&other, 400 * KIB, &third).await;
    assert_eq!((told.status.as_u16(), &*told.code()), (503, "overloaded"), "{told:?}");
    for key in [&one, &other, &third] {
        assert_eq!(post(key, 10 * KIB).await.status, 200, "a small one needs no room");
    }
    assert!(refused(&world, "key_bodies").await && refused(&world, "bodies").await);
    drop((first, second));
    for key in [&one, &other, &third] {
        until(StatusCode::OK, async || post(key, 500 * KIB).await).await;
    }
}

#[tokio::test]
async fn little_is_read_of_somebody_who_is_not_known() {
    let world = World::start().await;
    let form = world.request(Method::POST, "/login").header("content-type", "application/x-www-form-urlencoded");
    let answer = send(form.body(format!("key={}", "x".repeat(9000)))).await;
    assert_eq!(answer.status, 413, "{answer:?}");
}
