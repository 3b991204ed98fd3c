//! `model_type: gpt_oss`: experts in MXFP4, a sink beside each head's scores, every other layer windowed.

use super::spec::{ExpertsSpec, MlpSpec, Routing, Scores, Shared, Spec, parsed};
use crate::{checkpoint::LoadError, layers::Gate};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Own {
    num_local_experts: i32,
    #[serde(alias = "experts_per_token")]
    num_experts_per_tok: i32,
}

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    let (shared, own): (Shared, Own) = (Shared::parse(config)?, parsed(config)?);
    let windowed = shared.windowed(|index| index.is_multiple_of(2))?;
    let mut spec = shared.spec()?.with_windows(&windowed, shared.sliding_window);
    spec.sinks = true;
    for layer in &mut spec.layers {
        layer.mlp = MlpSpec::Experts(ExpertsSpec {
            prefix: "mlp",
            router: "router",
            stacked: "experts",
            single: ["gate_proj", "up_proj", "down_proj"],
            count: own.num_local_experts,
            each: own.num_experts_per_tok,
            routing: Routing { scores: Scores::SoftmaxOfTaken, normalized: false, factor: 1.0, groups: None },
            gate: Gate::Clamped,
            shared: None,
        });
    }
    Ok(spec)
}
