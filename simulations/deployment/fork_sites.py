"""`fedtune site start` for each of the named sites, forked off one process that has the libraries in memory.

Each is a process of its own, with its own log (NAME.log) and number (NAME.pid) in the folder where this is started.
"""

import contextlib
import gc
import os
import signal
import sys
from pathlib import Path

import fedtune.ops.services.site_service
import fedtune.sites.real_site  # noqa: F401  torch and transformers, which take seconds
from fedtune.cli.main import main


def start(name: str) -> int:
    """Fork off one site."""
    if pid := os.fork():
        Path(f"{name}.pid").write_text(str(pid))
        return pid
    with Path(f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    os._exit(main(["site", "start", "--kit", f"{name}/kit", "--site", f"{name}/site.toml"]))


def stop(pids: list[int]) -> None:
    """Ask all to end; some may have been killed."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


if __name__ == "__main__":
    gc.freeze()  # so that no collection writes to what is shared
    pids = [start(name) for name in sys.argv[1:]]
    signal.signal(signal.SIGTERM, lambda *_: stop(pids))
    for pid in pids:
        os.waitpid(pid, 0)
