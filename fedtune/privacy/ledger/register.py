"""A ledger's opening, and its register of arrivals: as what cohort a person was first admitted, for ever.

A corrected date must not be a fresh budget.  So the cohort under which somebody is first admitted to a run counts from
then on, whatever the date says later: all that was charged for this person was charged to that cohort.  It is a table
in the ledger's file, written in the transaction that charges the round, before anything is sampled.  Each such entry
of the chain says the digest of the register after it, so a row that was changed or removed shows.
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
"""Of ledgers with arrivals alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A ledger's first event, which never changes.

    Attributes:
        ledger: random id, in hex.
        order: of the filter.
        reference: the run that the order was chosen for, as an event's JSON.
        arrivals: the calendar of the population's arrivals; "": it has none, and the event does not say so.
    """

    ledger: str
    site: str
    population: str
    unit: str
    delta: float
    order: float
    reference: dict[str, Any]
    site_key: str
    arrivals: Literal[Calendar, ""] = ""

    @classmethod
    def under(cls, policy: Policy, *, ledger: str, site_key: str) -> Opened:
        """The first event of a ledger that begins under `policy`."""
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
        """The event's detail."""
        return {name: value for name, value in asdict(self).items() if name != "arrivals" or value}

    @classmethod
    def of(cls, detail: dict[str, Any]) -> Opened:
        """Read the first event's detail; raises ValueError for anything else."""
        opened = decode(cls, {name: value for name, value in detail.items() if name != "what"})
        if not (0 < opened.delta < 1 and opened.order > 1 and is_public_key(opened.site_key)):
            raise ValueError("it does not open a ledger")
        dp_events.from_json(opened.reference)
        return opened

    def differences(self, policy: Policy) -> list[tuple[str, object, object]]:
        """(key, what the ledger was made for, what the policy says) where the two do not fit."""
        people = policy.population
        for_this = (self.site, self.population, self.unit, self.delta, self.arrivals or "none")
        says = (policy.site, people.name, people.unit, policy.budget.delta, people.arrivals or "none")
        keys = ("site", "population.name", "population.unit", "budget.delta", "population.arrivals")
        return [row for row in zip(keys, for_this, says, strict=True) if row[1] != row[2]]


class Row(NamedTuple):
    """One person.

    Attributes:
        sequence: of the entry that charged the round to which the person was first admitted.
        unit: HMAC of the id, under a key of the site's own.
        cohort: under which that was.
    """

    sequence: int
    unit: bytes
    cohort: int


def unit_of(key: bytes, user: str) -> bytes:
    """The mark of a user in the register: nobody without the `key` can look for a person in it."""
    return hmac.digest(key, user.encode(), hashlib.sha256)[:UNIT_BYTES]


def digest_after(before: str, rows: Iterable[Row]) -> str:
    """The register's digest with the new `rows` of one entry; without any it stays as it was."""
    packed = b"".join(struct.pack(f">Q{UNIT_BYTES}sQ", *row) for row in sorted(rows))
    return hashlib.sha256(b"fedtune arrivals\n" + before.encode() + packed).hexdigest() if packed else before


def digests(rows: Iterable[Row]) -> dict[int, str]:
    """Sequence -> the register's digest after the rows of that entry, for each entry that has some; in their order."""
    digest, made = START, dict[int, str]()
    for sequence, of_one in groupby(sorted(rows), key=lambda row: row.sequence):
        made[sequence] = digest = digest_after(digest, of_one)
    return made


def read_rows(file: sqlite3.Connection) -> list[Row]:
    """The whole register.

    Raises:
        RunError: a row is none that fedtune writes.
    """
    rows = [Row(*row) for row in file.execute("SELECT sequence, unit, cohort FROM arrivals").fetchall()]
    if any(len(row.unit) != UNIT_BYTES or min(row.sequence, row.cohort) < 0 for row in rows):
        raise RunError("the register of arrivals has a row that fedtune does not write")
    return rows
