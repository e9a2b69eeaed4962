"""Make the four small files of docs/tutorial.md from the data of the simulations.

    python simulations/data/make_examples.py [--into FOLDER]

Each has another format and another kind of record: a CSV of questions with a label, an array of instructions in
Alpaca's columns, conversations as JSON lines, and plain texts in Parquet.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
INTENTS = ("card_arrival", "exchange_rate", "lost_or_stolen_card", "pending_cash_withdrawal", "request_refund")
ROWS, TEXTS_A_SPEAKER = 400, 5


def rows_of(name: str, file: str = "train.jsonl.gz") -> Iterator[dict[str, str]]:
    """The records of one of the data sets beside this file."""
    with gzip.open(HERE / name / file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def tickets(path: Path) -> None:
    """Questions of a bank's customers; the team that answers is the label."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("body", "team"))
        writer.writerows((row["text"], row["label"]) for row in rows_of("banking77") if row["label"] in INTENTS)


def described() -> list[tuple[str, str]]:
    """Facts about a restaurant in words, and a sentence that says them: at most two for the same facts."""
    pairs: dict[str, list[str]] = {}
    for row in rows_of("e2e_nlg"):
        pairs.setdefault(row["mr"], []).append(row["ref"])
    facts = ((re.sub(r"(\w+)\[([^]]*)\]", r"\1: \2", mr), refs[:2]) for mr, refs in pairs.items())
    return [(mr, ref) for mr, refs in facts for ref in refs][:ROWS]


def places(path: Path) -> None:
    """Alpaca's columns."""
    asked = "Write one sentence about this restaurant."
    records = [{"instruction": asked, "input": facts, "output": text} for facts, text in described()]
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def chats(path: Path) -> None:
    """OpenAI's `messages`."""
    with path.open("w", encoding="utf-8") as stream:
        for facts, text in described():
            asked = f"Please tell my guests about a restaurant. {facts}"
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
            stream.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def speeches(path: Path) -> None:
    """Plain texts, and who said them."""
    said: Counter[str] = Counter()
    rows = []
    for row in rows_of("users_shakespeare"):
        said[row["user"]] += 1
        if said[row["user"]] <= TEXTS_A_SPEAKER and len(row["text"]) <= 160:
            rows.append(row)
    table = pa.table({name: [row[name] for row in rows] for name in ("text", "user")})
    pq.write_table(table, path, compression="zstd")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=HERE / "examples")
    folder = parser.parse_args().into
    folder.mkdir(exist_ok=True)
    tickets(folder / "tickets.csv")
    places(folder / "places.json")
    chats(folder / "chats.jsonl")
    speeches(folder / "speeches.parquet")


if __name__ == "__main__":
    main()
