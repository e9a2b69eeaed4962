"""A report with everything masked that differs between two equal runs: times, keys, digests, versions, measurements."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune.report.model import Report, to_json

GOLDEN = Path(__file__).parent / "golden"
BASES = {"run": "within", "ledger": "two_runs"}
"""Reports that golden files hold whole, by kind; of the others they hold what differs from these."""
ABSENT = "absent"
_TEXTS = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d"), "DAY"),
    (re.compile(r"\b[0-9a-f]{128}\b"), "SIGNATURE"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "HASH"),
    (re.compile(r"\b([0-9a-f]{4} ){4}\.\.\."), "KEY"),
    (re.compile(r"\b(run|first|second)-[0-9a-f]{16,}\b"), r"\1-DIGEST"),
    (re.compile(r"\b[0-9a-f]{16}\b"), "KEY"),
    (re.compile(r"\bfedtune \d+(\.\w+)*"), "fedtune VERSION"),
    (re.compile(r"\b(dp-accounting|accuracy|macro_f1|auroc|ece|loss) [\d.]+"), r"\1 N"),
)
_NAMES = ("code", "state", "kind", "reason", "delta", "operating_point")
"""Keys that tell the parts of a list apart."""
_MEASURED = {"seconds", "bytes_down", "bytes_up", "constant", "accuracy", "macro_f1", "auroc", "ece", "loss", "detail"}
_SHOWN_BY_FIGURES = {"plan", "runs", "charges", "caps", "reference", "settings"}
_OF_THE_MACHINE = {"libraries", "python", "machine", "hardware", "fedtune_version"}


def mask_report(report: Report) -> Any:
    """Plain JSON without facts that figures show anyway; figures that follow from the settings stay, in six digits."""
    all_parts = to_json(report)
    facts = {name: fact for name, fact in all_parts["facts"].items() if name not in _SHOWN_BY_FIGURES}
    return _mask_value(all_parts | {"facts": facts}, "")


def _mask_value(value: Any, key: str) -> Any:
    if key in _OF_THE_MACHINE and value:
        return "MACHINE"
    if key in _MEASURED and value is not None:
        return "N"
    if isinstance(value, dict):
        return {name: _mask_value(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_mask_value(item, "") for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, str):
        for pattern, mask in _TEXTS:
            value = pattern.sub(mask, value)
    return value


def _list_parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        names = ["-".join(str(part[key]) for key in _NAMES if part.get(key) is not None) for part in value]
        names = [name if name and names.count(name) == 1 else str(n) for n, name in enumerate(names)]
        value = dict(zip(names, value, strict=True))
    if isinstance(value, dict) and any(isinstance(part, dict | list) for part in value.values()):
        for name, part in value.items():
            yield from _list_parts(part, f"{path}/{name}")
    else:
        yield path, value


def read_golden(name: str) -> dict[str, Any]:
    """The parts of a golden report; cells stand in the bases alone."""
    actual = json.loads((GOLDEN / f"{name}.json").read_text())
    if (base := BASES[actual["/facts/kind"]]) == name:
        return actual
    all_parts = {path: part for path, part in read_golden(base).items() if not path.startswith("/cells/")} | actual
    return {path: part for path, part in all_parts.items() if part != ABSENT}


def check_golden(name: str, report: Report) -> None:
    """Compare with `golden/<name>.json`; with FEDTUNE_WRITE_GOLDEN set, write it first, for a person to read."""
    actual, base = dict(_list_parts(mask_report(report), "")), BASES[report.facts.kind]
    if name != base:
        actual = {path: part for path, part in actual.items() if not path.startswith("/cells/")}
    if os.environ.get("FEDTUNE_WRITE_GOLDEN"):
        of_base = read_golden(base) if name != base else {}
        changed = {
            path: part for path, part in actual.items() if path == "/facts/kind" or of_base.get(path, ABSENT) != part
        }
        missing = {path for path in of_base.keys() - actual.keys() if not path.startswith("/cells/")}
        lines = (
            f" {json.dumps(key)}: {json.dumps(part)}"
            for key, part in sorted((changed | dict.fromkeys(missing, ABSENT)).items())
        )
        (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    golden = read_golden(name)
    differing = {key: (actual.get(key, ABSENT), golden.get(key, ABSENT)) for key in actual.keys() | golden}
    differ = {key: values for key, values in differing.items() if values[0] != values[1]}
    assert differ == {}, f"{name}: FEDTUNE_WRITE_GOLDEN=1 writes it where this is meant"
