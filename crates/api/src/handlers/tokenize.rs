//! `POST /tokenize` and `POST /detokenize`: what a text or a conversation is in tokens, and back, as vLLM has them.

use super::{body, chat};
use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    job::resolve,
    openai::{
        parameters::check_tokens,
        request::{self, Shape},
    },
};
use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use types::{ModelCard, TokenId, limits};

/// `/tokenize`, of a text or of a conversation.
#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(
    dead_code,
    reason = "each of both is parsed for itself, for the sake of messages; this is their schema"
)]
pub(crate) enum TokenizeBody {
    Text {
        #[serde(flatten)]
        text: TokenizeRequest,
        #[serde(flatten)]
        options: TokenizeOptions,
    },
    Messages {
        #[serde(flatten)]
        chat: Box<request::ChatCompletionRequest>,
        #[serde(flatten)]
        options: TokenizeOptions,
    },
}

/// `/tokenize` of a text.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct TokenizeRequest {
    #[serde(default)]
    model: Option<String>,
    prompt: String,
    /// Whether what the tokenizer puts around every text is there.
    #[serde(default)]
    add_special_tokens: Option<bool>,
}

/// What `/tokenize` reads beside a text or a conversation.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct TokenizeOptions {
    #[serde(default)]
    return_token_strs: Option<bool>,
}

/// `/detokenize`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct DetokenizeRequest {
    #[serde(default)]
    model: Option<String>,
    tokens: Vec<TokenId>,
}

/// What `/tokenize` answers.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<TokenId>,
    token_strs: Option<Vec<String>>,
}

/// What `/detokenize` answers.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Detokenized {
    prompt: String,
}

pub(crate) async fn tokenize(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::read(body).await?;
    let spelled = request::parse::<TokenizeOptions>(&body)?.return_token_strs.unwrap_or(false);
    let (card, text, tokens) = if request::parse::<Shape>(&body)?.messages.is_some() {
        let mut job = chat::job(&state, &caller, body).await?;
        (job.card, job.text, job.prompts.swap_remove(0))
    } else {
        let bytes = body.len();
        let request: TokenizeRequest = request::parse(&body)?;
        let card = resolve(&state, request.model.as_deref())?;
        let text = state.texts.get(&card).await?;
        let special = request.add_special_tokens.unwrap_or(true);
        let encode = move |text: &crate::prompt::ModelText| {
            text.encode(&request.prompt, special).map_err(|message| ApiError::Tokenizer { message })
        };
        let tokens = state.texts.run(&text, bytes, encode).await?;
        (card, text, tokens)
    };
    let spelling = |&token: &TokenId| text.spelling(token).unwrap_or_default();
    let token_strs = spelled.then(|| tokens.iter().map(spelling).collect());
    let ModelCard { context_tokens, .. } = card;
    let tokenized = Tokenized { count: tokens.len(), max_model_len: context_tokens, tokens, token_strs };
    Ok(Json(tokenized).into_response())
}

pub(crate) async fn detokenize(State(state): State<AppState>, body: Body) -> Result<Response, ApiError> {
    let body = body::read(body).await?;
    let DetokenizeRequest { model, tokens } = request::parse(&body)?;
    let card = resolve(&state, model.as_deref())?;
    check_tokens("tokens", &tokens, &card)?;
    if tokens.len() > limits::PROMPT_TOKENS_MAX {
        let (count, max) = (tokens.len(), limits::PROMPT_TOKENS_MAX);
        let message = format!("tokens has {count} tokens; at most {max} are allowed");
        return Err(ApiError::parameter("tokens", message));
    }
    let text = state.texts.get(&card).await?;
    let bytes = body.len();
    let decode = move |text: &crate::prompt::ModelText| {
        text.decode(&tokens).map_err(|message| ApiError::Tokenizer { message })
    };
    let prompt = state.texts.run(&text, bytes, decode).await?;
    Ok(Json(Detokenized { prompt }).into_response())
}
