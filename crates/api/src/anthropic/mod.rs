//! `POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's API over [`crate::job`].
//!
//! `request` and `content` are what clients send, `answer` and `events` what they get, whole and streamed. Errors are written
//! by [`crate::shape`].

mod answer;
mod content;
mod events;
mod request;

pub(crate) use answer::{MessageJson, TokenCount};
pub(crate) use request::MessagesRequest;

use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    handlers::{
        body,
        stream::{ROUTE_HEADER, stream},
    },
    job::{collect, start},
};
use answer::{Head, blocks};
use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use events::MessageEvents;

pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::read(body).await?;
    let request = MessagesRequest::parse(&body)?;
    let streamed = request.stream();
    let job = request.conversation()?.job(&state, &caller, body.len()).await?;
    let head = Head::new(caller.id, &job.card);
    let prompt_tokens = job.prompts.iter().map(|prompt| prompt.len() as u32).sum();
    let started = start(&state, job).await?;
    if streamed {
        return Ok(stream(started, 1, MessageEvents::new(caller.id, head, prompt_tokens)));
    }
    let route = started.route;
    let mut answers = collect(started.outputs).await?;
    let (content, ending) = blocks(answers.swap_remove(0));
    Ok(([(ROUTE_HEADER, route)], Json(head.ended(content, ending))).into_response())
}

pub(crate) async fn count_tokens(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::read(body).await?;
    let request = MessagesRequest::parse_to_count(&body)?;
    let job = request.conversation()?.job(&state, &caller, body.len()).await?;
    let input_tokens = job.prompts.iter().map(Vec::len).sum();
    Ok(Json(TokenCount { input_tokens }).into_response())
}
