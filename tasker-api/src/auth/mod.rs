//! Who asks, and what they may do.
//!
//! A credential is an API key (`Authorization: Bearer tsk_…`) or the cookie of a browser that
//! signed in with one; both end in a [`Principal`]. Another way to sign in (single sign-on) would
//! end in one, too, and begin a session as [`sign_in`] does: nothing behind this module asks how.

mod key;
pub mod keys;
mod principal;
mod session;

pub use self::key::{KeyRefused, KeySpec, NewApiKey, create_key};
pub use self::principal::{Principal, Role, Scope};
pub use self::session::{SESSION_COOKIE, Session, csrf_of, once_link, redeem_once, sign_in, sign_out};

pub(crate) use self::key::{authenticate, parts};
pub(crate) use self::session::cookie_of;

use sha2::{Digest as _, Sha256};

pub(crate) fn sha256(bytes: impl AsRef<[u8]>) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// 256 random bits, as 64 hex digits.
pub(crate) fn secret() -> String {
    let bytes: [u8; 32] = rand::random();
    tasker_shared::trace::otlp::hex(&bytes)
}
