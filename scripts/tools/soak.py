"""What scripts/soak does once there is a program and a model.

node-1 stays; its memory, descriptors and threads are watched. node-2 suffers: it is killed, its engine is killed, it is
drained and comes back with the other model name. What is promised meanwhile, and what therefore is an error:

- a request that node-1 takes for the model that it serves is answered whole, whatever happens to node-2, or refused with 429
  and Retry-After;
- a client of node-2 may lose its connection, or be told that it is leaving, while that is dead or ending, at no other time;
- the model that only node-2 serves now and then may be missing (404, 503) or end with an error said in the stream;
- a request that is wrong is refused with 400.
"""

import argparse
import collections
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROWS = 4  # max_batch of each node
CLIENTS = 6  # below what both nodes take at once, so that most requests run
OVERLOAD_CLIENTS = 10 * 2 * ROWS
OVERLOAD_S = 30
QUEUE_TIME_S = 5
FAULT_INTERVAL_S = 15
REQUEST_S_MAX = 120
READY_S_MAX = 180
# Beyond a fault's end in which a broken connection to node-2 is still its doing.
GRACE_S = 3
WARM_UP_SHARE = 0.25  # of the time, in which caches fill and allocators settle
SAMPLE_S = 2
DESCRIPTORS_SLACK = 8
THREADS_SLACK = 8
OVERLOAD_TTFT_S_MAX = 4 * QUEUE_TIME_S  # of what was accepted: the wait that is allowed, reading, and two busy cores


class Unexpected(Exception):
    pass


def free_port(kind):
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes():
    """pid -> (parent, resident kB), of all processes; the same on Linux and macOS."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True).stdout
    return {int(pid): (int(parent), int(kb)) for pid, parent, kb in (line.split() for line in lines.splitlines())}


def count(pid, what):
    """Entries of a folder of /proc; None where there is none."""
    try:
        return len(os.listdir(f"/proc/{pid}/{what}"))
    except OSError:
        return None


class Node:
    def __init__(self, number, folder, arguments):
        self.number, self.folder, self.arguments = number, folder, arguments
        self.http, self.quic = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
        self.child = None
        # From when to when connections to it may break; the second is None while that lasts.
        self.faults = []

    def start(self, peer, model_name):
        log = open(self.folder / f"node-{self.number}.log", "ab")
        self.child = subprocess.Popen(
            [self.arguments.binary, "serve", "--name", f"node-{self.number}", "--model", self.arguments.model,
             "--model-name", model_name, "--key-file", str(self.folder / "cluster.key"), "--mdns=false",
             "--listen", f"127.0.0.1:{self.quic}", "--peers", f"127.0.0.1:{peer.quic}",
             "--http", f"127.0.0.1:{self.http}", "--max-batch", str(ROWS), "--queue-time", f"{QUEUE_TIME_S} s",
             "--max-context", "2048", "--kv-memory", "256 MiB", "--log", "warn", "--drain-timeout", "20 s"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip

    def engine(self):
        return [pid for pid, (parent, _) in processes().items() if parent == self.child.pid]

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def wait_ready(self):
        until = time.monotonic() + READY_S_MAX
        while time.monotonic() < until:
            if self.child.poll() is not None:
                raise Unexpected(f"node-{self.number} ended with {self.child.returncode}")
            try:
                cluster = json.loads(self.get("/v1/cluster")[1])
                own = [node for node in cluster["nodes"] if node["name"] == f"node-{self.number}"]
                if own and own[0]["engine"]["state"] == "ready":
                    return
            except (OSError, ValueError, http.client.HTTPException):
                pass
            time.sleep(0.3)
        raise Unexpected(f"node-{self.number} was not ready after {READY_S_MAX} s")

    def may_break(self, began):
        """Whether a request that began then and broke now may be this node's fault."""
        return any(end is None or began <= end + GRACE_S for _, end in list(self.faults))


