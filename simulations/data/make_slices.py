"""Make the train, validation and test files of the simulations from a folder of source files.

    python simulations/data/make_slices.py SOURCE [--into FOLDER]

SOURCE holds banking77/{train,test}.jsonl.gz, medical_abstracts/{train,test}.jsonl.gz,
e2e_nlg/{dev,test}.jsonl.gz and users_{ubuntu_irc,shakespeare}/all.jsonl.gz.  Rows are copied as they
are.  A row goes to validation (and where the source has no test file, to test) by the keyed hash of
one of its fields alone, so rows that share that field (repeated abstracts, references of one meaning,
everything of one user) stay together.  The same source gives the same bytes (with the same zlib).
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.data import Record
from fedtune.data.partition import hash_unit, is_heldout

KEY = b"fedtune simulations: validation"


@dataclass(frozen=True, kw_only=True)
class Slices:
    """How one dataset is cut.

    Attributes:
        train: source file that is split into train and validation.
        group: field whose hash decides.
        fraction: share of the distinct values of `group` that go to validation.
        test_fraction: share of the others that go to test; 0: the source has a test file.
    """

    train: str = "train.jsonl.gz"
    group: str = "text"
    fraction: float
    test_fraction: float = 0.0


SLICES = {
    "banking77": Slices(fraction=0.07),
    "medical_abstracts": Slices(fraction=0.12),
    "e2e_nlg": Slices(train="dev.jsonl.gz", group="mr", fraction=0.08),
    "users_ubuntu_irc": Slices(train="all.jsonl.gz", group="user", fraction=0.1, test_fraction=0.15),
    "users_shakespeare": Slices(train="all.jsonl.gz", group="user", fraction=0.1, test_fraction=0.15),
}


def is_validation(row: dict[str, object], slices: Slices) -> bool:
    """Whether a row goes to validation, by its group alone."""
    group = Record({slices.group: str(row[slices.group])})
    return is_heldout(group, fraction=slices.fraction, key=KEY)


def is_test(row: dict[str, object], slices: Slices) -> bool:
    """Whether a row that is not for validation goes to test, by its group alone."""
    group = Record({slices.group: str(row[slices.group])})
    return hash_unit(group, purpose="test", key=KEY) < slices.test_fraction


def make(source: Path, into: Path, slices: Slices) -> dict[str, int]:
    """Write the three files of one dataset; returns the rows of each."""
    into.mkdir(parents=True, exist_ok=True)
    sides: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for line in _lines(source / slices.train):
        row = json.loads(line)
        side = "validation" if is_validation(row, slices) else "test" if is_test(row, slices) else "train"
        sides[side].append(line)
    if not slices.test_fraction:
        sides["test"] = list(_lines(source / "test.jsonl.gz"))
    return {side: _write(into / f"{side}.jsonl.gz", lines) for side, lines in sides.items()}


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
