//! A question for vectors on its way: a place at a node, its answer, and, where that fails, other nodes.
//!
//! Nothing of it is passed on before it is whole, so another node simply starts anew. Data flows as for texts
//! (`course.rs`): the dispatch names a node, the node's engine answers.

use crate::course::outcome_of;
use crate::dispatch::{Dispatch, Place, Silence, Tried, now};
use crate::health::{START_DEADLINE_MIN, Stage};
use crate::settings::{ENGINE_FAILURES_MAX, ROUTER_WAIT_MAX, TRIES_MAX};
use router::Outcome;
use std::sync::Arc;
use tokio::time::timeout;
use types::{EmbedRequest, Embeddings, GenerateError};

/// Finds a node that answers.
pub(crate) async fn embed(
    dispatch: Arc<Dispatch>,
    request: EmbedRequest,
) -> Result<Embeddings, GenerateError> {
    dispatch.arrived();
    let ask = Arc::new(dispatch.ask_embed(&request));
    let deadline = now() + ROUTER_WAIT_MAX;
    let (mut tried, mut failures, mut last) = (Vec::<Tried>::new(), 0, None::<GenerateError>);
    loop {
        if let Some(error) = &last {
            let busy = matches!(error, GenerateError::Busy { .. });
            let again = error.is_retryable() && tried.len() < TRIES_MAX && failures < ENGINE_FAILURES_MAX;
            if !again || !(busy || dispatch.may_retry(false)) {
                return Err(error.clone());
            }
        }
        let place = match dispatch.place(&ask, &tried, last.is_some()).await {
            Ok(place) => place,
            // That the other nodes cannot either says less than what the first one failed with.
            Err(error) => return Err(last.unwrap_or(error)),
        };
        let error = match answer(&dispatch, &place, &request).await {
            Ok(vectors) => {
                place.first_token();
                return Ok(Embeddings { route: place.info.clone(), vectors });
            }
            Err(error) => error,
        };
        tracing::debug!(request = %request.id, node = %place.info.node_name, %error, "no vectors");
        place.outcome(outcome_of(&error));
        failures += usize::from(matches!(error, GenerateError::Engine { .. }));
        if matches!(error, GenerateError::Busy { .. }) && now() < deadline {
            place.refused_busy();
        } else {
            tried.push(Tried { node: place.info.node, life: None });
        }
        last = Some(error);
    }
}

/// The node's answer, unless it brings nothing while others work.
async fn answer(
    dispatch: &Dispatch,
    place: &Place,
    request: &EmbedRequest,
) -> Result<Vec<Vec<f32>>, GenerateError> {
    let (since, target) = (now(), place.target.clone());
    place.accepted();
    let mut answering = target.embed(request.clone());
    let mut wait = START_DEADLINE_MIN;
    loop {
        if let Ok(answer) = timeout(wait, &mut answering).await {
            return answer;
        }
        match dispatch.silence(place, &request.model, Stage::Waits, since) {
            Silence::Normal(more) => wait = more,
            Silence::Stalled => {
                place.outcome(Outcome::Failed);
                let reason = format!("{} does not answer, while others work", place.info.node_name);
                return Err(GenerateError::NodeLost { tokens: 0, reason });
            }
        }
    }
}
