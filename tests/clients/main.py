"""Clients against one mlx-node that is started here; see scripts/test-clients."""

import argparse
import json
import pathlib
import sys
import tempfile
import time
import traceback

import anthropic_api
import chat
import conformance
import embeddings
import failures
import javascript
import limits
import log_likelihood
import ollama_api
import responses
import structured
from harness import TESTS, Node

MODULES = [
    chat, structured, responses, anthropic_api, ollama_api, embeddings, limits, log_likelihood, javascript, failures, conformance,
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--only", default="", help="run the tests whose name contains this")
    arguments = parser.parse_args()
    tests = [(function.__name__, function) for function in TESTS]
    tests.append(("sixteen_at_once", lambda node: chat.sixteen_at_once(node, arguments.seconds)))
    assert all(any(function.__module__ == module.__name__ for function in TESTS) for module in MODULES)
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        binary, model = (str(pathlib.Path(path).resolve()) for path in (arguments.binary, arguments.model))
        node = Node(binary, model, folder)
        try:
            node.wait_ready()
            for name, function in tests:
                if arguments.only not in name:
                    continue
                began = time.monotonic()
                try:
                    function(node)
                    passed += 1
                    print(f"ok {name} ({time.monotonic() - began:.1f} s)", flush=True)
                except Exception:
                    failed += 1
                    print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
            node.stop()
        finally:
            if node.process.poll() is None:
                node.process.kill()
                node.process.wait()
            if failed:
                print("last lines of the node's log:\n" + "\n".join(node.log_path.read_text().splitlines()[-40:]))
    print(json.dumps({"passed": passed, "failed": failed}))
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
