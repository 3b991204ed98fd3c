//! Model families: one file for each `model_type`, and the one place that tells them apart.

mod llama;
mod mistral;

use crate::{
    attention::Attention,
    checkpoint::{Checkpoint, LoadError},
    kv::{KvPool, KvShape},
    layers::{Compute, Path, Wanted},
};
use mlx_rs::{Array, error::Result, transforms::async_eval};
use std::fmt;

/// One step's tokens and what they attend to.
#[derive(Debug)]
pub(crate) struct StepInput<'a> {
    /// `[tokens]`.
    pub(crate) tokens: Array,
    /// Position of each token in its sequence; empty where our GPU kernels know it by themselves.
    pub(crate) positions: &'a [i32],
    pub(crate) attention: &'a Attention,
    /// Rows whose next token is wanted.
    pub(crate) wanted: Wanted<'a>,
}

/// The tensors of a family.
pub(crate) trait Family: fmt::Debug {
    fn dims(&self) -> Dims;

    /// Appends the step's tokens and returns the logits `[wanted, vocabulary]` that follow the wanted ones, if any.
    fn forward(&self, input: &StepInput<'_>, kv: &mut KvPool) -> Result<Option<Array>>;

    /// All weights, to be evaluated at load.
    fn arrays(&self) -> Vec<&Array>;
}

/// What the engine needs to know of a family.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) kv: KvShape,
    /// Heads of queries.
    pub(crate) heads: i32,
    pub(crate) vocabulary: u32,
    pub(crate) context: usize,
    /// Multiplies attention scores.
    pub(crate) scale: f32,
}

/// Layers after which what was built is handed to the device, which computes while the rest is built. Building a layer
/// takes about 0.1 ms; fewer would pay more for the handing over than they gain.
const LAYERS_PER_HANDOVER: usize = 4;

/// Starts the evaluation of what `x`, the output of layer `index`, depends on, every few layers. On a GPU the step before
/// is still running while this one is built, and a compiled step is built once only.
pub(crate) fn hand_over(index: usize, x: &Array, path: Path) -> Result<()> {
    if path != Path::Kernel && (index + 1).is_multiple_of(LAYERS_PER_HANDOVER) {
        async_eval([x])
    } else {
        Ok(())
    }
}

/// `model_type`s that can be loaded.
pub const SUPPORTED: [&str; 2] = ["llama", "mistral"];

/// Builds the family that the checkpoint names.
pub(crate) fn load(
    checkpoint: &mut Checkpoint,
    compute: Compute,
) -> std::result::Result<Box<dyn Family>, LoadError> {
    let model_type = checkpoint.config.get("model_type").and_then(|value| value.as_str()).unwrap_or("");
    match model_type {
        "llama" => llama::load(checkpoint, compute),
        "mistral" => mistral::load(checkpoint, compute),
        other => Err(LoadError::UnsupportedModelType {
            model_type: other.to_owned(),
            supported: SUPPORTED.to_vec(),
        }),
    }
}

/// Query heads, key-value heads and the size of each, as far as the configuration tells.
pub(crate) fn heads_of(config: &serde_json::Value) -> Option<Heads> {
    let number = |key: &str| {
        let value = config.get(key).and_then(serde_json::Value::as_i64).filter(|&value| value > 0)?;
        i32::try_from(value).ok()
    };
    let queries = number("num_attention_heads")?;
    let keys = number("num_key_value_heads").unwrap_or(queries);
    let dim = number("head_dim").or_else(|| Some(number("hidden_size")? / queries))?;
    Some(Heads { queries, keys, dim })
}

/// The heads of a model's attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) queries: i32,
    pub(crate) keys: i32,
    pub(crate) dim: i32,
}
