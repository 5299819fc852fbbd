//! How states, numbers and times read on every page. Pure.

use chrono::{DateTime, TimeDelta, Utc};
use maud::{Markup, html};
use tasker_shared::duration::in_words;

/// How a state looks: never by its colour alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// The class that colours it.
    pub class: &'static str,
    /// A sign for those who do not see colours.
    pub sign: &'static str,
    /// The word.
    pub word: &'static str,
    /// Of several, the heaviest is shown.
    pub weight: u8,
    /// Whether it was reached by doing the work.
    pub done: bool,
    /// Whether work on it has begun.
    pub begun: bool,
    /// Whether it is final.
    pub ended: bool,
}

impl Look {
    /// Of what has no state.
    pub const NONE: Self = Self::new("none", "", "", 0);

    const fn new(class: &'static str, sign: &'static str, word: &'static str, weight: u8) -> Self {
        Self { class, sign, word, weight, done: false, begun: false, ended: false }
    }

    const fn begun(self) -> Self {
        Self { begun: true, ..self }
    }

    const fn ended(self) -> Self {
        Self { ended: true, ..self }
    }

    const fn done(self) -> Self {
        Self { done: true, begun: true, ended: true, ..self }
    }
}

/// How a step's state looks.
pub fn step(state: &str) -> Look {
    match state {
        "pending" => Look::new("pending", "○", "pending", 2),
        "enqueued" => Look::new("queued", "◔", "in its queue", 5).begun(),
        "in_progress" => Look::new("running", "▶", "running", 7).begun(),
        "enqueued_for_orchestration" | "enqueued_as_error_for_orchestration" => {
            Look::new("running", "▶", "result in", 6).begun()
        }
        "waiting_for_retry" => Look::new("retry", "↻", "retry waits", 8).begun(),
        "waiting" => Look::new("waiting", "◷", "waiting", 6).begun(),
        "complete" => Look::new("complete", "✓", "complete", 1).done(),
        "resolved_manually" => Look::new("complete", "✓", "resolved by hand", 3).done(),
        "error" => Look::new("failed", "✕", "failed", 9).begun().ended(),
        "cancelled" => Look::new("cancelled", "⊘", "cancelled", 4).ended(),
        "skipped" => Look::new("skipped", "⤳", "skipped", 0).ended(),
        _ => Look::NONE,
    }
}

/// How a task's public status looks.
pub fn status(status: &str) -> Look {
    match status {
        "queued" => Look::new("queued", "◔", "queued", 3),
        "running" => Look::new("running", "▶", "running", 4).begun(),
        "waiting" => Look::new("waiting", "◷", "waiting", 5).begun(),
        "suspended" => Look::new("suspended", "‖", "suspended", 6).begun(),
        "completed" => Look::new("complete", "✓", "completed", 1).done(),
        "failed" => Look::new("failed", "✕", "failed", 7).ended(),
        "cancelled" => Look::new("cancelled", "⊘", "cancelled", 2).ended(),
        _ => Look::NONE,
    }
}

/// The public statuses, in the order of their chips.
pub const STATUSES: [&str; 7] = ["queued", "running", "waiting", "suspended", "completed", "failed", "cancelled"];

/// A status as a coloured pill with its sign.
pub fn pill(look: Look) -> Markup {
    html! { span.pill.(look.class) { span.sign aria-hidden="true" { (look.sign) } " " (look.word) } }
}

