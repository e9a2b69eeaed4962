"""A simulated site's files: a policy that allows exactly its run, and what of a later run still fits."""

import dataclasses
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import RunConfig
from fedtune.privacy.filter import cheapest, surcharge, total_divergence
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import Ledger
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.site_policy import Policy, Releases
from fedtune.sites.virtual_site import DEALT, VirtualSites, fitted, generated_policy
from fedtune.spec import ConfigError, RefusedError, RunError

from ..privacy.builders import reason_of

Configure = Callable[..., RunConfig]
NOISED = ("privacy.metrics=noised", "data.heldout_fraction=0.3")
MUCH_SCORED = (
    *NOISED,
    "privacy.metrics_noise_multiplier=1.5",
    "privacy.noise_multiplier=0.7",
    "privacy.sampling_rate=0.05",
    "privacy.epsilon=20",
)
"""The scores cost more than the training, so that another order than the training's would suit the whole."""


def policy_and_proposal(config: RunConfig) -> tuple[Policy, Proposal]:
    plan = config.plan()
    return generated_policy(config, plan, "site-1", lead="ab" * 32), config.proposal(lead="ab" * 32, plan=plan)


def planned(proposal: Proposal, **changes: Any) -> Proposal:
    """The same with other numbers in its plan."""
    return replace(proposal, plan=replace(proposal.plan, **changes))


