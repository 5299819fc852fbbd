use proptest::prelude::*;

use super::*;

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn cron(pattern: &str, zone: &str) -> Timing {
    Timing::new(Some(pattern), Some(zone), None, None, at("2026-01-01T00:00:00Z")).unwrap()
}

#[track_caller]
fn ticks(timing: &Timing, after: &str, expected: &[&str]) {
    let mut time = at(after);
    let mut found = Vec::new();
    while found.len() < expected.len() {
        time = timing.next_after(time).expect("another tick");
        found.push(time);
    }
    let expected: Vec<DateTime<Utc>> = expected.iter().map(|text| at(text)).collect();
    assert_eq!(found, expected);
}

#[test]
fn a_tick_in_the_hour_that_spring_jumps_over_comes_right_after_the_jump() {
    // Paris goes from 02:00 to 03:00 on 29 March 2026, at 01:00 UTC.
    ticks(
        &cron("30 2 * * *", "Europe/Paris"),
        "2026-03-27T12:00:00Z",
        &["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"],
    );
}

#[test]
fn a_tick_in_the_hour_that_autumn_repeats_comes_once() {
    // Paris goes from 03:00 back to 02:00 on 25 October 2026, at 01:00 UTC.
    ticks(
        &cron("30 2 * * *", "Europe/Paris"),
        "2026-10-24T12:00:00Z",
        &["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"],
    );
}

#[test]
fn a_pattern_of_many_times_follows_the_clock_through_gap_and_repeat() {
    let half_hourly = cron("*/30 * * * *", "Europe/Paris");
    ticks(&half_hourly, "2026-03-29T00:30:00Z", &["2026-03-29T01:00:00Z", "2026-03-29T01:30:00Z"]);
    ticks(
        &half_hourly,
        "2026-10-25T00:00:00Z",
        &["2026-10-25T00:30:00Z", "2026-10-25T01:00:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:00:00Z"],
    );
}

#[test]
fn an_interval_knows_no_daylight_saving_and_counts_from_its_anchor() {
    let every = Timing::new(None, None, Some(7_200_000), None, at("2026-03-28T23:30:00Z")).unwrap();
    ticks(&every, "2026-03-28T23:30:00Z", &["2026-03-29T01:30:00Z", "2026-03-29T03:30:00Z", "2026-03-29T05:30:00Z"]);
    assert_eq!(every.next_after(at("2020-01-01T00:00:00Z")), Some(at("2026-03-29T01:30:00Z")));
}

#[test]
fn what_never_fires_or_cannot_be_read_is_refused_with_its_field() {
    let now = at("2026-01-01T00:00:00Z");
    let nightly = Schedule { cron: Some("30 2 * * *".into()), ..Schedule::new("shop", "nightly", "report") };
    assert!(nightly.timing(now).is_ok());
    let cases = [
        (Schedule { cron: Some("0 0 30 2 *".into()), ..nightly.clone() }, "cron: \"0 0 30 2 *\" never fires in UTC"),
        (Schedule { cron: Some("0 0 31 4,6 *".into()), ..nightly.clone() }, "cron: \"0 0 31 4,6 *\" never fires"),
        (Schedule { cron: Some("every day".into()), ..nightly.clone() }, "cron: \"every day\" cannot be read"),
        (Schedule { cron: Some("61 * * * *".into()), ..nightly.clone() }, "cron: \"61 * * * *\" cannot be read"),
        (Schedule { time_zone: Some("Mars/Base".into()), ..nightly.clone() }, "time_zone: \"Mars/Base\" is not known"),
        (Schedule { every: Some("1h".into()), ..nightly.clone() }, "cron, every, once_at: give exactly one"),
        (Schedule { cron: None, ..nightly.clone() }, "cron, every, once_at: give exactly one"),
        (Schedule { cron: None, every: Some("soon".into()), ..nightly.clone() }, "every: is not a duration"),
        (Schedule { cron: None, every: Some("20ms".into()), ..nightly.clone() }, "every: must be a second at least"),
        (
            Schedule { cron: None, once_at: Some(now), ..nightly.clone() },
            "once_at: 2026-01-01 00:00:00 UTC is in the past",
        ),
        (
            Schedule { cron: None, every: Some("1h".into()), time_zone: Some("UTC".into()), ..nightly },
            "time_zone: is for cron only",
        ),
    ];
    for (schedule, expected) in cases {
        let refused = schedule.timing(now).unwrap_err().to_string();
        assert!(refused.starts_with(expected), "{refused}");
    }
}

