//! The `tasker` command: noun, then verb. One file per noun in `commands`.
//!
//! What a script reads is on stdout; progress, warnings and errors go to stderr.

mod commands;
mod failure;
mod output;
mod run;
mod trace_flags;
mod waterfall;

use clap::{Parser, Subcommand, ValueEnum};
use tasker_shared::telemetry::LogFormat;

use crate::failure::exit_code;
use crate::output::Format;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  what you asked about failed or was refused: a task that failed, a template with errors, a demo gone wrong
  2  the command line is wrong
  3  there is no such task, template or message
  4  the database cannot be reached
  5  the time to wait is over

Examples:
  tasker demo                                        see 24 orders run, and one whole trace
  tasker up                                          an orchestrator, a worker and the web page, until Ctrl-C
  tasker task submit shop/order --input @order.json  ask for a task (one run of a workflow)
  tasker task why ORD-4711                           what does it wait for?
  tasker trace show ORD-4711                         the trace of a task, in the terminal
  psql \"$(tasker db url)\"                            the database itself

Without DATABASE_URL or --database-url a local PostgreSQL is started and managed for you.";

/// Durable tasks on PostgreSQL, each with one complete trace.
#[derive(Debug, Parser)]
#[command(name = "tasker", version, max_term_width = 100, after_help = EXIT_CODES, subcommand_required = true, arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags that every command takes.
#[derive(Debug, clap::Args)]
pub struct Global {
    /// The database to use, instead of the managed local one
    #[arg(
        long,
        global = true,
        env = "DATABASE_URL",
        hide_env_values = true,
        value_name = "URL",
        help_heading = "Global options"
    )]
    pub database_url: Option<String>,
    /// How results are printed
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT", help_heading = "Global options")]
    pub output: Format,
    /// How log lines on stderr look
    #[arg(long, global = true, value_enum, default_value_t = Log::Pretty, env = "TASKER_LOG_FORMAT", value_name = "FORMAT", help_heading = "Global options")]
    pub log_format: Log,
}

/// The choices of `--log-format`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Log {
    /// For people
    Pretty,
    /// One JSON object a line
    Json,
}

impl From<Log> for LogFormat {
    fn from(log: Log) -> Self {
        match log {
            Log::Pretty => Self::Pretty,
            Log::Json => Self::Json,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run 24 orders through everything, check each result, and show a trace
    Demo(commands::demo::Demo),
    /// Run an orchestrator, workers with the built-in handlers, and the web page, until Ctrl-C
    Up(commands::up::Up),
    /// Serve the HTTP API and the web page
    #[command(subcommand)]
    Api(commands::api::Api),
    /// Make and revoke the keys of the HTTP API
    #[command(subcommand)]
    Key(commands::key::Key),
    /// Run orchestrators: they decide what happens next
    #[command(subcommand)]
    Orchestrator(commands::orchestrator::Orchestrator),
    /// Run workers: they execute steps
    #[command(subcommand)]
    Worker(commands::worker::Worker),
    /// Register and look at templates: the definitions of workflows
    #[command(subcommand)]
    Template(commands::template::Template),
    /// Submit and follow tasks (a task is one run of a workflow)
    #[command(subcommand)]
    Task(commands::task::Task),
    /// Look at what operators did
    #[command(subcommand)]
    Audit(commands::act::Audit),
    /// Submit tasks by the clock: cron, an interval, or once
    #[command(subcommand)]
    Schedule(commands::schedule::Schedule),
    /// Look at the trace of a task
    #[command(subcommand)]
    Trace(commands::trace::Trace),
    /// Look at queues, and at messages that nobody could use
    #[command(subcommand)]
    Queue(commands::queue::Queue),
    /// Limit how much of a namespace or a handler is in flight, or begins in a time
    #[command(subcommand)]
    Limit(commands::limit::Limit),
    /// Say how long finished tasks are kept, and remove what is past its time
    #[command(subcommand)]
    Retention(commands::retention::Retention),
    /// Say what is hidden from logs, traces and screens
    #[command(subcommand)]
    Redaction(commands::redaction::Redaction),
    /// Create or update the schema of the database
    Migrate(commands::migrate::Migrate),
    /// Control the managed local PostgreSQL
    #[command(subcommand)]
    Db(commands::db::Db),
    /// Show the version, and the commit it was built from
    Version(commands::version::Version),
}

fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no threads to run on: {error}");
            return 1.into();
        }
    };
    match runtime.block_on(execute(arguments)) {
        Ok(()) => 0.into(),
        Err(error) => {
            // The reader of a pipe that has seen enough is no failure of ours.
            if !output::is_broken_pipe(&error) {
                eprintln!("error: {}", tasker_shared::redact::text(&failure::one_line(&error)));
            }
            exit_code(&error).into()
        }
    }
}

async fn execute(Arguments { global, command }: Arguments) -> anyhow::Result<()> {
    match command {
        Command::Demo(command) => command.run(&global).await,
        Command::Up(command) => command.run(&global).await,
        Command::Api(command) => command.run(&global).await,
        Command::Key(command) => command.run(&global).await,
        Command::Orchestrator(command) => command.run(&global).await,
        Command::Worker(command) => command.run(&global).await,
        Command::Template(command) => command.run(&global).await,
        Command::Task(command) => command.run(&global).await,
        Command::Audit(command) => command.run(&global).await,
        Command::Schedule(command) => command.run(&global).await,
        Command::Trace(command) => command.run(&global).await,
        Command::Queue(command) => command.run(&global).await,
        Command::Limit(command) => command.run(&global).await,
        Command::Retention(command) => command.run(&global).await,
        Command::Redaction(command) => command.run(&global).await,
        Command::Migrate(command) => command.run(&global).await,
        Command::Db(command) => command.run(&global).await,
        Command::Version(_) => commands::version::Version::run(&global),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn every_command_is_well_formed() {
        super::Arguments::command().debug_assert();
    }
}
