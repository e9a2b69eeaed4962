"""`fedtune run status`: how far a run is, from its folder alone."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedtune.cli.compose import saved_config
from fedtune.cli.run_folder import is_running
from fedtune.config import RunConfig
from fedtune.deploy.services.lead_service import latest_answers
from fedtune.federation.checkpoint import Checkpoints
from fedtune.federation.lead import LeadState, site_charge
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.accountant import epsilon_text


def show_status(folder: Path, *, as_json: bool) -> None:
    """Print it.

    Raises:
        ConfigError: the folder holds no run, or none that has begun.
        RunError: its newest checkpoint or its file of answers is damaged.
    """
    config = saved_config(folder)
    state = Checkpoints(RunFolder(folder).checkpoints, config.digest()).load()
    status = status_of(config, state, running=is_running(folder), answers=latest_answers(folder))
    if as_json:
        sys.stdout.write(json.dumps(status, indent=2) + "\n")
        return
    console = Console()
    how = "running" if status["running"] else "finished" if status["finished"] else "stopped"
    console.print(f"{folder}: {how}, {status['round']} of {status['num_rounds']} rounds are done", soft_wrap=True)
    table = Table("site", "last answer", "at", "epsilon so far")
    for site, about in status["sites"].items():
        bound = " at most" if about["upper_bound"] else ""
        table.add_row(site, about["last_answer"], about["at"] or "-", f"{epsilon_text(about['epsilon'])}{bound}")
    console.print(table)


def status_of(
    config: RunConfig, state: LeadState, *, running: bool, answers: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """The same as plain JSON; an epsilon of null means that nothing bounds the loss."""
    plan, last = config.plan(), state.rounds[-1] if state.rounds else None
    sites = {}
    for site in config.federation.active:
        charge = site_charge(state, site, plan)
        answer = answers.get(site, {})
        sites[site] = {
            "last_answer": answer.get("what", "none yet"),
            "at": answer.get("time"),
            "epsilon": charge.epsilon if math.isfinite(charge.epsilon) else None,
            "rounds_charged": charge.rounds,
            "upper_bound": charge.upper_bound,
        }
    return {
        "name": config.name,
        "running": running,
        "finished": state.round >= config.federation.num_rounds,
        "round": state.round,
        "num_rounds": config.federation.num_rounds,
        "metrics": dict(last.metrics) if last else {},
        "sites": sites,
    }
