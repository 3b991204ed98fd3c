//! Bounds on what comes before a body: the path and the headers.

use crate::{
    error::ApiError,
    limits::{HEADERS_BYTES_MAX, URI_BYTES_MAX},
};
use axum::{
    extract::Request,
    middleware::Next,
    response::{IntoResponse, Response},
};

/// Refuses what is longer than anything here has a use for.
pub(crate) async fn check(request: Request, next: Next) -> Response {
    let uri = request.uri();
    let path_bytes = uri.path().len() + uri.query().map_or(0, str::len);
    let headers = request.headers().iter();
    let header_bytes = headers.map(|(name, value)| name.as_str().len() + value.len()).sum();
    for (what, bytes, max) in
        [("path and query", path_bytes, URI_BYTES_MAX), ("headers", header_bytes, HEADERS_BYTES_MAX)]
    {
        if bytes > max {
            return ApiError::HeadTooLarge { what, bytes, max }.into_response();
        }
    }
    next.run(request).await
}
