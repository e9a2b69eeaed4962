"""Plan, ledger and report of a run with secure aggregation, with epsilon by adversary."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, pld

from fedtune.report import from_ledger, from_run
from fedtune.report.derive import profile
from fedtune.report.derive.profile import epsilon_pld
from fedtune.report.model import Report, from_json, to_json
from fedtune.report.page.render import render
from fedtune.report.verify_report import problems
from fedtune.spec import ConfigError

from ..cli import snapshots
from ..conftest import list_tiny_overrides, run_command, simulate

ROUNDS, RATE, SHARE, DELTA = 3, 0.2, 1.6, 1e-5
SECURE = (
    *("federation.aggregation=secure", "training.local_steps=1", f"federation.num_rounds={ROUNDS}"),
    *("federation.num_sites=5", "federation.threshold=4", "federation.colluders=1"),
    *(f"privacy.sampling_rate={RATE}", f"privacy.noise_multiplier={SHARE}", f"privacy.delta={DELTA}"),
)


@pytest.fixture(scope="module")
def secure_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(*SECURE, into=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def report(secure_run: Path) -> Report:
    return from_run.build_run_report(secure_run)


def account_rounds(shares: int) -> pld.PLDAccountant:
    """Compute the epsilon of the rounds with this number of honest sites, by dp-accounting alone."""
    event: DpEvent = PoissonSampledDpEvent(RATE, GaussianDpEvent(SHARE * math.sqrt(shares)))
    return pld.PLDAccountant(value_discretization_interval=1e-4).compose(SelfComposedDpEvent(event, ROUNDS))


EPSILONS = [float(account_rounds(shares).get_epsilon(DELTA)) for shares in (4, 3, 1)]


def test_secure_report_has_three_epsilons_per_site(report: Report) -> None:
    assert len(report.sites) == 5
    for site in report.sites:
        assert site.by_trust.with_colluders == site.spent.epsilon
        figures = (site.by_trust.server_alone, site.by_trust.with_colluders, site.by_trust.with_all_others)
        assert figures == pytest.approx(EPSILONS, rel=2e-3)
        (row,) = site.mechanisms
        assert row.noise_multiplier == pytest.approx(SHARE * math.sqrt(3), rel=1e-12)
        # Against all others together, only the site's own noise protects it.
        chance = site.meaning.correct_of_100_with_all_others
        assert chance == pytest.approx(50 * (1 + account_rounds(1).get_delta(0.0)), rel=1e-3)
        assert site.meaning.correct_of_100_mechanism < chance
    # For lost runs it is unknown what all others together can see.
    epsilons = profile.compute_epsilons_by_observer(
        [row, replace(row, run="", shared=None)], lambda charged: epsilon_pld(charged, DELTA)
    )
    assert epsilons.with_all_others is None
    assert problems(report) == []
    assert from_json(json.dumps(to_json(report))) == report
    known = report.known
    assert known["secure_aggregation"] == "yes"
    assert known["technologies_on"] == ("federated_learning", "secure_aggregation", "differential_privacy")
    assert known["technologies_off"] == ()
    assert {"masked_updates", "updates"} & set(report.released) == {"masked_updates"}
    claimed = replace(report, released=tuple("updates" if x == "masked_updates" else x for x in report.released))
    assert "released.0" in {problem.where for problem in problems(claimed)}


def change_report(report: Report, at: tuple[str, ...], value: object) -> Report:
    fields = to_json(report)
    for site in fields["sites"]:
        node = site
        for key in at[:-1]:
            node = node[int(key)] if key.isdigit() else node[key]
        node[at[-1]] = value
    return from_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        *(("by_trust.with_colluders", 0.1), ("by_trust", None), ("meaning.correct_of_100_with_all_others", 50.1)),
        ("mechanisms.0.shared.noise_multiplier", 2.0),
    ],
)
def test_tampered_secure_report_is_detected(report: Report, at: str, value: object) -> None:
    assert problems(change_report(report, tuple(at.split(".")), value)) != []


@pytest.mark.parametrize(("key", "value"), [("threshold", 3), ("colluders", 3)])
def test_report_with_an_insecure_threshold_is_refused(report: Report, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=r"sites\.0\.mechanisms\.0\.shared"):
        change_report(report, ("mechanisms", "0", "shared", key), value)


def test_early_stopped_secure_run_claims_the_whole_plan(tmp_path: Path) -> None:
    rates = ("training.learning_rate=1e-30", "training.head_learning_rate=1e-60")
    folder = simulate(*SECURE, *rates, "federation.num_rounds=5", "federation.early_stopping_patience=1", into=tmp_path)
    report = from_run.build_run_report(folder)
    (site, *_) = report.sites
    assert site.by_trust.with_colluders == report.epsilon == site.spent.planned_epsilon
    assert site.by_trust.server_alone < report.epsilon < site.by_trust.with_all_others
    assert problems(report) == []
    lowered = replace(site.by_trust, with_colluders=site.spent.epsilon_pld)
    assert problems(replace(report, sites=(replace(site, by_trust=lowered), *report.sites[1:]))) != []


def test_first_page_names_reliance_on_other_sites(secure_run: Path, report: Report) -> None:
    page = (secure_run / "report.html").read_text()
    assert "This protection relies on the other sites" in page
    assert "only in the sum" in page
    assert "In secure aggregation, each site adds a share of the noise" in page
    assert "Each site adds all the noise" not in page
    assert "hängt von den anderen Einrichtungen ab" in render(report, language="de")
    (assumption,) = [item for item in report.assumptions if item.code == "enough_sites_keep_their_noise"]
    assert (assumption.status, assumption.evidence) == ("assumed", "3 of 5")
    for number in EPSILONS:
        assert f"{math.floor(number * 100) / 100:.2f}" in page, "as many digits as both grids agree on"


def test_site_report_computes_three_epsilons_with_its_filter(secure_run: Path) -> None:
    report = from_ledger.build_ledger_report(secure_run / "sites" / "site-2" / "ledger.db")
    (site,) = report.sites
    alone, own, others = site.by_trust.server_alone, site.by_trust.with_colluders, site.by_trust.with_all_others
    assert own == site.spent.epsilon
    assert alone < site.spent.epsilon < others
    assert problems(report) == []
    assert "masked_updates" in report.released


def test_plan_and_ledger_show_the_three_epsilons(secure_run: Path, tmp_path: Path) -> None:
    plan = json.loads(run_command("plan", "--json", *list_tiny_overrides(*SECURE, into=tmp_path)).printed)
    assert list(plan["by_trust"].values()) == pytest.approx(EPSILONS, rel=2e-3)
    ledger = str(secure_run / "sites" / "site-1" / "ledger.db")
    spent = json.loads(run_command("ledger", "spent", ledger, "--json").out)
    (run,) = spent["runs"]
    assert list(run["by_trust"].values()) == pytest.approx(EPSILONS, rel=2e-3)
    words = " ".join(run_command("ledger", "spent", ledger).out.split())
    assert "against the server alone" in words
    assert "if all other sites collude" in words
    words = " ".join(run_command("plan", *list_tiny_overrides(*SECURE, into=tmp_path)).out.split())
    assert "1.6 at each site, 2.771 in a secure aggregate of at least 4 of 5 sites, less 1 that may collude" in words


@snapshots.parametrize_mistakes("mistakes-secure")
def test_settings_incompatible_with_secure_aggregation_are_refused(tmp_path: Path, typed: str) -> None:
    message = run_command("simulate", *list_tiny_overrides(*SECURE, *typed.split(), into=tmp_path)).failed()
    snapshots.check_message("mistakes-secure", typed, message)
