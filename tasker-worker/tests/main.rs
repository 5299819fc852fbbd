//! Workers against the real SQL functions, without an orchestrator: the bench
//! puts steps into the state that an orchestrator leaves them in.

mod attempts;
mod bench;
mod document;
mod http;
mod life;
mod spans;
