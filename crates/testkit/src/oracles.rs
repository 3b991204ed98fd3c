//! Checks of token events: whatever produced them, a stream has one shape.

use std::collections::BTreeMap;
use types::{Finish, RequestId, TokenEvent, TokenId, TokenLogprobs};

/// How a stream of token events broke its contract.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StreamFault {
    /// Something came after the last event.
    #[error("{event} came after {finish}")]
    AfterEnd {
        /// What came.
        event: String,
        /// The end that it came after.
        finish: String,
    },
    /// An index was left out or came twice.
    #[error("tokens at index {index} came where {expected} was due")]
    Index {
        /// What came.
        index: u32,
        /// What was due.
        expected: u32,
    },
    /// It began twice, or after a token.
    #[error("it began, after {tokens} tokens, again")]
    Started {
        /// Tokens that had come.
        tokens: u32,
    },
    /// Tokens of the prompt were told of in another order, or too late.
    #[error("token {index} of the prompt came where {expected} was due, or after the prompt was read")]
    Prompt {
        /// What came.
        index: u32,
        /// What was due.
        expected: u32,
    },
    /// Some tokens have log-probabilities and others not.
    #[error("{logprobs} log-probabilities came with {tokens} tokens at index {index}")]
    Logprobs {
        /// Index of the first token.
        index: u32,
        /// Tokens that came.
        tokens: usize,
        /// What came with them.
        logprobs: usize,
    },
    /// An event of no tokens.
    #[error("an event at index {index} holds no tokens")]
    Empty {
        /// Its index.
        index: u32,
    },
    /// The usage does not fit the tokens: an end-of-text token may be counted beside them, nothing else.
    #[error("{finish} does not fit the {tokens} tokens that came")]
    Usage {
        /// The end.
        finish: String,
        /// Tokens that came.
        tokens: u32,
    },
    /// The stream ended without a last event.
    #[error("the stream ended after {tokens} tokens without saying so")]
    NoEnd {
        /// Tokens that came.
        tokens: u32,
    },
}

/// What has come of one request.
#[derive(Debug, Clone, Default, PartialEq)]
struct Stream {
    /// Of the tokens of the prompt that were told of.
    prompt: Vec<Option<TokenLogprobs>>,
    /// Tokens that came with the request.
    given: usize,
    started: bool,
    tokens: Vec<TokenId>,
    /// Of the tokens that were drawn, or none.
    logprobs: Vec<TokenLogprobs>,
    finish: Option<Finish>,
}

impl Stream {
    fn record(&mut self, event: &TokenEvent) -> Result<(), StreamFault> {
        if let Some(finish) = &self.finish {
            let (event, finish) = (format!("{event:?}"), format!("{finish:?}"));
            return Err(StreamFault::AfterEnd { event, finish });
        }
        let expected = self.tokens.len() as u32;
        match event {
            TokenEvent::Prompt { index, logprobs } => {
                let expected = self.prompt.len() as u32;
                if self.started || *index != expected {
                    return Err(StreamFault::Prompt { index: *index, expected });
                }
                if logprobs.is_empty() {
                    return Err(StreamFault::Empty { index: *index });
                }
                self.prompt.extend_from_slice(logprobs);
                Ok(())
            }
            TokenEvent::Started { .. } if self.started => Err(StreamFault::Started { tokens: expected }),
            TokenEvent::Started { .. } => {
                self.started = true;
                Ok(())
            }
            TokenEvent::Tokens { index, .. } if *index != expected => {
                Err(StreamFault::Index { index: *index, expected })
            }
            TokenEvent::Tokens { index, tokens, .. } if tokens.is_empty() => {
                Err(StreamFault::Empty { index: *index })
            }
            TokenEvent::Tokens { index, tokens, logprobs } => {
                let drawn = self.tokens.len() - self.given;
                let all = logprobs.len() == tokens.len() && self.logprobs.len() == drawn;
                let none = logprobs.is_empty() && self.logprobs.is_empty();
                if !all && !none {
                    let (tokens, logprobs) = (tokens.len(), logprobs.len());
                    return Err(StreamFault::Logprobs { index: *index, tokens, logprobs });
                }
                self.started = true;
                self.logprobs.extend_from_slice(logprobs);
                self.tokens.extend_from_slice(tokens);
                Ok(())
            }
            TokenEvent::Finished(finish) => {
                let counted = finish.usage.completion_tokens;
                let fits = counted == expected || counted == expected + 1;
                if !fits || finish.usage.cached_tokens > finish.usage.prompt_tokens {
                    return Err(StreamFault::Usage { finish: format!("{finish:?}"), tokens: expected });
                }
                self.finish = Some(finish.clone());
                Ok(())
            }
        }
    }
}

/// Checks a whole stream: gapless indexes, exactly one end, nothing after it. Returns its tokens and its end.
///
/// # Errors
/// The first [`StreamFault`].
pub fn check_stream(events: &[TokenEvent]) -> Result<(Vec<TokenId>, Finish), StreamFault> {
    let mut stream = Stream::default();
    events.iter().try_for_each(|event| stream.record(event))?;
    let tokens = stream.tokens.len() as u32;
    stream.finish.map(|finish| (stream.tokens, finish)).ok_or(StreamFault::NoEnd { tokens })
}

