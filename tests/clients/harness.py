"""One mlx-node, started for the tests, and what they share."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request

import anthropic
import ollama
import openai

API_KEY = "test-key-1"
OTHER_KEY = "test-key-2"
# Loading the test model takes a few seconds on two cores; a debug build takes longer.
READY_SECONDS = 180
# A cancelled request frees its slot within two steps; this leaves room for a slow machine.
FREED_SECONDS = 10
SLOTS = 4
TESTS = []


def test(function):
    """Makes a function a test; it is given the node."""
    TESTS.append(function)
    return function


class Node:
    """One mlx-node process on loopback, alone: it has no cluster key."""

    def __init__(self, binary, model, folder, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = "127.0.0.1:%d" % probe.getsockname()[1]
        self.binary, self.model_path, self.folder = binary, model, folder
        self.log_path = pathlib.Path(folder) / f"node-{self.address.partition(':')[2]}.log"
        self.log = open(self.log_path, "wb")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_NODE_")}
        environment.update(HOME=str(folder), XDG_CONFIG_HOME=str(folder))
        usual = ["--model", model, "--http", self.address, "--api-keys", f"{API_KEY},{OTHER_KEY}"]
        self.process = subprocess.Popen(
            [binary, *usual, *(flags or ["--max-batch", str(SLOTS)])],
            cwd=folder, env=environment, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL,
        )

    @contextlib.contextmanager
    def beside(self, folder, *flags, model=None):
        """Another node of the same program, with flags of its own and maybe another model, until the block ends."""
        other = Node(self.binary, model or self.model_path, folder, *flags)
        try:
            other.wait_ready()
            yield other
            other.stop()
        finally:
            if other.process.poll() is None:
                other.process.kill()
                other.process.wait()

    def get(self, path, key=API_KEY, method="GET", body=None, headers=None):
        """Status and text of a GET, or of another request."""
        headers = dict(headers or {}, **({"Authorization": f"Bearer {key}"} if key else {}))
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, path, body, **others):
        """Status and parsed JSON of a POST."""
        status, text = self.get(path, method="POST", body=body, **others)
        return status, json.loads(text)

    def delete(self, path):
        """Status and text of a DELETE."""
        return self.get(path, method="DELETE")

    def wait_ready(self):
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"mlx-node ended with {self.process.returncode}:\n{self.log_path.read_text()}")
            try:
                if self.get("/ready")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"mlx-node was not ready after {READY_SECONDS} s:\n{self.log_path.read_text()}")

    def load(self):
        """The node's load, as /v1/cluster tells it."""
        return json.loads(self.get("/v1/cluster")[1])["nodes"][0]["load"]

    def wait_idle(self, seconds=FREED_SECONDS):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            load = self.load()
            if load["running"] == 0 and load["waiting"] == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"not idle after {seconds} s: {load}")

    def wait_running(self, count, seconds=FREED_SECONDS):
        deadline = time.monotonic() + seconds
        while self.load()["running"] < count:
            assert time.monotonic() < deadline, self.load()
            time.sleep(0.05)

    def client(self, key=API_KEY):
        return openai.OpenAI(base_url=f"http://{self.address}/v1", api_key=key, max_retries=0, timeout=120)

    def anthropic(self, key=API_KEY):
        return anthropic.Anthropic(base_url=f"http://{self.address}", api_key=key, max_retries=0, timeout=120)

    def ollama(self, key=API_KEY):
        return ollama.Client(host=f"http://{self.address}", headers={"Authorization": f"Bearer {key}"}, timeout=120)

    def model(self):
        return self.client().models.list().data[0].id

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("mlx-node did not end within 30 s of SIGTERM")
        finally:
            self.log.close()


def model_of(client):
    return client.models.list().data[0].id


def ask(text):
    return [{"role": "user", "content": text}]


def expect(error, call, contains=""):
    """Calls and demands that error class, with that text in its message."""
    try:
        call()
    except error as raised:
        assert contains in str(raised), f"{contains!r} is not in {raised}"
        return raised
    raise AssertionError(f"no {error} was raised")
