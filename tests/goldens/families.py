#!/usr/bin/env python3
"""Makes families.json: what mlx-lm computes for tiny models of every family, with weights that both sides make of their
names by one formula (`weights` here, `weight` in crates/mlx/src/models/tests.rs).

    families.py > families.json

Made with mlx-lm 0.32.2 on MLX 0.32.2 (CPU device). Where mlx-lm knows no window that the original implementation has
(Mistral, Phi-3, Gemma 2, Qwen2), each layer is given the mask here.
"""
import importlib
import json
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import QuantizedKVCache

# mlx-lm 0.32.2 names an argument that MLX 0.32.2 does not have yet, as none.
gather_qmm = mx.gather_qmm
mx.gather_qmm = lambda *arguments, global_scale=None, **named: gather_qmm(*arguments, **named)

VOCABULARY = 64
TOKENS = [(7 * i * i + 3 * i + 5) % VOCABULARY for i in range(80)]
POSITIONS = [0, 31, 40, 79]


def weights(name, shape, center, scale):
    """center + scale * u, u from splitmix64 of FNV-1a of the name plus the element's index, in [-1, 1) with 24 bits."""
    seed = np.uint64(0xCBF29CE484222325)
    with np.errstate(over="ignore"):
        for byte in name.encode():
            seed = (seed ^ np.uint64(byte)) * np.uint64(0x100000001B3)
        count = int(np.prod(shape))
        z = seed + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    return mx.array((center + scale * u).astype(np.float32).reshape(shape))


def recipe(name, shape, gemma):
    """Center and scale of a tensor's elements."""
    if len(shape) == 1:
        if "norm" in name:
            return (0.0, 0.25) if gemma else (1.0, 0.25)
        return (0.0, 0.5)
    return (0.0, round(1.75 / shape[-1] ** 0.5, 4))


def published(parameters, config, stacked):
    """Names and shapes as a model's authors publish them, of mlx-lm's; `stacked`: as MLX's tools write them."""
    if stacked:
        return {name: list(array.shape) for name, array in parameters}
    single = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"} if config["model_type"] == "mixtral" else {}
    result = {}
    for name, array in parameters:
        shape = list(array.shape)
        if ".switch_mlp." in name:
            before, part = name.split(".switch_mlp.")
            part, end = part.split(".")
            for expert in range(shape[0]):
                result[f"{before}.experts.{expert}.{single.get(part, part)}.{end}"] = shape[1:]
        elif ".embed_q." in name:
            heads, rank, unrotated = shape
            rows = heads * (unrotated + config["v_head_dim"])
            result[name.replace("embed_q", "kv_b_proj")] = [rows, rank]
        elif ".unembed_out." not in name:
            result[name] = shape
    return result


class Windowed:
    def __init__(self, attention, window):
        self.attention, self.window = attention, window

    def __call__(self, x, mask=None, cache=None):
        return self.attention(x, create_causal_mask(x.shape[1], window_size=self.window), cache)


def case(name, config, windows=(), quantization=None, overrides=None, stacked=None, kv=None):
    module = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{module}")
    # Nothing of mlx-lm's own may change what is written.
    model = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config))))
    stacked = quantization is not None if stacked is None else stacked
    gemma = config["model_type"].startswith("gemma")
    tensors = {
        tensor: [shape, *recipe(tensor, shape, gemma)]
        for tensor, shape in published(tree_flatten(model.parameters()), config, stacked).items()
    }
    made = {tensor: weights(tensor, *description) for tensor, description in tensors.items()}
    if hasattr(model, "sanitize") and not stacked:
        made = model.sanitize(made)
    elif gemma and hasattr(model, "sanitize"):
        model.sanitize(dict(made))
    model.load_weights(list(made.items()), strict=True)
    result = {"name": name, "config": dict(config), "tensors": tensors}
    if quantization is not None:
        overrides = overrides or {}
        packed = {}

        def predicate(path, layer):
            parameters = overrides.get(path, quantization)
            if not hasattr(layer, "to_quantized") or not parameters:
                return False
            packed[path] = parameters
            return parameters

        nn.quantize(model, class_predicate=predicate)
        result["packed"] = packed
        result["config"]["quantization"] = {**quantization, **overrides}
    layers = model.layers
    for index, window in dict(windows).items():
        layers[index].self_attn = Windowed(layers[index].self_attn, window)
    if kv is not None:
        bits, group_size = kv
        # Ours, not mlx-lm's.
        result["config"]["kv_bits"] = bits
        caches = [QuantizedKVCache(group_size=group_size, bits=bits) for _ in layers]
        logits = model(mx.array([TOKENS]), cache=caches)[0]
    else:
        logits = model(mx.array([TOKENS]))[0]
    # Not what a wrong formula could give as well: every token has a say.
    assert mx.all(mx.isfinite(logits)).item() and logits.std().item() > 0.1, name
    result["logits"] = [[float(f"{x:.6g}") for x in logits[at].tolist()] for at in POSITIONS]
    return result


BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
LLAMA = {**BASE, "model_type": "llama", "tie_word_embeddings": False}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
GEMMA2 = {
    **BASE,
    "model_type": "gemma2",
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.5,
    "final_logit_softcapping": 3.0,
    "sliding_window": 24,
}
GEMMA3 = {
    **BASE,
    "model_type": "gemma3_text",
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "num_hidden_layers": 4,
    "sliding_window": 24,
    "sliding_window_pattern": 3,
    "rope_theta": 100000.0,
    "rope_local_base_freq": 1000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}
MIXTRAL = {
    **BASE,
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    **BASE,
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "tie_word_embeddings": False,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
GPT_OSS = {
    **BASE,
    "model_type": "gpt_oss",
    "head_dim": 16,
    "intermediate_size": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_scaling": YARN,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    **BASE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "rope_scaling": {**YARN, "rope_type": "yarn", "mscale": 0.8, "mscale_all_dim": 0.6},
    "tie_word_embeddings": False,
}
V2 = {**DEEPSEEK, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}
V3 = {**DEEPSEEK, "model_type": "deepseek_v3", "topk_method": "noaux_tc", "norm_topk_prob": True}
PHI3 = {**BASE, "model_type": "phi3", "tie_word_embeddings": False}
LONG = {
    **PHI3,
    "tie_word_embeddings": True,
    "head_dim": 16,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 32,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.1, 1.4, 2.0, 3.5, 4.0],
    },
}
QWEN2 = {**BASE, "model_type": "qwen2", "tie_word_embeddings": True}


def affine(bits, group_size=32):
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def cases():
    yield case("llama", {**LLAMA, "rope_scaling": LLAMA3})
    yield case(
        "llama with biases",
        {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    )
    yield case("llama with yarn", {**LLAMA, "rope_scaling": YARN})
    yield case("mistral", {**LLAMA, "model_type": "mistral", "sliding_window": 24}, {0: 24, 1: 24})
    yield case("qwen2", QWEN2)
    yield case(
        "qwen2 with a window",
        {**QWEN2, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        {1: 20},
    )
    yield case("qwen3", {**QWEN2, "model_type": "qwen3", "head_dim": 32})
    yield case("phi3", {**PHI3, "sliding_window": 33}, {0: 33, 1: 33})
    yield case("phi3 with longrope", LONG)
    yield case("gemma2", GEMMA2, {0: 24})
    yield case("gemma3_text", GEMMA3)
    yield case("gemma3", {"model_type": "gemma3", "vocab_size": VOCABULARY, "text_config": GEMMA3}, stacked=True)
    yield case("mixtral", MIXTRAL)
    yield case("qwen3_moe", QWEN3_MOE)
    yield case("gpt_oss", GPT_OSS, stacked=True)
    yield case("deepseek_v2", V2)
    yield case("deepseek_v3", V3)
    yield case("deepseek_v3 without groups", {**V3, "n_group": 1, "topk_group": 1, "q_lora_rank": None})
    for bits, head_dim in [(8, 32), (8, 64), (4, 64)]:
        yield case(f"llama with KV of {head_dim} in {bits} bits", {**LLAMA, "head_dim": head_dim}, kv=(bits, head_dim))
    yield case("gemma3_text with KV in 8 bits", GEMMA3, kv=(8, 32))
    for bits in [2, 3, 4, 5, 6, 8]:
        yield case(f"llama in {bits} bits", LLAMA, quantization=affine(bits, 64 if bits == 4 else 32))
    for mode, group_size, bits in [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]:
        yield case(f"llama in {mode}", LLAMA, quantization={"group_size": group_size, "bits": bits, "mode": mode})
    yield case(
        "llama in bits of its layers' own",
        LLAMA,
        quantization=affine(4),
        overrides={
            "model.embed_tokens": affine(8),
            "lm_head": False,
            "model.layers.0.self_attn.v_proj": affine(6),
            "model.layers.1.mlp.down_proj": affine(8),
        },
    )
    yield case("gemma2 in 4 bits", GEMMA2, {0: 24}, quantization=affine(4))
    yield case(
        "qwen3_moe in 4 bits",
        QWEN3_MOE,
        quantization=affine(4),
        overrides={"model.layers.1.mlp.gate": affine(8, 64)},
    )
    yield case(
        "gpt_oss in mxfp4",
        GPT_OSS,
        quantization=MXFP4,
        overrides={
            f"model.layers.{layer}.{part}": affine(8, 64)
            for layer in range(2)
            for part in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.router"]
        },
    )
    yield case("deepseek_v3 in 4 bits", V3, quantization=affine(4))


def main():
    mx.set_default_device(mx.cpu)
    result = {"tokens": TOKENS, "positions": POSITIONS}
    made = [json.dumps(golden) for golden in cases()]
    print(json.dumps(result)[:-1] + ', "cases": [\n' + ",\n".join(made) + "\n]}")
    print(f"{len(made)} cases", file=sys.stderr)


if __name__ == "__main__":
    main()
