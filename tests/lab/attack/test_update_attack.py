"""The attack on one update: as strong as the best one, never above the guarantee, and blind to equal records."""

import numpy as np
import pytest

from fedtune.lab.attack.known_attacks import CandidateGradients
from fedtune.lab.audit.record_attack import estimate_share
from fedtune.privacy.dp_library import GaussianDpEvent
from fedtune.report.derive import profile

CANDIDATES, TRIALS = 50, 4000


def make_gradients(*, norm: float = 1.0, width: int = 400, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(CANDIDATES, width))
    return norm * rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("noise", [0.3, 0.7, 2.0])
def test_picks_reach_the_direct_attack_and_stay_below_the_guarantee(noise: float) -> None:
    rows, draws = make_gradients(), np.random.default_rng(1)
    found = CandidateGradients(rows @ rows.T).count_picked(noise, draws, trials=TRIALS)
    secrets = draws.integers(CANDIDATES, size=TRIALS)
    releases = rows[secrets] + noise * draws.normal(size=(TRIALS, rows.shape[1]))
    direct = np.argmax(releases @ rows.T, axis=1)  # all gradients have one length
    low, high = estimate_share(int((direct == secrets).sum()), TRIALS, confidence=0.9999)[1:]
    assert low <= found / TRIALS <= high, "noise by its products is the noise of the release"
    ceiling = profile.bound_hit_rate({GaussianDpEvent(noise): 1}, false_alarms=1 / CANDIDATES)
    assert ceiling is not None
    assert estimate_share(found, TRIALS, confidence=0.9999)[1] <= ceiling
    assert found / TRIALS > 0.5 * ceiling, "the ceiling is near the best attack"


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
