//! Between an engine that must never wait and a consumer that may: one buffer per request, in which tokens coalesce.
//!
//! The [`TokenSink`] end is written by whoever reads the engine child's reports, the [`TokenSource`] end is the
//! request's [`TokenStream`](types::TokenStream). The buffer holds at most the tokens that the request may generate, and
//! log-probabilities of these and of its prompt where it asks for them.

use futures_core::Stream;
use futures_util::task::AtomicWaker;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use types::limits::LOGPROB_TOKENS_MAX;
use types::{Finish, FinishReason, GenerateError, TokenEvent, TokenId, TokenLogprobs, Usage};

/// Tokens of one event: what a slow consumer left lying must fit a reply's frame.
const EVENT_TOKENS_MAX: usize = 4096;

const _: () = assert!(LOGPROB_TOKENS_MAX <= EVENT_TOKENS_MAX);

/// Makes the two ends, for the output tokens of these indexes. Dropping the source before the last event calls `cancel`.
pub(crate) fn token_channel(
    prompt_tokens: u32,
    indexes: Range<u32>,
    cancel: impl FnOnce() + Send + 'static,
) -> (TokenSink, TokenSource) {
    let shared = Arc::new(Shared {
        buffer: Mutex::new(Buffer {
            next: indexes.start,
            max_tokens: indexes.end,
            prompt_tokens,
            ..Buffer::default()
        }),
        reader: AtomicWaker::new(),
    });
    let sink = TokenSink { shared: shared.clone(), prompt_tokens };
    (sink, TokenSource { shared, cancel: Some(Box::new(cancel)) })
}

/// What an engine did that its contract forbids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SinkError {
    #[error("tokens from index {got} where {expected} was next")]
    Index { expected: u32, got: u32 },
    #[error("more than the {max_tokens} tokens asked for")]
    TooMany { max_tokens: u32 },
    #[error("{logprobs} log-probabilities of {tokens} tokens")]
    Logprobs { tokens: usize, logprobs: usize },
    #[error("the prompt's tokens from index {got} where {expected} was next, or after its end")]
    Prompt { expected: u32, got: u32 },
    #[error("begun for the second time, or after a token")]
    Started,
    #[error("an event after the last one")]
    Ended,
}

pub(crate) struct TokenSink {
    shared: Arc<Shared>,
    prompt_tokens: u32,
}

pub(crate) struct TokenSource {
    shared: Arc<Shared>,
    cancel: Option<Box<dyn FnOnce() + Send>>,
}

struct Shared {
    buffer: Mutex<Buffer>,
    reader: AtomicWaker,
}

