//! Traces read back: a backend's spans beside those of the log, as one tree.

pub mod backend;
pub mod read;
