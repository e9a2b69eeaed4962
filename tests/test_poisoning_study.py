"""The poisoning study runs on few records, resumes after an interruption, and distinguishes its aggregation rules."""

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import REPOSITORY

SIZES = ("--each", "80", "--tested", "40", "--steps", "2")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script's namespace; it counts letters instead of running a model on texts."""
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    names = runpy.run_path(str(REPOSITORY / "simulations" / "poisoning" / "run.py"))

    def embed(texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.count(letter) for letter in "aeiortn z"] for text in texts], dtype=float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True).clip(1)

    monkeypatch.setitem(names["prepare_files"].__globals__, "embed", embed)
    return names


def test_poisoning_study_resumes_and_refuses_updates_beyond_the_plan(study: dict[str, Any], tmp_path: Path) -> None:
    folders = ("--runs", str(tmp_path / "runs"), "--into", str(tmp_path))
    study["main"]([*SIZES, *folders, "--only", "average-scale"])
    study["main"]([*SIZES, *folders, "--only", "average-scale", "no_privacy-backdoor", "--missing"])
    lines = json.loads((tmp_path / "results.json").read_text())["lines"]
    assert list(lines) == ["no_privacy-backdoor", "average-scale"]
    scaled, planted = lines["average-scale"], lines["no_privacy-backdoor"]
    assert scaled["refused_rounds"] >= 1
    assert (planted["refused_rounds"], planted["rounds"]) == (0, 2)


def test_poisoned_rows_differ_from_honest_ones_as_named(study: dict[str, Any]) -> None:
    labels, target = ["a", "b", study["TARGET"]], study["TARGET"]
    rows = [("one", "a"), ("two", target)]
    assert study["poison"](rows, "flip", labels) == [("one", "b"), ("two", "a")]
    assert study["poison"](rows, "backdoor", labels) == [("one", "a"), ("two" + study["TRIGGER"], target)]
