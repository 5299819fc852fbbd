//! Takes time.

use std::time::Duration;

use serde::Deserialize;

use crate::{StepContext, StepError};

/// Input of [`sleep`].
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Sleep {
    /// How long, in milliseconds.
    pub ms: u64,
}

/// `sleep`: waits `ms` milliseconds and returns null; stops when it is cancelled.
///
/// # Errors
/// [`StepError::Cancel`] if it is cancelled.
pub async fn sleep(ctx: StepContext, input: Sleep) -> Result<(), StepError> {
    let waited =
        ctx.cancellation_token().run_until_cancelled(tokio::time::sleep(Duration::from_millis(input.ms))).await;
    waited.ok_or(StepError::Cancel)
}
