//! Errors as the protocol of a path writes them: OpenAI's (two protocols of other names, the newer one under
//! `/v1/responses`), Anthropic's under `/v1/messages`, Ollama's under `/api`.
//!
//! Handlers and layers answer with an [`ApiError`], which is OpenAI's JSON and leaves itself in the response; the layer here
//! writes it anew where a client expects another one.

use crate::{RequestTag, error::ApiError};
use axum::{
    body::Body,
    extract::Request,
    http::{StatusCode, header},
    middleware::Next,
    response::Response,
};
use schemars::JsonSchema;
use serde::Serialize;
use types::RequestId;

/// Whose errors a path answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    OpenAi,
    /// OpenAI's newer one: errors are written alike, about fields of other names.
    Responses,
    Anthropic,
    Ollama,
}

impl Protocol {
    pub(crate) fn of(path: &str) -> Self {
        if path == "/v1/messages" || path.starts_with("/v1/messages/") {
            Self::Anthropic
        } else if path == "/v1/responses" || path.starts_with("/v1/responses/") {
            Self::Responses
        } else if path.starts_with("/api/") {
            Self::Ollama
        } else {
            Self::OpenAi
        }
    }
}

/// Writes errors anew where the path is another protocol's.
pub(crate) async fn shape(request: Request, next: Next) -> Response {
    let protocol = Protocol::of(request.uri().path());
    let id = request.extensions().get::<RequestTag>().map(|tag| tag.0);
    let mut response = next.run(request).await;
    let error = response.extensions_mut().remove::<ApiError>();
    let (Some(error), Some(id)) = (error, id) else { return response };
    let json = match protocol {
        Protocol::OpenAi => return response,
        Protocol::Responses => to_text(&error.json(protocol)),
        Protocol::Anthropic => to_text(&anthropic(&error, id)),
        Protocol::Ollama => to_text(&ollama(&error)),
    };
    response.headers_mut().remove(header::CONTENT_LENGTH);
    response.map(|_| Body::from(json))
}

/// An error as Anthropic writes it, also as an event of a stream.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct AnthropicError {
    #[serde(rename = "type")]
    kind: &'static str,
    error: AnthropicErrorFields,
    request_id: String,
}

#[derive(Debug, Serialize, JsonSchema)]
struct AnthropicErrorFields {
    #[serde(rename = "type")]
    kind: &'static str,
    message: String,
}

pub(crate) fn anthropic(error: &ApiError, id: RequestId) -> AnthropicError {
    let kind = match error.status() {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "api_error",
    };
    AnthropicError {
        kind: "error",
        error: AnthropicErrorFields { kind, message: error.message(Protocol::Anthropic) },
        request_id: id.to_string(),
    }
}

/// An error as Ollama writes it, also as the last line of a stream.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct OllamaError {
    error: String,
}

pub(crate) fn ollama(error: &ApiError) -> OllamaError {
    OllamaError { error: error.message(Protocol::Ollama) }
}

fn to_text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings only")
}
