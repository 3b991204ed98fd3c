//! The files of the page, with what keeps a browser from doing anything else with them.

use crate::{AppState, error::ApiError};
use axum::{
    Router,
    extract::Path,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use std::sync::LazyLock;

struct File {
    name: &'static str,
    kind: &'static str,
    text: &'static str,
}

macro_rules! files {
    ($($name:literal: $kind:literal),+ $(,)?) => {
        [$(File { name: $name, kind: $kind, text: include_str!(concat!("page/", $name)) }),+]
    };
}

/// The first is the page itself.
static FILES: [File; 10] = files! {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "chart.js": "text/javascript; charset=utf-8",
    "nodes.js": "text/javascript; charset=utf-8",
    "requests.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
};

/// Everything from here and nothing from elsewhere; no script in the page itself; nobody frames it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Where the files but for the page lie.
const FOLDER: &str = "/dashboard/";

/// The same for all files: a browser has all of one version, or none.
static TAG: LazyLock<HeaderValue> = LazyLock::new(|| {
    let mut hasher = blake3::Hasher::new();
    for file in &FILES {
        hasher.update(file.text.as_bytes());
    }
    let digits = hasher.finalize().to_hex();
    HeaderValue::from_str(&format!("\"{}\"", &digits[..16])).expect("hexadecimal digits")
});

/// Whether a path is one of the page's files.
pub(crate) fn is_page(path: &str) -> bool {
    path == "/" || path.strip_prefix(FOLDER).is_some_and(|name| find(name).is_some())
}

/// `GET /` and `GET /dashboard/{file}`.
pub(crate) fn page() -> Router<AppState> {
    Router::new().route("/", get(index)).route("/dashboard/{file}", get(file))
}

async fn index(headers: HeaderMap) -> Response {
    answer(&FILES[0], &headers)
}

async fn file(Path(name): Path<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    let file = find(&name).ok_or_else(|| ApiError::NoRoute { path: format!("{FOLDER}{name}") })?;
    Ok(answer(file, &headers))
}

fn find(name: &str) -> Option<&'static File> {
    FILES[1..].iter().find(|file| file.name == name)
}

fn answer(file: &File, asked: &HeaderMap) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(file.kind)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
        // Asked for again each time, and sent again only where it changed.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::ETAG, TAG.clone()),
    ];
    if asked.get(header::IF_NONE_MATCH) == Some(&*TAG) {
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    (headers, file.text).into_response()
}
