"""Flower ServerApp of the lead, run by `flower-superexec` on the lead's or the server's machine.

`flwr run --run-config 'run="FILE"'` names a TOML file on that machine: `kit` is the folder of the lead's kit, and
`settings` is a list of arguments of `fedtune run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedtune.flower.bundle import make_server_app


def _run_lead(kit: Path, settings: Sequence[str], over: Callable[..., Any]) -> None:
    from fedtune.cli.real_run import start_run  # Hydra and the accountants take seconds to import
    from fedtune.ops.kits.kit_file import Kit

    start_run(settings, kit=Kit.read(kit, kind="lead"), over=over)


app = make_server_app(_run_lead)
