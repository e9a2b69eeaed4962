"""The Flower app bundle for `flwr run`, which contains no code, and the lead's ServerApp.

The bundle refers to modules that are installed on the lead's machine and at every site.  No machine therefore runs code
from a server, and a site can make its app folder read-only.

In a simulation, the lead is the process that called `flwr run` (`local_engine.py`), and the ServerApp only relays the
lead's messages to the nodes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Client, Connection
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedtune.codec import decode_value, read_toml, require
from fedtune.flower.asking_grid import FlowerGrid
from fedtune.flower.site_socket import pack, unpack_message
from fedtune.spec import NOT_GIVEN, ConfigError, name_file_in_errors
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
    """Write the app bundle into a new or empty folder and return the path of its file.

    Raises:
        ConfigError: the folder is not empty, so that Flower would send its other files with the bundle.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("DIR", str(folder), "must be a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pyproject.toml"
    file.write_text(_BUNDLE, encoding="utf-8")
    return file


LEAD_SOCKET = "FEDTUNE_SIMULATION"
"""Environment variable with the path of the Unix socket of a simulation's lead; a run's settings cannot change it."""
NODES, PUSH, PULL = b"n", b"+", b"?"
"""Commands of the lead to its relay: list the node ids; send a message and return its id; fetch the answer to a message
id (empty until the answer has arrived)."""

Lead = Callable[[Path, Sequence[str], Callable[..., FlowerGrid]], None]
"""Function that runs the lead; its arguments are the kit's folder, the run's settings and a constructor for the grid.
"""


def make_server_app(lead: Lead) -> ServerApp:
    """Create a ServerApp that calls `lead` with the content of the file named by `--run-config 'run="FILE"'`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if simulation := os.environ.get(LEAD_SOCKET):
            with Client(simulation) as line, suppress(EOFError):
                relay(grid, line)
            return
        file = str(context.run_config["run"])
        if not file:
            raise ConfigError("run", NOT_GIVEN, "is required: --run-config 'run=\"FILE\"'")
        kit, settings = read_run_file(Path(file))
        lead(kit, settings, partial(FlowerGrid, grid))

    return app


def relay(grid: Grid, line: Connection) -> None:
    """Execute the commands that the lead sends over `line`, until an EOFError when the lead disconnects.

    The message type field has the form `<node> <kind>` in a message to a node.  In an answer, it contains Flower's
    error text, or an empty string on success.
    """
    while command := line.recv_bytes():
        if command == NODES:
            line.send_bytes(json.dumps(sorted(grid.get_node_ids())).encode())
        elif command[:1] == PUSH:
            to, _, content = unpack_message(command[1:])
            node, _, kind = to.partition(" ")
            (message_id,) = grid.push_messages([Message(content, int(node), kind)])
            line.send_bytes(message_id.encode())
        else:
            reply = b""
            for answer in grid.pull_messages([command[1:].decode()]):
                error = answer.error.reason or "no reason" if answer.has_error() else ""
                reply = pack(error, 0.0, RecordDict() if error else answer.content)
            line.send_bytes(reply)


def read_run_file(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Read the folder of the lead's kit and the settings of a run from a TOML file.

    Raises:
        ConfigError: a key is missing, unknown or invalid; the error names the file, the key and the accepted values.
    """
    table = read_toml(path, key="run")
    with name_file_in_errors(path):
        for key in ("kit", "settings"):
            require(key, NOT_GIVEN, key in table, "is required")
        for key in {*table} - {"kit", "settings"}:
            raise ConfigError(key, NOT_GIVEN, "is not a known key; known keys: kit, settings")
        kit = decode_value("kit", table["kit"], str)
        settings: tuple[str, ...] = decode_value("settings", table["settings"], tuple[str, ...])
    return path.parent / kit, settings
