//! API keys: `Authorization: Bearer <key>`, or `x-api-key: <key>` as Anthropic's clients send it, compared in constant time. What lies behind knows a client by [`ClientId`] only.

use crate::{AppState, dashboard, error::ApiError};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::{Choice, ConstantTimeEq};
use types::ClientId;

const KEY_HEADER: HeaderName = HeaderName::from_static("x-api-key");
/// Paths that need no key: whoever supervises the process has none.
const OPEN: [&str; 1] = ["/health"];

/// Lets a request pass that has a key, if there are any, and says whose it is, as an extension of the request.
pub(crate) async fn check(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let keys = &state.settings.api_keys;
    let path = request.uri().path();
    let open =
        OPEN.contains(&path) || dashboard::is_page(path) || path == "/metrics" && state.settings.open_metrics;
    if keys.is_empty() || open {
        return next.run(request).await;
    }
    let given = given(request.headers());
    let known = given.iter().flatten().find(|given| bool::from(is_one_of(given, keys)));
    let (some, client) = (given != [None, None], known.map(|key| ClientId::of_key(key)));
    if let Some(client) = client {
        request.extensions_mut().insert(client);
        return next.run(request).await;
    }
    ApiError::Unauthorized { given: some }.into_response()
}

/// The keys in the headers, one for each way of giving one.
fn given(headers: &HeaderMap) -> [Option<&[u8]>; 2] {
    let header = |name: HeaderName| headers.get(name).map(|value| value.as_bytes());
    [header(header::AUTHORIZATION).and_then(bearer), header(KEY_HEADER).map(<[u8]>::trim_ascii)]
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
