//! Gives back what it got.

use serde_json::Value;

use crate::{StepContext, StepError};

/// `echo`: returns its input.
///
/// # Errors
/// None.
pub async fn echo(_ctx: StepContext, input: Value) -> Result<Value, StepError> {
    Ok(input)
}
