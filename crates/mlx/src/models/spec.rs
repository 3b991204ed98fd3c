//! What a `config.json` says of a decoder, whatever its family: each family's file turns its configuration into a
//! [`Spec`], from which [`super::decoder`] builds the layers.

use crate::{
    checkpoint::{LoadError, Packing},
    kv,
    layers::{Gate, Norms},
    rope::{RopeScaling, Waves},
};
use serde::Deserialize;
use serde_json::Value;

/// A decoder: what its layers are made of, before any weight is read.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) heads: Heads,
    pub(crate) hidden: i32,
    pub(crate) vocabulary: u32,
    pub(crate) context: usize,
    /// Multiplies attention scores.
    pub(crate) scale: f32,
    pub(crate) norms: Norms,
    /// Whether what attention and the MLP give is normalized once more before it is added (Gemma).
    pub(crate) normed_outputs: bool,
    /// Whether each head of queries and keys is normalized.
    pub(crate) normed_heads: bool,
    pub(crate) projection: Projection,
    /// Attention scores become `cap · tanh(score / cap)`.
    pub(crate) score_cap: Option<f32>,
    /// Whether there is a sink for each query head.
    pub(crate) sinks: bool,
    pub(crate) layers: Vec<LayerSpec>,
    pub(crate) ropes: Vec<Waves>,
    /// Multiplies what tokens become.
    pub(crate) embedding_scale: Option<f32>,
    /// Logits become `cap · tanh(logit / cap)`.
    pub(crate) logit_cap: Option<f32>,
    /// Whether the output layer is the embedding; where the configuration does not tell, whether there is none.
    pub(crate) tied: Option<bool>,
    /// How keys and values are packed; none where they are kept as they are computed.
    pub(crate) kv_packing: Option<Packing>,
    /// There is no output layer: what the last norm gives is wanted, to make a vector of it.
    pub(crate) headless: bool,
}

/// One layer.
#[derive(Debug, Clone)]
pub(crate) struct LayerSpec {
    /// Which of [`Spec::ropes`].
    pub(crate) rope: usize,
    /// Tokens that it sees, the query's own among them.
    pub(crate) window: Option<usize>,
    pub(crate) mlp: MlpSpec,
}

/// Where queries, keys and values come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Projection {
    /// Weights of these names, side by side.
    Linear(&'static [&'static str]),
    /// A latent vector that keys and values of all heads are made of (multi-head latent attention, arXiv 2405.04434).
    Latent(LatentSpec),
}

/// Sizes of multi-head latent attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LatentSpec {
    /// Of the vector that queries are made of; none where they are made directly.
    pub(crate) query_rank: Option<i32>,
    /// Of the vector that keys and values are made of.
    pub(crate) rank: i32,
    /// Dimensions of a head that are rotated.
    pub(crate) rotated: i32,
    /// And those that are not.
    pub(crate) unrotated: i32,
    /// Dimensions of a head's value.
    pub(crate) value: i32,
}

/// What stands between two layers' attentions.
#[derive(Debug, Clone)]
pub(crate) enum MlpSpec {
    Dense {
        /// Weights of gate and up, side by side.
        gate_up: &'static [&'static str],
        gate: Gate,
    },
    Experts(ExpertsSpec),
}

/// A mixture of experts.
#[derive(Debug, Clone)]
pub(crate) struct ExpertsSpec {
    /// `mlp`, or what the family calls it.
    pub(crate) prefix: &'static str,
    /// The router's weights.
    pub(crate) router: &'static str,
    /// All experts as one tensor of three axes.
    pub(crate) stacked: &'static str,
    /// Gate, up and down of an expert that has tensors of its own.
    pub(crate) single: [&'static str; 3],
    pub(crate) count: i32,
    /// Experts of a token.
    pub(crate) each: i32,
    pub(crate) routing: Routing,
    pub(crate) gate: Gate,
    /// An expert of every token.
    pub(crate) shared: Option<&'static str>,
}

/// How a router's numbers become experts and their weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Routing {
    pub(crate) scores: Scores,
    /// Whether the weights of a token's experts are divided by their sum.
    pub(crate) normalized: bool,
    /// Multiplies weights.
    pub(crate) factor: f32,
    /// Experts in groups, of which only the best are taken.
    pub(crate) groups: Option<Groups>,
}

/// What a weight is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scores {
    /// Softmax over all experts.
    SoftmaxOfAll,
    /// Softmax over those that were taken.
    SoftmaxOfTaken,
    /// A sigmoid each; experts are taken by it plus a bias of their own.
    Sigmoid,
}

