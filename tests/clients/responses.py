"""The official openai client: /v1/responses."""

import json

import openai
from pydantic import BaseModel

from harness import OTHER_KEY, SLOTS, ask, expect, test

ADD = {
    "type": "function",
    "name": "add",
    "description": "Adds two numbers",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Answer(BaseModel):
    number: int


@test
def a_response_is_created_kept_and_deleted(node):
    client, model = node.client(), node.model()
    response = client.responses.create(
        model=model, input="What is the capital of France?", instructions="Be brief.", temperature=0,
        max_output_tokens=32, metadata={"a": "b"},
    )
    assert "Paris" in response.output_text and response.status in ("completed", "incomplete"), response
    assert response.usage.input_tokens > 5 and response.usage.output_tokens > 0, response.usage
    assert client.responses.retrieve(response.id).output_text == response.output_text
    items = client.responses.input_items.list(response.id).data
    assert [item.content[0].text for item in items] == ["What is the capital of France?"], items
    said = [{"role": "user", "content": f"{number}"} for number in range(30)]
    many = client.responses.create(model=model, input=said, max_output_tokens=1)
    numbers = [int(item.content) for item in client.responses.input_items.list(many.id, order="asc", limit=7)]
    assert numbers == list(range(30)), "all pages, in order"
    expect(openai.NotFoundError, lambda: node.client(OTHER_KEY).responses.retrieve(response.id), response.id)

    follow = client.responses.create(
        model=model, input="And of Italy?", previous_response_id=response.id, temperature=0, max_output_tokens=32
    )
    assert follow.previous_response_id == response.id and follow.usage.input_tokens > response.usage.input_tokens
    said = {"role": "assistant", "content": response.output_text}
    history = ask("What is the capital of France?") + [said] + ask("And of Italy?")
    whole = client.responses.create(model=model, input=history, temperature=0, max_output_tokens=32, store=False)
    assert whole.output_text == follow.output_text, (whole, follow)
    expect(openai.NotFoundError, lambda: client.responses.retrieve(whole.id), "there is no response")

    client.responses.delete(response.id)
    expect(openai.NotFoundError, lambda: client.responses.retrieve(response.id), response.id)
    error = expect(
        openai.NotFoundError,
        lambda: client.responses.create(model=model, input="x", previous_response_id=response.id), response.id,
    )
    assert error.param == "previous_response_id", error.body


@test
def a_streamed_response_is_the_same(node):
    client, model = node.client(), node.model()
    question = dict(model=model, input=ask("What is the capital of France?"), temperature=0, max_output_tokens=200)
    whole = client.responses.create(**question)
    assert whole.status == "completed", whole
    events = list(client.responses.create(**question, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ], kinds
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1].response
    assert text == whole.output_text == last.output_text, (text, whole)
    assert last.status == whole.status and last.usage.output_tokens == whole.usage.output_tokens, last
    assert client.responses.retrieve(last.id).output_text == text
    with client.responses.stream(**question) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text


@test
def a_response_tells_how_probable_it_was(node):
    client, model = node.client(), node.model()
    question = dict(
        model=model, input=ask("What is the capital of France?"), temperature=0, max_output_tokens=24, top_logprobs=3,
        include=["message.output_text.logprobs"],
    )
    whole = client.responses.create(**question)
    told = whole.output[0].content[0].logprobs
    assert "".join(token.token for token in told) == whole.output_text, (told, whole.output_text)
    for token in told:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token, token
        assert token.logprob <= 0 and token.top_logprobs[0].logprob == token.logprob, token
    chat = client.chat.completions.create(
        model=model, messages=question["input"], temperature=0, max_tokens=24, logprobs=True, top_logprobs=3
    )
    for one, other in zip(told, chat.choices[0].logprobs.content):
        assert one.token == other.token and abs(one.logprob - other.logprob) < 1e-3, (one, other)
    events = list(client.responses.create(**question, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    for delta in deltas:
        assert "".join(token.token for token in delta.logprobs) == delta.delta, delta
    streamed = [token.token for delta in deltas for token in delta.logprobs]
    assert streamed == [token.token for token in told], (streamed, told)
    last = events[-1].response
    assert [token.token for token in last.output[0].content[0].logprobs] == streamed, last
    assert last.top_logprobs == 3 and client.responses.retrieve(last.id).output[0].content[0].logprobs
    without = client.responses.create(model=model, input="Hi", max_output_tokens=4)
    assert without.output[0].content[0].logprobs == [] and without.top_logprobs == 0, without
    create = client.responses.create
    error = expect(openai.BadRequestError, lambda: create(model=model, input="x", top_logprobs=2), "include")
    assert error.param == "top_logprobs", error.body
    error = expect(openai.BadRequestError, lambda: create(**dict(question, top_logprobs=21)), "21")
    assert error.param == "top_logprobs", error.body
    error = expect(openai.BadRequestError, lambda: create(model=model, input="x", include=["web.x"]), "web.x")
    assert error.param == "include[0]", error.body


@test
def a_response_may_be_of_a_schema(node):
    client, model = node.client(), node.model()
    response = client.responses.parse(
        model=model, input="Seven, as JSON.", text_format=Answer, temperature=0, max_output_tokens=60
    )
    assert isinstance(response.output_parsed, Answer), response


@test
def a_response_calls_a_tool(node):
    client, model = node.client(), node.model()
    question = dict(model=model, tools=[ADD], parallel_tool_calls=False, temperature=0, max_output_tokens=120)
    first = client.responses.create(input="What is 2 plus 3?", tool_choice="required", **question)
    call = next(item for item in first.output if item.type == "function_call")
    assert call.name == "add" and set(json.loads(call.arguments)) == {"a", "b"}, call
    streamed = client.responses.create(input="What is 2 plus 3?", tool_choice="required", stream=True, **question)
    pieces = [event.delta for event in streamed if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments, pieces
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    second = client.responses.create(
        input=[output], previous_response_id=first.id, **dict(question, tool_choice="none")
    )
    assert second.output_text, second


@test
def responses_refuse_what_they_cannot_do(node):
    client, model = node.client(), node.model()
    create = client.responses.create
    expect(openai.BadRequestError, lambda: create(model=model, input="x", truncation="auto"), "truncation")
    expect(openai.BadRequestError, lambda: create(model=model, input="x", background=True), "background")
    expect(openai.BadRequestError, lambda: create(model=model, input=[]), "input")
    search = {"type": "web_search"}
    expect(openai.BadRequestError, lambda: create(model=model, input="x", tools=[search]), "web_search")
    image = {"type": "input_image", "image_url": "http://x/"}
    message = {"role": "user", "content": [image]}
    expect(openai.BadRequestError, lambda: create(model=model, input=[message]), "input_image")


@test
def a_cancelled_response_frees_its_slot(node):
    client, model = node.client(), node.model()
    node.wait_idle()
    question = dict(model=model, input="Count to one thousand.", max_output_tokens=4000, stream=True)
    streams = [client.responses.create(**question, extra_body={"min_tokens": 3000}) for _ in range(SLOTS)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()
    node.wait_idle()
