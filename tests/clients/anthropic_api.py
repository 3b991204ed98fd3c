"""The official anthropic client: /v1/messages."""

import anthropic

from harness import ask, expect, test

# This client no longer has the field as an argument.
GREEDY = {"temperature": 0}
WEATHER = {
    "name": "weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@test
def a_message_is_answered(node):
    client, model = node.anthropic(), node.model()
    question = dict(model=model, messages=ask("What is the capital of France?"), max_tokens=32, extra_body=GREEDY)
    message = client.messages.create(**question, metadata={"user_id": "me"})
    assert "Paris" in message.content[0].text and message.role == "assistant", message
    assert message.stop_reason in ("end_turn", "max_tokens") and message.usage.output_tokens > 0, message
    usage = message.usage
    counted = client.messages.count_tokens(model=model, messages=question["messages"]).input_tokens
    assert counted == usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens, usage
    short = client.messages.create(**dict(question, max_tokens=2))
    assert short.stop_reason == "max_tokens" and short.usage.output_tokens == 2, short
    for system in ("Answer in one word.", [{"type": "text", "text": "Answer in one word."}]):
        told = client.messages.count_tokens(model=model, messages=question["messages"], system=system)
        assert told.input_tokens != counted, told


@test
def a_streamed_message_is_the_same(node):
    client, model = node.anthropic(), node.model()
    question = dict(model=model, messages=ask("Name three colours."), max_tokens=40, extra_body=GREEDY)
    whole = client.messages.create(**question)
    kinds = []
    with client.messages.stream(**question) as stream:
        for event in stream:
            kinds.append(event.type)
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.stop_reason == whole.stop_reason, (final, whole)
    assert final.usage.output_tokens == whole.usage.output_tokens, final.usage
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds
    raw = [event.type for event in client.messages.create(**question, stream=True) if event.type != "ping"]
    assert raw[:2] == ["message_start", "content_block_start"], raw
    assert raw[-3:] == ["content_block_stop", "message_delta", "message_stop"], raw


@test
def stop_sequences_end_a_message(node):
    client, model = node.anthropic(), node.model()
    question = dict(model=model, messages=ask("Count from 1 to 9."), max_tokens=60, extra_body=GREEDY)
    free = client.messages.create(**question).content[0].text
    stop = free[4:7]
    message = client.messages.create(**question, stop_sequences=[stop])
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == stop, message
    assert message.content[0].text == free[: free.index(stop)], (free, message)


@test
def a_message_may_begin_for_the_model(node):
    client, model = node.anthropic(), node.model()
    begun = ask("What is the capital of France?") + [{"role": "assistant", "content": "The capital of France is"}]
    message = client.messages.create(model=model, messages=begun, max_tokens=8, extra_body=GREEDY)
    assert "Paris" in message.content[0].text and "capital" not in message.content[0].text, message


@test
def a_message_uses_a_tool(node):
    client, model = node.anthropic(), node.model()
    question = dict(model=model, max_tokens=120, tools=[WEATHER], extra_body=GREEDY)
    messages = ask("How is the weather in Rome?")
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        message = client.messages.create(messages=messages, tool_choice=choice, **question)
        used = message.content[-1]
        assert message.stop_reason == "tool_use" and used.name == "weather" and "city" in used.input, message
    with client.messages.stream(messages=messages, tool_choice={"type": "any"}, **question) as stream:
        for _ in stream:
            pass
        assert stream.get_final_message().content[-1].input == used.input
    result = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "sunny, 31 C"}]}
    told = messages + [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    final = client.messages.create(messages=told, tool_choice={"type": "none"}, **question)
    assert final.content[0].type == "text", final


@test
def messages_errors_are_of_their_classes(node):
    client, model = node.anthropic(), node.model()
    create = client.messages.create
    wrong = node.anthropic("wrong")
    expect(
        anthropic.AuthenticationError,
        lambda: wrong.messages.create(model=model, messages=ask("Hi"), max_tokens=1), "not valid",
    )
    error = expect(
        anthropic.NotFoundError, lambda: create(model="claude-99", messages=ask("Hi"), max_tokens=1), "claude-99"
    )
    assert error.body["error"]["type"] == "not_found_error" and error.body["type"] == "error", error.body
    expect(anthropic.BadRequestError, lambda: create(model=model, messages=[], max_tokens=1), "messages")
    expect(
        anthropic.BadRequestError, lambda: create(model=model, messages=ask("Hi"), max_tokens=0), "max_tokens"
    )
    expect(
        anthropic.BadRequestError, lambda: create(model=model, messages=ask("word " * 20000), max_tokens=1), "context"
    )
    image = {"type": "image", "source": {"type": "url", "url": "http://x/"}}
    blocks = [{"role": "user", "content": [image]}]
    expect(anthropic.BadRequestError, lambda: create(model=model, messages=blocks, max_tokens=1), "image")
    large = ask("x" * (17 << 20))
    expect(anthropic.RequestTooLargeError, lambda: create(model=model, messages=large, max_tokens=1), "16777216")


@test
def an_abandoned_message_frees_its_slot(node):
    client, model = node.anthropic(), node.model()
    node.wait_idle()
    stream = client.messages.create(
        model=model, messages=ask("Count to one thousand."), max_tokens=3000, stream=True,
        extra_body={"temperature": 1.5},
    )
    for event in stream:
        if event.type == "content_block_delta":
            break
    stream.close()
    node.wait_idle()
