"""Bounds: sizes, rates of a key, other origins, texts in tokens."""

import json
import tempfile

import openai

from harness import OTHER_KEY, ask, expect, model_of, test


@test
def what_is_too_large_is_refused(node):
    client = node.client()
    model = model_of(client)
    create = client.chat.completions.create
    error = expect(openai.APIStatusError, lambda: create(model=model, messages=ask("x" * (17 << 20))), "16777216")
    assert error.status_code == 413, error
    for field, value in {"stop": ["x"] * 17, "n": 1000, "top_logprobs": 99, "max_tokens": 1 << 21}.items():
        extra = {field: value}
        if field == "top_logprobs":
            extra["logprobs"] = True
        expect(openai.BadRequestError, lambda: create(model=model, messages=ask("Hi"), extra_body=extra), field)
    deep = "[" * 500 + "]" * 500
    body = f'{{"model": "{model}", "messages": [], "chat_template_kwargs": {{"a": {deep}}}}}'.encode()
    status, answer = node.post("/v1/chat/completions", body)
    assert status == 400 and answer["error"]["code"] == "invalid_json", answer
    status, answer = node.get("/v1/models", headers={"x-long": "x" * 40000})
    assert status == 431 and json.loads(answer)["error"]["code"] == "headers_too_large", answer


@test
def texts_are_told_in_tokens(node):
    status, answer = node.post("/tokenize", {"prompt": "Hello world", "return_token_strs": True})
    assert status == 200 and answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > 0, answer
    status, back = node.post("/detokenize", {"tokens": answer["tokens"]})
    assert status == 200 and back["prompt"] == "Hello world", back
    status, chat = node.post("/tokenize", {"messages": ask("Hi")})
    used = node.client().chat.completions.create(model=node.model(), messages=ask("Hi"), max_tokens=1).usage
    assert chat["count"] == used.prompt_tokens, (chat, used)


@test
def a_key_has_its_limits(node):
    flags = ["--max-batch", "2", "--key-requests-per-minute", "4", "--key-concurrency", "1"]
    flags += ["--cors-origins", "http://localhost:3000"]
    with tempfile.TemporaryDirectory() as folder, node.beside(folder, *flags) as limited:
        client = limited.client()
        question = dict(model=model_of(client), messages=ask("Count."), max_tokens=400)
        stream = client.chat.completions.create(**question, stream=True)
        next(iter(stream))
        create = client.chat.completions.create
        error = expect(openai.RateLimitError, lambda: create(**question), "at a time")
        assert error.response.headers["retry-after"] == "1" and error.code == "rate_limit_exceeded", error
        stream.close()
        limited.wait_idle()
        question["max_tokens"] = 1
        outcomes = []
        for _ in range(5):
            try:
                create(**question)
                outcomes.append("served")
            except openai.RateLimitError as error:
                assert "4 requests by the minute" in str(error), error
                assert 1 <= int(error.response.headers["retry-after"]) <= 15, error.response.headers
                outcomes.append("refused")
        assert outcomes[:3] == ["served"] * 3 and outcomes[-1] == "refused", outcomes
        status, answer = limited.post("/v1/messages", question)
        assert status == 429 and answer["error"]["type"] == "rate_limit_error", answer
        limited.client(OTHER_KEY).chat.completions.create(**question)
        status, _ = limited.get("/v1/chat/completions", key=None, method="OPTIONS", headers={
            "Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"})
        assert status == 204, status
