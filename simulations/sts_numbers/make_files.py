"""Make the files of this study from STS-B: both sentences as one text, and their score as the target.

    python simulations/sts_numbers/make_files.py FOLDER

FOLDER holds train.jsonl.gz, dev.jsonl.gz and test.jsonl.gz, with sentence1, sentence2 and score in each line.  The
sentences may be used for research and not be handed on, so `files/` is no part of the repository.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

FILES = Path(__file__).parent / "files"
BETWEEN = " [SEP] "


def main() -> None:
    source = Path(sys.argv[1])
    FILES.mkdir(exist_ok=True)
    for name in ("train", "dev", "test"):
        with (
            gzip.open(source / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines,
            (FILES / f"{name}.jsonl").open("w", encoding="utf-8") as out,
        ):
            for row in map(json.loads, lines):
                text = BETWEEN.join((row["sentence1"], row["sentence2"]))
                out.write(json.dumps({"text": text, "score": float(row["score"])}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