/// Groups of experts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups {
    pub(crate) count: i32,
    pub(crate) taken: i32,
}

/// The heads of a model's attention, as its KV has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    pub(crate) queries: i32,
    pub(crate) keys: i32,
    pub(crate) dim: i32,
}

/// What most configurations have, under the names that most have it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Shared {
    pub(crate) hidden_size: i32,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: i32,
    pub(crate) num_key_value_heads: Option<i32>,
    pub(crate) head_dim: Option<i32>,
    pub(crate) rms_norm_eps: f32,
    pub(crate) vocab_size: u32,
    pub(crate) rope_theta: Option<f32>,
    pub(crate) rope_scaling: Option<RopeScaling>,
    pub(crate) max_position_embeddings: Option<usize>,
    pub(crate) tie_word_embeddings: Option<bool>,
    #[serde(default)]
    pub(crate) rope_traditional: bool,
    pub(crate) partial_rotary_factor: Option<f32>,
    pub(crate) sliding_window: Option<usize>,
    pub(crate) layer_types: Option<Vec<String>>,
}

/// Where a configuration names no base of rotations.
const THETA_DEFAULT: f32 = 10_000.0;
/// Where it names no context.
const CONTEXT_DEFAULT: usize = 2048;
/// Gate and up of most families.
pub(crate) const GATE_UP: &[&str] = &["mlp.gate_proj", "mlp.up_proj"];
/// Queries, keys and values of most families.
pub(crate) const QKV: &[&str] = &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];

impl Shared {
    pub(crate) fn parse(config: &Value) -> Result<Self, LoadError> {
        let shared: Self = parsed(&with_flat_rope(config.clone()))?;
        let Self { num_attention_heads: heads, hidden_size, .. } = shared;
        let kv_heads = shared.num_key_value_heads.unwrap_or(heads);
        if heads <= 0 || kv_heads <= 0 || heads % kv_heads != 0 {
            return invalid(format!("{heads} attention heads cannot share {kv_heads} key-value heads"));
        }
        if shared.rope_traditional {
            return invalid("rope_traditional is true; only false is supported".to_owned());
        }
        let dim = shared.head_dim.unwrap_or(hidden_size / heads);
        if dim <= 0 || dim % 2 != 0 {
            return invalid(format!("head_dim is {dim}; it must be even and not 0"));
        }
        if hidden_size <= 0 || shared.num_hidden_layers == 0 {
            let layers = shared.num_hidden_layers;
            return invalid(format!("{layers} layers of hidden_size {hidden_size}; both must be above 0"));
        }
        Ok(shared)
    }

    pub(crate) fn context(&self) -> usize {
        self.max_position_embeddings.unwrap_or(CONTEXT_DEFAULT)
    }

    pub(crate) fn heads(&self) -> Heads {
        let queries = self.num_attention_heads;
        let keys = self.num_key_value_heads.unwrap_or(queries);
        Heads { queries, keys, dim: self.head_dim.unwrap_or(self.hidden_size / queries) }
    }

    /// Dimensions of a head that are rotated.
    pub(crate) fn rotated(&self) -> usize {
        let dim = self.heads().dim as f32;
        (dim * self.partial_rotary_factor.unwrap_or(1.0)) as usize
    }

    pub(crate) fn waves(&self) -> Result<Waves, LoadError> {
        let theta = self.rope_theta.unwrap_or(THETA_DEFAULT);
        Waves::new(self.rotated(), theta, self.rope_scaling.as_ref(), self.context())
    }

    /// Whether each layer's attention is windowed: as `layer_types` says, or else `otherwise`.
    pub(crate) fn windowed(&self, otherwise: impl Fn(usize) -> bool) -> Result<Vec<bool>, LoadError> {
        let Some(types) = &self.layer_types else {
            return Ok((0..self.num_hidden_layers).map(otherwise).collect());
        };
        if types.len() != self.num_hidden_layers {
            let (given, layers) = (types.len(), self.num_hidden_layers);
            return invalid(format!("layer_types has {given} entries for {layers} layers"));
        }
        let windowed = |kind: &String| match kind.as_str() {
            "sliding_attention" => Ok(true),
            "full_attention" => Ok(false),
            other => {
                invalid(format!("layer_types has {other:?}; supported: full_attention, sliding_attention"))
            }
        };
        types.iter().map(windowed).collect()
    }

