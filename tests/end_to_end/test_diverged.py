"""A run whose training came to nothing says so at its end, in run.json and in its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_a_rate_that_is_far_too_high_is_told_with_lower_ones(
    command: Any, tiny: Any, tmp_path: Path, result_of: Any
) -> None:
    chosen = ("training.learning_rate=1e9", "federation.num_rounds=1", "data.test_rows=40")
    outcome = command("simulate", *tiny(*chosen, into=tmp_path))
    assert outcome.code == 0, outcome.err
    assert "Training diverged: do not use this adapter." in outcome.out
    assert "training.learning_rate=3.3e+08" in outcome.out
    assert result_of(tmp_path / "run")["final"]["findings"] == ["diverged"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())["derived"]
    assert report["utility"]["findings"] == ["diverged"]
    assert "Training diverged. This adapter should not be used" in (tmp_path / "run" / "report.html").read_text()
    assert command("report", "verify", str(tmp_path / "run")).code == 0
