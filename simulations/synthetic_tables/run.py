"""E2E NLG from texts that a privately tuned model wrote: how good is a model that saw no real sentence?

    python simulations/smollm2_e2e/files.py
    python simulations/synthetic_tables/run.py --runs RUNS            all; what is finished in RUNS is taken from there
    python simulations/synthetic_tables/run.py --runs RUNS --only none    one line; the others stay

Four guides tune SmolLM2 to write a sentence for a table.  It writes 1,000 for tables made up from the public list of
what a table may say.  A second SmolLM2 learns from these alone, and is scored on 300 real test tables; or from a third
of them, those with most votes, where each of the guides' sentences votes once for the nearest of all texts.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import fedtune
from fedtune.evaluation.spec import WritingSpec
from fedtune.privacy.durable import write_durably
from fedtune.studies.synthetic import as_written, chosen

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "synthetic_texts")]
import readme  # noqa: E402
import shared_states  # noqa: E402
from kept_runs import asked, finished  # noqa: E402
from run import drawn_by, read, write  # noqa: E402

DATA = HERE.parent / "smollm2_e2e" / "data"
ROWS, KEPT = 1000, 333
DRAWN = WritingSpec(max_new_tokens=60, temperature=0.7, top_p=0.95)
# Names are made up; what else a table may say is the data set's public list (Novikova et al. 2017, table 1).
NAMES = ["The Olive Tree", "Blue Door", "The Old Mill", "Harbour View", "Rosewood", "Little Acorn", "The Lantern"]
PLACES = ["Station Hotel", "The Red Lion", "Market Hall", "Green Park Inn", "Café Luna"]
OTHERS = {
    "eatType": ["coffee shop", "pub", "restaurant"],
    "food": ["English", "Chinese", "French", "Italian", "Japanese", "Indian", "Fast food"],
    "priceRange": ["cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"],
    "customer rating": ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"],
    "area": ["riverside", "city centre"],
    "familyFriendly": ["yes", "no"],
    "near": PLACES,
}
GUIDES = {
    "data.train_file": str(DATA / "all.jsonl"),
    "data.test_file": str(DATA / "tables.jsonl"),
    "data.declared_sizes": 1150,
    "federation.num_sites": 4,
    "federation.site_names": ["guide-a", "guide-b", "guide-c", "guide-d"],
    "tracking": "quiet",
    "runtime.micro_batch_tokens": 256,  # each shape is tried first, and a language model takes long for each
}
SECURE = {"federation.aggregation": "secure", "federation.num_rounds": 12, "training.local_steps": 1}
WRITERS: dict[str, dict[str, Any]] = {
    "none": {"privacy": "none"},
    "plain-e8": {"privacy.epsilon": 8},
    "secure-e8": {**SECURE, "privacy.epsilon": 8},
    "secure-e3": {**SECURE, "privacy.epsilon": 3},
}
TITLES = ("untuned", *WRITERS, "secure-e8, most votes", "real sentences")
VOTES = {
    "data.columns": {"text": "ref"},
    "data.test_file": None,
    "federation.aggregation": "secure",
    "privacy.epsilon": 1,
}
STUDENT = {
    "privacy": "none",
    "privacy.sampling_rate": 0.2,
    "data.test_file": str(DATA / "tables.jsonl"),
    "federation.num_sites": 1,
    "federation.site_names": ["reader"],
    "tracking": "quiet",
}


def tables(path: Path) -> Path:
    """As many made-up tables as records are written: a name and two to seven facts."""
    draws = random.Random(20170706)
    found: dict[str, None] = {}
    while len(found) < ROWS:
        facts = [f"name[{draws.choice(NAMES)}]"]
        keys = sorted(draws.sample(list(OTHERS), draws.randint(2, len(OTHERS))), key=list(OTHERS).index)
        found[", ".join([*facts, *(f"{key}[{draws.choice(OTHERS[key])}]" for key in keys)])] = None
    return write(path, [{"mr": table} for table in found])


def voted(runs: Path, texts: Path) -> tuple[fedtune.Run, Path]:
    """The run of the votes, and the texts that have most of them."""
    rows, name = read(texts), f"votes-{texts.stem}"
    candidates = list(dict.fromkeys(row["ref"] for row in rows))
    labels = [f"text-{number:05}" for number in range(len(candidates))]
    run = finished(runs, name, "votes", {**GUIDES, **VOTES, "data.labels": labels, "head.label_texts": candidates})
    found = chosen(as_written(rows, ("mr", "ref")), "ref", run, keep=KEPT)
    return run, write(texts.with_name(f"{name}.jsonl"), found.rows)


def line(title: str, runs: Path) -> dict[str, Any]:
    """What one line of the table says; what is finished in `runs` is taken from there."""
    if title == "real sentences":
        own = {**STUDENT, "data.train_file": str(DATA / "all.jsonl"), "data.declared_sizes": 4672}
        return {"epsilon": None, "texts": 4672, "student": finished(runs, "real", "smollm2_e2e", own).metrics}
    untuned, (stem, *votes) = title == "untuned", title.split(",")
    name = "secure-e8" if untuned else stem
    writer, texts = finished(runs, name, "smollm2_e2e", {**GUIDES, **WRITERS[name]}), runs / f"{stem}.jsonl"
    if not texts.exists():
        made = drawn_by(writer, tables(runs / "tables.jsonl"), rows=ROWS, base=untuned, drawn=DRAWN)
        write(texts, made.rows)
    epsilon = 0.0 if untuned else writer.privacy.epsilon
    if votes:
        by, texts = voted(runs, texts)
        epsilon = (epsilon or 0.0) + (by.privacy.epsilon or 0.0)
    count = len(texts.read_text().splitlines())
    own = {**STUDENT, "data.train_file": str(texts), "data.declared_sizes": count}
    return {
        "epsilon": epsilon,
        "texts": count,
        "writer": writer.result.final.metrics_before if untuned else writer.metrics,
        "student": finished(runs, f"student-{texts.stem}", "smollm2_e2e", own).metrics,
    }


def main() -> None:
    (runs, only), path = asked(__doc__, TITLES), HERE / "results.json"
    lines: dict[str, dict[str, Any]] = json.loads(path.read_text()) if only and path.exists() else {}
    with shared_states.shared_frozen_states(runs / "states.pt"):
        for title in only or TITLES:
            lines[title] = line(title, runs)
    write_durably(path, json.dumps(lines, indent=1).encode() + b"\n")
    heads = ["", "epsilon", "texts", "BLEU of the writer", "BLEU of the student", "ROUGE-L", "loss"]
    rows = [
        [
            name,
            "unbounded" if one["epsilon"] is None else f"{one['epsilon']:.2f}",
            f"{one['texts']:,}",
            f"{one['writer']['bleu']:.1f}" if "writer" in one else "",
            f"{one['student']['bleu']:.1f}",
            f"{one['student']['rouge_l']:.3f}",
            f"{one['student']['loss']:.3f}",
        ]
        for name, one in ((title, lines[title]) for title in TITLES if title in lines)
    ]
    readme.put(HERE / "README.md", readme.markdown([heads, *rows]))


if __name__ == "__main__":
    main()