class Soak:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder
        self.nodes = [Node(1, folder, arguments), Node(2, folder, arguments)]
        self.lock = threading.Lock()
        self.outcomes = collections.Counter()
        self.errors = []
        self.faults = collections.Counter()
        self.ended = threading.Event()
        self.samples = []

    def failed(self, what):
        with self.lock:
            self.errors.append(what)
            print(f"soak: unexpected: {what}", file=sys.stderr, flush=True)

    # ---- one request -----------------------------------------------------------------------------------------------

    def ask(self, node, draw):
        """Sends one request of some kind, and says what became of it."""
        kind = draw.choices(
            ["chat", "completion", "session", "schema", "left", "wrong", "other", "look"], [6, 4, 4, 1, 2, 1, 1, 1]
        )[0]
        began = time.monotonic()
        try:
            outcome = self.ask_kind(node, draw, kind)
        except (OSError, http.client.HTTPException) as error:
            if not node.may_break(began):
                raise Unexpected(f"{kind} at node-{node.number}: {type(error).__name__}: {error}") from error
            outcome = "broken by a fault"
            # As a client would, before it asks another router.
            time.sleep(0.2)
        with self.lock:
            self.outcomes[outcome] += 1

    def ask_kind(self, node, draw, kind):
        if kind == "look":
            path = draw.choice(["/metrics", "/v1/models", "/v1/cluster", "/"])
            status, _ = node.get(path)
            if status != 200:
                raise Unexpected(f"{path}: {status}")
            return "looked"
        text = f"{draw.random()} " + "Tell me of the river. " * draw.randrange(1, 25)
        body = {"model": "other" if kind == "other" else "smollm2", "max_tokens": draw.randrange(1, 48), "stream": True}
        body["seed"] = draw.randrange(1 << 30)
        path = "/v1/chat/completions"
        if kind == "completion":
            path, body["prompt"] = "/v1/completions", text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        if kind == "session":
            body["session_id"] = f"session-{draw.randrange(20)}"
            body["messages"].insert(0, {"role": "system", "content": "You are brief. " * 20})
        if kind == "schema":
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}}},
            }
        if kind == "wrong":
            body["temperature"] = -3
        if draw.random() < 0.3 and kind != "left":
            body["stream"] = False
        connection = http.client.HTTPConnection("127.0.0.1", node.http, timeout=REQUEST_S_MAX)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return self.judge(answer, kind, body["stream"], draw)
        finally:
            connection.close()

    def judge(self, answer, kind, stream, draw):
        if answer.status != 200:
            said = answer.read()[:300].decode(errors="replace")
            if answer.status == 429:
                if answer.headers["Retry-After"] is None:
                    raise Unexpected(f"429 without Retry-After: {said}")
                return "refused, queue full"
            if kind == "wrong" and answer.status == 400:
                return "refused, wrong"
            if kind == "other" and answer.status in (404, 503):
                return "refused, no such model now"
            if answer.status == 503 and "is leaving" in said:
                # As good as a connection that it does not take any more: only a node that ends may say so.
                raise ConnectionRefusedError(said)
            raise Unexpected(f"{kind}: {answer.status}: {said}")
        if kind == "wrong":
            raise Unexpected("a negative temperature was served")
        if not stream:
            body = json.loads(answer.read())
            if body["choices"][0]["finish_reason"] not in ("stop", "length"):
                raise Unexpected(f"{kind}: ended as {body['choices'][0]['finish_reason']}")
            return "answered"
        leave_after = draw.randrange(1, 10) if kind == "left" else None
        finish = None
        for number, line in enumerate(answer):
            data = line.decode().strip().removeprefix("data:").strip()
            if leave_after is not None and number >= leave_after:
                return "left by the client"
            if data == "[DONE]":
                if finish not in ("stop", "length"):
                    raise Unexpected(f"{kind}: the stream is done, and its finish_reason is {finish}")
                return "answered"
            # A line with nothing before the colon is a comment: the server is there, and has no news.
            if not data or data.startswith(":"):
                continue
            event = json.loads(data)
            if "error" in event:
                if kind == "other":
                    return "ended, no such model now"
                raise Unexpected(f"{kind}: in the stream: {event['error']}")
            for choice in event["choices"]:
                finish = choice["finish_reason"] or finish
        raise http.client.IncompleteRead(b"", None)

    def client(self, seed):
        draw = random.Random(seed)
        while not self.ended.is_set():
            # node-2's clients are fewer: theirs are the connections that break.
            node = self.nodes[draw.random() < 0.35]
            try:
                self.ask(node, draw)
            except Exception as error:  # noqa: BLE001 - each is a finding
                self.failed(str(error) or repr(error))
            time.sleep(draw.random() * 0.3)

    # ---- faults ------------------------------------------------------------------------------------------------------

    def fault(self, number):
        stays, node = self.nodes
        kind = ["killed", "engine killed", "drained", "model changed"][number % 4]
        self.faults[kind] += 1
        if kind == "engine killed":
            for pid in node.engine():
                os.kill(pid, signal.SIGKILL)
            time.sleep(1)
            node.wait_ready()
            return
        node.faults.append((time.monotonic(), None))
        if kind == "killed":
            node.child.kill()
        else:
            node.child.terminate()
        engine_gone_by = time.monotonic() + 30
        engine = node.engine()
        try:
            code = node.child.wait(40)
        except subprocess.TimeoutExpired:
            self.failed("node-2 did not end within 40 s of SIGTERM")
            node.child.kill()
            code = node.child.wait()
        if kind != "killed" and code != 0:
            self.failed(f"node-2 was drained and ended with {code}")
        while set(engine) & set(processes()):
            if time.monotonic() > engine_gone_by:
                self.failed("node-2 is gone, its engine is not")
                break
            time.sleep(0.1)
        node.start(stays, "other" if kind == "model changed" else "smollm2")
        node.wait_ready()
        node.faults[-1] = (node.faults[-1][0], time.monotonic())

    def sample(self):
        node = self.nodes[0]
        while not self.ended.wait(SAMPLE_S):
            table = processes()
            own = sum(kb for pid, (_, kb) in table.items() if pid == node.child.pid) / 1024
            engine = sum(kb for parent, kb in table.values() if parent == node.child.pid) / 1024
            self.samples.append((time.monotonic(), own, engine))

    def counts(self):
        """node-1's descriptors and threads, at rest."""
        until = time.monotonic() + 30
        node = self.nodes[0]
        while time.monotonic() < until:
            figures = [n["load"] for n in json.loads(node.get("/v1/cluster")[1])["nodes"] if n.get("load")]
            if all(not figure.get("running") and not figure.get("waiting") for figure in figures):
                break
            time.sleep(0.5)
        else:
            self.failed("requests still run 30 s after the last client left")
        time.sleep(2)
        return count(node.child.pid, "fd"), count(node.child.pid, "task")

    # ---- the whole ----------------------------------------------------------------------------------------------------

    def start(self):
        key = self.folder / "cluster.key"
        subprocess.run([self.arguments.binary, "key", "new", "--out", str(key)], check=True, stdout=subprocess.DEVNULL)
        for node, peer in zip(self.nodes, reversed(self.nodes)):
            node.start(peer, "smollm2")
        for node in self.nodes:
            node.wait_ready()

    def load(self):
        clients = [threading.Thread(target=self.client, args=(seed,)) for seed in range(CLIENTS)]
        sampler = threading.Thread(target=self.sample)
        began = time.monotonic()
        until = began + 60 * self.arguments.minutes
        # A little traffic first, so that what is made once is there.
        for seed in range(20):
            self.ask(self.nodes[seed % 2], random.Random(1000 + seed))
        before = self.counts()
        for thread in [*clients, sampler]:
            thread.start()
        try:
            number = 0
            while time.monotonic() + FAULT_INTERVAL_S < until:
                time.sleep(FAULT_INTERVAL_S)
                self.fault(number)
                number += 1
            time.sleep(max(0, until - time.monotonic()))
        finally:
            self.ended.set()
            for thread in [*clients, sampler]:
                thread.join()
        return before, self.counts()

    def overload(self):
        """Many more at once than there is room for: (accepted, refused, 95th percentile of seconds to the first token)."""
        until = time.monotonic() + OVERLOAD_S
        accepted, refused = [], []

        def client(seed):
            draw = random.Random(seed)
            while time.monotonic() < until:
                body = {"model": "smollm2", "max_tokens": 24, "stream": True, "prompt": f"{draw.random()} and then"}
                node = self.nodes[seed % 2]
                began = time.monotonic()
                try:
                    connection = http.client.HTTPConnection("127.0.0.1", node.http, timeout=REQUEST_S_MAX)
                    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    if answer.status == 200:
                        answer.readline()
                        first = time.monotonic() - began
                        self.judge(answer, "overload", True, draw)
                        accepted.append(first)
                    else:
                        self.judge(answer, "overload", True, draw)
                        refused.append(1)
                        # Sooner than it was told to come again, or there would be no overload.
                        time.sleep(min(1, float(answer.headers["Retry-After"])))
                    connection.close()
                except Exception as error:  # noqa: BLE001 - each is a finding
                    self.failed(f"overload: {error!r}")
                    time.sleep(1)

        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(OVERLOAD_CLIENTS)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        accepted.sort()
        p95 = accepted[int(0.95 * (len(accepted) - 1))] if accepted else None
        if not accepted or not refused:
            self.failed(f"overload: {len(accepted)} accepted, {len(refused)} refused: both are expected")
        elif p95 > OVERLOAD_TTFT_S_MAX:
            self.failed(f"overload: the accepted waited {p95:.1f} s for the first token")
        return len(accepted), len(refused), p95

    def stop(self):
        """Ends what still runs; whether every process was gone in time."""
        running = [node for node in self.nodes if node.child and node.child.poll() is None]
        engines = [pid for node in running for pid in node.engine()]
        for node in running:
            node.child.terminate()
        clean = True
        for node in running:
            try:
                clean &= node.child.wait(40) == 0
            except subprocess.TimeoutExpired:
                node.child.kill()
                node.child.wait()
                clean = False
        until = time.monotonic() + 5
        while set(engines) & set(processes()) and time.monotonic() < until:
            time.sleep(0.1)
        return clean and not set(engines) & set(processes())


