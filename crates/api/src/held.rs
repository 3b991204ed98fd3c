//! A body that keeps something until it ends, however it ends.

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll},
};

/// The body of an answer that holds a place, wherever it ends.
pub(crate) struct Held<T> {
    body: Body,
    _place: T,
}

impl<T: Send + Unpin + 'static> Held<T> {
    /// `body`, with `place` dropped after it.
    pub(crate) fn body(body: Body, place: T) -> Body {
        Body::new(Self { body, _place: place })
    }
}

impl<T: Unpin> HttpBody for Held<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
