"""Make the files of two studies from E2E NLG: sentences about restaurants with labels, and with a rating.

    python simulations/data/make_reviews.py

What a sentence is labelled with stands in its table of facts, which the person who wrote the sentence had to tell.
"""

from __future__ import annotations

import json
from pathlib import Path

from make_examples import FACT, rows_of

STUDIES = Path(__file__).parents[1]
LABELS = {
    ("area", "riverside"): "riverside",
    ("area", "city centre"): "city centre",
    ("familyFriendly", "yes"): "for families",
    ("familyFriendly", "no"): "not for families",
    ("priceRange", "cheap"): "cheap",
    ("priceRange", "less than £20"): "cheap",
    ("priceRange", "moderate"): "moderate",
    ("priceRange", "£20-25"): "moderate",
    ("priceRange", "high"): "expensive",
    ("priceRange", "more than £30"): "expensive",
}
"""Facts that are labels.  Kinds of food are none: the test file has others than the train file."""
STEPS = (("low", "1 out of 5"), ("average", "3 out of 5"), ("high", "5 out of 5"))
RATINGS = {word: step[0] for step in STEPS for word in step}


def main() -> None:
    for name in ("train", "validation", "test"):
        rows = rows_of("e2e_nlg", f"{name}.jsonl.gz")
        told = [({fact.strip(): value for fact, value in FACT.findall(row["mr"])}, row["ref"]) for row in rows]
        labelled = [(text, [LABELS[fact] for fact in facts.items() if fact in LABELS]) for facts, text in told]
        write("restaurant_labels", name, [{"text": text, "labels": labels} for text, labels in labelled])
        rated = [(facts["customer rating"], text) for facts, text in told if "customer rating" in facts]
        write("restaurant_ratings", name, [{"text": text, "label": RATINGS[rating]} for rating, text in rated])


def write(study: str, name: str, records: list[dict[str, object]]) -> None:
    """One file of a study."""
    path = STUDIES / study / "files" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
