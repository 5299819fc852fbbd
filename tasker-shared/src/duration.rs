//! Durations as people write them and read them.

pub use crate::state_machine::duration::{format_duration, parse_duration};

/// A duration as people say it, in its two largest units: `0.3 ms`, `1.25 s`, `2 min 5 s`, `1 d 3 h`.
pub fn in_words(length: chrono::TimeDelta) -> String {
    let us = length.num_microseconds().unwrap_or(i64::MAX).max(0);
    let s = us / 1_000_000;
    #[expect(clippy::cast_precision_loss, reason = "it is rounded to three digits anyway")]
    match s {
        0 if us < 1000 => format!("{us} µs"),
        0 if us < 10_000 => format!("{:.1} ms", us as f64 / 1e3),
        0 => format!("{} ms", us / 1000),
        1..60 if us % 1_000_000 < 5000 => format!("{s} s"),
        1..60 => format!("{:.2} s", us as f64 / 1e6),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    #[test]
    fn durations_read_as_people_say_them() {
        for (us, text) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (1_500, "1.5 ms"),
            (250_000, "250 ms"),
            (1_250_000, "1.25 s"),
            (3_000_000, "3 s"),
            (125_000_000, "2 min 5 s"),
            (7_500_000_000, "2 h 5 min"),
            (97_200_000_000, "1 d 3 h"),
            (-5, "0 µs"),
        ] {
            assert_eq!(in_words(TimeDelta::microseconds(us)), text);
        }
    }
}
