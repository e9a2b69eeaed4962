"""Write the two files of this study: all 4,672 training records, and 300 test tables with every text for them.

    python simulations/smollm2_e2e/files.py

They are made from simulations/data/e2e_nlg and lie in `data` beside this script.  The recipe was chosen on the
validation file, before the study ran; its records are training records here.  A table is chosen by the hash of its own
text alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "data" / "e2e_nlg"
INTO = Path(__file__).parent / "data"
TABLES = 300


def lines_of(name: str) -> list[bytes]:
    with gzip.open(SOURCE / name, "rb") as stream:
        return list(stream)


def table_of(line: bytes) -> str:
    return str(json.loads(line)["mr"])


def main() -> None:
    test = lines_of("test.jsonl.gz")
    tables = sorted({table_of(line) for line in test}, key=lambda table: hashlib.sha256(table.encode()).digest())
    chosen = set(tables[:TABLES])
    INTO.mkdir(exist_ok=True)
    for name, lines in {
        "all.jsonl": lines_of("train.jsonl.gz") + lines_of("validation.jsonl.gz"),
        "tables.jsonl": [line for line in test if table_of(line) in chosen],
    }.items():
        (INTO / name).write_bytes(b"".join(lines))
        print(name, len(lines))


if __name__ == "__main__":
    main()
