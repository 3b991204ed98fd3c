//! `model_type: phi3`: Phi-3, 3.5 and 4, whose queries, keys and values, and gate and up, are one weight each.

use super::spec::{MlpSpec, Projection, Shared, Spec};
use crate::{checkpoint::LoadError, layers::Gate};
use serde_json::Value;

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    let shared = Shared::parse(config)?;
    let windowed = shared.windowed(|_| true)?;
    let mut spec = shared.spec()?.with_windows(&windowed, shared.sliding_window);
    spec.projection = Projection::Linear(&["self_attn.qkv_proj"]);
    for layer in &mut spec.layers {
        layer.mlp = MlpSpec::Dense { gate_up: &["mlp.gate_up_proj"], gate: Gate::Silu };
    }
    Ok(spec)
}
