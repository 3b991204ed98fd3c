"""The official openai client: parsed answers, tools, and requests of many kinds at once."""

import json
import threading

import openai
from pydantic import BaseModel

from harness import ask, expect, test


class City(BaseModel):
    name: str
    country: str
    capital: bool


class Point(BaseModel):
    x: int
    y: int


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


@test
def parsed_answers_are_of_their_type(node):
    client = node.client()
    question = dict(model=node.model(), messages=ask("Tell me of Paris in JSON."), max_tokens=200, temperature=0)
    for parse in (client.beta.chat.completions.parse, client.chat.completions.parse):
        city = parse(**question, response_format=City).choices[0].message.parsed
        assert isinstance(city, City) and city.name, city
    with client.chat.completions.stream(**question, response_format=City) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == city
    answer = client.chat.completions.create(**question, response_format={"type": "json_object"})
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict), answer
    short = dict(question, max_tokens=2)
    expect(openai.LengthFinishReasonError, lambda: client.chat.completions.parse(**short, response_format=City))


@test
def schemas_that_cannot_be_are_refused(node):
    client = node.client()
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "nonsense"}}}, "strict": True}
    question = dict(model=node.model(), messages=ask("Hi"), max_tokens=8)
    expect(
        openai.BadRequestError,
        lambda: client.chat.completions.create(
            **question, response_format={"type": "json_schema", "json_schema": schema}
        ),
        "nonsense",
    )


@test
def a_tool_is_called_and_answers(node):
    client = node.client()
    messages = ask("How warm is it in Paris, in C?")
    question = dict(model=node.model(), tools=[WEATHER], max_tokens=120, temperature=0)
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(messages=messages, tool_choice=choice, **question)
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls", answer
        call = message.tool_calls[0]
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather" and arguments["unit"] in ("C", "F"), call
    streamed = client.chat.completions.create(messages=messages, tool_choice=named, stream=True, **question)
    deltas = [d for chunk in streamed if chunk.choices for d in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].id and deltas[0].function.name == "weather", deltas[0]
    assert json.loads("".join(delta.function.arguments or "" for delta in deltas)) == arguments, deltas
    told = messages + [
        message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "31 C"},
    ]
    final = client.chat.completions.create(messages=told, **dict(question, tools=openai.omit))
    assert final.choices[0].message.content and not final.choices[0].message.tool_calls, final
    expect(
        openai.BadRequestError,
        lambda: client.chat.completions.create(
            messages=messages, tool_choice={"type": "function", "function": {"name": "clock"}}, **question
        ),
        "clock",
    )


@test
def other_schemas_and_sampling_at_once(node):
    client, model = node.client(), node.model()
    base = dict(model=model, max_tokens=150)
    kinds = [
        dict(messages=ask("A point, as JSON."), response_format=Point, temperature=0),
        dict(messages=ask("A city, as JSON."), response_format=City, seed=3, temperature=0.7),
        dict(messages=ask("Yes or no?"), extra_body={"guided_choice": ["yes", "no"]}, temperature=1.2, seed=4),
        dict(messages=ask("A year."), extra_body={"guided_regex": "(19|20)[0-9]{2}"}, top_p=0.9, seed=5),
        dict(messages=ask("Say something."), seed=6, temperature=0.8, max_tokens=24),
        dict(messages=ask("The weather in Rome?"), tools=[WEATHER], tool_choice="required", temperature=0),
        dict(messages=ask("Count."), stop=["5"], temperature=0, max_tokens=24),
        dict(messages=ask("A point, as JSON."), response_format=Point, seed=8, temperature=1.0),
    ]

    def run(kind):
        kind = dict(base, **kind)
        if isinstance(kind.get("response_format"), type):
            return client.chat.completions.parse(**kind)
        return client.chat.completions.create(**kind)

    alone = [run(kind) for kind in kinds]
    together = [None] * len(kinds)

    def one(index):
        together[index] = run(kinds[index])

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for index, (first, second) in enumerate(zip(alone, together)):
        assert second is not None, f"request {index} failed"
        first, second = first.choices[0], second.choices[0]
        assert first.finish_reason == second.finish_reason, (index, first, second)
        assert first.message.content == second.message.content, (index, first, second)
    assert together[2].choices[0].message.content in ("yes", "no"), together[2]
    assert together[3].choices[0].message.content.isdigit(), together[3]
    assert isinstance(together[0].choices[0].message.parsed, Point), together[0]
