//! What texts become as vectors, and who computes that.

use crate::{BoxFuture, GenerateError, RequestId, RouteInfo, Service, TokenId, limits};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The parts of an [`EmbedRequest`], unchecked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EmbedDraft {
    /// Names the request in every log line, frame and span.
    pub id: RequestId,
    /// A served model's name.
    pub model: String,
    /// Texts in tokens, with those that the tokenizer puts around every text; at least one, and none empty.
    pub inputs: Vec<Vec<TokenId>>,
    /// How it is to be served among others.
    pub service: Service,
}

/// Texts whose vectors are wanted: valid by itself; whether each fits the model's context is the node's to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "EmbedDraft", into = "EmbedDraft")]
pub struct EmbedRequest(EmbedDraft);

/// Why a request is invalid by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EmbedRequestError {
    /// None, or more than one answer holds.
    #[error("{count} inputs; there must be from 1 to {}", limits::EMBED_INPUTS_MAX)]
    Inputs {
        /// How many there are.
        count: usize,
    },
    /// Nothing to make a vector of.
    #[error("input {index} is empty")]
    Empty {
        /// Which, from 0.
        index: usize,
    },
    /// Longer than any frame may be.
    #[error("the inputs have {tokens} tokens together; at most {} are allowed", limits::PROMPT_TOKENS_MAX)]
    TooLong {
        /// How many they have.
        tokens: usize,
    },
}

impl EmbedRequest {
    /// Tokens of all inputs.
    pub fn tokens(&self) -> usize {
        self.inputs.iter().map(Vec::len).sum()
    }
}

impl TryFrom<EmbedDraft> for EmbedRequest {
    type Error = EmbedRequestError;

    fn try_from(draft: EmbedDraft) -> Result<Self, EmbedRequestError> {
        let count = draft.inputs.len();
        if !(1..=limits::EMBED_INPUTS_MAX).contains(&count) {
            return Err(EmbedRequestError::Inputs { count });
        }
        if let Some(index) = draft.inputs.iter().position(Vec::is_empty) {
            return Err(EmbedRequestError::Empty { index });
        }
        let request = Self(draft);
        match request.tokens() {
            tokens if tokens > limits::PROMPT_TOKENS_MAX => Err(EmbedRequestError::TooLong { tokens }),
            _ => Ok(request),
        }
    }
}

impl From<EmbedRequest> for EmbedDraft {
    fn from(request: EmbedRequest) -> Self {
        request.0
    }
}

impl std::ops::Deref for EmbedRequest {
    type Target = EmbedDraft;

    fn deref(&self) -> &EmbedDraft {
        &self.0
    }
}

/// What a request's texts became.
#[derive(Clone, PartialEq)]
pub struct Embeddings {
    /// Where that was computed.
    pub route: RouteInfo,
    /// Of each input, as many numbers as the model's card says; each of length 1.
    pub vectors: Vec<Vec<f32>>,
}

impl fmt::Debug for Embeddings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embeddings")
            .field("route", &self.route)
            .field("vectors", &self.vectors.len())
            .finish()
    }
}

/// Whoever makes vectors of texts.
pub trait Embed: Send + Sync + 'static {
    /// The vectors of all inputs, or why there are none. Dropping the future cancels.
    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embeddings, GenerateError>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        let check = |inputs: Vec<Vec<TokenId>>, expected: &str| {
            let draft =
                EmbedDraft { id: RequestId(1), model: "m".to_owned(), inputs, service: Service::default() };
            let said = EmbedRequest::try_from(draft).map(|request| request.tokens().to_string());
            assert_eq!(said.unwrap_or_else(|error| error.to_string()), expected);
        };
        check(vec![vec![1, 2], vec![3]], "3");
        check(Vec::new(), "0 inputs; there must be from 1 to 32");
        check(vec![vec![1]; 33], "33 inputs; there must be from 1 to 32");
        check(vec![vec![1], Vec::new()], "input 1 is empty");
        let long = vec![vec![1; 1 << 20], vec![1]];
        check(long, "the inputs have 1048577 tokens together; at most 1048576 are allowed");
    }
}
