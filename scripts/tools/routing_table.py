#!/usr/bin/env python3
"""What scripts/bench-router keeps and shows.

    routing_table.py put FILE NAME ARGUMENTS LINE    puts one run's line into FILE, in place of the one of that name
    routing_table.py table FILE                      the figures as Markdown, and what they are held to
"""

import json
import sys
from pathlib import Path

RIVALS = ("sglang_rule", "smg_spill", "llmd_322")
# Name, figure, the most that cost's may be of the best rival's.
WANTED = (
    ("agents-equal", "ttft_mean_s", 0.7),
    ("agents-unequal", "ttft_mean_s", 0.85),
    ("chats-unequal", "ttft_mean_s", 0.9),
    ("zipf-unequal", "ttft_mean_s", 0.9),
    ("mooncake-4-unequal", "ttft_mean_s", 0.65),
)
# "Nowhere worse than the best by more", for these figures of all runs.
WORSE_MAX = 1.05
HIT_RATE_OF_SINGLE = ("mooncake-4-equal", 0.95)


def read(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return {run["name"]: run for run in map(json.loads, lines)}


def put(path, name, arguments, line):
    runs = read(path)
    run = {"name": name, "arguments": arguments.split(), **json.loads(line)}
    # Where traces lie says nothing.
    run["arguments"] = [Path(word).name if "/" in word else word for word in run["arguments"]]
    if name in runs:
        run["policies"] = {**runs[name]["policies"], **run["policies"]}
    runs[name] = run
    path.write_text("".join(json.dumps(run) + "\n" for run in sorted(runs.values(), key=lambda run: run["name"])))


def short(seconds):
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def best_of(run, figure):
    return min(run["policies"][rival][figure] for rival in RIVALS if rival in run["policies"])


def table(path):
    runs = read(path)
    names = sorted({policy for run in runs.values() for policy in run["policies"]} - {"cost", *RIVALS})
    columns = ["cost", *RIVALS, *names]
    print("| run | " + " | ".join(columns) + " | cost / best rival | hits: cost / one cache |")
    print("| --- |" + " --- |" * (len(columns) + 2))
    for name, run in runs.items():
        cells = []
        for policy in columns:
            one = run["policies"].get(policy)
            if one is None:
                cells.append("")
                continue
            done = "" if one["completed_of_offered"] > 0.9999 else f", {one['completed_of_offered']:.1%} answered"
            cells.append(f"{short(one['ttft_mean_s'])} ({short(one['e2e_mean_s'])}{done})")
        ratio = run["policies"]["cost"]["ttft_mean_s"] / best_of(run, "ttft_mean_s")
        hits = run["policies"]["cost"]["hit_rate"] / max(run["single_cache_hit_rate"], 1e-9)
        hits = f"{hits:.3f}" if run["single_cache_hit_rate"] > 0.01 else ""
        print(f"| {name} | " + " | ".join(cells) + f" | {ratio:.2f} | {hits} |")
    print()
    print("| figure | wanted | printed |")
    print("| --- | --- | --- |")
    for name, figure, most in WANTED:
        if name in runs:
            ratio = runs[name]["policies"]["cost"][figure] / best_of(runs[name], figure)
            print(f"| {name}: {figure} over the best of the three | ≤ {most} | {ratio:.2f} |")
    for figure in ("ttft_mean_s", "e2e_mean_s"):
        ratios = {name: run["policies"]["cost"][figure] / best_of(run, figure) for name, run in runs.items()}
        if ratios:
            worst = max(ratios, key=ratios.get)
            print(f"| all runs: {figure} over the best of the three | ≤ {WORSE_MAX} | at most {ratios[worst]:.3f} ({worst}) |")
    name, least = HIT_RATE_OF_SINGLE
    if name in runs:
        share = runs[name]["policies"]["cost"]["hit_rate"] / runs[name]["single_cache_hit_rate"]
        print(f"| {name}: hit rate over a single cache's | ≥ {least} | {share:.3f} |")


def main():
    match sys.argv[1:]:
        case ["put", path, name, arguments, line]:
            put(Path(path), name, arguments, line)
        case ["table", path]:
            table(Path(path))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
