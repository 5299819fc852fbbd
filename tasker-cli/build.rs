//! Tells the binary which commit it was built from.
//!
//! A packager who builds without a git checkout sets `TASKER_COMMIT` and `TASKER_COMMIT_DATE`.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=TASKER_COMMIT");
    println!("cargo::rerun-if-env-changed=TASKER_COMMIT_DATE");
    // Every commit and every checkout appends to this file.
    if let Some(log) = git(&["rev-parse", "--path-format=absolute", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
    for (name, format) in [("TASKER_COMMIT", "--format=%H"), ("TASKER_COMMIT_DATE", "--format=%cs")] {
        let given = std::env::var(name).ok().filter(|value| !value.is_empty());
        let value = given.or_else(|| git(&["log", "-1", format])).unwrap_or_else(|| "unknown".to_owned());
        println!("cargo::rustc-env={name}={value}");
    }
}

/// What git answers; nothing where there is no git or no checkout.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned()).filter(|text| !text.is_empty())
}
