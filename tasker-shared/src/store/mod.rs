//! Every SQL statement we own. Functions here take the caller's connection; only `tx` begins a transaction.

pub mod apply;
pub mod details;
pub mod exports;
pub mod flow;
pub mod keys;
pub mod listing;
pub mod locks;
pub mod maps;
pub mod nested;
pub mod operators;
pub mod pages;
pub mod protocol;
pub mod redaction;
pub mod requests;
pub mod retention;
pub mod sampling;
pub mod schedules;
pub mod steps;
pub mod tasks;
pub mod templates;
pub mod trace_settings;
pub mod transitions;
pub mod tx;
pub mod views;
pub mod waits;
pub mod why;

/// What a row held that it must not hold, or what the database answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database refused or was not reached.
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    /// A row that no code of ours writes.
    #[error("row {id} of tasker.{table}, column {column}: {problem}")]
    BadRow {
        /// Without the schema.
        table: &'static str,
        /// The column.
        column: &'static str,
        /// The row's key.
        id: String,
        /// What is wrong with the value's shape.
        problem: String,
    },
    /// Compare-and-set found another version than the one that was decided on.
    #[error("{changed} of {wanted} {table} rows were as they were read; the batch is rolled back and read again")]
    Conflict {
        /// tasks or steps.
        table: &'static str,
        /// Rows that matched.
        changed: i64,
        /// Rows that had to match.
        wanted: usize,
    },
}

impl Error {
    /// Whether the same work may succeed if it is simply done again: serialization, deadlock,
    /// connection. Such an error never counts against a message.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Database(sqlx::Error::Database(error)) => {
                let code = error.code().unwrap_or_default();
                // Classes: transaction rollback, connection, resources, operator intervention, system.
                ["40", "08", "53", "57", "58", "55"].iter().any(|class| code.starts_with(class))
            }
            Self::Database(
                sqlx::Error::Io(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::WorkerCrashed
                | sqlx::Error::Tls(_)
                | sqlx::Error::Protocol(_),
            )
            | Self::Conflict { .. } => true,
            Self::Database(_) | Self::BadRow { .. } => false,
        }
    }

    /// Whether it gave up waiting for a lock that somebody else held for too long.
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.code().as_deref() == Some("55P03"))
    }

    fn bad_row(
        table: &'static str,
        column: &'static str,
        id: impl std::fmt::Display,
        problem: impl std::fmt::Display,
    ) -> Self {
        Self::BadRow { table, column, id: id.to_string(), problem: problem.to_string() }
    }
}

/// Session settings for connections that run the hot path. Its statements join a few hundred
/// keys with big tables, and a plan made while a table was still empty must not scan it later.
pub const HOT_PATH_SETTINGS: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("plan_cache_mode", "force_generic_plan"),
];
