//! OTLP over gRPC and HTTP, acknowledged.
