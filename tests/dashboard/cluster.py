"""A router and nodes as processes of their own, on loopback ports, with a home of their own."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

READY_S_MAX = 180
STOP_S_MAX = 20


def free_port(kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Process:
    """One mlx-node. Its settings stay, so that it can be started again."""

    def __init__(self, binary, folder, name, settings):
        self.http = free_port()
        self.udp = free_port(socket.SOCK_DGRAM)
        self.url = f"http://127.0.0.1:{self.http}"
        self.log = folder / f"{name}.log"
        self.arguments = [binary, "--name", name, "--mdns=false", "--listen", f"127.0.0.1:{self.udp}"]
        self.arguments += ["--http", f"127.0.0.1:{self.http}", "--drain-timeout", "5 s", *settings]
        self.environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config")}
        self.child = None

    def start(self):
        with open(self.log, "ab") as log:
            self.child = subprocess.Popen(self.arguments, env=self.environment, stdout=log, stderr=log)

    def stop(self, how=signal.SIGTERM):
        if self.child is None:
            return
        self.child.send_signal(how)
        try:
            self.child.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child = None

    def get(self, path, timeout=5):
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            return answer.read().decode()

    def post(self, path, body, timeout=60):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())

    def has(self, nodes):
        """Whether it answers and has so many nodes that are ready."""
        if nodes == 0:
            return bool(self.get("/health"))
        view = json.loads(self.get("/v1/cluster"))
        return sum(node["engine"]["state"] == "ready" for node in view["nodes"]) >= nodes

    def wait(self, nodes):
        end = time.monotonic() + READY_S_MAX
        while True:
            try:
                if self.has(nodes):
                    return
            except (OSError, urllib.error.URLError):
                pass
            if self.child.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.log.name}: not ready\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)


class Cluster:
    """A router that nodes dial, and the nodes."""

    def __init__(self, binary, model, folder, names):
        folder = pathlib.Path(folder)
        key = folder / "cluster.key"
        subprocess.run([binary, "key", "new", "--out", str(key)], check=True, stdout=subprocess.DEVNULL)
        self.key = key.read_text().strip()
        common = ["--key-file", str(key), "--log", "info,api=debug,node=debug"]
        self.router = Process(binary, folder, "router", [*common, "--roles", "router"])
        peers = ["--peers", f"127.0.0.1:{self.router.udp}"]
        node = [*common, *peers, "--roles", "node", "--model", model, "--model-name", "smol", "--max-batch", "4"]
        self.nodes = [Process(binary, folder, name, node) for name in names]
        self.locked = Process(binary, folder, "locked", [*common, "--roles", "router", "--api-keys", "right-key"])

    def __enter__(self):
        for process in [self.router, *self.nodes]:
            process.start()
        self.router.wait(len(self.nodes))
        return self

    def __exit__(self, *_):
        for process in [self.router, *self.nodes, self.locked]:
            process.stop()
