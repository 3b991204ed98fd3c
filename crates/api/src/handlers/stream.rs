//! Answers as a stream: one frame of bytes for each thing that becomes known, in the words of a [`Format`].

use crate::{
    error::ApiError,
    job::{Events, Started, merge, total_usage},
    text::{AnswerEvent, TextUsage},
};
use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::Serialize;
use std::{convert::Infallible, time::Duration};

/// Where a request went and why.
pub(crate) const ROUTE_HEADER: HeaderName = HeaderName::from_static("x-mlx-route");
/// Something is sent into a stream that is silent this long: proxies and clients give up on silent ones after a minute.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);

/// How a protocol writes a stream. Each call may write any number of frames, or none.
pub(crate) trait Format: Send + 'static {
    const CONTENT_TYPE: &'static str = "text/event-stream";
    /// What says nothing; empty where a protocol has no such thing.
    const KEEP_ALIVE: &'static str = ": keep-alive\n\n";

    /// The stream begins.
    fn begin(&mut self, _out: &mut Frames) {}
    /// Something happened to one of the choices.
    fn event(&mut self, choice: usize, event: AnswerEvent, out: &mut Frames);
    /// The last choice has ended; the usage is that of all.
    fn finish(&mut self, usage: TextUsage, out: &mut Frames);
    /// The stream breaks off.
    fn error(&mut self, error: &ApiError, out: &mut Frames);
}

/// Bytes of a stream, written one after the other.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    text: String,
}

impl Frames {
    /// `data: <JSON>`.
    pub(crate) fn json(&mut self, value: &impl Serialize) {
        self.text.push_str("data: ");
        self.text.push_str(&json(value));
        self.text.push_str("\n\n");
    }

    /// `event: <name>` and `data: <JSON>`.
    pub(crate) fn named(&mut self, name: &str, value: &impl Serialize) {
        self.text.push_str("event: ");
        self.text.push_str(name);
        self.text.push('\n');
        self.json(value);
    }

    /// JSON in a line of its own.
    pub(crate) fn line(&mut self, value: &impl Serialize) {
        self.text.push_str(&json(value));
        self.text.push('\n');
    }

    /// Anything.
    pub(crate) fn raw(&mut self, text: &str) {
        self.text.push_str(text);
    }

    fn take(&mut self) -> Option<Bytes> {
        (!self.text.is_empty()).then(|| Bytes::from(std::mem::take(&mut self.text)))
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("keys are strings")
}

/// Answers with a stream that goes on while the outputs do; dropping it drops them. Each `n` choices are of one prompt.
pub(crate) fn stream<F: Format>(started: Started, n: usize, format: F) -> Response {
    let streaming = Streaming {
        left: started.outputs.len(),
        usages: vec![TextUsage::default(); started.outputs.len()],
        events: Some(merge(started.outputs)),
        begun: false,
        n,
        format,
        out: Frames::default(),
    };
    let frames = stream::unfold(streaming, |mut streaming| async move {
        let frame = streaming.next().await?;
        Some((Ok::<_, Infallible>(frame), streaming))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(F::CONTENT_TYPE)),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Or a proxy may collect the events.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
        (ROUTE_HEADER, started.route),
    ];
    (headers, Body::from_stream(frames)).into_response()
}

struct Streaming<F> {
    /// None after the last event.
    events: Option<Events>,
    begun: bool,
    /// Choices that have not ended.
    left: usize,
    usages: Vec<TextUsage>,
    n: usize,
    format: F,
    out: Frames,
}

impl<F: Format> Streaming<F> {
    /// The next frame, which is not empty.
    async fn next(&mut self) -> Option<Bytes> {
        if !self.begun {
            self.begun = true;
            self.format.begin(&mut self.out);
        }
        loop {
            if let Some(bytes) = self.out.take() {
                return Some(bytes);
            }
            let events = self.events.as_mut()?;
            let Ok(next) = tokio::time::timeout(KEEP_ALIVE_EVERY, events.next()).await else {
                self.out.raw(F::KEEP_ALIVE);
                continue;
            };
            match next? {
                (choice, Ok(event)) => self.event(choice, event),
                (_, Err(error)) => {
                    self.events = None;
                    self.format.error(&error, &mut self.out);
                }
            }
        }
    }

    fn event(&mut self, choice: usize, event: AnswerEvent) {
        if let AnswerEvent::Ended(ending) = &event {
            self.usages[choice] = ending.usage;
            self.left -= 1;
        }
        self.format.event(choice, event, &mut self.out);
        if self.left == 0 {
            self.events = None;
            self.format.finish(total_usage(self.usages.drain(..), self.n), &mut self.out);
        }
    }
}
