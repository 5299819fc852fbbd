//! Browsers: a link that signs in once, and the cookie that follows.
//!
//! The cookie holds 256 random bits that mean nothing elsewhere, never the key: cookies are not
//! kept apart by port, so another program on this machine may see it.

use std::time::Duration;

use http::{HeaderMap, header};
use sqlx::{PgConnection, PgPool};
use tasker_shared::store::{self, tx};

use super::keys;
use super::{authenticate, secret, sha256};

/// The name of the cookie.
pub const SESSION_COOKIE: &str = "tasker_session";
/// How long a browser stays signed in.
const SESSION_LASTS: Duration = Duration::from_hours(12);
/// How long a link that signs in is good for.
const ONCE_LASTS: Duration = Duration::from_mins(15);

/// A session that has just begun.
#[derive(Debug, Clone)]
pub struct Session {
    secret: String,
}

impl Session {
    /// What `Set-Cookie` says. `secure` unless plain HTTP is spoken to this machine itself.
    pub fn cookie(&self, secure: bool, path: &str) -> String {
        set_cookie(&self.secret, SESSION_LASTS, secure, path)
    }
}

fn set_cookie(value: &str, lasts: Duration, secure: bool, path: &str) -> String {
    let path = if path.is_empty() { "/" } else { path };
    let secure = if secure { "; Secure" } else { "" };
    format!("{SESSION_COOKIE}={value}; Path={path}; Max-Age={}; HttpOnly; SameSite=Strict{secure}", lasts.as_secs())
}

async fn begin(conn: &mut PgConnection, key_id: &str) -> Result<Session, store::Error> {
    let secret = secret();
    keys::begin_session(conn, &sha256(&secret), key_id, false, SESSION_LASTS.as_secs_f64()).await?;
    Ok(Session { secret })
}

/// Signs a browser in with a key; `None` if the key is not valid.
pub async fn sign_in(pool: &PgPool, key: &str) -> Result<Option<Session>, store::Error> {
    let mut conn = tx::live(pool).await?;
    match authenticate(&mut conn, key.trim()).await? {
        Some(principal) => Ok(Some(begin(&mut conn, &principal.key_id).await?)),
        None => Ok(None),
    }
}

/// What a link to `/login?once=…` ends with; it signs in one browser, within 15 minutes.
pub async fn once_link(pool: &PgPool, key_id: &str) -> Result<String, store::Error> {
    let secret = secret();
    let mut conn = tx::live(pool).await?;
    keys::begin_session(&mut conn, &sha256(&secret), key_id, true, ONCE_LASTS.as_secs_f64()).await?;
    Ok(secret)
}

/// Signs a browser in with such a link; `None` if it was used or is too old.
pub async fn redeem_once(pool: &PgPool, once: &str) -> Result<Option<Session>, store::Error> {
    let mut conn = tx::live(pool).await?;
    let key_id = keys::take_once(&mut conn, &sha256(once)).await?;
    match key_id {
        Some(key_id) => Ok(Some(begin(&mut conn, &key_id).await?)),
        None => Ok(None),
    }
}

/// Ends the session of these headers, and answers the `Set-Cookie` that forgets it.
pub async fn sign_out(pool: &PgPool, headers: &HeaderMap, secure: bool, path: &str) -> Result<String, store::Error> {
    if let Some(cookie) = cookie_of(headers) {
        keys::end_session(&mut *tx::live(pool).await?, &sha256(cookie)).await?;
    }
    Ok(set_cookie("", Duration::ZERO, secure, path))
}

/// The session's secret, as the browser sent it.
pub(crate) fn cookie_of(headers: &HeaderMap) -> Option<&str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, value)| *name == SESSION_COOKIE && !value.is_empty())
        .map(|(_, value)| value)
}

/// What a page of ours sends with each write: only a page of this origin can know it, since it is
/// made from the cookie, which no script sees.
pub fn csrf_of(session: &str) -> String {
    tasker_shared::trace::otlp::hex(&sha256(format!("tasker csrf {session}"))[..16])
}
