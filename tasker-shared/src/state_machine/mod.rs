//! The pure core: no async, no SQL, no tracing, no clock.
//!
//! [`states`] says what may move, [`decide()`] says what moves now. Nothing here imports
//! anything of ours; a test reads the imports and checks.

pub mod attempt_history;
pub mod condition;
pub mod decide;
pub mod definition;
pub mod duration;
pub mod flow;
pub mod graph;
pub mod input;
pub mod kinds;
pub mod plan;
pub mod retry;
pub mod states;
pub mod wait;

pub use decide::{Event, Snapshot, decide};
pub use definition::{Definition, StepDefinition};
pub use plan::Plan;
pub use states::{StepEvent, StepState, TaskEvent, TaskState};
