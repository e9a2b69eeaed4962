"""`fedtune audit`: invalid settings, findings and files."""

from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.cli.audit import audit
from fedtune.evaluation import audit_bound
from fedtune.lab.audit.findings import show_findings
from fedtune.lab.audit.spec import AuditSpec, parse_audit_spec
from fedtune.report.derive.verdicts import list_refuted_bounds
from fedtune.report.facts import Audit, AuditBound
from fedtune.spec import ConfigError

from ..conftest import list_tiny_overrides, run_command
from . import snapshots


@snapshots.parametrize_mistakes("mistakes-audit")
def test_invalid_audit_settings_are_refused_without_creating_a_folder(typed: str, tmp_path: Path) -> None:
    message = run_command("audit", *list_tiny_overrides("tracking=quiet", *typed.split(), into=tmp_path)).failed()
    snapshots.check_message("mistakes-audit", typed, message)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_audit_cannot_resume_a_run(finished_run: Path) -> None:
    assert (
        "must be null: an audit always starts from the beginning"
        in run_command("audit", f"resume={finished_run}").failed()
    )
    assert not (finished_run / "AUDIT.txt").exists()


def test_audit_settings_are_parsed_from_overrides() -> None:
    assert parse_audit_spec([]) == AuditSpec()
    spec = parse_audit_spec(["audit.kind=records", "+audit.canaries=50", "audit.guesses=null", "audit.sites=[a,b]"])
    assert spec == AuditSpec(kind="records", canaries=50, sites=("a", "b"))
    with pytest.raises(ConfigError, match=r"audit\.non_members"):
        parse_audit_spec(["audit.non_members=1"])
    assert all(f"audit.{field.name}" in (audit.__doc__ or "") for field in fields(AuditSpec)), "the help names each"


def bound_site(site: str | None, right: int) -> AuditBound:
    bounds = [audit_bound.compute_epsilon_lower_bound(200, 200, v, delta=1e-5, confidence=0.95) for v in (right, 200)]
    figures = {"lower_bound": bounds[0], "best_possible": bounds[1], "canaries": 200, "guesses": 200, "correct": right}
    return AuditBound(site=site, claimed_epsilon=0.5, **figures)


def build_finding(folder: Path, *bounds: AuditBound, width: int = 200) -> tuple[Audit, str]:
    """Return an audit with these bounds, and its printed findings."""
    fields: dict[str, Any] = {"method": "gradient_canaries", "confidence": 0.95, "delta": 1e-5, "seeded": False}
    result = Audit(**fields, bounds=bounds, membership=(), exceeded=False)
    result, output = replace(result, exceeded=bool(list_refuted_bounds(result))), StringIO()
    show_findings(Console(file=output, width=width), result, folder)
    return result, output.getvalue()


def test_audit_findings_fit_a_narrow_terminal(tmp_path: Path) -> None:
    bounds = (bound_site("north-hospital", 190), bound_site("south-hospital", 110), bound_site(None, 150))
    result, output = build_finding(tmp_path, *bounds, width=snapshots.COLUMNS)
    assert (result.exceeded, "north-hospital" in output) == (True, True)
    assert snapshots.find_wide_lines(output) == []


def test_audit_verdict_corrects_for_multiple_bounds(tmp_path: Path) -> None:
    """Uncorrected, one of six correct sites would be refuted in every fourth audit; corrected, in one of twenty."""
    above = next(correct for correct in range(100, 200) if bound_site("a", correct).lower_bound > 0.5)
    alone, output = build_finding(tmp_path, bound_site("a", above))
    assert (alone.exceeded, "wrong" in output) == (True, True)
    six, output = build_finding(tmp_path, bound_site("a", above), *(bound_site(f"b{n}", 100) for n in range(5)))
    assert (six.exceeded, list_refuted_bounds(six)) == (False, ())
    assert "The bound at a exceeds its claim on its own, but so little that it may be chance" in output
    assert "No bound is above its claim" not in output
    others, output = build_finding(tmp_path, bound_site("a", 200), *(bound_site(f"b{n}", above) for n in range(5)))
    assert [bound.site for bound in list_refuted_bounds(others)] == ["a"]
    assert "At a the attack shows" in output
