//! What every process of Tasker shares: the pure state machines, the pure
//! trace tree, every SQL statement we own, and the managed local PostgreSQL.
//!
//! Read [`state_machine::decide()`], then [`trace::tree`]: one says what happens
//! next, the other says what a trace of it looks like. Neither does I/O.

#[cfg(feature = "server")]
pub mod client;
pub mod duration;
#[cfg(feature = "metrics")]
pub mod metrics;
#[cfg(feature = "server")]
pub mod migrate;
pub mod payload;
#[cfg(feature = "server")]
pub mod postgres;
pub mod redact;
#[cfg(feature = "server")]
pub mod schedule;
pub mod server;
pub mod state_machine;
pub mod store;
pub mod telemetry;
#[cfg(feature = "server")]
pub mod template;
pub mod tls;
pub mod trace;
