//! Moves tasks and steps through their state machines.
//!
//! `lifecycle/settle.rs` is the one transaction; `lifecycle/inbox.rs`, `lifecycle/sweep.rs` and
//! `lifecycle/admission.rs` bring it events, [`runtime`] runs the loops.

pub mod export;
pub mod lifecycle;
mod partitions;
pub mod retention;
pub mod runtime;
mod schedules;

pub use runtime::{Options, Orchestrator};
