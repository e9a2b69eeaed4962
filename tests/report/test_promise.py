"""A run at a site that promises its people more: every report counts that site with the noise that it made."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
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
from fedtune.report.model import from_json, to_json
from fedtune.report.page import render
from fedtune.report.rederive import problems
from fedtune.sites.virtual_site import POLICY, VirtualSites

from ..conftest import simulate, tiny

SECURE = ("federation.aggregation=secure", "federation.num_sites=3", "federation.threshold=3", "training.local_steps=1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`<folder>/run` at the sites in `<folder>/sites`, of which site-1 makes 1.5 times the noise."""

    @cache
    def make(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        given = (f"runtime.sites_dir={folder / 'sites'}", *overrides)
        config = compose_run(tiny(*given, into=folder, name="run"))
        policy = VirtualSites.of(config, folder / "run", config.plan()).files("site-1").policy
        write_policy(replace(policy, promise=Promise(noise_factor=1.5)), folder / "sites" / "site-1" / POLICY)
        simulate(*given, into=folder)
        return folder

    return make


@pytest.mark.parametrize("overrides", [(), SECURE], ids=["plain", "secure"])
def test_run_and_report_count_each_site_with_its_noise(made: Callable[..., Path], overrides: tuple[str, ...]) -> None:
    folder = made(*overrides)
    report, said = from_run.build(folder / "run"), json.loads((folder / "run" / "run.json").read_text())["privacy"]
    plan = report.facts.plan
    stronger, usual = said["sites"]["site-1"], said["sites"]["site-2"]
    assert (stronger["noise_factor"], stronger["noise_multiplier"]) == (1.5, plan.noise_multiplier)
    assert "noise_factor" not in usual
    assert said["epsilon"] == report.epsilon == usual["epsilon"] > stronger["epsilon"]
    by_name = {site.site: site for site in report.sites}
    for name, factor in (("site-1", 1.5), ("site-2", 1.0)):
        own, spent = plan.stronger(factor), by_name[name].spent
        assert spent.epsilon == said["sites"][name]["epsilon"]
        assert spent.epsilon == accountant.epsilon_pld([own.event(rounds=spent.rounds)], plan.delta)
        assert spent.planned_epsilon == said["sites"][name]["planned_epsilon"]
        assert by_name[name].steps[-1].epsilon == spent.epsilon
        (row,) = by_name[name].mechanisms
        assert row.noise_multiplier == own.counted_noise == pytest.approx(factor * plan.counted_noise)
        assert (row.max_grad_norm, row.noise_factor) == (own.max_grad_norm, 1.5 if name == "site-1" else None)
    assert problems(report) == []
    if overrides:  # of site-1 each record has a part that is two thirds as large
        assert [site.average_weight for site in report.sites] == pytest.approx([1 / 4, 3 / 8, 3 / 8])
        assert (own.max_grad_norm, by_name["site-1"].mechanisms[0].max_grad_norm) == (1.0, 1 / 1.5)
        assert by_name["site-1"].by_trust.with_all_others < by_name["site-2"].by_trust.with_all_others


def test_the_report_says_which_site_has_which_weight_and_no_other_factor(made: Any, a_secure_report: Any) -> None:
    report = from_run.build(made() / "run")
    factors, values = {"site-1": 1.5, "site-2": 1.0}, report.facts.trained_parameters
    weights = weights_of({"site-1": 90, "site-2": 90}, report.facts.plan, factors=factors, values=values)
    assert {site.site: site.average_weight for site in report.sites} == weights
    assert weights["site-1"] < 0.45
    assert "more noise than the run asked for" in render.render(report, language="en")
    assert from_json(json.dumps(to_json(report))) == report

    def with_factor(report: Any, factor: float | None) -> Any:
        first, *others = report.facts.sites
        return replace(report, facts=replace(report.facts, sites=(replace(first, noise_factor=factor), *others)))

    assert "sites.site-1" in {found.where for found in problems(with_factor(report, None))}
    assert "sites.site-1.spent.epsilon" in {found.where for found in problems(with_factor(report, 1.4))}
    for other, factor in ((report, 0.0), (report, 0.5), (report, 1.0), (report, 1e6), (a_secure_report(), 1.0001)):
        (found,) = problems(with_factor(other, factor))
        assert found.where.endswith("noise_factor")


@pytest.mark.parametrize("overrides", [(), SECURE], ids=["plain", "secure"])
def test_the_site_s_report_has_its_noise_as_the_run_does(made: Callable[..., Path], overrides: tuple[str, ...]) -> None:
    folder = made(*overrides)
    own: Any = from_ledger.build(folder / "sites" / "site-1" / POLICY)
    ((run,), (site,)) = own.facts.runs, own.sites
    assert run.noise_factor == 1.5
    assert [row.noise_multiplier for row in site.mechanisms] == [run.plan.counted_noise]
    assert problems(own) == []
    signed = signing.signed(own, SigningKey.load(folder / "sites" / "site-1" / "site_key.pem"))
    joined = from_run.build(folder / "run", site_reports=[signed])
    assert (joined.sites[0].source, joined.sites[0].verdict.state) == ("signed_site_report", "within")
    assert problems(joined) == []
