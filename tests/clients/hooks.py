"""What schemathesis cannot know of a request: which model there is, what excludes what, how much fits a small context.

Most requests are made to fit in these respects, so that they are answered; the others stay as they were made.
"""

import json

import schemathesis

NEW_TOKENS = 8
LENGTHS = ["max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict"]
# Of these one may be given.
SHAPES = [
    "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "text",
    "format", "output_config", "output_format",
]
# What must be of the vocabulary, of a response that there is, or of a template that knows of it.
UNKNOWABLE = [
    "stop_token_ids", "logit_bias", "previous_response_id", "reasoning_effort", "reasoning", "think", "effort",
    "continue_final_message", "chat_template_kwargs", "best_of", "top_logprobs", "min_tokens", "tools", "tool_choice",
]


def shorten(body):
    """However a request is made, it takes little time."""
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 2)
    for name in LENGTHS:
        if isinstance(body.get(name), int):
            body[name] = min(body[name], NEW_TOKENS)
    if "messages" in body or "prompt" in body:
        body.setdefault("max_tokens", NEW_TOKENS)


def fit(body):
    # Which messages a template takes, and which tokens a vocabulary has, no schema says.
    if "messages" in body:
        body["messages"] = [{"role": "user", "content": "Hi"}]
    if isinstance(body.get("prompt"), list):
        body["prompt"] = ["Hi", "Ho"]
    for name in [*UNKNOWABLE, *SHAPES]:
        body.pop(name, None)
    if isinstance(body.get("options"), dict):
        fit(body["options"])


@schemathesis.hook
def before_call(context, case, kwargs):
    """What is made to cover a schema does not pass `map_body`: it may ask for as much as the context holds."""
    body = case.body
    if not isinstance(body, dict):
        return
    if "messages" in body or "prompt" in body or "input" in body:
        shorten(body)
        # Only where the field is this one's: others are not known there, and ignored.
        for name in ("max_tokens", "max_output_tokens"):
            if name not in body:
                body[name] = NEW_TOKENS
        if body.get("options") is None or isinstance(body["options"], dict):
            options = body.get("options") or {}
            shorten(options)
            options.setdefault("num_predict", NEW_TOKENS)
            body["options"] = options


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        body.pop("model", None)
        shorten(body)
        if isinstance(body.get("options"), dict):
            shorten(body["options"])
        if len(json.dumps(body)) % 4 > 0:
            fit(body)
    return body
