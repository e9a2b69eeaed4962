"""Make the train, validation and test files of the simulations from a folder of source files.

    python simulations/data/make_slices.py SOURCE [--into FOLDER]

SOURCE holds banking77/{train,test}.jsonl.gz, medical_abstracts/{train,test}.jsonl.gz and
e2e_nlg/{dev,test}.jsonl.gz.  Rows are copied as they are.  A row goes to validation by the keyed hash
of one of its fields alone, so rows that share that field (repeated abstracts, references of one
meaning) stay together.  The same source gives the same bytes (with the same zlib).
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.data import Record, is_heldout

KEY = b"fedtune simulations: validation"


@dataclass(frozen=True, kw_only=True)
class Slices:
    """How one dataset is cut.

    Attributes:
        train: source file that is split into train and validation.
        group: field whose hash decides.
        fraction: share of the distinct values of `group` that go to validation.
    """

    train: str = "train.jsonl.gz"
    group: str = "text"
    fraction: float


SLICES = {
    "banking77": Slices(fraction=0.07),
    "medical_abstracts": Slices(fraction=0.12),
    "e2e_nlg": Slices(train="dev.jsonl.gz", group="mr", fraction=0.08),
}


def is_validation(row: dict[str, object], slices: Slices) -> bool:
    """Whether a row goes to validation, by its group alone."""
    group = Record({slices.group: str(row[slices.group])})
    return is_heldout(group, fraction=slices.fraction, key=KEY)


def make(source: Path, into: Path, slices: Slices) -> dict[str, int]:
    """Write the three files of one dataset; returns the rows of each."""
    into.mkdir(parents=True, exist_ok=True)
    train: list[bytes] = []
    validation: list[bytes] = []
    for line in _lines(source / slices.train):
        (validation if is_validation(json.loads(line), slices) else train).append(line)
    return {
        "train": _write(into / "train.jsonl.gz", train),
        "validation": _write(into / "validation.jsonl.gz", validation),
        "test": _write(into / "test.jsonl.gz", list(_lines(source / "test.jsonl.gz"))),
    }


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        yield from stream


def _write(path: Path, lines: list[bytes]) -> int:
    # Neither a name nor a time in the header: they would change the bytes.
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream:
        stream.writelines(lines)
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the source files")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="folder to write to (default: here)")
    arguments = parser.parse_args()
    for name, slices in SLICES.items():
        rows = make(arguments.source / name, arguments.into / name, slices)
        print(name, *(f"{side} {count}" for side, count in rows.items()))


if __name__ == "__main__":
    main()
