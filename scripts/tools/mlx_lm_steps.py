#!/usr/bin/env python3
"""Decode throughput of mlx-lm's batch engine on the model in a folder: what the `engine_steps` program measures of ours.

    scripts/tools/mlx_lm_steps.py FOLDER [--batches 1,8,16,64] [--prompt 512] [--new 256]

Greedy, prompts of random tokens. One JSON line a batch size; the second of two runs is the one reported.
"""
import argparse
import importlib
import json
import random
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

BatchGenerator = importlib.import_module("mlx_lm.generate").BatchGenerator


def without_global_scale(gather_qmm):
    """mlx-lm names an argument of quantized experts, always None for ours, that the MLX of its own release does not have."""
    def call(*arrays, global_scale=None, **options):
        assert global_scale is None
        return gather_qmm(*arrays, **options)

    return call


if "global_scale" not in (mx.gather_qmm.__doc__ or ""):
    mx.gather_qmm = without_global_scale(mx.gather_qmm)


def measure(model, batch, prompt, new):
    engine = BatchGenerator(model, max_tokens=new, completion_batch_size=batch, prefill_batch_size=batch)
    prompts = [[random.randrange(1000, 100_000) for _ in range(prompt)] for _ in range(batch)]
    engine.insert(prompts)
    start, first, produced, produced_first, finished = time.perf_counter(), None, 0, 0, 0
    while finished < batch:
        step = engine.next()
        rows = [row for part in step for row in part] if isinstance(step, tuple) else step
        # Prompts that are read report their progress as rows without a token.
        rows = [row for row in rows if getattr(row, "token", None) is not None]
        produced += len(rows)
        finished += sum(1 for row in rows if getattr(row, "finish_reason", None))
        if first is None and produced >= batch:
            first, produced_first = time.perf_counter(), produced
    end = time.perf_counter()
    return {
        "batch": batch,
        "prefill_tokens_per_s": round(batch * prompt / (first - start), 1),
        "decode_tokens_per_s": round((produced - produced_first) / (end - first), 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", default="1,8,16,64")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=256)
    arguments = parser.parse_args()
    model, _ = load_model(arguments.folder)
    mx.eval(model.parameters())
    for batch in map(int, arguments.batches.split(",")):
        measure(model, batch, arguments.prompt, arguments.new)
        print(json.dumps(measure(model, batch, arguments.prompt, arguments.new)), flush=True)


if __name__ == "__main__":
    main()
