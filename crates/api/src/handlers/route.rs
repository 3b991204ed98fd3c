//! `POST /v1/cluster/route`: where a request would go now, and why; nothing is sent.
//!
//! The body is that of a chat completion, where it has messages, or else of a completion.

use super::{body, chat, completions};
use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    job::requests,
    openai::request::{self, Shape},
};
use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::json;

pub(crate) async fn plan(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::read(body).await?;
    let shape: Shape = request::parse(&body)?;
    let job = match shape.messages {
        Some(_) => chat::job(&state, &caller, body).await?,
        None => completions::job(&state, &caller, body).await?.job,
    };
    let plans = requests(&state, job, Vec::new())?.into_iter().map(|request| state.directory.plan(&request));
    let data = plans.collect::<Result<Vec<_>, _>>()?;
    Ok(Json(json!({"object": "cluster.route", "data": data})).into_response())
}
