//! Every SQL statement we own.

pub mod tx;
