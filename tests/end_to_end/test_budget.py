"""Several runs against the same ledgers, each with the budget that the previous runs left."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

from fedtune.config import read_saved_config
from fedtune.privacy.filter import compute_epsilon_conversion_term, compute_total_divergence
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.ledger.verify import VerifiedLedger, verify
from fedtune.privacy.policy_file import read_policy, write_policy

from ..cli import snapshots
from ..conftest import list_tiny_overrides, read_result, run_command

ROUNDS = 3
SITES = ("site-1", "site-2")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sites' folder after a first run."""
    folder = tmp_path_factory.mktemp("first")
    settings = (f"runtime.sites_dir={folder / 'kept'}", f"federation.num_rounds={ROUNDS}")
    assert run_command("simulate", *list_tiny_overrides(*settings, into=folder / "runs", name="first")).code == 0
    return folder / "kept"


@pytest.fixture
def kept_sites(first_run: Path, tmp_path: Path) -> Path:
    """A copy of the sites' folder that persists over runs."""
    return Path(shutil.copytree(first_run, tmp_path / "kept"))


@pytest.fixture
def run(kept_sites: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run `fedtune simulate` against the persistent sites, which one run has charged before."""

    def start(name: str, *overrides: str) -> Any:
        settings = (f"runtime.sites_dir={kept_sites}", f"federation.num_rounds={ROUNDS}")
        return run_command("simulate", *list_tiny_overrides(*settings, *overrides, into=tmp_path / "runs", name=name))

    return start


def verify_ledger(folder: Path, site: str) -> VerifiedLedger:
    return verify(folder / site / "ledger.db")


def read_events(folder: Path) -> dict[str, tuple[Event, ...]]:
    return {site: verify_ledger(folder, site).events for site in SITES}


def allow_rounds(folder: Path, site: str, count: float) -> None:
    """Raise a site's lifetime cap to the cost of this number of rounds, as its owner would in an editor."""
    history, path = verify_ledger(folder, site).history, folder / site / "site.toml"
    (first, *_) = history.runs.values()
    cap = count * compute_total_divergence([first.plan.event()], history.order) + compute_epsilon_conversion_term(
        history.order, history.delta
    )
    policy = read_policy(path)
    write_policy(replace(policy, budget=replace(policy.budget, max_epsilon=cap)), path)


def test_second_run_is_reduced_and_third_refused_by_the_budget(run: Any, kept_sites: Path, tmp_path: Path) -> None:
    for site in SITES:
        allow_rounds(kept_sites, site, 1.5 * ROUNDS + 1.0)
    second = run("second", "federation.if_over_budget=fewer_rounds")
    assert (second.code, second.err) == (0, "")
    assert "allow 2 rounds at noise multiplier 4" in second.out
    folder = tmp_path / "runs" / "second"
    assert read_saved_config(folder).federation.num_rounds == 2
    result = read_result(folder)
    assert [entry["round"] for entry in result["rounds"]] == [1, 2]
    assert [entry["sites"] for entry in result["rounds"]] == [list(SITES)] * 2
    for site in SITES:
        spent = result["privacy"]["sites"][site]
        assert (spent["rounds"], spent["steps"]) == (2, 4)
        history = verify_ledger(kept_sites, site).history
        step = PoissonSampledDpEvent(0.2, GaussianDpEvent(4.0))
        assert history.count_total_charges() == {step: 2 * ROUNDS + 2 * 2}, "both runs must be in one ledger"
        assert history.cap > history.policies[0][1]
    before = read_events(kept_sites)
    third = run("third", "federation.if_over_budget=fewer_rounds")
    assert third.failed(3).startswith("0 of 2 sites have enough budget")
    for site in SITES:
        assert f"{site}: max_epsilon, requested " in third.message
        assert f"allowed at most {read_policy(kept_sites / site / 'site.toml').budget.max_epsilon:g}" in third.message
        (offer,) = verify_ledger(kept_sites, site).events[len(before[site]) :]
        assert (offer.kind, offer.detail["max_rounds"]) == (Kind.RELEASE, 0)
    assert not (tmp_path / "runs" / "third").exists()


@pytest.mark.by_day("seed=5", "data.train_file=simulations/data/banking77/test.jsonl.gz")
@snapshots.parametrize_mistakes("mistakes-kept-sites")
def test_changed_partition_is_refused_next_to_existing_ledgers(
    run: Any, kept_sites: Path, tmp_path: Path, typed: str
) -> None:
    before = read_events(kept_sites)
    message = run("second", typed).failed().replace(str(kept_sites), "KEPT")
    snapshots.check_message("mistakes-kept-sites", typed, message)
    assert read_events(kept_sites) == before
    assert not (tmp_path / "runs" / "second").exists()


def test_invalid_policy_stops_the_run_before_training(run: Any, kept_sites: Path, tmp_path: Path) -> None:
    path = kept_sites / "site-1" / "site.toml"
    path.write_text(path.read_text().replace("max_rounds", "max_round"))
    for choice in ("fewer_rounds", "more_noise"):
        outcome = run(choice, f"federation.if_over_budget={choice}")
        assert str(path) in outcome.failed()
        assert "max_round: is not a known key" in outcome.message
        assert not (tmp_path / "runs" / choice).exists()
