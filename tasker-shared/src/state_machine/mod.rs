//! The pure core: no async, no SQL, no tracing, no clock.

pub mod graph;
pub mod input;
pub mod retry;
