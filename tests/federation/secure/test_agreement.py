"""Terms, site limits and announced keys of a secure aggregation session."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.federation.secure import agreement
from fedtune.federation.secure.agreement import (
    Demand,
    KeyAgreement,
    RejectionReason,
    Terms,
    compute_modulus_bits,
    require_terms,
)
from fedtune.federation.secure.masks import MaskKey
from fedtune.federation.secure.messages import read_announcement
from fedtune.federation.secure.party import Party
from fedtune.federation.secure.summation import build_session
from fedtune.privacy.threshold import min_threshold
from fedtune.spec import ConfigError

from .parties import ANY, Federation, change_message, expect_rejection, make_identity, make_terms


@given(st.integers(2, 20), st.data())
def test_least_threshold_rules_out_two_confirmed_survivor_sets(num_sites: int, data: st.DataObject) -> None:
    colluders = data.draw(st.integers(0, num_sites - 1))
    minimum = min_threshold(num_sites, colluders=colluders)
    honest = num_sites - colluders
    for threshold in range(minimum, num_sites + 1):  # of a set's t confirmations, all but c are from honest sites
        assert 2 * (threshold - colluders) > honest
    assert 2 * (minimum - 1 - colluders) <= honest or minimum - 1 < colluders


def test_least_threshold_requires_an_honest_site() -> None:
    with pytest.raises(ConfigError, match="fewer than the 3 sites"):
        min_threshold(3, colluders=3)


@given(st.integers(2, 20), st.integers(1, 2**50))
def test_modulus_uses_the_fewest_bits_that_hold_every_sum(num_sites: int, largest: int) -> None:
    bits = compute_modulus_bits(num_sites, largest)
    assert 2 ** (bits - 2) <= num_sites * largest < 2 ** (bits - 1)
    assert make_terms(num_sites, num_sites, largest=largest).bits == bits
    with pytest.raises(ConfigError, match="must be from 1 to 64"):
        make_terms(num_sites, num_sites, largest=2**62)


@pytest.mark.parametrize(
    ("key", "members", "threshold"),
    [
        ("site", {"a": make_identity("a").public, "b c": make_identity("b").public}, 2),
        ("members.b", {"a": make_identity("a").public, "b": "0" * 64}, 2),
        ("members", {"a": make_identity("a").public}, 1),
        ("members", dict.fromkeys("abc", make_identity("a").public), 2),
        ("members", {f"s{n}": make_identity(f"s{n}").public for n in range(21)}, 11),
    ],
)
def test_invalid_members_and_thresholds_are_refused(key: str, members: dict[str, str], threshold: int) -> None:
    with pytest.raises(ConfigError) as error:
        replace(make_terms(3, 2), members=members, threshold=threshold)
    assert error.value.key == key


def make_party(terms: Terms, *, demand: Demand = ANY, roster: dict[str, str] | None = None, site: str = "a") -> Party:
    pinned = dict(terms.members) if roster is None else roster
    return Party(site, identity=make_identity(site), terms=terms, roster=pinned, demand=demand, keep=lambda _: None)


@pytest.mark.parametrize(
    ("num_sites", "threshold", "demand", "reason"),
    [
        *((2, 2, require_terms, RejectionReason.TOO_FEW_SITES), (2, 2, ANY, None), (3, 3, require_terms, None)),
        *((3, 2, require_terms, RejectionReason.THRESHOLD_TOO_LOW), (3, 2, ANY, None)),
        (3, 2, partial(ANY, colluders=1), RejectionReason.THRESHOLD_TOO_LOW),
        *((3, 3, partial(ANY, colluders=1), None), (3, 3, partial(ANY, colluders=3), RejectionReason.TOO_FEW_SITES)),
        (5, 3, partial(ANY, colluders=1), RejectionReason.THRESHOLD_TOO_LOW),
        *((5, 4, partial(ANY, colluders=1), None), (5, 4, partial(ANY, min_sites=6), RejectionReason.TOO_FEW_SITES)),
        (5, 4, partial(ANY, min_threshold=5), RejectionReason.THRESHOLD_TOO_LOW),
    ],
)
def test_site_joins_only_terms_within_its_limits(num_sites: int, threshold: int, demand: Demand, reason: Any) -> None:
    if reason is None:
        make_party(make_terms(num_sites, threshold), demand=demand)
        return
    with expect_rejection(reason):
        make_party(make_terms(num_sites, threshold), demand=demand)


def test_members_must_match_the_roster_of_the_joining_site() -> None:
    terms = make_terms(3, 3)
    with expect_rejection(RejectionReason.NOT_A_MEMBER):
        make_party(terms, site="d")
    others = {**terms.members, "d": make_identity("d").public}
    make_party(terms, roster=others)
    for roster in ({**others, "b": make_identity("x").public}, {site: others[site] for site in "acd"}, {}):
        with expect_rejection(RejectionReason.ROSTER_DIFFERS):
            make_party(terms, roster=roster)


def announce_all(terms: Terms) -> dict[str, bytes]:
    return {site: make_party(terms, site=site).announce() for site in terms.sites}


def test_equal_announced_keys_define_the_same_session() -> None:
    terms = make_terms(3, 3, run=f"x-seed=1,lora.rank=4-{'0' * 32}")  # a run of a sweep
    first, second = announce_all(terms), announce_all(terms)
    session = build_session(terms, first)
    assert session == build_session(terms, dict(reversed(first.items())))
    assert session.digest != build_session(terms, {**first, "c": second["c"]}).digest


@pytest.mark.parametrize(
    "changes",
    [{"run": "s"}, {"proposal": "1" * 64}, {"threshold": 2}, {"length": 5}, {"largest": 7}],
    ids=lambda change: next(iter(change)),
)
def test_announced_key_is_bound_to_run_proposal_terms_and_protocol(changes: dict[str, Any], monkeypatch: Any) -> None:
    terms = make_terms(3, 3)
    with expect_rejection(RejectionReason.WRONG_TERMS):
        build_session(terms, announce_all(replace(terms, **changes)))
    messages = announce_all(terms)
    monkeypatch.setattr(agreement, "WIRE_SCHEMA", 1)
    with expect_rejection(RejectionReason.WRONG_TERMS):
        build_session(terms, messages)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": MaskKey().public}, RejectionReason.WRONG_SIGNATURE),
        ({"key": "0" * 64}, RejectionReason.WRONG_KEY),
        ({"key": 1}, RejectionReason.MALFORMED),
        ({"terms": "1" * 64}, RejectionReason.WRONG_TERMS),
        ({"site": "a"}, RejectionReason.WRONG_SIGNATURE),
        ({"site": "z"}, RejectionReason.NOT_A_MEMBER),
        ({"signature": "0" * 128}, RejectionReason.WRONG_SIGNATURE),
        ({"signature": None}, RejectionReason.MALFORMED),
        ({"more": "x"}, RejectionReason.MALFORMED),
    ],
)
def test_tampered_announcement_is_rejected_and_attributed(change: dict[str, Any], reason: RejectionReason) -> None:
    messages = announce_all(terms := make_terms(3, 3))
    received = {**messages, "b": change_message(messages["b"], **change)}
    with expect_rejection(reason):
        make_party(terms).join(list(received.values()))
    with expect_rejection(reason) as error:
        build_session(terms, received)
    assert error.value.site == "b", "the lead must learn the site"


def test_announcement_is_bound_to_its_site_and_signature_purpose() -> None:
    messages = announce_all(terms := make_terms(3, 3))
    with expect_rejection(RejectionReason.WRONG_KEY) as error:
        build_session(terms, {**messages, "a": messages["b"], "b": messages["a"]})
    assert error.value.site == "a"
    message = read_announcement(messages["b"])
    for purpose in ("receipt", "secure aggregation survivors"):
        other = replace(message, signature=make_identity("b").sign(purpose, replace(message, signature="").to_bytes()))
        with expect_rejection(RejectionReason.WRONG_SIGNATURE):
            KeyAgreement.from_announcements(terms, [other])


def test_site_joins_once_with_exactly_one_key_per_member() -> None:
    terms = make_terms(3, 3)
    party, messages, later = make_party(terms), announce_all(terms), announce_all(terms)
    current = {**messages, "a": party.announce()}
    cases = [
        (list(messages.values()), RejectionReason.WRONG_KEY),  # the key of its previous process
        ([current["a"], current["b"]], RejectionReason.KEY_MISSING),
        ([current["a"], current["b"], current["b"]], RejectionReason.REPEATED),
        ([current["a"], current["b"], current["c"], later["c"]], RejectionReason.REPEATED),
    ]
    for keys, reason in cases:
        with expect_rejection(reason):
            party.join(keys)
    assert party.join(list(current.values())) == party.join(list(current.values()))
    with expect_rejection(RejectionReason.SESSION_DIFFERS):
        party.join([current["a"], current["b"], later["c"]])


def test_site_that_has_not_joined_rejects_every_request() -> None:
    federation = Federation(make_terms(3, 2))
    summation = federation.start_release(1, "abc")
    party = federation.restart("a")
    for call in (
        lambda: party.upload(2, federation.make_vector("a")),
        lambda: party.confirm(summation.build_confirm_request()),
    ):
        with expect_rejection(RejectionReason.SESSION_DIFFERS):
            call()
