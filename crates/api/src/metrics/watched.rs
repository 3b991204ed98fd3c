//! Whoever generates, with a board that is told of it.

use super::Board;
use futures_util::{StreamExt, stream};
use std::sync::Arc;
use types::{BoxFuture, Generate, GenerateError, GenerateRequest, Generation, RequestId, TokenEvent};

/// Tells the board of every request and passes on what comes.
pub(crate) struct Watched {
    inner: Arc<dyn Generate>,
    board: Arc<Board>,
}

impl Watched {
    pub(crate) fn new(inner: Arc<dyn Generate>, board: Arc<Board>) -> Self {
        Self { inner, board }
    }
}

impl Generate for Watched {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, GenerateError>> {
        Box::pin(async move {
            self.board.begins(&request);
            let entry = Entry { board: self.board.clone(), id: request.id };
            let Generation { route, events } = match self.inner.generate(request).await {
                Ok(generation) => generation,
                Err(error) => {
                    entry.board.ends(entry.id, (&error).into());
                    return Err(error);
                }
            };
            entry.board.accepted(entry.id, &route);
            let events = stream::unfold((entry, events), |(entry, mut events)| async move {
                let event: TokenEvent = events.next().await?;
                entry.board.event(entry.id, &event);
                Some((event, (entry, events)))
            });
            Ok(Generation { route, events: Box::pin(events) })
        })
    }
}

/// A request on the board. Dropped before it has ended, it was given up.
struct Entry {
    board: Arc<Board>,
    id: RequestId,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.board.dropped(self.id);
    }
}
