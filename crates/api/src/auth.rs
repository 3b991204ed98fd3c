//! API keys: `Authorization: Bearer <key>`, compared in constant time. What lies behind knows a client by [`ClientId`] only.

use crate::{AppState, error::ApiError};
use axum::{
    extract::{Request, State},
    http::header,
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::{Choice, ConstantTimeEq};
use types::ClientId;

/// Paths that need no key: whoever supervises the process has none.
const OPEN: [&str; 1] = ["/health"];

/// Lets a request pass that has a key, if there are any, and says whose it is, as an extension of the request.
pub(crate) async fn check(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let keys = &state.settings.api_keys;
    if keys.is_empty() || OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let value = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let given = value.and_then(bearer);
    let known = given.filter(|given| bool::from(is_one_of(given, keys)));
    if let Some(client) = known.map(ClientId::of_key) {
        request.extensions_mut().insert(client);
        return next.run(request).await;
    }
    ApiError::Unauthorized { given: given.is_some() }.into_response()
}

/// The key in a header; the scheme's case does not matter.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// Looks at all keys whatever it finds; only lengths can be learnt from the time it takes.
fn is_one_of(given: &[u8], keys: &[String]) -> Choice {
    keys.iter().fold(Choice::from(0), |found, key| found | key.as_bytes().ct_eq(given))
}