#[derive(Default)]
struct Buffer {
    max_tokens: u32,
    /// Index of the token that comes next.
    next: u32,
    started: bool,
    /// What the cache had, not read yet.
    cached_tokens: Option<u32>,
    prompt_tokens: u32,
    /// Index of the token of the prompt that is told of next.
    told: u32,
    /// Of the prompt's newest tokens, not read yet.
    prompt: Vec<Option<TokenLogprobs>>,
    /// The newest tokens, not read yet.
    tokens: Vec<TokenId>,
    /// Of each of these, or none.
    logprobs: Vec<TokenLogprobs>,
    finish: Option<Finish>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        // Each change is complete in itself, so a panic elsewhere leaves nothing half done.
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TokenSink {
    /// Never waits.
    pub(crate) fn push(&self, event: TokenEvent) -> Result<(), SinkError> {
        let mut buffer = self.shared.lock();
        if buffer.ended {
            return Err(SinkError::Ended);
        }
        match event {
            TokenEvent::Started { .. } if buffer.started => return Err(SinkError::Started),
            TokenEvent::Started { cached_tokens } => {
                buffer.started = true;
                // Tokens come with it: whoever reads is woken once.
                buffer.cached_tokens = Some(cached_tokens);
                return Ok(());
            }
            TokenEvent::Prompt { index, logprobs } => {
                let left = (buffer.prompt_tokens - buffer.told) as usize;
                if buffer.started || index != buffer.told || logprobs.len() > left {
                    return Err(SinkError::Prompt { expected: buffer.told, got: index });
                }
                buffer.told += logprobs.len() as u32;
                buffer.prompt.extend(logprobs);
            }
            TokenEvent::Tokens { index, tokens, logprobs } => {
                // All events of a request have them, or none.
                let counts = [tokens.len(), buffer.tokens.len() + tokens.len()];
                let fits = counts == [logprobs.len(), buffer.logprobs.len() + logprobs.len()];
                let none = logprobs.is_empty() && buffer.logprobs.is_empty();
                if !(fits || none) {
                    let (tokens, logprobs) = (tokens.len(), logprobs.len());
                    return Err(SinkError::Logprobs { tokens, logprobs });
                }
                if index != buffer.next {
                    return Err(SinkError::Index { expected: buffer.next, got: index });
                }
                let left = (buffer.max_tokens - buffer.next) as usize;
                if tokens.len() > left {
                    return Err(SinkError::TooMany { max_tokens: buffer.max_tokens });
                }
                buffer.started = true;
                buffer.next += tokens.len() as u32;
                buffer.tokens.extend(tokens);
                buffer.logprobs.extend(logprobs);
            }
            TokenEvent::Finished(finish) => {
                buffer.finish = Some(finish);
                buffer.ended = true;
            }
        }
        drop(buffer);
        self.shared.reader.wake();
        Ok(())
    }

    /// Ends the request, unless it has ended, with an error that may name the tokens sent so far.
    pub(crate) fn fail(&self, error: impl FnOnce(u32) -> GenerateError) {
        let tokens = self.shared.lock().next;
        let usage =
            Usage { prompt_tokens: self.prompt_tokens, completion_tokens: tokens, ..Usage::default() };
        let finish = Finish { reason: FinishReason::Failed(error(tokens)), usage };
        // An ended one has its last event already.
        let _ = self.push(TokenEvent::Finished(finish));
    }

    /// Whether a token came.
    pub(crate) fn started(&self) -> bool {
        self.shared.lock().started
    }
}

impl Drop for TokenSink {
    fn drop(&mut self) {
        self.fail(|tokens| GenerateError::NodeLost { tokens, reason: "the engine is gone".to_owned() });
    }
}

impl Stream for TokenSource {
    type Item = TokenEvent;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        let this = self.get_mut();
        this.shared.reader.register(context.waker());
        let mut buffer = this.shared.lock();
        if !buffer.prompt.is_empty() {
            let index = buffer.told - buffer.prompt.len() as u32;
            let count = buffer.prompt.len().min(LOGPROB_TOKENS_MAX);
            let logprobs = buffer.prompt.drain(..count).collect();
            return Poll::Ready(Some(TokenEvent::Prompt { index, logprobs }));
        }
        if let Some(cached_tokens) = buffer.cached_tokens.take() {
            return Poll::Ready(Some(TokenEvent::Started { cached_tokens }));
        }
        if !buffer.tokens.is_empty() {
            let index = buffer.next - buffer.tokens.len() as u32;
            let most = if buffer.logprobs.is_empty() { EVENT_TOKENS_MAX } else { LOGPROB_TOKENS_MAX };
            let count = buffer.tokens.len().min(most);
            let told = buffer.logprobs.len().min(count);
            let tokens = buffer.tokens.drain(..count).collect();
            let logprobs = buffer.logprobs.drain(..told).collect();
            return Poll::Ready(Some(TokenEvent::Tokens { index, tokens, logprobs }));
        }
        if let Some(finish) = buffer.finish.take() {
            this.cancel = None;
            return Poll::Ready(Some(TokenEvent::Finished(finish)));
        }
        if buffer.ended { Poll::Ready(None) } else { Poll::Pending }
    }
}

impl Drop for TokenSource {
    fn drop(&mut self) {
        if let Some(cancel) = self.cancel.take() {
            cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{FutureExt, StreamExt};
    use std::sync::atomic::{AtomicU32, Ordering};

    fn tokens(index: u32, tokens: &[TokenId]) -> TokenEvent {
        TokenEvent::Tokens { index, tokens: tokens.to_vec(), logprobs: Vec::new() }
    }

    fn finished(reason: FinishReason) -> TokenEvent {
        TokenEvent::Finished(Finish { reason, usage: Usage::default() })
    }

    #[test]
    fn tokens_coalesce_and_the_end_comes_once() {
        let (sink, mut source) = token_channel(3, 0..8, || panic!("not cancelled"));
        let next = |source: &mut TokenSource| source.next().now_or_never();
        assert_eq!(next(&mut source), None);
        sink.push(tokens(0, &[5])).unwrap();
        sink.push(tokens(1, &[6, 7])).unwrap();
        assert_eq!(next(&mut source), Some(Some(tokens(0, &[5, 6, 7]))));
        sink.push(tokens(3, &[8])).unwrap();
        sink.push(finished(FinishReason::Stop)).unwrap();
        assert_eq!(sink.push(tokens(4, &[9])), Err(SinkError::Ended));
        assert_eq!(next(&mut source), Some(Some(tokens(3, &[8]))));
        assert_eq!(next(&mut source), Some(Some(finished(FinishReason::Stop))));
        assert_eq!(next(&mut source), Some(None));
    }

    #[test]
    fn one_that_goes_on_begins_where_the_other_ended() {
        let started = TokenEvent::Started { cached_tokens: 2 };
        let (sink, source) = token_channel(3, 5..7, || panic!("not cancelled"));
        sink.push(started.clone()).unwrap();
        assert!(sink.started());
        assert_eq!(sink.push(started.clone()), Err(SinkError::Started));
        assert_eq!(sink.push(tokens(0, &[5])), Err(SinkError::Index { expected: 5, got: 0 }));
        sink.push(tokens(5, &[5])).unwrap();
        assert_eq!(sink.push(tokens(6, &[6, 7])), Err(SinkError::TooMany { max_tokens: 7 }));
        sink.push(finished(FinishReason::Stop)).unwrap();
        let events: Vec<TokenEvent> = source.collect().now_or_never().expect("ended");
        assert_eq!(events, [started, tokens(5, &[5]), finished(FinishReason::Stop)]);
    }

    #[test]
    fn what_a_slow_consumer_left_comes_in_events_that_fit_a_frame() {
        let (sink, source) = token_channel(3, 0..10_000, || panic!("not cancelled"));
        for at in 0..100_u32 {
            sink.push(tokens(at * 100, &[7; 100])).unwrap();
        }
        sink.push(finished(FinishReason::Length)).unwrap();
        let events: Vec<TokenEvent> = source.collect().now_or_never().expect("ended");
        let starts: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                TokenEvent::Tokens { index, tokens, .. } => Some((*index, tokens.len())),
                TokenEvent::Prompt { .. } | TokenEvent::Started { .. } | TokenEvent::Finished(_) => None,
            })
            .collect();
        assert_eq!(starts, [(0, 4096), (4096, 4096), (8192, 1808)]);
    }

