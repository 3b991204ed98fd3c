"""schemathesis: requests made from /openapi.json get no 5xx, and answers that are as it says."""

import os
import pathlib
import subprocess
import sys
import tempfile

from harness import API_KEY, test

# With what is made to cover each schema it is some thousand requests, which take a debug build minutes.
COVERAGE = bool(os.environ.get("CLIENTS_COVERAGE"))
PHASES = "examples,coverage,fuzzing" if COVERAGE else "examples,fuzzing"
RUN_SECONDS = 1500 if COVERAGE else 400
# Requests of each operation; each takes about 10 ms, and what is generated is short in a context so small.
EXAMPLES = 40
CONTEXT = 96
SEED = 20260101
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@test
def answers_are_as_the_document_says(node):
    flags = ["--max-batch", "4", "--max-context", str(CONTEXT)]
    with tempfile.TemporaryDirectory() as folder, node.beside(folder, *flags) as small:
        program = [pathlib.Path(sys.executable).parent / "schemathesis", "run"]
        program += [f"http://{small.address}/openapi.json", "--header", f"Authorization: Bearer {API_KEY}"]
        program += ["--checks", CHECKS, "--max-examples", str(EXAMPLES), "--seed", str(SEED)]
        program += ["--phases", PHASES, "--generation-database", "none", "--no-color"]
        program += ["--request-timeout", "60"]
        hooks = dict(os.environ, SCHEMATHESIS_HOOKS="hooks", PYTHONPATH=str(pathlib.Path(__file__).parent))
        run = subprocess.run(program, cwd=folder, env=hooks, capture_output=True, text=True, timeout=RUN_SECONDS)
        assert run.returncode == 0, f"seed {SEED}\n{run.stdout[-20000:]}\n{run.stderr[-4000:]}"
        print("  " + "\n  ".join(line for line in run.stdout.splitlines()[-12:] if line.strip()))
