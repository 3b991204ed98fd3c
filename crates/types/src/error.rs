//! Why a request ended without its text: one enum from the engine to the HTTP status.

use serde::{Deserialize, Serialize};

/// Why a request was refused or broke off. `api` maps each to an HTTP status in one file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum GenerateError {
    /// The request itself is wrong (400).
    #[error("{message}")]
    Invalid {
        /// What is wrong, with the value.
        message: String,
        /// The parameter, as OpenAI names it.
        param: Option<String>,
    },
    /// No node serves that model (404).
    #[error("the model {model:?} does not exist; this cluster serves: {}", if served.is_empty() { "none".to_owned() } else { served.join(", ") })]
    UnknownModel {
        /// The name asked for.
        model: String,
        /// The names served now.
        served: Vec<String>,
    },
    /// Prompt and requested tokens do not fit the model's context (400).
    #[error(
        "the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, but the model's context is {context_tokens} tokens"
    )]
    ContextExceeded {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens asked for.
        max_tokens: u32,
        /// Tokens that fit.
        context_tokens: u32,
    },
    /// Every queue that could take it is full (429 with `Retry-After`).
    #[error("all nodes are busy; try again in {} s", retry_after_ms.div_ceil(1000))]
    Busy {
        /// When a place is expected.
        retry_after_ms: u64,
    },
    /// No node is there, ready or willing (503).
    #[error("no node can serve {model:?} now: {reason}")]
    Unavailable {
        /// The model asked for.
        model: String,
        /// What the nodes lack.
        reason: String,
    },
    /// The node was lost in the middle of the text (502, or an error event in a stream).
    #[error("the node serving this request was lost after {tokens} tokens: {reason}")]
    NodeLost {
        /// Tokens that had been sent.
        tokens: u32,
        /// What was seen of it.
        reason: String,
    },
    /// The engine failed on this request (500).
    #[error("the engine failed: {message}")]
    Engine {
        /// What it said.
        message: String,
    },
}

impl GenerateError {
    /// Whether another node may well succeed where this one did not.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Busy { .. } | Self::Unavailable { .. } | Self::NodeLost { .. } | Self::Engine { .. } => {
                true
            }
            // A node that lost a model since the router last heard of it; another may have it.
            Self::UnknownModel { .. } => true,
            Self::Invalid { .. } | Self::ContextExceeded { .. } => false,
        }
    }
}
