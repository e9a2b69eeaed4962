"""`fedtune choose`: of synthetic records those that have most votes of a finished run, with a card of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fedtune.api import door
from fedtune.cli.command import AsJson, Option, single
from fedtune.cli.finished_run import Run
from fedtune.cli.synthetic_file import Beside, SyntheticFile, To
from fedtune.data.load import shipped_folders
from fedtune.data.records import resolve_file
from fedtune.sites.run_records import LeadRecords
from fedtune.studies import synthetic


def choose(
    run: Run,
    candidates: Annotated[Path, Option("records of fedtune synthesize with RUN, and their card", metavar="FILE")],
    votes: Annotated[Path, Option("a run of task votes on these records", metavar="RUN")],
    to: To,
    rows: Annotated[int, Option("how many records stay")],
    beside: Beside = None,
    as_json: AsJson = False,
) -> None:
    """Keep the synthetic records that most of the sites' own are nearest to.

      fedtune choose runs/writer --candidates texts.jsonl --votes runs/liked --rows 500 --to best.jsonl

    RUN wrote them with fedtune synthesize, whose --ballot is the experiment of the votes. FILE.card.md and
    FILE.card.json say how the records were made and chosen, and what all runs behind them promise together. Nothing is
    charged. docs/synthetic_texts.md says more.
    """
    voted = door.load(votes)
    file = SyntheticFile(to, run, voted, rows=rows, beside=beside)
    from fedtune.report.synthetic_card import read_card  # it imports torch, which takes seconds

    place = resolve_file(str(candidates), shipped_folders(), key="--candidates")
    known, config = read_card(place, file.reports[0], option="--candidates"), file.writer.config
    written = [
        {config.data.columns[role]: text for role, text in record.fields.items()}
        for record in LeadRecords.read(str(place), config, key="--candidates").records
    ]
    found = synthetic.chosen(written, file.columns[-1], voted, keep=rows)
    # They were written as that card says, and owe to its runs too.
    made = known["made"] | {"candidates": sum(found.wanted.values())}
    file.write(found, made, earlier=known["runs"][1:], as_json=as_json)


app = single(choose)
