"""`fedtune evaluate`: score a saved adapter."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedtune.cli.compose import saved_config
from fedtune.config import parse
from fedtune.federation.run_folder import RunFolder
from fedtune.spec import ConfigError


def evaluate(run: str, *, data_file: str, device: str) -> None:
    """Print the scores of a run's adapter on `data_file`.

    Raises:
        ConfigError: the folder has no finished adapter, or that of an audit; or the file does not fit the run's columns
            and labels.
    """
    folder = Path(run)
    config, files = saved_config(folder), RunFolder(folder)
    if not files.adapter.is_dir():
        raise ConfigError("run folder", run, "must hold a finished adapter/; resume the run first")
    if files.audit_mark.exists():
        bound = "is an audit: made-up records were planted in its training data (AUDIT.txt); its scores mean nothing"
        raise ConfigError("run folder", run, bound)
    from fedtune.sites.shared_model import score_saved  # torch takes seconds to import

    settings = config.to_json()
    settings["runtime"]["device"] = device
    scores = score_saved(parse(settings), files.adapter, data_file)
    table = Table(title=f"{run} on {data_file}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
