"""`fedtune flower-app`: the bundle with which `flwr run` starts fedtune in a Flower federation that stands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from fedtune.cli.command import Argument


def flower_app(folder: Annotated[Path, Argument("DIR", help="a new folder, or an empty one")]) -> None:
    """Write the bundle that `flwr run` sends in a Flower federation that stands. It holds no code: it names modules
    of the fedtune that the lead's machine and every site have installed.

      fedtune flower-app app
      flwr run app banks --run-config 'run="/srv/banks/spring.toml"'

    docs/stock_flower.md says what each machine needs, and what the file of a run holds.
    """
    from fedtune.flower.bundle import write_bundle  # Flower takes seconds to import

    sys.stdout.write(f"{write_bundle(folder)} is written. Start a run with:\n")
    sys.stdout.write(f"  flwr run {folder} FEDERATION --run-config 'run=\"FILE\"'\n")
