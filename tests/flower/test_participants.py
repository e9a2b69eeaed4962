"""What one process shares between virtual sites, and what it keeps apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedtune.flower.participants as participants
from fedtune.cli.compose import compose_run
from fedtune.config import RunConfig
from fedtune.flower.participants import Participants
from fedtune.spec import ConfigError


@pytest.fixture
def config(tiny: Any, tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda *overrides: compose_run(tiny(*overrides, into=tmp_path))


def test_there_is_one_base_model_whatever_the_number_of_sites(
    simulate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    build = participants.build_task_model

    def spy(*arguments: Any, **rest: Any) -> Any:
        built.append(build(*arguments, **rest))
        return built[-1]

    monkeypatch.setattr(participants, "build_task_model", spy)
    simulate("federation.num_sites=6", "privacy=none", into=tmp_path)
    assert len(built) == 1


def test_every_record_lies_at_exactly_one_site(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def sizes(sites: int) -> list[tuple[int, int]]:
        everyone = Participants(config(f"federation.num_sites={sites}"), tmp_path)
        return [(len(data), data.num_tokens) for data in everyone.site_data.values()]

    parts, (whole,) = sizes(4), sizes(1)
    assert len(parts) == 4
    assert min(parts) > (10, 0)
    assert tuple(map(sum, zip(*parts, strict=True))) == whole


def test_each_site_has_a_ledger_of_its_own(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    everyone = Participants(config(), tmp_path)
    for index in (0, 1):
        everyone.site(index)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("ledger.jsonl")) == [
        "sites/site-1/ledger.jsonl",
        "sites/site-2/ledger.jsonl",
    ]


def test_no_lead_files_are_no_scores(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    everyone = Participants(config("data.validation_file=null", "data.test_file=null"), tmp_path)
    assert everyone.validation is None
    assert everyone.score(everyone.initial_adapter, everyone.test) == {}


def test_longer_texts_than_the_model_has_positions_for(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length = 513: must be at most the model's 512"):
        Participants(config("data.max_length=513"), tmp_path)
