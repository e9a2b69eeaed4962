"""`fedtune flower-app`: a Flower app bundle that starts fedtune in an existing Flower federation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from fedtune.cli.command import Argument


def flower_app(folder: Annotated[Path, Argument("DIR", help="a new folder, or an empty one")]) -> None:
    """Write a Flower app bundle for an existing Flower federation. The bundle contains no code, only references to
    fedtune, which must be installed on the lead's machine and at every site.

      fedtune flower-app app
      flwr run app banks --run-config 'run="/srv/banks/spring.toml"'

    See docs/stock_flower.md for the setup of each machine and the format of the run's file.
    """
    from fedtune.flower.bundle import write_bundle  # Flower takes seconds to import

    sys.stdout.write(f"{write_bundle(folder)} is written. Start a run with:\n")
    sys.stdout.write(f"  flwr run {folder} FEDERATION --run-config 'run=\"FILE\"'\n")
