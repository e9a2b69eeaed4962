"""Which words of the keystream stand behind which noise value, by moving each word in turn."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.privacy.randomness import RandomStream, SeededRandomness

COUNT = 10


def values_of(words: npt.NDArray[np.uint64], monkeypatch: pytest.MonkeyPatch) -> npt.NDArray[np.int64]:
    """The noise values that a stream makes of these words."""
    left = iter(words)
    monkeypatch.setattr(
        RandomStream, "uniform64", lambda _, count: np.array([next(left) for _ in range(count)], dtype=np.uint64)
    )
    values = RandomStream(bytes(32)).rounded_normal(COUNT, 2.0**24)
    assert next(left, None) is None, "every word is used"
    return values


def test_a_value_has_two_words_behind_it_that_it_shares_with_the_other_of_its_pair_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sine and the cosine of a Box-Muller pair are independent; a third value of the same words would not be."""
    words = SeededRandomness(1).stream("draws").uniform64(COUNT)
    before = values_of(words, monkeypatch)
    behind = np.zeros((len(words), COUNT), dtype=np.bool_)  # which word moves which value
    for place in range(len(words)):
        moved = words.copy()
        moved[place] ^= np.uint64(1 << 60)
        behind[place] = values_of(moved, monkeypatch) != before
    assert (behind.sum(axis=0) == 2).all()
    assert (behind.sum(axis=1) == 2).all(), "each word moves the cosine and the sine of its pair"
    pairs = {tuple(np.flatnonzero(row)) for row in behind.T}
    assert len(pairs) == COUNT // 2


def test_every_bit_that_can_matter_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value as fine as this one moves with all but the lowest bits of its words: no draw is cut to 32 or 53 bits."""
    words = np.array(
        [1 << 40 | 1 << 30, 3 << 40, 5 << 40, 7 << 40, 9 << 40, *[0x9E3779B97F4A7C15] * 5], dtype=np.uint64
    )
    before = values_of(words, monkeypatch)
    for bit in range(22, 64):
        moved = words.copy()
        moved[0] ^= np.uint64(1 << bit)
        assert values_of(moved, monkeypatch)[0] != before[0], bit
