"""A whole network on this machine: a real server and real sites, each a process of its own, over mutual TLS."""

import contextlib
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.supercore.state.alembic.utils import run_migrations
from sqlalchemy import create_engine

from fedtune.federation.replies import Closing
from fedtune.federation.spec import FederationSpec
from fedtune.ops.wire.identity import Tls
from fedtune.ops.wire.remote_grid import Heard, RemoteGrid
from fedtune.privacy.keys import SigningKey

from ..forked import Forked
from .certificates import LOOPBACK, Authority, public_pem

HERE, REPOSITORY = Path(__file__).parent, Path(__file__).parents[2]


def wait_for(condition: Callable[[], Any], *, seconds: float = 60.0, what: str = "") -> None:
    """Wait until `condition` holds; fail when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what or condition}"
        time.sleep(0.02)


def start_process(script: str, folder: Path) -> subprocess.Popen[str]:
    with (folder / "output.log").open("a") as output:
        return Forked(
            [sys.executable, str(HERE / script), str(folder)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            text=True,
        )


def ended(process: subprocess.Popen[str], *, by: signal.Signals, seconds: float = 20.0) -> int:
    """Send a signal to a process and wait for its end; its exit code."""
    process.send_signal(by)
    return process.wait(timeout=seconds)


@cache
def _empty_database() -> bytes:
    """A server's database as Flower's forty migrations leave it, which take a second; made once for all servers."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the migrations'
        path = Path(folder) / "state.db"
        engine = create_engine(f"sqlite:///{path}")
        run_migrations(engine)
        engine.dispose()
        return path.read_bytes()


@dataclass
class SiteProcess:
    """A site that runs."""

    folder: Path
    process: subprocess.Popen[str]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What it noted of one kind, whole lines only."""
        path = self.folder / "log.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        noted = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [event for event in noted if event["event"] == kind]

    def wait_for(self, kind: str, *, count: int = 1, seconds: float = 60.0) -> None:
        wait_for(lambda: len(self.events(kind)) >= count, seconds=seconds, what=f"{self.folder.name}: {kind}")

    def stop(self) -> None:
        """End it so that the server knows that the site is gone; by force where that takes too long."""
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended(self.process, by=signal.SIGTERM, seconds=5)
        self.process.kill()
        self.process.wait(timeout=20)


class Loopback:
    """A federation's server on a free port of this machine, with its authority, its lead and its sites.

    Args:
        settings: further ones of the server's process.

    Attributes:
        members: the roster: name -> (PEM of its connection key, whether it was revoked).
        migrates: whether the server makes its database itself, as a real one does, in place of finding an empty one.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.migrates = folder, False
        self.authority = Authority(folder / "certificates")
        self.lead_tls = self.authority.issue("lead")
        self.lead_key = SigningKey.load_or_make(folder / "lead_key.pem")
        self.members: dict[str, dict[str, Any]] = {}
        self.tls: dict[str, Tls] = {}
        self.port = free_port()
        self._server: subprocess.Popen[str] | None = None
        self._sites: list[SiteProcess] = []
        self._numbers = itertools.count(1)
        self._write_roster()
        tls = self.authority.issue("server", address=LOOPBACK)
        given = {"tls": _paths(tls), "lead": self.lead_key.public, "port": self.port, "upload_s": 8.0}
        (folder / "settings.json").write_text(json.dumps(given | settings))

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._server is not None
        return self._server

    @property
    def output(self) -> str:
        """What the server has logged."""
        return (self.folder / "output.log").read_text()

    def enlist(self, name: str, *, days: float = 5) -> Tls:
        """Give a site its certificate and put it on the roster."""
        self.tls[name] = self.authority.issue(name, days=days)
        self.members[name] = {"site": name, "node_key": public_pem(self.tls[name]).decode(), "revoked": False}
        self._write_roster()
        return self.tls[name]

    def set_revoked(self, name: str, revoked: bool = True) -> None:
        self.members[name]["revoked"] = revoked
        self._write_roster()

    def start(self) -> None:
        """Start the server, or start it again, and wait until it listens."""
        database = self.folder / "state.db"
        if not database.exists() and not self.migrates:
            database.write_bytes(_empty_database())
        before = self.output.count("ready\n") if (self.folder / "output.log").exists() else 0
        self._server = start_process("server_process.py", self.folder)

        def listens() -> bool:
            assert self.process.poll() is None, self.output
            return self.output.count("ready\n") > before

        wait_for(listens, seconds=60, what="the server")

    def kill(self) -> None:
        assert ended(self.process, by=signal.SIGKILL) == -signal.SIGKILL

    def audit(self) -> list[dict[str, Any]]:
        """What the server has written into its audit log."""
        path = self.folder / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rows(self, query: str) -> list[Any]:
        """What the server has in its database."""
        with contextlib.closing(sqlite3.connect(f"{(self.folder / 'state.db').as_uri()}?mode=ro", uri=True)) as file:
            return file.execute(query).fetchall()

    def lose_database(self) -> None:
        """As on a disk that was lost; the server must not run."""
        for path in self.folder.glob("state.db*"):
            path.unlink()

    def site(self, name: str, **behaviour: Any) -> SiteProcess:
        """Start a site; a second process of the same name notes what happens to it in a folder of its own."""
        folder = self.folder / f"{next(self._numbers)}-{name}"
        folder.mkdir()
        settings = {"server": self.address, "tls": _paths(self.tls[name]), "site": name, "behaviour": behaviour}
        (folder / "settings.json").write_text(json.dumps(settings))
        self._sites.append(SiteProcess(folder, start_process("site_process.py", folder)))
        return self._sites[-1]

    def grid(
        self,
        names: Sequence[str],
        *,
        hear: Callable[[int, Message, Message], Heard] = lambda number, question, answer: Heard(good=True),
        closing: Callable[[], Closing] | None = None,
        **waiting: Any,
    ) -> RemoteGrid:
        """The lead's connection to the sites with these names, in this order; `waiting` are settings of a round."""
        keys = {name: public_pem(self.tls[name]) for name in names}
        spec = FederationSpec(num_sites=len(names), **waiting)
        closing = closing or (lambda: Closing(spec))
        return RemoteGrid(self.address, self.lead_tls, sites=keys, key=self.lead_key, hear=hear, closing=closing)

    def stop_sites(self) -> None:
        while self._sites:
            self._sites.pop().stop()

    def stop(self) -> None:
        """End every process that is left."""
        self.stop_sites()
        if self._server is not None and self._server.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended(self._server, by=signal.SIGTERM)
            self._server.kill()
            self._server.wait(timeout=20)

    def _write_roster(self) -> None:
        partial = self.folder / "roster.partial"
        partial.write_text(json.dumps(list(self.members.values())))
        os.replace(partial, self.folder / "roster.json")


@contextlib.contextmanager
def running(folder: Path, *, enlist: Sequence[str] = ("a", "b"), **settings: Any) -> Iterator[Loopback]:
    """A server in a process of its own, with these sites on its roster."""
    made = Loopback(folder, **settings)
    for name in enlist:
        made.enlist(name)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def _paths(tls: Tls) -> dict[str, str]:
    return {name: str(path) for name, path in asdict(tls).items()}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        return int(listening.getsockname()[1])
