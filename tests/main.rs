//! One file per promise.
//!
//! `cargo test -p tasker-tests` takes two to four minutes on two cores. The storms (load while
//! processes or the database are killed) are small then; to make them big:
//!
//! ```text
//! TASKER_STORM=1 cargo test -p tasker-tests --test promises -- two_orchestrators killed
//! ```

mod branches;
mod harness;

mod architecture;
mod bad_rows;
mod cancel;
mod cost;
mod database_away;
mod database_killed;
mod documents;
mod every_feature_under_kills;
mod export_recovery;
mod export_wire;
mod failure;
mod feature_examples;
mod flow;
mod foreign_locks;
mod frames;
mod harmless;
mod held_steps;
mod hierarchy;
mod hostile_arguments;
mod hostile_roles;
mod idempotency;
mod input_schema;
mod large_payloads;
mod late_and_duplicate_results;
mod malformed_messages;
mod map;
mod metrics;
mod mix;
mod namespaces;
mod nested;
mod no_worker_lost;
mod operator_retry;
mod orchestrator_killed_under_load;
mod promotion;
mod refused_spans;
mod remote_parent;
mod repair;
mod reported;
mod retention;
mod retry;
mod sampling;
mod schedules;
mod server;
mod suspend;
mod timeouts;
mod trace_proof;
mod trace_settings;
mod two_orchestrators_two_workers;
mod versions;
mod waits;
mod whose_fault;
