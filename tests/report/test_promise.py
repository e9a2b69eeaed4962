"""A run at a site that promises its people more: every report counts that site with the noise that it made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.federation.aggregation import weights_of
from fedtune.privacy import accountant
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.promise import Promise
from fedtune.report import from_ledger, from_run, signing
from fedtune.report.derive.derived import derive
from fedtune.report.facts import LedgerFacts, RunFacts
from fedtune.report.model import Report, from_json, to_json
from fedtune.report.page import render
from fedtune.report.rederive import problems
from fedtune.sites.virtual_site import POLICY, VirtualSites


@pytest.fixture(scope="module")
def made(tiny: Any, simulate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<folder>/run` at the sites in `<folder>/sites`, of which site-1 makes 1.5 times the noise."""
    folder = tmp_path_factory.mktemp("runs")
    kept = f"runtime.sites_dir={folder / 'sites'}"
    config = compose_run(tiny(kept, into=folder, name="run"))
    policy = VirtualSites.of(config, folder / "run", config.plan()).files("site-1").policy
    write_policy(replace(policy, promise=Promise(noise_factor=1.5)), folder / "sites" / "site-1" / POLICY)
    simulate(kept, into=folder)
    return folder


@pytest.fixture(scope="module")
def report(made: Path) -> Report:
    return from_run.build(made / "run")


def test_the_run_and_its_report_count_each_site_with_its_own_noise(made: Path, report: Report) -> None:
    said = json.loads((made / "run" / "run.json").read_text())["privacy"]
    assert isinstance(report.facts, RunFacts)
    plan = report.facts.plan
    stronger, usual = said["sites"]["site-1"], said["sites"]["site-2"]
    assert (stronger["noise_factor"], stronger["noise_multiplier"]) == (1.5, plan.noise_multiplier)
    assert "noise_factor" not in usual
    assert said["epsilon"] == report.epsilon == usual["epsilon"] > stronger["epsilon"]
    by_name = {site.site: site for site in report.sites}
    for name, noise in (("site-1", 1.5 * plan.noise_multiplier), ("site-2", plan.noise_multiplier)):
        own, spent = replace(plan, noise_multiplier=noise), by_name[name].spent
        assert spent is not None
        assert spent.epsilon == said["sites"][name]["epsilon"]
        assert spent.epsilon == accountant.epsilon_pld([own.event(rounds=spent.rounds)], plan.delta)
        assert spent.planned_epsilon == said["sites"][name]["planned_epsilon"]
        assert by_name[name].steps[-1].epsilon == spent.epsilon
        (row,) = by_name[name].mechanisms
        assert (row.noise_multiplier, row.noise_factor) == (noise, 1.5 if name == "site-1" else None)
    assert problems(report) == []


def test_the_report_says_which_site_has_which_weight(report: Report) -> None:
    assert isinstance(report.facts, RunFacts)
    sizes = {site.site: site.declared_size or 0 for site in report.sites}
    values = report.facts.trained_parameters or 0
    weights = weights_of(sizes, report.facts.plan, factors={"site-1": 1.5, "site-2": 1.0}, values=values)
    assert {site.site: site.average_weight for site in report.sites} == weights
    assert weights["site-1"] < 0.45
    page = render.render(report, language="en")
    assert "more noise than the run asked for" in page
    assert from_json(json.dumps(to_json(report))) == report


def test_a_report_of_sites_that_promise_nothing_more_says_nothing_of_it(a_report: Callable[..., Report]) -> None:
    usual = a_report()
    assert not any(key in json.dumps(to_json(usual)) for key in ("noise_factor", "average_weight"))
    assert "more noise than the run asked for" not in render.render(usual, language="en")


def test_a_factor_that_is_not_the_sites_is_found(report: Report, a_secure_report: Callable[..., Report]) -> None:
    def with_factor(report: Report, factor: float | None) -> Report:
        assert isinstance(report.facts, RunFacts)
        first, *others = report.facts.sites
        return replace(report, facts=replace(report.facts, sites=(replace(first, noise_factor=factor), *others)))

    assert "sites.site-1" in {found.where for found in problems(with_factor(report, None))}
    assert "sites.site-1.spent.epsilon" in {found.where for found in problems(with_factor(report, 1.4))}
    for factor in (0.0, 0.5, 1.0, 1e6):
        (found,) = problems(with_factor(report, factor))
        assert found.where.endswith("noise_factor")
    (found,) = problems(with_factor(a_secure_report(), 2.0))
    assert found.where.endswith("noise_factor")


def test_the_sites_own_report_has_its_noise_and_agrees_with_the_run(made: Path) -> None:
    own = from_ledger.build(made / "sites" / "site-1" / POLICY)
    assert isinstance(own.facts, LedgerFacts)
    ((run,), (site,)) = own.facts.runs, own.sites
    assert run.noise_factor == 1.5
    assert [row.noise_multiplier for row in site.mechanisms] == [run.plan.noise_multiplier]
    assert problems(own) == []
    signed = signing.signed(own, SigningKey.load(made / "sites" / "site-1" / "site_key.pem"))
    joined = from_run.build(made / "run", site_reports=[signed])
    first = joined.sites[0]
    assert (first.source, first.verdict.state) == ("signed_site_report", "within")
    assert "site_report_disagrees" not in first.verdict.reasons
    assert problems(joined) == []
    # Of a ledger that charged another noise than its receipts say, it is not the same plan.
    other = replace(own.facts, runs=(replace(run, noise_factor=None, plan=replace(run.plan, noise_multiplier=9.0)),))
    forged = signing.signed(derive(other), SigningKey.load(made / "sites" / "site-1" / "site_key.pem"))
    assert "site_report_disagrees" in from_run.build(made / "run", site_reports=[forged]).sites[0].verdict.reasons


def test_without_a_checkpoint_the_noise_stands_in_run_json(made: Path, report: Report, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "run", tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints")
    again = from_run.build(folder)
    assert [site.spent and site.spent.epsilon for site in again.sites] == [
        site.spent and site.spent.epsilon for site in report.sites
    ]
    assert again.sites[0].source == "run_record"
