//! Model families: one file for each `model_type` turns its configuration into a [`Spec`], from which one decoder is built;
//! and the one place that tells them apart.

#[cfg(test)]
mod convert_tests;
mod decoder;
mod deepseek;
mod experts;
mod gemma2;
mod gemma3;
mod gpt_oss;
mod latent;
mod llama;
mod mistral;
mod mixtral;
mod names;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod spec;
#[cfg(test)]
mod tests;

pub(crate) use names::{Names, StackedName};
pub(crate) use spec::{Heads, Spec};
#[cfg(test)]
pub(crate) use tests::{goldens, weight};

use crate::{
    attention::Attention,
    checkpoint::{Checkpoint, LoadError, Tensors},
    kv::{KvPool, KvShape},
    layers::{Compute, Path, Wanted},
};
use mlx_rs::{Array, error::Result, transforms::async_eval};
use std::{fmt, ops::Range};

/// One step's tokens and what they attend to.
#[derive(Debug)]
pub(crate) struct StepInput<'a> {
    /// The tokens, `[tokens]` of i32; of a part that does not begin with the first layer what the part before made of
    /// them, `[tokens, hidden]`.
    pub(crate) entering: Array,
    /// Position of each token in its sequence; empty where our GPU kernels know it by themselves.
    pub(crate) positions: &'a [i32],
    pub(crate) attention: &'a Attention,
    /// Rows whose next token is wanted.
    pub(crate) wanted: Wanted<'a>,
}

/// The tensors of a family.
pub(crate) trait Family: fmt::Debug {
    fn dims(&self) -> Dims;

    /// Appends the step's tokens and returns the logits `[wanted, vocabulary]` that follow the wanted ones, if any; of a
    /// part that does not end with the last layer what it made of all of them, `[tokens, hidden]`.
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
    /// Whether every layer's [`crate::attention::Look`] is plain.
    pub(crate) plain: bool,
    /// Numbers that a token is between two layers.
    pub(crate) hidden: i32,
    /// The layers that are here.
    pub(crate) part: Part,
}

/// Consecutive layers of a model: the first part begins with the embedding, the last one ends with the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    first: usize,
    past: usize,
    /// Layers of the model.
    of: usize,
}

impl Part {
    /// These layers, at least one.
    pub(crate) fn of(spec: &Spec, layers: &Range<usize>) -> std::result::Result<Self, LoadError> {
        let of = spec.layers.len();
        if layers.is_empty() || layers.end > of {
            let reason = format!("layers {layers:?} were asked for, of a model with {of}");
            return Err(LoadError::Config { reason });
        }
        Ok(Self { first: layers.start, past: layers.end, of })
    }

    pub(crate) fn layers(self) -> Range<usize> {
        self.first..self.past
    }

    pub(crate) fn is_first(self) -> bool {
        self.first == 0
    }

    pub(crate) fn is_last(self) -> bool {
        self.past == self.of
    }

    pub(crate) fn is_whole(self) -> bool {
        self.is_first() && self.is_last()
    }
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

type SpecOf = fn(&serde_json::Value) -> std::result::Result<Spec, LoadError>;

/// Every `model_type`, and what makes a [`Spec`] of its configuration.
const FAMILIES: [(&str, SpecOf); 13] = [
    ("deepseek_v2", deepseek::v2),
    ("deepseek_v3", deepseek::v3),
    ("gemma2", gemma2::spec),
    ("gemma3", gemma3::spec),
    ("gemma3_text", gemma3::spec),
    ("gpt_oss", gpt_oss::spec),
    ("llama", llama::spec),
    ("mistral", mistral::spec),
    ("mixtral", mixtral::spec),
    ("phi3", phi3::spec),
    ("qwen2", qwen2::spec),
    ("qwen3", qwen3::spec),
    ("qwen3_moe", qwen3_moe::spec),
];

/// `model_type`s that can be loaded.
pub const SUPPORTED: [&str; FAMILIES.len()] = {
    let mut names = [""; FAMILIES.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = FAMILIES[at].0;
        at += 1;
    }
    names
};

/// The decoder that a configuration describes.
pub(crate) fn spec(config: &serde_json::Value) -> std::result::Result<Spec, LoadError> {
    let model_type = config.get("model_type").and_then(|value| value.as_str()).unwrap_or("");
    match FAMILIES.iter().find(|(name, _)| *name == model_type) {
        Some((_, spec)) => spec(config),
        None => Err(LoadError::UnsupportedModelType {
            model_type: model_type.to_owned(),
            supported: SUPPORTED.to_vec(),
        }),
    }
}

/// A configuration that cannot be as it is.
pub(crate) fn spec_error(reason: String) -> LoadError {
    LoadError::Config { reason }
}

/// Builds the decoder of a checkpoint, or a part of it.
pub(crate) fn load(
    checkpoint: &mut Checkpoint,
    spec: Spec,
    compute: Compute,
    part: Part,
) -> std::result::Result<Box<dyn Family>, LoadError> {
    load_tensors(&mut checkpoint.tensors, spec, compute, part)
}

/// The same of tensors.
pub(crate) fn load_tensors(
    tensors: &mut Tensors,
    spec: Spec,
    compute: Compute,
    part: Part,
) -> std::result::Result<Box<dyn Family>, LoadError> {
    Ok(Box::new(decoder::Decoder::load(tensors, spec, compute, part)?))
}
