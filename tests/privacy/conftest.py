"""What the tests of the privacy core share: statistics, and the parts that a site's ledger is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import history, store
from fedtune.privacy.ledger.site_ledger import Ledger
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import (
    Allow,
    Asserted,
    Budget,
    Dataset,
    Limits,
    Policy,
    Population,
    Reference,
    Releases,
)

from .builders import train


@pytest.fixture(scope="session")
def plan() -> Callable[..., Plan]:
    """A small private plan; keywords override."""

    def make(**changes: object) -> Plan:
        values: dict[str, object] = {"unit": "record", "delta": 1e-5, "sampling_rate": 0.25, "noise_multiplier": 1.0}
        values |= {"max_grad_norm": 0.5, "local_steps": 3, "num_rounds": 2}
        return Plan(**(values | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def make_key() -> Callable[[int], SigningKey]:
    """A key for each number, the same in every session."""
    return lambda number: SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


@pytest.fixture(scope="session")
def site_key(make_key: Callable[[int], SigningKey]) -> SigningKey:
    return make_key(1)


@pytest.fixture(scope="session")
def policy(lead_key: SigningKey) -> Callable[..., Policy]:
    """A policy that allows `proposal()` twice; keywords override a key, or with a dict some keys of a table.

    The lifetime cap has room for ten rounds of `plan()` and not for eleven.
    """
    base = Policy(
        site="a",
        population=Population(name="patients"),
        dataset=(
            Dataset(id="notes", declared_size=2000, path="notes.csv", columns={"text": "body", "label": "code"}),
            Dataset(id="letters", declared_size=500),
        ),
        budget=Budget(
            delta=1e-5, max_epsilon=11.0, reference=Reference(sampling_rate=0.25, noise_multiplier=1.0, steps=30)
        ),
        limits=Limits(
            min_noise_multiplier=0.6, max_sampling_rate=0.5, max_grad_norm=1.0, max_local_steps=10, max_rounds=20
        ),
        allow=Allow(
            leads=(lead_key.public,),
            tasks=("classification",),
            base_models=("b" * 64,),
            target_modules=("q_proj", "v_proj"),
            max_rank=8,
            train_head=True,
        ),
        releases=Releases(reply_after_s=0.0),
        asserted=Asserted(no_person_at_another_site=True),
    )

    def make(**changes: Any) -> Policy:
        values = {
            name: dataclasses.replace(getattr(base, name), **change) if isinstance(change, dict) else change
            for name, change in changes.items()
        }
        return dataclasses.replace(base, **values)

    return make


@pytest.fixture(scope="session")
def proposal(
    run_proposal: Callable[..., Proposal], lead_key: SigningKey, plan: Callable[..., Plan]
) -> Callable[..., Proposal]:
    """What the policy above allows; keywords override, those of a plan in the dict `plan`."""
    allowed = {"lead": lead_key.public, "dataset": "notes", "base_model": "b" * 64, "target_modules": ("q_proj",)}

    def make(**changes: Any) -> Proposal:
        return run_proposal(**allowed | changes | {"plan": plan(**{"num_rounds": 5, **changes.get("plan", {})})})

    return make


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.db"


@pytest.fixture
def opened(path: Path, policy: Callable[..., Policy], site_key: SigningKey) -> Callable[..., Ledger]:
    """Open the ledger as a fresh process would; keywords change its policy, key, path, anchor or server's time."""

    def make(**changes: Any) -> Ledger:
        values = {"path": path, "policy": policy(), "key": site_key, "anchor": None, "server": None} | changes
        ledger = Ledger(values["path"], values["policy"], values["key"], anchor=values["anchor"])
        if values["server"] is not None:
            ledger.asked_at(values["server"].timestamp())
        return ledger

    return make


class Clock:
    """The time that ledgers see; it moves only when a test moves it."""

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
    """A clock at the beginning of a year."""
    clock = Clock(datetime(2030, 1, 10, tzinfo=UTC))
    monkeypatch.setattr(history, "datetime", clock)
    return clock


@pytest.fixture(scope="session")
def tamper() -> Callable[..., None]:
    """Run SQL on a ledger file as somebody would who can write it: past the triggers, and leaving them in place."""

    def run(path: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
        with contextlib.closing(sqlite3.connect(path)) as file:
            file.executescript("PRAGMA synchronous = OFF; PRAGMA journal_mode = MEMORY")
            for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                file.execute(f"DROP TRIGGER {name}")
            for statement in statements:
                file.execute(statement, values)
            for trigger in (sql for sql in store.SCHEMA if "TRIGGER" in sql):
                file.execute(trigger)
            file.commit()

    return run


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a ledger file, as a backup."""
    made: list[Path] = []

    def copy(path: Path) -> Path:
        made.append(tmp_path / f"copy-{len(made)}.db")
        return Path(shutil.copy(path, made[-1]))

    return copy


@pytest.fixture
def backup(opened: Any, proposal: Any, path: Path, copied: Callable[[Path], Path]) -> Path:
    """A copy of a ledger with one round of run r."""
    train(opened(), proposal(), 1)
    return copied(path)
