//! Who asks, as all handlers that generate need it: the request's id, the client behind its key, the session in its header.

use crate::{RequestTag, error::ApiError};
use axum::{extract::FromRequestParts, http::request::Parts};
use types::{ClientId, RequestId};

/// Names the conversation that a request belongs to, for clients that cannot add a field to its body.
pub(crate) const SESSION_HEADER: &str = "x-session-id";

/// What a request says beside its body.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) id: RequestId,
    pub(crate) client: ClientId,
    /// As given.
    pub(crate) session: Option<String>,
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let tag: Option<&RequestTag> = parts.extensions.get();
        let id = tag.ok_or_else(|| ApiError::Internal { what: "the request has no id".to_owned() })?.0;
        let client = parts.extensions.get().copied().unwrap_or_default();
        let header = parts.headers.get(SESSION_HEADER);
        let session = header.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        Ok(Self { id, client, session })
    }
}
