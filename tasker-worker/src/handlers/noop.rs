//! Does nothing.

use serde::de::IgnoredAny;

use crate::{StepContext, StepError};

/// `noop`: takes anything, returns null.
///
/// # Errors
/// None.
pub async fn noop(_ctx: StepContext, _input: IgnoredAny) -> Result<(), StepError> {
    Ok(())
}