    /// The decoder that Llama is; families change what differs.
    pub(crate) fn spec(&self) -> Result<Spec, LoadError> {
        let heads = self.heads();
        let layer =
            LayerSpec { rope: 0, window: None, mlp: MlpSpec::Dense { gate_up: GATE_UP, gate: Gate::Silu } };
        Ok(Spec {
            heads,
            hidden: self.hidden_size,
            vocabulary: self.vocab_size,
            context: self.context(),
            scale: (heads.dim as f32).powf(-0.5),
            norms: Norms { eps: self.rms_norm_eps, one_more: false },
            normed_outputs: false,
            normed_heads: false,
            projection: Projection::Linear(QKV),
            score_cap: None,
            sinks: false,
            layers: vec![layer; self.num_hidden_layers],
            ropes: vec![self.waves()?],
            embedding_scale: None,
            logit_cap: None,
            tied: self.tie_word_embeddings,
            kv_packing: None,
            headless: false,
        })
    }
}

impl Spec {
    /// Gives windowed layers their window; one that holds the whole context is none.
    pub(crate) fn with_windows(mut self, windowed: &[bool], window: Option<usize>) -> Self {
        let window = window.filter(|&window| window < self.context);
        for (layer, &windowed) in self.layers.iter_mut().zip(windowed) {
            layer.window = window.filter(|_| windowed);
        }
        self
    }

    /// The same within a shorter context, in which some windows hide nothing.
    pub(crate) fn within(mut self, context: usize) -> Self {
        self.context = self.context.min(context);
        let context = self.context;
        for layer in &mut self.layers {
            layer.window = layer.window.filter(|&window| window < context);
        }
        self
    }

    /// The same with keys and values packed into so many bits, where that is asked for.
    pub(crate) fn with_kv_bits(mut self, bits: Option<i32>) -> Result<Self, LoadError> {
        let packing = bits.map(|bits| kv::packing(bits, self.heads.dim)).transpose();
        self.kv_packing = packing.map_err(|reason| LoadError::Config { reason })?;
        Ok(self)
    }

    /// Whether every layer sees everything before a token, and scores are what they are.
    pub(crate) fn plain_attention(&self) -> bool {
        let windows = self.layers.iter().any(|layer| layer.window.is_some());
        !windows && self.score_cap.is_none() && !self.sinks
    }

    /// Whether our GPU kernels know such rotations: where only a part of a head is rotated, it must keep its length.
    pub(crate) fn kernels_rotate(&self) -> bool {
        let whole = |waves: &Waves| 2 * waves.lengths.len() == self.heads.dim as usize;
        self.ropes.iter().all(|waves| waves.magnitude == 1.0 || whole(waves))
    }
}

/// A family's own part of a configuration.
pub(crate) fn parsed<T: for<'a> Deserialize<'a>>(config: &Value) -> Result<T, LoadError> {
    T::deserialize(config).map_err(|error| LoadError::Config { reason: error.to_string() })
}

pub(crate) fn invalid<T>(reason: String) -> Result<T, LoadError> {
    Err(LoadError::Config { reason })
}

/// The configuration with `rope_theta` and `rope_scaling` at the top, where transformers 5 nests both in
/// `rope_parameters`, and without the older `type` beside `rope_type`. A scaling finds the original context beside it.
fn with_flat_rope(mut config: Value) -> Value {
    let nested = config.get("rope_parameters").filter(|value| value.is_object()).cloned();
    let missing = |config: &Value, key: &str| config.get(key).is_none_or(Value::is_null);
    if let Some(nested) = nested {
        for key in ["rope_theta", "partial_rotary_factor"] {
            if let (true, Some(value)) = (missing(&config, key), nested.get(key)) {
                config[key] = value.clone();
            }
        }
        if missing(&config, "rope_scaling") {
            config["rope_scaling"] = nested;
        }
    }
    let original = config.get("original_max_position_embeddings").cloned();
    if let Some(scaling) = config.get_mut("rope_scaling").and_then(Value::as_object_mut) {
        if scaling.contains_key("rope_type") {
            scaling.remove("type");
        }
        if let (Some(original), false) = (original, scaling.contains_key("original_max_position_embeddings"))
        {
            scaling.insert("original_max_position_embeddings".to_owned(), original);
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rope_settings_are_found_wherever_transformers_put_them() {
        let check = |rope: Value, theta: f32, scaled: bool| {
            let mut config = serde_json::json!({
                "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 9
            });
            config.as_object_mut().unwrap().extend(rope.as_object().unwrap().clone());
            let found = Shared::parse(&config).unwrap().waves().unwrap();
            let plain = Waves::new(8, theta, None, 2048).unwrap();
            assert_eq!(found != plain, scaled, "{config}");
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
