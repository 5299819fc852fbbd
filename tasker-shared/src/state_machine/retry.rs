//! Policy and failures so far -> the delay before the next attempt, or the
//! reason why there is none.
//!
//! Pure: no clock and no random source. Jitter comes from a hash of a seed
//! that the caller passes, so replaying a decision gives the same delay.

use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::duration::LONGEST;
use super::kinds::{ErrorType, Milliseconds};

/// How a step is tried again after an attempt failed.
// The defaults are part of the published format: changing one would change the meaning of
// templates that are already stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RetryPolicy {
    /// How many attempts one generation of the step has, the first included; 1 to 1,000,000, 3 by default.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_attempts: u32,
    /// The delay after the first failure; 1s by default.
    #[serde(with = "Milliseconds")]
    pub initial_interval: Duration,
    /// What each further failure multiplies the delay by; 1 to 1,000, 2.0 by default.
    #[schemars(range(min = 1, max = 1000))]
    pub backoff_coefficient: f64,
    /// The longest delay, jitter apart; at least `initial_interval`, 1m by default.
    #[serde(with = "Milliseconds")]
    pub max_interval: Duration,
    /// The fraction by which a delay may differ either way; 0 to 1, 0.2 by default.
    #[schemars(range(min = 0, max = 1))]
    pub jitter: f64,
    /// Error types that are never retried, compared exactly; at most 100.
    #[schemars(with = "Vec<ErrorType>", length(max = 100))]
    pub non_retryable_errors: Vec<String>,
    /// What becomes of the task once the step has no attempt left; `fail` by default.
    pub on_exhausted: OnExhausted,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 3,
            initial_interval: Duration::from_secs(1),
            backoff_coefficient: 2.0,
            max_interval: Duration::from_mins(1),
            jitter: 0.2,
            non_retryable_errors: Vec::new(),
            on_exhausted: OnExhausted::Fail,
        }
    }
}

/// What becomes of the task once a step has failed for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnExhausted {
    /// The step ends in error, and the template's `on_failure` decides.
    #[default]
    Fail,
    /// The task waits in `blocked_by_failures` for an operator.
    Block,
    /// The step's dependents run as if it had succeeded without output.
    Continue,
}

/// What follows a failed attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Try again after this long.
    Retry(Duration),
    /// Do not try again.
    GiveUp(GiveUp),
}

/// Why a step is not tried again; its `Display` is shown to people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GiveUp {
    /// The handler said that trying again cannot help.
    NotRetryable,
    /// The template lists this error type in `retry.non_retryable_errors`.
    Listed {
        /// The error type, as reported.
        error_type: String,
    },
    /// All attempts of this generation are spent.
    Exhausted {
        /// `retry.max_attempts` of the step.
        max_attempts: u32,
    },
}

impl fmt::Display for GiveUp {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRetryable => to.write_str("the handler reported a permanent error"),
            Self::Listed { error_type } => {
                write!(to, "{error_type} is listed in retry.non_retryable_errors")
            }
            Self::Exhausted { max_attempts: 1 } => {
                to.write_str("the only attempt allowed by retry.max_attempts failed")
            }
            Self::Exhausted { max_attempts } => {
                write!(to, "all {max_attempts} attempts of retry.max_attempts failed")
            }
        }
    }
}

/// The delay before the attempt that follows `failures` failed ones of this
/// generation (1 or more; 0 counts as 1).
///
/// Exponential up to `max_interval`, then moved by the jitter that `seed`
/// gives (pass the step's uuid bits mixed with the attempt number). Never
/// above `max_interval * (1 + jitter)`, nor above [`LONGEST`], and never
/// negative, whatever the policy holds.
#[must_use]
pub fn delay(policy: &RetryPolicy, failures: u32, seed: u64) -> Duration {
    let exponent = i32::try_from(failures.saturating_sub(1)).unwrap_or(i32::MAX);
    let longest = policy.max_interval.min(LONGEST).as_secs_f64();
    // `f64::min` returns the other operand for NaN, and an overflow to infinity
    // is capped the same way.
    let base =
        (policy.initial_interval.as_secs_f64() * policy.backoff_coefficient.powi(exponent)).min(longest).max(0.0);
    let jitter = if policy.jitter.is_finite() { policy.jitter.clamp(0.0, 1.0) } else { 0.0 };
    let seconds = base * (1.0 + jitter * either_way(seed));
    Duration::try_from_secs_f64(seconds).map_or(LONGEST, |delay| delay.min(LONGEST))
}

/// What follows an attempt that failed with `error_type`, when `failures`
/// attempts of this generation have failed, this one included.
///
/// `retryable` and `retry_after` are what the handler reported; a delay it asks
/// for replaces the policy's backoff but never its `max_attempts`. `seed` is
/// passed on to [`delay`].
#[must_use]
pub fn verdict(
    policy: &RetryPolicy,
    failures: u32,
    error_type: &str,
    retryable: bool,
    retry_after: Option<Duration>,
    seed: u64,
) -> Verdict {
    if !retryable {
        return Verdict::GiveUp(GiveUp::NotRetryable);
    }
    if policy.non_retryable_errors.iter().any(|listed| listed == error_type) {
        return Verdict::GiveUp(GiveUp::Listed { error_type: error_type.to_owned() });
    }
    if failures >= policy.max_attempts {
        return Verdict::GiveUp(GiveUp::Exhausted { max_attempts: policy.max_attempts });
    }
    Verdict::Retry(match retry_after {
        Some(asked) => asked.min(LONGEST),
        None => delay(policy, failures, seed),
    })
}

