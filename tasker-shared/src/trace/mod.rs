//! The trace of a task: a pure function of committed rows, and its delivery.

#[cfg(feature = "otlp")]
pub mod clean;
pub mod config;
pub mod context;
pub mod ids;
#[cfg(feature = "server")]
pub mod log;
pub mod names;
pub mod otlp;
pub mod span;
#[cfg(feature = "otlp")]
pub mod transport;
#[cfg(feature = "server")]
pub mod tree;
