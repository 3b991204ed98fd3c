#!/usr/bin/env python3
"""A model of Llama 3.2 1B's shape with random weights, as a folder that mlx-lm and mlx-node load.

    scripts/tools/make_llama_1b.py FOLDER [--bits 4]

bf16, or 4 bits in groups of 64. Needs mlx and mlx-lm; the text that such a model writes is noise, its speed is not.
"""
import argparse
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

SHAPE = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": 128256,
    "rope_theta": 500000.0, "tie_word_embeddings": True, "max_position_embeddings": 131072,
}
GROUP = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=[4, 8])
    arguments = parser.parse_args()
    mx.random.seed(1)
    model = Model(ModelArgs.from_dict(SHAPE))
    model.set_dtype(mx.bfloat16)
    config = {**SHAPE, "torch_dtype": "bfloat16"}
    if arguments.bits:
        nn.quantize(model, GROUP, arguments.bits)
        config["quantization"] = {"group_size": GROUP, "bits": arguments.bits}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(arguments.folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (arguments.folder / "config.json").write_text(json.dumps(config, indent=1))
    # Prompts are given as tokens, so that the tokenizer only has to be one.
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
    (arguments.folder / "tokenizer.json").write_text(json.dumps(tokenizer))


if __name__ == "__main__":
    main()
