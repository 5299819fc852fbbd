//! When a schedule runs: cron in a time zone, an interval, or one time.
//!
//! Pure: the time is an argument, and it is the database's. What a look at a schedule finds due
//! is decided here; `store::schedules` submits it.

use std::collections::VecDeque;
use std::str::FromStr as _;
use std::time::Duration;

use chrono::{DateTime, SubsecRound as _, TimeDelta, Utc};
use chrono_tz::Tz;
use croner::Cron;
use croner::parser::{CronParser, Seconds};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::template::{format_duration, parse_duration};

/// A tick is missed when nobody looked at it for this long, or when a later one is due as well.
pub const MISSED_AFTER: TimeDelta = TimeDelta::seconds(60);
/// The most missed ticks that `run_all` makes up for at once: the latest ones.
pub const MAX_MISSED: usize = 100;
/// How far a look back goes first, and then: so that a schedule which ticks every second and was
/// not looked at for a year costs no more than one that ticks once a day.
const WINDOWS: [TimeDelta; 5] =
    [TimeDelta::minutes(2), TimeDelta::hours(2), TimeDelta::days(2), TimeDelta::days(62), TimeDelta::days(366)];

/// A schedule as a person writes it: on the command line, in a file, or in Rust.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The namespace of the schedule and of its template.
    pub namespace: String,
    /// Unique in the namespace: `^[a-z][a-z0-9_]{0,39}$`.
    pub name: String,
    /// The template whose tasks it submits.
    pub template: String,
    /// Its version; the one registered last when the tick comes, if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// A JSON object; `${schedule.at}` in a text becomes the tick's time, `${schedule.name}` the name.
    #[serde(default = "empty")]
    pub input: Value,
    /// Of the tasks: -9999 to 9999, higher runs first.
    #[serde(default)]
    pub priority: i32,
    /// Five fields, or six with seconds first, or a nickname such as `@daily`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cron: Option<String>,
    /// An IANA name such as `Europe/Paris`, for `cron`; UTC if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// An interval such as `15m`, a second at least; it counts from when it was set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<String>,
    /// One time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub once_at: Option<DateTime<Utc>>,
    /// What becomes of ticks that nobody looked at in time.
    #[serde(default)]
    pub missed: Missed,
    /// What a tick does while the task of the last one is open.
    #[serde(default)]
    pub overlap: Overlap,
    /// Whether it rests; kept as it is if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
}

fn empty() -> Value {
    Value::Object(serde_json::Map::new())
}

impl Schedule {
    /// A schedule of this template with nothing else said; it needs `cron`, `every` or `once_at`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>, template: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            template: template.into(),
            version: None,
            input: empty(),
            priority: 0,
            cron: None,
            time_zone: None,
            every: None,
            once_at: None,
            missed: Missed::default(),
            overlap: Overlap::default(),
            paused: None,
        }
    }

    /// Reads the YAML (or JSON) of a file that holds one schedule.
    pub fn from_yaml(text: &str) -> Result<Self, Refused> {
        serde_saphyr::from_str(text).map_err(|error| Refused::File(error.without_snippet().to_string()))
    }

    /// When it ticks, if set at `now`; refuses what would never tick after `now`.
    pub fn timing(&self, now: DateTime<Utc>) -> Result<Timing, Refused> {
        let every = self.every.as_deref().map(parse_duration).transpose().map_err(Refused::Every)?;
        let every = every.map(|every| i64::try_from(every.as_millis()).unwrap_or(i64::MAX));
        let timing = Timing::new(self.cron.as_deref(), self.time_zone.as_deref(), every, self.once_at, now)?;
        if timing.next_after(now).is_none() {
            return Err(timing.never());
        }
        Ok(timing)
    }
}

/// What becomes of ticks that nobody looked at in time: see [`MISSED_AFTER`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Missed {
    /// They are gone.
    Skip,
    /// The latest of them runs.
    #[default]
    RunOnce,
    /// They all run, in order; of more than [`MAX_MISSED`] the latest.
    RunAll,
}

impl Missed {
    /// The word in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::RunOnce => "run_once",
            Self::RunAll => "run_all",
        }
    }
}

/// What a tick does while the task of the last one is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// It runs beside it.
    #[default]
    Allow,
    /// It does not run.
    Skip,
    /// It cancels that one and runs.
    CancelPrevious,
}

impl Overlap {
    /// The word in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Skip => "skip",
            Self::CancelPrevious => "cancel_previous",
        }
    }
}

/// Why a schedule cannot be: the field, what is wrong with it and what to write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The file is not a schedule.
    #[error("{0}")]
    File(String),
    /// None of the three, or several.
    #[error("cron, every, once_at: give exactly one of the three")]
    Timing,
    /// The pattern.
    #[error(
        "cron: {pattern:?} {problem}; write five fields such as \"30 2 * * MON-FRI\" (six with seconds first), or @daily"
    )]
    Cron {
        /// As given.
        pattern: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The pattern names no time that comes.
    #[error("cron: {pattern:?} never fires in {zone}; no such date comes")]
    Never {
        /// As given.
        pattern: String,
        /// Its time zone.
        zone: String,
    },
    /// The zone.
    #[error("time_zone: {0:?} is not known; write an IANA name such as Europe/Paris, or UTC")]
    Zone(String),
    /// A zone without a cron pattern.
    #[error("time_zone: is for cron only; an interval and a time need none")]
    ZoneWithoutCron,
    /// The interval.
    #[error("every: {0}")]
    Every(String),
    /// The one time.
    #[error("once_at: {0} is in the past, so it would never fire")]
    Past(DateTime<Utc>),
}

