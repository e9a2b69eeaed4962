"""`fedtune watch`: a run's live page."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from fedtune.cli.command import Argument, Language, Option, single


def watch(
    run: Annotated[Path, Argument("RUN", help="a run folder, such as runs/tickets")],
    host: Annotated[str, Option(help="loopback address to listen on")] = "127.0.0.1",
    port: Annotated[int, Option(help="port to listen on; 0: any that is free")] = 0,
    language: Annotated[Language | None, Option(help="of the page (default: the run's setting)")] = None,
) -> None:
    """Follow a run in a browser: rounds, sites, refusals, epsilon by site, scores, traffic; also of a run that is over.

      fedtune watch runs/tickets

    It prints an address to open on this machine, and serves it until Ctrl-C. The page is for this machine alone, needs
    the token in the address, and is read-only; nothing is written into the run folder.
    """
    from fedtune.cli.working_folder import is_running
    from fedtune.config import saved_config
    from fedtune.report.watch_page import WatchedFolder, WatchPage
    from fedtune.report.watch_server import WatchServer

    config = saved_config(run)
    watched = WatchedFolder(run, config, is_running=is_running)
    server = WatchServer(watched, WatchPage(language or config.report.language), host=host, port=port)
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


app = single(watch)
