"""Simulated sites: policies that allow exactly their run, room for later runs, and what one process shares."""

import dataclasses
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedtune.sites.shared_model as shared_model
import fedtune.sites.work as site_work
from fedtune.config import RunConfig
from fedtune.evaluation.scoring import compute_unit_scores
from fedtune.federation.calendar import describe_calendar
from fedtune.federation.secure.at_site import Parties
from fedtune.federation.secure.party import SumConfirmation
from fedtune.federation.site_round import TrainingResult
from fedtune.privacy import filter
from fedtune.privacy.accountant import epsilon_pld, format_epsilon
from fedtune.privacy.filter import compute_epsilon_conversion_term, compute_total_divergence, find_smallest_cap
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.mechanism import release_scores
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.randomness import SeededRandomness
from fedtune.privacy.release import Reason
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy, Releases
from fedtune.sites.virtual_site import (
    DEALT,
    POLICY,
    Participants,
    VirtualSites,
    build_covering_budget,
    fit_to_budgets,
    fix_number_format,
    generate_policy,
)
from fedtune.spec import ConfigError, RefusedError, RunError

from ..conftest import list_tiny_overrides, read_files, run_command, simulate, write_config
from ..privacy.builders import change_values, read_refusal_reason, stranger_key
from .conftest import make_first_request

NOISED = ("privacy.metrics=noised", "data.heldout_fraction=0.3")
MUCH_SCORED = (
    *NOISED,
    "privacy.metrics_noise_multiplier=1.5",
    "privacy.noise_multiplier=0.7",
    "privacy.sampling_rate=0.05",
    "privacy.epsilon=20",
)
"""Scores that cost more than the training, so that another Renyi order is best for the sum of both."""


def make_policy_and_proposal(config: RunConfig) -> tuple[Policy, Proposal]:
    plan = config.plan()
    return generate_policy(config, plan, "site-1", lead="ab" * 32), config.proposal(lead="ab" * 32, plan=plan)


def change_plan(proposal: Proposal, **changes: Any) -> Proposal:
    """Return the proposal with other values in its plan."""
    return replace(proposal, plan=replace(proposal.plan, **changes))


@pytest.mark.parametrize("runs", [1, 12, 120])
def test_generated_cap_fits_exactly_the_planned_runs(config: Any, runs: int) -> None:
    """Regression: the cap had one decimal, and 121 instead of 120 rounds were accepted: epsilon 8.039 for 8."""
    plan = config(f"privacy.planned_runs={runs}", "privacy.epsilon=8").plan()
    budget = build_covering_budget([plan] * plan.runs)
    room = filter.compute_max_divergence(budget.max_epsilon, order=budget.order(), delta=plan.delta)
    assert filter.compute_max_repeats(plan.full_event, room, order=budget.order()) == runs
    assert epsilon_pld({plan.full_event: runs}, plan.delta) <= 8.0
    if runs > 1:
        title, text, *_ = describe_calendar(plan)
        assert f"epsilon {format_epsilon(epsilon_pld({plan.full_event: runs}, plan.delta))} in all" in title
        cap = float(re.findall(r"\(max_epsilon\) of ([\d.]+),", text)[0])
        order = filter.find_best_order(plan.full_event, epsilon=cap, delta=plan.delta)
        room = filter.compute_max_divergence(cap, order=order, delta=plan.delta)
        assert filter.compute_max_repeats(plan.full_event, room, order=order) == runs


BY_USER = ("privacy.unit=user", "+data.columns.user=label")
OTHERS = ("privacy=none", "federation.spare_rounds=2", "runtime.seeded_noise=true", "head.train=false")


