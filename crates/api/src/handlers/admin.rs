//! `POST /v1/admin/…`: what changes the process that is asked. The work is whoever's who runs the process.

use crate::{AppState, error::ApiError};
use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::Serialize;
use types::BoxFuture;

/// Who runs the process that the endpoint is part of.
pub trait Operate: Send + Sync {
    /// Reads the settings again and takes over what can be.
    ///
    /// # Errors
    /// Settings that cannot be used, in words; nothing is changed then.
    fn reload(&self) -> BoxFuture<'_, Result<Reloaded, String>>;

    /// Ends the process once what runs is answered, as SIGTERM does.
    fn drain(&self);
}

/// What came of reading the settings again; names are those of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, JsonSchema)]
pub struct Reloaded {
    /// Settings, and files they name, that were different and hold now.
    pub applied: Vec<String>,
    /// Settings that are different and hold after a restart.
    pub restart: Vec<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ReloadJson {
    object: &'static str,
    #[serde(flatten)]
    reloaded: Reloaded,
}

#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DrainJson {
    object: &'static str,
    draining: bool,
}

/// `POST /v1/admin/reload`.
pub(crate) async fn reload(State(state): State<AppState>) -> Result<Response, ApiError> {
    let reloaded = state.operate.reload().await.map_err(|message| ApiError::Settings { message })?;
    Ok(Json(ReloadJson { object: "admin.reload", reloaded }).into_response())
}

/// `POST /v1/admin/drain`.
pub(crate) async fn drain(State(state): State<AppState>) -> Response {
    state.operate.drain();
    Json(DrainJson { object: "admin.drain", draining: true }).into_response()
}
