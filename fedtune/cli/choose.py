"""`fedtune choose`: of synthetic records those with most votes, or all with a classifier's labels, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fedtune.api import door
from fedtune.cli.command import AsJson, Option, answer
from fedtune.cli.finished_run import Run
from fedtune.cli.synthetic_file import Beside, SyntheticFile, To
from fedtune.spec import ConfigError
from fedtune.studies import synthetic


def choose(
    run: Run,
    candidates: Annotated[Path, Option("records of fedtune synthesize with RUN, and their card", metavar="FILE")],
    to: To,
    votes: Annotated[Path | None, Option("a run of task votes on these records; with --rows", metavar="RUN")] = None,
    rows: Annotated[int | None, Option("how many records stay, by --votes")] = None,
    labels: Annotated[Path | None, Option("a classifier of the sites, which labels what stays", metavar="RUN")] = None,
    beside: Beside = None,
    as_json: AsJson = False,
) -> None:
    """Keep synthetic records that most of the sites' own are nearest to, or label them by a classifier of the sites.

      fedtune choose runs/writer --candidates texts.jsonl --votes runs/liked --rows 500 --to best.jsonl
      fedtune choose runs/writer --candidates texts.jsonl --labels runs/classifier --to labelled.jsonl

    RUN wrote them with fedtune synthesize, whose --ballot is the experiment of the votes. FILE.card.md and
    FILE.card.json say how the records were made and chosen, and what all runs behind them promise together. Nothing is
    charged. docs/synthetic_texts.md says more.
    """
    if votes is None and labels is None:
        raise ConfigError("--votes", None, "must be given, or --labels: what records are chosen or labelled by")
    if (votes is None) != (rows is None):
        raise ConfigError("--rows", rows, "must be given with --votes, and only there")
    by = {"--votes": votes, "--labels": labels}
    others = {option: door.load(folder) for option, folder in by.items() if folder is not None}
    file = SyntheticFile(to, run, others, rows=rows, beside=beside)
    written, known = file.read(candidates, option="--candidates")
    made = {"labels": [], **known["made"]}
    with file.opened() as texts:
        found = synthetic.as_written(written, file.columns)
        if rows is not None:
            made |= {"candidates": len(found.rows), "chosen_by": others["--votes"].config.name}
            found = synthetic.chosen(found, file.columns[-1], others["--votes"], keep=rows)
        if classifier := others.get("--labels"):
            found = synthetic.labelled(found, file.columns[-1], classifier)
            new = {"column": classifier.config.data.columns["label"], "by": classifier.config.name}
            made["labels"] = [*(one for one in made["labels"] if one["column"] != new["column"]), new]
        told = file.fill(texts, found, made)
    answer(*told, as_json=as_json)
