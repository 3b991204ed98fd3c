//! `/v1/responses`: OpenAI's newer API over [`crate::job`].
//!
//! `request` and `items` are what clients send, `answer` and `events` what they get, whole and streamed; `store` keeps
//! responses for a while, so that they can be retrieved and continued.

mod answer;
mod events;
mod items;
mod request;
mod store;

pub(crate) use answer::{Deletion, ItemList, ItemQuery, ResponseJson};
pub(crate) use request::ResponsesRequest;
pub(crate) use store::ResponseStore;

use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    handlers::{
        body,
        stream::{ROUTE_HEADER, stream},
    },
    job::{collect, start},
};
use axum::{
    Json,
    body::Body,
    extract::{Path, Query, State, rejection::QueryRejection},
    response::{IntoResponse, Response},
};
use events::ResponseEvents;
use request::Asked;
use std::sync::Arc;
use store::{Keep, Stored};

pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = body::read(body).await?;
    let bytes = body.len();
    let Asked { stream: streamed, store, echo, input, messages: new, mut conversation } =
        ResponsesRequest::parse(&body)?.into_parts()?;
    drop(body);
    let mut messages = match echo.previous() {
        Some(id) => find(&state, &caller, id, "previous_response_id")?.messages.clone(),
        None => Vec::new(),
    };
    messages.extend(new);
    conversation.messages = echo.instructions().into_iter().chain(messages.iter().cloned()).collect();
    let job = conversation.job(&state, &caller, bytes).await?;
    let response = ResponseJson::begun(caller.id, &job.card, echo);
    let responses = state.responses.clone();
    let keep = store.then(|| Keep { store: responses, client: caller.client, input, messages, bytes });
    let started = start(&state, job).await?;
    let text = started.text.clone();
    if streamed {
        return Ok(stream(started, 1, ResponseEvents::new(caller.id, response, text, keep)));
    }
    let route = started.route;
    let answers = collect(started.outputs).await?;
    let response = response.answered(caller.id, &answers[0], &text);
    if let Some(keep) = keep {
        keep.keep(response.clone());
    }
    Ok(([(ROUTE_HEADER, route)], Json(response)).into_response())
}

pub(crate) async fn retrieve(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let stored = find(&state, &caller, &id, "response_id")?;
    Ok(Json(&stored.response).into_response())
}

pub(crate) async fn delete(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    if !state.responses.remove(caller.client, &id) {
        return Err(ApiError::NoResponse { id, param: "response_id" });
    }
    Ok(Json(Deletion { id, object: "response", deleted: true }).into_response())
}

pub(crate) async fn input_items(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
    query: Result<Query<ItemQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::parameter("query", error.body_text()))?;
    let stored = find(&state, &caller, &id, "response_id")?;
    ItemList::new(&id, &stored.input, &query).map(|list| Json(list).into_response())
}

fn find(state: &AppState, caller: &Caller, id: &str, param: &'static str) -> Result<Arc<Stored>, ApiError> {
    let found = state.responses.get(caller.client, id);
    found.ok_or_else(|| ApiError::NoResponse { id: id.chars().take(80).collect(), param })
}
