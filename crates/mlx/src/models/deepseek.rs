//! `model_type: deepseek_v2` and `deepseek_v3` (R1 and Kimi K2 are the latter): latent attention, experts after the first
//! layers.

use super::spec::{
    ExpertsSpec, Groups, Heads, LatentSpec, MlpSpec, Projection, Routing, Scores, Shared, Spec, invalid,
    parsed,
};
use crate::{
    checkpoint::LoadError,
    layers::Gate,
    rope::{Waves, yarn_magnitude},
};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Own {
    kv_lora_rank: i32,
    q_lora_rank: Option<i32>,
    qk_rope_head_dim: i32,
    qk_nope_head_dim: i32,
    v_head_dim: i32,
    n_routed_experts: Option<i32>,
    n_shared_experts: Option<i32>,
    num_experts_per_tok: Option<i32>,
    #[serde(default = "one")]
    routed_scaling_factor: f32,
    topk_method: Option<String>,
    n_group: Option<i32>,
    topk_group: Option<i32>,
    norm_topk_prob: Option<bool>,
    moe_layer_freq: Option<usize>,
    #[serde(default)]
    first_k_dense_replace: usize,
    rope_theta: Option<f32>,
}

fn one() -> f32 {
    1.0
}

/// The base of rotations where the configuration names none.
const THETA_DEFAULT: f32 = 10_000.0;

pub(super) fn v2(config: &Value) -> Result<Spec, LoadError> {
    spec(config, false)
}

pub(super) fn v3(config: &Value) -> Result<Spec, LoadError> {
    spec(config, true)
}

fn spec(config: &Value, v3: bool) -> Result<Spec, LoadError> {
    let mut config = config.clone();
    // Of no meaning here: all heads share one latent vector.
    config["num_key_value_heads"] = Value::Null;
    config["head_dim"] = config.get("qk_rope_head_dim").cloned().unwrap_or(Value::Null);
    let (shared, own): (Shared, Own) = (Shared::parse(&config)?, parsed(&config)?);
    let sizes = LatentSpec {
        query_rank: own.q_lora_rank,
        rank: own.kv_lora_rank,
        rotated: own.qk_rope_head_dim,
        unrotated: own.qk_nope_head_dim,
        value: own.v_head_dim,
    };
    if [sizes.rank, sizes.rotated, sizes.unrotated, sizes.value].into_iter().any(|size| size <= 0) {
        return invalid(format!("sizes of latent attention must be above 0: {sizes:?}"));
    }
    let mut spec = shared.spec()?;
    let queries = shared.num_attention_heads;
    spec.heads = Heads { queries, keys: 1, dim: sizes.rotated + sizes.rank };
    spec.projection = Projection::Latent(sizes);
    spec.scale = ((sizes.rotated + sizes.unrotated) as f32).powf(-0.5);
    let scaling = shared.rope_scaling.as_ref();
    if let Some((scaling, all)) = scaling.and_then(|scaling| Some((scaling, scaling.mscale_all_dim?))) {
        spec.scale *= yarn_magnitude(scaling.factor, all).powi(2);
    }
    let theta = own.rope_theta.or(shared.rope_theta).unwrap_or(THETA_DEFAULT);
    spec.ropes = vec![Waves::new(sizes.rotated as usize, theta, scaling, shared.context())?];
    let Some(count) = own.n_routed_experts else { return Ok(spec) };
    let experts = ExpertsSpec {
        prefix: "mlp",
        router: "gate",
        stacked: "switch_mlp",
        single: ["gate_proj", "up_proj", "down_proj"],
        count,
        each: own.num_experts_per_tok.unwrap_or(1),
        routing: routing(&own, v3)?,
        gate: Gate::Silu,
        shared: own.n_shared_experts.map(|_| "shared_experts"),
    };
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let sparse = index.is_multiple_of(own.moe_layer_freq.unwrap_or(1).max(1));
        if sparse && index >= own.first_k_dense_replace {
            layer.mlp = MlpSpec::Experts(experts.clone());
        }
    }
    Ok(spec)
}

fn routing(own: &Own, v3: bool) -> Result<Routing, LoadError> {
    let groups = own.n_group.zip(own.topk_group).filter(|&(count, _)| count > 1);
    let groups = groups.map(|(count, taken)| Groups { count, taken });
    let method = own.topk_method.as_deref();
    let (scores, groups) = match (v3, method) {
        (true, None | Some("noaux_tc")) => (Scores::Sigmoid, groups),
        (false, Some("group_limited_greedy")) => (Scores::SoftmaxOfAll, groups),
        (false, None | Some("greedy" | "gready")) => (Scores::SoftmaxOfAll, None),
        (_, Some(other)) => return invalid(format!("topk_method is {other:?}, which is not known here")),
    };
    let normalized = v3 && own.norm_topk_prob.unwrap_or(true) && own.num_experts_per_tok.unwrap_or(1) > 1;
    Ok(Routing { scores, normalized, factor: own.routed_scaling_factor, groups })
}
