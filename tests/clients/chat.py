"""The official openai client: chats, completions, models and errors."""

import json
import tempfile
import threading
import time

import openai

from harness import API_KEY, SLOTS, ask, expect, model_of, test


@test
def models_are_listed_and_retrieved(node):
    client = node.client()
    models = client.models.list().data
    assert len(models) == 1, models
    assert models[0].object == "model" and models[0].created > 0, models
    assert "SmolLM2" in models[0].id, models
    assert client.models.retrieve(models[0].id).id == models[0].id


@test
def chat_answers(node):
    client = node.client()
    answer = client.chat.completions.create(
        model=model_of(client), messages=ask("What is the capital of France?"), max_tokens=32, temperature=0
    )
    choice = answer.choices[0]
    assert "Paris" in choice.message.content, answer
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length"), answer
    assert answer.object == "chat.completion", answer
    usage = answer.usage
    assert usage.prompt_tokens > 5 and 0 < usage.completion_tokens <= 32, usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage


@test
def a_streamed_chat_is_the_same_text(node):
    client = node.client()
    question = dict(model=model_of(client), messages=ask("Name three colours."), max_tokens=40, temperature=0)
    whole = client.chat.completions.create(**question)
    chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert finishes == [whole.choices[0].finish_reason], finishes
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens, chunks[-1]
    assert len({chunk.id for chunk in chunks}) == 1, "all chunks carry one id"
    assert len(chunks) > 5, "the text came in pieces"


@test
def a_stream_without_usage_has_none(node):
    client = node.client()
    stream = client.chat.completions.create(model=model_of(client), messages=ask("Hi"), max_tokens=4, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in stream)


@test
def completions_answer(node):
    client = node.client()
    question = dict(model=model_of(client), prompt="The opposite of hot is", max_tokens=8, temperature=0)
    whole = client.completions.create(**question)
    assert whole.object == "text_completion" and "cold" in whole.choices[0].text, whole
    streamed = client.completions.create(**question, stream=True)
    text = "".join(chunk.choices[0].text for chunk in streamed if chunk.choices)
    assert text == whole.choices[0].text, (text, whole)


@test
def a_second_turn_finds_the_first_one_cached(node):
    client = node.client()
    # Of its own: other tests leave prompts in the cache, too.
    first = ask(f"My name is Ada and my number is {time.time_ns()}. Tell me in one sentence what a lighthouse is for.")
    question = dict(model=model_of(client), max_tokens=40, temperature=0, extra_body={"session_id": "chat-1"})
    answer = client.chat.completions.create(messages=first, **question)
    assert answer.usage.prompt_tokens_details.cached_tokens < answer.usage.prompt_tokens // 2, answer.usage
    sessions = json.loads(node.get("/v1/sessions")[1])
    assert [session["id"] for session in sessions["data"]] == ["chat-1"] and sessions["incomplete"] == [], sessions
    session = sessions["data"][0]
    assert session["tokens"] > 0 and session["idle_s"] >= 0 and session["expires_in_s"] > 1000, session

    said = {"role": "assistant", "content": answer.choices[0].message.content}
    second = first + [said] + ask("And now in three words?")
    whole = client.chat.completions.create(messages=second, **question)
    # All that the first turn left, but for the last block, which may not be full.
    least = answer.usage.prompt_tokens // 32 * 32
    assert whole.usage.prompt_tokens_details.cached_tokens >= least > 0, (answer.usage, whole.usage)
    chunks = list(
        client.chat.completions.create(
            messages=second, stream=True, stream_options={"include_usage": True}, **question
        )
    )
    streamed = chunks[-1].usage
    assert streamed.prompt_tokens_details.cached_tokens == streamed.prompt_tokens // 32 * 32, streamed
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, "a cached prompt changes nothing"

    salted = dict(question, extra_body={"cache_salt": "mine"})
    alone = client.chat.completions.create(messages=second, **salted)
    assert alone.usage.prompt_tokens_details.cached_tokens == 0, alone.usage
    again = client.chat.completions.create(messages=second, **salted)
    assert again.usage.prompt_tokens_details.cached_tokens > 0, again.usage

    deleted = node.delete("/v1/sessions/chat-1")
    assert deleted[0] == 200 and json.loads(deleted[1])["data"][0]["tokens"] >= session["tokens"], deleted
    gone = node.delete("/v1/sessions/chat-1")
    assert gone[0] == 404 and json.loads(gone[1])["error"]["code"] == "session_not_found", gone
    assert json.loads(node.get("/v1/sessions")[1])["data"] == []


@test
def urgency_is_told_in_fields(node):
    client = node.client()
    question = dict(model=model_of(client), messages=ask("Hi"), max_tokens=2)
    for fields in ({"priority": "high"}, {"priority": 5}, {"ttft_target_ms": 200, "tpot_target_ms": 50}):
        answer = client.chat.completions.create(extra_body=fields, **question)
        assert answer.usage.completion_tokens > 0, answer
    for fields in ({"priority": "urgent"}, {"ttft_target_ms": 0}, {"session_id": "two words"}):
        (name, value), = fields.items()
        error = expect(
            openai.BadRequestError, lambda: client.chat.completions.create(extra_body=fields, **question), str(value)
        )
        assert error.param == name, error.body


