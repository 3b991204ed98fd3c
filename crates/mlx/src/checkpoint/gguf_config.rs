//! Turns a `.gguf` file's metadata into a `config.json`, and its tensor names into Hugging Face's.

use super::{
    LoadError,
    gguf::{Header, Value},
};
use serde_json::json;
use std::{collections::BTreeMap, path::Path};

/// Architectures, as GGUF names them, that this module can translate; each is called as the `model_type` it becomes.
const ARCHITECTURES: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// A file's metadata, with errors that name file and key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Metadata<'a> {
    values: &'a BTreeMap<String, Value>,
    path: &'a Path,
}

impl<'a> Metadata<'a> {
    pub(crate) fn new(header: &'a Header, path: &'a Path) -> Self {
        Self { values: &header.metadata, path }
    }

    pub(crate) fn unsupported(&self, reason: String) -> LoadError {
        LoadError::unsupported(self.path, reason)
    }

    pub(crate) fn damaged(&self, reason: String) -> LoadError {
        LoadError::damaged(self.path, reason)
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, LoadError> {
        self.optional(key, "a text", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<&'a [String]>, LoadError> {
        self.optional(key, "a list of texts", |value| match value {
            Value::Strings(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn ints(&self, key: &str) -> Result<Option<&'a [i64]>, LoadError> {
        self.optional(key, "a list of whole numbers", |value| match value {
            Value::Ints(ints) => Some(ints.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<&'a [f64]>, LoadError> {
        self.optional(key, "a list of numbers", |value| match value {
            Value::Floats(floats) => Some(floats.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.optional(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(crate) fn int(&self, key: &str) -> Result<Option<u32>, LoadError> {
        self.optional(key, "a whole number of 32 bits", |value| match value {
            Value::Int(int) => u32::try_from(*int).ok(),
            _ => None,
        })
    }

    fn float(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.optional(key, "a finite number", |value| match value {
            // The shortest decimal that is this f32: 1e-5, not 9.999999747378752e-6.
            Value::Float32(float) if float.is_finite() => float.to_string().parse().ok(),
            Value::Float64(float) if float.is_finite() => Some(*float),
            Value::Int(int) => Some(*int as f64),
            _ => None,
        })
    }

    pub(crate) fn needed<T>(&self, key: &str, value: Result<Option<T>, LoadError>) -> Result<T, LoadError> {
        value?.ok_or_else(|| self.damaged(format!("its metadata has no {key:?}")))
    }

    fn optional<T>(
        &self,
        key: &str,
        kind: &str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        match get(value) {
            Some(value) => Ok(Some(value)),
            None => {
                let mut found = format!("{value:?}");
                // Cut where a character ends: lists of tokens are long.
                found.truncate(
                    (0..=80.min(found.len())).rev().find(|&at| found.is_char_boundary(at)).unwrap_or(0),
                );
                Err(self.damaged(format!("{key:?} is {found}, not {kind}")))
            }
        }
    }
}

/// Head counts, for putting rows in order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) query: u32,
    pub(crate) key_value: u32,
    /// Whether rows of queries and keys are interleaved, as llama's files have them.
    pub(crate) interleaved: bool,
}

/// The `config.json` that the metadata stands for, without the token ids.
pub(crate) fn config(header: &Header, path: &Path) -> Result<(serde_json::Value, Heads), LoadError> {
    let metadata = Metadata::new(header, path);
    let architecture = metadata.needed("general.architecture", metadata.text("general.architecture"))?;
    if !ARCHITECTURES.contains(&architecture) {
        let (model_type, supported) = (architecture.to_owned(), ARCHITECTURES.to_vec());
        return Err(LoadError::UnsupportedModelType { model_type, supported });
    }
    if let Some(parts) = metadata.int("split.count")?.filter(|&parts| parts > 1) {
        return Err(metadata.unsupported(format!("it is one of {parts} parts; merge them with gguf-split")));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let int = |name: &str| metadata.int(&key(name));
    let size = |name: &str| match metadata.needed(&key(name), int(name))? {
        0 => Err(metadata.damaged(format!("{:?} is 0", key(name)))),
        size => Ok(size),
    };
    if let Some(experts) = int("expert_count")?.filter(|&experts| experts > 0) {
        return Err(metadata.unsupported(format!("a mixture of {experts} experts")));
    }
    let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let kv_heads = int("attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = int("attention.key_length")?.unwrap_or(hidden / heads);
    if kv_heads == 0 || heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
        return Err(
            metadata.damaged(format!("{heads} heads, {kv_heads} of them for keys, of {head_dim} do not fit"))
        );
    }
    if let Some(rotated) = int("rope.dimension_count")?.filter(|&rotated| rotated != head_dim) {
        return Err(metadata.unsupported(format!("rotation of {rotated} of a head's {head_dim} dimensions")));
    }
    if let Some(values) = int("attention.value_length")?.filter(|&values| values != head_dim) {
        return Err(metadata.unsupported(format!("values of {values} with keys of {head_dim} dimensions")));
    }
    let shape =
        |name: &str| header.tensors.iter().find(|tensor| tensor.name == name).map(|tensor| &tensor.shape);
    let vocabulary = shape("token_embd.weight").and_then(|shape| shape.first().copied());
    let epsilon = key("attention.layer_norm_rms_epsilon");

    let config = json!({
        "architectures": [architecture_name(architecture)],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length")?,
        "num_hidden_layers": size("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": metadata.needed(&epsilon, metadata.float(&epsilon))?,
        "rope_theta": metadata.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        "rope_scaling": rope_scaling(&metadata, architecture)?,
        "max_position_embeddings": size("context_length")?,
        "vocab_size": metadata.needed("token_embd.weight", Ok(vocabulary))?,
        "tie_word_embeddings": shape("output.weight").is_none(),
        "attention_bias": shape("blk.0.attn_q.bias").is_some(),
        "mlp_bias": shape("blk.0.ffn_gate.bias").is_some(),
    });
    let interleaved = architecture == "llama";
    Ok((config, Heads { query: heads, key_value: kv_heads, interleaved }))
}

/// As transformers names its class.
fn architecture_name(architecture: &str) -> &'static str {
    match architecture {
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "LlamaForCausalLM",
    }
}

fn rope_scaling(metadata: &Metadata<'_>, architecture: &str) -> Result<serde_json::Value, LoadError> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let factor = metadata.float(&key("scaling.factor"))?;
    Ok(match (metadata.text(&key("scaling.type"))?, factor, metadata.float(&key("scale_linear"))?) {
        (Some("none"), ..) | (None, None, None) => serde_json::Value::Null,
        (Some(kind), factor, _) => json!({
            "rope_type": kind,
            "factor": factor.unwrap_or(1.0),
            "original_max_position_embeddings": metadata.int(&key("scaling.original_context_length"))?,
        }),
        // Before there were types, there was only this one.
        (None, Some(factor), _) | (None, None, Some(factor)) => {
            json!({"rope_type": "linear", "factor": factor})
        }
    })
}

/// Hugging Face's name of a tensor, and the heads whose rows llama's GGUF files interleave. Names without a
/// counterpart stay: `rope_freqs.weight` is one.
pub(crate) fn tensor_name(name: &str, heads: Heads) -> (String, Option<u32>) {
    let (stem, suffix) = name.rsplit_once('.').unwrap_or((name, ""));
    match stem {
        "token_embd" => return (format!("model.embed_tokens.{suffix}"), None),
        "output_norm" => return (format!("model.norm.{suffix}"), None),
        "output" => return (format!("lm_head.{suffix}"), None),
        _ => {}
    }
    let layer = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = layer else { return (name.to_owned(), None) };
    let (part, interleaved) = match part {
        "attn_norm" => ("input_layernorm", None),
        "ffn_norm" => ("post_attention_layernorm", None),
        "attn_q" => ("self_attn.q_proj", Some(heads.query)),
        "attn_k" => ("self_attn.k_proj", Some(heads.key_value)),
        "attn_v" => ("self_attn.v_proj", None),
        "attn_q_norm" => ("self_attn.q_norm", None),
        "attn_k_norm" => ("self_attn.k_norm", None),
        "attn_output" => ("self_attn.o_proj", None),
        "ffn_gate" => ("mlp.gate_proj", None),
        "ffn_up" => ("mlp.up_proj", None),
        "ffn_down" => ("mlp.down_proj", None),
        _ => return (name.to_owned(), None),
    };
    (format!("model.layers.{layer}.{part}.{suffix}"), interleaved.filter(|_| heads.interleaved))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_gguf_names_become_hugging_face_names() {
        let check = |interleaved, name: &str, becomes: &str, heads: Option<u32>| {
            let found = tensor_name(name, Heads { query: 4, key_value: 2, interleaved });
            assert_eq!(found, (becomes.to_owned(), heads), "{name}");
        };
        check(true, "blk.3.attn_k.weight", "model.layers.3.self_attn.k_proj.weight", Some(2));
        check(false, "blk.3.attn_k.weight", "model.layers.3.self_attn.k_proj.weight", None);
        check(false, "blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias", None);
        check(false, "blk.1.attn_q_norm.weight", "model.layers.1.self_attn.q_norm.weight", None);
        check(true, "output_norm.weight", "model.norm.weight", None);
        check(true, "rope_freqs.weight", "rope_freqs.weight", None);
    }
}
