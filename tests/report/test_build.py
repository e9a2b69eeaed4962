from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

from fedtune.cli.compose import compose_run
from fedtune.config import RunConfig
from fedtune.privacy import events
from fedtune.report.build import report_html, report_json, write_report

_SITE = {
    "epsilon": 7.5,
    "epsilon_rdp": 8.6,
    "rounds": 2,
    "steps": 4,
    "sampling_rate": 0.2,
    "noise_multiplier": 0.66,
    "metrics_noise_multiplier": 0.0,
    "upper_bound": False,
}
_RUN: dict[str, Any] = {
    "config_sha256": "00",
    "rounds": [{"round": 1, "metrics": {"loss": 0.5}}],
    "final": {"metrics": {"accuracy": 0.5}, "metrics_before": {"accuracy": 0.25}},
    "privacy": {
        "unit": "record",
        "neighbouring_relation": "add_or_remove_one",
        "delta": 1e-5,
        "epsilon": 7.5,
        "seeded_noise": False,
        "sites": {"site-1": _SITE, "site-2": _SITE},
    },
}


@pytest.fixture
def config(tiny: Any, tmp_path: Path) -> RunConfig:
    return compose_run(tiny("data.declared_sizes=[80,90]", into=tmp_path))


@pytest.fixture
def run() -> dict[str, Any]:
    return copy.deepcopy(_RUN)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "WITHIN"),
        ({"epsilon": 8.0}, "WITHIN"),
        ({"epsilon": 8.0001}, "EXCEEDED"),
        ({"epsilon": None}, "NO GUARANTEE"),
        ({"seeded_noise": True}, "NO GUARANTEE"),
        ({"seeded_noise": True, "epsilon": 9.0}, "NO GUARANTEE"),
    ],
)
def test_the_verdict(config: RunConfig, run: dict[str, Any], changes: dict[str, Any], state: str) -> None:
    run["privacy"] |= changes
    report = report_json(config, run)
    assert report["verdict"]["state"] == state
    assert report["verdict"]["why"]


def test_the_promise_names_unit_epsilon_and_delta(config: RunConfig, run: dict[str, Any]) -> None:
    promise = report_json(config, run)["promise"]
    for part in ("one record", "e^7.500", "1e-05"):
        assert part in promise


def test_nothing_is_promised_without_an_epsilon(config: RunConfig, run: dict[str, Any]) -> None:
    run["privacy"]["epsilon"] = None
    assert report_json(config, run)["promise"] is None


def test_each_sites_event_can_be_recomputed(config: RunConfig, run: dict[str, Any]) -> None:
    report = report_json(config, run)
    assert {site: fields["declared_size"] for site, fields in report["sites"].items()} == {"site-1": 80, "site-2": 90}
    assert report["sites"]["site-1"]["event"] == {
        "kind": "self_composed",
        "count": 4,
        "event": {
            "kind": "poisson_sampled",
            "sampling_probability": 0.2,
            "event": {"kind": "gaussian", "noise_multiplier": 0.66},
        },
    }


def test_the_scores_of_held_out_records_are_in_the_event(tiny: Any, run: dict[str, Any], tmp_path: Path) -> None:
    noised = ("privacy.metrics=noised", "privacy.metrics_noise_multiplier=20", "data.heldout_fraction=0.2")
    report = report_json(compose_run(tiny(*noised, into=tmp_path)), run)
    event = events.from_json(report["sites"]["site-1"]["event"])
    assert events.grouped([event]) == {
        PoissonSampledDpEvent(0.2, GaussianDpEvent(0.66)): 4,
        GaussianDpEvent(20.0): 2,
    }
    assert "noised scores" in report["releases"]


def test_limits_and_scores_are_there(config: RunConfig, run: dict[str, Any]) -> None:
    report = report_json(config, run)
    assert any("validation and test files" in text for text in report["not_protected"])
    assert any("other runs" in text for text in report["accountant"]["composition_leaves_out"])
    assert report["utility"] == {
        "rounds": [{"round": 1, "loss": 0.5}],
        "final": {"accuracy": 0.5},
        "before": {"accuracy": 0.25},
    }
    assert report["provenance"]["libraries"].keys() >= {"opacus", "torch", "dp-accounting"}


class Page(HTMLParser):
    """Collects texts, and fails on tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_shows_the_sites(config: RunConfig, run: dict[str, Any]) -> None:
    page = Page()
    page.feed(report_html(report_json(config, run)))
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe"}
    text = " ".join(page.texts)
    for part in ("site-1", "7.5", "8.6", "0.66", "accuracy", "0.5000", "Not protected"):
        assert part in text


def test_the_page_escapes_what_it_shows(config: RunConfig, run: dict[str, Any]) -> None:
    report = report_json(config, run)
    report["run"] = "<script>alert(1)</script>"
    report["sites"] = {"<b>": report["sites"]["site-1"]}
    page = report_html(report)
    assert "<script" not in page
    assert "<b>" not in page


@pytest.mark.parametrize("epsilon", [7.5, None])
def test_a_score_that_diverged_does_not_break_the_report(
    config: RunConfig, run: dict[str, Any], tmp_path: Path, epsilon: float | None
) -> None:
    run["final"]["metrics"] = {"accuracy": 0.5, "loss": None}
    for site in run["privacy"]["sites"].values():
        site["epsilon"] = epsilon
    write_report(tmp_path, config, run)
    assert json.loads((tmp_path / "report.json").read_text())["utility"]["final"]["loss"] is None
    assert "not finite" in (tmp_path / "report.html").read_text()


def test_a_seeded_study_promises_nothing(config: RunConfig, run: dict[str, Any]) -> None:
    run["privacy"]["seeded_noise"] = True
    report = report_json(config, run)
    assert report["promise"] is None
    assert "at most a factor of" not in report_html(report)


def test_a_shown_epsilon_is_rounded_up(config: RunConfig, run: dict[str, Any]) -> None:
    run["privacy"]["epsilon"] = 1.2341
    for spent in run["privacy"]["sites"].values():
        spent["epsilon"] = 1.2341
    page = report_html(report_json(config, run))
    assert "e^1.235" in page
    assert "1.234<" not in page
