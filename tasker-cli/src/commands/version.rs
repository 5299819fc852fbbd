//! `tasker version`.

use serde_json::json;

use crate::Global;
use crate::output::{self, Format};

/// Show the version, and the commit it was built from.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tasker version\n  tasker version -o json")]
pub struct Version {}

impl Version {
    /// Runs it; needs no database.
    pub fn run(global: &Global) -> anyhow::Result<()> {
        // `build.rs` sets the last two.
        let (version, commit, date) = (env!("CARGO_PKG_VERSION"), env!("TASKER_COMMIT"), env!("TASKER_COMMIT_DATE"));
        if global.output == Format::Json {
            return output::json(&json!({"version": version, "commit": commit, "commit_date": date}));
        }
        output::line(format!("tasker {version}, commit {commit} of {date}"))
    }
}
