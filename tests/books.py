"""A site's folder with a policy, a key and a ledger that records real charges, and forged signatures for tests."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fedtune.codec import read_toml
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.policy_file import OTHER_TABLES, read_policy, write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import RECEIPT, Reason, Receipt, Refused
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy

from .privacy import builders


def resign_receipt(receipt: Receipt, **changes: Any) -> Receipt:
    """Return the receipt with changes, signed by a different key."""
    key = builders.make_key(9)
    other = replace(receipt, site_key=key.public, **changes)
    return replace(other, signature=key.sign(RECEIPT, other.encode_signed_bytes()))


@dataclass
class Books:
    folder: Path

    @classmethod
    def made(cls, folder: Path, policy: Policy) -> Self:
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
        return self.folder / "ledger.db"

    @property
    def key(self) -> SigningKey:
        return SigningKey.load_or_create(SiteFiles.from_site_toml(self.site_toml).site_key)

    def open(self) -> SiteLedger:
        return SiteFiles.from_site_toml(self.site_toml).open_ledger(create=True)

    def edit(self, *, recorded: bool = False, **changes: Any) -> None:
        """Change the policy file as its owner would (tables as dicts); `recorded`: also in its ledger."""
        others = {key: value for key, value in read_toml(self.site_toml, key="").items() if key in OTHER_TABLES}
        write_policy(builders.change_values(read_policy(self.site_toml), **changes), self.site_toml, others=others)
        if recorded:
            self.open()

    def charge(self, proposal: Proposal, *rounds: int, committed: bool = True) -> None:
        """Charge these rounds of a run; unless `committed`, each process dies before it stores its reply."""
        for round in rounds:
            ledger = self.open()
            granted = builders.reserve(ledger, proposal, round)
            if committed:
                ledger.commit(granted, b"reply", fingerprint="f1" * 32)

    def refuse(self, reason: Reason, *, run: str, request: str = "q") -> None:
        self.open().record_refusal(Refused(reason, requested="more", allowed="less"), run=run, round=1, request=request)

    def copy_ledger(self, name: str) -> Path:
        """Copy the ledger as `sqlite3 ledger.db ".backup NAME"` does, which also works while the site serves."""
        copy = self.folder / name
        with closing(sqlite3.connect(self.ledger)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        return copy

    def tamper(self, statement: str) -> None:
        """Run SQL on the file with its triggers removed, and restore them afterwards."""
        builders.tamper(self.ledger, statement)
