"""`audit.kind=sensitivity`: it finds nothing in a sound step, and each fault that lets a unit move a sum too far."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.data import Part
from fedtune.training import dp_step

from .conftest import Break

TRIES = 6


@pytest.fixture
def searched(command: Any, tiny: Any, tmp_path: Path) -> Callable[..., tuple[Any, dict[str, Any]]]:
    def run(*overrides: str) -> tuple[Any, dict[str, Any]]:
        settings = ("tracking=quiet", "audit.kind=sensitivity", f"audit.tries={TRIES}", *overrides)
        outcome = command("audit", *tiny(*settings, into=tmp_path, name="searched"), "--json")
        printed: dict[str, Any] = json.loads(outcome.out)["result"]
        assert json.loads((tmp_path / "searched" / "sensitivity.json").read_text()).items() >= printed.items()
        return outcome, printed

    return run


TRIPLETS = (
    *("experiment=own_pairs", "model=random_bert", "lora=all_linear", "data.train_file=x", "data.max_length=16"),
    *("data.columns={anchor: a, positive: b}", "data.pairs.negatives=[no, never]", "data.declared_sizes=20"),
)


PAIRS = (
    *("experiment=own_preferences", "model=random_llama", *TRIPLETS[2:5], "lora.layers=null"),
    *("data.columns={prompt: a, chosen: b, rejected: c}", "data.declared_sizes=20"),
)


@pytest.mark.nightly
@pytest.mark.parametrize("settings", [TRIPLETS, PAIRS], ids=["three texts", "a pair of answers"])
def test_a_record_of_several_texts_moves_a_step_by_one_clip_norm_at_most(
    searched: Any, settings: tuple[str, ...]
) -> None:
    outcome, found = searched(*settings)
    assert outcome.code == 0, outcome.err
    assert (found["tries"], found["exceeded"], found["others_moved"]) == (TRIES, 0, 0)
    assert 0.9 < found["moved"] <= 1.0


def test_a_record_whose_texts_are_clipped_one_by_one_is_found(searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = dp_step.add_clipped

    def of_each_text(sums: Any, gradients: Any, max_grad_norm: float) -> None:
        for _ in range(3):
            original(sums, gradients, max_grad_norm)

    monkeypatch.setattr(dp_step, "add_clipped", of_each_text)
    outcome, found = searched(*TRIPLETS)
    assert outcome.code == 1
    assert found["exceeded"] > 0


@pytest.mark.by_day("True")
@pytest.mark.parametrize("by_user", [False, True])
def test_a_sound_step_is_moved_by_one_clip_norm_at_most(searched: Any, by_user: bool) -> None:
    outcome, found = searched(*(("privacy.unit=user", "+data.columns.user=label") if by_user else ()))
    assert outcome.code == 0, outcome.err
    assert found["unit"] == ("user" if by_user else "record")
    assert (found["tries"], found["exceeded"], found["others_moved"]) == (TRIES, 0, 0)
    assert 0.9 < found["moved"] <= 1.0, "a search that comes nowhere near the bound shows nothing"


def test_a_missing_clip_is_found(searched: Any, break_it: Break) -> None:
    break_it("no clipping")
    outcome, found = searched()
    assert outcome.code == 1
    assert "no epsilon holds" in outcome.message
    assert found["exceeded"] > 0
    assert found["moved"] > 1


def test_users_whose_records_are_clipped_one_by_one_are_found(searched: Any, break_it: Break) -> None:
    break_it("clipping by record")
    outcome, found = searched("privacy.unit=user", "+data.columns.user=label")
    assert outcome.code == 1
    assert found["exceeded"] > 0


def test_padding_that_follows_the_company_is_found(searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records by length, padded to the longest of the micro-batch; a longer one moves the others' bits."""

    def cut(self: Any, places: Any, num_tokens: Any) -> Any:
        ordered = places[np.argsort(num_tokens[places], kind="stable")]
        for first in range(0, len(ordered), 5):
            some = ordered[first : first + 5]
            yield Part(some, len(some), int(num_tokens[some].max()))

    monkeypatch.setattr("fedtune.data.shapes.Shapes.cut", cut)
    outcome, found = searched()
    assert outcome.code == 1
    assert found["others_moved"] > 0


def test_a_unit_that_moves_the_others_is_found(searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that is scaled by how many take part: no single contribution is too long."""
    original = dp_step.add_clipped

    def scaled(sums: Any, gradients: Any, max_grad_norm: float) -> None:
        rows = next(iter(gradients.values())).shape[0]
        original(sums, {name: gradient / rows for name, gradient in gradients.items()}, max_grad_norm)

    monkeypatch.setattr(dp_step, "add_clipped", scaled)
    assert searched()[1]["others_moved"] > 0
