"""A complete network on this machine: a real server and real sites in separate processes, over mutual TLS."""

import contextlib
import itertools
import json
import os
import socket
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from flwr.supercore.state.alembic.utils import run_migrations
from sqlalchemy import create_engine

from fedtune.federation.replies import StoppingRule
from fedtune.federation.spec import FederationSpec
from fedtune.flower.asking_grid import ClassifiedAnswer
from fedtune.ops.wire.identity import Tls
from fedtune.ops.wire.remote_grid import RemoteGrid
from fedtune.privacy.keys import SigningKey

from ..processes import Process, wait_for
from .certificates import LOOPBACK, Authority, to_public_pem

_PORTS = itertools.count(os.getpid())


class Program(Process):
    """A server or site program of the tests, with its folder."""

    def __init__(self, script: str, folder: Path) -> None:
        words = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
        super().__init__(folder.name, words, log=folder / "output.log", cwd=folder)
        self.folder = folder

    def wait_for(self, event: str, *, count: int = 1) -> None:
        wait_for(lambda: len(self.lines(event)) >= count, what=f"{self.name}: {event}")


@cache
def _create_empty_database() -> bytes:
    """Create a server's database with all of Flower's migrations, once for all servers, because they take a second."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from the migrations
        path = Path(folder) / "state.db"
        engine = create_engine(f"sqlite:///{path}")
        run_migrations(engine)
        engine.dispose()
        return path.read_bytes()


class Loopback:
    """A federation's server on a free port of this machine, with its authority, lead and sites.

    Args:
        settings: additional settings of the server's process.

    Attributes:
        members: the roster: name -> (PEM of its connection key, whether it was revoked).
        migrates: whether the server creates its database, as a real one does, instead of receiving an empty one.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.migrates = folder, False
        self.authority = Authority(folder / "certificates")
        self.lead_tls = self.authority.issue("lead")
        self.lead_key = SigningKey.load_or_create(folder / "lead_key.pem")
        self.members: dict[str, dict[str, Any]] = {}
        self.tls: dict[str, Tls] = {}
        self.port = find_free_port()
        self.process: Any = None
        self._sites: list[Program] = []
        self._numbers = itertools.count(1)
        self._write_roster()
        tls = self.authority.issue("server", address=LOOPBACK)
        of_process = {"tls": _list_paths(tls), "lead": self.lead_key.public, "port": self.port, "upload_s": 8.0}
        (folder / "settings.json").write_text(json.dumps(of_process | settings))

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def output(self) -> str:
        return (self.folder / "output.log").read_text()

    def add_member(self, name: str, *, days: float = 5) -> Tls:
        self.tls[name] = self.authority.issue(name, days=days)
        self.members[name] = {"site": name, "node_key": to_public_pem(self.tls[name]).decode(), "revoked": False}
        self._write_roster()
        return self.tls[name]

    def set_revoked(self, name: str, revoked: bool = True) -> None:
        self.members[name]["revoked"] = revoked
        self._write_roster()

    def start(self) -> None:
        database = self.folder / "state.db"
        if not database.exists() and not self.migrates:
            database.write_bytes(_create_empty_database())
        self.process = Program("server_process.py", self.folder)
        self.process.wait_for_text("ready\n", seconds=60)

    def audit(self) -> list[dict[str, Any]]:
        path = self.folder / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rows(self, query: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(f"{(self.folder / 'state.db').as_uri()}?mode=ro", uri=True)) as file:
            return file.execute(query).fetchall()

    def site(self, name: str, **behavior: Any) -> Program:
        """Start a site; a second process with the same name logs to a separate folder."""
        folder = self.folder / f"{next(self._numbers)}-{name}"
        folder.mkdir()
        settings = {"server": self.address, "tls": _list_paths(self.tls[name]), "site": name, "behavior": behavior}
        (folder / "settings.json").write_text(json.dumps(settings))
        self._sites.append(Program("site_process.py", folder))
        return self._sites[-1]

    def grid(
        self,
        names: Any,
        *,
        hear: Any = lambda *_: ClassifiedAnswer(good=True),
        closing: Any = None,
        patience_s: float = 0.0,
        **waiting: Any,
    ) -> Any:
        """Create the lead's connection to the sites with these names, in this order; `waiting` are settings of a
        round.
        """
        keys = {name: to_public_pem(self.tls[name]) for name in names}
        spec = FederationSpec(num_sites=len(names), **waiting)
        closing = closing or (lambda: StoppingRule(spec))
        options: dict[str, Any] = {"hear": hear, "closing": closing, "patience_s": patience_s}
        return RemoteGrid(self.address, self.lead_tls, sites=keys, key=self.lead_key, **options)

    def stop_sites(self) -> None:
        while self._sites:
            self._sites.pop().stop()

    def stop(self) -> None:
        self.stop_sites()
        if self.process is not None:
            self.process.stop()

    def _write_roster(self) -> None:
        partial = self.folder / "roster.partial"
        partial.write_text(json.dumps(list(self.members.values())))
        os.replace(partial, self.folder / "roster.json")


@contextlib.contextmanager
def run_server(folder: Path, *, add_member: Sequence[str] = ("a", "b"), **settings: Any) -> Iterator[Loopback]:
    """Run a server in a separate process, with these sites in its roster."""
    network = Loopback(folder, **settings)
    for name in add_member:
        network.add_member(name)
    try:
        network.start()
        yield network
        assert network.process.code is None
    finally:
        network.stop()


def _list_paths(tls: Tls) -> dict[str, str]:
    return {name: str(path) for name, path in asdict(tls).items()}


def find_free_port() -> int:
    """Find a port that nothing else takes before the server does: each test worker has its own range, and all ranges
    lie below the one that outgoing connections draw from.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(1_000):
        port = 20_000 + 1_000 * (worker % 12) + next(_PORTS) % 1_000
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind((LOOPBACK, port))
            return port
    raise AssertionError("no port of this worker's range is free")
