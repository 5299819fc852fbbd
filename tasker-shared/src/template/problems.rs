//! Problems of a file: what is wrong, and at which line, column and key.

use std::fmt;

use super::compile::Finding;
use super::yaml::{Node, Position};
use crate::state_machine::input::Path;

/// One thing wrong with a template file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The name the caller gave the file.
    pub file: String,
    /// From 1; 0 when the problem has no position in the file.
    pub line: u64,
    /// From 1, in characters; 0 when the problem has no position in the file.
    pub column: u64,
    /// The path of the key, such as `steps[2].retry.max_attempts`; empty for
    /// the file as a whole.
    pub key: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}", self.file)?;
        if self.line > 0 {
            write!(to, ":{}:{}", self.line, self.column)?;
        }
        if !self.key.is_empty() {
            write!(to, ": {}", self.key)?;
        }
        write!(to, ": {}", self.message)
    }
}

impl std::error::Error for Problem {}

/// How many problems of one file are reported.
pub(super) const MAX_PROBLEMS: usize = 100;

/// What was found wrong with a file so far.
pub(super) struct Problems<'a> {
    pub file: &'a str,
    pub list: Vec<Problem>,
}

impl Problems<'_> {
    pub fn add(&mut self, at: Position, key: &str, message: impl Into<String>) {
        if self.list.len() < MAX_PROBLEMS {
            self.list.push(Problem {
                file: self.file.to_owned(),
                line: at.line,
                column: at.column,
                key: key.to_owned(),
                message: message.into(),
            });
        }
    }

    pub fn add_findings(&mut self, root: &Node, findings: Vec<Finding>) {
        for Finding { path, message } in findings {
            self.add(root.position_of(&path), Path(&path).to_string().trim_start_matches('.'), message);
        }
    }

    /// The problem that ends the reading.
    pub fn only(mut self, at: Position, message: impl Into<String>) -> Vec<Problem> {
        self.add(at, "", message);
        self.list
    }
}
