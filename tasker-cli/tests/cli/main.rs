//! The command as scripts see it: exit codes, JSON, help. Each test has a database of its own.

mod command_line;
mod server;
mod shop;
mod tasks;
mod traces;