    fn logprobs(logprob: f32) -> TokenLogprobs {
        TokenLogprobs { logprob, top: vec![(5, -0.5)] }
    }

    #[test]
    fn log_probabilities_stay_with_their_tokens_in_events_that_fit_a_frame() {
        let (sink, source) = token_channel(3000, 0..3000, || panic!("not cancelled"));
        let prompt = |from: u32, to: u32| {
            let logprobs = (from..to).map(|at| (at > 0).then(|| logprobs(-(at as f32))));
            TokenEvent::Prompt { index: from, logprobs: logprobs.collect() }
        };
        let tokens = |from: u32, to: u32| {
            let logprobs = (from..to).map(|at| logprobs(-(at as f32))).collect();
            TokenEvent::Tokens { index: from, tokens: (from..to).collect(), logprobs }
        };
        sink.push(prompt(0, 2000)).unwrap();
        assert_eq!(sink.push(prompt(1999, 2001)), Err(SinkError::Prompt { expected: 2000, got: 1999 }));
        sink.push(prompt(2000, 3000)).unwrap();
        assert_eq!(sink.push(prompt(3000, 3001)), Err(SinkError::Prompt { expected: 3000, got: 3000 }));
        sink.push(TokenEvent::Started { cached_tokens: 0 }).unwrap();
        for at in 0..30 {
            sink.push(tokens(at * 100, at * 100 + 99)).unwrap();
            sink.push(tokens(at * 100 + 99, at * 100 + 100)).unwrap();
        }
        let bare = TokenEvent::Tokens { index: 3000, tokens: vec![1], logprobs: Vec::new() };
        assert_eq!(sink.push(bare), Err(SinkError::Logprobs { tokens: 1, logprobs: 0 }));
        sink.push(finished(FinishReason::Length)).unwrap();
        let events: Vec<TokenEvent> = source.collect().now_or_never().expect("ended");
        let expected = [
            prompt(0, 1024),
            prompt(1024, 2048),
            prompt(2048, 3000),
            TokenEvent::Started { cached_tokens: 0 },
            tokens(0, 1024),
            tokens(1024, 2048),
            tokens(2048, 3000),
            finished(FinishReason::Length),
        ];
        assert_eq!(events, expected);
    }

    #[test]
    fn gaps_and_excess_are_refused_and_a_lost_sink_is_an_event() {
        let (sink, source) = token_channel(3, 0..2, || panic!("not cancelled"));
        assert_eq!(sink.push(tokens(1, &[5])), Err(SinkError::Index { expected: 0, got: 1 }));
        assert_eq!(sink.push(tokens(0, &[5, 6, 7])), Err(SinkError::TooMany { max_tokens: 2 }));
        sink.push(tokens(0, &[5])).unwrap();
        drop(sink);
        let events: Vec<TokenEvent> = source.collect().now_or_never().expect("ended");
        assert_eq!(events.len(), 2);
        assert!(matches!(
            &events[1],
            TokenEvent::Finished(Finish {
                reason: FinishReason::Failed(GenerateError::NodeLost { tokens: 1, .. }),
                usage: Usage { prompt_tokens: 3, completion_tokens: 1, .. }
            })
        ));
    }

    #[test]
    fn only_an_unfinished_one_is_cancelled() {
        static CANCELLED: AtomicU32 = AtomicU32::new(0);
        let cancel = || {
            CANCELLED.fetch_add(1, Ordering::Relaxed);
        };
        let (sink, source) = token_channel(1, 0..2, cancel);
        drop(source);
        assert_eq!(CANCELLED.load(Ordering::Relaxed), 1);
        drop(sink);
        let (sink, mut source) = token_channel(1, 0..2, cancel);
        sink.push(finished(FinishReason::Length)).unwrap();
        assert!(source.next().now_or_never().is_some());
        drop(source);
        assert_eq!(CANCELLED.load(Ordering::Relaxed), 1);
    }
}
