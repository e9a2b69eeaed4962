"""Sensitivity search: no violation in the correct step, and detection of injected faults."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.data import MicroBatch
from fedtune.training import dp_step

from .conftest import Break

TRIES = 6


@pytest.fixture
def run_search(command: Any, tiny: Any, tmp_path: Path) -> Any:
    def run(*overrides: str) -> tuple[Any, dict[str, Any]]:
        settings = ("tracking=quiet", "audit.kind=sensitivity", f"audit.tries={TRIES}", *overrides)
        outcome = command("audit", *tiny(*settings, into=tmp_path, name="searched"), "--json")
        printed: dict[str, Any] = json.loads(outcome.out)["result"]
        assert json.loads((tmp_path / "searched" / "sensitivity.json").read_text()).items() >= printed.items()
        return outcome, printed

    return run


TRIPLETS = (
    *("experiment=own_pairs", "model=random_bert", "lora=all_linear", "data.train_file=x", "data.max_length=16"),
    *("data.columns={anchor: a, positive: b}", "task_settings.negatives=[no, never]", "data.declared_sizes=20"),
)
PAIRS = (
    *("experiment=own_preferences", "model=random_llama", *TRIPLETS[2:5], "lora.layers=null"),
    *("data.columns={prompt: a, chosen: b, rejected: c}", "data.declared_sizes=20"),
)


BY_USER = ("privacy.unit=user", "+data.columns.user=label")


@pytest.mark.nightly
@pytest.mark.by_day("record", "user")
@pytest.mark.parametrize(
    "settings", [(), BY_USER, TRIPLETS, PAIRS], ids=["record", "user", "three texts", "a pair of answers"]
)
def test_sensitivity_search_finds_at_most_one_clip_norm(run_search: Any, settings: tuple[str, ...]) -> None:
    outcome, result = run_search(*settings)
    assert outcome.code == 0, outcome.err
    assert result["unit"] == ("user" if settings == BY_USER else "record")
    assert (result["tries"], result["exceeded"], result["others_moved"]) == (TRIES, 0, 0)
    assert 0.9 < result["moved"] <= 1.0, "a search that comes nowhere near the bound shows nothing"


def clip_each_text(sum_clipped: Any, gradients: Any, max_grad_norm: float) -> Any:
    return {name: 3 * total for name, total in sum_clipped(gradients, max_grad_norm).items()}


def scale_by_company(sum_clipped: Any, gradients: Any, max_grad_norm: float) -> Any:
    """Inject a fault: the sum is scaled by the number of units, although each contribution is clipped."""
    rows = next(iter(gradients.values())).shape[0]
    return sum_clipped({name: gradient / rows for name, gradient in gradients.items()}, max_grad_norm)


def pad_by_company(self: Any, places: Any, num_tokens: Any) -> Any:
    """Inject a fault: padding to the longest record of the micro-batch changes the rounding of other records."""
    ordered = places[np.argsort(num_tokens[places], kind="stable")]
    for first in range(0, len(ordered), 5):
        some = ordered[first : first + 5]
        yield MicroBatch(some, len(some), int(num_tokens[some].max()))


@pytest.mark.by_day("no clipping-settings0-exceeded", "scale_by_company-settings3-others_moved")
@pytest.mark.parametrize(
    ("fault", "settings", "shown"),
    [
        ("no clipping", (), "exceeded"),
        ("clipping by record", BY_USER, "exceeded"),
        (clip_each_text, TRIPLETS, "exceeded"),
        (scale_by_company, (), "others_moved"),
        (pad_by_company, (), "others_moved"),
    ],
)
def test_sensitivity_search_detects_each_fault(
    run_search: Any, inject_fault: Break, monkeypatch: Any, fault: Any, settings: tuple[str, ...], shown: str
) -> None:
    if isinstance(fault, str):
        inject_fault(fault)
    elif fault is pad_by_company:
        monkeypatch.setattr("fedtune.data.shapes.Shapes.cut", fault)
    else:
        monkeypatch.setattr(dp_step, "sum_clipped", partial(fault, dp_step.sum_clipped))
    outcome, result = run_search(*settings)
    assert result[shown] > 0
    assert outcome.code == 1
    assert "does not hold on this machine" in outcome.message
    assert (result["moved"] > 1) == (shown == "exceeded")
