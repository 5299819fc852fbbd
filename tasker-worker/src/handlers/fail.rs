//! Fails on purpose.

use serde::Deserialize;
use serde_json::Value;

use crate::{StepContext, StepError};

/// Input of [`fail`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Fail {
    /// Attempts that fail, counted by attempt number.
    pub times: u32,
    /// Fail every attempt, so that no other is made.
    pub permanent: bool,
    /// The output once it succeeds.
    pub then: Value,
}

/// `fail`: fails its first `times` attempts with the retryable error `FailedOnPurpose`, then
/// returns `then`; with `permanent` it fails for good.
///
/// # Errors
/// `FailedOnPurpose`, as the input says.
pub async fn fail(ctx: StepContext, input: Fail) -> Result<Value, StepError> {
    if input.permanent {
        return Err(StepError::fail("FailedOnPurpose", "the input says permanent"));
    }
    if ctx.attempt() <= input.times {
        let message = format!("attempt {} of {} that fail", ctx.attempt(), input.times);
        return Err(StepError::retry("FailedOnPurpose", message));
    }
    Ok(input.then)
}
