//! A payload on a page: redacted, cut, and to be copied.

use maud::{Markup, html};
use serde_json::Value;
use tasker_shared::redact;

use super::words::{self, count};

/// Bytes of a payload that a page shows.
pub(super) const SHOWN: usize = 64 * 1024;

/// A payload, indented, with a button to copy it.
pub(super) fn payload(id: &str, value: &Value) -> Markup {
    let cleaned = redact::shown(value);
    let (text, clipped) = words::pretty(cleaned.as_ref().unwrap_or(value), SHOWN);
    html! {
        pre id={ "json-" (id) } tabindex="0" { (text) }
        div.actions {
            button.plain.js-only type="button" data-copy-from={ "json-" (id) } { (words::copy_sign()) "Copy" }
            @if cleaned.is_some() { span.pill.suspended { "secrets hidden" } }
            @if clipped { span.quiet.small { "Only the first " (count(SHOWN / 1024)) " KiB are shown; the API gives all of it." } }
        }
    }
}
