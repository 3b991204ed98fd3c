//! Counts HTTP answers by route, method and status.

use super::Board;
use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::Response,
};
use std::sync::Arc;

/// What stands for paths that are none of ours: theirs are anything.
const NO_ROUTE: &str = "none";

pub(crate) async fn count(State(board): State<Arc<Board>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().cloned();
    let method = request.method().clone();
    let response = next.run(request).await;
    let route = path.as_ref().map_or(NO_ROUTE, MatchedPath::as_str);
    board.answered(route, method.as_str(), response.status().as_u16());
    response
}
