"""Make the files of this study from Banking77: questions with their intents in words, and the intents alone.

python simulations/synthetic_texts/make_files.py
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "data" / "banking77"
FILES = Path(__file__).parent / "files"


def main() -> None:
    rows: dict[str, list[dict[str, str]]] = {}
    for name in ("train", "validation"):
        with gzip.open(SOURCE / f"{name}.jsonl.gz", "rt") as stream:
            found = [json.loads(line) for line in stream]
        rows[name] = [{"intent": row["label"].replace("_", " ").replace("?", "").lower(), **row} for row in found]
    rows["codes"] = [{"intent": intent} for intent in sorted({row["intent"] for row in rows["train"]})]
    FILES.mkdir(exist_ok=True)
    for name, found in rows.items():
        (FILES / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
