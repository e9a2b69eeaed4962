"""Rules of a site's policy: each violated rule is reported with the requested and the allowed value."""

import json
import math
import tomllib
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.privacy.accountant import epsilon_pld
from fedtune.privacy.cohorts import compute_period_number
from fedtune.privacy.distributed_noise import DistributedNoise
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.site_policy import Dataset, Policy
from fedtune.privacy.trust import Trust
from fedtune.spec import ConfigError

from .builders import make_key, make_policy, make_proposal, make_user_policy, read_refusal_reason

RULES = tomllib.loads(Path(__file__).with_name("rules.toml").read_text())
"""Proposals that break a single rule of the shared policy, by rule."""


def list_broken_rules(policy: Policy, proposal: Any) -> list[tuple[Reason, str | None, str | None]]:
    return [(refused.reason, refused.requested, refused.allowed) for refused in policy.find_broken_rules(proposal)]


def test_proposal_within_all_rules_passes() -> None:
    for proposal in (
        make_proposal(),
        make_proposal(dataset="letters", target_modules=("v_proj", "q_proj"), rank=8, train_head=False),
        make_proposal(plan={"num_rounds": 20, "local_steps": 10, "max_grad_norm": 1.0, "sampling_rate": 0.5}),
        make_proposal(plan={"noise_multiplier": 0.6}),
        make_proposal(plan={"max_grad_norm": 0.001}),
    ):
        make_policy().check(proposal)
        assert make_policy().find_broken_rules(proposal) == []


@pytest.mark.parametrize(("rule", "case"), [(rule, case) for rule, cases in RULES.items() for case in cases])
def test_broken_rule_is_reported_alone(rule: str, case: Any) -> None:
    assert list_broken_rules(make_policy(), make_proposal(**case["changes"])) == [
        (Reason(rule), case["requested"], case["allowed"])
    ]
    assert read_refusal_reason(make_policy().check, make_proposal(**case["changes"])) is Reason(rule)


@pytest.mark.parametrize(
    ("site", "change"),
    [
        ({"allow": {"seeded_noise": True}}, {"seeded_noise": True}),
        ({"allow": {"train_head": False}}, {"train_head": False}),
        ({"allow": {"inexact_gradients": True}}, {}),  # a property of the machine, not of the proposal
        ({"releases": {"metrics": "noised"}}, {"plan": {"metrics_noise_multiplier": 20.0}}),
        ({"releases": {"metrics": "noised"}}, {}),
    ],
)
def test_policy_switch_permits_its_own_rule(site: Any, change: Any) -> None:
    assert list_broken_rules(make_policy(**site), make_proposal(**change)) == []


def test_released_scores_also_require_the_minimum_noise() -> None:
    proposal = make_proposal(plan={"metrics_noise_multiplier": 0.5})
    noised = make_policy(releases={"metrics": "noised"})
    assert list_broken_rules(noised, proposal) == [(Reason.MIN_NOISE_MULTIPLIER, "0.5", "at least 0.6")]


BY_USER = ("notes", "notes.csv", "patient")


def test_proposal_unit_must_match_the_population() -> None:
    # Neither unit is converted: no factor turns a record's guarantee into a person's, and nobody requested the reverse.
    users = make_proposal(plan={"unit": "user", "records_per_user": 8})
    assert list_broken_rules(make_user_policy(BY_USER), users) == []
    assert list_broken_rules(make_user_policy(BY_USER), make_proposal()) == [(Reason.UNIT, "record", "user")]
    assert list_broken_rules(make_policy(), users) == [(Reason.UNIT, "user", "record")]


def test_site_limits_the_records_per_user() -> None:
    strict = make_user_policy(BY_USER, limits={"max_records_per_user": 8})
    for limit, expected in ((8, []), (9, [(Reason.MAX_RECORDS_PER_USER, "9", "at most 8")])):
        assert list_broken_rules(strict, make_proposal(plan={"unit": "user", "records_per_user": limit})) == expected


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0, 16.0, 1e4])
def test_adapter_bound_keeps_the_scaled_product_independent_of_scale(scale: float) -> None:
    bound = make_policy(limits={"max_adapter_value": 50.0}).compute_adapter_bound(scale)
    assert bound <= 50.0, "the bound must not exceed the site's limit"
    # The model sees scale * B A: its maximum is the same for every scale, and no smaller than necessary.
    assert scale * bound**2 == pytest.approx(min(1.0, scale) * 50.0**2)


