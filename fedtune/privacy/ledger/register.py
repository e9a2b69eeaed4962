"""The first event of a ledger, and the register of arrivals: each person's cohort at first admission.

Correcting a date must not create a fresh budget. So the cohort at first admission to a run remains a person's cohort,
even if the date changes later: everything charged for the person was charged to that cohort. The register is a table in
the ledger's file, updated in the transaction that charges the round, before anything is sampled. Each such event stores
the digest of the updated register, so that a changed or removed row is detected.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

from fedtune.codec import decode
from fedtune.privacy import events as dp_events
from fedtune.privacy.cohorts import Calendar
from fedtune.privacy.keys import is_public_key
from fedtune.privacy.ledger.chain import START
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.site_policy import Policy
from fedtune.spec import RunError

UNIT_BYTES = 16
SCHEMA = (
    """CREATE TABLE arrivals (
  unit BLOB PRIMARY KEY, cohort INTEGER NOT NULL, sequence INTEGER NOT NULL
) STRICT, WITHOUT ROWID""",
    """CREATE TRIGGER arrivals_are_never_changed BEFORE UPDATE ON arrivals
BEGIN SELECT RAISE(ABORT, 'the register is append-only'); END""",
    """CREATE TRIGGER arrivals_are_never_deleted BEFORE DELETE ON arrivals
BEGIN SELECT RAISE(ABORT, 'the register is append-only'); END""",
)
"""SQL statements that create the register, in ledgers of populations with arrivals only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerHeader:
    """The immutable content of a ledger's first event.

    Attributes:
        ledger: random identifier, in hex.
        order: Renyi order of the filter.
        reference: event of the reference run that determined the order, as JSON.
        arrivals: calendar period of the population's cohorts; "", and omitted from the event, without arrivals.
    """

    ledger: str
    site: str
    population: str
    unit: Unit
    delta: float
    order: float
    reference: dict[str, Any]
    site_key: str
    arrivals: Literal[Calendar, ""] = ""

    @classmethod
    def from_policy(cls, policy: Policy, *, ledger: str, site_key: str) -> LedgerHeader:
        """Create the first event of a new ledger under `policy`."""
        budget = policy.budget
        return cls(
            ledger=ledger,
            site=policy.site,
            population=policy.population.name,
            unit=policy.population.unit,
            delta=budget.delta,
            order=budget.order(),
            reference=dp_events.to_json(budget.reference.event),
            site_key=site_key,
            arrivals=policy.population.arrivals,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the detail field of the event as a JSON object."""
        return {name: value for name, value in asdict(self).items() if name != "arrivals" or value}

    @classmethod
    def from_detail(cls, detail: dict[str, Any]) -> LedgerHeader:
        """Parse the detail field of a ledger's first event.

        Raises:
            ValueError: `detail` is not a valid first event.
        """
        opened = decode(cls, {name: value for name, value in detail.items() if name != "what"})
        if not (0 < opened.delta < 1 and opened.order > 1 and is_public_key(opened.site_key)):
            raise ValueError("the first event has invalid fields")
        dp_events.from_json(opened.reference)
        return opened

    def list_differences(self, policy: Policy) -> list[tuple[str, object, object]]:
        """List (key, value in the ledger, value in `policy`) for each fixed value that differs."""
        people = policy.population
        for_this = (self.site, self.population, self.unit, self.delta, self.arrivals or "none")
        says = (policy.site, people.name, people.unit, policy.budget.delta, people.arrivals or "none")
        keys = ("site", "population.name", "population.unit", "budget.delta", "population.arrivals")
        return [row for row in zip(keys, for_this, says, strict=True) if row[1] != row[2]]


class Row(NamedTuple):
    """A row of the register: a person's pseudonym and cohort.

    Attributes:
        sequence: sequence number of the event that first admitted the person.
        unit: HMAC of the person's identifier, under a secret key of the site.
        cohort: the person's cohort at first admission.
    """

    sequence: int
    unit: bytes
    cohort: int


def pseudonymize(key: bytes, user: str) -> bytes:
    """Compute the pseudonym of a user in the register: an HMAC under a secret key."""
    return hmac.digest(key, user.encode(), hashlib.sha256)[:UNIT_BYTES]


def compute_register_digest(before: str, rows: Iterable[Row]) -> str:
    """Compute the register's digest after an event that adds `rows`. Without rows, the digest does not change."""
    packed = b"".join(struct.pack(f">Q{UNIT_BYTES}sQ", *row) for row in sorted(rows))
    return hashlib.sha256(b"fedtune arrivals\n" + before.encode() + packed).hexdigest() if packed else before


def map_digests_by_event(rows: Iterable[Row]) -> dict[int, str]:
    """Map the sequence number of each event that added rows to the register's digest after that event."""
    digest, made = START, dict[int, str]()
    for sequence, of_one in groupby(sorted(rows), key=lambda row: row.sequence):
        made[sequence] = digest = compute_register_digest(digest, of_one)
    return made


def read_rows(file: sqlite3.Connection) -> list[Row]:
    """Read all rows of the register.

    Raises:
        RunError: a row is malformed.
    """
    rows = [Row(*row) for row in file.execute("SELECT sequence, unit, cohort FROM arrivals").fetchall()]
    if any(len(row.unit) != UNIT_BYTES or min(row.sequence, row.cohort) < 0 for row in rows):
        raise RunError("the register of arrivals has a malformed row")
    return rows
