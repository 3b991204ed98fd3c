#!/usr/bin/env python3
"""Makes perplexity.json: mlx-lm's perplexity of a fixed text with SmolLM2-135M-Instruct, in f32 and in 8 and 4 bits; and
checks a folder that `mlx-node convert` wrote.

    perplexity.py FOLDER > perplexity.json      FOLDER from scripts/tools/gguf_to_mlx.py
    perplexity.py --check CONVERTED             prints the perplexity with CONVERTED, of any bits

Made with mlx-lm 0.32.2 on MLX 0.32.2 (CPU device).
"""
import json
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load

# Lincoln at Gettysburg, 1863.
TEXT = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, \
and dedicated to the proposition that all men are created equal.

Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so dedicated, can long \
endure. We are met on a great battle-field of that war. We have come to dedicate a portion of that field, as a final resting \
place for those who here gave their lives that that nation might live. It is altogether fitting and proper that we should do \
this.

But, in a larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. The brave men, \
living and dead, who struggled here, have consecrated it, far above our poor power to add or detract. The world will little \
note, nor long remember what we say here, but it can never forget what they did here. It is for us the living, rather, to be \
dedicated here to the unfinished work which they who fought here have thus far so nobly advanced. It is rather for us to be \
here dedicated to the great task remaining before us -- that from these honored dead we take increased devotion to that \
cause for which they gave the last full measure of devotion -- that we here highly resolve that these dead shall not have \
died in vain -- that this nation, under God, shall have a new birth of freedom -- and that government of the people, by the \
people, for the people, shall not perish from the earth."""


def perplexity(model, tokens):
    logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, mx.array(tokens[1:]))
    return float(f"{mx.exp(losses.mean()).item():.6g}")


def main():
    mx.set_default_device(mx.cpu)
    check = sys.argv[1] == "--check"
    folder = sys.argv[2 if check else 1]
    model, tokenizer = load(folder)
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    if check:
        print(f"{len(tokens)} tokens, perplexity {perplexity(model, tokens)}")
        return
    result = {"tokens": tokens, "f32": perplexity(model, tokens)}
    for bits in [8, 4]:
        model, _ = load(folder)
        nn.quantize(model, group_size=64, bits=bits)
        result[f"bits{bits}"] = perplexity(model, tokens)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