def slope_per_hour(samples):
    """Least squares, and its standard error: MB an hour."""
    if len(samples) < 10:
        return None, None
    began = samples[0][0]
    hours = [(at - began) / 3600 for at, _ in samples]
    mean_x, mean_y = sum(hours) / len(hours), sum(mb for _, mb in samples) / len(samples)
    spread = sum((x - mean_x) ** 2 for x in hours)
    slope = sum((x - mean_x) * (mb - mean_y) for x, (_, mb) in zip(hours, samples)) / spread
    rest = sum((mb - mean_y - slope * (x - mean_x)) ** 2 for x, (_, mb) in zip(hours, samples))
    return slope, (rest / (len(samples) - 2) / spread) ** 0.5


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=pathlib.Path, help="write [seconds, node's MB, engine's MB] here as JSON")
    arguments = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(arguments, folder)
    before = after = (None, None)
    accepted = refused = p95 = None
    # Ended by somebody: the nodes are ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        soak.start()
        before, after = soak.load()
        accepted, refused, p95 = soak.overload()
    except Unexpected as error:
        soak.failed(str(error))
    finally:
        if not soak.stop():
            soak.failed("a process was left behind, or did not end well")
    for what, slack, was, now in zip(
        ("descriptors", "threads"), (DESCRIPTORS_SLACK, THREADS_SLACK), before, after
    ):
        if was is not None and now is not None and now > was + slack:
            soak.failed(f"{was} {what} before, {now} after")
    settled = [s for s in soak.samples if s[0] >= soak.samples[0][0] + WARM_UP_SHARE * 60 * arguments.minutes]
    slope, error = slope_per_hour([(at, own + engine) for at, own, engine in settled])
    if arguments.samples:
        arguments.samples.write_text(json.dumps(soak.samples))
    if soak.errors:
        print(f"soak: logs are in {folder}", file=sys.stderr)
    print(json.dumps({
        "requests": sum(soak.outcomes.values()) + len(soak.errors) + (accepted or 0) + (refused or 0),
        "unexpected_errors": len(soak.errors),
        "rss_slope_mb_per_hour": slope and round(slope, 1),
        "rss_slope_error": error and round(error, 1),
        "rss_slope_node_and_engine": [
            slope and round(slope, 1)
            for slope, _ in (slope_per_hour([(sample[0], sample[part]) for sample in settled]) for part in (1, 2))
        ],
        "rss_mb_node_and_engine": [[round(mb) for mb in soak.samples[at][1:]] for at in (0, -1)] if soak.samples else None,
        "outcomes": dict(sorted(soak.outcomes.items())),
        "faults": dict(soak.faults),
        "descriptors": [before[0], after[0]],
        "threads": [before[1], after[1]],
        "overload": {"clients": OVERLOAD_CLIENTS, "accepted": accepted, "refused": refused,
                     "ttft_p95_s": p95 and round(p95, 2)},
    }))  # fmt: skip
    sys.exit(1 if soak.errors else 0)


if __name__ == "__main__":
    main()
