"""`fedtune evaluate`: score a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from fedtune.cli.command import Argument, AsJson, Option, single
from fedtune.cli.compose import saved_config
from fedtune.cli.sections import SCHEMA_VERSION, Section, print_json, show
from fedtune.config import parse
from fedtune.federation.run_folder import RunFolder
from fedtune.spec import ConfigError


def evaluate(
    run: Annotated[Path, Argument("RUN", help="a run folder, such as runs/tighter")],
    data: Annotated[str, Option(metavar="FILE", help=".jsonl or .csv, plain or .gz")],
    device: Annotated[Literal["auto", "cpu", "cuda"], Option(help="where to score")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a run's saved adapter on a file of your own.

    The file has the columns that the run's configuration names; scores are exact and not covered by any guarantee.
    """
    config = saved_config(run)
    files = RunFolder(run)
    if not files.adapter.is_dir():
        raise ConfigError("run folder", str(run), "must hold a finished adapter/; resume the run first")
    if files.audit_mark.exists():
        mark = files.audit_mark.name
        bound = f"is an audit: made-up records were planted in its training data ({mark}); its scores mean nothing"
        raise ConfigError("run folder", str(run), bound)
    from fedtune.sites.shared_model import score_saved  # torch takes seconds to import

    settings = config.to_json()
    settings["runtime"]["device"] = device
    scores = score_saved(parse(settings), files.adapter, data)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "run": str(run), "data": data, "scores": scores})
        return
    rows = tuple((name, f"{value:.4f}") for name, value in scores.items())
    show(Console(), [Section(title=f"{run} on {data}", headings=("metric", "value"), rows=rows)])


app = single(evaluate)
