//! `GET /api/tags`, `POST /api/show` and `GET /api/version`.
//!
//! A router knows of a model what its card says: where Ollama tells sizes and families, there is nothing to tell.

use crate::{AppState, error::ApiError, handlers::body, job::resolve, openai::request, prompt::strftime};
use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use types::ModelCard;

/// What `/api/tags` answers.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Tags {
    models: Vec<Tag>,
}

/// A model in a list.
#[derive(Debug, Serialize, JsonSchema)]
struct Tag {
    name: String,
    model: String,
    modified_at: String,
    /// Not known here.
    size: u64,
    /// Of weights and KV format.
    digest: String,
    details: Details,
}

/// What Ollama tells of a model's files.
#[derive(Debug, Default, Serialize, JsonSchema)]
struct Details {
    parent_model: &'static str,
    format: &'static str,
    family: &'static str,
    families: Vec<&'static str>,
    parameter_size: &'static str,
    quantization_level: &'static str,
}

/// `/api/show`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ShowRequest {
    #[serde(default)]
    model: Option<String>,
    /// The older name of `model`.
    #[serde(default)]
    name: Option<String>,
}

/// What `/api/show` answers.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Shown {
    modelfile: &'static str,
    parameters: &'static str,
    template: String,
    modified_at: String,
    details: Details,
    model_info: BTreeMap<&'static str, serde_json::Value>,
    capabilities: Vec<&'static str>,
}

/// What `/api/version` answers.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Version {
    version: &'static str,
}

pub(crate) async fn tags(State(state): State<AppState>) -> Response {
    let tag = |card: ModelCard| Tag {
        modified_at: modified_at(&card),
        model: card.name.clone(),
        name: card.name,
        size: 0,
        digest: format!("{:032x}", card.root.0),
        details: Details::default(),
    };
    Json(Tags { models: state.directory.models().into_iter().map(tag).collect() }).into_response()
}

pub(crate) async fn show(State(state): State<AppState>, body: Body) -> Result<Response, ApiError> {
    let ShowRequest { model, name } = request::parse(&body::read(body).await?)?;
    let card = resolve(&state, model.or(name).as_deref())?;
    let assets = state.directory.assets(card.assets).await?;
    let chats = assets.chat_template.is_some();
    let shown = Shown {
        modelfile: "",
        parameters: "",
        template: assets.chat_template.clone().unwrap_or_default(),
        modified_at: modified_at(&card),
        details: Details::default(),
        // Where programs look for the context of a model.
        model_info: BTreeMap::from([
            ("general.architecture", "mlx".into()),
            ("mlx.context_length", card.context_tokens.into()),
            ("mlx.vocab_size", card.vocab_size.into()),
        ]),
        capabilities: if card.must_embed().is_ok() {
            vec!["embedding"]
        } else if chats {
            vec!["completion", "tools"]
        } else {
            vec!["completion"]
        },
    };
    Ok(Json(shown).into_response())
}

pub(crate) async fn version() -> Response {
    Json(Version { version: env!("CARGO_PKG_VERSION") }).into_response()
}

fn modified_at(card: &ModelCard) -> String {
    strftime("%FT%TZ", card.created_s).expect("it knows these")
}
