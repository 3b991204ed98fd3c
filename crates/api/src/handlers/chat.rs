//! `POST /v1/chat/completions`.

use super::{
    answer::{self, ChatFormat},
    body,
    start::{Job, PromptKind, resolve, start},
};
use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    openai::{request::ChatCompletionRequest, values::Object},
    prompt::{ModelText, TemplateError, TemplateInput, TemplateMessage},
};
use axum::{body::Body, extract::State, response::Response};
use bytes::Bytes;
use types::ModelCard;

pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let job = job(&state, &caller, body::read(body).await?).await?;
    let (stream, include_usage) = (job.parameters.stream, job.parameters.include_usage);
    let format = ChatFormat::new(caller.id, &job.card);
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
    let mut request = ChatCompletionRequest::parse(&body)?;
    drop(body);
    let card = resolve(state, request.model.as_deref())?;
    let parameters = request.take_parameters().check(&card, caller)?;
    let text = state.texts.get(&card).await?;
    let model = card.clone();
    let prompt = state.texts.read(&text, bytes, move |text| render(text, &model, request)).await?;
    Ok(Job { id: caller.id, card, text, prompts: vec![prompt], kind: PromptKind::Messages, parameters })
}

/// The prompt. As Hugging Face does, special tokens are left to the template, which knows where they belong.
fn render(text: &ModelText, card: &ModelCard, request: ChatCompletionRequest) -> Result<String, ApiError> {
    let model = || card.name.clone();
    let Some(template) = text.template() else {
        return Err(ApiError::NoChatTemplate { model: model() });
    };
    if let Some(value) = request.reasoning_effort.as_ref().filter(|_| !template.knows_reasoning_effort()) {
        let value = format!("{value:?}");
        return Err(ApiError::UnknownToTemplate { param: "reasoning_effort", value, model: model() });
    }
    let messages = request.messages.into_iter().map(|Object(message)| TemplateMessage {
        role: message.role,
        content: message.content.unwrap_or_default().0,
        name: message.name,
        tool_call_id: message.tool_call_id,
        reasoning_content: message.reasoning_content,
    });
    let input = TemplateInput {
        messages: messages.collect(),
        add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
        reasoning_effort: request.reasoning_effort,
        kwargs: request.chat_template_kwargs.unwrap_or_default(),
    };
    template.render(input).map_err(|error| match error {
        TemplateError::Reserved(_) => ApiError::parameter("chat_template_kwargs", error.to_string()),
        TemplateError::Syntax(message) | TemplateError::Render(message) => {
            ApiError::Template { model: model(), message }
        }
    })
}
