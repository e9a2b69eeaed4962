"""The run folders that fedtune 0.1.0 left behind are read, verified, reported and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy.ledger.verify import verify

LEFT = Path(__file__).parents[1] / "deploy" / "fixtures" / "fedtune-0.1.0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run that was interrupted after two of three rounds."""
    return Path(shutil.copytree(LEFT / "run", tmp_path / "run"))


@pytest.fixture
def audited(tmp_path: Path) -> Path:
    """A copy of the audit, of which no checkpoint is left."""
    return Path(shutil.copytree(LEFT / "audited", tmp_path / "audited"))


def figures(folder: Path) -> Any:
    """What a report says of the guarantee, whatever words and cells a newer version adds."""
    report = json.loads((folder / "report.json").read_text())
    sites = [{key: site[key] for key in ("site", "spent", "verdict", "steps", "releases")} for site in report["sites"]]
    kept = ("kind", "name", "verdict", "unit", "delta", "epsilon", "randomness", "released", "utility", "audit")
    return rounded({key: report[key] for key in kept} | {"sites": sites})


def rounded(value: Any) -> Any:
    """Without the last digits of numbers, in which transforms of two processors differ."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["run", "audited"])
def test_its_report_is_verified_and_written_again_with_the_same_figures(
    name: str, command: Any, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    verified = command("report", "verify", str(folder / "report.json"))
    assert verified.code == 0, verified.err
    before = figures(folder)
    written = command("report", str(folder))
    assert written.code == 0, written.err
    assert figures(folder) == before


def test_its_ledgers_are_whole(run: Path, command: Any) -> None:
    receipts = json.loads((run / "sites" / "receipts.json").read_text())
    for site in ("site-1", "site-2"):
        path = run / "sites" / site / "ledger.db"
        assert command("ledger", "verify", str(path)).code == 0
        history = verify(path, site_key=receipts[site]["site_key"]).history
        assert [known.charged_rounds for known in history.runs.values()] == [2]


def test_it_is_resumed_to_its_end(run: Path, command: Any, result_of: Any) -> None:
    before = result_of(run)
    resumed = command("simulate", f"resume={run}")
    assert resumed.code == 0, resumed.err
    assert "resuming after round 2" in resumed.out
    after = result_of(run)
    assert after["rounds"][:2] == before["rounds"]
    assert [entry["round"] for entry in after["rounds"]] == [1, 2, 3]
    assert after["final"]["metrics_before"] == before["final"]["metrics_before"]
    spent = after["privacy"]["sites"].values()
    assert [(site["steps"], site["upper_bound"]) for site in spent] == [(6, False), (6, False)]


def test_its_mark_of_an_audit_counts_and_its_adapter_is_read(audited: Path, command: Any) -> None:
    rows = audited.parent / "rows.jsonl"
    rows.write_text(json.dumps({"text": "where is my card", "label": "card_arrival"}) + "\n")
    assert "is an audit" in command("evaluate", str(audited), "--data", str(rows)).message
    (audited / "AUDIT.txt").unlink()
    scored = command("evaluate", str(audited), "--data", str(rows))
    assert scored.code == 0, scored.err