@pytest.mark.parametrize("overrides", [(), NOISED, MUCH_SCORED, BY_USER, *((one,) for one in OTHERS)], ids=str)
def test_generated_policy_allows_exactly_its_run(config: Any, tmp_path: Path, overrides: Any) -> None:
    policy, proposal = make_policy_and_proposal(config(*overrides))
    policy.check(proposal)
    cost, _ = find_smallest_cap(proposal.plan.full_event, delta=proposal.plan.delta)  # infinite without privacy
    assert cost <= policy.budget.max_epsilon
    assert policy.budget.max_epsilon <= cost + 0.1 or overrides == MUCH_SCORED  # its order suits the training alone
    ledger = SiteLedger(tmp_path / "ledger.db", policy, SigningKey.load_or_create(tmp_path / "key.pem"), create=True)
    for round in range(1, proposal.plan.max_rounds + 1):
        ledger.reserve(proposal, round=round, request=f"{round}")
        if math.isfinite(cost):  # also at the order that the ledger uses
            assert (
                read_refusal_reason(ledger.reserve, replace(proposal, run="s"), round=1, request="s")
                is Reason.MAX_EPSILON
            )
    assert read_refusal_reason(ledger.reserve, proposal, round=99, request="99") is Reason.PLAN_EXHAUSTED


# Each value of a plan slightly beyond the planned one, and the rule that names it.
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
    "shared": (
        lambda shared: shared,
        Reason.SECURE_AGGREGATION,
    ),  # see test_secure_aggregation_must_meet_the_trust_limits_of_the_site
    "cohorts": (lambda cohorts: cohorts, Reason.COHORTS),  # see tests/privacy/test_cohorts.py
    "noise": (
        lambda noise: noise,
        Reason.LEADS,
    ),  # no lead's proposal has another value: see tests/privacy/test_own_release.py
    "runs": (lambda runs: runs, Reason.MAX_EPSILON),  # the charge for a run follows from its noise
}


@pytest.mark.parametrize("overrides", [(), BY_USER, ("privacy.max_grad_norm=1e-4",)], ids=str)
def test_generated_policy_bounds_every_plan_value(config: Any, overrides: tuple[str, ...]) -> None:
    policy, proposal = make_policy_and_proposal(config(*overrides))
    assert set(_BEYOND) == {field.name for field in dataclasses.fields(proposal.plan)}
    for name, (change, rule) in _BEYOND.items():
        value = getattr(proposal.plan, name)
        if change(value) == value:
            continue
        assert read_refusal_reason(policy.check, change_plan(proposal, **{name: change(value)})) is rule, name
    less = {"sampling_rate": 0.1, "noise_multiplier": 9.0, "local_steps": 1, "num_rounds": 1}
    floor = min(1e-3, proposal.plan.max_grad_norm)
    policy.check(change_plan(proposal, **less, max_grad_norm=floor))
    assert read_refusal_reason(policy.check, change_plan(proposal, max_grad_norm=0.9 * floor)) is Reason.MIN_GRAD_NORM
    assert policy.releases.reply_after_s == 0
    assert Releases().reply_after_s == 600, "a real site must delay its answers by default"


def test_generated_policy_bounds_the_metrics_noise(config: Any) -> None:
    policy, proposal = make_policy_and_proposal(config(*NOISED, "privacy.metrics_noise_multiplier=2.5"))
    assert policy.limits.min_noise_multiplier == 2.5
    assert policy.releases.metrics == "noised"
    assert (
        read_refusal_reason(policy.check, change_plan(proposal, metrics_noise_multiplier=2.4))
        is Reason.MIN_NOISE_MULTIPLIER
    )


def test_generated_policy_bounds_model_data_and_lead(config: Any) -> None:
    policy, proposal = make_policy_and_proposal(config("head.train=false"))
    for key, value, rule in (
        *(("lead", "00" * 32, Reason.LEADS), ("dataset", "letters", Reason.DATASET)),
        *(("task", "causal_lm", Reason.TASKS), ("base_model", "cd" * 32, Reason.BASE_MODELS)),
        *(("target_modules", ("all-linear", "embeddings"), Reason.TARGET_MODULES), ("rank", 5, Reason.MAX_RANK)),
        *(("adapter", "ia3", Reason.ADAPTERS), ("seeded_noise", True, Reason.SEEDED_NOISE)),
        ("train_head", True, Reason.TRAIN_HEAD),
    ):
        assert read_refusal_reason(policy.check, replace(proposal, **{key: value})) is rule


def test_generated_policy_allows_a_shared_rank_far_above_the_sites_own(config: Any) -> None:
    policy, proposal = make_policy_and_proposal(config("lora.rank=48", "federation.ranks=[1,48]"))
    assert (proposal.find_rank(policy.site), proposal.rank, policy.allow.max_rank) == (1, 48, 3)
    policy.check(proposal)


