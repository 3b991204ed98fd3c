//! Cross-origin requests: which pages' scripts may read what is served here. None, unless the operator names their origins.
//!
//! Stands before the keys are looked at, since browsers ask first without one, and so that a page can read a refusal.

use crate::{AppState, limits::CORS_AGE_MAX};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, DELETE");
/// Whatever headers a page wants to send: nothing here trusts one by its name.
const HEADERS_UNLESS_TOLD: HeaderValue = HeaderValue::from_static("authorization, content-type");
const EXPOSED: HeaderValue = HeaderValue::from_static("x-request-id, x-mlx-route, retry-after");

/// Answers what browsers ask beforehand, and marks answers that a page of an allowed origin may read.
pub(crate) async fn allow(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let Some(allowed) = allowed(&state.settings.cors_origins, request.headers()) else {
        return next.run(request).await;
    };
    let asks = request.headers().get(header::ACCESS_CONTROL_REQUEST_METHOD).is_some();
    let mut response = if request.method() == Method::OPTIONS && asks {
        let wanted = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
        let headers: [(HeaderName, HeaderValue); 3] = [
            (header::ACCESS_CONTROL_ALLOW_METHODS, METHODS),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.unwrap_or(HEADERS_UNLESS_TOLD)),
            (header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from(CORS_AGE_MAX.as_secs())),
        ];
        (StatusCode::NO_CONTENT, headers).into_response()
    } else {
        let mut response = next.run(request).await;
        response.headers_mut().insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
        response
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
    // Or a cache hands one origin's answer to another.
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    response
}

/// The origin that a request is from, where it may read answers.
fn allowed(origins: &[String], headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let named = origins.iter().any(|allowed| allowed == "*" || allowed.as_bytes() == origin.as_bytes());
    named.then(|| origin.clone())
}
