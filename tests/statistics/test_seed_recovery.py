"""Somebody who sees one release searches for the seed of its noise: found where there is one, and there is none.

While LoRA's B is zero the gradient of A is exactly zero, so what the first step moves in A is raw noise: its first 64
signs check any guess of a generator.  The seeds that are searched stand below; all 32 bits that torch keeps of a seed
would take 2**19 times as long, hours on many cores.
"""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedtune.config import read_saved_config
from fedtune.model.adapter import Adapter
from fedtune.privacy.mechanism import GRID_BITS
from fedtune.privacy.randomness import Randomness, RandomStream, SeededRandomness, SystemRandomness
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.tasks.saved import load_task_model

from ..privacy.builders import lead_key
from ..sites.conftest import make_letters
from ..sites.test_work import RECORDS, train_at_north
from .conftest import build_model, release_step_round
from .decisions import FALSE_ALARM, POWER, Unrelated

SIGNS = 64
OF_TORCH, OF_NUMPY, OF_A_STUDY = 1 << 13, 1 << 16, 1 << 10
"""So many seeds from 0 on are guessed, and of torch each of so many seconds, the last two hours, too."""
FLOATS = (torch.float32, torch.float64)
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Release:
    """What the server saw: who sent it, and the adapter before and after."""

    site: str
    before: Adapter
    after: Adapter

    @property
    def moved(self) -> list[Values]:
        """How each A moved."""
        names = [name for name in self.before.tensors if "lora_A" in name]
        assert names[0] == next(iter(self.before.tensors)), "the first noise that is drawn"
        return [self.after.tensors[name].astype(np.float64) - self.before.tensors[name] for name in names]

    @property
    def signs(self) -> bytes:
        """Of the noise: a step goes against the gradient."""
        return pack_signs(-self.moved[0].ravel())


def pack_signs(values: npt.NDArray[Any]) -> bytes:
    return np.packbits(values[:SIGNS] > 0).tobytes()


@cache
def guess_signs() -> dict[bytes, str]:
    """The signs of the first values that each seed of torch and of numpy means."""
    generator, expected, now = torch.Generator(), dict[bytes, str](), int(time.time())
    # The table is made once: releases of later tests fall into the seconds to come.
    seeds = (*range(OF_TORCH), *range(now - OF_TORCH, now + 600))
    for seed, dtype in itertools.product(seeds, FLOATS):
        values = torch.randn(SIGNS, generator=generator.manual_seed(seed), dtype=dtype).numpy()
        expected[pack_signs(values)] = f"torch {seed}"
    for seed in range(OF_NUMPY):
        expected[pack_signs(np.random.Generator(np.random.PCG64(seed)).standard_normal(SIGNS))] = f"numpy {seed}"
    return expected


@cache
def guess_study_signs(site: str, size: int) -> dict[bytes, str]:
    """The same of fedtune's own streams, which depend on the site and on how many values are drawn."""
    streams = ((seed, SeededRandomness(seed).stream(site, 1, 1, "noise")) for seed in range(OF_A_STUDY))
    return {pack_signs(stream.draw_rounded_normal(size, 2.0**GRID_BITS)): f"fedtune {seed}" for seed, stream in streams}


def recover(release: Release) -> str | None:
    """The generator and seed that the noise came from; None if no guess fits."""
    of_a_study = guess_study_signs(release.site, release.moved[0].size)
    return guess_signs().get(release.signs) or of_a_study.get(release.signs)


def draw_like_torch(seed: int) -> Callable[[int], Values]:
    """As Opacus draws by default."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_like_numpy(seed: int) -> Callable[[int], Values]:
    return np.random.default_rng(seed).standard_normal


class Drawn(RandomStream):
    def __init__(self, draw: Callable[[int], Values]) -> None:
        super().__init__(bytes(32))
        self._draw = draw

    def draw_rounded_normal(self, count: int, deviation: float) -> npt.NDArray[np.int64]:
        return np.rint(deviation * np.asarray(self._draw(count))).astype(np.int64)


@dataclass(frozen=True)
class Seeded:
    """Noise from a seeded generator, in the place of the operating system's."""

    kind: Callable[[int], Callable[[int], Values]]
    seed: int
    seeded = False

    def stream(self, *purpose: str | int) -> RandomStream:
        return Drawn(self.kind(self.seed)) if "noise" in purpose else SystemRandomness().stream()


