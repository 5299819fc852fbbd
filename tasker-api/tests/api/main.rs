//! The HTTP API against a real database, over a real socket.

mod harness;

mod client;
mod contract;
mod database;
mod limits;
mod namespaces;
mod sign_in;
mod starting;
mod submitting;
mod tasks;
mod trace;
mod viewers;
