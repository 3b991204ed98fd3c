//! What a client wants generated, checked once where it enters.

use crate::{RequestId, SamplingParams, TokenId, limits};
use serde::{Deserialize, Serialize};

/// The parts of a [`GenerateRequest`], unchecked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateDraft {
    /// Names the request in every log line, frame and span.
    pub id: RequestId,
    /// A served model's name.
    pub model: String,
    /// The prompt; not empty.
    pub prompt: Vec<TokenId>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Tokens to generate at most; at least 1.
    pub max_tokens: u32,
    /// Tokens that end the text, beside the model's own.
    pub stop_tokens: Vec<TokenId>,
    /// Go on past the model's end-of-text tokens.
    pub ignore_eos: bool,
}

/// A request that is valid by itself; whether it fits a model's context is the engine's to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "GenerateDraft", into = "GenerateDraft")]
pub struct GenerateRequest(GenerateDraft);

/// Why a request is invalid by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GenerateRequestError {
    /// Nothing to go on from.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Longer than any frame may be.
    #[error("the prompt has {tokens} tokens; at most {} are allowed", limits::PROMPT_TOKENS_MAX)]
    PromptTooLong {
        /// Tokens given.
        tokens: usize,
    },
    /// Nothing, or too much, to generate.
    #[error("max_tokens is {value}; it must be from 1 to {}", limits::NEW_TOKENS_MAX)]
    MaxTokens {
        /// The value given.
        value: u32,
    },
    /// Too many stop tokens.
    #[error("{count} stop tokens; at most {} are allowed", limits::STOP_TOKENS_MAX)]
    StopTokens {
        /// Tokens given.
        count: usize,
    },
}

impl TryFrom<GenerateDraft> for GenerateRequest {
    type Error = GenerateRequestError;

    fn try_from(draft: GenerateDraft) -> Result<Self, GenerateRequestError> {
        if draft.prompt.is_empty() {
            return Err(GenerateRequestError::EmptyPrompt);
        }
        if draft.prompt.len() > limits::PROMPT_TOKENS_MAX {
            return Err(GenerateRequestError::PromptTooLong { tokens: draft.prompt.len() });
        }
        if draft.max_tokens == 0 || draft.max_tokens > limits::NEW_TOKENS_MAX {
            return Err(GenerateRequestError::MaxTokens { value: draft.max_tokens });
        }
        if draft.stop_tokens.len() > limits::STOP_TOKENS_MAX {
            return Err(GenerateRequestError::StopTokens { count: draft.stop_tokens.len() });
        }
        Ok(Self(draft))
    }
}

impl From<GenerateRequest> for GenerateDraft {
    fn from(request: GenerateRequest) -> Self {
        request.0
    }
}

impl std::ops::Deref for GenerateRequest {
    type Target = GenerateDraft;

    fn deref(&self) -> &GenerateDraft {
        &self.0
    }
}
