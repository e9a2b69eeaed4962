"""`fedtune simulate`: one run on this machine, or a sweep of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from fedtune.cli.command import AsJson, Option, Overrides, single
from fedtune.cli.compose import compose_run, compose_sweep
from fedtune.cli.sections import SCHEMA_VERSION, print_json
from fedtune.cli.sweep import run_sweep
from fedtune.cli.working_folder import folder_of, run_in_folder, told
from fedtune.config import RunConfig
from fedtune.spec import ConfigError

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.federation.results import RunResult


def simulate(
    overrides: Overrides = (),
    multirun: Annotated[
        bool,
        Option(
            names=(
                "-m",
                "--multirun",
            ),
            help="run every combination of comma-separated values",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a federation on this machine.

    Overrides are key=value in Hydra's grammar, for instance
      fedtune simulate                                   four banks, Banking77, epsilon 8
      fedtune simulate experiment=debug                  seconds, random tiny model
      fedtune simulate privacy.epsilon=3 name=tighter
      fedtune simulate privacy=none                      no privacy, for comparison
      fedtune simulate -m privacy.epsilon=1,3,8          one run for each value, a table and its CSV
      fedtune simulate resume=runs/tighter               continue after Ctrl-C or a crash
    docs/configuration.md lists every key.
    """
    console = Console(stderr=as_json)
    sweep = compose_sweep(overrides) if multirun else None
    runs = sweep.runs if sweep else (compose_run(overrides),)
    for config in runs:
        if config.runtime.kind == "deployment":
            raise ConfigError("runtime", "deployment", "is for real sites: fedtune run --kit LEAD sites=[...]")
    if sweep and len(runs) > 1:
        run_sweep(sweep, console, run=run_one, as_json=as_json)
        return
    folder = folder_of(runs[0])
    result = run_one(runs[0], folder, console)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "runs": [{"folder": str(folder), "result": result}]})


def run_one(config: RunConfig, folder: Path, console: Console, *, again: str = "") -> RunResult:
    """Run a simulation in its folder, new or begun.

    Args:
        config: the run's.
        folder: its own.
        console: where progress and result are shown.
        again: the command that continues it; empty: one that resumes this run alone.
    """
    began = time.monotonic()
    # Here, because torch and Flower take seconds to import and a mistake in an override should not wait for them.
    from fedtune.flower.simulation import simulate as run_simulation
    from fedtune.sites.virtual_site import fitted

    if config.resume is None:
        config = told(console, config, fitted(config, folder))
    again = again or f"fedtune simulate resume={folder}"
    return run_in_folder(config, folder, console, work=run_simulation, again=again, began=began)


app = single(simulate)
