//! How a command ends badly: which exit code belongs to which error.

use tasker_shared::client::ClientError;
use tasker_shared::{server, store};

/// What was asked about failed, though the command itself worked.
pub const FAILED: u8 = 1;
/// The command line is wrong, in a way that only the command itself can tell.
pub const WRONG: u8 = 2;
/// Something named on the command line does not exist.
pub const NOT_FOUND: u8 = 3;
/// The database does not answer.
pub const UNREACHABLE: u8 = 4;
/// The time to wait is over.
pub const TIMEOUT: u8 = 5;

/// An error whose exit code is known where it arises.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    code: u8,
    message: String,
}

/// An error with this exit code.
pub fn failure(code: u8, message: impl Into<String>) -> anyhow::Error {
    Failure { code, message: message.into() }.into()
}

/// An error with its causes, each said once: many an error says its cause itself.
pub fn one_line(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |mut line, cause| {
        if !line.contains(&cause) {
            line.push_str(if line.is_empty() { "" } else { ": " });
            line.push_str(&cause);
        }
        line
    })
}

/// The exit code of any error: the first cause that has one decides.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of).unwrap_or(FAILED)
}

fn code_of(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(failure.code);
    }
    if let Some(error) = cause.downcast_ref::<ClientError>() {
        return match error {
            ClientError::Connect(_) => Some(UNREACHABLE),
            ClientError::NotFound(_) => Some(NOT_FOUND),
            ClientError::Timeout { .. } => Some(TIMEOUT),
            ClientError::Refused(text)
                if text.starts_with("there is no such limit") || text.starts_with("no such queue") =>
            {
                Some(NOT_FOUND)
            }
            ClientError::Refused(_) => Some(FAILED),
            ClientError::Store(error) => code_of(error),
        };
    }
    if let Some(store::Error::Database(error)) = cause.downcast_ref::<store::Error>() {
        return code_of(error);
    }
    if let Some(server::Error::Database(error)) = cause.downcast_ref::<server::Error>() {
        return code_of(error);
    }
    if cause.is::<tasker_shared::postgres::Error>() {
        return Some(UNREACHABLE);
    }
    match cause.downcast_ref::<sqlx::Error>()? {
        sqlx::Error::Io(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::Tls(_)
        | sqlx::Error::Configuration(_) => Some(UNREACHABLE),
        // Classes: no connection, wrong password, no such database.
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            (code.starts_with("08") || code.starts_with("28") || code == "3D000" || code.starts_with("57P"))
                .then_some(UNREACHABLE)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;
    use tasker_shared::migrate;

    use super::*;

    #[test]
    fn a_cause_decides_the_code_however_deep_it_lies() {
        let wrapped = |error: ClientError| exit_code(&Err::<(), _>(error).context("while submitting").unwrap_err());
        assert_eq!(wrapped(ClientError::NotFound(uuid::Uuid::nil())), NOT_FOUND);
        assert_eq!(wrapped(ClientError::Connect(sqlx::Error::PoolTimedOut)), UNREACHABLE);
        assert_eq!(wrapped(ClientError::from(sqlx::Error::PoolTimedOut)), UNREACHABLE);
        assert_eq!(wrapped(ClientError::from(sqlx::Error::RowNotFound)), FAILED);
        assert_eq!(exit_code(&failure(TIMEOUT, "late")), TIMEOUT);
        assert_eq!(exit_code(&anyhow::anyhow!("something else")), FAILED);
    }

    #[test]
    fn a_cause_is_said_once_however_often_it_is_repeated() {
        let error = migrate::Error::File { name: "0001_a.sql".into(), source: sqlx::Error::PoolTimedOut };
        let error = Err::<(), _>(error).context("the database cannot be reached").unwrap_err();
        assert_eq!(
            one_line(&error),
            "the database cannot be reached: migration 0001_a.sql failed and was rolled back: \
             pool timed out while waiting for an open connection"
        );
        assert_eq!(format!("{error:#}").matches("pool timed out").count(), 2, "or this is of no use any more");
    }
}
