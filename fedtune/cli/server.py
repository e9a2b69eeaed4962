"""`fedtune server start`: its arguments and the call; nothing here is slow to import."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path

from fedtune.cli.site import add_service_arguments

DESCRIPTION = """\
A federation's server: it keeps messages between lead and sites until they are fetched.

  fedtune server start --kit federation/server

It holds neither the lead's key nor a model, and runs no code that anybody sends. Every connection needs a certificate
of the federation; sites that are added or revoked in the kit's roster.json are taken up within seconds.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands under `fedtune server`."""
    commands = parser.add_subparsers(dest="server_command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    start = commands.add_parser("start", help="serve, until stopped", description=DESCRIPTION, formatter_class=raw)
    start.add_argument("--kit", required=True, metavar="DIR", help="the server's kit")
    start.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")
    start.add_argument("--port", type=int, help="port to listen on (default: the one in the kit)")
    start.add_argument("--data", metavar="DIR", help="folder for the database and the audit log (default: the kit)")
    add_service_arguments(start)


def run(options: argparse.Namespace) -> None:
    """Serve.

    Raises:
        ConfigError: the kit is wrong, or its certificate expired.
    """
    from fedtune.deploy.health import Health, serve_health
    from fedtune.deploy.kits.kit import Kit
    from fedtune.deploy.logs import configure_logs

    kit = Kit.read(Path(options.kit), kind="server")
    from fedtune.deploy.services.server_service import ServerService  # Flower takes seconds to import

    os.umask(0o077)  # what the process writes is for its own account alone
    configure_logs(options.log_level)
    health = Health()
    with ExitStack() as stack:
        if options.health:
            stack.enter_context(serve_health(options.health, health, anywhere=options.health_anywhere))
        data = Path(options.data) if options.data else None
        ServerService(kit=kit, host=options.host, port=options.port, data=data, health=health).run()
