//! `POST /v1/completions`.

use super::{
    body,
    completions_format::{self, Echo, TextFormat},
    stream::{ROUTE_HEADER, stream},
};
use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    job::{Job, best, collect, of_shape, resolve, start, total_usage},
    openai::{parameters::check_tokens, request::CompletionRequest, response::Head, values::Prompts},
    prompt::ModelText,
    text::AnswerFormat,
};
use axum::{body::Body, extract::State, response::Response};
use bytes::Bytes;
use std::sync::Arc;

/// Tokens generated where the client does not say: OpenAI's default for this endpoint.
const MAX_TOKENS_DEFAULT: u32 = 16;

/// A completion is a job and how it is to be told of.
pub(super) struct Completion {
    pub(super) job: Job,
    /// The texts of the prompts, where these are to be told before the answers.
    echo: Option<Vec<String>>,
    tell_prompt: bool,
}

pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let Completion { job, echo, tell_prompt } = job(&state, &caller, body::read(body).await?).await?;
    let head = Head::new("cmpl", caller.id, &job.card);
    let (n, drawn) = (job.parameters.n, job.parameters.drawn());
    let (streamed, include_usage) = (job.parameters.stream, job.parameters.include_usage);
    let told = job.parameters.logprobs_told;
    let started = start(&state, job).await?;
    let echo = Echo { texts: echo, n };
    if streamed {
        let choices = started.outputs.len();
        let format = TextFormat::new(head, started.text.clone(), echo, choices, include_usage);
        return Ok(stream(started, n, format));
    }
    let answers = best(collect(started.outputs).await?, drawn, n);
    let usage = total_usage(answers.iter().map(|answer| answer.ending.usage), n);
    let told = completions_format::Told { logprobs: told, prompt: tell_prompt };
    let mut response = completions_format::whole(&head, &started.text, answers, &echo, told, usage);
    response.headers_mut().insert(ROUTE_HEADER, started.route);
    Ok(response)
}

/// What a body asks for.
pub(super) async fn job(state: &AppState, caller: &Caller, body: Bytes) -> Result<Completion, ApiError> {
    let bytes = body.len();
    let mut request = CompletionRequest::parse(&body)?;
    drop(body);
    let (parameters, shape) = request.take_checked()?;
    let (shape, grammar_param) = shape.check()?;
    shape.check(grammar_param)?;
    let echoed = request.echo.unwrap_or(false);
    let card = resolve(state, request.model.as_deref())?;
    let mut parameters = parameters.check(&card, caller)?;
    parameters.rules.grammar = of_shape(&shape);
    let tell_prompt = parameters.report.prompt_logprobs.is_some();
    if echoed && parameters.logprobs_told {
        parameters.report.prompt_logprobs = parameters.report.prompt_logprobs.max(parameters.report.logprobs);
    }
    let text = state.texts.get(&card).await?;
    let (prompts, echo) = read(state, &text, &card, request.prompt, bytes, echoed).await?;
    let job = Job {
        id: caller.id,
        card,
        text,
        prompts,
        prompt_param: "prompt",
        continues: true,
        max_tokens_default: Some(MAX_TOKENS_DEFAULT),
        format: AnswerFormat::default(),
        grammar_param,
        parameters,
    };
    Ok(Completion { job, echo, tell_prompt })
}

/// The prompts in tokens, and as texts if these are to be told.
async fn read(
    state: &AppState,
    text: &Arc<ModelText>,
    card: &types::ModelCard,
    prompts: Prompts,
    bytes: usize,
    echoed: bool,
) -> Result<(Vec<Vec<types::TokenId>>, Option<Vec<String>>), ApiError> {
    let failed = |message| ApiError::Tokenizer { message };
    match prompts {
        Prompts::Tokens(prompts) => {
            prompts.iter().try_for_each(|prompt| check_tokens("prompt", prompt, card))?;
            if !echoed {
                return Ok((prompts, None));
            }
            let decode = move |text: &ModelText| {
                let texts = prompts.iter().map(|prompt| text.plain(prompt)).collect::<Result<_, _>>();
                Ok((prompts, Some(texts.map_err(failed)?)))
            };
            state.texts.run(text, bytes, decode).await
        }
        Prompts::Texts(texts) => {
            let encode = move |text: &ModelText| {
                let prompts = texts.iter().map(|prompt| text.encode(prompt, true));
                let prompts = prompts.collect::<Result<_, _>>().map_err(failed)?;
                Ok((prompts, echoed.then_some(texts)))
            };
            state.texts.run(text, bytes, encode).await
        }
    }
}
