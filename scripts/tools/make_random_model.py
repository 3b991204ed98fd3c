#!/usr/bin/env python3
"""A model of a known shape with random weights, as a folder that mlx-lm and mlx-node load.

    scripts/tools/make_random_model.py FOLDER [--shape llama-1b] [--bits 4] [--layers N]

bf16, or 4 or 8 bits in groups of 64; with --layers the first N layers only. Needs mlx and mlx-lm; the text that such a model
writes is noise, its speed is not.
"""
import argparse
import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

SHAPES = {
    "llama-1b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": 128256,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "llama-8b": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "vocab_size": 128256,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "max_position_embeddings": 131072,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6, "vocab_size": 151936,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "max_position_embeddings": 40960, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}
GROUP = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--bits", type=int, choices=[4, 8])
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = {**shape, "num_hidden_layers": arguments.layers}
    family = importlib.import_module(f"mlx_lm.models.{shape['model_type']}")
    mx.random.seed(1)
    model = family.Model(family.ModelArgs.from_dict(shape))
    model.set_dtype(mx.bfloat16)
    config = {**shape, "torch_dtype": "bfloat16"}
    if arguments.bits:
        nn.quantize(model, GROUP, arguments.bits)
        config["quantization"] = {"group_size": GROUP, "bits": arguments.bits}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    # One at a time: what an array is made of is larger than the array.
    for array in weights.values():
        mx.eval(array)
    mx.save_safetensors(str(arguments.folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (arguments.folder / "config.json").write_text(json.dumps(config, indent=1))
    # Prompts are given as tokens, so that the tokenizer only has to be one.
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
    (arguments.folder / "tokenizer.json").write_text(json.dumps(tokenizer))


if __name__ == "__main__":
    main()
