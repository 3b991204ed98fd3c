"""The official openai client for JavaScript, in a process of its own."""

import os
import shutil
import subprocess

from harness import API_KEY, test


def run_program(node, name):
    """Runs one of the programs here against a node."""
    modules = os.environ.get("MLX_TEST_NODE_MODULES")
    if modules is None:
        print("  skipped: no Node.js with npm on this machine")
        return
    program = [shutil.which("node"), name, f"http://{node.address}/v1", API_KEY]
    run = subprocess.run(program, cwd=modules, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    print("  " + run.stdout.strip().replace("\n", "\n  "))


@test
def the_javascript_client_works(node):
    run_program(node, "client.mjs")
    node.wait_idle()