@pytest.mark.parametrize(
    "overrides",
    [
        *((), NOISED, MUCH_SCORED, ("privacy=none",), ("federation.spare_rounds=2",), ("runtime.seeded_noise=true",)),
        *(("head.train=false",), ("privacy.unit=user", "+data.columns.user=label")),
    ],
    ids=str,
)
def test_a_generated_policy_allows_its_run_to_the_end(
    config: Configure, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    policy, proposal = policy_and_proposal(config(*overrides))
    policy.check(proposal)
    ledger = Ledger(tmp_path / "ledger.db", policy, SigningKey.load_or_make(tmp_path / "key.pem"))
    for round in range(1, proposal.plan.most_rounds + 1):
        ledger.reserve(proposal, round=round, request=f"{round}")
    assert reason_of(ledger.reserve, proposal, round=99, request="99") is Reason.PLAN_EXHAUSTED


# Each number of a plan a little beyond what was planned, and the rule that names it.
_BEYOND: dict[str, tuple[Callable[[Any], Any], Reason]] = {
    "unit": (lambda unit: "user", Reason.UNIT),
    "delta": (lambda delta: 2 * delta, Reason.DELTA),
    "sampling_rate": (lambda rate: rate + 1e-9, Reason.MAX_SAMPLING_RATE),
    "noise_multiplier": (lambda noise: noise - 1e-9, Reason.MIN_NOISE_MULTIPLIER),
    "max_grad_norm": (lambda norm: norm + 1e-9, Reason.MAX_GRAD_NORM),
    "local_steps": (lambda steps: steps + 1, Reason.MAX_LOCAL_STEPS),
    "num_rounds": (lambda rounds: rounds + 1, Reason.MAX_ROUNDS),
    "spare_rounds": (lambda rounds: rounds + 1, Reason.MAX_ROUNDS),
    "metrics_noise_multiplier": (lambda noise: 20.0, Reason.METRICS),
    "records_per_user": (lambda most: most + (most > 1), Reason.MAX_RECORDS_PER_USER),
    "shared": (lambda shared: shared, Reason.SECURE_SUMS),  # see test_secure_sums_are_bounded_by_what_a_site_trusts
    "cohorts": (lambda cohorts: cohorts, Reason.COHORTS),  # see tests/privacy/test_cohorts.py
    "runs": (lambda runs: runs, Reason.MAX_EPSILON),  # what a run is charged follows from its noise
}


BY_USER = ("privacy.unit=user", "+data.columns.user=label")


@pytest.mark.parametrize("overrides", [(), BY_USER], ids=["record", "user"])
def test_every_number_of_a_plan_is_bounded(config: Configure, overrides: tuple[str, ...]) -> None:
    policy, proposal = policy_and_proposal(config(*overrides))
    assert set(_BEYOND) == {field.name for field in dataclasses.fields(proposal.plan)}
    for name, (change, rule) in _BEYOND.items():
        value = getattr(proposal.plan, name)
        if change(value) == value:
            continue
        assert reason_of(policy.check, planned(proposal, **{name: change(value)})) is rule, name


def test_a_simulated_site_answers_at_once(config: Configure) -> None:
    policy, _ = policy_and_proposal(config())
    assert policy.releases.reply_after_s == 0
    assert Releases().reply_after_s == 600, "a real site that leaves the key out does not"


@pytest.mark.parametrize(("clip", "floor"), [(1.0, 1e-3), (1e-4, 1e-4)])
def test_the_floor_of_the_clip_norm_lets_the_run_through(config: Configure, clip: float, floor: float) -> None:
    policy, proposal = policy_and_proposal(config(f"privacy.max_grad_norm={clip}"))
    assert policy.limits.min_grad_norm == floor
    policy.check(proposal)
    assert reason_of(policy.check, planned(proposal, max_grad_norm=0.9 * floor)) is Reason.MIN_GRAD_NORM


def test_less_than_was_planned_stays_allowed(config: Configure) -> None:
    policy, proposal = policy_and_proposal(config())
    less = {"sampling_rate": 0.1, "noise_multiplier": 9.0, "max_grad_norm": 0.5, "local_steps": 1, "num_rounds": 1}
    policy.check(planned(proposal, **less))


def test_with_noised_metrics_their_noise_is_bounded_too(config: Configure) -> None:
    policy, proposal = policy_and_proposal(config(*NOISED, "privacy.metrics_noise_multiplier=2.5"))
    assert policy.limits.min_noise_multiplier == 2.5
    assert policy.releases.metrics == "noised"
    assert reason_of(policy.check, planned(proposal, metrics_noise_multiplier=2.4)) is Reason.MIN_NOISE_MULTIPLIER


def test_what_is_trained_and_for_whom_is_bounded(config: Configure) -> None:
    policy, proposal = policy_and_proposal(config("head.train=false"))
    for key, value, rule in (
        ("lead", "00" * 32, Reason.LEADS),
        ("dataset", "letters", Reason.DATASET),
        ("task", "causal_lm", Reason.TASKS),
        ("base_model", "cd" * 32, Reason.BASE_MODELS),
        ("target_modules", ("all-linear", "embeddings"), Reason.TARGET_MODULES),
        ("rank", 5, Reason.MAX_RANK),
        ("adapter", "ia3", Reason.ADAPTERS),
        ("seeded_noise", True, Reason.SEEDED_NOISE),
        ("train_head", True, Reason.TRAIN_HEAD),
    ):
        assert reason_of(policy.check, replace(proposal, **{key: value})) is rule


@pytest.mark.parametrize("overrides", [(), NOISED], ids=str)
def test_the_lifetime_cap_is_what_the_run_costs_rounded_up(
    config: Configure, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    policy, proposal = policy_and_proposal(config(*overrides))
    plan = proposal.plan
    cost, _ = cheapest(plan.event(rounds=plan.most_rounds), delta=plan.delta)
    assert cost <= policy.budget.max_epsilon < cost + 0.1
    # At the order that the ledger settles on, too, a second run finds no room.
    ledger = Ledger(tmp_path / "ledger.db", policy, SigningKey.load_or_make(tmp_path / "key.pem"))
    ledger.reserve(proposal, round=1, request="1")
    assert reason_of(ledger.reserve, replace(proposal, run="second"), round=1, request="2") is Reason.MAX_EPSILON


def test_without_privacy_nothing_is_capped(config: Configure) -> None:
    policy, _ = policy_and_proposal(config("privacy=none"))
    assert math.isinf(policy.budget.max_epsilon)
    assert policy.limits.min_noise_multiplier == 0


@pytest.fixture
def kept(config: Configure, tmp_path: Path) -> Configure:
    """A run of up to four rounds whose sites are kept."""
    return lambda *overrides: config(f"runtime.sites_dir={tmp_path}/kept", "federation.num_rounds=4", *overrides)


def sites_of(config: RunConfig, tmp_path: Path) -> VirtualSites:
    return VirtualSites.of(config, tmp_path / "run", config.plan())


def test_a_policy_that_is_there_is_kept_and_read(kept: Configure, tmp_path: Path) -> None:
    first = sites_of(kept(), tmp_path).files("site-1").policy
    path = tmp_path / "kept" / "site-1" / "site.toml"
    path.write_text(path.read_text().replace("max_rounds = 4", "max_rounds = 3"))
    less = replace(first, limits=replace(first.limits, max_rounds=3))
    assert sites_of(kept("federation.num_rounds=9"), tmp_path).files("site-1").policy == less


def test_a_policy_of_another_site_is_not_this_ones(kept: Configure, tmp_path: Path) -> None:
    sites = sites_of(kept(), tmp_path)
    sites.files("site-1")
    (tmp_path / "kept" / "site-2").mkdir()
    (tmp_path / "kept" / "site-1" / "site.toml").rename(tmp_path / "kept" / "site-2" / "site.toml")
    with pytest.raises(ConfigError, match=r"site\.toml: site = 'site-1': must be site-2"):
        sites.files("site-2")


def allow_rounds(sites: VirtualSites, site: str, count: float) -> None:
    """Edit the site's cap so that `count` rounds of the run fit, and hardly more."""
    sites.check_dealt_out()
    policy = sites.files(site).policy
    with_cap = replace(policy, budget=replace(policy.budget, max_epsilon=1000.0))
    write_policy(with_cap, sites.folder / site / "site.toml")
    order = sites.ledger(site).history.order
    divergence = count * total_divergence([sites.plan.event()], order)
    cap = divergence + surcharge(order, policy.budget.delta) + 1e-6
    write_policy(replace(policy, budget=replace(policy.budget, max_epsilon=cap)), sites.folder / site / "site.toml")


def test_what_fits_anyway_is_left_as_it_was_asked(kept: Configure, tmp_path: Path) -> None:
    for wanted in ("stop", "fewer_rounds", "more_noise"):
        config = kept(f"federation.if_over_budget={wanted}", "privacy.noise_multiplier=null")
        assert fitted(config, tmp_path / "run") == config


def test_as_many_rounds_as_every_site_allows(kept: Configure, tmp_path: Path) -> None:
    config = kept("federation.if_over_budget=fewer_rounds")
    sites = sites_of(config, tmp_path)
    allow_rounds(sites, "site-1", 3)
    allow_rounds(sites, "site-2", 2)
    changed = fitted(config, tmp_path / "run")
    assert changed.federation.num_rounds == 2
    assert changed.privacy.noise_multiplier == 4.0
    assert replace(changed, federation=replace(changed.federation, num_rounds=4)) == config


def test_as_little_noise_as_every_site_allows(kept: Configure, tmp_path: Path) -> None:
    config = kept("federation.if_over_budget=more_noise")
    sites = sites_of(config, tmp_path)
    allow_rounds(sites, "site-1", 3)
    allow_rounds(sites, "site-2", 2)
    changed = fitted(config, tmp_path / "run")
    assert changed.federation.num_rounds == 4
    noise = changed.privacy.noise_multiplier
    assert 4.0 < noise < 8.0
    proposal = changed.proposal(lead=sites.lead_key().public, plan=changed.plan())
    for site in ("site-1", "site-2"):
        assert sites.ledger(site).offer(proposal).most_rounds == 4
    less = planned(proposal, noise_multiplier=noise * 0.999)
    assert sites.ledger("site-2").offer(less).most_rounds < 4, "the least noise that does"


def test_a_site_without_room_is_left_out_of_account_while_enough_others_have_some(
    kept: Configure, tmp_path: Path
) -> None:
    config = kept("federation.if_over_budget=fewer_rounds")
    sites = sites_of(config, tmp_path)
    allow_rounds(sites, "site-1", 0.5)
    allow_rounds(sites, "site-2", 3)
    assert fitted(config, tmp_path / "run").federation.num_rounds == 3
    with pytest.raises(RefusedError, match=r"1 of 2 sites.*site-1: max_epsilon, asked "):
        fitted(kept("federation.if_over_budget=fewer_rounds", "federation.min_sites=2"), tmp_path / "run")


@pytest.mark.parametrize("wanted", ["fewer_rounds", "more_noise"])
def test_no_room_at_all_is_refused_with_every_sites_rule(kept: Configure, tmp_path: Path, wanted: str) -> None:
    config = kept(f"federation.if_over_budget={wanted}")
    sites = sites_of(config, tmp_path)
    for site in ("site-1", "site-2"):
        policy = sites.files(site).policy
        limits = replace(policy.limits, max_sampling_rate=0.1)
        write_policy(replace(policy, limits=limits), sites.folder / site / "site.toml")
    with pytest.raises(RefusedError) as refused:
        fitted(config, tmp_path / "run")
    for site in ("site-1", "site-2"):
        assert f"{site}: max_sampling_rate, asked 0.2, allowed at most 0.1" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wanted", ["fewer_rounds", "more_noise"])
def test_a_broken_ledger_does_not_stop_the_others(kept: Configure, tmp_path: Path, wanted: str) -> None:
    config = kept(f"federation.if_over_budget={wanted}")
    sites = sites_of(config, tmp_path)
    sites.check_dealt_out()
    sites.files("site-1")
    (sites.folder / "site-1" / "ledger.db").write_bytes(b"no database" * 500)
    assert fitted(config, tmp_path / "run").federation.num_rounds == 4
    with pytest.raises(RefusedError, match=r"site-1: ledger .* cannot be read or written"):
        fitted(kept(f"federation.if_over_budget={wanted}", "federation.min_sites=2"), tmp_path / "run")


def test_a_file_is_no_folder_of_sites(config: Configure, tmp_path: Path) -> None:
    (tmp_path / "sites").write_text("")
    kept = config(f"runtime.sites_dir={tmp_path / 'sites'}")
    with pytest.raises(ConfigError, match=r"runtime\.sites_dir = .*: must be a folder, or not be there yet"):
        VirtualSites.of(kept, tmp_path / "run", kept.plan())


def test_how_records_were_dealt_out_is_not_noted_anew_beside_a_ledger(config: Configure, tmp_path: Path) -> None:
    sites = sites_of(config(f"runtime.sites_dir={tmp_path}/kept"), tmp_path)
    sites.check_dealt_out()
    (sites.folder / "north").mkdir()
    (sites.folder / "north" / "ledger.db").touch()
    sites.check_dealt_out()
    (sites.folder / DEALT).unlink()
    with pytest.raises(RunError, match=r"cannot be read \(FileNotFoundError\); restore it: without it nobody knows"):
        sites.check_dealt_out()


def test_of_two_runs_that_deal_records_out_at_once_one_is_refused(config: Configure, tmp_path: Path) -> None:
    sites = [sites_of(config(f"runtime.sites_dir={tmp_path}/kept", f"seed={seed}"), tmp_path) for seed in (0, 1)]
    both = threading.Barrier(2)

    def deal(one: VirtualSites) -> None:
        both.wait()
        one.check_dealt_out()

    with ThreadPoolExecutor(2) as pool:
        found = [future.exception() for future in [pool.submit(deal, one) for one in sites]]
    assert [getattr(error, "key", None) for error in found if error] == ["seed"]


@pytest.mark.parametrize("gone", ["null", "moved/sites"])
def test_a_renewed_run_makes_no_new_sites(config: Configure, gone: str, tmp_path: Path) -> None:
    after = config(f"runtime.sites_dir={gone}", "federation.renewal=1")
    with pytest.raises(
        ConfigError, match=r"runtime\.sites_dir = .*must be the folder of the ledgers of the run that is"
    ):
        sites_of(after, tmp_path)
    sites_of(before := config(f"runtime.sites_dir={tmp_path}/kept"), tmp_path).check_dealt_out()
    kept = replace(before, federation=replace(before.federation, renewal=1))
    assert sites_of(kept, tmp_path).folder == tmp_path / "kept"
