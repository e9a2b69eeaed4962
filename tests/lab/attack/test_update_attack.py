"""The attack on one update: as strong as the best one, never above the guarantee, and blind to equal records."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.lab.attack import known_attacks
from fedtune.lab.attack.known_attacks import (
    CandidateGradients,
    compute_candidate_gradients,
    describe_picked_records,
)
from fedtune.lab.audit.record_attack import estimate_share
from fedtune.model.ranks import cut_to_rank
from fedtune.privacy.dp_library import GaussianDpEvent
from fedtune.report.derive import profile

from ...conftest import run_plan

CANDIDATES, TRIALS = 50, 4000


def make_gradients(*, norm: float = 1.0, width: int = 400, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(CANDIDATES, width))
    return norm * rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("noise", [0.3, 0.7, 2.0])
def test_picks_reach_the_direct_attack_and_stay_below_the_guarantee(noise: float) -> None:
    rows, draws = make_gradients(), np.random.default_rng(1)
    picked = CandidateGradients(rows @ rows.T).count_picked(noise, draws, trials=TRIALS)
    secrets = draws.integers(CANDIDATES, size=TRIALS)
    releases = rows[secrets] + noise * draws.normal(size=(TRIALS, rows.shape[1]))
    direct = np.argmax(releases @ rows.T, axis=1)  # all gradients have one length
    low, high = estimate_share(int((direct == secrets).sum()), TRIALS, confidence=0.9999)[1:]
    assert low <= picked / TRIALS <= high, "noise by its products is the noise of the release"
    ceiling = profile.bound_hit_rate({GaussianDpEvent(noise): 1}, false_positive_rate=1 / CANDIDATES)
    assert ceiling is not None
    assert estimate_share(picked, TRIALS, confidence=0.9999)[1] <= ceiling
    assert picked / TRIALS > 0.5 * ceiling, "the ceiling is near the best attack"


def test_clipping_shortens_long_gradients_alone() -> None:
    rows = np.concatenate([make_gradients(norm=5.0)[:25], make_gradients(norm=0.5)[:25]])
    clipped = CandidateGradients(rows @ rows.T).clip(1.0)
    assert np.sqrt(np.diag(clipped.products)) == pytest.approx([1.0] * 25 + [0.5] * 25)
    assert clipped.products[0, 30] == pytest.approx(rows[0] @ rows[30] / 5)


def test_equal_records_and_much_noise_cannot_be_picked() -> None:
    rows = make_gradients()
    assert CandidateGradients(rows @ rows.T).count_distinct() == CANDIDATES
    rows[1] = rows[0]
    twice = CandidateGradients(rows @ rows.T)
    assert twice.count_distinct() == CANDIDATES - 2
    assert twice.count_picked(1e-6, np.random.default_rng(0), trials=TRIALS) < TRIALS
    blind = twice.count_picked(1e3, np.random.default_rng(0), trials=TRIALS)
    low, high = estimate_share(blind, TRIALS, confidence=0.9999)[1:]
    assert low <= 1 / CANDIDATES <= high


def test_attack_on_sites_of_different_ranks_describes_the_most_exposed_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {1: make_gradients(norm=0.01), 4: make_gradients()}
    monkeypatch.setattr(
        known_attacks,
        "compute_candidate_gradients",
        lambda target, rank: CandidateGradients(rows[rank or 4] @ rows[rank or 4].T),
    )

    def describe(*ranks: int | None) -> Any:
        federation = SimpleNamespace(site_ranks=dict(zip("abc", ranks, strict=True)))
        target: Any = SimpleNamespace(config=SimpleNamespace(federation=federation, seed=0))
        return describe_picked_records(target, run_plan())

    weak, mixed, whole = describe(1, 1, 1), describe(1, 4, 1), describe(None, None, None)
    assert "in a step of a site of rank 1, and" in weak.sentence
    assert "in a step of a site of rank 4, and" in mixed.sentence
    assert "in a step, and" in whole.sentence
    assert weak.strength < mixed.strength == whole.strength
    assert mixed.low < whole.low < whole.high < mixed.high, "the interval pays for the selection"


class ModelWithUnitGradients:
    """A model of rank 4 whose gradients are ones, in the part that trains."""

    def __init__(self) -> None:
        self.device, self.rank = "cpu", None
        self.shapes = {"b.lora_A.weight": (4, 3), "b.lora_B.weight": (2, 4), "head.weight": (5,)}
        lengths = np.ones(3, dtype=np.int64)
        self.task = SimpleNamespace(tokenize=lambda *_, **__: SimpleNamespace(lengths=lengths))

    def trainable(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    @contextmanager
    def freeze_tensors(self, names: frozenset[str], *, rank: Any) -> Iterator[None]:
        self.rank = rank
        yield

    def compute_gradients(self, count: int) -> dict[str, torch.Tensor]:
        whole = {name: torch.ones(count, *shape) for name, shape in self.shapes.items()}
        return cut_to_rank(whole, self.rank, axis=1)


def test_candidate_gradients_have_only_the_values_that_a_site_of_the_rank_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = ModelWithUnitGradients()
    tokenizer = SimpleNamespace(pad_token_id=0)
    saved = SimpleNamespace(model=model, tokenizer=tokenizer, use_adapter=lambda name: None)
    config = SimpleNamespace(seed=0, data=None)
    target: Any = SimpleNamespace(saved=saved, config=config, members={"a": ["one", "two", "three"]})
    monkeypatch.setattr(known_attacks, "record_gradients", nullcontext)
    monkeypatch.setattr(known_attacks, "collate", lambda _, part, **__: SimpleNamespace(to=lambda device: len(part)))
    for rank, values in ((1, 3 + 2 + 5), (3, 9 + 6 + 5), (4, 12 + 8 + 5), (None, 12 + 8 + 5)):
        picked = compute_candidate_gradients(target, rank=rank).products
        assert picked.tolist() == [[values] * 3] * 3, rank
