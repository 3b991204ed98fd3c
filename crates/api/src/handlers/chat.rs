//! `POST /v1/chat/completions`.

use super::{
    body,
    chat_format::{self, ChatFormat},
    stream::{ROUTE_HEADER, stream},
};
use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    job::{Job, collect, start, total_usage},
    openai::{request::ChatCompletionRequest, response::Head},
};
use axum::{body::Body, extract::State, response::Response};
use bytes::Bytes;

pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let job = job(&state, &caller, body::read(body).await?).await?;
    let head = Head::new("chatcmpl", caller.id, &job.card);
    let (n, include_usage) = (job.parameters.n, job.parameters.include_usage);
    let (streamed, tell_prompt) = (job.parameters.stream, job.parameters.report.prompt_logprobs.is_some());
    let started = start(&state, job).await?;
    if streamed {
        let format = ChatFormat::new(head, started.text.clone(), n, include_usage);
        return Ok(stream(started, n, format));
    }
    let answers = collect(started.outputs).await?;
    let usage = total_usage(answers.iter().map(|answer| answer.ending.usage), n);
    let mut response = chat_format::whole(&head, &started.text, answers, usage, tell_prompt);
    response.headers_mut().insert(ROUTE_HEADER, started.route);
    Ok(response)
}

/// What a body asks for.
pub(super) async fn job(state: &AppState, caller: &Caller, body: Bytes) -> Result<Job, ApiError> {
    let bytes = body.len();
    let request = ChatCompletionRequest::parse(&body)?;
    drop(body);
    request.into_conversation()?.job(state, caller, bytes).await
}
