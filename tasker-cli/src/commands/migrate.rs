//! `tasker migrate`.

use serde_json::json;
use tasker_shared::migrate;

use crate::Global;
use crate::output::{self, Format};
use crate::run;

/// Create or update the schema of the database.
///
/// Safe when several processes do it at once; nothing is locked when nothing is to do. Every
/// command that needs the schema does this first.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tasker migrate\n  tasker migrate --print > tasker.sql")]
pub struct Migrate {
    /// Print the SQL instead, for psql; no database is needed
    #[arg(long)]
    print: bool,
}

impl Migrate {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        if self.print {
            return output::line(migrate::print().trim_end());
        }
        let (_server, _, report) = run::migrated(global).await?;
        let pgmq = report.pgmq.to_string();
        if global.output == Format::Json {
            return output::json(&json!({"applied": report.applied, "pgmq": pgmq}));
        }
        match report.applied.as_slice() {
            [] => output::line(format!("nothing to do; {pgmq}")),
            applied => output::line(format!("applied {}; {pgmq}", applied.join(", "))),
        }
    }
}
