"""The official openai client: parsed answers, tools, and requests of many kinds at once."""

import json
import re
import tempfile
import threading

import openai
from openai.lib._parsing._completions import type_to_response_format_param
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


NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 1, "maxItems": 5}
SUM = "start: NUMBER \"+\" NUMBER\nNUMBER: /[0-9]{1,3}/"


@test
def other_schemas_and_sampling_at_once(node):
    with tempfile.TemporaryDirectory() as folder, node.beside(folder, "--max-batch", "16") as wide:
        sixteen_kinds(wide)


def streamed_text(client, kind):
    """The text of a stream's deltas, joined, and that of its first call's arguments."""
    if isinstance(kind.get("response_format"), type):
        # As `parse` writes it.
        kind = dict(kind, response_format=type_to_response_format_param(kind["response_format"]))
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**kind, stream=True) if chunk.choices]
    text = "".join(delta.content or "" for delta in deltas)
    calls = [call for delta in deltas for call in delta.tool_calls or [] if call.index == 0]
    return text, "".join(call.function.arguments or "" for call in calls)


def sixteen_kinds(node):
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
        dict(messages=ask("Dogs or cats?"), extra_body={"guided_choice": ["dogs", "cats", "both"]}, seed=9),
        dict(messages=ask("A list."), extra_body={"guided_json": NUMBERS}, temperature=0.9, seed=10),
        dict(messages=ask("A sum."), extra_body={"guided_grammar": SUM}, temperature=1.1, seed=11),
        dict(messages=ask("Any JSON."), response_format={"type": "json_object"}, temperature=0, max_tokens=40),
        dict(messages=ask("A code."), extra_body={"guided_regex": "[A-Z]{2}-[0-9]{3}"}, top_p=0.8, seed=13),
        dict(messages=ask("Tell me a story."), seed=14, temperature=1.0, max_tokens=32, frequency_penalty=0.5),
        dict(messages=ask("Count."), extra_body={"min_tokens": 20, "top_k": 5}, seed=15, max_tokens=24),
        dict(messages=ask("Hi."), extra_body={"repetition_penalty": 1.2}, temperature=0, max_tokens=16),
    ]

    def run(kind):
        kind = dict(base, **kind)
        if isinstance(kind.get("response_format"), type):
            return client.chat.completions.parse(**kind)
        return client.chat.completions.create(**kind)

    alone = [run(kind) for kind in kinds]
    assert len(kinds) == 16, len(kinds)
    together, streamed = [None] * len(kinds), [None] * len(kinds)

    def one(index):
        together[index] = run(kinds[index])

    def stream(index):
        streamed[index] = streamed_text(client, dict(base, **kinds[index]))

    targets = [(target, index) for target in (one, stream) for index in range(len(kinds))]
    threads = [threading.Thread(target=target, args=(index,), daemon=True) for target, index in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for index, (first, second) in enumerate(zip(alone, together)):
        assert second is not None, f"request {index} failed"
        first, second = first.choices[0], second.choices[0]
        assert first.finish_reason == second.finish_reason, (index, first, second)
        assert first.message.content == second.message.content, (index, first, second)
        calls = [call.function.arguments for call in first.message.tool_calls or []]
        told = (first.message.content or "", calls[0] if calls else "")
        assert streamed[index] == told, (index, streamed[index], told)
    assert together[2].choices[0].message.content in ("yes", "no"), together[2]
    assert together[3].choices[0].message.content.isdigit(), together[3]
    assert isinstance(together[0].choices[0].message.parsed, Point), together[0]


@test
def prompts_may_end_inside_a_token(node):
    client, model = node.client(), node.model()
    text = "The opposite of possible is impossible; in German: unmöglich 🌍"
    schema = {
        "type": "object", "properties": {"word": {"type": "string", "maxLength": 8}}, "required": ["word"],
        # A small model likes to write a lot of space.
        "additionalProperties": False, "x-guidance": {"whitespace_flexible": False},
    }
    whole = node.post("/tokenize", {"prompt": text})[1]["tokens"]
    within = 0
    for cut in range(text.index("impossible"), len(text)):
        prompt = text[:cut]
        tokens = node.post("/tokenize", {"prompt": prompt})[1]["tokens"]
        within += tokens != whole[: len(tokens)]
        question = dict(model=model, prompt=prompt, max_tokens=60, temperature=0)
        create = client.completions.create
        for fields in ({"guided_choice": [text[cut:], "no"]}, {"guided_regex": "[a-z ]{3,8}!"}, {"guided_json": schema}):
            answer = create(**question, extra_body=fields, echo=True)
            joined, choice = answer.choices[0].text, answer.choices[0]
            assert joined.startswith(prompt) and choice.finish_reason == "stop", (fields, answer)
            assert answer.usage.prompt_tokens == len(tokens), (answer.usage, tokens)
            said = joined[len(prompt) :]
            if "guided_choice" in fields:
                assert said in fields["guided_choice"], (fields, said)
                chunks = create(**question, extra_body=fields, stream=True)
                assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == said, said
            elif "guided_regex" in fields:
                assert re.fullmatch("[a-z ]{3,8}!", said), said
            else:
                assert len(json.loads(said)["word"]) <= 8 and list(json.loads(said)) == ["word"], said
    assert within > 8, within
