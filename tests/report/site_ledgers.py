"""A site's folder with policy, key and ledger, written by the ledger itself."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import Ledger, Reservation
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import RECEIPT, Reason, Receipt, Refused
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy


def resigned(receipt: Receipt, **changes: Any) -> Receipt:
    """The receipt with changes, and signed again with a key of its own."""
    key = SigningKey(Ed25519PrivateKey.generate())
    other = replace(receipt, site_key=key.public, **changes)
    return replace(other, signature=key.sign(RECEIPT, other.message()))


@dataclass(frozen=True)
class Books:
    """One site's files in a folder of its own."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, policy: Policy) -> Books:
        """New ones, under `policy`."""
        folder.mkdir(parents=True)
        books = cls(folder)
        write_policy(policy, books.site_toml)
        books.open()
        return books

    @property
    def site_toml(self) -> Path:
        return self.folder / "site.toml"

    @property
    def ledger(self) -> Path:
        return SiteFiles.of(self.site_toml).ledger

    @property
    def key(self) -> SigningKey:
        return SigningKey.load(SiteFiles.of(self.site_toml).site_key)

    def open(self) -> Ledger:
        return SiteFiles.of(self.site_toml).open()

    def edit(self, *, noted: bool = True, **changes: Any) -> None:
        """Change the policy as its owner would, tables by dicts of their values; an open ledger notes it."""
        policy = read_policy(self.site_toml)
        values = {
            name: replace(getattr(policy, name), **change) if isinstance(change, dict) else change
            for name, change in changes.items()
        }
        write_policy(replace(policy, **values), self.site_toml)
        if noted:
            self.open()

    def charge(self, proposal: Proposal, *rounds: int, committed: bool = True) -> None:
        """Train these rounds of a run; without `committed`, each dies before its reply is stored."""
        for round in rounds:
            ledger = self.open()
            granted = ledger.reserve(proposal, round=round, request=f"{proposal.run} {round}")
            assert isinstance(granted, Reservation)
            if committed:
                ledger.commit(granted, b"reply", fingerprint="f1" * 32)

    def refuse(self, reason: Reason, *, run: str) -> None:
        self.open().refuse(Refused(reason, asked="more", allowed="less"), run=run, round=1, request="q")

    def copied(self, name: str) -> Path:
        """A backup of the ledger."""
        return Path(shutil.copy(self.ledger, self.folder / name))

    def tamper(self, statement: str) -> None:
        """Run SQL on the file past its triggers, which are put back."""
        with contextlib.closing(sqlite3.connect(self.ledger)) as file:
            triggers = file.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
            for name, _ in triggers:
                file.execute(f"DROP TRIGGER {name}")
            file.execute(statement)
            for _, sql in triggers:
                file.execute(sql)
            file.commit()
