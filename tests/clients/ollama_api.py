"""The official ollama client."""

import json

import ollama

from harness import ask, expect, test

OPTIONS = {"temperature": 0, "num_predict": 40}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@test
def ollama_lists_models(node):
    client = node.ollama()
    model = node.model()
    assert [entry.model for entry in client.list().models] == [model]
    shown = client.show(model)
    assert shown.modelinfo["mlx.context_length"] > 1000 and "completion" in shown.capabilities, shown
    expect(ollama.ResponseError, lambda: client.show("llama99"), "llama99")


@test
def ollama_chats(node):
    client, model = node.ollama(), node.model()
    question = dict(model=model, messages=ask("What is the capital of France?"), options=OPTIONS)
    whole = client.chat(**question)
    assert "Paris" in whole.message.content and whole.done and whole.done_reason in ("stop", "length"), whole
    assert whole.eval_count > 0 and whole.prompt_eval_count > 5 and whole.total_duration > 0, whole
    lines = list(client.chat(**question, stream=True))
    assert "".join(line.message.content for line in lines) == whole.message.content, lines
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True], lines
    assert lines[-1].eval_count == whole.eval_count, lines[-1]


@test
def ollama_generates(node):
    client, model = node.ollama(), node.model()
    question = dict(model=model, prompt="What is the capital of France?", options=OPTIONS)
    whole = client.generate(**question)
    assert "Paris" in whole.response, whole
    assert "".join(line.response for line in client.generate(**question, stream=True)) == whole.response
    raw = client.generate(model=model, prompt="The opposite of hot is", raw=True, options=dict(OPTIONS, num_predict=8))
    openai = node.client().completions.create(model=model, prompt="The opposite of hot is", max_tokens=8, temperature=0)
    assert raw.response == openai.choices[0].text and raw.done_reason == "length", (raw, openai)
    assert client.generate(model=model).done_reason == "load"
    stopped = client.generate(**dict(question, options=dict(OPTIONS, stop=["Paris"])))
    assert "Paris" not in stopped.response, stopped


@test
def ollama_formats_and_tools(node):
    client, model = node.ollama(), node.model()
    schema = {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"],
        "additionalProperties": False,
    }
    question = dict(model=model, messages=ask("A number, as JSON."), options=OPTIONS)
    assert 0 <= json.loads(client.chat(**question, format=schema).message.content)["n"] <= 99
    client.chat(**question, format="json")
    called = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    told = ask("Weather in Rome?") + [
        {"role": "assistant", "tool_calls": [called]}, {"role": "tool", "tool_name": "weather", "content": "sunny"},
    ]
    answer = client.chat(model=model, messages=told, tools=[WEATHER], options=OPTIONS)
    assert answer.done, answer


@test
def ollama_errors(node):
    client, model = node.ollama(), node.model()
    error = expect(ollama.ResponseError, lambda: client.chat(model="llama99", messages=ask("Hi")), "llama99")
    assert error.status_code == 404, error
    error = expect(
        ollama.ResponseError, lambda: client.chat(model=model, messages=ask("Hi"), options={"temperature": 9}), "9"
    )
    assert error.status_code == 400, error
    error = expect(ollama.ResponseError, lambda: node.ollama("wrong").list(), "not valid")
    assert error.status_code == 401, error
