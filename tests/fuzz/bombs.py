"""Small inputs that stand for much: each is parsed in this process, which reports what memory that took.

python -m tests.fuzz.bombs
"""

import gzip
import json
import resource
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter

from fedtune.report import signing
from fedtune.report.facts import LedgerFacts
from fedtune.report.rederive import derive, problems

from . import file_targets, seeds, wire_targets
from .target import Target

_TARGETS = {target.name: target for target in (*wire_targets.TARGETS, *file_targets.TARGETS)}
MIB = 1 << 20
MOST_MIB = 100
"""By so much may a process grow."""


def main() -> None:
    """Print one JSON line for each bomb: its name, its size in bytes, and by how many MiB the process grew."""
    # A way out, should one of them go off: far above what the imports take, far below what the bombs stand for.
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    seeds.run_folder()
    for name, target, data in bombs():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        target.check(data)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        sys.stdout.write(json.dumps({"bomb": name, "bytes": len(data), "mib": round(grown, 1)}) + "\n")


def bombs() -> Iterator[tuple[str, Target, bytes]]:
    """Name, target and input of each."""
    # Twice what a process may grow by: more would show no more, and takes its time to unpack.
    member, members = gzip.compress(b"a" * (16 * MIB), mtime=0), 2 * MOST_MIB // 16
    quoted = gzip.compress(b'body,kind\n"', mtime=0)
    for name, data in (
        ("200 MiB in one line", member * members),
        ("200 MiB of nesting", gzip.compress(b"[" * (16 * MIB), mtime=0) * members),
        ("a million blank lines", gzip.compress(b"\n" * MIB, mtime=0)),
    ):
        yield name, _TARGETS["data.jsonl.gz"], data
    csv = Target("csv", _TARGETS["data.csv"].broken, file_targets._rows("bomb.csv.gz"), _TARGETS["data.csv"].errors)
    yield "200 MiB in one cell", csv, quoted + member * members
    yield "a cell of 16 million lines", csv, quoted + gzip.compress(b"a\n" * (8 * MIB), mtime=0) * 2
    for name, header in (
        ("an update that announces 4 GB", {"tensors": [["b", [1 << 30]]]}),
        ("an update of a million empty tensors", {"tensors": [["b", [0]]] * 10**6}),
        ("an update of impossible shape", {"tensors": [["b", [1 << 62, 1 << 62, 0]]]}),
    ):
        fields = {"site": "a", "run": "r", "round": 1, "scores": None, **header}
        yield name, _TARGETS["update"], _update(json.dumps(fields).encode())
    yield "an update whose header has 4 GB", _TARGETS["update"], b"fedtune-update-2\n" + struct.pack("<Q", 1 << 32)
    tensor = json.dumps({"b": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}}).encode()
    yield "safetensors of 4 GB", _TARGETS["adapter"], struct.pack("<Q", len(tensor)) + tensor
    yield "a safetensors header of 4 GB", _TARGETS["adapter"], struct.pack("<Q", 1 << 32)
    for name in ("config.yaml", "config.yaml of a resumed run"):
        yield f"references in {name}", _TARGETS[name], _laughs()
    yield "a billion sites", _TARGETS["config.yaml"], _with_sites(10**9)
    saved = json.loads((seeds.run_folder() / "adapter/fedtune.json").read_text())
    saved["lora"]["rank"] = 1 << 30
    yield "a report of 3000 mechanisms", _VERIFIED, _of_many_mechanisms(3000)
    yield "a rank of a billion", _TARGETS["saved adapter's settings"], json.dumps(saved).encode()


def _of_many_mechanisms(count: int) -> bytes:
    """A ledger's report whose charges would take half an hour to compute: each run has another mechanism."""
    path = Path(__file__).parents[1] / "report/reports/ledger.json"
    report = derive(TypeAdapter(LedgerFacts).validate_json(path.read_bytes(), strict=True))
    facts = cast(LedgerFacts, report.facts)
    plans = {f"r{n}": replace(facts.runs[0].plan, noise_multiplier=1 + n * 1e-6) for n in range(count)}
    runs = tuple(replace(facts.runs[0], run=name, plan=plan) for name, plan in plans.items())
    charges = tuple(replace(facts.charges[0], run=name) for name in plans)
    return signing.to_text(replace(report, facts=replace(facts, runs=runs, charges=charges))).encode()


def _verified(data: bytes) -> None:
    began = time.monotonic()
    assert [problem.where for problem in problems(signing.read(data))] == ["facts"]
    assert time.monotonic() - began < 10


_VERIFIED = Target("report verify", _TARGETS["report.json"].broken, _verified, ())


def _update(header: bytes) -> bytes:
    return b"fedtune-update-2\n" + struct.pack("<Q", len(header)) + header


def _laughs() -> bytes:
    """Nine levels of nine references each: 400 million values."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join([*lines, "name: *l8"]).encode()


def _with_sites(count: int) -> bytes:
    text = (seeds.run_folder() / "config.yaml").read_text()
    (line,) = (line for line in text.splitlines() if line.strip().startswith("num_sites:"))
    return text.replace(line, f"  num_sites: {count}").encode()


if __name__ == "__main__":
    assert Path.cwd() == Path(__file__).parents[2], "run it in the repository's root"
    main()
