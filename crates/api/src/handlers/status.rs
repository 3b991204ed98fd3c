//! `GET /health` (this process lives), `/ready` (a model can answer) and `/v1/cluster` (everything there is to show).

use crate::{AppState, error::ApiError, job::why_not_ready};
use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::json;
use types::GenerateError;

pub(crate) async fn health() -> Response {
    Json(json!({"status": "alive"})).into_response()
}

pub(crate) async fn ready(State(state): State<AppState>) -> Result<Response, ApiError> {
    let models = state.directory.models();
    if models.is_empty() {
        let reason = why_not_ready(&state.directory.view());
        return Err(GenerateError::Unavailable { model: "any model".to_owned(), reason }.into());
    }
    let names: Vec<String> = models.into_iter().map(|card| card.name).collect();
    Ok(Json(json!({"status": "ready", "models": names})).into_response())
}

pub(crate) async fn cluster(State(state): State<AppState>) -> Response {
    Json(state.directory.view()).into_response()
}
