//! One file per promise.
//!
//! `cargo test -p tasker-tests` takes minutes; `TASKER_STORM=1` makes the storms big.

mod harness;

mod cancel;
mod export_wire;
mod failure;
mod hierarchy;
mod idempotency;
mod operator_retry;
mod remote_parent;
mod retry;
