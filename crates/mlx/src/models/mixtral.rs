//! `model_type: mixtral`: Mistral's attention over everything, experts in every layer.

use super::spec::{ExpertsSpec, MlpSpec, Routing, Scores, Shared, Spec, parsed};
use crate::{checkpoint::LoadError, layers::Gate};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Own {
    #[serde(default = "eight")]
    num_local_experts: i32,
    #[serde(default = "two")]
    num_experts_per_tok: i32,
}

fn eight() -> i32 {
    8
}

fn two() -> i32 {
    2
}

/// The base of rotations where the configuration names none.
const THETA_DEFAULT: f32 = 1e6;

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    let (mut shared, own): (Shared, Own) = (Shared::parse(config)?, parsed(config)?);
    shared.rope_theta = shared.rope_theta.or(Some(THETA_DEFAULT));
    let mut spec = shared.spec()?.with_windows(&vec![true; shared.num_hidden_layers], shared.sliding_window);
    for layer in &mut spec.layers {
        layer.mlp = MlpSpec::Experts(ExpertsSpec {
            prefix: "block_sparse_moe",
            router: "gate",
            stacked: "switch_mlp",
            single: ["w1", "w3", "w2"],
            count: own.num_local_experts,
            each: own.num_experts_per_tok,
            routing: Routing { scores: Scores::SoftmaxOfTaken, normalized: false, factor: 1.0, groups: None },
            gate: Gate::Silu,
            shared: None,
        });
    }
    Ok(spec)
}
