//! The keys of the HTTP API, and the browsers that signed in with one.
//!
//! It keeps hashes only; what a key is made of and what it may do is the API's.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;

use tasker_shared::store::Error;

/// A key that is to be made.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "columns of tasker.api_keys, explained there")]
pub struct NewKey<'a> {
    pub key_id: &'a str,
    pub name: &'a str,
    pub secret_hash: &'a [u8],
    pub role: &'a str,
    pub scopes: Option<&'a [String]>,
    pub namespaces: Option<&'a [String]>,
    pub expires_at: Option<DateTime<Utc>>,
}

/// Makes a key. Audited. A name that is taken is a unique violation of `api_keys_by_name`.
pub async fn create(conn: &mut PgConnection, key: &NewKey<'_>, actor: &str) -> Result<(), Error> {
    sqlx::query!(
        "select tasker.create_api_key($1, $2, $3, $4, $5, $6, $7, $8)::text as done",
        key.key_id,
        key.name,
        key.secret_hash,
        key.role,
        key.scopes,
        key.namespaces,
        key.expires_at,
        actor
    )
    .fetch_one(conn)
    .await?;
    Ok(())
}

/// Revokes the valid key of this name or id; false if there is none. Audited.
pub async fn revoke(conn: &mut PgConnection, name: &str, actor: &str) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(r#"select tasker.revoke_api_key($1, $2) as "done!""#, name, actor).fetch_one(conn).await?)
}

/// A key as people see it: never its secret.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "columns of tasker.api_keys, explained there")]
pub struct KeyView {
    pub key_id: String,
    pub name: String,
    pub role: String,
    pub scopes: Option<Vec<String>>,
    pub namespaces: Option<Vec<String>>,
    pub created_by: String,
    pub created_at: DateTime<Utc>,
    pub expires_at: Option<DateTime<Utc>>,
    pub revoked_at: Option<DateTime<Utc>>,
}

/// Every key, the latest first.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<KeyView>, Error> {
    Ok(sqlx::query_as!(
        KeyView,
        "select key_id, name, role, scopes, namespaces, created_by, created_at, expires_at, revoked_at
         from tasker.api_keys order by created_at desc, key_id"
    )
    .fetch_all(conn)
    .await?)
}

/// Whether any key is valid now.
pub async fn any_valid(conn: &mut PgConnection) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"select exists (select from tasker.api_keys
             where revoked_at is null and (expires_at is null or expires_at > clock_timestamp())) as "yes!""#
    )
    .fetch_one(conn)
    .await?)
}

/// What a valid key may do.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "columns of tasker.api_keys, explained there")]
pub struct ValidKey {
    pub key_id: String,
    pub name: String,
    pub secret_hash: Vec<u8>,
    pub role: String,
    pub scopes: Option<Vec<String>>,
    pub namespaces: Option<Vec<String>>,
}

/// A credential that is valid now: the session that it was asked for by, or none for a key, and what it may do.
pub type ValidNow = (Option<Vec<u8>>, ValidKey);

/// Those of these sessions, by their hashes, and of these keys, by their ids, that are valid now: one
/// statement, however many they are.
pub async fn valid_now(
    conn: &mut PgConnection,
    session_hashes: &[Vec<u8>],
    key_ids: &[String],
) -> Result<Vec<ValidNow>, Error> {
    let rows = sqlx::query!(
        r#"select s.session_hash as "session_hash?", k.key_id as "key_id!", k.name as "name!", k.secret_hash as "secret_hash!",
             k.role as "role!", k.scopes, k.namespaces
           from tasker.api_sessions s join tasker.api_keys k on k.key_id = s.key_id
           where s.session_hash = any($1) and not s.once and s.expires_at > clock_timestamp()
             and k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp())
           union all
           select null, k.key_id, k.name, k.secret_hash, k.role, k.scopes, k.namespaces from tasker.api_keys k
           where k.key_id = any($2) and k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp())"#,
        session_hashes,
        key_ids
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let key = ValidKey {
                key_id: row.key_id,
                name: row.name,
                secret_hash: row.secret_hash,
                role: row.role,
                scopes: row.scopes,
                namespaces: row.namespaces,
            };
            (row.session_hash, key)
        })
        .collect())
}

/// Begins a session, or with `once` keeps what a sign-in link may be exchanged for.
pub async fn begin_session(
    conn: &mut PgConnection,
    session_hash: &[u8],
    key_id: &str,
    once: bool,
    seconds: f64,
) -> Result<(), Error> {
    sqlx::query!(
        "insert into tasker.api_sessions (session_hash, key_id, once, expires_at)
         values ($1, $2, $3, clock_timestamp() + make_interval(secs => $4))",
        session_hash,
        key_id,
        once,
        seconds
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Uses a sign-in link up: its key, if the link was still good.
pub async fn take_once(conn: &mut PgConnection, once_hash: &[u8]) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!(
        "with taken as (
           delete from tasker.api_sessions where session_hash = $1 and once returning key_id, expires_at
         )
         select t.key_id from taken t join tasker.api_keys k on k.key_id = t.key_id
         where t.expires_at > clock_timestamp() and k.revoked_at is null
           and (k.expires_at is null or k.expires_at > clock_timestamp())",
        once_hash
    )
    .fetch_optional(conn)
    .await?)
}

/// Ends a session.
pub async fn end_session(conn: &mut PgConnection, session_hash: &[u8]) -> Result<(), Error> {
    sqlx::query!("delete from tasker.api_sessions where session_hash = $1", session_hash).execute(conn).await?;
    Ok(())
}
