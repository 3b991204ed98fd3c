//! One answer as text: token events in, pieces of text and one ending out.

use super::{Detokenizer, StopMatcher};
use crate::error::ApiError;
use futures_util::StreamExt;
use tracing::{info, warn};
use types::{FinishReason, GenerateError, RequestId, TokenEvent, TokenStream};

/// What a token event made of the text.
#[derive(Debug, PartialEq)]
pub(crate) enum TextEvent {
    /// More text; not empty.
    Text(String),
    /// The end.
    Ended(Ending),
}

/// How a text ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ending {
    /// What had been held back; may be empty.
    pub(crate) text: String,
    pub(crate) reason: EndReason,
    pub(crate) usage: TextUsage,
}

/// Why a text is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndReason {
    /// The model ended it, or a stop token or string did.
    Stop,
    /// It reached its length.
    Length,
}

/// Tokens read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TextUsage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    /// Tokens of the prompt found in a cache, if the node said so.
    pub(crate) cached_tokens: Option<u32>,
}

/// A text being generated. Dropping it cancels the request.
pub(crate) struct Output {
    id: RequestId,
    /// None once the text has ended: the request is over or cancelled.
    events: Option<TokenStream>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    prompt_tokens: u32,
    /// As soon as the node said so.
    cached_tokens: Option<u32>,
    tokens: u32,
}

impl Output {
    pub(crate) fn new(
        id: RequestId,
        events: TokenStream,
        detokenizer: Detokenizer,
        stop_strings: &[String],
        prompt_tokens: u32,
    ) -> Self {
        let stops = StopMatcher::new(stop_strings);
        Self { id, events: Some(events), detokenizer, stops, prompt_tokens, cached_tokens: None, tokens: 0 }
    }

    /// The next piece of text; none after the end or an error.
    pub(crate) async fn next(&mut self) -> Option<Result<TextEvent, ApiError>> {
        loop {
            let event = self.events.as_mut()?.next().await;
            let result = self.take(event);
            let ended = !matches!(result, Ok(None | Some(TextEvent::Text(_))));
            if ended {
                self.events = None;
                self.log(&result);
            }
            if let Some(result) = result.transpose() {
                return Some(result);
            }
        }
    }

    fn take(&mut self, event: Option<TokenEvent>) -> Result<Option<TextEvent>, ApiError> {
        match event {
            Some(TokenEvent::Started { cached_tokens }) => {
                self.cached_tokens = Some(cached_tokens);
                Ok(None)
            }
            Some(TokenEvent::Prompt { .. }) => Ok(None),
            Some(TokenEvent::Tokens { index, tokens, .. }) => {
                if index != self.tokens {
                    let message = format!("token {index} came where {} was due", self.tokens);
                    return Err(GenerateError::Engine { message }.into());
                }
                self.take_tokens(&tokens)
            }
            Some(TokenEvent::Finished(finish)) => {
                let usage = TextUsage {
                    prompt_tokens: finish.usage.prompt_tokens,
                    completion_tokens: finish.usage.completion_tokens,
                    cached_tokens: Some(finish.usage.cached_tokens),
                };
                match finish.reason {
                    FinishReason::Stop => self.end(EndReason::Stop, usage).map(Some),
                    FinishReason::Length => self.end(EndReason::Length, usage).map(Some),
                    FinishReason::Cancelled => Err(ApiError::Cancelled),
                    FinishReason::Failed(error) => Err(error.into()),
                }
            }
            None => {
                let message = "its events ended without a last one".to_owned();
                Err(GenerateError::Engine { message }.into())
            }
        }
    }

    /// Token by token, so that those after a stop string are not counted.
    fn take_tokens(&mut self, tokens: &[types::TokenId]) -> Result<Option<TextEvent>, ApiError> {
        let mut text = String::new();
        let mut piece = String::new();
        for &token in tokens {
            self.tokens += 1;
            piece.clear();
            self.detokenizer.push(token, &mut piece).map_err(|message| ApiError::Tokenizer { message })?;
            if piece.is_empty() {
                continue;
            }
            let released = self.stops.push(&piece);
            text.push_str(&released.text);
            if released.stopped {
                return Ok(Some(self.stopped(text)));
            }
        }
        Ok((!text.is_empty()).then_some(TextEvent::Text(text)))
    }

    fn end(&mut self, reason: EndReason, usage: TextUsage) -> Result<TextEvent, ApiError> {
        let mut piece = String::new();
        self.detokenizer.finish(&mut piece).map_err(|message| ApiError::Tokenizer { message })?;
        let released = self.stops.push(&piece);
        let mut text = released.text;
        if released.stopped {
            return Ok(TextEvent::Ended(Ending { text, reason: EndReason::Stop, usage }));
        }
        text.push_str(&self.stops.finish());
        Ok(TextEvent::Ended(Ending { text, reason, usage }))
    }

    fn stopped(&self, text: String) -> TextEvent {
        let usage = TextUsage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.tokens,
            cached_tokens: self.cached_tokens,
        };
        TextEvent::Ended(Ending { text, reason: EndReason::Stop, usage })
    }

    fn log(&self, result: &Result<Option<TextEvent>, ApiError>) {
        let (id, tokens) = (self.id, self.tokens);
        match result {
            Ok(Some(TextEvent::Ended(ending))) => {
                info!(%id, tokens, prompt_tokens = self.prompt_tokens, reason = ?ending.reason, "text ended");
            }
            Ok(_) => {}
            Err(error) => warn!(%id, tokens, %error, "text broke off"),
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.events.is_some() {
            info!(id = %self.id, tokens = self.tokens, "cancelled: the client went away");
        }
    }
}
