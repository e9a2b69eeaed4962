"""`fedtune watch`: its arguments and the call; nothing here is slow to import."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DESCRIPTION = """\
Follow a run in a browser: rounds, sites, refusals, epsilon by site, scores, traffic; also of a run that is over.

  fedtune watch runs/tickets

It prints an address to open on this machine, and serves it until Ctrl-C. The page is for this machine alone, needs
the token in the address, and can only be looked at; nothing is written into the run folder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="a run folder, such as runs/tickets")
    parser.add_argument("--host", default="127.0.0.1", help="loopback address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: 0, any that is free)")
    parser.add_argument("--language", choices=("en", "de"), help="of the page (default: the run's setting)")


def watch(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: it is no run folder, or host or port cannot be had.
    """
    from fedtune.cli.compose import saved_config
    from fedtune.cli.run_folder import is_running
    from fedtune.report.watch.watch_page import WatchPage
    from fedtune.report.watch.watch_server import WatchServer
    from fedtune.report.watch.watch_state import WatchedFolder

    folder = Path(options.run)
    config = saved_config(folder)
    watched = WatchedFolder(folder, config, is_running=is_running)
    page = WatchPage(options.language or config.report.language)
    server = WatchServer(watched, page, host=options.host, port=options.port)
    with _signals_call(server.stop):
        sys.stdout.write(f"{server.address}\nOpen it in a browser on this machine. Ctrl-C ends it.\n")
        sys.stdout.flush()
        server.run()


@contextmanager
def _signals_call(stop: Callable[[], None]) -> Iterator[None]:
    """Take Ctrl-C and SIGTERM for an ordinary end, also the one that uvicorn raises again once it has ended."""
    before = {each: signal.signal(each, lambda number, frame: stop()) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