#[test]
fn missed_ticks_are_made_up_for_as_the_policy_says() {
    let hourly = cron("0 * * * *", "UTC");
    let first = at("2026-01-01T03:00:00Z");
    let cases = [
        // In time: every policy runs it.
        (Missed::Skip, "2026-01-01T03:00:02Z", vec!["2026-01-01T03:00:00Z"]),
        (Missed::RunOnce, "2026-01-01T03:00:02Z", vec!["2026-01-01T03:00:00Z"]),
        (Missed::RunAll, "2026-01-01T03:00:02Z", vec!["2026-01-01T03:00:00Z"]),
        // Two and a half hours late.
        (Missed::Skip, "2026-01-01T05:30:00Z", vec![]),
        (Missed::RunOnce, "2026-01-01T05:30:00Z", vec!["2026-01-01T05:00:00Z"]),
        (
            Missed::RunAll,
            "2026-01-01T05:30:00Z",
            vec!["2026-01-01T03:00:00Z", "2026-01-01T04:00:00Z", "2026-01-01T05:00:00Z"],
        ),
        // Late, but a tick is in time again.
        (Missed::Skip, "2026-01-01T05:00:30Z", vec!["2026-01-01T05:00:00Z"]),
    ];
    for (missed, now, runs) in cases {
        let found = due_runs(&hourly, missed, first, at(now));
        assert_eq!(found.runs, runs.iter().map(|text| at(text)).collect::<Vec<_>>(), "{missed:?} at {now}");
        assert!(found.next.is_some_and(|next| next > at(now) && next <= at(now) + TimeDelta::hours(1)));
    }
}

#[test]
fn a_year_of_missed_seconds_costs_a_moment_and_brings_the_latest_hundred() {
    let secondly = cron("* * * * * *", "UTC");
    let now = at("2027-01-01T00:00:00.5Z");
    let found = due_runs(&secondly, Missed::RunAll, at("2026-01-01T00:00:00Z"), now);
    assert_eq!(found.runs.len(), MAX_MISSED);
    assert_eq!(found.runs.last(), Some(&at("2027-01-01T00:00:00Z")));
    assert_eq!(found.next, Some(at("2027-01-01T00:00:01Z")));
}

#[test]
fn one_time_ticks_once() {
    let once = Timing::new(None, None, None, Some(at("2026-05-01T08:00:00Z")), at("2026-01-01T00:00:00Z")).unwrap();
    let now = at("2026-05-01T08:00:01Z");
    assert_eq!(
        due_runs(&once, Missed::RunOnce, at("2026-05-01T08:00:00Z"), now),
        DueRuns { runs: vec![at("2026-05-01T08:00:00Z")], next: None }
    );
}

#[test]
fn a_file_holds_one_schedule_and_nothing_unknown() {
    let text = "namespace: shop\nname: nightly\ntemplate: report\ncron: \"30 2 * * *\"\ntime_zone: Europe/Paris\nmissed: run_all\noverlap: skip\ninput: {day: \"${schedule.at}\"}\n";
    let schedule = Schedule::from_yaml(text).unwrap();
    assert_eq!((schedule.missed, schedule.overlap), (Missed::RunAll, Overlap::Skip));
    assert_eq!(schedule.input["day"], "${schedule.at}");
    assert!(schedule.timing(at("2026-01-01T00:00:00Z")).is_ok());
    let refused = Schedule::from_yaml(&text.replace("missed", "mised")).unwrap_err().to_string();
    assert!(refused.contains("mised") && refused.contains("line 6"), "{refused}");
}

proptest! {
    /// Looking often or rarely finds the same ticks, each once, through every change of the clock.
    #[test]
    fn looks_at_any_times_find_each_tick_once(
        pattern in proptest::sample::select(vec!["30 2 * * *", "*/20 * * * *", "0 0,2,3 * * *", "15 1-4 * * SUN", "0 3 29 3 *"]),
        zone in proptest::sample::select(vec!["Europe/Paris", "America/New_York", "Australia/Lord_Howe", "UTC"]),
        autumn in any::<bool>(),
        pauses in proptest::collection::vec(1_i64..9000, 1..60),
    ) {
        let timing = cron(pattern, zone);
        let start = at(if autumn { "2026-10-24T00:00:00Z" } else { "2026-03-28T00:00:00Z" });
        let (mut now, mut found) = (start, Vec::new());
        let mut next = timing.next_after(start);
        for pause in pauses {
            now += TimeDelta::seconds(pause);
            if let Some(due) = next.filter(|due| *due <= now) {
                let run_now = due_runs(&timing, Missed::RunAll, due, now);
                found.extend(run_now.runs);
                next = run_now.next;
            }
        }
        let mut expected = Vec::new();
        let mut tick = timing.next_after(start);
        while let Some(time) = tick.filter(|time| *time <= now) {
            expected.push(time);
            tick = timing.next_after(time);
        }
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn the_table_of_the_document_lists_every_key() {
    let document =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/schedules.md")).unwrap();
    let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `"));
    let mut told: Vec<String> =
        rows.flat_map(|row| quoted(&format!("`{}", row.split(" | ").next().unwrap()))).collect();
    // What is no key is refused with the names of all that are.
    let refusal = serde_json::from_str::<Schedule>(r#"{"no_key": 1}"#).unwrap_err().to_string();
    let mut keys = quoted(&refusal).split_off(1);
    told.sort();
    keys.sort();
    assert_eq!(told, keys);
}
