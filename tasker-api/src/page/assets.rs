//! The stylesheet, the script and the icon, in the binary. Their names carry a hash of their
//! content, so that a browser may keep them for ever and never sees an old one.

use std::sync::LazyLock;

use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, StatusCode, header};
use tasker_shared::trace::otlp::hex;

use crate::auth::sha256;

/// One file.
struct Asset {
    path: String,
    etag: String,
    kind: &'static str,
    content: &'static str,
}

impl Asset {
    fn new(stem: &str, extension: &str, kind: &'static str, content: &'static str) -> Self {
        let hash = hex(&sha256(content)[..8]);
        Self { path: format!("/assets/{stem}-{hash}.{extension}"), etag: format!("\"{hash}\""), kind, content }
    }
}

static CSS: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("app", "css", "text/css; charset=utf-8", include_str!("../../assets/app.css")));
static JS: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("app", "js", "text/javascript; charset=utf-8", include_str!("../../assets/app.js")));
static ICON: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("icon", "svg", "image/svg+xml", include_str!("../../assets/icon.svg")));

/// Where the stylesheet is, below the base path.
pub(super) fn css() -> &'static str {
    &CSS.path
}

/// Where the script is.
pub(super) fn js() -> &'static str {
    &JS.path
}

/// Where the icon is.
pub(super) fn icon() -> &'static str {
    &ICON.path
}

/// `GET /assets/{file}`: to anybody, since they say nothing.
pub(super) async fn get(Path(file): Path<String>, headers: HeaderMap) -> Response {
    let Some(asset) =
        [&CSS, &JS, &ICON].into_iter().find(|asset| asset.path.ends_with(&file) && asset.path.len() == file.len() + 8)
    else {
        return (StatusCode::NOT_FOUND, "no such file").into_response();
    };
    let known = headers.get(header::IF_NONE_MATCH).is_some_and(|tag| tag.as_bytes() == asset.etag.as_bytes());
    let about = [
        (header::CONTENT_TYPE, asset.kind),
        (header::CACHE_CONTROL, "public, max-age=31536000, immutable"),
        (header::ETAG, asset.etag.as_str()),
    ];
    if known { (StatusCode::NOT_MODIFIED, about).into_response() } else { (about, asset.content).into_response() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_page_loads_is_small_and_needs_nobody_else() {
        let all = [&CSS, &JS, &ICON];
        let bytes: usize = all.iter().map(|asset| asset.content.len()).sum();
        assert!(bytes < 60 * 1024, "{bytes} bytes before compression");
        for asset in all {
            let content = asset.content.replace("http://www.w3.org/2000/svg", "");
            assert!(
                !content.contains("http://") && !content.contains("https://") && !content.contains("@import"),
                "{}",
                asset.path
            );
        }
    }

    #[test]
    fn a_name_changes_with_its_content() {
        assert!(CSS.path.starts_with("/assets/app-"));
        assert_ne!(Asset::new("app", "css", "text/css", "a").path, Asset::new("app", "css", "text/css", "b").path);
    }
}
