"""`helm lint CHART` and `helm template NAME CHART` by Helm 4's own engine, as a package of Python has it.

A stand-in for machines without helm; `deployment_files.helm` starts it.  It takes the options that tests use.
"""

from __future__ import annotations

import argparse
import re
import sys
from itertools import pairwise
from typing import Any

from helm_python.chart import Chart, lint
from helm_python.errors import HelmError


def main() -> int:
    """Print what helm prints; its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["lint", "template"])
    parser.add_argument("words", nargs="+")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--set-string", action="append", default=[])
    asked = parser.parse_args()
    values: dict[str, Any] = {}
    for settings, typed in ((asked.set, True), (asked.set_string, False)):
        for setting in settings:
            key, _, value = setting.partition("=")
            put(values, key, as_helm_reads(value) if typed else value)
    try:
        if asked.action == "lint":
            found = lint(asked.words[0], values)
            for message in found["messages"]:
                print(message["severity"], message["path"], message["error"])
            return 1 if found["errors"] else 0
        name, chart = asked.words
        made = Chart.load(chart).render(values, name=name, namespace=asked.namespace)
    except HelmError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in sorted(made.items()):
        print(f"---\n# Source: {path}\n{text}")
    return 0


def put(values: dict[str, Any], key: str, value: object) -> None:
    """Set a value at a key such as `dns.cidrs[0]`."""
    parts = [name or int(number) for name, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key)]
    at: Any = values
    for part, following in pairwise(parts):
        new: Any = [] if isinstance(following, int) else {}
        if isinstance(part, int):
            at.extend([new] if len(at) <= part else [])
            at = at[part]
        else:
            at = at.setdefault(part, new)
    if isinstance(at, list):
        at.append(value)
    else:
        at[parts[-1]] = value


def as_helm_reads(text: str) -> bool | int | str:
    """What `--set` takes a text for."""
    return {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)


if __name__ == "__main__":
    sys.exit(main())
