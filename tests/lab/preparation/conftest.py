"""Fixtures: experiments on small files with random models, and generated tables."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.lab.preparation.detect import detect_columns
from fedtune.lab.preparation.detected_file import DetectedFile

TEAMS = ("billing", "sales")
AB, YES_NO = ("a", "b"), ("yes", "no", "maybe")
ASK, SAY = {"role": "user", "content": "where?"}, {"role": "assistant", "content": "here"}
TURNS = [ASK, SAY]


def make_own_text(number: int) -> str:
    """Return a text that is unique to a row."""
    return f"a text of its own, with number {number} in it"


def repeat_texts(count: int, prefix: str = "p") -> Callable[[int], str]:
    """Return a column that cycles through a number of texts, such as person ids."""
    return lambda number: f"{prefix}{number % count}"


def make_rows(columns: Mapping[str, Any], count: int = 60) -> list[dict[str, Any]]:
    """Generate rows from columns: a function of the row number, a tuple to cycle through, or a constant."""

    def pick_value(given: Any, number: int) -> Any:
        if callable(given):
            return given(number)
        return given[number % len(given)] if isinstance(given, tuple) else given

    return [{name: pick_value(given, number) for name, given in columns.items()} for number in range(count)]


def detect_in_file(folder: Path, columns: Mapping[str, Any] | list[dict[str, Any]], **chosen: str) -> DetectedFile:
    """Detect the kind and roles of a file with these columns or rows."""
    rows = columns if isinstance(columns, list) else make_rows(columns)
    (folder / "rows.json").write_text(json.dumps(rows))
    return detect_columns(folder / "rows.json", chosen)


def summarize_found(detected: DetectedFile) -> str:
    """Summarize a detection: kind, roles with differing column names, and unused columns."""
    roles = " ".join(role if role == column else f"{role}={column}" for role, column in detected.roles.items())
    unread = " ".join(column for column, reason in detected.unread if reason)
    return f"{detected.kind}: {roles}" + (f"; not {unread}" if unread else "")


@pytest.fixture
def tickets(tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that creates an experiment on labeled texts from CSV lines."""

    def make(*rows: str, overrides: tuple[str, ...] = ()) -> RunConfig:
        (tmp_path / "tickets.csv").write_text("\n".join(["body,team", *rows]) + "\n", encoding="utf-8")
        return compose_run(
            [
                *("experiment=own_data", f"data.train_file='{tmp_path / 'tickets.csv'}'"),
                *("data.columns={text: body, label: team}", f"data.labels=[{','.join(TEAMS)}]"),
                *("data.declared_sizes=10", "federation.num_sites=2", "model=random_bert"),
                *overrides,
            ]
        )

    return make
