//! Spans -> OTLP protobuf bytes.
