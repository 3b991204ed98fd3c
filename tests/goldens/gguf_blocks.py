#!/usr/bin/env python3
"""Makes gguf_blocks.json: blocks of made-up bytes of GGUF's kinds, and the values that they stand for.

    gguf_blocks.py > gguf_blocks.json

Made with the PyPI package gguf 0.19.0, llama.cpp's own reader.
"""
import json

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

# Kind, bytes of a block, elements of it, where its f16 numbers are.
KINDS = [
    ("Q5_0", 22, 32, [0]),
    ("Q5_1", 24, 32, [0, 2]),
    ("Q2_K", 84, 256, [80, 82]),
    ("Q3_K", 110, 256, [108]),
    ("Q4_K", 144, 256, [0, 2]),
    ("Q5_K", 176, 256, [0, 2]),
    ("Q6_K", 210, 256, [208]),
]

goldens = []
for seed, (name, size, elements, halves) in enumerate(KINDS):
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (512 // elements, size), dtype=np.uint8)
    for at in halves:
        numbers = (random.uniform(0.001, 0.01, len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = numbers.view(np.uint8).reshape(-1, 2)
    values = dequantize(blocks.reshape(2, -1), Kind[name]).reshape(-1)
    goldens.append({"kind": name, "hex": blocks.tobytes().hex(), "values": [float(f"{x:.7g}") for x in values]})
print("[\n" + ",\n".join(json.dumps(golden) for golden in goldens) + "\n]")
