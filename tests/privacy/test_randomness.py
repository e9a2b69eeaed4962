"""The stream's distributions; each deterministic test also rejects a plausible mistake."""

import ast
import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

import fedtune.privacy
import fedtune.training
from fedtune.privacy.randomness import Randomness, RandomStream, SeededRandomness, SystemRandomness, _apply_box_muller

from .exact_sums import passes_chi_square

COUNT = 100_000
ONCE_IN_A_MILLION = 1e-6


def stream(*purpose: str | int) -> RandomStream:
    return SeededRandomness(2024).stream(*purpose)


def test_random_stream_is_the_aes_256_ctr_keystream() -> None:
    key = bytes(range(32))
    reference = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    stream_one = RandomStream(key)
    words = np.concatenate([stream_one.uniform64(3), stream_one.uniform64(0), stream_one.uniform64(7)])
    assert words.astype("<u8").tobytes() == reference


@pytest.mark.parametrize("rate", [0.001, 0.2, 0.5, 0.999])
def test_bernoulli_draws_have_the_requested_rate(rate: float) -> None:
    successes = int(stream("bernoulli", str(rate)).bernoulli(COUNT, rate).sum())
    assert stats.binomtest(successes, COUNT, rate).pvalue > ONCE_IN_A_MILLION
    if rate >= 0.2:
        assert stats.binomtest(successes, COUNT, 0.9 * rate).pvalue < ONCE_IN_A_MILLION


def test_bernoulli_handles_extreme_rates_and_zero_draws() -> None:
    assert stream("ends").bernoulli(1000, 1.0).all()
    assert not stream("ends").bernoulli(1000, 0.0).any()
    assert stream("ends").bernoulli(0, 0.5).shape == (0,)
    assert stream("ends").bernoulli(1000, 1 - 2**-53).all()


@pytest.mark.parametrize("deviation", [0.3, 1.0, 3.0])
def test_rounded_normal_has_exact_cell_probabilities_at_small_deviations(deviation: float) -> None:
    values = stream("cells", str(deviation)).draw_rounded_normal(COUNT, deviation)
    assert values.dtype == np.int64
    assert passes_chi_square(values, deviation)
    assert not passes_chi_square(values, 0.9 * deviation)
    assert not passes_chi_square(values, 1.1 * deviation)


def test_rounded_normal_is_zero_without_deviation() -> None:
    assert not stream("nothing").draw_rounded_normal(1001, 0.0).any()
    extremes = make_fixed_stream(0, 2**64 - 1, 1, 0, 2**64 - 1, 5, *[7] * 100)
    assert not extremes.draw_rounded_normal(6, 0.0).any()


class Fed(RandomStream):
    """Returns the given words, then those of a keystream, and records them all.

    Attributes:
        drawn: every word.
        further: the words drawn later for each pair that was in doubt.
    """

    def __init__(self, words: Sequence[int], then: RandomStream) -> None:
        self._words, self._then = list(words), then
        self.drawn: list[int] = []
        self.further: dict[tuple[int, int], list[int]] = {}

    def _round_exactly(self, radius_bits: int, angle_bits: int, deviation: float) -> tuple[int, int]:
        before = len(self.drawn)
        rounded = super()._round_exactly(radius_bits, angle_bits, deviation)
        self.further[radius_bits, angle_bits] = self.drawn[before:]
        return rounded

    def uniform64(self, count: int) -> npt.NDArray[np.uint64]:
        taken_words, self._words = self._words[:count], self._words[count:]
        further = self._then.uniform64(count - len(taken_words)).tolist()
        self.drawn += [*taken_words, *further]
        return np.array([*taken_words, *further], dtype=np.uint64)


def make_fixed_stream(*words: int) -> Fed:
    return Fed(words, stream("fed"))


def transform_pair(radius: Fraction, angle: Fraction, *, precision: int) -> tuple[mpmath.mpf, mpmath.mpf]:
    """The Box-Muller transform of two exact numbers, implemented independently of the package."""
    with mpmath.workprec(precision):
        length = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(radius.numerator) / radius.denominator))
        turn = 2 * mpmath.pi * angle.numerator / angle.denominator
        return length * mpmath.cos(turn), length * mpmath.sin(turn)


