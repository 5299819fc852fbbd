//! The HTTP API against a real database, over a real socket.

mod harness;

mod sign_in;
mod tasks;
