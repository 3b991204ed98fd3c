//! `model_type: gemma2`: scores and logits held within bounds, norms around attention and MLP, every other layer windowed.

use super::spec::{GATE_UP, MlpSpec, Shared, Spec, parsed};
use crate::{checkpoint::LoadError, layers::Gate};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Own {
    #[serde(default = "scalar_default")]
    query_pre_attn_scalar: f32,
    #[serde(default = "score_cap_default")]
    attn_logit_softcapping: Option<f32>,
    #[serde(default = "logit_cap_default")]
    final_logit_softcapping: Option<f32>,
}

fn scalar_default() -> f32 {
    256.0
}

fn score_cap_default() -> Option<f32> {
    Some(50.0)
}

fn logit_cap_default() -> Option<f32> {
    Some(30.0)
}

/// Tokens that windowed layers see where the configuration does not tell.
const WINDOW_DEFAULT: usize = 4096;

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    let (shared, own): (Shared, Own) = (Shared::parse(config)?, parsed(config)?);
    let windowed = shared.windowed(|index| index.is_multiple_of(2))?;
    let window = shared.sliding_window.unwrap_or(WINDOW_DEFAULT);
    let spec = gemma(shared.spec()?, own.query_pre_attn_scalar).with_windows(&windowed, Some(window));
    let (score_cap, logit_cap) = (own.attn_logit_softcapping, own.final_logit_softcapping);
    Ok(Spec { score_cap, logit_cap, ..spec })
}

/// What Gemma 2 and 3 share.
pub(super) fn gemma(mut spec: Spec, query_scalar: f32) -> Spec {
    spec.scale = query_scalar.powf(-0.5);
    spec.norms.one_more = true;
    spec.normed_outputs = true;
    spec.embedding_scale = Some((spec.hidden as f32).sqrt());
    for layer in &mut spec.layers {
        layer.mlp = MlpSpec::Dense { gate_up: GATE_UP, gate: Gate::Gelu };
    }
    spec
}
