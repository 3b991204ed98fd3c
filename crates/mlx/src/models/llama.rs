//! `model_type: llama`: Llama 2 and 3, SmolLM2 and whatever else shares their layers.

use super::{Dims, Family, StepInput, hand_over};
use crate::{
    attention::Qkv,
    checkpoint::{Checkpoint, LoadError, Tensors},
    kv::{KvPool, KvShape},
    layers::{Between, Compute, Embedding, Linear, RmsNorm},
    rope::{Rope, RopeScaling, wavelengths},
};
use mlx_rs::{Array, error::Result};
use serde::Deserialize;

#[derive(Debug, Deserialize)]
struct Config {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f32,
    vocab_size: u32,
    #[serde(default = "default_theta")]
    rope_theta: f32,
    rope_scaling: Option<RopeScaling>,
    #[serde(default = "default_context")]
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    rope_traditional: bool,
}

fn default_theta() -> f32 {
    10_000.0
}

fn default_context() -> usize {
    2048
}

/// The weights of one model.
#[derive(Debug)]
pub(super) struct Llama {
    compute: Compute,
    dims: Dims,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    rope: Rope,
}

#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    /// Queries, keys and values side by side.
    qkv: Linear,
    output: Linear,
    mlp_norm: RmsNorm,
    /// Gate and up side by side.
    gate_up: Linear,
    down: Linear,
}

pub(super) fn load(
    checkpoint: &mut Checkpoint,
    compute: Compute,
) -> std::result::Result<Box<dyn Family>, LoadError> {
    Ok(Box::new(Llama::load(checkpoint, compute)?))
}

impl Llama {
    pub(super) fn load(
        checkpoint: &mut Checkpoint,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let config: Config = serde_json::from_value(with_flat_rope(checkpoint.config.clone()))
            .map_err(|error| LoadError::Config { reason: error.to_string() })?;
        let heads = config.num_attention_heads;
        let kv_heads = config.num_key_value_heads.unwrap_or(heads);
        let invalid = |reason: String| Err(LoadError::Config { reason });
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return invalid(format!("{heads} attention heads cannot share {kv_heads} key-value heads"));
        }
        if config.rope_traditional {
            return invalid("rope_traditional is true; only false is supported".to_owned());
        }
        let head_dim = config.head_dim.unwrap_or(config.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return invalid(format!("head_dim is {head_dim}; it must be even and not 0"));
        }
        let mut lengths = wavelengths(head_dim, config.rope_theta, config.rope_scaling.as_ref())?;
        let tensors = &mut checkpoint.tensors;
        // Llama 3 GGUF files carry the scaling as a tensor of factors.
        if let Some(factors) = tensors.take_optional("rope_freqs.weight")? {
            let factors = factors.as_dtype(mlx_rs::Dtype::Float32)?;
            for (length, factor) in lengths.iter_mut().zip(factors.as_slice::<f32>()) {
                *length *= factor;
            }
        }
        let table = tensors.weight("model.embed_tokens")?;
        let rows = table.shape().first().copied().unwrap_or(0);
        if i64::from(config.vocab_size) > i64::from(rows) {
            return invalid(format!(
                "vocab_size is {}, but model.embed_tokens has {rows} rows",
                config.vocab_size
            ));
        }
        let embedding = Embedding::load(&table, compute)?;
        let layers = (0..config.num_hidden_layers).map(|index| Layer::load(tensors, index, &config, compute));
        let layers = layers.collect::<std::result::Result<Vec<_>, _>>()?;
        let norm = RmsNorm::load(tensors, "model.norm", config.rms_norm_eps, compute)?;
        let head = if config.tie_word_embeddings {
            embedding.tied_head(compute)?
        } else {
            Linear::load(tensors, &["lm_head".to_owned()], compute)?
        };
        let kv = KvShape {
            layers: config.num_hidden_layers,
            heads: kv_heads as i32,
            head_dim: head_dim as i32,
            dtype: compute.activations,
        };
        let dims = Dims {
            kv,
            heads: heads as i32,
            vocabulary: config.vocab_size,
            context: config.max_position_embeddings,
            scale: (head_dim as f32).powf(-0.5),
        };
        let rope = Rope::new(compute.path, &lengths, dims.scale);
        Ok(Self { compute, dims, embedding, layers, norm, head, rope })
    }

    pub(super) fn limit_context(&mut self, tokens: usize) {
        self.dims.context = self.dims.context.min(tokens);
    }
}

