#!/usr/bin/env python3
"""Makes embeddings.json: what transformers computes of some texts with tiny encoders, whose weights both sides make of their
names by one formula (`weights` here, `weight` in crates/mlx/src/models/tests.rs).

    embeddings.py > embeddings.json

Made with transformers 4.55.4 (the Flax models, in f32), each text alone.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import FlaxBertModel, FlaxXLMRobertaModel

VOCABULARY = 40
TEXTS = [[(5 * i * i + 3 * i + n) % (VOCABULARY - 3) + 3 for i in range(length)] for n, length in enumerate([3, 9, 1, 24])]
SHARED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
          "vocab_size": VOCABULARY, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
CASES = [
    ("bert", FlaxBertModel, {"model_type": "bert", "max_position_embeddings": 24, "type_vocab_size": 2, "pad_token_id": 0}),
    ("bert, relu", FlaxBertModel, {"model_type": "bert", "max_position_embeddings": 24, "type_vocab_size": 2,
                                   "pad_token_id": 0, "hidden_act": "relu"}),
    ("xlm-roberta", FlaxXLMRobertaModel, {"model_type": "xlm-roberta", "max_position_embeddings": 26,
                                          "type_vocab_size": 1, "pad_token_id": 1}),
]


def weights(name, shape, center, scale):
    """center + scale * u, u from splitmix64 of FNV-1a of the name plus the element's index, in [-1, 1) with 24 bits."""
    seed = np.uint64(0xCBF29CE484222325)
    with np.errstate(over="ignore"):
        for byte in name.encode():
            seed = (seed ^ np.uint64(byte)) * np.uint64(0x100000001B3)
        z = seed + (np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    return (center + scale * u).astype(np.float32).reshape(shape)


def tensors(config):
    """Names and shapes as such models are published."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    result = {
        "embeddings.word_embeddings.weight": [config["vocab_size"], hidden],
        "embeddings.position_embeddings.weight": [config["max_position_embeddings"], hidden],
        "embeddings.token_type_embeddings.weight": [config["type_vocab_size"], hidden],
    }

    def norm(name):
        result.update({f"{name}.weight": [hidden], f"{name}.bias": [hidden]})

    def linear(name, outputs, inputs):
        result.update({f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]})

    norm("embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            linear(f"{prefix}.attention.self.{part}", hidden, hidden)
        linear(f"{prefix}.attention.output.dense", hidden, hidden)
        norm(f"{prefix}.attention.output.LayerNorm")
        linear(f"{prefix}.intermediate.dense", inner, hidden)
        linear(f"{prefix}.output.dense", hidden, inner)
        norm(f"{prefix}.output.LayerNorm")
    return result


def recipe(name, shape):
    if len(shape) == 1:
        return (1.0, 0.25) if name.endswith("LayerNorm.weight") else (0.0, 0.5)
    return (0.0, round(1.75 / shape[-1] ** 0.5, 4))


def unit(vector):
    return [round(float(number), 7) for number in vector / np.linalg.norm(vector)]


def case(name, family, own):
    config = {**SHARED, **own}
    described = {name: (shape, *recipe(name, shape)) for name, shape in tensors(config).items()}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**config, "architectures": [family.__name__[4:]]}))
        arrays = {name: weights(name, *description) for name, description in described.items()}
        hidden = config["hidden_size"]
        arrays |= {"pooler.dense.weight": np.zeros((hidden, hidden), np.float32), "pooler.dense.bias": np.zeros(hidden, np.float32)}
        save_file(arrays, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        model = family.from_pretrained(folder, from_pt=True)
    result = {"cls": [], "mean": [], "last": []}
    for text in TEXTS:
        states = np.asarray(model(np.array([text]), np.ones((1, len(text)), np.int32)).last_hidden_state)[0]
        for pooling, vector in (("cls", states[0]), ("mean", states.mean(0)), ("last", states[-1])):
            result[pooling].append(unit(vector.astype(np.float64)))
    return {"name": name, "config": config, "tensors": described, "vectors": result}


json.dump({"texts": TEXTS, "cases": [case(*one) for one in CASES]}, sys.stdout)
print()