@test
def stop_strings_end_the_text(node):
    client = node.client()
    question = dict(model=model_of(client), prompt="1, 2, 3, 4, 5,", max_tokens=40, temperature=0)
    free = client.completions.create(**question).choices[0].text
    stop = free[8:11]
    stopped = client.completions.create(**question, stop=stop).choices[0]
    assert stopped.text == free[: free.index(stop)], (free, stop, stopped)
    assert stopped.finish_reason == "stop", stopped


@test
def max_tokens_bounds_the_text(node):
    client = node.client()
    answer = client.chat.completions.create(model=model_of(client), messages=ask("Tell me a story."), max_tokens=3)
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length", answer


@test
def a_seed_gives_its_text_again(node):
    client = node.client()
    question = dict(model=model_of(client), messages=ask("Tell me a story."), max_tokens=24, temperature=1.0)
    texts = [client.chat.completions.create(**question, seed=seed).choices[0].message.content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2], texts


@test
def out_of_range_is_a_bad_request(node):
    client = node.client()
    create = client.chat.completions.create
    model = model_of(client)
    error = expect(openai.BadRequestError, lambda: create(model=model, messages=ask("Hi"), temperature=9), "temperature")
    assert error.param == "temperature" and error.type == "invalid_request_error", error.body
    expect(openai.BadRequestError, lambda: create(model=model, messages=ask("Hi"), top_p=-1), "top_p")
    expect(openai.BadRequestError, lambda: create(model=model, messages=ask("Hi"), max_tokens=0), "max_tokens")
    expect(openai.BadRequestError, lambda: create(model=model, messages=[]))
    expect(openai.BadRequestError, lambda: create(model=model, messages=ask("word " * 20000)), "context")


@test
def an_unknown_model_is_not_found(node):
    client = node.client()
    create = client.chat.completions.create
    error = expect(openai.NotFoundError, lambda: create(model="gpt-99", messages=ask("Hi")), "gpt-99")
    assert error.code == "model_not_found", error.body
    expect(openai.NotFoundError, lambda: client.models.retrieve("gpt-99"), "gpt-99")


@test
def a_wrong_key_is_refused(node):
    expect(openai.AuthenticationError, lambda: node.client("wrong").models.list())
    create = node.client("wrong").chat.completions.create
    expect(openai.AuthenticationError, lambda: create(model="x", messages=ask("Hi")))
    assert node.get("/v1/cluster", key=None)[0] == 401
    assert node.get("/health", key=None)[0] == 200, "whether it is alive, anybody may ask"


@test
def a_cancelled_stream_frees_its_slot(node):
    client = node.client()
    node.wait_idle()
    streams = [
        client.chat.completions.create(
            model=model_of(client), messages=ask("Count to one thousand."), max_tokens=1500, stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in range(SLOTS)
    ]
    for stream in streams:
        next(iter(stream))
    node.wait_running(SLOTS)
    for stream in streams:
        stream.close()
    node.wait_idle()


@test
def too_many_at_once_are_told_to_come_back(node):
    # More than one slot serves within the second that they may wait: none goes before all were answered.
    count = 40
    with tempfile.TemporaryDirectory() as folder, node.beside(folder, "--max-batch", "1", "--queue-time", "1 s") as slow:
        model = slow.model()
        outcomes, streams = {}, []
        lock = threading.Lock()
        start = threading.Barrier(count)

        def one(index):
            mine = slow.client()
            start.wait()
            try:
                stream = mine.chat.completions.create(
                    model=model, messages=ask(f"{index}"), max_tokens=1000, stream=True,
                    extra_body={"ignore_eos": True},
                )
                outcome = "served"
                streams.append(stream)
            except openai.RateLimitError as error:
                wait = error.response.headers.get("retry-after")
                outcome = "told to wait" if wait and int(wait) >= 1 else f"no Retry-After: {error}"
            with lock:
                outcomes[outcome] = outcomes.get(outcome, 0) + 1

        threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        for stream in streams:
            stream.close()
        print(f"  {outcomes}")
        assert set(outcomes) == {"served", "told to wait"} and sum(outcomes.values()) == count, outcomes
        slow.wait_idle()


def sixteen_at_once(node, seconds):
    """16 clients, streaming and not, for that long: no error, no empty answer."""
    model = model_of(node.client())
    deadline = time.monotonic() + seconds
    done, failures = [], []

    def one(index):
        client = node.client()
        turn = 0
        while time.monotonic() < deadline:
            turn += 1
            question = dict(
                model=model, messages=ask(f"Tell me about the number {index * 1000 + turn}."), max_tokens=16 + index,
                temperature=0.0 if index % 2 else 0.8,
            )
            try:
                if turn % 2:
                    chunks = client.chat.completions.create(
                        **question, stream=True, stream_options={"include_usage": True}
                    )
                    tokens = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
                    assert len(tokens) == 1 and tokens[0] > 0, tokens
                    done.append(tokens[0])
                else:
                    usage = client.chat.completions.create(**question).usage
                    assert usage.completion_tokens > 0, usage
                    done.append(usage.completion_tokens)
            except Exception as error:  # every kind of failure counts
                failures.append(f"{type(error).__name__}: {error}")
                if len(failures) > 20:
                    return

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(16)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 120)
    elapsed = time.monotonic() - began
    assert not any(thread.is_alive() for thread in threads), "a request hangs"
    print(f"  {len(done)} requests, {len(failures)} errors, {sum(done) / elapsed:.0f} tokens/s")
    assert not failures, failures[:5]
    assert len(done) >= 16, done
    node.wait_idle()
