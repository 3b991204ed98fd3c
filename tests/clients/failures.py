"""What each official client is told where the cluster, and not the request, is at fault: 503 without a node, 500 where the
engine's process is killed again and again."""

import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time

import anthropic
import ollama
import openai

from harness import Node, ask, expect, test

READY_SECONDS = 60
# A request is given to a new engine once or twice before it is taken to be the cause.
ANSWERED_SECONDS = 120


def ways(node, model):
    """A call of each client, streamed and not, and the errors that they raise."""
    client, claude, llama = node.client(), node.anthropic(), node.ollama()
    question = dict(model=model, messages=ask("Count to one thousand."))
    for stream in (False, True):
        yield openai.APIStatusError, lambda: list(
            client.chat.completions.create(**question, max_tokens=600, stream=stream, extra_body={"ignore_eos": True})
        )
        yield anthropic.APIStatusError, lambda: list(
            claude.messages.create(**question, max_tokens=600, stream=stream, extra_body={"temperature": 1.5})
        )
        yield ollama.ResponseError, lambda: list(
            llama.chat(**question, stream=stream, options={"num_predict": 600, "temperature": 1.5})
        )


@test
def a_cluster_without_nodes_says_so(node):
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "key"
        subprocess.run([node.binary, "key", "new", "--out", file], capture_output=True, check=True)
        key = next(word for word in file.read_text().split() if word.startswith("mlxk1-"))
        flags = ["--roles", "router", "--cluster-key", key, "--listen", "127.0.0.1:0", "--peers", "127.0.0.1:9"]
        router = Node(node.binary, node.model_path, folder, *flags)
        try:
            deadline = time.monotonic() + READY_SECONDS
            while True:
                try:
                    assert router.get("/health", key=None)[0] == 200
                    break
                except OSError:
                    assert time.monotonic() < deadline and router.process.poll() is None, router.log_path.read_text()
                    time.sleep(0.1)
            assert router.get("/ready")[0] == 503
            for error, call in ways(router, "some-model"):
                assert expect(error, call, "some-model").status_code == 503
            router.stop()
        finally:
            if router.process.poll() is None:
                router.process.kill()
                router.process.wait()


def engines(process):
    """The processes that a node started: its engine."""
    children = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(child) for path in children for child in path.read_text().split()]


@test
def an_engine_that_keeps_failing_is_an_error_of_the_server(node):
    if not pathlib.Path(f"/proc/{os.getpid()}/task").is_dir():
        print("  skipped: this system has no /proc to find the engine's process in")
        return
    with tempfile.TemporaryDirectory() as folder, node.beside(folder, "--max-batch", "2") as other:
        model, over = other.model(), threading.Event()

        def kill():
            while not over.wait(0.05):
                # There is no load while the engine starts again.
                if (other.load() or {"running": 0})["running"] > 0:
                    for child in engines(other.process):
                        os.kill(child, signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        try:
            for error, call in ways(other, model):
                began = time.monotonic()
                raised = expect((error, openai.APIError, anthropic.APIError), call)
                # Where a stream has begun, its status was told: the error is in it, and of no status (-1 at Ollama's).
                status = getattr(raised, "status_code", None)
                assert status in (None, -1, 200, 500, 502, 503), (status, raised)
                assert time.monotonic() - began < ANSWERED_SECONDS
        finally:
            over.set()
            killer.join()
        # Whoever asks next is served.
        other.wait_ready()
        answer = other.client().chat.completions.create(model=model, messages=ask("Hi"), max_tokens=2)
        assert answer.usage.completion_tokens > 0, answer
