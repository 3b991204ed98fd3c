//! `model_type: qwen3_moe`: Qwen3 with experts in most layers.

use super::{
    qwen3,
    spec::{ExpertsSpec, MlpSpec, Routing, Scores, Spec, parsed},
};
use crate::{checkpoint::LoadError, layers::Gate};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Own {
    num_experts: i32,
    num_experts_per_tok: i32,
    #[serde(default = "one")]
    decoder_sparse_step: usize,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    #[serde(default)]
    norm_topk_prob: bool,
}

fn one() -> usize {
    1
}

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    let (mut spec, own): (Spec, Own) = (qwen3::spec(config)?, parsed(config)?);
    let experts = ExpertsSpec {
        prefix: "mlp",
        router: "gate",
        stacked: "switch_mlp",
        single: ["gate_proj", "up_proj", "down_proj"],
        count: own.num_experts,
        each: own.num_experts_per_tok,
        routing: Routing {
            scores: Scores::SoftmaxOfAll,
            normalized: own.norm_topk_prob,
            factor: 1.0,
            groups: None,
        },
        gate: Gate::Silu,
        shared: None,
    };
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let sparse = own.num_experts > 0 && (index + 1).is_multiple_of(own.decoder_sparse_step.max(1));
        if sparse && !own.mlp_only_layers.contains(&index) {
            layer.mlp = MlpSpec::Experts(experts.clone());
        }
    }
    Ok(spec)
}
