//! `model_type: gemma3_text` and the text of `gemma3`: most layers windowed, with rotations of their own, heads of queries
//! and keys normalized.

use super::{
    gemma2::gemma,
    spec::{Shared, Spec, invalid, parsed},
};
use crate::{checkpoint::LoadError, rope::Waves};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Own {
    #[serde(default = "scalar_default")]
    query_pre_attn_scalar: f32,
    #[serde(default = "local_default")]
    rope_local_base_freq: f32,
    #[serde(default = "pattern_default")]
    sliding_window_pattern: usize,
}

fn scalar_default() -> f32 {
    256.0
}

fn local_default() -> f32 {
    10_000.0
}

fn pattern_default() -> usize {
    6
}

/// What `config.json`s leave out: a `text_config` lists only what differs from these.
fn defaults() -> [(&'static str, Value); 9] {
    [
        ("num_attention_heads", 8.into()),
        ("num_key_value_heads", 4.into()),
        ("head_dim", 256.into()),
        ("rms_norm_eps", 1e-6.into()),
        ("vocab_size", 262_208.into()),
        ("rope_theta", 1e6.into()),
        ("max_position_embeddings", 131_072.into()),
        ("sliding_window", 4096.into()),
        ("hidden_size", 2304.into()),
    ]
}

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    let text = match config.get("text_config") {
        Some(Value::Object(text)) => text.clone(),
        Some(other) => return invalid(format!("text_config is {other}, not an object")),
        None => config.as_object().cloned().unwrap_or_default(),
    };
    let text = completed(text);
    let (shared, own): (Shared, Own) = (Shared::parse(&text)?, parsed(&text)?);
    let pattern = own.sliding_window_pattern.max(1);
    let windowed = shared.windowed(|index| !(index + 1).is_multiple_of(pattern))?;
    let mut spec = gemma(shared.spec()?, own.query_pre_attn_scalar);
    spec.normed_heads = true;
    // As it was trained: the factor is a bf16.
    spec.embedding_scale = spec.embedding_scale.map(rounded_to_bf16);
    spec.ropes.push(Waves::new(shared.rotated(), own.rope_local_base_freq, None, shared.context())?);
    for (layer, &windowed) in spec.layers.iter_mut().zip(&windowed) {
        layer.rope = usize::from(windowed);
    }
    Ok(spec.with_windows(&windowed, shared.sliding_window))
}

/// The configuration with what it leaves out, and rotations where older versions of transformers have them.
fn completed(mut text: Map<String, Value>) -> Value {
    let of_kind = |text: &Map<String, Value>, kind: &str| {
        text.get("rope_parameters").and_then(|parameters| parameters.get(kind)).cloned()
    };
    if let Some(local) =
        of_kind(&text, "sliding_attention").and_then(|local| local.get("rope_theta").cloned())
    {
        text.entry("rope_local_base_freq").or_insert(local);
    }
    if let Some(global) = of_kind(&text, "full_attention") {
        text.insert("rope_parameters".to_owned(), global);
    } else {
        for (key, value) in defaults() {
            text.entry(key).or_insert(value);
        }
    }
    for (key, value) in defaults().into_iter().filter(|(key, _)| *key != "rope_theta") {
        text.entry(key).or_insert(value);
    }
    Value::Object(text)
}

fn rounded_to_bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    // To even, as hardware does.
    let rounding = 0x7fff + (bits >> 16 & 1);
    f32::from_bits((bits + rounding) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_filled_in() {
        let config = serde_json::json!({ "model_type": "gemma3", "text_config": {
            "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240, "sliding_window": 1024,
            "rope_scaling": { "factor": 8.0, "rope_type": "linear" } } });
        let spec = spec(&config).unwrap();
        assert_eq!((spec.heads.queries, spec.heads.keys, spec.heads.dim), (8, 4, 256));
        let global: Vec<_> = (0..34).filter(|&index| spec.layers[index].window.is_none()).collect();
        assert_eq!(global, [5, 11, 17, 23, 29]);
        assert_eq!(spec.layers[0].window, Some(1024));
        let Spec { ropes, layers, .. } = &spec;
        assert_eq!(ropes[layers[5].rope].lengths[0], 8.0);
        assert_eq!(ropes[layers[0].rope], Waves::new(256, 1e4, None, 1).unwrap());
        assert_eq!(spec.embedding_scale, Some(50.5));
        // transformers 5 has both kinds of rotation in one place.
        let nested = serde_json::json!({ "model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": { "rope_type": "linear", "factor": 8.0, "rope_theta": 1e6 },
                "sliding_attention": { "rope_type": "default", "rope_theta": 1e4 } } });
        assert_eq!(super::spec(&nested).unwrap().ropes, *ropes);
    }
}
