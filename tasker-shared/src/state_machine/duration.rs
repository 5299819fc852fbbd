//! Durations as people write them in a template: `250ms`, `30s`, `1h30m`, `7d`.

use std::time::Duration;

/// The longest duration a template or a handler may ask for: ten years.
/// Anything longer is a mistake, and would overflow the database's timestamps.
pub const LONGEST: Duration = Duration::from_hours(3650 * 24);

/// Units, largest first, in milliseconds.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Reads `250ms`, `30s`, `5m`, `1h`, `7d` or a sum such as `1h30m`, largest
/// unit first and each once. The error says what is wrong and what to write.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const EXAMPLES: &str = "write whole numbers with a unit: 250ms, 30s, 5m, 1h30m or 7d";
    let shape = || format!("is not a duration; {EXAMPLES}");
    let mut units = UNITS.iter();
    let mut total: u64 = 0;
    let mut rest = text;
    if rest.is_empty() {
        return Err(shape());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        let letters = after.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        if number.is_empty() {
            return Err(shape());
        }
        if unit.is_empty() && after.is_empty() && rest == text {
            return Err(format!("has no unit; write {number}s for seconds or {number}ms"));
        }
        let Some(&(_, factor)) = units.find(|(name, _)| *name == unit) else {
            return Err(shape());
        };
        // Too many digits saturate, and so fail the check of the total.
        let number = number.parse().unwrap_or(u64::MAX);
        total = total.saturating_add(factor.saturating_mul(number));
        rest = after;
    }
    let total = Duration::from_millis(total);
    if total.is_zero() {
        return Err("must be more than zero".to_owned());
    }
    if total > LONGEST {
        return Err(format!("is longer than {}, the longest there is", format_duration(LONGEST)));
    }
    Ok(total)
}

/// Writes a duration the way [`parse_duration`] reads it, in whole
/// milliseconds; zero is `0ms`.
pub fn format_duration(duration: Duration) -> String {
    let mut left = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, factor) in UNITS {
        if left >= factor {
            text.push_str(&(left / factor).to_string());
            text.push_str(unit);
            left %= factor;
        }
    }
    if text.is_empty() { "0ms".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_read_as_people_mean_them() {
        for (text, milliseconds) in [
            ("250ms", 250),
            ("30s", 30_000),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("7d", 604_800_000),
            ("1h30m", 5_400_000),
            ("1d2h3m4s5ms", 93_784_005),
            ("90m", 5_400_000),
            ("3650d", 315_360_000_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused_with_advice() {
        for text in [
            "",
            " ",
            "s",
            "1",
            "1.5s",
            "-1s",
            "1S",
            "1 s",
            "30m1h",
            "1s1s",
            "1w",
            "1y",
            "1h30",
            "ms",
            "0s",
            "0h0m",
            "3651d",
            "99999999999999999999d",
            "1hm",
            "十s",
            "1us",
        ] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
        assert_eq!(parse_duration("30"), Err("has no unit; write 30s for seconds or 30ms".to_owned()));
        assert_eq!(parse_duration("3651d"), Err("is longer than 3650d, the longest there is".to_owned()));
    }

    proptest! {
        #[test]
        fn formatting_reads_back(milliseconds in 1_u64..=315_360_000_000) {
            let duration = Duration::from_millis(milliseconds);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
    }
}
