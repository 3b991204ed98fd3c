//! Reads a request's body, bounded in bytes and time.

use crate::error::ApiError;
use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use std::time::Duration;
use types::limits::HTTP_BODY_BYTES_MAX;

/// For the whole body: the largest takes 13 s over 10 Mbit/s.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);
/// Bytes of a refused body that are read and dropped, so that a client that sends before it reads gets the refusal.
const DRAINED_BYTES_MAX: usize = 64 << 20;

pub(crate) async fn read(body: Body) -> Result<Bytes, ApiError> {
    let slow = |_| ApiError::BodySlow { seconds: BODY_TIME_MAX.as_secs() };
    tokio::time::timeout(BODY_TIME_MAX, read_all(body)).await.map_err(slow)?
}

async fn read_all(mut body: Body) -> Result<Bytes, ApiError> {
    let mut kept = BytesMut::new();
    let mut received = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ApiError::BodyUnreadable { message: error.to_string() })?;
        let Ok(data) = frame.into_data() else { continue };
        received += data.len();
        if received <= HTTP_BODY_BYTES_MAX {
            kept.extend_from_slice(&data);
        } else if received <= DRAINED_BYTES_MAX {
            kept = BytesMut::new();
        } else {
            break;
        }
    }
    if received > HTTP_BODY_BYTES_MAX { Err(ApiError::BodyTooLarge) } else { Ok(kept.freeze()) }
}
