//! `tasker db`: the managed local PostgreSQL.

use anyhow::Context as _;
use serde_json::json;
use tasker_shared::migrate::migrate;
use tasker_shared::postgres::{Local, Options, Stopped};
use tasker_shared::store::tx::{self, PoolOptions};

use crate::Global;
use crate::failure::{FAILED, WRONG, failure};
use crate::output::{self, Format};

/// Control the managed local PostgreSQL.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:\n  psql \"$(tasker db url)\"\n  tasker db status -o json\n  tasker db reset --yes")]
pub enum Db {
    /// Start it, with the schema, and leave it running until `tasker db stop`
    Start,
    /// Stop it, as soon as no process uses it
    Stop {
        /// Stop it at once; the statements of those who use it fail, what was committed is kept
        #[arg(long)]
        force: bool,
    },
    /// Say whether it runs, without starting it
    Status,
    /// Start it as `start` does and print how to connect; with `DATABASE_URL`, print that
    Url,
    /// Stop it and delete everything in it
    Reset {
        /// Yes, delete everything
        #[arg(long)]
        yes: bool,
    },
}

impl Db {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let external = global.database_url.clone().filter(|url| !url.is_empty());
        if let Some(url) = external {
            return match self {
                Self::Url if global.output == Format::Json => output::json(&json!({"url": url})),
                Self::Url => output::line(url),
                _ => Err(failure(
                    FAILED,
                    "DATABASE_URL names a database that Tasker does not manage; unset it to use the local one",
                )),
            };
        }
        let options = Options::from_env()?;
        match self {
            Self::Start => {
                let url = start(options).await?;
                print(global, &json!({"running": true, "url": url}), &format!("running until `tasker db stop`: {url}"))
            }
            Self::Url => {
                let url = start(options).await?;
                print(global, &json!({"url": url}), &url)
            }
            Self::Stop { force } => {
                let stopped = blocking(move || Local::stop(&options, force)).await?;
                let (word, text) = match stopped {
                    Stopped::NotRunning => ("not_running", "it did not run"),
                    Stopped::Now => ("stopped", "stopped"),
                    Stopped::AfterLastUser => ("after_last_user", "in use; it stops a few seconds after its last user"),
                };
                print(global, &json!({"result": word}), text)
            }
            Self::Status => {
                let status = blocking(move || Local::status(&options)).await?;
                let value = json!({
                    "running": status.pid.is_some(), "pid": status.pid, "kept": status.kept, "in_use": status.in_use,
                    "data": status.data, "log": status.log, "url": status.url,
                });
                let text = match status.pid {
                    Some(pid) => {
                        let until = if status.kept { "until `tasker db stop`" } else { "as long as a process uses it" };
                        format!("running (pid {pid}) {until}\nurl  {}\nlog  {}", status.url, status.log.display())
                    }
                    None if status.data.is_some() => "not running; any command that needs it starts it".into(),
                    None => "not created yet; any command that needs it creates and starts it".into(),
                };
                print(global, &value, &text)
            }
            Self::Reset { yes: false } => {
                Err(failure(WRONG, "this deletes every task in the local database; repeat with --yes"))
            }
            Self::Reset { yes: true } => {
                blocking(move || Local::reset(&options)).await?;
                print(
                    global,
                    &json!({"result": "reset"}),
                    "stopped and deleted; the next command begins with an empty database",
                )
            }
        }
    }
}

/// Starts the server to stay and migrates it, so that psql finds `tasker.submit_task` at once.
async fn start(options: Options) -> anyhow::Result<String> {
    let url = blocking(move || Local::start_detached(&options)).await?;
    let pool = tx::pool(&url, &PoolOptions::default()).await.context("the database cannot be reached")?;
    migrate(&pool).await?;
    pool.close().await;
    Ok(url)
}

async fn blocking<T: Send + 'static, E: std::error::Error + Send + Sync + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> anyhow::Result<T> {
    Ok(tokio::task::spawn_blocking(work).await??)
}

fn print(global: &Global, value: &serde_json::Value, text: &str) -> anyhow::Result<()> {
    match global.output {
        Format::Json => output::json(value),
        Format::Table => output::line(text),
    }
}
