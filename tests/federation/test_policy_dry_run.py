"""Predicted answers of site policies, compared with the decisions of real ledgers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.federation import policy_dry_run
from fedtune.federation.policy_dry_run import DryRun
from fedtune.privacy import filter
from fedtune.privacy.accountant import calibrate_noise, epsilon_pld
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Refused
from fedtune.privacy.site_policy import Policy
from fedtune.spec import ConfigError

from ..conftest import make_site_policy, read_files, run_proposal

SIZES = {"a": 100}
Check = Callable[..., DryRun]


@pytest.fixture
def check(tmp_path: Path) -> Check:

    def run(policy: Policy, sizes: dict[str, int] = SIZES, *, most: bool = False, **changes: Any) -> DryRun:
        write_policy(policy, tmp_path / "site.toml")
        proposal = run_proposal(**changes)
        return policy_dry_run.dry_run(tmp_path / "site.toml", proposal, declared_sizes=sizes, find_most_epsilon=most)

    return run


@pytest.fixture
def open_ledger(tmp_path: Path) -> Callable[[Policy], SiteLedger]:
    return lambda policy: SiteLedger(
        tmp_path / policy.ledger,
        policy,
        SigningKey.load_or_create(tmp_path / policy.site_key),
        create=True,
    )


def test_run_within_the_policy_passes_the_dry_run(check: Check, tmp_path: Path) -> None:
    result = check(make_site_policy())
    assert result.allowed
    assert (result.site, result.ledger, result.committed_epsilon, result.note) == ("a", "new", 0.0, "")
    assert 0 < result.epsilon_after <= result.max_epsilon == 5.0
    assert (result.max_rounds, result.min_noise) == (3, 4.0)
    assert not (tmp_path / "ledger.db").exists(), "a dry run must not create a ledger"
    assert not (tmp_path / "site_key.pem").exists(), "a dry run must not create a key"
    assert check(make_site_policy(), {"b": 100}).note == "the run does not name site a"
    (rule,) = (bad := check(make_site_policy(), {"a": 90}, most=True)).violations
    assert (rule.reason, rule.requested, rule.allowed) == ("declared_size", "90", "100")
    assert (bad.allowed, bad.max_rounds, bad.min_noise, bad.max_accepted_epsilon) == (False, 0, None, None)


def test_every_broken_rule_is_reported(check: Check) -> None:
    result = check(make_site_policy(), rank=9, sampling_rate=0.5, lead="0" * 64)
    assert [(rule.reason, rule.requested, rule.allowed) for rule in result.violations[1:]] == [
        ("max_rank", "9", "at most 4"),
        ("max_sampling_rate", "0.5", "at most 0.2"),
    ]
    assert result.violations[0].reason == "leads"
    assert (result.max_rounds, result.min_noise) == (0, None)
    result = check(make_site_policy(), num_rounds=9)
    assert [rule.reason for rule in result.violations] == ["max_rounds"]
    assert result.max_rounds == 3, "four including the spare round"
    assert result.min_noise is None


def test_rank_above_the_policy_is_lowered_if_ranks_differ_by_site(check: Check) -> None:
    lowered, accepted = (check(make_site_policy(), rank=9, ranks={"a": rank}) for rank in (9, 4))
    assert (lowered.allowed, lowered.note) == (True, "the run would lower this site's rank to 4")
    assert (accepted.allowed, accepted.note) == (True, "")
    assert [rule.reason for rule in check(make_site_policy(), rank=9, ranks={"b": 4}).violations] == ["max_rank"]


def compute_total_epsilon(proposal: Proposal) -> float:
    return epsilon_pld([proposal.plan.event(rounds=proposal.plan.max_rounds)], proposal.plan.delta)


def test_dry_run_suggests_fewer_rounds_or_more_noise(check: Check) -> None:
    cap = 0.9 * compute_total_epsilon(run_proposal())
    result = check(make_site_policy(budget={"max_epsilon_per_run": cap}))
    assert [rule.reason for rule in result.violations] == ["max_epsilon_per_run"]
    assert 0 < result.max_rounds < 3
    for changes in ({"num_rounds": result.max_rounds}, {"noise_multiplier": result.min_noise}):
        assert compute_total_epsilon(run_proposal(**changes)) <= cap
    assert compute_total_epsilon(run_proposal(num_rounds=result.max_rounds + 1)) > cap


LOW_FLOOR = {"limits": {"min_noise_multiplier": 0.5}}
NO_CAP = {"max_epsilon": float("inf")}


@pytest.mark.parametrize(
    ("policy", "limit"),
    [
        (LOW_FLOOR | {"budget": NO_CAP | {"max_epsilon_per_run": 2.0}}, ("max_epsilon_per_run", "at most 2")),
        (LOW_FLOOR, ("max_epsilon", "at most 5, of which 0.0000 is spent or reserved")),
        ({"limits": {"min_noise_multiplier": 1.5}, "budget": NO_CAP}, ("min_noise_multiplier", "at least 1.5")),
    ],
    ids=["cap per run", "lifetime cap", "minimum noise"],
)
@pytest.mark.parametrize("planned_noise", [4.0, 0.6], ids=["accepted as planned", "refused as planned"])
def test_reported_largest_epsilon_is_the_limit_of_acceptance(
    policy: dict[str, Any], limit: tuple[str, str], planned_noise: float, check: Check
) -> None:
    site = make_site_policy(**policy)
    result = check(site, noise_multiplier=planned_noise, most=True)
    assert (result.limit.reason, result.limit.allowed) == limit
    assert result.max_accepted_epsilon == 2.0 or limit[0] != "max_epsilon_per_run", "it must be the cap itself"
    plan = run_proposal().plan
    for epsilon, accepted in ((result.max_accepted_epsilon, True), (1.01 * result.max_accepted_epsilon, False)):
        steps = plan.local_steps * plan.max_rounds
        noise = calibrate_noise(epsilon=epsilon, delta=plan.delta, sampling_rate=plan.sampling_rate, steps=steps)
        again = check(site, noise_multiplier=noise)
        assert (again.allowed, [rule.reason for rule in again.violations]) == (accepted, [] if accepted else [limit[0]])


def test_largest_epsilon_is_zero_if_delta_covers_the_loss(check: Check) -> None:
    site = make_site_policy(limits={"min_noise_multiplier": 1.5}, budget=NO_CAP)
    result = check(site, sampling_rate=1e-6, most=True)
    assert result.max_accepted_epsilon == 0
    assert result.limit is not None
    assert result.limit.reason == "min_noise_multiplier"


def test_largest_epsilon_is_unlimited_without_a_cap(check: Check) -> None:
    result = check(make_site_policy(limits={"min_noise_multiplier": 0.0}, budget=NO_CAP), most=True)
    assert (result.max_accepted_epsilon, result.limit) == (100.0, None)
    refused = check(make_site_policy(), rank=9, most=True)
    assert (refused.max_accepted_epsilon, refused.limit) == (None, None)
    assert policy_dry_run.find_strictest_dry_run([result, refused]) is refused
    assert check(make_site_policy()).max_accepted_epsilon is None, "it is computed only on request"


def test_dry_run_predicts_the_decision_of_the_ledger(check: Check, open_ledger: Any) -> None:
    unspent = check(make_site_policy())
    policy = make_site_policy(budget={"max_epsilon": 1.3 * unspent.epsilon_after})
    ledger = open_ledger(policy)
    result = check(policy, run="run-0")
    remaining = [result.remaining_runs]
    while result.allowed:
        ledger.reserve(run_proposal(run=f"run-{len(remaining)}"), round=1, request=f"{len(remaining):064x}")
        result = check(policy, run=f"run-{len(remaining) + 1}")
        assert result.ledger == "read"
        remaining.append(result.remaining_runs)
    assert remaining == list(range(len(remaining) - 1, -1, -1)), "each run must use one of the remaining runs"
    assert len(remaining) > 1
    with pytest.raises(Refused) as error:
        ledger.reserve(run_proposal(run="last"), round=1, request="f" * 64)
    refusal = error.value
    assert [(rule.reason, rule.requested, rule.allowed) for rule in result.violations] == [
        (refusal.reason.value, refusal.requested, refusal.allowed)
    ]


def test_nearly_spent_budget_allows_only_a_smaller_plan(check: Check, open_ledger: Any) -> None:
    plan = run_proposal().plan
    cap = filter.find_smallest_cap(plan.event(rounds=plan.max_rounds), delta=plan.delta)[0]
    policy = make_site_policy(budget={"max_epsilon": 1.001 * cap})
    open_ledger(policy).reserve(run_proposal(run="earlier", num_rounds=1, spare_rounds=0), round=1, request="0" * 64)
    result = check(policy, run="later")
    assert [rule.reason for rule in result.violations] == ["max_epsilon"]
    assert result.committed_epsilon > 0
    offer = open_ledger(policy).make_offer(run_proposal(run="later"))
    assert (result.max_rounds, result.min_noise) == (offer.max_rounds, offer.min_noise)
    assert 0 < result.max_rounds < 3


@pytest.mark.parametrize(
    ("changes", "note"),
    [({"site": "b"}, "created for site = a"), ({"budget": {"delta": 1e-6}}, "created for budget.delta = 1e-05")],
)
def test_ledger_with_a_mismatched_policy_is_reported_as_in_doubt(
    changes: dict[str, Any], note: str, check: Check, open_ledger: Any, tmp_path: Path
) -> None:
    ledger = open_ledger(make_site_policy())
    before = read_files(tmp_path)
    assert check(make_site_policy()).allowed
    policy_file = {"site.toml": (tmp_path / "site.toml").read_bytes()}
    assert read_files(tmp_path) == before | policy_file, "a dry run must change nothing"
    result = check(make_site_policy(**changes), delta=1e-5)
    assert result.ledger == "in doubt"
    assert not result.allowed
    assert note in result.note
    ledger.freeze("asked to")
    result = check(make_site_policy())
    assert [rule.reason for rule in result.violations] == ["frozen"]
    assert result.max_rounds == 0


def test_any_number_of_runs_fits_without_a_cap(check: Check) -> None:
    result = check(make_site_policy(budget={"max_epsilon": float("inf")}))
    assert (result.allowed, result.remaining_runs) == (True, None)
    result = check(make_site_policy(), noise_multiplier=0.0)
    assert [rule.reason for rule in result.violations] == ["min_noise_multiplier", "max_epsilon"]
    assert result.remaining_runs == 0
    assert result.min_noise == pytest.approx(4.0, rel=1e-3)


def test_missing_policy_file_raises_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a readable file"):
        policy_dry_run.dry_run(tmp_path / "missing.toml", run_proposal(), declared_sizes=SIZES)
