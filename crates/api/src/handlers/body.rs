//! Reads a request's body, bounded in bytes and time.

use crate::{
    error::ApiError,
    limits::{BODY_TIME_MAX, DRAINED_BYTES_MAX},
};
use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use types::limits::HTTP_BODY_BYTES_MAX;

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