/// The times a schedule ticks at.
#[derive(Debug, Clone)]
pub enum Timing {
    /// By the clock on the wall of a place.
    Cron {
        /// The pattern.
        cron: Box<Cron>,
        /// The place.
        zone: Tz,
    },
    /// Every so often, counted from `anchor`.
    Every {
        /// Tick 0, which does not run.
        anchor: DateTime<Utc>,
        /// A second at least.
        every: TimeDelta,
    },
    /// Once.
    Once(DateTime<Utc>),
}

impl Timing {
    /// From the columns of a schedule; exactly one of `cron`, `every_ms` and `once_at`.
    pub fn new(
        cron: Option<&str>,
        time_zone: Option<&str>,
        every_ms: Option<i64>,
        once_at: Option<DateTime<Utc>>,
        anchor: DateTime<Utc>,
    ) -> Result<Self, Refused> {
        if time_zone.is_some() && cron.is_none() {
            return Err(Refused::ZoneWithoutCron);
        }
        match (cron, every_ms, once_at) {
            (Some(pattern), None, None) => {
                let zone = time_zone.unwrap_or("UTC");
                let zone = Tz::from_str(zone).map_err(|_| Refused::Zone(zone.chars().take(60).collect()))?;
                let parser = CronParser::builder().seconds(Seconds::Optional).build();
                let cron = parser.parse(pattern).map_err(|error| Refused::Cron {
                    pattern: pattern.chars().take(100).collect(),
                    problem: format!("cannot be read ({error})"),
                })?;
                Ok(Self::Cron { cron: Box::new(cron), zone })
            }
            (None, Some(every), None) => {
                let every = TimeDelta::try_milliseconds(every).filter(|every| *every >= TimeDelta::seconds(1));
                let every =
                    every.ok_or_else(|| Refused::Every("must be a second at least; write 30s or 15m".into()))?;
                Ok(Self::Every { anchor, every })
            }
            (None, None, Some(at)) => Ok(Self::Once(at)),
            _ => Err(Refused::Timing),
        }
    }

    /// The first tick after a time; `None` if there is none any more.
    ///
    /// Of a cron pattern with one hour and one minute, a tick that the clock jumps over in spring
    /// comes at the first moment after the jump, and one in the hour that comes twice in autumn
    /// comes the first time only. A pattern with several hours or minutes follows the clock: what
    /// is jumped over does not come, what comes twice ticks twice.
    pub fn next_after(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Self::Cron { cron, zone } => {
                let local = time.trunc_subsecs(0).with_timezone(zone);
                cron.find_next_occurrence(&local, false).ok().map(|tick| tick.with_timezone(&Utc))
            }
            Self::Every { anchor, every } => {
                let passed = (time - *anchor).num_milliseconds().div_euclid(every.num_milliseconds());
                let until = TimeDelta::try_milliseconds(every.num_milliseconds().checked_mul(passed.max(0) + 1)?)?;
                anchor.checked_add_signed(until)
            }
            Self::Once(at) => (*at > time).then_some(*at),
        }
    }

    /// Why it never ticks again.
    pub fn never(&self) -> Refused {
        match self {
            Self::Cron { cron, zone } => {
                Refused::Never { pattern: cron.pattern.to_string().chars().take(100).collect(), zone: zone.to_string() }
            }
            Self::Every { every, .. } => {
                let every = Duration::from_millis(every.num_milliseconds().unsigned_abs());
                Refused::Every(format!("{} leads beyond the end of time", format_duration(every)))
            }
            Self::Once(at) => Refused::Past(*at),
        }
    }

    /// The latest ticks from `first` to `now`, at most `limit`, in order.
    fn latest(&self, first: DateTime<Utc>, now: DateTime<Utc>, limit: usize) -> VecDeque<DateTime<Utc>> {
        let mut latest = VecDeque::new();
        for window in WINDOWS.into_iter().map(Some).chain([None]) {
            latest.clear();
            let start = window.and_then(|window| now.checked_sub_signed(window)).filter(|start| *start > first);
            let mut tick = start.map_or(Some(first), |start| self.next_after(start));
            while let Some(at) = tick.filter(|at| *at <= now) {
                latest.push_back(at);
                if latest.len() > limit {
                    latest.pop_front();
                }
                tick = self.next_after(at);
            }
            if latest.len() == limit || start.is_none() {
                break;
            }
        }
        latest
    }
}

/// The runs of a schedule that are due, and its next tick.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DueRuns {
    /// Ticks to run now, in order.
    pub runs: Vec<DateTime<Utc>>,
    /// The next tick; `None` if there is none any more.
    pub next: Option<DateTime<Utc>>,
}

/// Finds the due runs of a schedule whose next tick was to come at `next_at`, which is not after `now`.
pub fn due_runs(timing: &Timing, missed: Missed, next_at: DateTime<Utc>, now: DateTime<Utc>) -> DueRuns {
    let limit = if missed == Missed::RunAll { MAX_MISSED } else { 1 };
    let mut runs = Vec::from(timing.latest(next_at, now, limit));
    if missed == Missed::Skip {
        runs.retain(|tick| now - *tick <= MISSED_AFTER);
    }
    DueRuns { runs, next: timing.next_after(now.max(next_at)) }
}

#[cfg(test)]
mod tests;
