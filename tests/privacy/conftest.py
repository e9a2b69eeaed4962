"""Fixtures for tests of the privacy core: a site's ledger, its backups, and its clock."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy.ledger import history
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Receipt

from .builders import make_policy, make_proposal, site_key, train


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "50% of #1? & more" / "ledger.db"  # a folder may have any name


@pytest.fixture
def open_ledger(path: Path) -> Callable[..., SiteLedger]:
    """Open the ledger as a new process would; keywords change its policy, key, path, anchor or the server's time."""

    def make(**changes: Any) -> SiteLedger:
        values = {"path": path, "policy": make_policy(), "key": site_key, "create": True} | changes
        server = values.pop("server", None)
        ledger = SiteLedger(values.pop("path"), values.pop("policy"), values.pop("key"), **values)
        if server is not None:
            ledger.set_server_time(server.timestamp())
        return ledger

    return make


class Clock:
    """The clock of the ledgers; only a test advances it."""

    fromisoformat = staticmethod(datetime.fromisoformat)

    def __init__(self, now: datetime) -> None:
        self.time = now

    def forward(self, **span: float) -> None:
        self.time += timedelta(**span)

    def now(self, zone: object) -> datetime:
        assert zone is UTC
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that starts at the beginning of a year."""
    clock = Clock(datetime(2030, 1, 10, tzinfo=UTC))
    monkeypatch.setattr(history, "datetime", clock)
    return clock


class Backups:
    """A ledger that is backed up, used further, and restored."""

    def __init__(self, opener: Callable[..., SiteLedger], path: Path) -> None:
        self.open, self.path, self.kept = opener, path, path.with_name("backup.db")

    def back_up(self) -> None:
        shutil.copy(self.path, self.kept)

    def put_back(self, *, anchor: Head | None = None) -> SiteLedger:
        """Restore the backup, and charge the gap to an anchor if one is given."""
        shutil.copy(self.kept, self.path)
        ledger = self.open()
        if anchor is not None:
            ledger.charge_gap(anchor)
        return ledger

    def branch(self, proposal: Proposal, *rounds: int) -> tuple[Head, Receipt]:
        """Restore the backup without charging the gap and train on it; the next restore loses that branch."""
        ledger = self.put_back()
        train(ledger, proposal, *rounds)
        return ledger.head(), ledger.sign_receipt(proposal.run)


@pytest.fixture
def backups(open_ledger: Callable[..., SiteLedger], path: Path) -> Backups:
    """A ledger that was backed up after one round of run r."""
    train(open_ledger(), make_proposal(), 1)
    backups = Backups(open_ledger, path)
    backups.back_up()
    return backups
