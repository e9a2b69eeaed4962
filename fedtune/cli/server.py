"""The federation's server: a store-and-forward relay for messages between lead and sites."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from fedtune.cli.command import Argument, Health, HealthAnywhere, LogLevel, Metrics, Option, command, group

KitFolder = Annotated[Path, Option(metavar="DIR", help="the server's kit")]
Data = Annotated[Path | None, Option("folder for the database and the audit log (default: the kit)", metavar="DIR")]

app = group(__doc__)


@command(app, "run the server until it is stopped")
def start(
    kit: KitFolder,
    host: Annotated[str, Option("address to listen on (0.0.0.0: all interfaces)")] = "0.0.0.0",
    port: Annotated[int | None, Option("port to listen on (default: the port in the kit)")] = None,
    data: Data = None,
    health: Health = None,
    health_anywhere: HealthAnywhere = False,
    metrics: Metrics = None,
    log_level: LogLevel = "info",
) -> None:
    """Run the federation's server, which stores messages between lead and sites until they are fetched.

      fedtune server start --kit federation/server

    The server has neither the lead's key nor a model, and never executes received code. Every connection requires a
    certificate of the federation. A new roster.json or certificate in the kit takes effect within seconds.
    """
    from fedtune.ops.health import Health as Endpoint
    from fedtune.ops.health import serve_health
    from fedtune.ops.kits.kit_file import Kit
    from fedtune.ops.logs import configure_logs
    from fedtune.ops.metrics import serve_metrics

    own = Kit.read(kit, kind="server")
    from fedtune.ops.services.lead_and_server import ServerService

    os.umask(0o077)  # files are readable by this account only
    configure_logs(log_level)
    service = ServerService(kit=own, host=host, port=port, data=data, health=(endpoint := Endpoint()))
    with (
        serve_health(health, endpoint, anywhere=health_anywhere),
        serve_metrics(metrics, service.metrics.collect_values),
    ):
        service.run()


@command(app, "write a backup")
def backup(file: Annotated[Path, Argument("FILE", help="a new file")], kit: KitFolder, data: Data = None) -> None:
    """Back up the server's messages and audit log, also while the server is running. The backup contains no key."""
    from fedtune.ops.backup import back_up_server

    os.umask(0o077)
    back_up_server(file, data=data or kit)
    sys.stdout.write(f"{file} is written.\n")


@command(app, "restore a backup")
def restore(
    file: Annotated[Path, Argument("FILE", help="the file that `fedtune server backup` wrote")],
    kit: KitFolder,
    data: Data = None,
) -> None:
    """Restore the messages of an empty server. Later messages are lost; lead and sites resend them as needed."""
    from fedtune.ops.backup import restore_server

    os.umask(0o077)
    restore_server(file, data=data or kit)
    sys.stdout.write("Restored. Start the server.\n")
