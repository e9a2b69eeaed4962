"""Snapshots of command output, one file per command, with varying values masked.

FEDTUNE_WRITE_SNAPSHOTS=1 writes them anew; the difference is then read before it is committed.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import fedtune

from ..conftest import REPOSITORY

FOLDER = Path(__file__).parent / "snapshots"
COLUMNS = 80
"""Terminal width that output must fit."""
_COPIED = re.compile(r"[^\s]*(?:/|[0-9a-f]{32,})[^\s]*")
_VARYING = (
    (re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)?)?"), "<time>"),
    (re.compile(r"\b[0-9a-f]{64,}\b|\b(?:[0-9a-f]{4} ){15}[0-9a-f]{4}\b"), "<hex>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<hex>"),
    (re.compile(rf"^{re.escape(fedtune.__version__)}$"), "<version>"),
)
# In text each letter keeps its place, so that columns stay as wide as they are.
_VARYING_LETTERS = re.compile(
    r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?)?"  # dates
    r"|\b[0-9a-f]{4}(?: [0-9a-f]{4})+\b"  # keys as they are read out
    r"|\b[0-9a-f]{64,}\b|\b[0-9a-f]{8,16}\.\.\."  # keys and hashes, whole and cut
)


def find_wide_lines(text: str) -> list[str]:
    """Return the lines wider than the terminal, except for lines with an unbreakable path, key or hash."""
    return [line for line in text.splitlines() if len(_COPIED.sub(lambda match: match[0][:20], line)) > COLUMNS]


def check_text(name: str, text: str) -> None:
    """Compare `text` with the snapshot `name`, or write the snapshot if the environment variable is set."""
    path = FOLDER / name
    if os.environ.get("FEDTUNE_WRITE_SNAPSHOTS"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing: FEDTUNE_WRITE_SNAPSHOTS=1 writes it"
    assert text == path.read_text(encoding="utf-8")


def check_output(name: str, text: str) -> None:
    """Compare terminal output with a snapshot, and check that it fits a narrow terminal."""
    assert os.environ["COLUMNS"] != str(COLUMNS) or find_wide_lines(re.sub(r"(?m)^\$ .*", "", text)) == []
    check_text(f"{name}.txt", _VARYING_LETTERS.sub(lambda match: re.sub(r"\w", "x", match[0]), text))


def check_json(name: str, text: str, *, folder: Path) -> None:
    """Compare a command's JSON output with a snapshot; paths below `folder` are masked."""
    masked = _mask_value(json.loads(text), str(folder))
    check_text(f"{name}.json", json.dumps(masked, indent=1) + "\n")


def parametrize_mistakes(name: str) -> pytest.MarkDecorator:
    """Parametrize a test by the invalid command lines of a snapshot file, which start with `$`."""
    lines = re.findall(r"^\$ (.*)$", (FOLDER / f"{name}.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return pytest.mark.parametrize("typed", lines, ids=lambda line: line[:60])


def check_message(name: str, typed: str, message: str) -> None:
    """Compare an error message with the snapshot for its command line, or update the snapshot."""
    path = FOLDER / f"{name}.txt"
    before, line, rest = path.read_text(encoding="utf-8").partition(f"$ {typed}\n")
    expected, _, after = rest.partition("\n")
    for place, mask in ((REPOSITORY, "REPOSITORY"), (Path.cwd(), "HERE")):
        message = message.replace(str(place), mask)
    message = re.sub(r"/\S*/pytest-\d+/(popen-gw\d+/)?[^/]+", "MADE", message)  # a test's or a module's own folder
    message = _VARYING_LETTERS.sub(lambda match: re.sub(r"\w", "x", match[0]), message)
    if os.environ.get("FEDTUNE_WRITE_SNAPSHOTS"):
        path.write_text(f"{before}{line}{message}\n{after}", encoding="utf-8")
    else:
        assert message == expected


def _mask_value(value: Any, folder: str) -> Any:
    """Mask paths, keys, hashes and times in a value, and round numbers to six digits."""
    if isinstance(value, dict):
        return {key: _mask_value(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mask_value(inner, folder) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, str):
        masked = value.replace(folder, "<folder>")
        for pattern, mask in _VARYING:
            masked = pattern.sub(mask, masked)
        return masked
    return value
