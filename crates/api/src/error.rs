//! Every way a request can fail, and the one place that turns it into a status and OpenAI's JSON.

use crate::{rates::RateError, shape::Protocol};
use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::Serialize;
use types::{AssetsHash, GenerateError, GenerateRequestError, SamplingError, SessionId, limits};

/// Why a request gets no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("the body is not valid JSON: {message}")]
    Syntax { message: String },
    #[error("{path}: {message}")]
    Field { path: String, message: String },
    #[error("{message}")]
    Parameter { param: String, message: String },
    #[error("{param} = {value} is not supported yet; leave {param} out")]
    Unsupported { param: String, value: String },
    #[error("{param} = {value} is unknown to the chat template of {model:?}; leave {param} out")]
    UnknownToTemplate { param: String, value: String, model: String },
    #[error("no model is named and this cluster serves {}: {}", served.len(), served.join(", "))]
    ModelNotNamed { served: Vec<String> },
    #[error(
        "the prompt has {prompt_tokens} tokens{}, but the model's context is {context_tokens} tokens",
        wanted.as_ref().map(|(param, tokens)| format!(" and {param} is {tokens}")).unwrap_or_default()
    )]
    ContextExceeded {
        prompt_tokens: u32,
        /// How many tokens of an answer the client wants, if it says so, and where.
        wanted: Option<(String, u32)>,
        context_tokens: u32,
    },
    #[error("the model {model:?} has no chat template; use /v1/completions with a prompt instead")]
    NoChatTemplate { model: String },
    #[error("the chat template of {model:?} does not accept these messages: {message}")]
    Template { model: String, message: String },
    #[error("the tokenizer of {model:?} (assets {assets}) cannot be used: {message}")]
    Assets { model: String, assets: AssetsHash, message: String },
    #[error("the tokenizer failed: {message}")]
    Tokenizer { message: String },
    #[error("the body is larger than {} bytes", limits::HTTP_BODY_BYTES_MAX)]
    BodyTooLarge,
    #[error("the body could not be read: {message}")]
    BodyUnreadable { message: String },
    #[error("the body did not arrive within {seconds} s")]
    BodySlow { seconds: u64 },
    #[error("{}", if *given { "the API key is not valid" } else { "an API key is needed, as `Authorization: Bearer …`" })]
    Unauthorized { given: bool },
    #[error(
        "this API key may not do that: it needs the scope {needed:?}, which a [[key]] of the configuration gives"
    )]
    Scope { needed: &'static str },
    #[error(
        "nobody may administer this endpoint over HTTP: give a [[key]] of the configuration the scope \"admin\" (without keys, \
         only programs on the same machine may, where nothing else is listened to)"
    )]
    NoAdminKey,
    #[error("the settings were not reloaded, and nothing is changed: {message}")]
    Settings { message: String },
    #[error(
        "there is no response {id:?} here: the router that made a response keeps it in memory, for the same API key and \
         for a while, unless store was false; ask that router, or send the whole input"
    )]
    NoResponse { id: String, param: &'static str },
    #[error("there is no session {:?}", id.as_str())]
    NoSession { id: SessionId },
    #[error(
        "the session {:?} is not on the nodes that answered, and {} did not answer", id.as_str(), silent.join(", ")
    )]
    SessionUnknown { id: SessionId, silent: Vec<String> },
    #[error("there is no {path:?} here")]
    NoRoute { path: String },
    #[error("{path:?} does not take {method}")]
    WrongMethod { method: String, path: String },
    #[error("the {what} have {bytes} bytes; at most {max} are allowed")]
    HeadTooLarge { what: &'static str, bytes: usize, max: usize },
    #[error(transparent)]
    Rate(#[from] RateError),
    #[error("{max} readers of /v1/cluster/events are served already")]
    TooManyReaders { max: usize },
    #[error("the request was cancelled by the cluster before its text was complete")]
    Cancelled,
    #[error("{what}")]
    Internal { what: String },
    #[error(transparent)]
    Generate(#[from] GenerateError),
}

impl ApiError {
    /// A parameter that cannot be as it is.
    pub(crate) fn parameter(param: &str, message: impl Into<String>) -> Self {
        Self::Parameter { param: param.to_owned(), message: message.into() }
    }

    /// The status of the answer.
    pub(crate) fn status(&self) -> StatusCode {
        self.outline().status
    }

    /// The body of the answer, in OpenAI's form with the names of one of its protocols.
    pub(crate) fn json(&self, protocol: Protocol) -> ErrorJson {
        let outline = self.outline();
        let error = ErrorFields {
            message: self.message(protocol),
            kind: outline.kind,
            param: outline.param.map(|param| protocol.name(&param)),
            code: outline.code,
        };
        ErrorJson { error }
    }

    /// What is wrong, with the client's names for fields.
    pub(crate) fn message(&self, protocol: Protocol) -> String {
        let named = match self {
            Self::Field { path, message } => {
                Self::Field { path: protocol.name(path), message: message.clone() }
            }
            Self::Parameter { param, message } => return protocol.message(param, message),
            Self::Unsupported { param, value } => {
                Self::Unsupported { param: protocol.name(param), value: value.clone() }
            }
            Self::UnknownToTemplate { param, value, model } => {
                let (param, value, model) = (protocol.name(param), value.clone(), model.clone());
                Self::UnknownToTemplate { param, value, model }
            }
            Self::ContextExceeded { wanted: Some((param, tokens)), prompt_tokens, context_tokens } => {
                let wanted = Some((protocol.name(param), *tokens));
                Self::ContextExceeded {
                    wanted,
                    prompt_tokens: *prompt_tokens,
                    context_tokens: *context_tokens,
                }
            }
            other => return other.to_string(),
        };
        named.to_string()
    }

    fn outline(&self) -> Outline {
        use StatusCode as S;
        let invalid = |status, code| Outline::new(status, "invalid_request_error", code);
        let server = |status, code| Outline::new(status, "server_error", code);
        match self {
            Self::Syntax { .. } => invalid(S::BAD_REQUEST, "invalid_json"),
            Self::Field { path, .. } => invalid(S::BAD_REQUEST, "invalid_type").param(path),
            Self::Parameter { param, .. } => invalid(S::BAD_REQUEST, "invalid_value").param(param),
            Self::Unsupported { param, .. } => invalid(S::BAD_REQUEST, "unsupported_parameter").param(param),
            Self::UnknownToTemplate { param, .. } => {
                invalid(S::BAD_REQUEST, "unsupported_parameter").param(param)
            }
            Self::ModelNotNamed { .. } => invalid(S::BAD_REQUEST, "model_required").param("model"),
            Self::ContextExceeded { .. } => invalid(S::BAD_REQUEST, "context_length_exceeded"),
            Self::NoChatTemplate { .. } => invalid(S::BAD_REQUEST, "no_chat_template").param("messages"),
            Self::Template { .. } => invalid(S::BAD_REQUEST, "chat_template_error").param("messages"),
            Self::Assets { .. } => server(S::INTERNAL_SERVER_ERROR, "bad_tokenizer"),
            Self::Tokenizer { .. } => server(S::INTERNAL_SERVER_ERROR, "tokenizer_failed"),
            Self::BodyTooLarge => invalid(S::PAYLOAD_TOO_LARGE, "body_too_large"),
            Self::BodyUnreadable { .. } => invalid(S::BAD_REQUEST, "body_unreadable"),
            Self::BodySlow { .. } => invalid(S::REQUEST_TIMEOUT, "body_timeout"),
            Self::Unauthorized { .. } => invalid(S::UNAUTHORIZED, "invalid_api_key"),
            Self::Scope { .. } => invalid(S::FORBIDDEN, "insufficient_scope"),
            Self::NoAdminKey => invalid(S::FORBIDDEN, "no_admin_key"),
            Self::Settings { .. } => invalid(S::BAD_REQUEST, "invalid_settings"),
            Self::NoResponse { param, .. } => invalid(S::NOT_FOUND, "response_not_found").param(param),
            Self::NoSession { .. } => invalid(S::NOT_FOUND, "session_not_found").param("session_id"),
            Self::SessionUnknown { .. } => {
                Outline { retry_after_s: Some(1), ..server(S::SERVICE_UNAVAILABLE, "nodes_silent") }
            }
            Self::NoRoute { .. } => invalid(S::NOT_FOUND, "unknown_url"),
            Self::WrongMethod { .. } => invalid(S::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::HeadTooLarge { .. } => invalid(S::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large"),
            Self::Rate(error) => Outline {
                retry_after_s: Some(error.wait.as_secs_f64().ceil().max(1.0) as u64),
                ..Outline::new(S::TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded")
            },
            Self::TooManyReaders { .. } => {
                Outline { retry_after_s: Some(1), ..server(S::SERVICE_UNAVAILABLE, "too_many_readers") }
            }
            Self::Cancelled => server(S::SERVICE_UNAVAILABLE, "cancelled"),
            Self::Internal { .. } => server(S::INTERNAL_SERVER_ERROR, "internal_error"),
            Self::Generate(error) => match error {
                GenerateError::Invalid { param, .. } => {
                    Outline { param: param.clone(), ..invalid(S::BAD_REQUEST, "invalid_value") }
                }
                GenerateError::UnknownModel { .. } => invalid(S::NOT_FOUND, "model_not_found").param("model"),
                GenerateError::ContextExceeded { .. } => invalid(S::BAD_REQUEST, "context_length_exceeded"),
                GenerateError::Busy { retry_after_ms } => Outline {
                    retry_after_s: Some(retry_after_ms.div_ceil(1000).max(1)),
                    ..Outline::new(S::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full")
                },
                GenerateError::Unavailable { .. } => {
                    Outline { retry_after_s: Some(1), ..server(S::SERVICE_UNAVAILABLE, "no_node") }
                }
                GenerateError::NodeLost { .. } => server(S::BAD_GATEWAY, "node_lost"),
                GenerateError::Engine { .. } => server(S::INTERNAL_SERVER_ERROR, "engine_failed"),
            },
        }
    }
}

impl From<SamplingError> for ApiError {
    fn from(error: SamplingError) -> Self {
        let param = match &error {
            SamplingError::OutOfRange { name, .. } => name,
            SamplingError::TooManyBiases { .. } => "logit_bias",
        };
        Self::parameter(param, error.to_string())
    }
}

impl ApiError {
    /// A request that is invalid by itself; `prompt_param` is what its prompt came from, `grammar_param` its grammar.
    pub(crate) fn from_request(
        error: &GenerateRequestError,
        prompt_param: &str,
        grammar_param: &str,
    ) -> Self {
        let param = match error {
            GenerateRequestError::EmptyPrompt | GenerateRequestError::PromptTooLong { .. } => prompt_param,
            GenerateRequestError::MaxTokens { .. } | GenerateRequestError::Output { .. } => "max_tokens",
            GenerateRequestError::StopTokens { .. } => "stop_token_ids",
            GenerateRequestError::Target { name, .. } | GenerateRequestError::Logprobs { name, .. } => name,
            GenerateRequestError::GrammarTooLong { .. } | GenerateRequestError::SchemaTooDeep { .. } => {
                grammar_param
            }
            GenerateRequestError::MinTokens { .. } => "min_tokens",
            GenerateRequestError::PromptLogprobs { .. } => "prompt_logprobs",
            GenerateRequestError::CacheSaltTooLong { .. } => "cache_salt",
            GenerateRequestError::PredictionTooLong { .. } => "prediction",
        };
        Self::parameter(param, error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let outline = self.outline();
        let mut response = (outline.status, Json(self.json(Protocol::OpenAi))).into_response();
        if let Some(seconds) = outline.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if outline.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // For whoever writes it in another protocol's words.
        response.extensions_mut().insert(self);
        response
    }
}

/// OpenAI's error body.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ErrorJson {
    error: ErrorFields,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ErrorFields {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: &'static str,
}

struct Outline {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    param: Option<String>,
    retry_after_s: Option<u64>,
}

impl Outline {
    fn new(status: StatusCode, kind: &'static str, code: &'static str) -> Self {
        Self { status, kind, code, param: None, retry_after_s: None }
    }

    fn param(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }
}
