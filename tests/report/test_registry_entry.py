"""An entry for a public registry: what the report says, and what a person said, or the name of what nobody did."""

import dataclasses
import hashlib
import json
from typing import Any

import pytest

from fedtune.config import AboutSpec
from fedtune.report import registry_entry as registry
from fedtune.report import signing
from fedtune.report.model import Report
from fedtune.report.page.translations import load_catalog

from .shown import NAMES, build_reports, iter_leaves

ASKED = {field.name for field in dataclasses.fields(AboutSpec)}
ANSWERS = AboutSpec(**{name: f"the answer for {name}" for name in ASKED})


@pytest.fixture(params=NAMES)
def report(request: pytest.FixtureRequest) -> Report:
    return build_reports()[request.param]


def list_values(part: Any) -> list[Any]:
    return [value for _, value in iter_leaves(part)]


def test_unanswered_registry_fields_are_empty_and_listed_as_missing(report: Report) -> None:
    full, entry = registry.build_registry_entry(report, ANSWERS), registry.build_registry_entry(report, AboutSpec())
    assert full["missing"] == []
    assert set(dataclasses.asdict(ANSWERS).values()) <= set(list_values(full))
    assert set(entry["missing"]) == ASKED
    assert list_values(entry).count("") - list_values(full).count("") == len(ASKED)
    assert registry.build_registry_entry(report, AboutSpec(sector=" "))["missing"] == entry["missing"], (
        "a blank says nothing"
    )


def test_registry_entry_figures_match_the_report(report: Report) -> None:
    entry = registry.build_registry_entry(report, AboutSpec())
    promised = report.verdict.state != "no_guarantee" and report.epsilon is not None
    assert entry["privacy"]["epsilon"] == (report.epsilon if promised else None)
    assert (entry["privacy"]["delta"], entry["privacy"]["sites"]) == (report.facts.delta, len(report.sites))
    rows = [row for site in report.sites for row in site.mechanisms]
    assert {(one["sampling_rate"], one["noise_multiplier"]) for one in entry["privacy"]["mechanisms"]} == {
        (row.sampling_rate, row.noise_multiplier) for row in rows
    }
    words = load_catalog("en")
    assert entry["accounting"]["leaves_out"] == [words.code("leaves_out", key).unescape() for key in report.leaves_out]
    assert len(entry["not_protected"]) == len(report.not_protected)
    assert entry["privacy"]["holds_for"].startswith("a simulation") == ("simulation" in report.banners)
    assert entry["report_sha256"] == hashlib.sha256(signing.report_to_json(report).encode()).hexdigest()
    text = registry.registry_entry_to_json(report, ANSWERS)
    assert json.loads(text) == registry.build_registry_entry(report, ANSWERS)


def test_registry_entry_of_a_noiseless_run_names_no_mechanism() -> None:
    entry = registry.build_registry_entry(build_reports()["unbounded"], ANSWERS)
    assert {used["name"] for used in entry["privacy"]["mechanisms"]} == {"none"}
    assert "adds no noise" in entry["privacy"]["model"]
