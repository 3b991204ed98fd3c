//! `POST /v1/completions`.

use super::{
    answer::{self, TextFormat},
    body,
    start::{Job, PromptKind, resolve, start},
};
use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    openai::{parameters::check_tokens, request::CompletionRequest, values::Prompts},
};
use axum::{body::Body, extract::State, response::Response};
use bytes::Bytes;

/// Tokens generated where the client does not say: OpenAI's default for this endpoint.
const MAX_TOKENS_DEFAULT: u32 = 16;

pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let job = job(&state, &caller, body::read(body).await?).await?;
    let (stream, include_usage) = (job.parameters.stream, job.parameters.include_usage);
    let format = TextFormat::new(caller.id, &job.card);
    let started = start(&state, job).await?;
    if stream {
        Ok(answer::stream(started, format, include_usage))
    } else {
        answer::whole(started, format).await
    }
}

/// What a body asks for.
pub(super) async fn job(state: &AppState, caller: &Caller, body: Bytes) -> Result<Job, ApiError> {
    let bytes = body.len();
    let mut request = CompletionRequest::parse(&body)?;
    drop(body);
    let card = resolve(state, request.model.as_deref())?;
    let parameters = request.take_parameters().check(&card, caller)?;
    let text = state.texts.get(&card).await?;
    let prompts = match request.prompt {
        Prompts::Tokens(prompts) => {
            prompts.iter().try_for_each(|prompt| check_tokens("prompt", prompt, &card))?;
            prompts
        }
        Prompts::Texts(texts) => {
            let encode = move |text: &crate::prompt::ModelText| {
                let prompts = texts.iter().map(|prompt| text.encode(prompt, true));
                prompts.collect::<Result<_, _>>().map_err(|message| ApiError::Tokenizer { message })
            };
            state.texts.run(&text, bytes, encode).await?
        }
    };
    let kind = PromptKind::Text { max_tokens_default: MAX_TOKENS_DEFAULT };
    Ok(Job { id: caller.id, card, text, prompts, kind, parameters })
}
