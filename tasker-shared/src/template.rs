//! Templates: the text of a file, or the JSON that the database stores -> a compiled definition.
//!
//! The format is declared once, in `document.rs`. A file goes from YAML through the published schema
//! into the document, is checked and compiled; a stored definition joins at the document. It reads
//! text and never a file, a clock or a database. Every mistake is reported with file, line, column
//! and key; `docs/reference/templates.md` is the reference of the format, and a test compares the two.

mod compile;
mod cross_checks;
pub mod diff;
mod document;
mod formats;
mod input_schema;
mod problems;
mod published;
mod read;
mod shape;
mod suggestions;
#[cfg(test)]
mod tests;
mod yaml;

use serde_json::Value;

pub use self::compile::Compiled;
pub use self::document::{
    Concurrency, Incoming, Keep, OnFailure, Rate, Step, StepTimeouts, TaskTimeouts, Template, Trace, step_queue,
};
pub use self::input_schema::InputSchema;
pub use self::problems::Problem;
pub use self::published::schema;
pub use crate::state_machine::definition::{Join, MAX_PARALLEL, OnItemFailure};
pub use crate::state_machine::duration::{format_duration, parse_duration};
use crate::state_machine::graph::GraphError;
pub use crate::state_machine::graph::MAX_STEPS;
pub use crate::state_machine::input::MAX_DEPTH;
pub use crate::state_machine::retry::{OnExhausted, RetryPolicy};
pub use crate::state_machine::wait::{ChildTask, OnTimeout, SignalWait, WaitFor};

/// The most bytes a definition may have in its JSON form.
pub const MAX_DEFINITION_BYTES: usize = 1024 * 1024;

/// The most bytes of a template file. Comments and indentation cost nothing in
/// the definition, so this is larger; it bounds what the parser has to hold.
pub const MAX_FILE_BYTES: usize = 4 * MAX_DEFINITION_BYTES;

/// A template that passed every check.
#[derive(Debug)]
pub struct Checked {
    /// What was written.
    pub template: Template,
    /// What decisions read of it.
    pub compiled: Compiled,
}

/// A stored definition that this version of the program cannot use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The JSON is not a definition.
    #[error(
        "the stored template definition is not one this version reads: {0}; \
         upgrade this process, or register the template again"
    )]
    ReadStored(#[from] serde_json::Error),
    /// Its steps are not a DAG.
    #[error("the stored template definition has broken dependencies: {0}; register it again")]
    CheckStoredGraph(#[from] GraphError),
    /// An expression in it cannot be read.
    #[error("the stored template definition of {of} is broken: {key}: {message}; register the template again")]
    ReadStoredExpression {
        /// The step, or the template.
        of: String,
        /// The key, such as `input.items[0]`.
        key: String,
        /// What is wrong with it.
        message: String,
    },
    /// The schema of its input does not compile.
    #[error(
        "the input_schema of template {template_id} does not compile; register the template again under a new version"
    )]
    CompileStoredSchema {
        /// Its row.
        template_id: i32,
    },
}

/// Reads and checks a template file; JSON text is accepted too, as YAML is a
/// superset of it. `file_name` is only used in messages.
///
/// The error lists every problem found, in file order and at most 100; never
/// empty. Text that is not YAML, or a mapping with a key twice, ends the
/// reading at that position.
pub fn parse(file_name: &str, yaml: &str) -> Result<Checked, Vec<Problem>> {
    read::read(file_name, yaml)
}

/// Compiles a definition as the database stores it, such as [`to_json`] made it. It was checked when
/// it was registered, so only what must be read is checked again.
///
/// # Errors
/// If this version of the program cannot use the definition.
pub fn load(template_id: i32, stored: Value) -> Result<Compiled, Error> {
    Compiled::of_stored(template_id, &from_json(stored)?)
}

/// Reads a definition as the database stores it, to show it or to compare it. It was checked when it
/// was registered, so only its shape is checked again.
///
/// # Errors
/// If this version of the program does not know its shape.
pub fn from_json(value: Value) -> Result<Template, Error> {
    Ok(serde_json::from_value(value)?)
}

/// The canonical JSON of a definition, as the database stores it.
pub fn to_json(template: &Template) -> Value {
    serde_json::to_value(template).expect("every key of a template is a string")
}