@pytest.fixture
def kept_sites_config(config: Any, tmp_path: Path) -> Any:
    """A run of up to four rounds with persistent sites."""
    return lambda *overrides: config(f"runtime.sites_dir={tmp_path}/kept", "federation.num_rounds=4", *overrides)


def make_virtual_sites(config: RunConfig, tmp_path: Path) -> VirtualSites:
    return VirtualSites.create(config, tmp_path / "run", config.plan())


def test_existing_policy_is_kept_unless_it_belongs_to_another_site(kept_sites_config: Any, tmp_path: Path) -> None:
    first = make_virtual_sites(kept_sites_config(), tmp_path).files("site-1").policy
    less = change_values(first, limits={"max_rounds": 3})
    write_policy(less, tmp_path / "kept" / "site-1" / "site.toml")
    sites = make_virtual_sites(kept_sites_config("federation.num_rounds=9"), tmp_path)
    assert sites.files("site-1").policy == less
    (tmp_path / "kept" / "site-2").mkdir()
    (tmp_path / "kept" / "site-1" / "site.toml").rename(tmp_path / "kept" / "site-2" / "site.toml")
    with pytest.raises(ConfigError, match=r"site\.toml: site = 'site-1': must be site-2"):
        sites.files("site-2")


def allow_rounds(sites: VirtualSites, site: str, count: float) -> None:
    """Edit the site's cap so that `count` rounds of the run fit, with hardly any margin."""
    sites.check_partition()
    policy, file = sites.files(site).policy, sites.folder / site / "site.toml"
    write_policy(change_values(policy, budget={"max_epsilon": 1000.0}), file)
    order = sites.ledger(site).history.order
    divergence = count * compute_total_divergence([sites.plan.event()], order)
    cap = divergence + compute_epsilon_conversion_term(order, policy.budget.delta) + 1e-6
    write_policy(change_values(policy, budget={"max_epsilon": cap}), file)


def test_run_within_budget_is_not_adjusted(kept_sites_config: Any, tmp_path: Path) -> None:
    for mode in ("stop", "fewer_rounds", "more_noise"):
        config = kept_sites_config(f"federation.if_over_budget={mode}", "privacy.noise_multiplier=null")
        assert fit_to_budgets(config, tmp_path / "run") == config


def test_run_over_budget_is_fitted_to_the_strictest_site(kept_sites_config: Any, tmp_path: Path) -> None:
    config = kept_sites_config("federation.if_over_budget=fewer_rounds")
    sites = make_virtual_sites(config, tmp_path)
    allow_rounds(sites, "site-1", 3)
    allow_rounds(sites, "site-2", 2)
    errors = fit_to_budgets(config, tmp_path / "run")
    assert errors.federation.num_rounds == 2
    assert replace(errors, federation=replace(errors.federation, num_rounds=4)) == config
    errors = fit_to_budgets(kept_sites_config("federation.if_over_budget=more_noise"), tmp_path / "run")
    assert errors.federation.num_rounds == 4
    noise = errors.privacy.noise_multiplier
    assert 4.0 < noise < 8.0
    proposal = errors.proposal(lead=sites.lead_key().public, plan=errors.plan())
    for site in ("site-1", "site-2"):
        assert sites.ledger(site).make_offer(proposal).max_rounds == 4
    less = change_plan(proposal, noise_multiplier=noise * 0.999)
    assert sites.ledger("site-2").make_offer(less).max_rounds < 4, "the noise must be minimal"


