"""lm-eval's `local-completions` protocol: what the endpoint says of prompts equals what mlx-lm computes.

The harness sends batches of prompts in tokens with `echo`, `logprobs=1` and `max_tokens=1`, drops the last token, and sums
the log-probabilities from the end of the context on. tests/goldens/log_likelihoods.json holds mlx-lm's own.
"""

import json
import pathlib

import openai

from harness import expect, test

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "log_likelihoods.json"
# mlx-lm's weights are f32 out of the same file, as a node's are on a CPU; the rest is rounding.
ERROR_MAX = 1e-3


@test
def log_likelihoods_equal_mlx_lm(node):
    client, model = node.client(), node.model()
    cases = json.loads(GOLDENS.read_text())["cases"]
    worst = 0.0
    for max_tokens in (1, 0):
        answer = client.completions.create(
            model=model, prompt=[case["tokens"] for case in cases], max_tokens=max_tokens, logprobs=1, echo=True,
            seed=1234, temperature=0,
        )
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        assert len(choices) == len(cases), answer
        for case, choice in zip(cases, choices):
            end = len(case["tokens"])
            told = choice.logprobs.token_logprobs
            assert told[0] is None and len(told) == end + max_tokens, (case, choice)
            context = case["context"]
            told, tops = told[context:end], choice.logprobs.top_logprobs[context:end]
            worst = max([worst, *(abs(a - b) for a, b in zip(told, case["logprobs"], strict=True))])
            greedy = all(logprob == max(top.values()) for logprob, top in zip(told, tops, strict=True))
            assert greedy == case["greedy"], (case, choice)
    print(f"  {len(cases)} continuations, at most {worst:.1e} from mlx-lm's")
    assert worst <= ERROR_MAX, worst


@test
def prompts_in_tokens_must_be_tokens(node):
    client, model = node.client(), node.model()
    create = client.completions.create
    expect(openai.BadRequestError, lambda: create(model=model, prompt=[[1, 10**8]], max_tokens=1), "100000000")
    expect(openai.BadRequestError, lambda: create(model=model, prompt=[[]], max_tokens=1), "empty")
