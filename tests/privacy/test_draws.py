"""How many independent draws stand behind one noise value, by moving each draw in turn."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.privacy.randomness import RandomStream, SeededRandomness

COUNT = 10


def values_of(words: npt.NDArray[np.uint64], monkeypatch: pytest.MonkeyPatch) -> npt.NDArray[np.float64]:
    """The noise values that a stream makes of these words."""
    left = iter(words)
    monkeypatch.setattr(
        RandomStream, "uniform64", lambda _, count: np.array([next(left) for _ in range(count)], dtype=np.uint64)
    )
    values = RandomStream(bytes(32)).normal(COUNT)
    assert next(left, None) is None, "every word is used"
    return values


def test_a_value_has_eight_words_behind_it_and_shares_no_pair_s_sine_and_cosine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four Box-Muller pairs: a sine and a cosine of the same pair would add up to one draw in disguise."""
    words = SeededRandomness(1).stream("draws").uniform64(4 * COUNT)
    before = values_of(words, monkeypatch)
    behind = np.zeros((len(words), COUNT), dtype=np.bool_)  # which word moves which value
    for place in range(len(words)):
        moved = words.copy()
        moved[place] ^= np.uint64(1 << 60)
        behind[place] = values_of(moved, monkeypatch) != before
    assert (behind.sum(axis=0) == 8).all()
    assert (behind.sum(axis=1) == 2).all(), "each word's pair gives one value its cosine and another its sine"
