//! `tasker trace sample`.

use serde_json::json;
use tasker_api::sampling;

use crate::Global;
use crate::output::{self, Format, Table};
use crate::run;

/// Say what share of the new traces of a namespace is recorded: 1 is all, 0.5 is every second by
/// the trace id, 0 is none. A caller's sampled flag always decides for the caller's trace. Without
/// arguments, show what is set. Holds at once for every process.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tasker trace sample                   what is set
  tasker trace sample orders 0.1        one trace in ten
  tasker trace sample '*' 0.5           every namespace without a share of its own
  tasker trace sample orders default    as if never set")]
pub struct Sample {
    /// A namespace, or * for every other one
    #[arg(requires = "share")]
    namespace: Option<String>,
    /// 0 to 1, or `default`
    share: Option<String>,
}

impl Sample {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let connected = run::connect(global).await?;
        let mut conn = connected.client.pool().acquire().await?;
        if let (Some(namespace), Some(share)) = (&self.namespace, &self.share) {
            let asked: Option<f64> = match share.as_str() {
                "default" => None,
                number => Some(
                    number
                        .parse()
                        .map_err(|_| anyhow::anyhow!("share {number:?}: is no number; write 0 to 1, or `default`"))?,
                ),
            };
            let set = sampling::set(&mut conn, namespace, asked).await?;
            if set != asked {
                let words = set.map_or_else(|| "none".to_owned(), |share| share.to_string());
                eprintln!("warning: the share must be between 0 and 1; {words} is used");
            }
        }
        let all = sampling::all(&mut conn).await?;
        if global.output == Format::Json {
            let rows: Vec<_> =
                all.iter().map(|(namespace, share)| json!({"namespace": namespace, "share": share})).collect();
            return output::json(&rows);
        }
        let mut table = Table::new(["namespace", "share"]);
        for (namespace, share) in all {
            table.row([namespace, share.to_string()]);
        }
        table.print("every trace is recorded; callers' sampled flags decide for theirs")
    }
}
