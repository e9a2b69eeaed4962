"""Cells of an impact assessment: who fills which, and that nothing legal is filled by fedtune."""

import re
from pathlib import Path

import pytest

from fedtune.report import from_run
from fedtune.report.derive import dpia_fields
from fedtune.report.model import Report

from ..conftest import simulate

# REPORT: purpose, legal basis, necessity, rights, retention and every judgment are the site's own.
LEGAL = {"purpose", "legal_basis", "retention", "claim", "judgment", "determination", "legal_role", "high_risk_class"}


@pytest.fixture(params=["run_report", "ledger_report"])
def report(request: pytest.FixtureRequest) -> Report:
    return request.getfixturevalue(request.param)


def list_facts(report: Report, state: str) -> dict[str, dict[str, str]]:
    return {code: dict(states[state]) for code, states in report.cells.items() if state in states}


def test_report_contains_every_dpia_field_and_names_site_inputs(report: Report) -> None:
    assert report.cells.keys() == dpia_fields.FIELDS.keys()
    for code, field in dpia_fields.FIELDS.items():
        states = report.cells[code]
        assert list(states["site"]) == field["of_the_site"]
        known_names = {name for state in ("auto", "design", "missing") for name in states.get(state, ())}
        assert set(field["facts"]) - set(dpia_fields.OPTIONAL) <= known_names <= set(field["facts"])
        # Only what fedtune knows has a value.
        for state, names in states.items():
            known_names = state in ("auto", "design")
            assert all((value is not None) == known_names for value in names.values()), (code, state)


def test_legal_fields_are_never_filled_by_fedtune() -> None:
    by_fedtune = {name for field in dpia_fields.FIELDS.values() for name in field["facts"]}
    by_the_site = {name for field in dpia_fields.FIELDS.values() for name in field["of_the_site"]}
    assert by_the_site >= LEGAL
    assert not by_fedtune & by_the_site
    assert by_fedtune.isdisjoint(LEGAL)
    # A fact that no cell shows is our mistake.
    with pytest.raises(AssertionError, match="no cell shows"):
        dpia_fields.build_cells({"weather": "fine"})
    assert dpia_fields.build_cells({"unit": "record"})["dpia_description"]["auto"] == {"unit": "record"}


def test_dpia_values_contain_no_prose_or_legal_claims(report: Report) -> None:
    for values in list_facts(report, "auto").values():
        for name, value in ((name, str(value)) for name, value in values.items()):
            assert not re.search("anonym|complian|lawful|gdpr|hipaa|impossible", value, re.IGNORECASE), name
            assert not value.endswith("."), "a sentence"
    by_design = {name: value for fact in list_facts(report, "design").values() for name, value in fact.items()}
    assert by_design == dict(dpia_fields.BY_DESIGN)
    assert by_design["raw_records_leave_site"] == "no"
    assert not {name for fact in list_facts(report, "auto").values() for name in fact} & by_design.keys()


def test_run_without_noise_has_unbounded_dpia_values(tmp_path: Path) -> None:
    auto = list_facts(from_run.build_run_report(simulate("privacy=none", into=tmp_path)), "auto")
    assert (auto["dpia_risks"]["epsilon"], auto["dpia_risks"]["correct_of_100_ceiling"]) == ("unbounded", 100.0)
    assert auto["wp216_tests"]["singling_out_bound"] == 100.0
    assert auto["ico_pets"] == {
        "technologies_on": ("federated_learning",),
        "technologies_off": ("secure_aggregation", "differential_privacy"),
    }
    assert "correct_of_100_mechanism" not in auto["dpia_risks"]
