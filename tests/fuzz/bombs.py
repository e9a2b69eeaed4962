"""Small inputs that expand to large ones: each is parsed in this process, which reports the memory used.

python -m tests.fuzz.bombs
"""

import gzip
import json
import re
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from . import file_targets, seeds
from .target import Target
from .targets import TARGETS

MIB = 1 << 20
MAX_MIB = 100
"""The most MiB by which a process may grow."""


def main() -> None:
    """Print one JSON line for each bomb: its name, its size in bytes, and the growth of the process in MiB."""
    # A safety limit, far above what the imports need, and far below what the bombs expand to.
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    seeds.run_folder()
    for name, target, data in list_bombs():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        target.check(data)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        sys.stdout.write(json.dumps({"bomb": name, "bytes": len(data), "mib": round(grown, 1)}) + "\n")


def list_bombs() -> Iterator[tuple[str, Target, bytes]]:
    """List the name, target and input of each bomb."""
    # Twice the allowed growth: more would show no more, and takes time to unpack.
    member, members = gzip.compress(b"a" * (16 * MIB), mtime=0), 2 * MAX_MIB // 16
    quoted = gzip.compress(b'body,kind\n"', mtime=0)
    for name, data in (
        ("200 MiB in one line", member * members),
        ("200 MiB of nesting", gzip.compress(b"[" * (16 * MIB), mtime=0) * members),
        ("a million blank lines", gzip.compress(b"\n" * MIB, mtime=0)),
    ):
        yield name, TARGETS["data.jsonl.gz"], data
    csv = Target("csv", TARGETS["data.csv"].broken, file_targets._parse_rows("bomb.csv.gz"), TARGETS["data.csv"].errors)
    yield "200 MiB in one cell", csv, quoted + member * members
    yield "a cell of 16 million lines", csv, quoted + gzip.compress(b"a\n" * (8 * MIB), mtime=0) * 2
    for name, header in (
        ("an update that announces 4 GB", {"tensors": [["b", [1 << 30]]]}),
        ("an update of a million empty tensors", {"tensors": [["b", [0]]] * 10**6}),
        ("an update of impossible shape", {"tensors": [["b", [1 << 62, 1 << 62, 0]]]}),
    ):
        fields = json.dumps({"site": "a", "run": "r", "round": 1, "scores": None, **header}).encode()
        yield name, TARGETS["update"], b"fedtune-update-2\n" + struct.pack("<Q", len(fields)) + fields
    yield "an update whose header has 4 GB", TARGETS["update"], b"fedtune-update-2\n" + struct.pack("<Q", 1 << 32)
    tensor = json.dumps({"b": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}}).encode()
    yield "safetensors of 4 GB", TARGETS["adapter"], struct.pack("<Q", len(tensor)) + tensor
    empty = json.dumps({f"b{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10**6)}).encode()
    yield "safetensors of a million empty tensors", TARGETS["adapter"], struct.pack("<Q", len(empty)) + empty
    yield "a safetensors header of 4 GB", TARGETS["adapter"], struct.pack("<Q", 1 << 32)
    # Nine levels of nine references each: 400 million values.
    laughs = ["l0: &l0 [x, x, x, x, x, x, x, x, x]", "name: *l8"]
    laughs[1:1] = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 9)]
    for name in ("config.yaml", "config.yaml of a resumed run"):
        yield f"references in {name}", TARGETS[name], "\n".join(laughs).encode()
    text, count = re.subn(r"num_sites: \d+", f"num_sites: {10**9}", (seeds.run_folder() / "config.yaml").read_text())
    assert count == 1
    yield "a billion sites", TARGETS["config.yaml"], text.encode()
    saved = json.loads((seeds.run_folder() / "adapter/fedtune.json").read_text())
    saved["lora"]["rank"] = 1 << 30
    yield "a rank of a billion", TARGETS["saved adapter's settings"], json.dumps(saved).encode()


if __name__ == "__main__":
    assert Path.cwd() == Path(__file__).parents[2], "run it in the repository's root"
    main()
