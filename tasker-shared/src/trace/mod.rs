//! The trace of a task: a pure function of committed rows, and its delivery.

pub mod backend;
pub mod clean;
pub mod config;
pub mod context;
pub mod ids;
pub mod log;
pub mod names;
pub mod otlp;
pub mod read;
pub mod settings;
pub mod span;
pub mod transport;
pub mod tree;
