//! The built-in `http` handler against a real server of a few lines.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::bench::{Bench, TRACE_ID, start, step, told};

/// Answers by path, tells each request as text, and returns its `host:port`.
async fn server() -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let host = listener.local_addr().expect("an address").to_string();
    let (tell, heard) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, tell.clone()));
        }
    });
    (host, heard)
}

async fn answer(mut stream: TcpStream, tell: mpsc::UnboundedSender<String>) {
    let mut request = Vec::new();
    let text = loop {
        let mut chunk = [0; 4096];
        let read = stream.read(&mut chunk).await.expect("a request");
        request.extend_from_slice(&chunk[..read]);
        let text = String::from_utf8_lossy(&request).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ").and_then(|n| n.parse().ok()))
            .unwrap_or(0);
        if body.len() >= length {
            break text;
        }
    };
    let path = text.split(' ').nth(1).unwrap_or_default().split('?').next().unwrap_or_default().to_owned();
    let (status, headers, body) = match path.as_str() {
        "/json" => ("200 OK", "content-type: application/json\r\nset-cookie: s=1\r\n", "{\"paid\": true}".to_owned()),
        "/text" => ("200 OK", "content-type: text/plain\r\n", "hello".to_owned()),
        "/busy" => ("503 Service Unavailable", "retry-after: 7\r\n", String::new()),
        "/gone" => ("404 Not Found", "", String::new()),
        "/away" => ("302 Found", "location: http://elsewhere.invalid/secret?token=1\r\n", String::new()),
        "/here" => ("302 Found", "location: /json\r\n", String::new()),
        "/huge" => ("200 OK", "", "x".repeat((1 << 20) + 1)),
        other => panic!("{other}"),
    };
    let _ = tell.send(text);
    let answer =
        format!("HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    // The client hangs up on too large an answer.
    let _ = stream.write_all(answer.as_bytes()).await;
}

async fn call(bench: &Bench, input: Value) -> Result<Value, Value> {
    let (_, steps) = bench.enqueue(&[step("http", input)]).await;
    let attempt = bench.reported(steps[0]).await;
    attempt.error.map_or_else(|| Ok(attempt.output.expect("an output")), Err)
}

#[tokio::test]
async fn an_allowed_host_is_called_within_the_trace_and_others_are_not() {
    let (host, mut heard) = server().await;
    let bench = Bench::new().await;
    let worker = start(bench.worker().builtins().allow_http_hosts([host.clone()]));
    let url = |path: &str| format!("http://{host}{path}");

    let answer = call(&bench, json!({"url": url("/json?a=1"), "method": "post", "headers": {"X-Team": "shop", "traceparent": "forged"}, "body": {"amount": 5}})).await;
    assert_eq!(
        answer,
        Ok(json!({"status": 200, "headers": {"content-type": "application/json"}, "body": {"paid": true}}))
    );
    let request = told(&mut heard).await;
    assert!(
        request.starts_with("POST /json?a=1 HTTP/1.1\r\n") && request.ends_with("\r\n\r\n{\"amount\":5}"),
        "{request}"
    );
    for header in [
        "x-team: shop",
        "content-type: application/json",
        "baggage: correlation_id=order-4711",
        &format!("traceparent: 00-{TRACE_ID}-"),
    ] {
        assert!(request.contains(header), "{header} in {request}");
    }
    assert_eq!(call(&bench, json!({"url": url("/text")})).await.expect("text")["body"], "hello");
    assert_eq!(call(&bench, json!({"url": url("/here")})).await.expect("redirected")["body"], json!({"paid": true}));

    let error = |kind: &str, retryable: bool, after: Option<u64>, message: String| {
        Err(json!({"type": kind, "retryable": retryable, "retry_after_ms": after, "message": message}))
    };
    assert_eq!(
        call(&bench, json!({"url": url("/busy?token=1")})).await,
        error("http_503", true, Some(7000), format!("GET {} answered 503 Service Unavailable", url("/busy")))
    );
    assert_eq!(
        call(&bench, json!({"url": url("/gone")})).await,
        error("http_404", false, None, format!("GET {} answered 404 Not Found", url("/gone")))
    );
    let refused = |error: Result<Value, Value>| {
        let error = error.expect_err("refused");
        (
            error["type"].as_str().expect("a type").to_owned(),
            error["retryable"].clone(),
            error["message"].as_str().expect("a message").to_owned(),
        )
    };
    let (kind, retryable, message) = refused(call(&bench, json!({"url": url("/away")})).await);
    assert_eq!((kind.as_str(), retryable), ("host_not_allowed", json!(false)));
    assert!(message.contains("http://elsewhere.invalid is not among") && !message.contains("token"), "{message}");
    assert_eq!(refused(call(&bench, json!({"url": url("/huge")})).await).0, "response_too_large");
    for (input, expected) in [
        (json!({"url": "http://127.0.0.1:1/"}), "host_not_allowed"),
        (json!({"url": "file:///etc/passwd"}), "host_not_allowed"),
        (json!({"url": "nonsense"}), "invalid_input"),
        (json!({"url": url("/json"), "headers": {"Host": "x"}}), "invalid_input"),
        (json!({"url": url("/json"), "headers": {"a b": "x"}}), "invalid_input"),
        (json!({"url": url("/json"), "method": "G T"}), "invalid_input"),
    ] {
        let (kind, retryable, message) = refused(call(&bench, input.clone()).await);
        assert_eq!((kind.as_str(), retryable), (expected, json!(false)), "{input}: {message}");
    }
    worker.drained().await;
}

#[tokio::test]
async fn nothing_is_allowed_unless_somebody_said_so_and_a_dead_service_is_tried_again() {
    let (host, _heard) = server().await;
    let bench = Bench::new().await;
    let worker = start(bench.worker().builtins());
    let error = call(&bench, json!({"url": format!("http://{host}/json")})).await.expect_err("refused");
    assert_eq!(error["type"], "host_not_allowed");
    worker.drained().await;

    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address").to_string();
    let worker = start(bench.worker().builtins().allow_http_hosts([closed.clone()]));
    let error = call(&bench, json!({"url": format!("http://{closed}/json?token=1")})).await.expect_err("nobody there");
    assert_eq!((&error["type"], &error["retryable"]), (&json!("http_connect"), &json!(true)));
    assert!(!error["message"].as_str().expect("a message").contains("token"), "{error}");
    worker.drained().await;
}