/// A number in -1..1 from a seed. `SplitMix64`'s finalizer spreads seeds that
/// differ in one bit (attempt 1, attempt 2) over the whole range.
fn either_way(seed: u64) -> f64 {
    let mut bits = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^= bits >> 31;
    // The upper 32 bits are enough for a delay and convert without loss.
    let upper = u32::try_from(bits >> 32).unwrap_or(0);
    f64::from(upper) / f64::from(1_u32 << 31) - 1.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn without_jitter() -> RetryPolicy {
        RetryPolicy { jitter: 0.0, ..RetryPolicy::default() }
    }

    #[test]
    fn delays_double_up_to_the_cap() {
        let policy = RetryPolicy { max_interval: Duration::from_secs(5), ..without_jitter() };
        let seconds: Vec<u64> = (1..=5).map(|n| delay(&policy, n, 7).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 5, 5]);
    }

    #[test]
    fn jitter_reaches_both_sides_of_the_base() {
        let policy = RetryPolicy::default();
        let delays: Vec<Duration> = (0..200).map(|seed| delay(&policy, 1, seed)).collect();
        let (least, most) = (delays.iter().min().unwrap(), delays.iter().max().unwrap());
        assert!(*least >= Duration::from_millis(800) && *least < Duration::from_millis(820));
        assert!(*most <= Duration::from_millis(1200) && *most > Duration::from_millis(1180));
    }

    #[test]
    fn same_seed_gives_the_same_delay() {
        let policy = RetryPolicy::default();
        assert_eq!(delay(&policy, 2, 99), delay(&policy, 2, 99));
        assert_ne!(delay(&policy, 2, 99), delay(&policy, 2, 98));
    }

    #[test]
    fn broken_numbers_never_panic() {
        for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, f64::MAX] {
            let policy = RetryPolicy {
                initial_interval: Duration::MAX,
                backoff_coefficient: number,
                max_interval: Duration::MAX,
                jitter: number,
                ..RetryPolicy::default()
            };
            for failures in [0, 1, 2, u32::MAX] {
                assert!(delay(&policy, failures, 1) <= LONGEST);
            }
        }
    }

    #[test]
    fn verdict_follows_the_policy() {
        let policy =
            RetryPolicy { max_attempts: 3, non_retryable_errors: vec!["CardDeclined".into()], ..without_jitter() };
        let give_up = Verdict::GiveUp;
        let soon = Some(Duration::from_millis(5));
        let cases = [
            (1, "Timeout", true, None, Verdict::Retry(Duration::from_secs(1))),
            (2, "Timeout", true, None, Verdict::Retry(Duration::from_secs(2))),
            (2, "Timeout", true, soon, Verdict::Retry(Duration::from_millis(5))),
            (1, "Timeout", true, Some(Duration::MAX), Verdict::Retry(LONGEST)),
            (3, "Timeout", true, soon, give_up(GiveUp::Exhausted { max_attempts: 3 })),
            (u32::MAX, "Timeout", true, None, give_up(GiveUp::Exhausted { max_attempts: 3 })),
            (1, "Timeout", false, soon, give_up(GiveUp::NotRetryable)),
            (1, "CardDeclined", true, None, give_up(GiveUp::Listed { error_type: "CardDeclined".into() })),
            (1, "carddeclined", true, None, Verdict::Retry(Duration::from_secs(1))),
        ];
        for (failures, error_type, retryable, after, expected) in cases {
            let got = verdict(&policy, failures, error_type, retryable, after, 1);
            assert_eq!(got, expected, "{failures} {error_type} {retryable} {after:?}");
        }
    }

    #[test]
    fn reasons_name_the_key_to_change() {
        let reason = GiveUp::Exhausted { max_attempts: 3 }.to_string();
        assert_eq!(reason, "all 3 attempts of retry.max_attempts failed");
        let reason = GiveUp::Listed { error_type: "CardDeclined".into() }.to_string();
        assert_eq!(reason, "CardDeclined is listed in retry.non_retryable_errors");
    }

    #[test]
    fn json_holds_milliseconds_and_defaults_fill_the_rest() {
        let policy: RetryPolicy =
            serde_json::from_str(r#"{"initial_interval":250,"on_exhausted":"continue"}"#).unwrap();
        assert_eq!(policy.initial_interval, Duration::from_millis(250));
        assert_eq!(policy.on_exhausted, OnExhausted::Continue);
        assert_eq!(policy.max_attempts, 3);
        let json = serde_json::to_value(&policy).unwrap();
        assert_eq!(json["max_interval"], 60_000);
        assert_eq!(serde_json::from_value::<RetryPolicy>(json).unwrap(), policy);
    }

    proptest! {
        #[test]
        fn delay_stays_within_its_bounds(
            initial in 1_u64..10_000_000,
            longer in 0_u64..100_000_000,
            coefficient in 1.0_f64..1000.0,
            jitter in 0.0_f64..=1.0,
            failures in 1_u32..,
            seed: u64,
        ) {
            let policy = RetryPolicy {
                initial_interval: Duration::from_millis(initial),
                max_interval: Duration::from_millis(initial + longer),
                backoff_coefficient: coefficient,
                jitter,
                ..RetryPolicy::default()
            };
            let delay = delay(&policy, failures, seed);
            let nanosecond = Duration::from_nanos(1);
            prop_assert!(delay <= policy.max_interval.mul_f64(1.0 + jitter) + nanosecond);
            prop_assert!(delay + nanosecond >= policy.initial_interval.mul_f64(1.0 - jitter));
        }

        #[test]
        fn delay_without_jitter_never_shrinks(failures in 1_u32..200, coefficient in 1.0_f64..10.0) {
            let policy = RetryPolicy { backoff_coefficient: coefficient, ..without_jitter() };
            prop_assert!(delay(&policy, failures, 1) <= delay(&policy, failures + 1, 1));
        }
    }
}
