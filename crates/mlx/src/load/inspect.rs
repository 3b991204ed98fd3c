//! What a model is and what this machine can do with it, told by its files' headers: no weight is read.

use super::{KV_SHARE, Placement, element_bytes, kv_memory};
use crate::{
    checkpoint::{self, Checkpoint, LoadError},
    kv::KvShape,
    models,
};
use serde::Serialize;
use std::path::Path;
use types::BLOCK_TOKENS;

/// What there is to know of a model before it is loaded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// Its family, as its configuration names it.
    pub model_type: String,
    /// Layers.
    pub layers: usize,
    /// Numbers that were learned, whatever they are packed into; those of encoders that are not loaded among them.
    pub parameters: u64,
    /// Size of the files that hold the weights.
    pub file_bytes: u64,
    /// Memory that the weights will take here.
    pub weight_bytes: u64,
    /// How weights are packed, most elements first, such as `affine 4 bits, groups of 64` or `dense`.
    pub packings: Vec<String>,
    /// Tokens of context that the model was made for.
    pub context_tokens: usize,
    /// Memory that the keys and values of one token take here.
    pub kv_bytes_per_token: u64,
    /// `gpu` or `cpu`.
    pub device: &'static str,
    /// Whether attention is computed by kernels of our own on a GPU; MLX's are slower.
    pub gpu_kernels: bool,
    /// Memory that there is for weights and KV, where that can be told.
    pub available_bytes: Option<u64>,
    /// Tokens whose keys and values fit beside the weights.
    pub kv_tokens: u64,
}

impl Inspection {
    /// Memory of weights and of that many sequences of `context` tokens.
    pub fn memory_bytes(&self, context: u64, sequences: u64) -> u64 {
        let each = context.next_multiple_of(BLOCK_TOKENS as u64) * self.kv_bytes_per_token;
        self.weight_bytes + sequences * each
    }

    /// Sequences of `context` tokens that fit.
    pub fn sequences(&self, context: u64) -> u64 {
        self.kv_tokens / context.next_multiple_of(BLOCK_TOKENS as u64).max(1)
    }
}

/// Reads what the files at `model`, a folder or a `.gguf` file, say of it, with KV as [`super::LoadSettings::kv_bits`] has it.
///
/// # Errors
/// [`LoadError`], as loading would give it before it reads weights.
pub fn inspect(model: &Path, kv_bits: Option<i32>) -> Result<Inspection, LoadError> {
    let checkpoint = Checkpoint::open(model, &mut |_, _| ())?;
    let spec = models::spec(&checkpoint.config)?.with_kv_bits(kv_bits)?;
    let Placement { on_gpu, activations, dequantize } =
        Placement::of(&checkpoint, super::DeviceChoice::Auto, super::Dequantize::Auto)?;
    let kv = KvShape {
        layers: spec.layers.len(),
        heads: spec.heads.keys,
        head_dim: spec.heads.dim,
        dtype: activations,
        packing: spec.kv_packing,
    };
    let element = element_bytes(activations);
    let sizes = checkpoint.tensors.sizes();
    let weight_bytes = sizes.iter().map(|(_, size)| size.loaded(dequantize, element)).sum();
    let mut packings: Vec<(String, u64)> = Vec::new();
    for (_, size) in &sizes {
        let name = size.packing.map_or_else(|| "dense".to_owned(), |packing| packing.to_string());
        match packings.iter_mut().find(|(known, _)| *known == name) {
            Some((_, elements)) => *elements += size.elements,
            None => packings.push((name, size.elements)),
        }
    }
    packings.sort_by_key(|(_, elements)| std::cmp::Reverse(*elements));
    let free = kv_memory(on_gpu, weight_bytes);
    // On Linux what is free is told before the weights are there.
    let free = if on_gpu || cfg!(target_os = "macos") { free } else { free.saturating_sub(weight_bytes) };
    let kv_bytes_per_token = kv.bytes_per_token();
    let model_type = checkpoint.config.get("model_type").and_then(|name| name.as_str());
    Ok(Inspection {
        model_type: model_type.unwrap_or_default().to_owned(),
        layers: kv.layers,
        parameters: sizes.iter().map(|(_, size)| size.elements).sum(),
        file_bytes: checkpoint.bytes,
        weight_bytes,
        packings: packings.into_iter().map(|(name, _)| name).collect(),
        context_tokens: spec.context,
        kv_bytes_per_token,
        device: if on_gpu { "gpu" } else { "cpu" },
        gpu_kernels: spec.kv_packing.is_none() && spec.kernels_rotate() && crate::kernels::fit(spec.heads),
        available_bytes: checkpoint::available_memory(),
        kv_tokens: ((free as f64 * KV_SHARE) as u64 / kv_bytes_per_token.max(1)) / BLOCK_TOKENS as u64
            * BLOCK_TOKENS as u64,
    })
}
