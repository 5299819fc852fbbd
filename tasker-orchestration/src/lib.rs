//! Moves tasks and steps through their state machines.
//!
//! [`lifecycle::settle`] is the one transaction; [`lifecycle::initialize`] and
//! [`lifecycle::sweep`] feed it, [`runtime`] runs the loops.

pub mod export;
pub mod lifecycle;
pub mod limits;
pub mod retention;
pub mod runtime;
pub mod schedules;

pub use runtime::{Options, Orchestrator};
