"""Requirements of documents beside a report: whole as data, and each answer goes when its fact goes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import AboutSpec
from fedtune.report import requirements, signing
from fedtune.report.attacks import AttackFinding, RunAttacks
from fedtune.report.derive import dpia_fields
from fedtune.report.derive.dpia_fields import BY_DESIGN, FIELDS
from fedtune.report.facts import Verification
from fedtune.report.gate_verdict import GateVerdict
from fedtune.report.model import Report
from fedtune.report.requirements import answer_requirement, collect_known_facts, map_report, read_map, render_map
from fedtune.report.signing import compute_report_digest
from fedtune.runs.cost import Energy

from .shown import build_reports, change_facts, load_report_on_file, make_site_key, parse_page

MAPS = ("satre", "edpb-28", "sp800-226", "art-35", "annex-xi")
ABOUT = {field.name: f"the {field.name}" for field in fields(AboutSpec)}
KEYS = {"text", "facts", "design", "stated", "person"}
REQUIREMENTS = [(name, number) for name in MAPS for number in read_map(name)["requirement"]]
NEVER_KNOWN = {"energy_kwh", "total_parameters", "training_flops"}  # facts that the report on file does not hold


def make_verdict(report: Report, **changes: Any) -> GateVerdict:
    rules = ("ledgers", "max_audit_bound", "max_group_gap")
    given: dict[str, Any] = {
        "schema_version": 1,
        "fedtune_version": "0",
        "judged": "2026-11-29",
        "run": "r",
        "adapter_digest": "00",
    }
    given |= {"report_sha256": compute_report_digest(report), "simulated": False, "rules": "tre", "rules_sha256": "00"}
    given |= {"limits": dict.fromkeys(rules, "1"), "results": dict.fromkeys(rules, "passed")}
    return GateVerdict(**given | {"reasons": {rule: f"what {rule} found" for rule in rules}} | changes)


@pytest.fixture(scope="module")
def report() -> Report:
    """A run that has every fact on record, also figures of its sites over all their runs."""
    report = build_reports()["site_reports"]
    known = load_report_on_file("run")().known | report.known | {"seconds": 9.0, "parameters_per_record": 3.5}
    known |= {"columns_used": ("text",), "rank": "4", "target_modules": ("query",)}
    known |= {"labels": 3, "most_tokens": 16, "heldout_fraction": 0.1}
    report = replace(report, cells=dpia_fields.build_cells(known))
    return change_facts(report, energy=Energy(kwh=0.5, carbon_kg=None, seconds=9.0))


def test_requirement_maps_contain_numbers_texts_and_known_facts() -> None:
    cell_facts = {fact for field in FIELDS.values() for fact in field["facts"]}
    for name in MAPS:
        document = read_map(name)
        assert document["title"]
        assert document["version"]
        assert "in our own words" in document["source"]
        for number, requirement in document["requirement"].items():
            assert requirement.keys() <= KEYS, number
            assert requirement["text"].endswith("."), number
            assert requirement.keys() > {"text"}, f"{number} has no answer"
            assert set(requirement.get("facts", ())) <= cell_facts | requirements.LABELS.keys(), number
            assert set(requirement.get("stated", ())) <= ABOUT.keys(), number


def test_requirement_for_technical_controls_refers_to_the_gate() -> None:
    requirement = read_map("satre")["requirement"]["3.3.07"]
    assert "which technical controls are required" in requirement["text"]
    assert "gate" in requirement["facts"]


def list_answers(*given: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(entry["state"], entry["about"], entry["text"]) for entry in answer_requirement(*given)]


@pytest.mark.parametrize(("name", "number"), REQUIREMENTS)
def test_removing_a_fact_changes_only_its_answer_to_missing(name: str, number: str) -> None:
    asked = read_map(name)["requirement"][number]
    known = {fact: f"the {fact}" for fact in asked.get("facts", ())}
    whole = list_answers(asked, known, ABOUT)
    assert [answer for answer in whole if answer[0] == "missing"] == []
    for index, fact in enumerate(known):
        assert whole[index] == ("design" if fact in BY_DESIGN else "auto", fact, f"the {fact}")
        without = list_answers(asked, {key: known[key] for key in known if key != fact}, ABOUT)
        assert without[index] == ("missing", fact, "")
        assert [*without[:index], *without[index + 1 :]] == [*whole[:index], *whole[index + 1 :]]
    for field in asked.get("stated", ()):
        ref = ("site", f"report.about.{field}", f"the {field}")
        assert ref in whole
        silent = list_answers(asked, known, ABOUT | {field: " "})
        assert [one for one in silent if one not in whole] == [("site", f"report.about.{field}", "")]


def test_every_required_fact_can_be_derived_from_a_report(report: Report) -> None:
    asked = {fact for name in MAPS for one in read_map(name)["requirement"].values() for fact in one.get("facts", ())}
    assert asked - collect_known_facts(sign(report), make_verdict(sign(report))).keys() == NEVER_KNOWN


def sign(report: Report) -> Report:
    return signing.sign_report(report, make_site_key("lead"))


@pytest.mark.parametrize(
    ("fact", "change"),
    [
        ("lifetime", lambda report: change_first_fact(report, statement=None)),
        ("model_files", lambda report: change_facts(report, files={})),
        ("report_signature", lambda report: replace(report, signature=None)),
        ("base_model_license", lambda report: remove_cells(report, "base_model_license")),
        ("epsilon", lambda report: remove_cells(report, "epsilon")),
        ("extraction", lambda report: remove_cells(report, "epsilon")),
        ("seconds", lambda report: remove_cells(report, "seconds")),
    ],
)
def test_missing_report_values_are_not_collected_as_known_facts(fact: str, change: Any, report: Report) -> None:
    assert fact in collect_known_facts(sign(report), None)
    assert fact not in collect_known_facts(change(sign(report)), None)


def test_every_fact_in_a_cell_flips_its_answers_when_it_is_removed(report: Report) -> None:
    asked = {fact for name in MAPS for one in read_map(name)["requirement"].values() for fact in one.get("facts", ())}
    signed = sign(report)
    known, in_cells = collect_known_facts(signed, None), sorted(asked & signed.known.keys())
    assert len(in_cells) > 30
    for fact in in_cells:
        gone = known.keys() - collect_known_facts(remove_cells(signed, fact), None).keys()
        assert gone == {fact, *(("extraction",) if fact == "epsilon" else ())}


def change_first_fact(report: Report, **changes: Any) -> Report:
    first, *rest = report.facts.sites  # type: ignore[union-attr]
    return change_facts(report, sites=(replace(first, **changes), *rest))


def remove_cells(report: Report, fact: str) -> Report:
    return replace(report, cells=dpia_fields.build_cells({k: v for k, v in report.known.items() if k != fact}))


@pytest.mark.parametrize(
    ("fact", "rule"),
    [("ledger_check", "ledgers"), ("attack_results", "max_audit_bound"), ("group_results", "max_group_gap")],
)
def test_gate_results_answer_requirements_only_after_evaluation(fact: str, rule: str, report: Report) -> None:
    report = remove_cells(report, fact)
    known = collect_known_facts(report, make_verdict(report))
    assert known[fact] == f"what {rule} found"
    assert "the model may be released (rules tre, 2026-11-29, not signed)" in known["gate"]
    unjudged = make_verdict(report, results=dict.fromkeys(make_verdict(report).results, "missing"))
    assert fact not in collect_known_facts(report, unjudged)
    assert "these rules fail: ledgers, max_audit_bound" in collect_known_facts(report, unjudged)["gate"]
    for verdict in (None, make_verdict(report, report_sha256="00")):
        assert {"gate", fact} & collect_known_facts(report, verdict).keys() == set(), "of no report, or of another"


def test_attacks_in_a_report_answer_without_a_verdict(report: Report) -> None:
    finding = AttackFinding(
        attack="membership", measure="auroc", sentence="It picks 52 of 100.", strength=0.52, low=0.5, high=0.54
    )
    fields = {"run": "r", "adapter_sha256": "00", "epsilon": 1.0, "delta": 1e-5, "confidence": 0.95, "seconds": 1.0}
    attacked = change_facts(report, attacks=RunAttacks(**fields, findings=(finding,)))
    assert collect_known_facts(attacked, None)["attack_results"] == finding.sentence
    expected = collect_known_facts(attacked, make_verdict(attacked))["attack_results"]
    assert expected == f"{finding.sentence} what max_audit_bound found"


def test_ledger_report_answers_requirements() -> None:
    report = build_reports()["ledger"]
    known = collect_known_facts(report, None)
    assert report.facts.site in known["lifetime"]  # type: ignore[union-attr]
    assert "ledger_check" in known
    unverified = change_facts(report, verification=None)
    assert "ledger_check" not in collect_known_facts(unverified, None)
    assert isinstance(report.facts.verification, Verification)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MAPS)
def test_json_markdown_and_html_have_the_same_answers(name: str, report: Report) -> None:
    mapped = map_report(name, report, AboutSpec(curator="A hospital", access="<b>all</b>"), None)
    files = render_map(mapped, name="run <1>")
    assert set(files) == {f"map_{name}.{ending}" for ending in ("json", "md", "html")}
    output = json.loads(files[f"map_{name}.json"])
    assert output == mapped
    page, text = parse_page(files[f"map_{name}.html"].decode()), files[f"map_{name}.md"].decode()
    answers = [answer for entry in output["requirements"] for answer in entry["answers"]]
    assert len(page.all("dd")) == len(answers)
    states = [{answer["state"] for answer in entry["answers"]} for entry in output["requirements"]]
    for state in ("auto", "design", "site", "missing"):
        assert len(page.all("div", **{"class": f"cell {state}"})) == sum(state in entry for entry in states)
    assert all(answer["text"] in page.said for answer in answers)
    assert text.count("\n- **") == len(answers)
    assert "<b>" not in text
    assert [entry.said for entry in page.all("h4")] == [entry["number"] for entry in output["requirements"]]
    assert asdict(AboutSpec()).keys() >= {"access", "acceptable_use", "channel"}


def test_terminal_table_shows_every_answer_with_its_state(report: Report) -> None:
    mapped = map_report("annex-xi", report, AboutSpec(acceptable_use="Research alone"), None)
    rows = [row for row in requirements.build_map_section(mapped).rows if row[0] == ""]
    assert ("", "person", "report.about.acceptable_use: Research alone") in rows
    assert ("", "PERSON", "report.about.channel") in rows
    assert ("", "MISSING", "Upper estimate of floating-point operations in training (6 N D)") in rows
    assert len(rows) == sum(len(entry["answers"]) for entry in mapped["requirements"])


def test_requirement_maps_match_the_files_in_the_maps_folder() -> None:
    assert {path.stem for path in Path(requirements.__file__).with_name("maps").iterdir()} == set(MAPS)
