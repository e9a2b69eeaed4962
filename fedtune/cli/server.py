"""`fedtune server`: the process that keeps messages between lead and sites."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from fedtune.cli.command import Health, HealthAnywhere, LogLevel, Metrics, Option, command, group

app = group("A federation's server: it keeps messages between lead and sites until they are fetched.")


@command(app, "serve, until stopped")
def start(
    kit: Annotated[Path, Option(metavar="DIR", help="the server's kit")],
    host: Annotated[str, Option(help="address to listen on; 0.0.0.0: all")] = "0.0.0.0",
    port: Annotated[int | None, Option(help="port to listen on (default: the one in the kit)")] = None,
    data: Annotated[
        Path | None, Option(metavar="DIR", help="folder for the database and the audit log (default: the kit)")
    ] = None,
    health: Health = None,
    health_anywhere: HealthAnywhere = False,
    metrics: Metrics = None,
    log_level: LogLevel = "info",
) -> None:
    """A federation's server: it keeps messages between lead and sites until they are fetched.

      fedtune server start --kit federation/server

    It holds neither the lead's key nor a model, and runs no code that anybody sends. Every connection needs a
    certificate of the federation; the server reads changes of the kit's roster.json within seconds.
    """
    from fedtune.deploy.health import Health as Endpoint
    from fedtune.deploy.health import serve_health
    from fedtune.deploy.kits.kit_file import Kit
    from fedtune.deploy.logs import configure_logs
    from fedtune.deploy.metrics import ServerMetrics, serve_metrics

    own = Kit.read(kit, kind="server")
    from fedtune.deploy.services.lead_and_server import ServerService

    os.umask(0o077)  # what the process writes is for its own account alone
    configure_logs(log_level)
    endpoint = Endpoint()
    with ExitStack() as stack:
        if health:
            stack.enter_context(serve_health(health, endpoint, anywhere=health_anywhere))
        figures = ServerMetrics(kit=own) if metrics else None
        if metrics and figures:
            stack.enter_context(serve_metrics(metrics, figures.figures))
        ServerService(kit=own, host=host, port=port, data=data, health=endpoint, metrics=figures).run()
