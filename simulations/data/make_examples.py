"""Make the small files of docs/tutorial.md and docs/other_tasks.md from the data of the simulations.

    python simulations/data/make_examples.py [--into FOLDER]

Each has another kind of record.  What the right answer is follows from E2E's table of facts beside each sentence.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
INTENTS = ("card_arrival", "exchange_rate", "lost_or_stolen_card", "pending_cash_withdrawal", "request_refund")
ROWS, TEXTS_A_SPEAKER = 400, 5
FACT = re.compile(r"([\w ]+)\[([^\]]*)\]")


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


def reviews() -> Iterator[tuple[dict[str, str], list[str]]]:
    """Each restaurant's facts by name, and the sentences that say them, in the order of the data set."""
    told: dict[str, list[str]] = {}
    for row in rows_of("e2e_nlg"):
        told.setdefault(row["mr"], []).append(row["ref"])
    for mr, texts in told.items():
        yield {name.strip(): value for name, value in FACT.findall(mr)}, texts


def table(path: Path, header: tuple[str, ...], records: Iterator[tuple[object, ...]]) -> None:
    """The first records, as CSV."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(islice(records, ROWS))


def features(path: Path) -> None:
    """Sentences about restaurants, and what they offer: any number of labels."""
    offers = (("eatType", "coffee shop"), ("area", "riverside"), ("familyFriendly", "yes"), ("priceRange", "cheap"))

    def records() -> Iterator[tuple[str, str]]:
        for facts, texts in reviews():
            has = [value if value != "yes" else "families" for name, value in offers if facts.get(name) == value]
            yield texts[0], ";".join(has)

    table(path, ("text", "tags"), records())


def stars(path: Path) -> None:
    """The same with a rating in three steps."""
    steps = {"low": 1, "1 out of 5": 1, "average": 3, "3 out of 5": 3, "high": 5, "5 out of 5": 5}
    rated = ((texts[0], steps[facts["customer rating"]]) for facts, texts in reviews() if "customer rating" in facts)
    table(path, ("text", "stars"), rated)


def shares(path: Path) -> None:
    """The same with a number: the share of the table's facts that stand in the sentence word by word."""
    records = (
        (texts[0], f"{sum(value.lower() in texts[0].lower() for value in facts.values()) / len(facts):.2f}")
        for facts, texts in reviews()
    )
    table(path, ("text", "score"), records)


def further(places: list[Any], steps: int) -> list[Any]:
    """For each table of facts the one so many steps on.  The next ones often have the same restaurant's name."""
    return places[steps:] + places[:steps]


def same_facts(path: Path) -> None:
    """Two people about the same facts, and somebody about others."""
    places = [texts for _, texts in reviews() if len(texts) > 2]
    with path.open("w", encoding="utf-8") as stream:
        for texts, others in islice(zip(places, further(places, 1), strict=True), ROWS):
            record = {"anchor": texts[0], "positive": texts[1], "negative": others[2]}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def answers(path: Path) -> None:
    """A request, an answer to it, and an answer that is about another restaurant."""
    places = [(facts, texts) for facts, texts in reviews() if len(texts) > 1]
    with path.open("w", encoding="utf-8") as stream:
        for (facts, texts), (_, others) in islice(zip(places, further(places, 200), strict=True), ROWS):
            asked = "Describe this place. " + ", ".join(f"{name}: {value}" for name, value in facts.items())
            record = {"prompt": asked, "chosen": texts[0], "rejected": others[1]}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


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
    features(folder / "features.csv")
    stars(folder / "stars.csv")
    shares(folder / "shares.csv")
    same_facts(folder / "same_facts.jsonl")
    answers(folder / "answers.jsonl")


if __name__ == "__main__":
    main()
