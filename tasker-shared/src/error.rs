//! Errors that a person reads.