/// Checks many streams as their events come.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    streams: BTreeMap<RequestId, Stream>,
}

impl Streams {
    /// Expects the events of an accepted request.
    ///
    /// # Panics
    /// When it is expected already.
    pub fn accepted(&mut self, id: RequestId) {
        self.accepted_after(id, &[]);
    }

    /// Expects the events of an accepted request that brought a part of its answer.
    ///
    /// # Panics
    /// When it is expected already.
    pub fn accepted_after(&mut self, id: RequestId, output: &[TokenId]) {
        let stream = Stream { tokens: output.to_vec(), given: output.len(), ..Stream::default() };
        assert!(self.streams.insert(id, stream).is_none(), "{id} was accepted twice");
    }

    /// Takes an event.
    ///
    /// # Panics
    /// When it breaks the contract of streams, or belongs to no accepted request.
    pub fn record(&mut self, id: RequestId, event: &TokenEvent) {
        let stream = self.streams.get_mut(&id);
        let stream = stream.unwrap_or_else(|| panic!("{event:?} for {id}, which was not accepted"));
        if let Err(fault) = stream.record(event) {
            panic!("{id}: {fault}");
        }
    }

    /// Tokens of a request so far, those that it brought included; none where it was not accepted.
    pub fn tokens(&self, id: RequestId) -> &[TokenId] {
        self.streams.get(&id).map_or(&[], |stream| &stream.tokens)
    }

    /// What was told of a request's prompt, and of the tokens drawn, so far.
    pub fn logprobs(&self, id: RequestId) -> (&[Option<TokenLogprobs>], &[TokenLogprobs]) {
        self.streams.get(&id).map_or((&[], &[]), |stream| (&stream.prompt, &stream.logprobs))
    }

    /// How a request ended, if it has.
    pub fn finish(&self, id: RequestId) -> Option<&Finish> {
        self.streams.get(&id).and_then(|stream| stream.finish.as_ref())
    }

    /// Requests that have not ended.
    pub fn unfinished(&self) -> Vec<RequestId> {
        self.streams.iter().filter(|(_, stream)| stream.finish.is_none()).map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{FinishReason, Usage};

    #[test]
    fn every_fault_is_named() {
        let tokens = |index, tokens: &[TokenId]| TokenEvent::Tokens {
            index,
            tokens: tokens.to_vec(),
            logprobs: Vec::new(),
        };
        let end = |completion_tokens| {
            let usage = Usage { prompt_tokens: 1, completion_tokens, ..Usage::default() };
            TokenEvent::Finished(Finish { reason: FinishReason::Stop, usage })
        };
        let check = |events: &[TokenEvent], expected: &str| {
            let got = check_stream(events).map(|(tokens, _)| format!("{tokens:?}"));
            let got = got.unwrap_or_else(|fault| fault.to_string());
            assert!(got.contains(expected), "{got:?} lacks {expected:?}");
        };
        check(&[tokens(0, &[7]), tokens(1, &[8, 9]), end(3)], "[7, 8, 9]");
        check(&[tokens(0, &[7]), end(2)], "[7]");
        check(&[end(0)], "[]");
        check(&[], "ended after 0 tokens without");
        check(&[tokens(1, &[7])], "index 1 came where 0 was due");
        check(&[tokens(0, &[7]), tokens(0, &[7])], "index 0 came where 1 was due");
        check(&[tokens(0, &[])], "holds no tokens");
        let started = TokenEvent::Started { cached_tokens: 1 };
        check(&[started.clone(), tokens(0, &[7]), end(1)], "[7]");
        check(&[started.clone(), started.clone()], "after 0 tokens, again");
        check(&[tokens(0, &[7]), started], "after 1 tokens, again");
        let told = TokenLogprobs { logprob: -1.0, top: Vec::new() };
        let prompt = |index| TokenEvent::Prompt { index, logprobs: vec![None, Some(told.clone())] };
        let with = |index, tokens: &[TokenId], count| TokenEvent::Tokens {
            index,
            tokens: tokens.to_vec(),
            logprobs: vec![told.clone(); count],
        };
        let begun = TokenEvent::Started { cached_tokens: 1 };
        check(&[prompt(0), prompt(2), begun.clone(), with(0, &[7], 1), with(1, &[8], 1), end(2)], "[7, 8]");
        check(&[prompt(1)], "token 1 of the prompt came where 0 was due");
        check(&[begun, prompt(0)], "or after the prompt was read");
        check(&[with(0, &[7, 8], 1)], "1 log-probabilities came with 2 tokens");
        check(&[tokens(0, &[7]), with(1, &[8], 1)], "1 log-probabilities came with 1 tokens at index 1");
        check(&[with(0, &[7], 1), tokens(1, &[8])], "0 log-probabilities came with 1 tokens at index 1");
        check(&[end(0), end(0)], "came after");
        check(&[end(0), tokens(0, &[7])], "came after");
        check(&[tokens(0, &[7]), end(3)], "does not fit the 1 tokens");
    }
}
