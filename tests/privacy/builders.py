"""Builders for tests of the privacy core: keys, a plan, a proposal, a policy, and requests to a ledger."""

import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st

from fedtune.privacy import site_policy
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import Head, Kind
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Dataset, Policy


def make_key(number: int) -> SigningKey:
    """Return the key with this number; it is the same in every session."""
    return SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


site_key, lead_key, stranger_key = make_key(1), make_key(5), make_key(6)
"""Keys of the site, of the lead that it trusts, and of a stranger."""
_PLAN: dict[str, Any] = {"unit": "record", "delta": 1e-5, "sampling_rate": 0.25, "noise_multiplier": 1.0}
_PLAN |= {"max_grad_norm": 0.5, "local_steps": 3, "num_rounds": 2}
_PROPOSAL: dict[str, Any] = {"run": "r", "lead": lead_key.public, "dataset": "notes", "task": "classification"}
_PROPOSAL |= {"base_model": "b" * 64, "target_modules": ("q_proj",), "rank": 4, "train_head": True, "num_sites": 3}
_PROPOSAL |= {"seeded_noise": False, "dtype": "float32", "lora_scale": 1.0, "head_scale": 10.0}
OTHER: dict[str, Any] = {"run": "s", "dataset": "letters", "target_modules": ("v_proj",), "rank": 3, "num_sites": 2}
OTHER |= {"train_head": False, "seeded_noise": True, "lora_scale": 2.0, "head_scale": 1.0, "start_adapter": "d" * 64}
OTHER |= {"algorithm": "fedprox", "ranks": {"a": 1}}
"""A second valid value for each proposal field for which the policy allows several."""


def change_values(spec: Any, **changes: Any) -> Any:
    """Return a configuration or policy with other values: a dict changes a group or table, other values a key."""
    groups = {key: replace(getattr(spec, key), **table) for key, table in changes.items() if isinstance(table, dict)}
    return replace(spec, **changes | groups)


@cache
def _make_policy() -> Policy:
    # Built lazily: an invalid policy must fail a test, not the import.
    return Policy(
        site="a",
        population=site_policy.Population(name="patients"),
        dataset=(
            Dataset(id="notes", declared_size=2000, path="notes.csv", columns={"text": "body", "label": "code"}),
            Dataset(id="letters", declared_size=500),
        ),
        budget=site_policy.Budget(
            delta=1e-5,
            max_epsilon=11.0,
            reference=site_policy.ReferenceRun(sampling_rate=0.25, noise_multiplier=1.0, steps=30),
        ),
        limits=site_policy.Limits(
            min_noise_multiplier=0.6, max_sampling_rate=0.5, max_grad_norm=1.0, max_local_steps=10, max_rounds=20
        ),
        allow=site_policy.Allow(
            leads=(lead_key.public,),
            tasks=("classification",),
            base_models=("b" * 64,),
            target_modules=("q_proj", "v_proj"),
            max_rank=8,
            train_head=True,
        ),
        releases=site_policy.Releases(reply_after_s=0.0),
        asserted=site_policy.Asserted(no_person_at_another_site=True),
    )


def plan(**changes: Any) -> Plan:
    """Build a small private plan; keywords override its fields."""
    return Plan(**(_PLAN | changes))


def make_proposal(**changes: Any) -> Proposal:
    """Build a proposal within the policy; keywords override its fields, and the dict `plan` those of its plan."""
    return Proposal(**_PROPOSAL | changes | {"plan": plan(**{"num_rounds": 5, **changes.get("plan", {})})})


def make_policy(**changes: Any) -> Policy:
    """Build a policy that allows `proposal()` twice; a keyword overrides a key, or with a dict some keys of a table.

    The lifetime cap is large enough for ten rounds of `plan()` but not for eleven.
    """
    return change_values(_make_policy(), **changes)


def make_user_policy(*named: tuple[str, str, str], **changes: Any) -> Policy:
    """Build a user-level policy; each data set has an id, a file, and the column with the user of a record."""
    columns = {"text": "body", "label": "code"}
    data = (Dataset(id=id, declared_size=2000, path=at, columns=columns | {"user": who}) for id, at, who in named)
    return make_policy(population={"unit": "user"}, dataset=tuple(data), **changes)


def reserve(ledger: SiteLedger, proposal: Proposal, round: int = 1, request: str = "") -> Reservation:
    """Charge a round."""
    reservation = ledger.reserve(proposal, round=round, request=request or f"digest {proposal.run} {round}")
    assert isinstance(reservation, Reservation)
    return reservation


def train(ledger: SiteLedger, proposal: Proposal, *rounds: int, reply: bytes = b"reply") -> None:
    """Charge rounds one after the other, and commit a reply to each."""
    for round in rounds:
        ledger.commit(reserve(ledger, proposal, round), reply)


def advance_head(ledger: SiteLedger, refusals: int = 170) -> Head:
    """Return the ledger's head as it would be after this many further events without cost."""
    for number in range(refusals):
        ledger.record_refusal(Refused(Reason.TASKS, requested=str(number)), run="x", round=1, request=f"q{number}")
    return ledger.head()


OPENED = [(Kind.NOTE, "opened"), (Kind.NOTE, "policy")]


def list_kinds(path: Path) -> list[tuple[Kind, str]]:
    """List a ledger's events in a short form."""
    return [(event.kind, event.detail.get("what", "")) for event in verify(path).events]


def tamper(path: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    """Run SQL on a ledger file as somebody with write access could: drop the triggers, and restore them afterwards."""
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.executescript("PRAGMA synchronous = OFF; PRAGMA journal_mode = MEMORY")
        for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            file.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            file.execute(statement, values)
        for trigger in (sql for sql in store.SCHEMA if "TRIGGER" in sql):
            file.execute(trigger)
        file.commit()


def draw_json() -> st.SearchStrategy[Any]:
    """Draw any small value, including numbers that a float cannot represent."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )


def read_refusal_reason(work: Callable[..., object], *arguments: object, **rest: object) -> Reason:
    """Return the reason for which a call is refused."""
    with pytest.raises(Refused) as caught:
        work(*arguments, **rest)
    return caught.value.reason
