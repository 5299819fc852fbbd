//! Every SQL statement we own. Functions here take the caller's connection; only `tx` begins a transaction.

#[cfg(feature = "server")]
pub mod audit;
#[cfg(feature = "server")]
pub mod details;
#[cfg(feature = "server")]
pub mod flow;
#[cfg(feature = "server")]
pub mod listing;
pub mod outage;
pub mod redaction;
#[cfg(feature = "server")]
pub mod requests;
#[cfg(feature = "server")]
pub mod retention;
#[cfg(feature = "server")]
pub mod schedules;
#[cfg(feature = "server")]
pub mod signals;
#[cfg(feature = "server")]
pub mod tasks;
#[cfg(feature = "server")]
pub mod templates;
pub mod trace_settings;
#[cfg(feature = "server")]
pub mod transitions;
pub mod tx;
#[cfg(feature = "server")]
pub mod views;
#[cfg(feature = "server")]
pub mod why;

/// What a row held that it must not hold, or what the database answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database refused or was not reached.
    #[error("the database: {0}")]
    Database(#[source] sqlx::Error),
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

/// Whose fault an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nobody's: two met at the same rows. Doing it again helps.
    Collision,
    /// Of whoever holds a lock.
    Locked,
    /// Of what was asked for: the same data are refused for ever.
    Message,
    /// Of the database, of the schema, of a right or of a connection: whatever is asked for may fail
    /// alike, and will succeed once somebody has put it right.
    System,
}

impl From<sqlx::Error> for Error {
    /// Every error of a statement comes this way, so this is where a connection is seen to be stale:
    /// connections that are as old are not used again.
    fn from(error: sqlx::Error) -> Self {
        if is_stale(&error) {
            tx::retire();
        }
        Self::Database(error)
    }
}

/// Whether the error is about what the session knows and no longer holds: prepared statements whose
/// result has changed or that are not there (a change of the schema, a pooler), a transaction that
/// it is not in, a server that has become read-only. A new session knows better.
fn is_stale(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(answer) => {
            let code = answer.code().unwrap_or_default();
            matches!(&*code, "0A000" | "26000" | "42P05") || code.starts_with("25")
        }
        sqlx::Error::ColumnDecode { .. } => is_of_another_type(error),
        _ => false,
    }
}

/// Whether a column has another type than it had when this program was built. (A value that cannot be
/// read is another matter: that is the row's fault.)
fn is_of_another_type(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::ColumnDecode { source, .. } if source.to_string().starts_with("mismatched types"))
}

impl Error {
    /// Whose fault it is. Only what is listed here blames the message: data that are refused, rules of
    /// ours that say so, rows that no code of ours writes. Everything else is the system's, so that an
    /// answer nobody has thought of costs a delay and never somebody's task.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Conflict { .. } => Fault::Collision,
            Self::BadRow { .. } => Fault::Message,
            Self::Database(sqlx::Error::Database(answer)) => match answer.code().unwrap_or_default() {
                code if code.starts_with("40") => Fault::Collision,
                code if code == "55P03" => Fault::Locked,
                // Data, constraints (of those that refuse), and what is too large or too deep to be kept.
                code if ["22", "23", "54"].iter().any(|class| code.starts_with(class)) => Fault::Message,
                _ => Fault::System,
            },
            // A value that this program cannot read, or cannot write.
            Self::Database(
                error @ (sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::Encode(_)),
            ) => {
                if is_of_another_type(error) {
                    Fault::System
                } else {
                    Fault::Message
                }
            }
            Self::Database(_) => Fault::System,
        }
    }

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

    /// A row that no code of ours writes: its table, its column, its key, and what is wrong with the value.
    pub fn bad_row(
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
