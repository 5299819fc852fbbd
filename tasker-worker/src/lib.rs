//! Runs step handlers: claims attempts, runs the user's code, reports results.
//!
//! ```no_run
//! use tasker_worker::{CancellationToken, StepContext, StepError, Worker};
//!
//! #[derive(serde::Deserialize)]
//! struct Charge { amount: u64 }
//! #[derive(serde::Serialize)]
//! struct Receipt { id: String }
//!
//! async fn charge(ctx: StepContext, input: Charge) -> Result<Receipt, StepError> {
//!     if input.amount == 0 {
//!         return Err(StepError::fail("NothingToCharge", "the amount is zero"));
//!     }
//!     Ok(Receipt { id: ctx.idempotency_key() })
//! }
//!
//! # async fn example() -> Result<(), tasker_worker::Error> {
//! let worker = Worker::builder("postgresql:///shop")
//!     .namespace("fulfillment")
//!     .handler("payments.charge", charge)
//!     .build()?;
//! worker.run(CancellationToken::new()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! A handler runs **at least once** and only the current claim's result counts:
//! make handlers idempotent, with [`StepContext::idempotency_key`] where an
//! outside system can tell a repetition by a key.
//!
//! This crate decides nothing about tasks. It knows them only through the SQL
//! functions of `docs/reference/worker-protocol.md`, as a worker in any language does.

#![warn(clippy::missing_errors_doc)]

mod builder;
mod claim;
mod connection;
mod context;
mod error;
mod executor;
mod handler;
pub mod handlers;
mod held;
#[cfg(feature = "metrics")]
mod measure;
#[cfg(not(feature = "metrics"))]
#[path = "unmeasured.rs"]
mod measure;
mod presence;
mod protocol;
mod recorder;
mod registry;
mod report;
mod runtime;
mod span;

pub use builder::Builder;
pub use context::{Artifact, Capture, StepContext};
pub use error::StepError;
pub use runtime::{Error, Worker};
pub use span::{Failed, ModelCall, Span, Usage};
#[cfg(feature = "metrics")]
pub use tasker_shared::metrics::Listen;
pub use tokio_util::sync::CancellationToken;
