//! Gives each request an id: in its span, in its answer's headers and, from there on, everywhere in the cluster.

use crate::error::ApiError;
use axum::{
    extract::Request,
    http::{HeaderName, HeaderValue},
    middleware::Next,
    response::{IntoResponse, Response},
};
use std::time::Instant;
use tracing::{Instrument, debug, info, info_span};
use types::RequestId;

/// Routes that programs poll: their answers are logged at `debug`.
const POLLED: [&str; 4] = ["/health", "/ready", "/v1/cluster", "/metrics"];

const ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// A request's id, as an extension of the request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestTag(pub(crate) RequestId);

/// Draws the id, runs the request in its span, and logs how it was answered; never what it says.
pub(crate) async fn tag(mut request: Request, next: Next) -> Response {
    let mut bytes = [0; 16];
    if let Err(error) = getrandom::fill(&mut bytes) {
        return ApiError::Internal { what: format!("no random id: {error}") }.into_response();
    }
    let id = RequestId(u128::from_le_bytes(bytes));
    let span = info_span!("request", %id, method = %request.method(), path = request.uri().path());
    request.extensions_mut().insert(RequestTag(id));
    let polled = POLLED.contains(&request.uri().path());
    let started = Instant::now();
    async {
        let mut response = next.run(request).await;
        let value = HeaderValue::from_str(&id.to_string()).expect("hexadecimal digits");
        response.headers_mut().insert(ID_HEADER, value);
        let (status, seconds) = (response.status().as_u16(), started.elapsed().as_secs_f32());
        if polled {
            debug!(status, seconds, "answered");
        } else {
            info!(status, seconds, "answered");
        }
        response
    }
    .instrument(span)
    .await
}
