//! `POST /v1/embeddings`.

use super::body;
use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
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
use base64::{Engine as _, engine::general_purpose::STANDARD};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What clients send.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct EmbeddingsRequest {
    #[serde(default)]
    model: Option<String>,
    #[schemars(with = "Prompts")]
    input: Prompts<INPUTS_MAX>,
    /// How vectors are written.
    #[serde(default)]
    encoding_format: Option<Encoding>,
    /// So many of a vector's first numbers, of length 1 together; of use with models that were trained for it.
    #[serde(default)]
    dimensions: Option<u32>,
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    Float,
    /// Numbers of 32 bits, little-endian.
    Base64,
}

/// What they get.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct EmbeddingList {
    object: &'static str,
    data: Vec<Embedding>,
    model: String,
    usage: EmbeddingUsage,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Serialize, JsonSchema)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::read(body).await?;
    let bytes = body.len();
    let request: EmbeddingsRequest = request::parse(&body)?;
    drop(body);
    let EmbeddingsRequest { model, input: inputs, dimensions, encoding_format } = request;
    let wanted = job::Wanted { model, inputs, bytes, cut: false, dimensions };
    let embedded = job::embed(&state, &caller, wanted).await?;
    let written = |vector: Vec<f32>| match encoding_format.unwrap_or(Encoding::Float) {
        Encoding::Float => Vector::Numbers(vector),
        Encoding::Base64 => {
            let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
            Vector::Base64(STANDARD.encode(bytes))
        }
    };
    let vectors = embedded.vectors.into_iter().enumerate();
    let data =
        vectors.map(|(index, vector)| Embedding { object: "embedding", index, embedding: written(vector) });
    let usage = EmbeddingUsage { prompt_tokens: embedded.tokens, total_tokens: embedded.tokens };
    let list = EmbeddingList { object: "list", data: data.collect(), model: embedded.model, usage };
    Ok(Json(list).into_response())
}
