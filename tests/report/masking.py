"""A report with everything masked that differs between two equal runs: times, keys, digests, versions, measurements."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from fedtune.report.model import Report, to_json

GOLDEN = Path(__file__).parent / "golden"
_TEXTS = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d"), "DAY"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "HASH"),
    (re.compile(r"\b(run|first|second)-[0-9a-f]{16,}\b"), r"\1-DIGEST"),
    (re.compile(r"\b[0-9a-f]{16}\b"), "KEY"),
    (re.compile(r"\bfedtune \d+(\.\w+)*"), "fedtune VERSION"),
    (re.compile(r"\b(dp-accounting|accuracy|macro_f1|auroc|ece|loss) [\d.]+"), r"\1 N"),
)
_MEASURED = {"seconds", "bytes_down", "bytes_up", "accuracy", "macro_f1", "auroc", "ece", "loss", "detail"}
_OF_THE_MACHINE = {"libraries", "python", "machine", "hardware", "fedtune_version"}


def masked(report: Report) -> Any:
    """Plain JSON; figures that follow from the settings stay, in six digits."""
    return _masked(to_json(report)["derived"], "")


def _masked(value: Any, key: str) -> Any:
    if key in _OF_THE_MACHINE and value:
        return "MACHINE"
    if key in _MEASURED and value is not None:
        return "N"
    if isinstance(value, dict):
        return {name: _masked(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, "") for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, str):
        for pattern, mask in _TEXTS:
            value = pattern.sub(mask, value)
    return value


def check_golden(name: str, found: Any) -> None:
    """Compare with `golden/<name>.json`; with FEDTUNE_WRITE_GOLDEN set, write it first, for a person to read."""
    path = GOLDEN / f"{name}.json"
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    if os.environ.get("FEDTUNE_WRITE_GOLDEN"):
        path.write_text(text)
    assert json.loads(text) == json.loads(path.read_text()), f"{name}: see docs of `check_golden` where this is meant"
