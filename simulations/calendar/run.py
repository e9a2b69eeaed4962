"""Runs over 24 months under one epsilon for each person: with cohorts all of them run, without they end after eight.

    python simulations/calendar/run.py                        everything, into results.json and README.md
    python simulations/calendar/run.py --months 2             only so many runs of each line

Banking77's training records are people of four banks.  A hash of the text says in which of 31 months each came, so that
12 % of those who are there are new in a month; a person leaves after eight.  The file of a month has whoever is there.
One label is new in the tenth month: nobody who came before has it.  Each run renews the one before.

After an interruption the same command goes on.  Run folders, with the sites' ledgers, are in runs/calendar (--runs),
and so is what the frozen layers make of each record.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.federation.calendar import moved
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.durable import write_durably
from fedtune.sites.session import Session
from fedtune.spec import ConfigError
from fedtune.studies.trials import Trial

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import readme  # noqa: E402
from shared_states import shared_frozen_states  # noqa: E402

import fedtune  # noqa: E402

DATA = HERE.parent / "data" / "banking77"
MONTHS, WINDOW, NEW_IN = 24, 8, 10
NEW_LABEL = "card_swallowed"
FIRST = Cohorts(period="month", first="2026-01", last="2026-08")
LINES = {
    "cohorts": "each run admits the last eight months",
    "everybody": "each run admits everybody",
    "once": "the first run alone, at the whole epsilon",
}


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
            cohort = moved(FIRST, by=month).first
            found.append({**row, "user": digest[:16], "came": f"{cohort}-15", "month": month})
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file of records, whole or not at all."""
    write_durably(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def words_of(line: str, number: int, *, runs: Path, labels: list[str], size: int) -> list[str]:
    """What is typed for a run of a line, the first one number 1."""
    known = [label for label in labels if label != NEW_LABEL or number >= NEW_IN]
    at = f"'{runs / f'{line}-{number:02}'}'"
    words = [f"name={line}-{number:02}", "data.labels=[" + ",".join(f"'{label}'" for label in known) + "]"]
    words.append(f"data.test_file='{runs / ('whole' if number >= NEW_IN else 'known')}.jsonl'")
    if number > 1:  # rates as docs/warm_start.md advises: a third; later runs take them over
        rates = ["training.learning_rate=0.56", "training.head_learning_rate=4.4"] if number == 2 else []
        return [f"renew='{runs / f'{line}-{number - 1:02}'}'", *words, *rates]
    cohorts = f"{{period: month, first: '{FIRST.first}', last: '{FIRST.last}'}}" if line == "cohorts" else "null"
    return [
        *("experiment=banks_intents", "tracking=quiet", f"tracking.output_dir='{runs}'", *words),
        *("federation.aggregation=secure", "training.learning_rate=1.67", "training.head_learning_rate=13.3"),
        *("privacy.unit=user", "privacy.records_per_user=1", "privacy.epsilon=8", f"privacy.cohorts={cohorts}"),
        *(f"privacy.runs={1 if line == 'once' else WINDOW}", "+data.columns.user=user"),
        *(["+data.columns.arrival=came"] if line == "cohorts" else []),
        *(f"data.train_file='{runs / 'people.jsonl'}'", "data.validation_file=null", f"data.declared_sizes={size}"),
        f"runtime.sites_dir={at[:-1]}-sites'",
    ]


def run_of(words: list[str], session: Session) -> RunConfig:
    """The configuration of a run that is over, done now unless it was."""
    trial = Trial.of(compose_run(words)).run(lambda one: fedtune.simulate(one.config, session=session).result)
    if trial.error is not None:
        raise trial.error
    return trial.config


def line_of(line: str, runs: Path, results: dict[str, Any], *, months: int, session: Session, more: list[str]) -> None:
    """All runs of a line, each written down as it ends, until no next one is allowed; `more`: settings of the first."""
    everyone, test = people(), rows_of("test")
    labels = sorted({row["label"] for row in test})
    share = sum(row["label"] != NEW_LABEL for row in test) / len(test)
    write_rows(runs / "whole.jsonl", test)
    write_rows(runs / "known.jsonl", [row for row in test if row["label"] != NEW_LABEL])
    done = results["lines"].setdefault(line, {"runs": [], "ended": ""})
    for number in range(len(done["runs"]) + 1, min(months, 1 if line == "once" else MONTHS) + 1):
        there = [row for row in everyone if number - 1 <= row["month"] < number - 1 + WINDOW]
        write_rows(runs / "people.jsonl", there)
        began = time.monotonic()
        try:
            words = words_of(line, number, runs=runs, labels=labels, size=600)
            config = run_of([*words, *(more if number == 1 else [])], session)
        except ConfigError as error:
            if error.key != "renew":
                raise
            done["ended"] = str(error.bound)
            break
        found = json.loads((runs / config.name / "run.json").read_text())
        accuracy = found["final"]["metrics"]["accuracy"] * (1.0 if number >= NEW_IN else share)
        done["runs"].append(
            {
                "accuracy": accuracy,  # on the whole test: before it is known, each record of the new label is wrong
                "epsilon": found["privacy"]["epsilon"],
                "noise_multiplier": next(iter(found["privacy"]["sites"].values()))["noise_multiplier"],
                "people": len(there),
                "admitted": str(config.privacy.cohorts or "everybody"),
                "seconds": round(time.monotonic() - began),
            }
        )
        print(f"{line} {number}: {done['runs'][-1]}", flush=True)
        write(results)


def write(results: dict[str, Any]) -> None:
    """Write results.json, and the table of accuracies into the README."""
    write_durably(HERE / "results.json", json.dumps(results, indent=1).encode() + b"\n")
    lines = {name: results["lines"].get(name, {"runs": []})["runs"] for name in LINES}
    rows = [["run", *LINES.values()]]
    for place in range(max(map(len, lines.values()))):
        rows.append(
            [str(place + 1), *(f"{one[place]['accuracy']:.3f}" if place < len(one) else "" for one in lines.values())]
        )
    alone = ["epsilon of a run", *(epsilon_text(one[0]["epsilon"]) if one else "" for one in lines.values())]
    readme.put(HERE / "README.md", readme.markdown([*rows, alone]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--months", type=int, default=MONTHS)
    parser.add_argument("--try-out", action="store_true", help="one round of one step, to see that it works")
    parser.add_argument("--only", choices=LINES, default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/calendar"))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"lines": {}}
    with Session() as session, shared_frozen_states(options.runs / "states.pt"):
        for line in [options.only] if options.only else LINES:
            short = ["federation.num_rounds=1", "training.local_steps=1"] if options.try_out else []
            line_of(line, options.runs.absolute(), results, months=options.months, session=session, more=short)


if __name__ == "__main__":
    main()
