"""Distributions of the cryptographic stream, each by a test that also rejects a plausible mistake.

Streams are seeded here, so every test decides the same way each time; the stated error rates say how surprising
another outcome would have been.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

import fedtune.privacy
import fedtune.training
from fedtune.privacy.randomness import Randomness, RandomStream, SeededRandomness, SystemRandomness

COUNT = 100_000
ONCE_IN_A_MILLION = 1e-6


def stream(*purpose: str | int) -> RandomStream:
    return SeededRandomness(2024).stream(*purpose)


def test_the_stream_is_the_aes_256_ctr_keystream_of_its_key() -> None:
    key = bytes(range(32))
    reference = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    one = RandomStream(key)
    drawn = np.concatenate([one.uniform64(3), one.uniform64(0), one.uniform64(7)])
    assert drawn.astype("<u8").tobytes() == reference


def test_each_of_the_64_bits_is_fair() -> None:
    words = stream("bits").uniform64(COUNT)
    ones = np.array([np.sum((words >> np.uint64(bit)) & np.uint64(1)) for bit in range(64)])
    # 64 two-sided tests at 1e-6 each.
    assert (2 * stats.norm.sf(np.abs(ones - COUNT / 2) / np.sqrt(COUNT / 4)) > ONCE_IN_A_MILLION).all()


def test_bytes_are_uniform() -> None:
    counts = np.bincount(stream("bytes").uniform64(COUNT).view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > ONCE_IN_A_MILLION


@pytest.mark.parametrize("rate", [0.001, 0.2, 0.5, 0.999])
def test_bernoulli_has_its_rate_and_not_another(rate: float) -> None:
    successes = int(stream("bernoulli", str(rate)).bernoulli(COUNT, rate).sum())
    assert stats.binomtest(successes, COUNT, rate).pvalue > ONCE_IN_A_MILLION
    if rate >= 0.2:
        assert stats.binomtest(successes, COUNT, 0.9 * rate).pvalue < ONCE_IN_A_MILLION


def test_bernoulli_ends() -> None:
    assert stream("ends").bernoulli(1000, 1.0).all()
    assert not stream("ends").bernoulli(1000, 0.0).any()
    assert stream("ends").bernoulli(0, 0.5).shape == (0,)
    assert stream("ends").bernoulli(1000, 1 - 2**-53).all()


def looks_standard_normal(values: npt.NDArray[np.float64]) -> bool:
    """Mean, variance, kurtosis and the whole distribution, each at one in a million."""
    n = values.size
    mean = 2 * stats.norm.sf(abs(values.mean()) * np.sqrt(n))
    below = stats.chi2.cdf(np.sum(values**2), df=n)
    return bool(
        min(
            mean,
            2 * min(below, 1 - below),
            stats.kurtosistest(values).pvalue,
            stats.kstest(values, "norm").pvalue,
        )
        > ONCE_IN_A_MILLION
    )


def test_normal_values_are_standard_normal() -> None:
    assert looks_standard_normal(stream("normal").normal(COUNT))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda values: 1.1 * values,
        lambda values: 0.9 * values,
        lambda values: values + 0.03,
        lambda values: np.clip(values, -2.5, 2.5),  # cut tails
        lambda values: np.sign(values) * np.abs(values) ** 1.05,
    ],
)
def test_the_same_test_rejects_wrong_noise(wrong: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> None:
    assert not looks_standard_normal(wrong(stream("normal").normal(COUNT)))


def test_normal_values_do_not_follow_from_their_neighbours() -> None:
    values = stream("lags").normal(COUNT)
    for lag in (1, 2, 3, 4):
        for change in (lambda x: x, np.square):  # values and their sizes
            left, right = change(values[:-lag]), change(values[lag:])
            assert stats.pearsonr(left, right).pvalue > ONCE_IN_A_MILLION


def test_normal_values_keep_their_tails() -> None:
    # 53-bit uniforms reach 8.6 sigma; of 100,000 values some 6.3 should pass 4 sigma.
    beyond = int((np.abs(stream("tails").normal(COUNT)) > 4).sum())
    assert stats.binomtest(beyond, COUNT, 2 * stats.norm.sf(4)).pvalue > ONCE_IN_A_MILLION


def test_normal_values_survive_the_ends_of_the_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [0, 2**64 - 1]
    monkeypatch.setattr(RandomStream, "uniform64", lambda _, n: np.resize(np.array(ends, dtype=np.uint64), n))
    assert np.isfinite(stream("ends").normal(8)).all()


def test_a_normal_value_is_a_sum_of_several_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = RandomStream.uniform64

    def counted(self: RandomStream, count: int) -> npt.NDArray[np.uint64]:
        drawn.append(count)
        return original(self, count)

    monkeypatch.setattr(RandomStream, "uniform64", counted)
    stream("sum").normal(10)
    assert sum(drawn) >= 40, "fewer than four uniform words a value: open to floating-point attacks"


def test_a_stream_moves_on() -> None:
    one = stream("on")
    assert not np.array_equal(one.normal(8), one.normal(8))


def test_system_streams_differ_whatever_their_purpose() -> None:
    source = SystemRandomness()
    assert not source.seeded
    draws = {tuple(source.stream("site", 1, 1, "noise").uniform64(4).tolist()) for _ in range(50)}
    assert len(draws) == 50


def test_system_keys_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def urandom(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    monkeypatch.setattr("fedtune.privacy.randomness.os.urandom", urandom)
    drawn = SystemRandomness().stream("noise").uniform64(4)
    assert asked == [32], "256 bits for each stream"
    np.testing.assert_array_equal(drawn, RandomStream(bytes(range(32))).uniform64(4))


PURPOSE = ("bank_a", 3, 1, "noise")
OTHERS: list[tuple[str | int, ...]] = [
    ("bank_b", 3, 1, "noise"),
    ("bank_a", 4, 1, "noise"),
    ("bank_a", 3, 2, "noise"),
    ("bank_a", 3, 1, "sampling"),
    ("bank_a", 31, "noise"),
    ("bank_a3", 1, "noise"),
    ("bank_a", 3, 1, "noise", ""),
]


def test_seeded_streams_repeat() -> None:
    source: Randomness = SeededRandomness(7)
    assert source.seeded, "the run must be marked"
    np.testing.assert_array_equal(source.stream(*PURPOSE).uniform64(9), source.stream(*PURPOSE).uniform64(9))


@pytest.mark.parametrize("other", OTHERS)
def test_seeded_streams_differ_by_purpose(other: tuple[str | int, ...]) -> None:
    source = SeededRandomness(7)
    assert not np.array_equal(source.stream(*PURPOSE).uniform64(9), source.stream(*other).uniform64(9))


def test_seeds_keep_all_their_bits() -> None:
    # torch's CPU generator gives the same draws for these two.
    left, right = (SeededRandomness(seed).stream(*PURPOSE).uniform64(9) for seed in (7, 2**40 + 7))
    assert not np.array_equal(left, right)


# Any of these in the source would mean a generator that is no CSPRNG.
GENERATORS = {
    "random", "default_rng", "RandomState", "Generator", "PCG64", "manual_seed", "randn", "rand", "randint",
    "normal_", "bernoulli_", "uniform_", "randn_like", "rand_like", "randperm", "multinomial", "fork_rng",
}  # fmt: skip


def generators_in(source: str) -> set[str]:
    """Names of generators that a module imports, or reaches as an attribute."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found & GENERATORS


SOURCES = [
    path
    for package in (fedtune.privacy, fedtune.training)
    for path in sorted(Path(str(package.__file__)).parent.glob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=[f"{path.parent.name}/{path.name}" for path in SOURCES])
def test_no_generator_of_torch_or_numpy_is_near_privacy(path: Path) -> None:
    assert not generators_in(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from numpy.random import default_rng",
        "import numpy as np\nx = np.random.normal(0, 1, 3)",
        "import torch\nx = torch.randn(3)",
        "import torch\ng = torch.Generator()",
        "import torch\nx = torch.empty(3).normal_()",
    ],
)
def test_that_search_finds_generators(source: str) -> None:
    assert generators_in(source)
