"""From scores to guesses."""

import numpy as np
import pytest

from fedtune.audit.guesses import by_likelihood, by_rank, counted


def test_the_surest_are_guessed_and_counted() -> None:
    evidence = np.array([5.0, -4.0, 3.0, -0.1, 0.2])
    inserted = np.array([True, False, False, True, True])
    count = counted(evidence, inserted, guesses=3)
    assert (count.canaries, count.guesses, count.right) == (5, 3, 2)


def test_evidence_follows_the_exact_likelihood_ratio() -> None:
    """Of one step that draws every canary: a normal against a shifted one."""
    generator = np.random.default_rng(3)
    controls = generator.normal(size=200_000)
    inserted = generator.random(20_000) < 0.5
    scores = 3.0 * inserted + generator.normal(size=20_000)
    evidence = by_likelihood(scores, controls, steps=1, sampling_rate=1.0)
    assert evidence == pytest.approx(3 * scores - 4.5, abs=0.4)


@pytest.mark.parametrize("draw", [1.0, 1000.0])
def test_without_noise_every_guess_is_right_whatever_a_draw_adds(draw: float) -> None:
    """Also of a canary that was drawn once where most were drawn often."""
    generator = np.random.default_rng(4)
    inserted = generator.random(5000) < 0.5
    drawn = np.maximum(1, generator.binomial(50, 0.1, size=5000)) * inserted
    rounding = 1e-6 * draw * generator.normal(size=6000)
    evidence = by_likelihood(draw * drawn + rounding[:5000], rounding[5000:], steps=50, sampling_rate=0.1)
    assert counted(evidence, inserted, guesses=5000).right == 5000


def test_scores_that_say_nothing_are_guessed_at_random() -> None:
    generator = np.random.default_rng(5)
    noise, inserted = generator.normal(size=(2, 4000)), generator.random(4000) < 0.5
    right = counted(by_likelihood(noise[0], noise[1], steps=4, sampling_rate=0.2, least=1.0), inserted, guesses=4000)
    assert abs(right.right - 2000) < 5 * np.sqrt(1000)


def test_ranks_lie_around_the_median() -> None:
    assert by_rank(np.array([7.0, -1.0, 3.0, 3.5])).tolist() == [1.5, -1.5, -0.5, 0.5]
