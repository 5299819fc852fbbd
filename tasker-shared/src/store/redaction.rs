//! The stored redaction policy.

use serde_json::Value;
use sqlx::{PgConnection, PgExecutor};

use super::Error;
use crate::redact::{self, Policy};

/// The policy of every process that has none of its own; `None`: the built-in one.
pub async fn stored(conn: impl PgExecutor<'_>) -> Result<Option<Value>, Error> {
    Ok(sqlx::query_scalar!("select tasker.redaction()").fetch_one(conn).await?)
}

/// Sets it; `None` takes it away.
pub async fn set(conn: &mut PgConnection, policy: Option<&Value>, actor: Option<&str>) -> Result<(), Error> {
    sqlx::query!(r#"select tasker.set_redaction($1, coalesce($2, session_user))::text as "nothing""#, policy, actor)
        .fetch_one(conn)
        .await?;
    Ok(())
}

/// Gives this process its policy: the file that `TASKER_REDACTION_FILE` names, else the stored one,
/// else the built-in one. A stored policy that cannot be read is reported, and the one before stays.
///
/// Errors only for a file: a process that was told to use one must not run with another.
pub async fn load(conn: impl PgExecutor<'_>) -> Result<(), redact::Error> {
    if let Some(path) = std::env::var_os("TASKER_REDACTION_FILE").filter(|path| !path.is_empty()) {
        redact::set(Policy::read(path.as_ref())?);
        return Ok(());
    }
    match stored(conn).await {
        Ok(None) => {}
        Ok(Some(policy)) => match Policy::parse(&policy.to_string()) {
            Ok(policy) => redact::set(policy),
            Err(error) => tracing::warn!(%error, "the stored redaction policy is not used"),
        },
        // A role that was not granted it has the built-in one.
        Err(error) => tracing::debug!(%error, "the stored redaction policy cannot be read"),
    }
    Ok(())
}
