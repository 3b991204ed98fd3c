//! `POST /api/embed`: vectors of texts, in Ollama's words.

use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    handlers::body,
    job,
    limits::INPUTS_MAX,
    openai::{request, values::Prompts},
};
use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// What clients send.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct EmbedBody {
    #[serde(default)]
    model: Option<String>,
    #[schemars(with = "Prompts")]
    input: Prompts<INPUTS_MAX>,
    /// Whether texts that are too long are cut, which is so unless told otherwise; else they are an error.
    #[serde(default)]
    truncate: Option<bool>,
    /// So many of a vector's first numbers, of length 1 together.
    #[serde(default)]
    dimensions: Option<u32>,
}

/// What they get.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Embeddings {
    model: String,
    embeddings: Vec<Vec<f32>>,
    /// Nanoseconds.
    total_duration: u64,
    load_duration: u64,
    prompt_eval_count: usize,
}

pub(crate) async fn embed(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let began = Instant::now();
    let body = body::read(body).await?;
    let bytes = body.len();
    let request: EmbedBody = request::parse(&body)?;
    drop(body);
    let EmbedBody { model, input: inputs, truncate, dimensions } = request;
    let wanted = job::Wanted { model, inputs, bytes, cut: truncate.unwrap_or(true), dimensions };
    let embedded = job::embed(&state, &caller, wanted).await?;
    let embeddings = Embeddings {
        model: embedded.model,
        embeddings: embedded.vectors,
        total_duration: u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX),
        load_duration: 0,
        prompt_eval_count: embedded.tokens,
    };
    Ok(Json(embeddings).into_response())
}
