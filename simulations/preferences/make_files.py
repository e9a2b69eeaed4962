"""Make the pairs of this study from E2E NLG: a sentence about a restaurant, and the same with one fact made wrong.

    python simulations/preferences/make_files.py

In the rejected sentence the value of one fact of the table is replaced by another value that E2E has for it.  Which
fact, and by which value, follows from the hash of the record, so that the files are always the same.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "data" / "e2e_nlg"
FILES = Path(__file__).parent / "files"
FACT = re.compile(r"([\w ]+)\[([^\]]+)\]")
KEPT = ("name", "familyFriendly")
"""Facts that stay: nearly all sentences begin with the name, and yes and no are no words of a sentence."""


def rows(name: str) -> Iterator[dict[str, str]]:
    """The records of a file of E2E."""
    with gzip.open(SOURCE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def values() -> dict[str, list[str]]:
    """Every value of each fact."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows("train"):
        for fact, value in FACT.findall(row["mr"]):
            found[fact.strip()].add(value)
    return {fact: sorted(some) for fact, some in found.items() if fact not in KEPT and len(some) > 1}


def corrupted(row: dict[str, str], known: dict[str, list[str]]) -> str | None:
    """The sentence with one fact made wrong; None: none of its facts stands in it word by word."""
    facts = [(fact.strip(), value) for fact, value in FACT.findall(row["mr"])]
    told = [(fact, value) for fact, value in facts if fact in known and len(places(value, row["ref"])) == 1]
    if not told:
        return None
    digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
    fact, value = told[digest[0] % len(told)]
    others = [other for other in known[fact] if other != value]
    (place,) = places(value, row["ref"])
    wrong = others[int.from_bytes(digest[1:5]) % len(others)]
    return row["ref"][:place] + wrong + row["ref"][place + len(value) :]


def places(value: str, text: str) -> list[int]:
    """Where a value stands in a text as words of their own."""
    return [found.start() for found in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text)]


def main() -> None:
    FILES.mkdir(exist_ok=True)
    known = values()
    for name in ("train", "validation", "test"):
        with (FILES / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for row in rows(name):
                if (rejected := corrupted(row, known)) is not None:
                    pair = {"mr": row["mr"], "chosen": row["ref"], "rejected": rejected}
                    out.write(json.dumps(pair, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
