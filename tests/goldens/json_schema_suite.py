#!/usr/bin/env python3
"""Writes json_schema_suite.json: the cases of the JSON Schema Test Suite, each once, of the drafts that name it.

    python3 -m pip download --no-deps --no-binary :all: jsonschema==4.26.0 && tar xf jsonschema-4.26.0.tar.gz
    tests/goldens/json_schema_suite.py jsonschema-4.26.0/json

The source distribution of the Python package jsonschema carries the suite. What differs between two drafts in its
`$schema` alone is one case of both.
"""

import json
import pathlib
import sys

DRAFTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def main():
    suite = pathlib.Path(sys.argv[1])
    cases = {}
    for draft, uri in DRAFTS.items():
        folder = suite / "tests" / draft
        for path in sorted(folder.rglob("*.json")):
            for group in json.loads(path.read_text()):
                schema = group["schema"]
                if isinstance(schema, dict) and schema.get("$schema") == uri:
                    schema = {key: value for key, value in schema.items() if key != "$schema"}
                # As texts: a number's spelling matters to a grammar.
                tests = [[compact(test["data"]), test["valid"]] for test in group["tests"]]
                name = f"{path.relative_to(folder).with_suffix('')}: {group['description']}"
                cases.setdefault((name, compact(schema), compact(tests)), []).append(draft)
    out = {
        "source": "https://github.com/json-schema-org/JSON-Schema-Test-Suite",
        "licence": (suite / "LICENSE").read_text(),
        "drafts": DRAFTS,
        "cases": [],
    }
    lines = [
        compact({"name": name, "drafts": drafts, "schema": json.loads(schema), "tests": json.loads(tests)})
        for (name, schema, tests), drafts in cases.items()
    ]
    head = compact(out).removesuffix("]}")
    target = pathlib.Path(__file__).with_suffix(".json")
    target.write_text(head + "\n" + ",\n".join(lines) + "\n]}\n")
    print(f"{len(lines)} cases, {sum(map(len, cases.values()))} with those of each draft")


if __name__ == "__main__":
    main()
