//! API keys: `tsk_<id>_<secret>`. The database has the id and a hash of the secret.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use subtle::ConstantTimeEq as _;
use tasker_shared::store;

use super::keys::{self, NewKey};
use super::{Principal, Role, Scope, secret, sha256};

/// A key that is to be made.
#[derive(Debug, Clone)]
pub struct KeySpec {
    /// Unique among the valid keys, 1 to 100 bytes; the actor of the audit.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// What it may do instead; nothing that its role may not, except to see payloads.
    pub scopes: Option<Vec<Scope>>,
    /// Where; `None`: everywhere.
    pub namespaces: Option<Vec<String>>,
    /// Until when; `None`: until it is revoked.
    pub expires_at: Option<DateTime<Utc>>,
}

/// A key that was made. Its text is shown once and kept nowhere.
#[derive(Debug, Clone)]
pub struct NewApiKey {
    /// The public part.
    pub key_id: String,
    /// The whole key.
    pub key: String,
}

/// A key could not be made.
#[derive(Debug, thiserror::Error)]
pub enum KeyRefused {
    /// A rule that it breaks.
    #[error("{0}")]
    Rule(String),
    /// The database.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// Makes a key. Audited.
pub async fn create_key(conn: &mut PgConnection, spec: &KeySpec, actor: &str) -> Result<NewApiKey, KeyRefused> {
    let refuse = |rule: String| Err(KeyRefused::Rule(rule));
    if spec.name.is_empty() || spec.name.len() > 100 || spec.name.chars().any(char::is_control) {
        return refuse("name: must have 1 to 100 bytes and no control characters".into());
    }
    let may = spec.role.scopes();
    let beyond = |scope: &&Scope| **scope != Scope::PayloadsRead && !may.contains(scope);
    if let Some(scope) = spec.scopes.iter().flatten().find(beyond) {
        let (scope, role) = (scope.as_str(), spec.role.as_str());
        return refuse(format!("scopes: a {role} may not have {scope}; give the key another role"));
    }
    if spec.namespaces.as_ref().is_some_and(Vec::is_empty) {
        return refuse("namespaces: name at least one, or leave it away for all".into());
    }
    let id: [u8; 8] = rand::random();
    let (key_id, secret) = (tasker_shared::trace::otlp::hex(&id), secret());
    let scopes: Option<Vec<String>> =
        spec.scopes.as_ref().map(|scopes| scopes.iter().map(|scope| scope.as_str().to_owned()).collect());
    let hash = sha256(&secret);
    let row = NewKey {
        key_id: &key_id,
        name: &spec.name,
        secret_hash: &hash,
        role: spec.role.as_str(),
        scopes: scopes.as_deref(),
        namespaces: spec.namespaces.as_deref(),
        expires_at: spec.expires_at,
    };
    match keys::create(conn, &row, actor).await {
        Err(store::Error::Database(sqlx::Error::Database(error))) if error.constraint() == Some("api_keys_by_name") => {
            refuse(format!("name: a valid key is called {}; revoke it first, or choose another name", spec.name))
        }
        Err(error) => Err(error.into()),
        Ok(()) => Ok(NewApiKey { key: format!("tsk_{key_id}_{secret}"), key_id }),
    }
}

/// The id of a key, and its secret; `None` if it has not the shape of one.
pub(crate) fn parts(key: &str) -> Option<(&str, &str)> {
    let (id, secret) = key.strip_prefix("tsk_")?.split_once('_')?;
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    (id.len() == 16 && secret.len() == 64 && hex(id) && hex(secret)).then_some((id, secret))
}

/// Whose key this is, if it is valid now. The database is asked once for a key that has the right
/// shape; the hash of its secret is compared in constant time.
pub(crate) async fn authenticate(conn: &mut PgConnection, key: &str) -> Result<Option<Principal>, store::Error> {
    let Some((id, secret)) = parts(key) else {
        return Ok(None);
    };
    let found = keys::valid_now(conn, &[], &[id.to_owned()]).await?;
    let valid =
        found.into_iter().map(|(_, row)| row).find(|row| row.secret_hash.as_slice().ct_eq(&sha256(secret)).into());
    Ok(valid.map(Principal::of))
}