def test_policy_may_list_the_algorithms_that_it_accepts() -> None:
    scaffold, chosen = make_proposal(algorithm="scaffold"), make_policy(allow={"algorithms": ("fedavg", "fedprox")})
    assert list_broken_rules(make_policy(), scaffold) == [], "no algorithm changes the guarantee"
    assert list_broken_rules(chosen, scaffold) == [(Reason.ALGORITHMS, "scaffold", "fedavg, fedprox")]
    assert list_broken_rules(chosen, make_proposal()) == []
    assert "algorithms" not in make_policy().to_json()["allow"], "policies without the key must keep their digests"
    assert scaffold.digest() != make_proposal().digest()
    assert "algorithm" not in make_proposal().to_json()


def test_every_proposal_rule_has_a_test_case() -> None:
    covered = set(map(Reason, RULES))
    covered |= {Reason.TRAIN_HEAD, Reason.UPDATES, Reason.MAX_RECORDS_PER_USER, Reason.COHORTS, Reason.ALGORITHMS}
    in_the_ledger = {Reason.MAX_EPSILON, Reason.MAX_EPSILON_PER_PERIOD, Reason.MAX_EPSILON_PER_RUN}
    of_the_adapter = {Reason.MAX_ADAPTER_VALUE, Reason.DECLARED_SIZE}  # not in the proposal, but in each request
    rules = [reason for reason in Reason if list(Reason).index(reason) < list(Reason).index(Reason.FROZEN)]
    of_secure_aggregation = {reason for _, _, reason in SUMS} | {Reason.MAX_EPSILON_IF_ALL_COLLUDE}
    assert set(rules) == covered | in_the_ledger | of_the_adapter | of_secure_aggregation


def test_cap_per_run_includes_spare_rounds() -> None:
    full_run = {"num_rounds": 3, "spare_rounds": 2}
    epsilon = epsilon_pld([make_proposal(plan=full_run).plan.event(rounds=5)], 1e-5)
    make_policy(budget={"max_epsilon_per_run": epsilon + 0.01}).check(make_proposal(plan=full_run))
    tight = make_policy(budget={"max_epsilon_per_run": epsilon - 0.01})
    ((reason, requested, allowed),) = list_broken_rules(tight, make_proposal(plan=full_run))
    assert (reason, allowed) == (Reason.MAX_EPSILON_PER_RUN, f"at most {epsilon - 0.01:g}")
    assert float(requested or 0) == pytest.approx(epsilon, abs=2e-3)
    tight.check(make_proposal(plan={"num_rounds": 3, "spare_rounds": 1}))


def test_plan_beyond_other_limits_is_not_accounted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its epsilon could take minutes to compute; a requester must not be able to make a site do so.
    monkeypatch.setattr("fedtune.privacy.accountant.epsilon_pld", Mock(side_effect=ZeroDivisionError))
    proposal = make_proposal(plan={"noise_multiplier": 0.01})
    capped = make_policy(budget={"max_epsilon_per_run": 1.2345})  # requested only here, because answers are cached
    assert [reason for reason, _, _ in list_broken_rules(capped, proposal)] == [Reason.MIN_NOISE_MULTIPLIER]
    with pytest.raises(ZeroDivisionError):
        capped.check(make_proposal())


def test_budget_periods_start_on_calendar_boundaries() -> None:
    for month, quarter in ((1, 0), (3, 0), (4, 1), (9, 2), (12, 3)):
        moment = datetime(2030, month, 28, 23, 59, tzinfo=UTC)
        numbers = [compute_period_number(moment, period) for period in ("month", "quarter", "year")]
        assert numbers == [2030 * 12 + month - 1, 2030 * 4 + quarter, 2030]


def test_policy_requires_distinct_data_sets_and_allows_a_fixed_clip_norm() -> None:
    duplicates = (Dataset(id="d", declared_size=1), Dataset(id="d", declared_size=2))
    with pytest.raises(ConfigError, match=r"^dataset = .*must not repeat an id"):
        make_policy(dataset=duplicates)
    exactly = make_policy(limits={"min_grad_norm": 0.2, "max_grad_norm": 0.2})
    assert list_broken_rules(exactly, make_proposal(plan={"max_grad_norm": 0.2})) == []


def test_declared_size_must_reach_min_units() -> None:
    with pytest.raises(ConfigError, match=r"^min_units = 81: must be at most declared_size = 80: "):
        Dataset(id="d", declared_size=80, min_units=81)
    with pytest.raises(ConfigError, match=r"^min_units = -1: must be a finite number of at least 0"):
        Dataset(id="d", declared_size=80, min_units=-1)
    minimum = make_policy(dataset=(Dataset(id="d", declared_size=80, min_units=80),))
    assert minimum.to_json()["dataset"][0]["min_units"] == 80
    assert "min_units" not in make_policy().to_json()["dataset"][0], "policies without the key must keep their digests"


