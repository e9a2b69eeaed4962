"""Experiments over small files, with models that are drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig

TEAMS = ("billing", "sales")


@pytest.fixture
def tickets(tmp_path: Path) -> Callable[..., RunConfig]:
    """An experiment over texts with a label, each a line of CSV."""

    def make(*rows: str, overrides: tuple[str, ...] = ()) -> RunConfig:
        (tmp_path / "tickets.csv").write_text("\n".join(["body,team", *rows]) + "\n", encoding="utf-8")
        return compose_run(
            [
                "experiment=own_data",
                f"data.train_file='{tmp_path / 'tickets.csv'}'",
                "data.columns={text: body, label: team}",
                f"data.labels=[{','.join(TEAMS)}]",
                "data.declared_sizes=10",
                "federation.num_sites=2",
                "model=random_bert",
                *overrides,
            ]
        )

    return make
