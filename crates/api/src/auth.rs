//! API keys: `Authorization: Bearer <key>`, or `x-api-key: <key>` as Anthropic's clients send it, compared in constant time. What lies behind knows a client by [`ClientId`] only.

use crate::{AppState, access::Scopes, dashboard, error::ApiError};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, Method, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use types::ClientId;

const KEY_HEADER: HeaderName = HeaderName::from_static("x-api-key");
/// Paths that need no key: whoever supervises the process has none.
const OPEN: [&str; 1] = ["/health"];
/// What begins the paths that change what this process does.
const ADMIN: &str = "/v1/admin/";
/// What tells of the cluster and of nobody's requests: whoever administers it may see it, too.
const SIGHTS: [&str; 6] =
    ["/metrics", "/ready", "/openapi.json", "/v1/models", "/v1/cluster", "/v1/cluster/events"];

/// Lets a request pass that has a key for what it wants, if there are any, and says whose it is, as an extension of the
/// request; what the key may ask for is another.
pub(crate) async fn check(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let access = state.settings.access.get();
    let path = request.uri().path();
    let open = OPEN.contains(&path) || dashboard::is_page(path) || path == "/metrics" && access.open_metrics;
    let admin = path.starts_with(ADMIN);
    if access.keys.is_empty() {
        // A page in a browser reaches what the loopback serves, and browsers say on whose behalf they ask.
        if admin && (!access.open_admin || request.headers().contains_key(header::ORIGIN)) {
            return ApiError::NoAdminKey.into_response();
        }
        request.extensions_mut().insert(access.rates);
        return next.run(request).await;
    }
    if open {
        return next.run(request).await;
    }
    let given = given(request.headers());
    let known = given.iter().flatten().find_map(|given| Some((access.find(given)?, ClientId::of_key(given))));
    let Some((key, client)) = known else {
        return ApiError::Unauthorized { given: given != [None, None] }.into_response();
    };
    let sight = request.method() == Method::GET && SIGHTS.contains(&path);
    let (fit, needed) = match key.scopes {
        Scopes { admin: fit, .. } if admin => (fit, "admin"),
        Scopes { models, admin } => (models || admin && sight, "use"),
    };
    if !fit {
        return ApiError::Scope { needed }.into_response();
    }
    request.extensions_mut().insert(client);
    request.extensions_mut().insert(key.rates);
    next.run(request).await
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
