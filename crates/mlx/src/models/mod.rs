//! Model families: one file for each `model_type`, and the one place that tells them apart.

mod llama;
mod mistral;

use crate::{
    attention::Attention,
    checkpoint::{Checkpoint, LoadError},
    kv::{KvShape, KvSlabs, RowWrites, RunWrite},
    layers::Precision,
    rope::RopePath,
};
use mlx_rs::{Array, error::Result};
use std::fmt;

/// One step's tokens and where their keys and values go.
#[derive(Debug)]
pub(crate) struct StepInput<'a> {
    /// `[tokens]`.
    pub(crate) tokens: Array,
    /// Position of each token in its sequence.
    pub(crate) positions: &'a [i32],
    pub(crate) singles: &'a [RowWrites],
    pub(crate) runs: &'a [RunWrite],
    pub(crate) attention: &'a Attention,
    /// Rows whose next token is wanted.
    pub(crate) wanted: &'a [i32],
}

/// The tensors of a family.
pub(crate) trait Family: fmt::Debug {
    fn dims(&self) -> Dims;

    /// Appends the step's tokens and returns the logits `[wanted, vocabulary]` that follow the wanted ones, if any.
    fn forward(&self, input: &StepInput<'_>, kv: &mut KvSlabs) -> Result<Option<Array>>;

    /// All weights, to be evaluated at load.
    fn arrays(&self) -> Vec<&Array>;
}

/// What the engine needs to know of a family.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) kv: KvShape,
    pub(crate) vocabulary: u32,
    pub(crate) context: usize,
    /// Multiplies attention scores.
    pub(crate) scale: f32,
}

/// `model_type`s that can be loaded.
pub const SUPPORTED: [&str; 2] = ["llama", "mistral"];

/// Builds the family that the checkpoint names.
pub(crate) fn load(
    checkpoint: &mut Checkpoint,
    precision: Precision,
    rope: RopePath,
) -> std::result::Result<Box<dyn Family>, LoadError> {
    let model_type = checkpoint.config.get("model_type").and_then(|value| value.as_str()).unwrap_or("");
    match model_type {
        "llama" => llama::load(checkpoint, precision, rope),
        "mistral" => mistral::load(checkpoint, precision, rope),
        other => Err(LoadError::UnsupportedModelType {
            model_type: other.to_owned(),
            supported: SUPPORTED.to_vec(),
        }),
    }
}
