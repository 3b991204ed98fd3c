//! Where a model's bytes are: in which layers, told by its files' headers.

use super::{Opened, element_bytes, kv_memory};
use crate::{kv::KvShape, models::Names};
use std::ops::Range;

/// Of the memory that is there, the share that weights and KV of a part of a model may take: activations and the system
/// need the rest.
const MEMORY_SHARE: f64 = 0.85;

/// A model's bytes once it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Of each layer.
    pub(crate) layers: Vec<u64>,
    pub(crate) embedding: u64,
    /// Of norm and output layer; where the embedding is that, its bytes again.
    pub(crate) head: u64,
    /// Of a token between two layers.
    pub(crate) hidden: u64,
    /// Of a token's keys and values in one layer.
    pub(crate) kv_per_token: u64,
}

impl Opened {
    /// Where the bytes will be.
    pub(crate) fn layout(&self) -> Layout {
        let tensors = &self.checkpoint.tensors;
        let element = element_bytes(self.compute.activations);
        let names = Names::of(tensors);
        let prefixes: Vec<String> = (0..self.spec.layers.len()).map(|index| names.layer(index)).collect();
        let (embedding_name, norm_name) =
            (format!("{}embed_tokens.", names.model), format!("{}norm.", names.model));
        let head_name = format!("{}.", names.head);
        let tied = self.spec.tied.unwrap_or_else(|| !tensors.contains(&format!("{head_name}weight")));
        let (mut layers, mut embedding, mut head) = (vec![0; prefixes.len()], 0, 0);
        for (name, size) in tensors.sizes() {
            let bytes = size.loaded(self.compute.dequantize, element);
            if let Some(index) = prefixes.iter().position(|prefix| name.starts_with(prefix.as_str())) {
                layers[index] += bytes;
            } else if name.starts_with(&embedding_name) {
                embedding += bytes;
            } else if name.starts_with(&norm_name) || (!tied && name.starts_with(&head_name)) {
                head += bytes;
            }
        }
        if tied {
            head += embedding;
        }
        let kv_per_token = self.kv_bytes_per_token(0..1);
        Layout {
            layers,
            embedding,
            head,
            hidden: element * u64::from(self.spec.hidden.unsigned_abs()),
            kv_per_token,
        }
    }

    /// Bytes of a token's keys and values in these layers.
    pub(crate) fn kv_bytes_per_token(&self, layers: Range<usize>) -> u64 {
        let heads = self.spec.heads;
        let (heads, head_dim) = (heads.keys, heads.dim);
        let (dtype, packing) = (self.compute.activations, self.spec.kv_packing);
        KvShape { layers: layers.len(), heads, head_dim, dtype, packing }.bytes_per_token()
    }

    /// Bytes that there are for weights and KV.
    pub(crate) fn memory_bytes(&self) -> u64 {
        (kv_memory(self.on_gpu, 0) as f64 * MEMORY_SHARE) as u64
    }
}
