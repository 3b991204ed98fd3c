"""Vectors of texts, through the clients that ask for them: a second node serves a tiny embedder."""

import base64
import math
import struct
import tempfile

import ollama
import openai

import tiny_embedder
from harness import ask, expect, test
from javascript import run_program

TEXTS = ["the cat sat on the dog", "a dog", "something else", "x"]
# A text's vector does not change beyond rounding because of those that are computed with it.
NEAR = 1e-4


def assert_near(one, other):
    assert len(one) == len(other), (len(one), len(other))
    assert all(abs(a - b) <= NEAR for a, b in zip(one, other)), (one, other)


def check_vectors(create, model):
    answer = create(model=model, input=TEXTS, encoding_format="float")
    assert [item.index for item in answer.data] == list(range(len(TEXTS))), answer.data
    vectors = [item.embedding for item in answer.data]
    for vector in vectors:
        assert len(vector) == tiny_embedder.HIDDEN, vector
        assert abs(math.hypot(*vector) - 1) < NEAR, math.hypot(*vector)
    assert max(abs(a - b) for a, b in zip(vectors[0], vectors[1])) > 0.01, "different texts have the same vector"
    for text, vector in zip(TEXTS, vectors):
        assert_near(create(model=model, input=text, encoding_format="float").data[0].embedding, vector)
    # What the client asks for by itself is base64; it decodes that.
    for item, vector in zip(create(model=model, input=TEXTS).data, vectors):
        assert_near(item.embedding, vector)
    return vectors


def check_forms(node, create, model, vectors):
    status, raw = node.post("/v1/embeddings", {"model": model, "input": TEXTS[0], "encoding_format": "base64"})
    assert status == 200, raw
    packed = base64.b64decode(raw["data"][0]["embedding"])
    assert_near(struct.unpack(f"<{tiny_embedder.HIDDEN}f", packed), vectors[0])
    # In tokens, alone and many: the same vectors, and usage counts these tokens.
    tokens = [node.post("/tokenize", {"prompt": text, "add_special_tokens": True})[1]["tokens"] for text in TEXTS]
    assert all(ids[0] == 2 and ids[-1] == 3 for ids in tokens), tokens
    assert_near(create(model=model, input=tokens[0], encoding_format="float").data[0].embedding, vectors[0])
    answer = create(model=model, input=tokens, encoding_format="float")
    for item, vector in zip(answer.data, vectors):
        assert_near(item.embedding, vector)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, tokens)), answer.usage
    # Fewer dimensions: the first ones, of length 1 again.
    short = create(model=model, input=TEXTS[0], dimensions=8, encoding_format="float").data[0].embedding
    length = math.hypot(*vectors[0][:8])
    assert_near(short, [number / length for number in vectors[0][:8]])
    # More texts than one message to a node takes.
    many = create(model=model, input=TEXTS * 25, encoding_format="float").data
    assert [item.index for item in many] == list(range(100))
    for item in many:
        assert_near(item.embedding, vectors[item.index % len(TEXTS)])


def check_errors(node, client, model):
    def refused(param, **fields):
        error = expect(openai.BadRequestError, lambda: client.embeddings.create(**{"model": model, "input": "a", **fields}))
        assert error.param == param, (error.param, param, error)

    refused("dimensions", dimensions=tiny_embedder.HIDDEN + 1)
    refused("dimensions", dimensions=0)
    refused("input", input=[[1, len(tiny_embedder.WORDS)]])
    refused("input", input="a " * tiny_embedder.CONTEXT)
    refused("input", input=[[]])
    refused("encoding_format", encoding_format="hex")
    expect(openai.NotFoundError, lambda: client.embeddings.create(model="gpt-99", input="a"), "gpt-99")
    expect(openai.AuthenticationError, lambda: node.client("wrong").embeddings.create(model=model, input="a"))
    create = client.chat.completions.create
    expect(openai.BadRequestError, lambda: create(model=model, messages=ask("Hi")), model)


def check_ollama(node, model, vectors):
    client = node.ollama()
    for vector, wanted in zip(client.embed(model=model, input=TEXTS).embeddings, vectors):
        assert_near(vector, wanted)
    # Ollama cuts what is too long, unless told otherwise.
    long = "a " * tiny_embedder.CONTEXT
    assert client.embed(model=model, input=long).prompt_eval_count == tiny_embedder.CONTEXT
    expect(ollama.ResponseError, lambda: client.embed(model=model, input=long, truncate=False), "context")


@test
def texts_become_vectors(node):
    with tempfile.TemporaryDirectory() as folder:
        model_folder = tiny_embedder.write(f"{folder}/tiny-embedder")
        with node.beside(folder, "--max-batch", "1", model=model_folder) as other:
            client, model = other.client(), other.model()
            vectors = check_vectors(client.embeddings.create, model)
            check_forms(other, client.embeddings.create, model, vectors)
            check_errors(other, client, model)
            check_ollama(other, model, vectors)
            run_program(other, "embeddings.mjs")


@test
def a_model_that_generates_makes_no_vectors(node):
    create = node.client().embeddings.create
    expect(openai.BadRequestError, lambda: create(model=node.model(), input="a"), node.model())
