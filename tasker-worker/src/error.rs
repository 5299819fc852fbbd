//! The errors that a handler may return.

use std::time::Duration;

/// Why a handler did not succeed.
///
/// It is not a `std::error::Error` itself, so that `?` turns every such error
/// into a retryable one whose type is its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepError {
    /// Another attempt may succeed.
    Retry {
        /// A short name that `non_retryable_errors` of the template can list.
        kind: String,
        /// For a person; the first 1,024 bytes are kept.
        message: String,
        /// How long to wait, instead of the template's delay.
        after: Option<Duration>,
    },
    /// No other attempt can succeed.
    Fail {
        /// A short name.
        kind: String,
        /// For a person; the first 1,024 bytes are kept.
        message: String,
    },
    /// The handler stopped because its cancellation token fired. Without such
    /// a request it is a permanent failure of type `cancelled`.
    Cancel,
}

impl StepError {
    /// A retryable error with the template's delay.
    pub fn retry(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Retry { kind: kind.into(), message: message.into(), after: None }
    }

    /// A retryable error with a delay of its own.
    pub fn retry_after(kind: impl Into<String>, message: impl Into<String>, after: Duration) -> Self {
        Self::Retry { kind: kind.into(), message: message.into(), after: Some(after) }
    }

    /// A permanent error.
    pub fn fail(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Fail { kind: kind.into(), message: message.into() }
    }
}

impl<E: std::error::Error> From<E> for StepError {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            let inner_message = inner.to_string();
            // Many errors print their cause themselves.
            if !message.ends_with(&inner_message) {
                message.push_str(": ");
                message.push_str(&inner_message);
            }
            cause = inner.source();
        }
        Self::retry(short_type_name(std::any::type_name::<E>()), message)
    }
}

/// `core::num::error::ParseIntError` -> `ParseIntError`, without type parameters.
pub(crate) fn short_type_name(full: &str) -> &str {
    let path = full.trim_start_matches(['&', '(']).split('<').next().unwrap_or(full);
    path.rsplit("::").next().unwrap_or(path)
}
