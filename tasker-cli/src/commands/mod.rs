//! One file per noun.

pub mod act;
pub mod api;
pub mod db;
pub mod demo;
pub mod example;
pub mod key;
pub mod limit;
pub mod migrate;
pub mod orchestrator;
pub mod queue;
pub mod redaction;
pub mod retention;
pub mod schedule;
pub mod task;
pub mod template;
pub mod trace;
pub mod up;
pub mod version;
pub mod worker;
