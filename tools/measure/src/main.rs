//! `tasker-measure [--check]`: prints the figures; with `--check` it fails on what is over its limit.

use std::process::ExitCode;

use tasker_measure::report::Report;
use tasker_measure::root;

fn main() -> ExitCode {
    let is_check = std::env::args().any(|argument| argument == "--check");
    match Report::take(root()) {
        Err(error) => {
            eprintln!("it cannot be measured: {error}");
            ExitCode::FAILURE
        }
        Ok(report) => {
            print!("{}", report.text);
            for wrong in &report.wrong {
                eprintln!("OVER ITS LIMIT OR UNTRUE: {wrong}");
            }
            if is_check && !report.wrong.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
    }
}