@pytest.fixture
def formats_measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the formats measured; the measurement prefers mixed."""
    formats = list[str]()

    def choose(model: Any, runtime: Any, *, allowed: Any, told: Any) -> str:
        formats.append("mixed" if "mixed" in allowed else "float32")
        return formats[-1]

    monkeypatch.setattr("fedtune.sites.virtual_site.choose_number_format", choose)
    return formats


def test_number_format_is_chosen_among_formats_of_existing_policies(
    kept_sites_config: Any, tmp_path: Path, formats_measured: list[str]
) -> None:
    config = kept_sites_config("model.dtype=auto")
    assert fix_number_format(config, tmp_path / "run").model.dtype == "mixed", "new sites must allow it"
    sites = make_virtual_sites(config.with_number_format("float32"), tmp_path)
    for site in config.federation.active:
        sites.files(site)
    assert fix_number_format(config, tmp_path / "run").model.dtype == "float32"
    assert formats_measured == ["mixed", "float32"]


def test_explicit_number_format_is_never_measured(config: Any, tmp_path: Path, formats_measured: list[str]) -> None:
    for dtype in ("float32", "bfloat16"):
        assert fix_number_format(config(f"model.dtype={dtype}"), tmp_path / "run").model.dtype == dtype
    assert formats_measured == []


def test_site_with_exhausted_budget_is_excluded_if_enough_sites_remain(kept_sites_config: Any, tmp_path: Path) -> None:
    config = kept_sites_config("federation.if_over_budget=fewer_rounds")
    sites = make_virtual_sites(config, tmp_path)
    allow_rounds(sites, "site-1", 0.5)
    allow_rounds(sites, "site-2", 3)
    assert fit_to_budgets(config, tmp_path / "run").federation.num_rounds == 3
    with pytest.raises(RefusedError, match=r"1 of 2 sites.*site-1: max_epsilon, requested "):
        fit_to_budgets(
            kept_sites_config("federation.if_over_budget=fewer_rounds", "federation.min_sites=2"), tmp_path / "run"
        )


@pytest.mark.parametrize("mode", ["fewer_rounds", "more_noise"])
def test_run_exceeding_every_site_budget_is_refused_with_all_broken_rules(
    kept_sites_config: Any, tmp_path: Path, mode: str
) -> None:
    config = kept_sites_config(f"federation.if_over_budget={mode}")
    sites = make_virtual_sites(config, tmp_path)
    for site in ("site-1", "site-2"):
        strict = change_values(sites.files(site).policy, limits={"max_sampling_rate": 0.1})
        write_policy(strict, sites.folder / site / "site.toml")
    with pytest.raises(RefusedError) as refused:
        fit_to_budgets(config, tmp_path / "run")
    for site in ("site-1", "site-2"):
        assert f"{site}: max_sampling_rate, requested 0.2, allowed at most 0.1" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mode", ["fewer_rounds", "more_noise"])
def test_damaged_ledger_does_not_stop_other_sites(kept_sites_config: Any, tmp_path: Path, mode: str) -> None:
    config = kept_sites_config(f"federation.if_over_budget={mode}")
    sites = make_virtual_sites(config, tmp_path)
    sites.check_partition()
    sites.files("site-1")
    (sites.folder / "site-1" / "ledger.db").write_bytes(b"no database" * 500)
    assert fit_to_budgets(config, tmp_path / "run").federation.num_rounds == 4
    with pytest.raises(RefusedError, match=r"site-1: ledger .* cannot be read or written"):
        fit_to_budgets(
            kept_sites_config(f"federation.if_over_budget={mode}", "federation.min_sites=2"), tmp_path / "run"
        )


def test_partition_record_is_not_recreated_next_to_a_ledger(config: Any, tmp_path: Path) -> None:
    sites = make_virtual_sites(config(f"runtime.sites_dir={tmp_path}/kept"), tmp_path)
    sites.check_partition()
    (sites.folder / "north").mkdir()
    (sites.folder / "north" / "ledger.db").touch()
    sites.check_partition()
    (sites.folder / DEALT).unlink()
    with pytest.raises(
        RunError, match=r"\(FileNotFoundError\); restore the file, .*; if the ledgers .* of real sites, set"
    ):
        sites.check_partition()


def test_concurrent_runs_with_different_partitions_are_refused(config: Any, tmp_path: Path) -> None:
    sites = [
        make_virtual_sites(config(f"runtime.sites_dir={tmp_path}/kept", f"seed={seed}"), tmp_path) for seed in (0, 1)
    ]
    barrier = threading.Barrier(2)

    def deal(site: VirtualSites) -> None:
        barrier.wait()
        site.check_partition()

    with ThreadPoolExecutor(2) as pool:
        errors = [future.exception() for future in [pool.submit(deal, fingerprint) for fingerprint in sites]]
    assert [getattr(error, "key", None) for error in errors if error] == ["seed"]


def test_invalid_or_missing_sites_folder_is_refused(config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"runtime\.sites_dir = .*: must be a folder, or not exist yet"):
        make_virtual_sites(config(f"runtime.sites_dir={tmp_path}/file"), tmp_path)


def test_renewed_run_requires_the_ledgers_that_contain_its_charges(config: Any, tmp_path: Path) -> None:
    confirmed, last = tmp_path / "kept", tmp_path / "last"
    write_config(before := config(f"runtime.sites_dir={confirmed}"), last)
    retried = change_values(before, federation={"renewal": 1}, model={"adapter": str(last)})
    match = r"runtime\.sites_dir = .*must be the ledger folder of the renewed run: no ledger"
    for missing in (None, str(tmp_path / "moved" / "sites")):
        with pytest.raises(ConfigError, match=match):
            make_virtual_sites(change_values(retried, runtime={"sites_dir": missing}), tmp_path)
    sites = make_virtual_sites(before, tmp_path)
    sites.check_partition()
    with pytest.raises(ConfigError, match=f"{match} of site-1"):
        make_virtual_sites(retried, tmp_path)
    ledgers = {site: sites.ledger(site) for site in before.federation.active}
    with pytest.raises(ConfigError, match=f"{match} with the run {before.run_id()}"):
        make_virtual_sites(retried, tmp_path)
    proposal = replace(before.proposal(lead=sites.lead_key().public, plan=sites.plan), run=before.run_id())
    ledgers["site-2"].reserve(proposal, round=1, request="1")
    assert make_virtual_sites(retried, tmp_path).folder == confirmed
    (confirmed / "site-1" / "ledger.db").unlink()
    with pytest.raises(ConfigError, match=f"{match} of site-1"):
        make_virtual_sites(retried, tmp_path)


# What virtual sites in one process share, and what is separate.


def test_simulated_sites_share_one_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    build = shared_model.prepare_model
    monkeypatch.setattr(shared_model, "prepare_model", lambda *of, **rest: built.append(of) or build(*of, **rest))
    simulate("federation.num_sites=6", "privacy=none", into=tmp_path)
    assert len(built) == 1


def test_partition_assigns_every_record_to_one_site(config: Any, tmp_path: Path) -> None:
    def list_sizes(sites: int, *more: str) -> list[tuple[int, int]]:
        participants = Participants(config(f"federation.num_sites={sites}", *more), tmp_path)
        return [(len(work.examples), work.examples.num_tokens) for work in participants.work.values()]

    parts, (single,) = list_sizes(4), list_sizes(1)
    assert list_sizes(4, "federation.participants=[site-3]") == parts[2:3], "other participants must not matter"
    assert len(parts) == 4
    assert min(parts) > (10, 0)
    assert tuple(map(sum, zip(*parts, strict=True))) == single


def test_simulated_site_has_a_separate_policy_key_and_ledger(config: Any, tmp_path: Path) -> None:
    participants = Participants(config(), tmp_path)
    sites = [participants.site(index) for index in (0, 1)]
    names = [f"{site}/{name}" for site in ("site-1", "site-2") for name in ("ledger.db", "site.toml", "site_key.pem")]
    assert sorted(read_files(tmp_path / "sites")) == ["lead_key.pem", *names]
    receipts = [site.ledger.sign_receipt("r") for site in sites]
    assert len({receipt.site_key for receipt in receipts}) == 2
    assert [site.ledger.policy.site for site in sites] == ["site-1", "site-2"]
    assert participants.site(0).ledger.sign_receipt("r") == receipts[0], "reopening must write nothing"
    (tmp_path / "sites" / "site-1" / "ledger.db").write_bytes(b"no database" * 500)
    assert participants.list_changed_sites() == [], "a damaged ledger must only affect its own site"
    with pytest.raises(RunError, match="cannot be read or written"):
        participants.site(0)


def test_secure_aggregation_roster_follows_each_site_policy(config: Any, tmp_path: Path) -> None:
    participants = Participants(config("federation.site_names=[a,b]"), tmp_path)
    identities, foreign = participants.identities, {"b": stranger_key.public}
    with_members = change_values(participants.sites.files("a").policy, trust={"members": foreign})
    write_policy(with_members, tmp_path / "sites" / "a" / POLICY)
    rosters = [site.sums.roster for site in (participants.site(0), participants.site(1)) if site.sums is not None]
    assert rosters == [{"a": identities["a"], **foreign}, identities]


def test_ledgers_in_one_folder_keep_separate_confirmations(site_policy: Any, tmp_path: Path) -> None:
    for site in ("east", "west"):
        policy = replace(site_policy(site), ledger=f"{site}.db", site_key=f"{site}.pem")
        files = SiteFiles(policy, tmp_path / "site.toml")
        promise = SumConfirmation(session="ab" * 32, release=1, survivors=("east", "west"), confirmed=site == "east")
        site_work.make_sums_at_site(files, Parties(), members={}).keep(promise)
    confirmed = {path.name: path.read_text().count('"confirmed": true') for path in tmp_path.glob("*promises.jsonl")}
    assert confirmed == {"east.db.promises.jsonl": 1, "west.db.promises.jsonl": 0}


def train(participants: Participants, *, attempt: int = 1) -> TrainingResult:
    """Train the first site on the initial adapter in round 1."""
    site = participants.site(0)
    request = make_first_request(participants.config, participants.sites.lead_key(), site=site.name)
    assert site.prepare(request).proposal == request.proposal
    return site.train(request, participants.shared.initial_adapter, attempt)


def test_round_scores_the_received_adapter_with_planned_noise(config: Any, tmp_path: Path) -> None:
    participants = Participants(config(*NOISED, "runtime.seeded_noise=true"), tmp_path)
    shared = participants.shared
    trained = train(participants)
    assert trained.scores is not None
    shared.initial_adapter.load_into(shared.model)
    heldout = participants.work["site-1"]._heldout
    exact = compute_unit_scores(shared.model, heldout, pad_id=shared.tokenizer.pad_token_id)
    stream = SeededRandomness(participants.config.seed).stream("site-1", 1, 1, "scores")
    expected = release_scores(exact, declared_size=90 * 0.3, noise_multiplier=20.0, stream=stream)
    assert trained.scores == expected
    assert trained.adapter.digest() != shared.initial_adapter.digest()
    retried = train(participants, attempt=2)
    assert retried.scores != expected, "a retry must draw fresh noise"
    assert retried.adapter.digest() != trained.adapter.digest()


def test_nothing_is_scored_without_noised_metrics_or_test_files(config: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(site_work, "compute_unit_scores", None)
    files = ("data.validation_file=null", "data.test_file=null")
    participants = Participants(config("data.heldout_fraction=0.3", *files), tmp_path)
    assert train(participants).scores is None
    assert participants.shared.validation is None
    assert participants.shared.score(participants.shared.initial_adapter, participants.shared.test) == {}


def test_fingerprint_depends_on_records_and_site_key(config: Any, tmp_path: Path) -> None:
    one = train(Participants(config(), tmp_path / "a")).fingerprint
    assert train(Participants(config(), tmp_path / "a")).fingerprint == one
    assert train(Participants(config(), tmp_path / "b")).fingerprint != one, "nobody without the key may test a guess"
    assert train(Participants(config("seed=1"), tmp_path / "a")).fingerprint != one, "another split has other records"


@pytest.mark.parametrize("override", ["data.columns.text=nope", "data.test_file=gone.csv"])
def test_data_is_checked_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.setattr(shared_model, "prepare_model", None)
    assert override.partition("=")[2] in run_command("simulate", *list_tiny_overrides(override, into=tmp_path)).failed()


def test_slow_steps_are_reported_as_progress(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_model, "_measured", {})
    reported: list[str] = []
    settings = config("lora=last_layer", "federation.site_names=[a,b]")
    members = Participants(settings, tmp_path / "run", progress=lambda error, count, total: reported.append(error))
    work, adapter = members.work["a"], members.shared.initial_adapter
    assert list(dict.fromkeys(reported)) == ["loading the model", "checking the model on this machine"]
    request = make_first_request(members.config, members.sites.lead_key(), site="a")
    work.run_round(request, adapter, attempt=1, fingerprint_key=bytes(32))
    assert reported[-1] == "a: running the frozen layers over the records"
