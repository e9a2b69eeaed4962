"""Runs over 24 months under one epsilon for each person: with cohorts all of them run, without they end after eight.

    python simulations/calendar/run.py --runs RUNS            everything, into results.json and README.md
    python simulations/calendar/run.py --try-out --into FOLDER --only cohorts    two months of one round of one step

Banking77's training records are people of four banks.  A hash of the text says in which of 31 months each came, so that
12 % of those who are there are new in a month; a person leaves after eight.  The file of a month has whoever is there.
One label is new in the tenth month: nobody who came before has it.  Each run renews the one before.

After an interruption the same command goes on in the run folders, where the sites' ledgers are, too.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.api.compose import compose_run
from fedtune.federation.calendar import shift_window
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.durable import write_durably
from fedtune.sites.run_cache import RunCache
from fedtune.spec import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study
from shared_states import shared_frozen_states

DATA = study.ROOT / "simulations" / "data" / "banking77"
MONTHS, WINDOW, NEW_IN, SIZE = 24, 8, 10, 600
NEW_LABEL = "card_swallowed"
FIRST = Cohorts(period="month", first="2026-01", last="2026-08")
LINES = {
    "cohorts": "each run admits the last eight months",
    "everybody": "each run admits everybody",
    "once": "the first run alone, at the whole epsilon",
}
SHORT = ["federation.num_rounds=1", "training.local_steps=1"]


def rows_of(name: str) -> list[dict[str, str]]:
    """Banking77's records of one file."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def people() -> list[dict[str, Any]]:
    """Each record with its person and the number of the month in which that person came; the first file has 0 to 7."""
    found = []
    for row in rows_of("train"):
        digest = hashlib.sha256(row["text"].encode()).hexdigest()
        month = int(digest, 16) % (MONTHS + WINDOW - 1)
        if row["label"] != NEW_LABEL or month >= NEW_IN + WINDOW - 2:
            cohort = shift_window(FIRST, by=month).first
            found.append({**row, "user": digest[:16], "came": f"{cohort}-15", "month": month})
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file of records, whole or not at all."""
    write_durably(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def words_of(line: str, number: int, *, runs: Path, labels: list[str]) -> list[str]:
    """What is typed for a run of a line, the first one number 1."""
    known = [label for label in labels if label != NEW_LABEL or number >= NEW_IN]
    words = [f"name={line}-{number:02}", "data.labels=[" + ",".join(f"'{label}'" for label in known) + "]"]
    words.append(f"data.test_file='{runs / ('whole' if number >= NEW_IN else 'known')}.jsonl'")
    if number > 1:  # rates as docs/adapters.md advises: a third; later runs take them over
        rates = ["training.learning_rate=0.56", "training.head_learning_rate=4.4"] if number == 2 else []
        return [f"renew='{runs / f'{line}-{number - 1:02}'}'", *words, *rates]
    cohorts = f"{{period: month, first: '{FIRST.first}', last: '{FIRST.last}'}}" if line == "cohorts" else "null"
    return [
        *("experiment=banks_intents", "tracking=quiet", f"tracking.output_dir='{runs}'", *words),
        *("federation.aggregation=secure", "training.learning_rate=1.67", "training.head_learning_rate=13.3"),
        *("privacy.unit=user", "privacy.records_per_user=1", "privacy.epsilon=8", f"privacy.cohorts={cohorts}"),
        *(f"privacy.planned_runs={1 if line == 'once' else WINDOW}", "+data.columns.user=user"),
        *(["+data.columns.arrival=came"] if line == "cohorts" else []),
        *(f"data.train_file='{runs / 'people.jsonl'}'", "data.validation_file=null", f"data.declared_sizes={SIZE}"),
        f"runtime.sites_dir='{runs / f'{line}-01-sites'}'",
    ]


def runs_of(runs: Path, *, line: str, months: int, more: list[str]) -> study.Found:
    """All runs of a line until no next one is allowed; `more`: settings of the first."""
    everyone, test = people(), rows_of("test")
    labels = sorted({row["label"] for row in test})
    share = sum(row["label"] != NEW_LABEL for row in test) / len(test)
    write_rows(runs / "whole.jsonl", test)
    write_rows(runs / "known.jsonl", [row for row in test if row["label"] != NEW_LABEL])
    done: list[study.Found] = []
    with RunCache() as cache, shared_frozen_states(runs / "states.pt"):
        for number in range(1, (1 if line == "once" else months) + 1):
            there = [row for row in everyone if number - 1 <= row["month"] < number - 1 + WINDOW]
            write_rows(runs / "people.jsonl", there)
            began = time.monotonic()
            try:
                config = compose_run(words_of(line, number, runs=runs, labels=labels) + (more if number == 1 else []))
                folder = study.finished(config, cache)
            except ConfigError as error:
                if error.key != "renew":
                    raise
                return {"runs": done, "ended": str(error.bound)}
            found = json.loads((folder / "run.json").read_text())
            # On the whole test file: before it is known, each record of the new label is wrong.
            accuracy = found["final"]["metrics"]["accuracy"] * (1.0 if number >= NEW_IN else share)
            done.append(
                {
                    "accuracy": accuracy,
                    "epsilon": found["privacy"]["epsilon"],
                    "noise_multiplier": next(iter(found["privacy"]["sites"].values()))["noise_multiplier"],
                    "people": len(there),
                    "admitted": str(config.privacy.cohorts or "everybody"),
                    "seconds": round(time.monotonic() - began),
                }
            )
    return {"runs": done, "ended": ""}


def table(lines: Mapping[str, study.Found]) -> str:
    """The Markdown table of accuracies by run."""
    made = [lines[name]["runs"] if name in lines else [] for name in LINES]
    rows = [["run", *LINES.values()]]
    for place in range(max(map(len, made))):
        rows.append([str(place + 1), *(f"{one[place]['accuracy']:.3f}" if place < len(one) else "" for one in made)])
    epsilons = (format_epsilon(one[0]["epsilon"]) if one else "" for one in made)
    return readme.markdown([*rows, ["epsilon of a run", *epsilons]])


def main() -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--try-out", action="store_true", help="short runs, to see that it works")
    asked = options.parse_args()
    months, more = (2, SHORT) if asked.try_out else (MONTHS, [])
    lines: dict[str, study.Line] = {name: partial(runs_of, line=name, months=months, more=more) for name in LINES}
    study.carry_out(__file__, lines, table, asked=asked, measured=False)


if __name__ == "__main__":
    main()