@pytest.fixture(scope="module")
def first_round() -> Any:
    """A first round on twelve records, as the server sees it."""
    model = build_model(rank=4)
    start = Adapter.from_task_model(model)

    def make(source: Randomness, *, optimizer: str = "sgd") -> Release:
        return Release("a", start, release_step_round(model, start, 12, optimizer, 0.1, source=source, site="a"))

    return make


@pytest.mark.parametrize(
    ("source", "optimizer", "expected"),
    [
        *((Seeded(draw_like_torch, 7_234), optimizer, "torch 7234") for optimizer in ("sgd", "adamw")),
        (Seeded(draw_like_torch, 2**40 + 77), "sgd", "torch 77"),  # of more than 32 bits, and no better
        (Seeded(draw_like_numpy, 12_345), "sgd", "numpy 12345"),
        (SeededRandomness(1000), "sgd", "fedtune 1000"),  # why a marked study has no guarantee
        (SystemRandomness(), "sgd", None),
    ],
)
def test_seed_is_recovered_from_a_seeded_release(
    first_round: Any, source: Randomness, optimizer: str, expected: str | None
) -> None:
    assert recover(first_round(source, optimizer=optimizer)) == expected


def test_timestamp_seed_is_recovered(first_round: Any) -> None:
    noon = int(time.time()) - 3600
    assert recover(first_round(Seeded(draw_like_torch, noon))) == f"torch {noon}"


@pytest.fixture(scope="module")
def runs(simulate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Release]:
    """What the site of a run of one site and one step released, by the command line, twice."""

    def make() -> Release:
        sites = ("federation.num_sites=1", "federation.min_sites=1", "federation.num_rounds=1", "lora.rank=32")
        training = ("training.local_steps=1", "training.optimizer=sgd", "training.learning_rate=0.1")
        folder = simulate(*sites, *training, into=tmp_path_factory.mktemp("runs"))
        config = read_saved_config(folder)
        released = Adapter.from_task_model(load_task_model(folder / "adapter", model=config.model))
        return Release(config.federation.names[0], LoadedModel(config).initial_adapter, released)

    return make(), make()


def test_no_seed_is_recovered_from_a_real_run(runs: tuple[Release, Release]) -> None:
    assert [recover(release) for release in runs] == [None, None]


def test_identical_runs_draw_independent_noise(runs: tuple[Release, Release]) -> None:
    assert runs[0].before.digest() == runs[1].before.digest(), "all but the noise is the same"
    first, second = (np.concatenate([values.ravel() for values in release.moved]) for release in runs)
    test = Unrelated(first.size, FALSE_ALARM)
    assert test.power(0.1) >= POWER, "a tenth that is shared would be found"
    assert test.accepts(first, second)


@pytest.fixture
def finished_round() -> Callable[[], Release]:
    """One round of a site's work, with nothing about its noise chosen here."""
    config = make_letters(training={"local_steps": 1}, runtime={"seeded_noise": False})
    shared = RunModel(LoadedModel(config), config)
    return lambda: Release("north", shared.initial_adapter, train_at_north(shared, lead_key, RECORDS).adapter)


def read_generator_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]


def test_round_does_not_use_seeded_generators(finished_round: Callable[[], Release]) -> None:
    """Seeding every generator alike before a round changes nothing, and the round leaves each where it was."""
    releases = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        states = read_generator_states()
        releases.append(finished_round())
        assert read_generator_states() == states
    assert releases[0].signs != releases[1].signs, "64 signs agree by chance once in 2**64"


def test_every_stream_has_a_256_bit_system_key(finished_round: Any, monkeypatch: Any) -> None:
    keys, construct = list[bytes](), RandomStream.__init__
    monkeypatch.setattr(RandomStream, "__init__", lambda self, key: keys.append(key) or construct(self, key))
    finished_round()
    finished_round()
    assert len(keys) == 6, "sampling, noise and choice of records of two rounds"
    assert len(set(keys)) == 6
    assert all(len(key) == 32 for key in keys)
