//! A test kit, for Tasker's own tests and for yours: tasks in memory, databases, and assertions about traces.
//!
//! A [`Harness`](harness) runs a template in memory, with mocks for handlers and with time that passes by
//! itself. A [`TestDatabase`] is a migrated database of its own on the managed local server. Nothing here
//! is needed to run Tasker.
//!
//! A [`Trace`] is read from Tasker's log ([`Trace::of_log`]), from OTLP JSON ([`Trace::from_json`],
//! [`Trace::from_file`]; Jaeger's JSON too), from the SDK's in-memory exporter (feature `sdk`) or
//! from protobuf messages (feature `proto`). Then:
//!
//! ```
//! use tasker_testing::{Rules, Trace, assert_trace, span};
//!
//! # let json = r#"{"resourceSpans":[{"resource":{"attributes":[]},"scopeSpans":[{"spans":[
//! #   {"traceId":"0af7651916cd43dd8448eb211c80319c","spanId":"b7ad6b7169203331","name":"task.orchestration",
//! #    "startTimeUnixNano":"1","endTimeUnixNano":"9","attributes":[{"key":"outcome","value":{"stringValue":"success"}},
//! #    {"key":"correlation_id","value":{"stringValue":"c"}},{"key":"task_uuid","value":{"stringValue":"t"}},{"key":"namespace","value":{"stringValue":"n"}}]},
//! #   {"traceId":"0af7651916cd43dd8448eb211c80319c","spanId":"b7ad6b7169203332","parentSpanId":"b7ad6b7169203331","name":"step.execution",
//! #    "startTimeUnixNano":"2","endTimeUnixNano":"8","attributes":[{"key":"step_name","value":{"stringValue":"charge"}},
//! #    {"key":"correlation_id","value":{"stringValue":"c"}},{"key":"task_uuid","value":{"stringValue":"t"}},{"key":"namespace","value":{"stringValue":"n"}}]}
//! # ]}]}]}"#;
//! let trace = Trace::from_json(json)?;
//! Rules::new().well_formed().assert(&trace);
//! assert_trace!(trace, {
//!     "task.orchestration" [outcome = "success"] {
//!         "step.execution" [step_name = "charge"],
//!         ..                                            // and whatever else
//!     }
//! });
//! # Ok::<(), tasker_testing::Error>(())
//! ```
//!
//! Structure is compared, never the order of siblings. What fails draws both trees.

#![warn(clippy::missing_errors_doc)]

pub mod compare;
mod database;
pub mod expect;
pub mod harness;
mod read;
pub mod rules;
#[cfg_attr(not(test), expect(dead_code, reason = "our own tests use more of it than the harness"))]
mod simulation;
mod trace;

pub use compare::{Difference, compare};
pub use database::TestDatabase;
pub use harness::{Call, Harness, HarnessError, MockError, Run, Started};
pub use read::Error;
pub use rules::{Pick, Rules, span};
pub use trace::{Event, Span, Trace};

#[cfg(test)]
mod decide {
    //! What `decide` does: told line by line, and proved on random tasks.

    mod mapping_tests;
    pub(crate) mod properties;
    mod skipping_tests;
    mod tests;
}
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tree {
    //! What the pure tree makes of the simulation's rows.

    mod tests;
}
