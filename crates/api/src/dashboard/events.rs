//! `GET /v1/cluster/events`: the cluster and this router's requests, once a second, as server-sent events.
//!
//! A reader that lags behind is dropped: the page asks again. All readers of one second share one text. When the router
//! leaves, their streams end, so that they do not hold it up.

use crate::{AppState, error::ApiError, metrics::Snapshot};
use axum::{
    body::Body,
    extract::State,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, MissedTickBehavior, interval},
};
use types::ClusterView;

/// How often there is news.
const INTERVAL: Duration = Duration::from_secs(1);
/// Readers at once: a page each.
pub(crate) const READERS_MAX: usize = 64;
/// Seconds that a reader may lag behind before it is dropped.
const LAG_MAX: usize = 4;

/// Who reads, and the text of the last second.
#[derive(Debug)]
pub(crate) struct Readers {
    places: Arc<Semaphore>,
    last: Mutex<Option<(Instant, Frame)>>,
}

/// One event, and whether it is the last.
#[derive(Debug, Clone)]
struct Frame {
    text: Bytes,
    last: bool,
}

#[derive(Serialize)]
struct News<'a> {
    /// The program's version: a page that is of another one loads itself again.
    version: &'static str,
    cluster: &'a ClusterView,
    #[serde(flatten)]
    requests: Snapshot,
}

impl Readers {
    pub(crate) fn new() -> Self {
        Self { places: Arc::new(Semaphore::new(READERS_MAX)), last: Mutex::default() }
    }

    fn frame(&self, state: &AppState) -> Frame {
        let now = Instant::now();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, frame)) = &*last
            && now.saturating_duration_since(*at) < INTERVAL / 2
        {
            return frame.clone();
        }
        let cluster = state.directory.view();
        let news =
            News { version: env!("CARGO_PKG_VERSION"), cluster: &cluster, requests: state.board.snapshot() };
        let json = serde_json::to_string(&news).expect("numbers, strings and arrays of them");
        let frame = Frame { text: Bytes::from(format!("data: {json}\n\n")), last: cluster.draining };
        *last = Some((now, frame.clone()));
        frame
    }
}

pub(crate) async fn events(State(state): State<AppState>) -> Result<Response, ApiError> {
    let place = state.readers.places.clone().try_acquire_owned();
    let place = place.map_err(|_| ApiError::TooManyReaders { max: READERS_MAX })?;
    let (sender, receiver) = mpsc::channel(LAG_MAX);
    tokio::spawn(async move {
        let _place = place;
        let mut tick = interval(INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = sender.closed() => return,
            }
            let frame = state.readers.frame(&state);
            if sender.try_send(frame.text).is_err() || frame.last {
                return;
            }
        }
    });
    let frames = stream::unfold(receiver, |mut receiver| async move {
        let frame = receiver.recv().await?;
        Some((Ok::<_, Infallible>(frame), receiver))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Or a proxy may collect the events.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, Body::from_stream(frames)).into_response())
}