impl Layer {
    fn load(
        tensors: &mut Tensors,
        index: usize,
        config: &Config,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let mut linear = |parts: &[&str]| {
            let names: Vec<_> = parts.iter().map(|part| name(part)).collect();
            Linear::load(tensors, &names, compute)
        };
        let qkv = linear(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?;
        let output = linear(&["self_attn.o_proj"])?;
        let gate_up = linear(&["mlp.gate_proj", "mlp.up_proj"])?;
        let down = linear(&["mlp.down_proj"])?;
        let mut norm = |part: &str| RmsNorm::load(tensors, &name(part), config.rms_norm_eps, compute);
        let attention_norm = norm("input_layernorm")?;
        let mlp_norm = norm("post_attention_layernorm")?;
        Ok(Self { attention_norm, qkv, output, mlp_norm, gate_up, down })
    }
}

/// The configuration with `rope_theta` and `rope_scaling` at the top, where transformers 5 nests both in
/// `rope_parameters`, and without the older `type` beside `rope_type`.
fn with_flat_rope(mut config: serde_json::Value) -> serde_json::Value {
    let nested = config.get("rope_parameters").filter(|value| value.is_object()).cloned();
    let missing =
        |config: &serde_json::Value, key: &str| config.get(key).is_none_or(serde_json::Value::is_null);
    if let Some(nested) = nested {
        if let (true, Some(theta)) = (missing(&config, "rope_theta"), nested.get("rope_theta")) {
            config["rope_theta"] = theta.clone();
        }
        if missing(&config, "rope_scaling") {
            config["rope_scaling"] = nested;
        }
    }
    if let Some(scaling) = config.get_mut("rope_scaling").and_then(serde_json::Value::as_object_mut)
        && scaling.contains_key("rope_type")
    {
        scaling.remove("type");
    }
    config
}

impl Family for Llama {
    fn dims(&self) -> Dims {
        self.dims
    }

    fn forward(&self, input: &StepInput<'_>, kv: &mut KvPool) -> Result<Option<Array>> {
        let (heads, KvShape { heads: kv_heads, head_dim, .. }) = (self.dims.heads, self.dims.kv);
        let count = input.tokens.dim(0);
        let rope = self.rope.at(input.positions)?;
        let mut x = self.embedding.forward(&input.tokens, self.compute.activations)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = Between { norm: Some(&layer.attention_norm), ..Between::default() };
            let product = layer.qkv.forward(&x, normed)?;
            let product = product.reshape(&[count, heads + 2 * kv_heads, head_dim])?;
            let qkv = Qkv { product, heads, kv_heads };
            let last = index + 1 == self.layers.len();
            // Nothing after the last layer's keys and values is needed in the middle of a prompt.
            let wanted = !(last && input.wanted.is_empty());
            let Some(attended) = input.attention.forward(index, &rope, qkv, kv, wanted)? else {
                return Ok(None);
            };
            let (attended, residual) =
                if last { (input.wanted.of(&attended)?, input.wanted.of(&x)?) } else { (attended, x) };
            let onto = |x| Between { added: Some(x), ..Between::default() };
            x = layer.output.forward(&attended, onto(&residual))?;
            let gated = Between { norm: Some(&layer.mlp_norm), gated: true, ..Between::default() };
            x = layer.down.forward(&layer.gate_up.forward(&x, gated)?, onto(&x))?;
            hand_over(index, &x, self.compute.path)?;
        }
        let normed = Between { norm: Some(&self.norm), ..Between::default() };
        Ok(Some(self.head.forward(&x, normed)?))
    }

    fn arrays(&self) -> Vec<&Array> {
        let layers = self.layers.iter().flat_map(|layer| {
            let linears = [&layer.qkv, &layer.output, &layer.gate_up, &layer.down];
            let norms = [layer.attention_norm.array(), layer.mlp_norm.array()];
            linears.into_iter().flat_map(Linear::arrays).chain(norms)
        });
        layers.chain(self.head.arrays()).chain(self.embedding.arrays()).chain([self.norm.array()]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rope_settings_are_found_wherever_transformers_put_them() {
        let check = |rope: serde_json::Value, theta: f32, scaled: bool| {
            let mut config = serde_json::json!({
                "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 9
            });
            config.as_object_mut().unwrap().extend(rope.as_object().unwrap().clone());
            let config: Config = serde_json::from_value(with_flat_rope(config)).unwrap();
            assert_eq!(config.rope_theta, theta);
            let lengths = wavelengths(8, theta, config.rope_scaling.as_ref()).unwrap();
            assert_eq!(lengths != wavelengths(8, theta, None).unwrap(), scaled, "{config:?}");
        };
        check(serde_json::json!({}), 10_000.0, false);
        check(serde_json::json!({ "rope_theta": 5e5, "rope_scaling": null }), 5e5, false);
        let llama3 = serde_json::json!({ "rope_type": "llama3", "type": "llama3", "factor": 8.0, "rope_theta": 5e5,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64 });
        check(serde_json::json!({ "rope_theta": 5e5, "rope_scaling": llama3 }), 5e5, true);
        check(serde_json::json!({ "rope_parameters": llama3 }), 5e5, true);
        check(
            serde_json::json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 1e6 } }),
            1e6,
            false,
        );
    }
}
