//! The figures as a table for people; the same struct is the JSON.

use std::fmt::Write;

use serde::Serialize;

use super::api::ApiFigures;
use super::limits::{Limits, median};
use super::load::{Latency, Run};
use super::timers::{Lateness, Sleepers, Timers};

/// Everything one run of the bench measured.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub template: String,
    pub cores: usize,
    pub load_average: String,
    pub load_average_after: String,
    pub limits: Limits,
    pub untraced: Option<Run>,
    pub traced: Option<Run>,
    pub pairs: Vec<(Run, Run)>,
    /// Of each pair, steps/s with tracing off over the PGMQ messages/s measured right before and after.
    pub over_pgmq: Vec<f64>,
    pub latency: Option<Latency>,
    pub timers: Option<Timers>,
    pub lateness: Option<Lateness>,
    pub sleepers: Option<Sleepers>,
    pub fanouts: Vec<(Run, Run)>,
    pub idle_statements_per_second: Option<f64>,
    pub api: Option<ApiFigures>,
    pub backlog: Option<(usize, Vec<Run>, Vec<Run>)>,
}

impl Report {
    /// As text, one figure a line.
    #[expect(clippy::too_many_lines, reason = "one line a figure")]
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<52} {value}");
        };
        line(
            "cores, load average before and after",
            format!("{}, {} … {}", self.cores, self.load_average, self.load_average_after),
        );
        let limits = &self.limits;
        line(
            "limit: one-row commits, one client",
            format!("{:.0}/s ({:.2} ms)", limits.commits_per_second, limits.commit_ms),
        );
        line("limit: rows inserted 100 at a time", format!("{:.0}/s", limits.batched_rows_per_second));
        line("limit: PGMQ read + delete, 100 at a time", format!("{:.0} messages/s", limits.pgmq_messages_per_second));
        line(
            "  by a client for each core, all together",
            format!("{:.0} messages/s", limits.pgmq_messages_per_second_all_cores),
        );
        for (name, run) in [("tracing off", &self.untraced), ("every span exported", &self.traced)] {
            let Some(run) = run else { continue };
            line("", String::new());
            line(
                &format!("{}, {name}", self.template),
                format!("{:.0} tasks/s, {:.0} steps/s", run.tasks_per_second, run.steps_per_second),
            );
            line(
                "  steps/s over PGMQ messages/s (bar: 1/6 = 0.167)",
                format!("{:.3}", run.steps_per_second / limits.pgmq_messages_per_second),
            );
            line(
                "  submit → complete, all submitted at once",
                format!("p50 {:.0} ms, p99 {:.0} ms", run.p50_ms, run.p99_ms),
            );
            if run.spans > 0 {
                line(
                    "  spans acknowledged",
                    format!(
                        "{} ({:.0}/s), {:.1} MB in {} requests, {:.2} s after the last task",
                        run.spans,
                        run.spans_per_second,
                        run.span_bytes as f64 / 1e6,
                        run.export_requests,
                        run.drain_seconds
                    ),
                );
            }
            if let Some(statements) = run.statements_per_step {
                line("  client statements, commits per step", format!("{statements:.3}, {:.3}", run.commits_per_step));
            }
            if let (Some(settle), Some(settles)) = (run.statements_per_settle, run.settles) {
                line("  client statements per settled batch (bar: 10)", format!("{settle:.1} over {settles} batches"));
            }
            if let Some(claim) = run.statements_per_claim {
                line("  client statements per claimed batch (bar: 4)", format!("{claim:.1}"));
            }
            line("  WAL per step", format!("{:.0} bytes", run.wal_bytes_per_step));
            line("  row writes per step (bar: 24)", format!("{:.1}", run.row_writes_per_step));
            for (table, n) in &run.row_writes_by_table {
                line(&format!("    {table}"), format!("{n:.2}"));
            }
        }
        if !self.pairs.is_empty() {
            let ratios: Vec<f64> =
                self.pairs.iter().map(|(off, on)| on.steps_per_second / off.steps_per_second).collect();
            let all = ratios.iter().map(|ratio| format!("{ratio:.2}")).collect::<Vec<_>>().join(" ");
            line("", String::new());
            line("traced over untraced, median of pairs (bar: 0.80)", format!("{:.2} ({all})", median(ratios)));
            let off: Vec<f64> = self.pairs.iter().map(|(off, _)| off.steps_per_second).collect();
            line("  steps/s, tracing off, median", format!("{:.0}", median(off)));
            let all = self.over_pgmq.iter().map(|ratio| format!("{ratio:.3}")).collect::<Vec<_>>().join(" ");
            line(
                "  … over PGMQ messages/s beside it (bar: 0.167)",
                format!("{:.3} ({all})", median(self.over_pgmq.clone())),
            );
        }
        if let Some(latency) = &self.latency {
            line("", String::new());
            line(
                "one-step task, idle system, submit → seen complete",
                format!("p50 {:.2} ms, p99 {:.2} ms", latency.p50_ms, latency.p99_ms),
            );
            line(
                "  bar: 4 commits + 3 ms",
                format!("{:.2} ms (commit {:.2} ms)", latency.bound_ms, latency.commit_p50_ms),
            );
        }
        if let Some(api) = &self.api {
            let bar = |met: bool| if met { "met" } else { "MISSED" };
            line("", String::new());
            line(
                "submit_task over SQL, one after the other",
                format!("p50 {:.2} ms, p99 {:.2} ms", api.sql_p50_ms, api.sql_p99_ms),
            );
            line(
                "  POST /v1/tasks, alternating with it",
                format!("p50 {:.2} ms, p99 {:.2} ms", api.http_p50_ms, api.http_p99_ms),
            );
            let over = api.http_p50_ms - api.sql_p50_ms;
            line(
                "  our own time (bar: 1 ms)",
                format!(
                    "{over:.2} ms at p50, {:.2} ms at p99 ({})",
                    api.http_p99_ms - api.sql_p99_ms,
                    bar(over <= 1.0)
                ),
            );
            line(
                "batches of 200, HTTP over the bench's own (bar: 1)",
                format!(
                    "{:.2} ({:.0} over {:.0} tasks/s); two requests at once {:.2}",
                    api.http_batched_per_second / api.sql_batched_per_second,
                    api.http_batched_per_second,
                    api.sql_batched_per_second,
                    api.http_batched_by_two_per_second / api.sql_batched_per_second
                ),
            );
            line(&format!("lists and searches with {} tasks (bar: p99 50 ms)", api.tasks), String::new());
            for list in &api.lists {
                line(
                    &format!("  {}", list.what),
                    format!(
                        "p50 {:.1} ms, p99 {:.1} ms ({}), {} found",
                        list.p50_ms,
                        list.p99_ms,
                        bar(list.p99_ms < 50.0),
                        list.found
                    ),
                );
            }
        }
        if let Some(timers) = &self.timers {
            line("", String::new());
            line(
                &format!("{} timers due at once, late when they fire", timers.tasks),
                format!("p50 {:.0} ms, p99 {:.0} ms", timers.fired_p50_ms, timers.fired_p99_ms),
            );
            line("  timers fired", format!("{:.0}/s", timers.fired_per_second));
            line("  due → task complete, a step behind the timer", format!("p99 {:.0} ms", timers.ended_p99_ms));
        }
        if let Some(late) = &self.lateness {
            line("", String::new());
            let bar = |p99: f64| if p99 <= 50.0 { "met" } else { "MISSED" };
            for (name, p50, p99) in
                [("timer", late.timer_p50_ms, late.timer_p99_ms), ("retry", late.retry_p50_ms, late.retry_p99_ms)]
            {
                line(
                    &format!("due {name} → next attempt claimed, idle system"),
                    format!("p50 {p50:.1} ms, p99 {p99:.1} ms of {} (bar: p99 50 ms, {})", late.count, bar(p99)),
                );
            }
        }
        if let Some(sleepers) = &self.sleepers {
            line("", String::new());
            let more = sleepers.sleeping_per_second - sleepers.idle_per_second;
            line(
                &format!("{} sleeping tasks cost (bar: 1 query/s)", sleepers.tasks),
                format!(
                    "{:.2} {}/s more ({:.2}/s, idle without them {:.2}/s)",
                    more.max(0.0),
                    sleepers.counted,
                    sleepers.sleeping_per_second,
                    sleepers.idle_per_second
                ),
            );
            line(
                "  one look at what is due",
                format!("{:.0} µs, without them {:.0} µs", sleepers.look_after_us, sleepers.look_before_us),
            );
        }
        if !self.fanouts.is_empty() {
            let ratios: Vec<f64> =
                self.fanouts.iter().map(|(narrow, wide)| narrow.steps_per_second / wide.steps_per_second).collect();
            let all = ratios.iter().map(|ratio| format!("{ratio:.2}")).collect::<Vec<_>>().join(" ");
            let (narrow, wide) = &self.fanouts[0];
            line("", String::new());
            line(
                "wide fan-out over narrow, time per step, median (bar: 1.20)",
                format!("{:.2} ({all})", median(ratios)),
            );
            line(
                "  steps/s of the first",
                format!("narrow {:.0}, wide {:.0}", narrow.steps_per_second, wide.steps_per_second),
            );
        }
        if let Some(idle) = self.idle_statements_per_second {
            line("idle: statements per second (bar: 2)", format!("{idle:.2}"));
        }
        if let Some((tasks, before, after)) = &self.backlog {
            let speed = |runs: &[Run]| median(runs.iter().map(|run| run.steps_per_second).collect());
            line("", String::new());
            line(
                &format!("with {tasks} finished tasks, over before (bar: 0.90)"),
                format!("{:.2} ({:.0} over {:.0} steps/s)", speed(after) / speed(before), speed(after), speed(before)),
            );
        }
        out
    }
}
