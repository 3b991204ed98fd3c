//! The seam between scheduling and tensors: what the engine asks of a model, in one forward pass per step.

use std::fmt;
use types::{ModelCard, SamplingParams, TokenId};

/// One sequence inside an engine; never reused while the engine lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// What a model can hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelLimits {
    /// Sequences that may be open at once.
    pub slots: usize,
    /// Tokens of KV that all open sequences together may hold, each rounded up to a multiple of 256; at least the
    /// context of the model's card, so that every valid request fits alone.
    pub kv_tokens: u64,
    /// Bytes of KV a token takes.
    pub kv_bytes_per_token: u64,
}

/// Everything the sampler needs to draw one token of one row.
#[derive(Debug, Clone, Copy)]
pub struct RowSampling<'a> {
    /// How to draw.
    pub params: &'a SamplingParams,
    /// Index in the output of the token to draw: the key of its random number.
    pub position: u32,
    /// The whole prompt, for the repetition penalty.
    pub prompt: &'a [TokenId],
    /// The output so far, for all penalties.
    pub output: &'a [TokenId],
}

/// One sequence's part of a step: tokens appended to its KV, and perhaps a token drawn after the last of them.
///
/// A decode row is a slice of one token that samples; a part of a long prompt is a slice of many that does not.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    /// Whose.
    pub sequence: SequenceId,
    /// Tokens of the sequence already in its KV, which is also the position of `tokens[0]`.
    pub start: usize,
    /// Tokens to append, at least one.
    pub tokens: &'a [TokenId],
    /// Draw the token that follows; none in the middle of a prompt.
    pub sample: Option<RowSampling<'a>>,
}

/// Why a model could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// One sequence cannot go on; the others can.
    #[error("{message}")]
    Sequence {
        /// Whose fault it is.
        sequence: SequenceId,
        /// What happened.
        message: String,
    },
    /// The backend failed; nothing that the model holds can be trusted, and its process should end.
    #[error("the model's backend failed: {0}")]
    Backend(String),
}

/// A model with the KV of its open sequences. All calls come from one thread.
///
/// Contract: `open` before the first slice of a sequence, slices of a sequence in order and without gaps
/// (`start` equals the tokens appended so far), `close` exactly once. A step's slices name different sequences.
pub trait Model: fmt::Debug {
    /// What this model is.
    fn card(&self) -> &ModelCard;

    /// What it can hold.
    fn limits(&self) -> ModelLimits;

    /// Opens an empty sequence that will not exceed `tokens_max` tokens; its KV grows as slices are appended.
    ///
    /// # Errors
    /// [`ModelError::Sequence`] where no slot is left; the engine keeps it from happening.
    fn open(&mut self, sequence: SequenceId, tokens_max: usize) -> Result<(), ModelError>;

    /// One forward pass over all slices together; returns the drawn token of each slice that samples, in their order.
    ///
    /// # Errors
    /// [`ModelError::Backend`] where the pass failed; [`ModelError::Sequence`] where one of the sequences made it
    /// impossible, with nothing appended for any of them: the engine closes that one and goes on with the others.
    fn step(&mut self, slices: &[Slice<'_>]) -> Result<Vec<TokenId>, ModelError>;

    /// Frees a sequence's KV at once.
    fn close(&mut self, sequence: SequenceId);
}
