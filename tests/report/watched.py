"""Run folders in every state that a live page meets, made by hand, and a server of one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.api.compose import compose_run, write_config
from fedtune.cli.working_folder import is_running, only_one
from fedtune.config import RunConfig, saved_config
from fedtune.federation.lead import Checkpoints, LeadState, RoundResult
from fedtune.model import Adapter
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.release import RECEIPT, Receipt
from fedtune.report.watch_page import Live, WatchedFolder, WatchPage
from fedtune.report.watch_server import WatchServer

NORTH = ("federation.num_sites=3", "federation.num_rounds=10", "federation.site_names=[north,south,west]")
BEGAN = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
ROUND_S = 40.0


@dataclass
class MadeRun:
    """A run folder that grows by hand, as the lead's process would let it grow."""

    folder: Path
    config: RunConfig
    state: LeadState
    keys: dict[str, SigningKey] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path, *overrides: str) -> MadeRun:
        """One that has not begun: a process made its folder and loads model and data."""
        changes = ["experiment=debug", f"name={folder.name}", "privacy.noise_multiplier=6", *overrides]
        config = compose_run(changes)
        folder.mkdir(parents=True)
        write_config(config, folder)
        (folder / "log.txt").touch()
        return cls(folder, config, LeadState(round=0, adapter=Adapter({"a": np.zeros(3, np.float32)})))

    @property
    def sites(self) -> tuple[str, ...]:
        return self.config.federation.active

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", self.config.digest())

    def begin(self) -> MadeRun:
        """Model and data are loaded."""
        self.checkpoints.save(self.state)
        return self

    def ask(self, round: int | None = None) -> MadeRun:
        """Ask every site for the next round."""
        self.checkpoints.ask(round or self.state.round + 1, list(self.sites))
        return self

    def finish_round(self, failed: Mapping[str, str] | None = None, *, metrics: Mapping[str, float] = {}) -> MadeRun:
        """A round in which those that did not fail sent an update."""
        failed, number = failed or {}, self.state.round + 1
        result = RoundResult(
            round=number,
            seconds=ROUND_S - 5 * (number % 3),
            sites=tuple(site for site in self.sites if site not in failed),
            failed_sites=failed,
            bytes_down=412_000 + 900 * number,
            bytes_up=398_000 - 1_200 * len(failed),
            metrics=metrics
            or {"accuracy": 0.9 - 0.6 / (number + 1), "macro_f1": 0.88 - 0.7 / (number + 1), "loss": 3 / number},
            ended=(BEGAN + timedelta(seconds=ROUND_S * number)).isoformat(timespec="seconds"),
        )
        receipts = dict(self.state.receipts)
        for site in result.sites:
            receipts[site] = self.receipt(site, (receipts[site].charged_rounds if site in receipts else 0) + 1)
        silent = {site: self.state.unanswered.get(site, 0) + 1 for site, why in failed.items() if why == "no_reply"}
        unanswered = {site: count for site, count in self.state.unanswered.items() if site not in result.sites}
        self.state = replace(
            self.state, round=number, rounds=(*self.state.rounds, result), receipts=receipts,
            unanswered=unanswered | silent, seconds=ROUND_S * number,
        )  # fmt: skip
        return self.begin()

    def receipt(self, site: str, charged: int) -> Receipt:
        """One that the site signed."""
        key = self.keys.setdefault(site, SigningKey(Ed25519PrivateKey.generate()))
        receipt = Receipt(
            site=site, run=self.config.run_id(), charged_rounds=charged, charged_steps=2 * charged,
            sequence=3 * charged, head="00" * 32, site_key=key.public, signature="",
        )  # fmt: skip
        return replace(receipt, signature=key.sign(RECEIPT, receipt.message()))

    def answer(self, site: str, what: str, *, seconds: float) -> MadeRun:
        """Note what a real site answered, so long after the run began."""
        path = self.folder / "answers.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known[site] = {"what": what, "time": (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="seconds")}
        path.write_text(json.dumps(known))
        return self


@dataclass(frozen=True)
class Served:
    """A live page on loopback."""

    server: WatchServer

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def origin(self) -> str:
        return self.address.split("/?")[0]

    @property
    def token(self) -> str:
        return self.address.split("token=")[1]

    def client(self, **options: Any) -> httpx.Client:
        """Without a cookie, which follows no redirection."""
        return httpx.Client(base_url=self.origin, trust_env=False, timeout=30, **options)

    @contextmanager
    def reader(self) -> Iterator[httpx.Client]:
        """With the cookie."""
        with self.client() as client:
            assert client.get(self.address).status_code == 303
            yield client

    def state(self) -> Any:
        with self.reader() as client:
            return client.get("/state").json()


def watched(folder: Path) -> WatchedFolder:
    return WatchedFolder(folder, saved_config(folder), is_running=is_running)


def seen(folder: Path, *, seconds: float = 0.0, running: bool = True) -> Live:
    """The run, so long after it began."""
    at = BEGAN + timedelta(seconds=seconds)
    if not running:
        return watched(folder).now(at=at)
    with only_one(folder):
        return watched(folder).now(at=at)


@contextmanager
def served(folder: Path, *, language: str = "en", host: str = "127.0.0.1", port: int = 0) -> Iterator[Served]:
    """The page of a folder, by a real server in a thread."""
    server = WatchServer(watched(folder), WatchPage(language), host=host, port=port)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield Served(server)
    finally:
        server.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder, with the time at which it was last written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted([folder, *folder.rglob("*")])
    }


def wait_until(holds: Any, *, seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)