def round_pair(words: Sequence[int], deviation: float) -> tuple[int, int]:
    """Round a pair, using all words drawn for it: two at first, and two more each time it was in doubt."""
    radius, angle = words[0], words[1]
    for first in range(2, len(words), 4):
        radius = radius << 128 | words[first] << 64 | words[first + 1]
        angle = angle << 128 | words[first + 2] << 64 | words[first + 3]
    denominator = 2 ** (64 + 128 * ((len(words) - 2) // 4) + 1)  # midpoint of the remaining interval
    pair = transform_pair(Fraction(2 * radius + 1, denominator), Fraction(2 * angle + 1, denominator), precision=1200)
    with mpmath.workprec(1200):
        cosine, sine = (int(mpmath.floor(deviation * stream_one + mpmath.mpf(1) / 2)) for stream_one in pair)
    return cosine, sine


@pytest.mark.parametrize("deviation", [1e-3, 0.3, 1.0, 37.5, 2.0**24, 1.3e9, 1e12])
def test_rounded_normal_matches_exact_arithmetic_on_the_same_bits(deviation: float) -> None:
    stream_one = make_fixed_stream()
    rounded = stream_one.draw_rounded_normal(400, deviation).reshape(2, 200)
    for index, pair in enumerate(zip(stream_one.drawn[:200], stream_one.drawn[200:400], strict=True)):
        assert tuple(rounded[:, index]) == round_pair([*pair, *stream_one.further.get(pair, [])], deviation)
    assert len(stream_one.further) < 2 or deviation > 1e9, "further bits must hardly ever be needed"


def test_near_ties_in_rounding_are_resolved_by_further_bits() -> None:
    words = stream("ties").uniform64(2 * 600).tolist()
    rounded_in_float = 0
    for number, (radius, angle) in enumerate(zip(words[::2], words[1::2], strict=True)):
        # At this deviation the cosine or sine of these words is half an integer, up to rounding error.
        pair = transform_pair(Fraction(2 * radius + 1, 2**65), Fraction(2 * angle + 1, 2**65), precision=200)
        deviation = float(((0, 1, 37, 2**20, 2**27)[number % 5] + 0.5) / abs(pair[number % 2]))
        stream_one = make_fixed_stream(radius, angle)
        rounded = stream_one.draw_rounded_normal(2, deviation).tolist()
        assert len(stream_one.drawn) >= 6, "a half-integer must be in doubt"
        assert tuple(rounded) == round_pair(stream_one.drawn, deviation)
        naive = np.rint(_apply_box_muller(*np.array([[radius], [angle]], dtype=np.uint64), deviation)[0]).ravel()
        rounded_in_float += naive.astype(np.int64).tolist() != rounded
    assert rounded_in_float > 50, "floats alone must fail here, or the test proves nothing"


_LOW = [0, 1, 2, 3, 2**10, 2**11 + 1, 2**32 - 1, 2**53 - 1, 2**53 + 1, 2**62, 2**62 + 2**9, 2**63 - 1]
_HIGH = [2**63, 2**63 + 1, 3 * 2**62 - 1, 3 * 2**62, *(2**64 - n for n in (2**13, 3072, 2048, 1025, 1024, 2, 1))]
EXTREME = [*_LOW, *_HIGH]


@pytest.mark.parametrize("deviation", [1e-3, 0.3, 1.0, 1.7 * 2.0**24, 1e12])
def test_box_muller_float_error_stays_within_its_bound(deviation: float) -> None:
    """Tests the error bound that decides when a value needs further bits, with 500 random and 529 extreme pairs."""
    draws = stream("error", str(deviation)).uniform64(1000).tolist()
    pairs = [*zip(draws[::2], draws[1::2], strict=True), *itertools.product(EXTREME, EXTREME)]
    values, error = _apply_box_muller(
        *(np.array(words, dtype=np.uint64) for words in zip(*pairs, strict=True)), deviation
    )
    spare = np.inf
    with mpmath.workprec(200):
        for index, (one, ref) in enumerate(pairs):
            if not np.isfinite(error[index]):
                assert one == 0 or float(one) == 2.0**64, "only the extreme words may always be in doubt"
                assert not error[index] < 0
                continue
            for radius, angle in itertools.product((one, one + 1), (ref, ref + 1)):  # corners of the uncertainty
                corner = transform_pair(Fraction(radius, 2**64), Fraction(angle, 2**64), precision=200)
                for value, exact in zip(values[:, index], corner, strict=True):
                    away = abs(mpmath.mpf(float(value)) - deviation * exact)
                    assert away <= float(error[index]), (one, ref)
                    spare = min(spare, float(error[index]) / max(float(away), 1e-300))
    assert spare < 100, "the error bound must not be uselessly wide"


@pytest.mark.parametrize("radius", [0, 2**64 - 1])
def test_extreme_uniform_words_are_resolved_by_further_bits(radius: int) -> None:
    for angle in EXTREME:
        stream_one = make_fixed_stream(radius, angle)
        rounded = tuple(stream_one.draw_rounded_normal(2, 2.0**24).tolist())
        assert len(stream_one.drawn) >= 6
        assert rounded == round_pair(stream_one.drawn, 2.0**24)


def test_radius_near_zero_is_not_rounded_to_zero() -> None:
    """Words that round to 1.0 in float64, where the logarithm is zero, although their radius is up to 1e-8."""
    for radius in (2**64 - 1024, 2**64 - 512, 2**64 - 2):
        stream_one = make_fixed_stream(radius, 0)
        rounded = tuple(stream_one.draw_rounded_normal(2, 1e12).tolist())
        assert rounded == round_pair(stream_one.drawn, 1e12)
        assert rounded[0] > 100


def test_all_zero_words_request_a_bounded_number_of_further_bits() -> None:
    stream_one = make_fixed_stream(0, 0, 0, 0, 0, 0, 9)
    assert stream_one.draw_rounded_normal(1, 1.0)[0] > 16
    assert len(stream_one.drawn) == 2 + 2 * 4
    with pytest.raises(AssertionError, match="a thousand further bits"):
        make_fixed_stream(*[0] * 200).draw_rounded_normal(1, 1.0)


def test_rounded_normal_uses_one_word_per_value_and_more_for_ties() -> None:
    for count in (1, 2, 9, 1000):
        stream_one = make_fixed_stream()
        stream_one.draw_rounded_normal(count, 2.0**24)
        assert len(stream_one.drawn) == count + count % 2, "none of these values may be in doubt"
    in_doubt = make_fixed_stream(0, 7, 1, 8)  # the first of two pairs
    in_doubt.draw_rounded_normal(4, 1e3)
    assert len(in_doubt.drawn) in (8, 12)


def test_system_streams_differ_even_for_the_same_purpose() -> None:
    source = SystemRandomness()
    assert not source.seeded
    draws = {tuple(source.stream("site", 1, 1, "noise").uniform64(4).tolist()) for _ in range(50)}
    assert len(draws) == 50


def test_system_stream_keys_come_from_the_operating_system() -> None:
    with patch("fedtune.privacy.randomness.os.urandom", side_effect=lambda size: bytes(range(size))) as urandom:
        words = SystemRandomness().stream("noise").uniform64(4)
    urandom.assert_called_once_with(32)  # 256 bits per stream
    np.testing.assert_array_equal(words, RandomStream(bytes(range(32))).uniform64(4))


PURPOSE = ("bank_a", 3, 1, "noise")
OTHERS: list[tuple[str | int, ...]] = [
    *(("bank_b", 3, 1, "noise"), ("bank_a", 4, 1, "noise"), ("bank_a", 3, 2, "noise"), ("bank_a", 3, 1, "sampling")),
    *(("bank_a", 31, "noise"), ("bank_a3", 1, "noise"), ("bank_a", 3, 1, "noise", "")),
]


def test_seeded_streams_repeat_and_differ_by_seed_and_purpose() -> None:
    source: Randomness = SeededRandomness(7)
    assert source.seeded, "a seeded source must be marked"
    one = source.stream(*PURPOSE)
    # torch's CPU generator draws the same values for these two seeds.
    streams = [one, SeededRandomness(2**40 + 7).stream(*PURPOSE), *(source.stream(*ref) for ref in OTHERS)]
    draws = [each.uniform64(9).tolist() for each in streams]
    assert len({*map(tuple, draws), tuple(one.uniform64(9).tolist())}) == len(streams) + 1, "streams must move on"
    assert source.stream(*PURPOSE).uniform64(9).tolist() == draws[0]


# Each of these in the source would be a generator that is not a CSPRNG.
GENERATORS = {
    *("random", "default_rng", "RandomState", "Generator", "PCG64", "manual_seed", "randn", "rand", "randint"),
    *("normal_", "bernoulli_", "uniform_", "randn_like", "rand_like", "randperm", "multinomial", "fork_rng"),
}


def list_generators(source: str) -> set[str]:
    """List the generators that a module imports or accesses as attributes."""
    rounded = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            rounded |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            rounded |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            rounded.add(node.attr)
    return rounded & GENERATORS


PACKAGES = [Path(str(package.__file__)).parent for package in (fedtune.privacy, fedtune.training)]
SOURCES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=[f"{path.parent.name}/{path.name}" for path in SOURCES])
def test_privacy_code_uses_no_torch_or_numpy_generators(path: Path) -> None:
    # One draws the dummy examples, the adapter and the weights for a preflight, before any record is read: these values
    # are not secret, and nothing derived from them is released.
    assert bool(list_generators(path.read_text())) is (path.name == "batch_invariance.py")


def test_dummy_example_generators_are_unused_in_private_steps() -> None:
    """Only code that prepares a model imports `training.batch_invariance`; training code does not.

    The exceptions are the audit of sums, which runs on synthetic records outside any site, and a site's devices, which
    it checks as it checks the first one.
    """
    package = Path(str(fedtune.privacy.__file__)).parents[1]
    users = {
        path.relative_to(package).as_posix(): {name.name for name in node.names}
        for path in package.rglob("*.py")
        if "batch_invariance" in path.read_text()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and "batch_invariance" in (node.module or "")
    }
    assert users == {
        "sites/shared_model.py": {"max_batch_influence", "require_batch_invariance", "fit_to_memory"},
        "lab/audit/sensitivity.py": {"draw_text_lengths"},
        "training/devices.py": {"max_batch_influence", "iter_dummy_batches"},
    }


def test_generator_search_detects_common_random_calls() -> None:
    reached = ("np.random.normal(0, 1, 3)", "torch.randn(3)", "torch.Generator()", "torch.empty(3).normal_()")
    for source in ("import random", "from numpy.random import default_rng", *reached):
        assert list_generators(source), source
