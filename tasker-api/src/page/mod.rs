//! The web page, rendered here and served from the binary.

use axum::Router;
use axum::response::{Html, IntoResponse as _, Response};

use crate::State;

/// Its routes, below the base path.
pub(crate) fn routes() -> Router<State> {
    Router::new()
}

/// What somebody sees who has not signed in, with what went wrong the last time.
pub(crate) fn sign_in_page(_: &State, problem: Option<&str>) -> Response {
    let said = if problem.is_some() { "<p>That did not work; is the key right, and still valid?</p>" } else { "" };
    Html(format!(
        "<!doctype html><html lang=en><title>Tasker</title>{said}<form method=post>\
         <label>API key <input name=key type=password autocomplete=current-password required></label> \
         <button>Sign in</button></form></html>"
    ))
    .into_response()
}
