"""What `flwr run` starts: a bundle without code, and the lead's ServerApp.

The bundle names modules that the lead's machine and every site have installed.  So no machine runs code that a server
sends, and a site may keep the folder of its apps read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.codec import decode_value, read_toml, require
from fedtune.flower.asking_grid import FlowerGrid
from fedtune.spec import NOT_GIVEN, ConfigError, errors_in
from fedtune.version import __version__

_BUNDLE = f"""\
[project]
name = "fedtune-app"
version = "{__version__}"
description = "fedtune in a Flower federation: every machine runs the fedtune that is installed there"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "fedtune.cli.flower_lead:app"
clientapp = "fedtune.flower.site_app:app"

[tool.flwr.app.config]
run = ""
"""


def write_bundle(folder: Path) -> Path:
    """Write the bundle into a new or empty folder; return its file.

    Raises:
        ConfigError: something is in the folder, which Flower would send along.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("DIR", str(folder), "must be a new folder, or an empty one")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pyproject.toml"
    file.write_text(_BUNDLE, encoding="utf-8")
    return file


Lead = Callable[[Path, Sequence[str], Callable[..., FlowerGrid]], None]
"""Runs the settings of a run by a lead's kit, over the Grid that the function wraps."""


def make_server_app(lead: Lead) -> ServerApp:
    """Return a ServerApp that calls `lead` with what the file says that `--run-config 'run="FILE"'` names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        file = str(context.run_config["run"])
        if not file:
            raise ConfigError("run", NOT_GIVEN, "is required: --run-config 'run=\"FILE\"'")
        kit, settings = read_run_file(Path(file))
        lead(kit, settings, partial(FlowerGrid, grid))

    return app


def read_run_file(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder of the lead's kit and the settings of a run.

    Raises:
        ConfigError: names the file, the key, its value and what would be accepted.
    """
    table = read_toml(path, key="run")
    with errors_in(path):
        for key in ("kit", "settings"):
            require(key, NOT_GIVEN, key in table, "is required")
        for key in {*table} - {"kit", "settings"}:
            raise ConfigError(key, NOT_GIVEN, "is not a key here; known are kit, settings")
        kit = decode_value("kit", table["kit"], str)
        settings: tuple[str, ...] = decode_value("settings", table["settings"], tuple[str, ...])
    return path.parent / kit, settings
