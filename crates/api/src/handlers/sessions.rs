//! `GET /v1/sessions` and `DELETE /v1/sessions/{id}`: conversations whose KV is kept, of the client that asks.

use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    openai::response::{Session, SessionDeletion, SessionList},
};
use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use types::{NodeSession, SessionId, SessionRequest};

pub(crate) async fn list(State(state): State<AppState>, caller: Caller) -> Response {
    let answers = state.sessions.sessions(SessionRequest::List { client: caller.client }).await;
    let data = describe(&answers.sessions);
    Json(SessionList { object: "list", data, incomplete: &answers.incomplete }).into_response()
}

pub(crate) async fn delete(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let id = SessionId::try_from(id).map_err(|error| ApiError::parameter("session_id", error.to_string()))?;
    let request = SessionRequest::End { client: caller.client, id: id.clone() };
    let answers = state.sessions.sessions(request).await;
    if answers.sessions.is_empty() {
        return Err(match answers.incomplete.is_empty() {
            true => ApiError::NoSession { id },
            false => ApiError::SessionUnknown { id, silent: answers.incomplete },
        });
    }
    tracing::info!(session = %id, nodes = answers.sessions.len(), "session deleted");
    let deletion = SessionDeletion {
        id: id.as_str(),
        object: "session.deleted",
        deleted: true,
        data: describe(&answers.sessions),
        incomplete: &answers.incomplete,
    };
    Ok(Json(deletion).into_response())
}

fn describe(sessions: &[NodeSession]) -> Vec<Session<'_>> {
    let describe = sessions.iter().map(|NodeSession { node: _, node_name, session }| Session {
        id: session.id.as_str(),
        object: "session",
        node: node_name,
        tokens: session.tokens,
        idle_s: session.idle_s,
        expires_in_s: session.expires_in_s,
    });
    describe.collect()
}
