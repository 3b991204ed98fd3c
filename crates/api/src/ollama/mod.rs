//! Ollama's API over [`crate::job`], for programs that know no other.
//!
//! `request` is what clients send, `answer` what they get, line by line or at once; `models` tells what is served. Errors are
//! written by [`crate::shape`].

mod answer;
pub(crate) mod embed;
pub(crate) mod models;
mod request;

pub(crate) use answer::Line;
pub(crate) use request::{ChatRequest, TextRequest};

use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    handlers::{
        body,
        stream::{ROUTE_HEADER, stream},
    },
    job::{Job, collect, of_shape, resolve, start},
    prompt::ModelText,
    text::AnswerFormat,
};
use answer::{Kind, Lines};
use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use request::Asked;
use std::time::Instant;

pub(crate) async fn chat(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::read(body).await?;
    let (streamed, asked) = ChatRequest::parse(&body)?;
    answer(&state, &caller, Kind::Chat, streamed, asked, body.len()).await
}

pub(crate) async fn generate(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::read(body).await?;
    let (streamed, asked) = TextRequest::parse(&body)?;
    answer(&state, &caller, Kind::Text, streamed, asked, body.len()).await
}

async fn answer(
    state: &AppState,
    caller: &Caller,
    kind: Kind,
    streamed: bool,
    asked: Asked,
    bytes: usize,
) -> Result<Response, ApiError> {
    let began = Instant::now();
    let job: Job = match asked {
        Asked::Nothing { model } => {
            let card = resolve(state, model.as_deref())?;
            return Ok(Json(Lines::new(kind, card.name, began).loaded()).into_response());
        }
        Asked::Conversation(conversation) => conversation.job(state, caller, bytes).await?,
        Asked::Raw { model, prompt, shape, parameters } => {
            let card = resolve(state, model.as_deref())?;
            let mut parameters = parameters.check(&card, caller)?;
            parameters.rules.grammar = of_shape(&shape);
            let text = state.texts.get(&card).await?;
            let encode = move |text: &ModelText| {
                text.encode(&prompt, true).map_err(|message| ApiError::Tokenizer { message })
            };
            let prompts = vec![state.texts.run(&text, bytes, encode).await?];
            Job {
                id: caller.id,
                card,
                text,
                prompts,
                prompt_param: "prompt",
                continues: true,
                max_tokens_default: None,
                format: AnswerFormat::default(),
                grammar_param: "format",
                parameters,
            }
        }
    };
    let lines = Lines::new(kind, job.card.name.clone(), began);
    let started = start(state, job).await?;
    if streamed {
        return Ok(stream(started, 1, lines));
    }
    let route = started.route;
    let mut answers = collect(started.outputs).await?;
    Ok(([(ROUTE_HEADER, route)], Json(lines.whole(answers.swap_remove(0)))).into_response())
}
