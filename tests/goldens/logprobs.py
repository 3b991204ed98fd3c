#!/usr/bin/env python3
"""Makes smollm2-logprobs.json: what mlx-lm takes the tokens of smollm2.json to be worth.

    logprobs.py FOLDER > smollm2-logprobs.json     FOLDER from scripts/tools/gguf_to_mlx.py

For some prompts of smollm2.json: of each of the prompt's tokens but the first, and of the first tokens of the answer, its
log-probability and the most probable tokens with theirs. Made with what smollm2.json was made with.
"""
import json
import pathlib
import sys

import mlx.core as mx
from mlx_lm import load

PROMPTS = [0, 3, 10, 11, 12, 15]
NEW_TOKENS = 16
TOP = 5


def main():
    mx.set_default_device(mx.cpu)
    model, _ = load(sys.argv[1])
    goldens = json.loads(pathlib.Path(__file__).with_name("smollm2.json").read_text())
    results = []
    for index in PROMPTS:
        prompt, answer = goldens[index]["prompt"], goldens[index]["tokens"][:NEW_TOKENS]
        tokens = prompt + answer
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        told = []
        for at in range(1, len(tokens)):
            row = logprobs[at - 1]
            best = mx.argsort(-row)[:TOP].tolist()
            top = [[token, round(row[token].item(), 5)] for token in best]
            told.append([round(row[tokens[at]].item(), 5), top])
        results.append({"index": index, "prompt": told[: len(prompt) - 1], "answer": told[len(prompt) - 1 :]})
    print("[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]")


if __name__ == "__main__":
    main()
