//! `GET /v1/models` and `GET /v1/models/{id}`: what at least one ready node serves.

use crate::{
    AppState,
    error::ApiError,
    openai::response::{Model, ModelList},
};
use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use types::{GenerateError, ModelCard};

pub(crate) async fn list(State(state): State<AppState>) -> Response {
    let models = state.directory.models();
    let data = models.iter().map(|card| describe(card, &state.settings.owned_by)).collect();
    Json(ModelList { object: "list", data }).into_response()
}

pub(crate) async fn get(State(state): State<AppState>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let models = state.directory.models();
    if let Some(card) = models.iter().find(|card| card.name == id) {
        return Ok(Json(describe(card, &state.settings.owned_by)).into_response());
    }
    let served = models.into_iter().map(|card| card.name).collect();
    Err(GenerateError::UnknownModel { model: id, served }.into())
}

fn describe<'a>(card: &'a ModelCard, owned_by: &'a str) -> Model<'a> {
    Model {
        id: &card.name,
        object: "model",
        created: card.created_s,
        owned_by,
        max_model_len: card.context_tokens,
    }
}
