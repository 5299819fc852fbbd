//! `tasker migrate`.

use serde_json::json;
use tasker_shared::migrate::{self, Pgmq};
use tasker_shared::store::tx::{self, PoolOptions};

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
        let server = run::open(global).await?;
        let pool = tx::pool(&server.url(), &PoolOptions::default()).await?;
        let report = migrate::migrate(&pool).await?;
        let pgmq = match &report.pgmq {
            Pgmq::Extension(version) => format!("PGMQ {version}, an extension of the server"),
            Pgmq::Sql(version) => format!("PGMQ {version}, as plain SQL"),
        };
        if global.output == Format::Json {
            return output::json(&json!({"applied": report.applied, "pgmq": pgmq}));
        }
        match report.applied.as_slice() {
            [] => output::line(format!("nothing to do; {pgmq}")),
            applied => output::line(format!("applied {}; {pgmq}", applied.join(", "))),
        }
    }
}
