//! The built-in handlers: for trying things out, for templates of plumbing,
//! and as examples of how a handler is written.

mod echo;
mod fail;
mod http;
mod noop;
mod sleep;

pub use echo::echo;
pub use fail::{Fail, fail};
pub use http::{Http, Request, Response};
pub use noop::noop;
pub use sleep::{Sleep, sleep};