/// A count with its thousands apart: `12,345`.
pub fn count(n: impl TryInto<i64>) -> String {
    let n = n.try_into().unwrap_or(i64::MAX);
    let digits = n.unsigned_abs().to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3 + 1);
    if n < 0 {
        text.push('-');
    }
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 task`, `2 tasks`.
pub fn counted(n: impl TryInto<i64>, one: &str) -> String {
    let n = n.try_into().unwrap_or(i64::MAX);
    format!("{} {one}{}", count(n), if n == 1 { "" } else { "s" })
}

/// The text, at most so many characters of it.
pub fn clip(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut clipped: String = text.chars().take(most.saturating_sub(1)).collect();
    clipped.push('…');
    clipped
}

/// How long ago, or in how long, in one unit: `5 s ago`, `in 3 min`. The script repeats this rule.
pub fn relative(now: DateTime<Utc>, at: DateTime<Utc>) -> String {
    let s = (now - at).num_seconds();
    let (n, unit) = match s.abs() {
        0..=1 => return "just now".into(),
        n @ 2..=89 => (n, "s"),
        n @ 90..=5_399 => ((n + 30) / 60, "min"),
        n @ 5_400..=129_599 => ((n + 1_800) / 3_600, "h"),
        n => ((n + 43_200) / 86_400, "d"),
    };
    if s < 0 { format!("in {n} {unit}") } else { format!("{n} {unit} ago") }
}

/// A moment as UTC, for people: `2026-11-21 14:03:10.250 UTC`.
pub fn absolute(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S%.3f UTC").to_string()
}

/// The same without the part of a second.
pub fn to_the_second(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// A moment, relative, with the absolute on hover; the script keeps it going.
pub fn when(now: DateTime<Utc>, at: DateTime<Utc>) -> Markup {
    html! {
        time datetime=(at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)) title=(absolute(at)) { (relative(now, at)) }
    }
}

/// A length of time as people say it, without a second unit that is zero; nothing for what has none.
pub fn took(length: Option<TimeDelta>) -> String {
    let text = length.map_or_else(|| "–".into(), in_words);
    let short = [" 0 s", " 0 min", " 0 h"].iter().find_map(|zero| text.strip_suffix(zero));
    short.map_or_else(|| text.clone(), str::to_owned)
}

/// A sentence whose commands stand between backticks, as terminals show them.
pub fn with_commands(sentence: &str) -> Markup {
    html! { @for (at, part) in sentence.split('`').enumerate() { @if at % 2 == 1 { code { (part) } } @else { (part) } } }
}

/// A value that people copy: itself, and a button for it.
pub fn copyable(value: &str, name: &str) -> Markup {
    html! {
        span.copyable {
            code { (value) }
            button.copy type="button" data-copy=(value) aria-label={ "Copy the " (name) } title={ "Copy the " (name) } { (copy_sign()) }
        }
    }
}

/// Two sheets of paper; drawn, since not every font has a sign for them.
pub fn copy_sign() -> Markup {
    html! {
        svg width="13" height="13" viewBox="0 0 16 16" aria-hidden="true" focusable="false" fill="none" stroke="currentColor" stroke-width="1.6" {
            rect x="5.5" y="5.5" width="9" height="9" rx="2" {}
            path d="M3 10.5H2.5a1 1 0 0 1-1-1v-7a1 1 0 0 1 1-1h7a1 1 0 0 1 1 1V3" {}
        }
    }
}

/// JSON as people read it, indented, clipped past `most` bytes.
pub fn pretty(value: &serde_json::Value, most: usize) -> (String, bool) {
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    let clipped = text.len() > most;
    if clipped {
        let end = (0..=most).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    (text, clipped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tasker_shared::state_machine::states::{StepState, TaskState};

    #[test]
    fn every_state_has_a_look() {
        for state in StepState::ALL {
            assert_ne!(step(state.as_str()), Look::NONE, "{state:?}");
            assert_eq!(step(state.as_str()).ended, state.is_terminal(), "{state:?}");
        }
        for state in TaskState::ALL {
            let word = state.public_status();
            assert_eq!(status(word).word, word);
            assert!(STATUSES.contains(&word));
        }
    }

    #[test]
    fn times_read_as_people_say_them() {
        let now: DateTime<Utc> = "2026-11-21T12:00:00Z".parse().unwrap();
        for (s, text) in [
            (0, "just now"),
            (5, "5 s ago"),
            (-45, "in 45 s"),
            (89, "89 s ago"),
            (90, "2 min ago"),
            (3_600, "60 min ago"),
            (7_200, "2 h ago"),
            (-172_800, "in 2 d"),
        ] {
            assert_eq!(relative(now, now - TimeDelta::seconds(s)), text);
        }
    }

    #[test]
    fn lengths_have_no_empty_second_unit() {
        for (s, text) in [(5, "5 s"), (600, "10 min"), (601, "10 min 1 s"), (7_200, "2 h")] {
            assert_eq!(took(Some(TimeDelta::seconds(s))), text);
        }
    }

    #[test]
    fn a_sentence_shows_its_commands() {
        assert_eq!(with_commands("a `b <c>` d").into_string(), "a <code>b &lt;c&gt;</code> d");
    }

    #[test]
    fn counts_are_grouped() {
        for (n, text) in [(0_i64, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567"), (-1_000, "-1,000")] {
            assert_eq!(count(n), text);
        }
        assert_eq!(counted(1_i64, "task"), "1 task");
        assert_eq!(counted(0_i64, "task"), "0 tasks");
    }
}