def test_delta_must_be_below_one_over_the_population_size() -> None:
    two = (Dataset(id="d", declared_size=60_000), Dataset(id="e", declared_size=40_000))
    message = r"^budget\.delta = 1e-05: must be below 1 / 100,000 = 1e-05, for the declared sizes of all data sets"
    with pytest.raises(ConfigError, match=message):
        make_policy(dataset=two)
    make_policy(dataset=(two[0], replace(two[1], declared_size=39_999)))
    make_policy(dataset=two, budget={"max_epsilon": math.inf})  # promises no bound


def test_infinite_cap_is_null_in_json() -> None:
    unlimited = make_policy(budget={"max_epsilon": math.inf})
    assert unlimited.to_json()["budget"]["max_epsilon"] is None
    assert make_policy().to_json()["budget"]["max_epsilon"] == 11.0
    json.dumps(unlimited.to_json(), allow_nan=False)


def test_policy_digest_covers_every_key() -> None:
    changes: dict[str, Any] = {"site": "b", "simulated": True, "approval": "manual", "final_adapter": "decline"}
    changes |= {"ledger": "other.db", "site_key": "other.pem", "anchor": "anchor.json"}
    changes |= {"population": {"name": "staff"}, "budget": {"max_epsilon": 9.0}, "limits": {"max_rounds": 19}}
    changes |= {"releases": {"reply_after_s": 1.0}, "asserted": {"no_person_at_another_site": False}}
    changes |= {"allow": {"leads": (make_key(3).public,)}}
    changes |= {"dataset": (Dataset(id="notes", declared_size=2000, path="elsewhere.csv"),)}
    changes |= {"trust": Trust(secure=True)}
    assert set(changes) == {field.name for field in fields(Policy)} - {"socket", "key_command"}
    of_this_machine = make_policy(socket="site.sock", key_command=("/usr/bin/pass", "show", "site_key"))
    assert of_this_machine == make_policy(), "transport settings and the key's location must not change the policy"
    assert of_this_machine.to_json() == make_policy().to_json()
    digests = {make_policy(**{key: value}).digest() for key, value in changes.items()}
    assert len(digests | {make_policy().digest()}) == len(changes) + 1


SHARED = DistributedNoise(num_sites=4, threshold=3, colluders=1, noise_multiplier=4.0, cell_bits=1, bound=1024)
SUMS: tuple[tuple[dict[str, Any], dict[str, Any], Reason], ...] = (
    ({"secure": False}, {}, Reason.SECURE_AGGREGATION),
    ({"min_sites": 5}, {"num_sites": 4}, Reason.MIN_SITES),
    ({"min_threshold": 4}, {"threshold": 3}, Reason.MIN_THRESHOLD),
    ({"colluders": 2}, {"colluders": 1}, Reason.COLLUDERS),
)


def propose_secure(**changes: Any) -> Proposal:
    return make_proposal(plan={"local_steps": 1, "noise_multiplier": 4.0, "shared": replace(SHARED, **changes)})


@pytest.mark.parametrize(("trust", "shared", "reason"), SUMS)
def test_secure_aggregation_must_meet_the_trust_limits_of_the_site(trust: Any, shared: Any, reason: Reason) -> None:
    allowed = {"secure": True, "min_sites": 4, "min_threshold": 3, "colluders": 1}
    make_policy(trust=Trust(**allowed)).check(propose_secure(**shared))
    assert [
        numbers for numbers, _, _ in list_broken_rules(make_policy(trust=Trust(**allowed | trust)), propose_secure())
    ] == [reason]


def test_epsilon_if_all_others_collude_has_a_separate_cap() -> None:
    proposal = propose_secure()
    own_epsilon = epsilon_pld([proposal.plan.with_own_noise_only.full_event], proposal.plan.delta)
    assert own_epsilon > epsilon_pld([proposal.plan.full_event], proposal.plan.delta)
    trust = {"secure": True, "colluders": 1}
    make_policy(trust=Trust(**trust, max_epsilon_if_all_collude=own_epsilon + 0.01)).check(proposal)
    tight = make_policy(trust=Trust(**trust, max_epsilon_if_all_collude=own_epsilon - 0.01))
    ((reason, _, _),) = list_broken_rules(tight, proposal)
    assert reason is Reason.MAX_EPSILON_IF_ALL_COLLUDE


def test_accounted_noise_uses_the_minimum_number_of_honest_sites() -> None:
    plan = propose_secure().plan
    assert plan.accounted_noise == pytest.approx(4.0 * math.sqrt(3 - 1))
    assert plan.with_noise(1.0).accounted_noise == pytest.approx(math.sqrt(3 - 1))
    assert plan.with_own_noise_only.accounted_noise == 4.0
