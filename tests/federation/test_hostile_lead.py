"""Requests beyond a site's policy, each refused with the violated rule and no other effect."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedtune.federation.protocol import Reply
from fedtune.model.adapter import Adapter
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.release import Reason, Receipt, Update

from ..privacy.builders import stranger_key
from .conftest import make_receipt, read_reason

# The request, the rule that it breaks, and the requested and allowed values in the refusal;
# tests/privacy/test_site_policy.py covers all rules of a policy.
_EXCESSIVE: list[tuple[dict[str, Any], Reason, str | None, str | None]] = [
    ({"noise_multiplier": 3.9999}, Reason.MIN_NOISE_MULTIPLIER, "3.9999", "at least 4"),
    ({"spare_rounds": 2}, Reason.MAX_ROUNDS, "5", "at most 4"),
    ({"dataset": "letters"}, Reason.DATASET, "letters", "patients"),
    ({"seeded_noise": True}, Reason.SEEDED_NOISE, "yes", "no"),
    # Within the policy, but not the plan that the site derives from the run's configuration.
    ({"noise_multiplier": 5.0}, Reason.PLAN_CHANGED, None, None),
    ({"num_sites": 99}, Reason.PLAN_CHANGED, None, None),
    ({"run": "another"}, Reason.WRONG_RUN, "another", "r"),
]


@contextmanager
def expect_only_refusal(site: Any, rule: Reason) -> Iterator[None]:
    """Check that the block appends one refusal to the ledger, and charges, reserves and trains nothing."""
    site.ledger()
    before, trained = site.events(), list(site.trained)
    yield
    after = site.events()
    assert after[: len(before)] == before
    (event,) = after[len(before) :]
    assert (event.kind, event.detail["reason"]) == (Kind.REFUSAL, rule.value)
    assert site.trained == trained


@pytest.mark.parametrize(
    ("changes", "rule", "requested", "allowed"), _EXCESSIVE, ids=[str(row[0]) for row in _EXCESSIVE]
)
@pytest.mark.parametrize("rounds_before", [0, 1], ids=["first request", "later request"])
def test_excessive_requests_are_refused_with_the_broken_rule(
    site: Any, changes: dict[str, Any], rule: Reason, requested: str | None, allowed: str | None, rounds_before: int
) -> None:
    for round in range(1, rounds_before + 1):
        site.ask(round)
    with expect_only_refusal(site, rule):
        reply = site.ask(rounds_before + 1, **changes)
    assert read_reason(reply) is rule
    if requested is not None:
        assert (reply.body.requested, reply.body.allowed) == (requested, allowed)
    # For a run in its ledger, the site can state the accepted plan without preparation.
    prepared_for = (Reason.WRONG_RUN,) if rounds_before else (Reason.PLAN_CHANGED, Reason.WRONG_RUN)
    assert len(site.prepared) == rounds_before + (rule in prepared_for)
    # A receipt covers the requested run; for an unknown run it states that nothing was charged.
    run = changes.get("run", "r")
    assert (reply.receipt.run, reply.receipt.charged_rounds) == (run, rounds_before if run == "r" else 0)
    assert reply.body.run == run
    assert site.ledger().sign_receipt("r").charged_rounds == rounds_before


@pytest.mark.parametrize(
    "fields", [{}, {"site": "b"}, {"expires": 1.0}, {"round": 99}, {"adapter_digest": "0" * 64}], ids=str
)
def test_unknown_lead_receives_only_a_refusal(site: Any, fields: dict[str, Any]) -> None:
    with expect_only_refusal(site, Reason.LEADS):
        reply = site.ask(1, key=stranger_key, lead=stranger_key.public, fields=fields, run="another", rank=64)
    assert read_reason(reply) is Reason.LEADS
    assert reply.receipt is None


def test_unsigned_request_is_refused_without_a_ledger_entry(site: Any) -> None:
    # Anybody can send such a message, so it must not be recorded in the ledger.
    site.ledger()
    before, signed = site.events(), site.request().sign_with(stranger_key)
    for request, rule in ((signed, Reason.WRONG_SIGNATURE), (replace(signed, text="{"), Reason.MALFORMED_REQUEST)):
        reply = site.send(request)
        assert read_reason(reply) is rule
        assert reply.receipt is None
    assert (reply.body.run, reply.body.round) == ("", 0), "an unsigned request must not set run and round"
    assert site.events() == before
    assert site.trained == []


_INVALID_TENSORS: dict[str, dict[str, list[Any]]] = {
    "nan": {"head": [1, 1, 1, np.nan]},
    "infinity": {"head": [np.inf] * 4},
    "a wrong shape": {"head": [[1, 1], [1, 1]]},
    "a longer tensor": {"head": [1] * 5},
    "a tensor more": {"zz": [1]},
}


@pytest.mark.parametrize("fault", [*_INVALID_TENSORS, "a tensor less"])
def test_adapter_of_another_shape_or_with_nan_is_refused(site: Any, adapter: Adapter, fault: str) -> None:
    replaced = {name: np.array(values, np.float32) for name, values in _INVALID_TENSORS.get(fault, {}).items()}
    altered = Adapter(dict(adapter.tensors) | replaced if replaced else {"head": adapter.tensors["head"]})
    rule = Reason.MAX_ADAPTER_VALUE if fault in ("nan", "infinity") else Reason.ADAPTER_SHAPE
    with expect_only_refusal(site, rule):
        assert read_reason(site.ask(adapter=altered)) is rule


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"site": "b"}, Reason.WRONG_SITE),
        ({"expires": 1.6e9}, Reason.REQUEST_EXPIRED),
        ({"adapter_digest": "00" * 32}, Reason.ADAPTER_DIFFERS),
    ],
    ids=["another site", "expired", "another adapter"],
)
def test_misaddressed_expired_or_mismatched_request_is_refused(site: Any, fields: dict[str, Any], rule: Reason) -> None:
    with expect_only_refusal(site, rule):
        assert read_reason(site.ask(fields=fields)) is rule
    assert site.prepared == ([] if rule is not Reason.ADAPTER_DIFFERS else ["r"])


def test_replayed_request_returns_the_stored_reply_until_the_next_round(site: Any) -> None:
    request = site.request().sign_with(site.lead)
    first = site.send(request)
    before = site.events()
    again = site.send(request)
    assert isinstance(first.body, Update)
    assert again.body.to_bytes() == first.body.to_bytes()
    assert site.events() == before, "a stored reply must be free"
    site.ask(2)
    with expect_only_refusal(site, Reason.REPLY_NO_LONGER_STORED):
        assert read_reason(site.send(request)) is Reason.REPLY_NO_LONGER_STORED
    assert site.trained == [(1, 1), (2, 1)]


def check_in_doubt(site: Any, before: tuple[Any, ...], receipt: Receipt, reply: Reply) -> None:
    """Check that a ledger without one of its receipts reports doubt and refuses all training."""
    assert read_reason(reply) is Reason.LEDGER_BEHIND_RECEIPT
    assert reply.body.requested == str(receipt.sequence)
    after = site.events()
    assert after[: len(before)] == before
    note, refusal = after[len(before) :]
    assert (note.kind, note.detail["what"]) == (Kind.NOTE, "in_doubt")
    assert (refusal.kind, refusal.detail["reason"]) == (Kind.REFUSAL, Reason.LEDGER_BEHIND_RECEIPT.value)
    trained = list(site.trained)
    for round in (3, 4):
        assert read_reason(site.ask(round)) is Reason.LEDGER_BEHIND_RECEIPT, "doubt must remain without the receipt"
    assert site.trained == trained


@pytest.mark.parametrize("backed_up", [0, 1])
def test_ledger_older_than_the_leads_receipt_stops_training(site: Any, backed_up: int) -> None:
    backup = site.path.parent / "backup"
    for round in (1, 2):
        if round == backed_up + 1:
            site.ledger()
            backup.write_bytes(site.path.read_bytes())
        reply = site.ask(round)
    backup.replace(site.path)
    before = site.events()
    receipt = reply.receipt
    check_in_doubt(site, before, receipt, site.ask(3, fields={"receipt": receipt}))
    assert site.trained == [(1, 1), (2, 1)]


def test_receipt_not_issued_by_the_ledger_is_refused(site: Any, tmp_path: Any) -> None:
    """Other forged receipts: tests/privacy/test_rollback.py."""
    forged = replace(site.ask().receipt, charged_rounds=0)
    for round, receipt in ((2, forged), (3, make_receipt("a"))):  # the same refusal is recorded once a day
        with expect_only_refusal(site, Reason.WRONG_SIGNATURE):
            assert read_reason(site.ask(round, fields={"receipt": receipt})) is Reason.WRONG_SIGNATURE
    # Signed by the site's own key, but for a new ledger: the same number of events, and another history.
    new_site = replace(site, folder=tmp_path / "new", propose=partial(site.propose), trained=[])
    new_site.folder.mkdir()
    (new_site.folder / site.policy.site_key).write_bytes((site.folder / site.policy.site_key).read_bytes())
    before, receipt = site.events(), new_site.ask().receipt
    check_in_doubt(site, before, receipt, site.ask(2, fields={"receipt": receipt}))
