//! What the tests of the product's promises share.

pub mod receiver;
pub mod rust_worker;
pub mod worker;

use tasker_shared::trace::config::TraceConfig;

/// Traces to this endpoint over `grpc` or `http/protobuf`, as a process would read it from its environment.
///
/// # Panics
/// If the endpoint is no URL.
pub fn trace_config(endpoint: &str, protocol: &str) -> TraceConfig {
    let (config, warnings) = TraceConfig::from_vars(&|name| match name {
        "OTEL_EXPORTER_OTLP_ENDPOINT" => Some(endpoint.to_owned()),
        "OTEL_EXPORTER_OTLP_PROTOCOL" => Some(protocol.to_owned()),
        "OTEL_EXPORTER_OTLP_TIMEOUT" => Some("2000".to_owned()),
        _ => None,
    })
    .expect("an endpoint of the tests");
    assert_eq!(warnings, []);
    config
}

/// The Rust of these documents compiles.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../docs/tutorial.md")]
    struct Tutorial;
    #[doc = include_str!("../docs/guides/embed-a-worker.md")]
    struct EmbedAWorker;
}
