"""Somebody who sees one release searches for the seed of its noise: found where there is one, and there is none.

While LoRA's B is zero the gradient of A is exactly zero, so what the first step moves in A is raw noise, and whoever
guesses its generator can check the guess.  The signs alone suffice, whatever the scale and the optimizer: 64 of them
agree by chance once in 2**64.  Who has found the seed subtracts the noise from every other tensor.

The space that is searched: for generators of torch the seeds below 2**13 and each second of the last 2**13 (two
hours), for numpy's the seeds below 2**16, and for fedtune's own streams of a marked study those below 2**10.  torch
keeps 32 bits of a seed: a search of all of them takes 2**19 times as long as the first of these, hours on many cores.
"""

import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedtune.api.compose import compose_run
from fedtune.config import saved_config
from fedtune.model.adapter import Adapter
from fedtune.privacy.mechanism import GRID_BITS, cell
from fedtune.privacy.randomness import Randomness, RandomStream, SeededRandomness, SystemRandomness
from fedtune.sites.run_records import deal_out
from fedtune.sites.shared_model import SharedModel
from fedtune.sites.work import SiteWork
from fedtune.tasks.saved import load_task_model

from ..builders import round_request
from .conftest import after_a_round, model_of, plan, random_texts, sums_of
from .decisions import FALSE_ALARM, POWER, Unrelated

SIGNS = 64
OF_TORCH, OF_NUMPY, OF_A_STUDY = 1 << 13, 1 << 16, 1 << 10
FLOATS = (torch.float32, torch.float64)
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Release:
    """What the server saw: who sent it, and how the first tensor moved."""

    site: str
    moved: Values

    @property
    def signs(self) -> bytes:
        """Of the noise: a step goes against the gradient."""
        return np.packbits(self.moved.ravel()[:SIGNS] < 0).tobytes()


def first_move(before: Adapter, after: Adapter) -> Values:
    name = next(iter(before.tensors))
    assert "lora_A" in name
    return after.tensors[name].astype(np.float64) - before.tensors[name]


def signs_of(values: npt.NDArray[Any]) -> bytes:
    return np.packbits(values[:SIGNS] > 0).tobytes()


@cache
def guesses() -> dict[bytes, str]:
    """The signs of the first values that each seed of torch and of numpy means."""
    generator, found, now = torch.Generator(), dict[bytes, str](), int(time.time())
    # The table is made once: releases of later tests fall into the seconds to come.
    seeds = (*range(OF_TORCH), *range(now - OF_TORCH, now + 600))
    for seed, dtype in itertools.product(seeds, FLOATS):
        values = torch.randn(SIGNS, generator=generator.manual_seed(seed), dtype=dtype).numpy()
        found[signs_of(values)] = f"torch {seed}"
    for seed in range(OF_NUMPY):
        found[signs_of(np.random.Generator(np.random.PCG64(seed)).standard_normal(SIGNS))] = f"numpy {seed}"
    return found


@cache
def guesses_of_a_study(site: str, size: int) -> dict[bytes, str]:
    """The same of fedtune's own streams, which depend on the site and on how many values are drawn."""
    streams = ((seed, SeededRandomness(seed).stream(site, 1, 1, "noise")) for seed in range(OF_A_STUDY))
    return {signs_of(stream.rounded_normal(size, 2.0**GRID_BITS)): f"fedtune {seed}" for seed, stream in streams}


def recover(release: Release) -> str | None:
    """The generator and seed that the noise came from; None if no guess fits."""
    of_a_study = guesses_of_a_study(release.site, release.moved.size)
    return guesses().get(release.signs) or of_a_study.get(release.signs)


class TorchStream(RandomStream):
    """A stream of the kind that Opacus uses by default."""

    def __init__(self, seed: int) -> None:
        super().__init__(bytes(32))
        self._generator = torch.Generator().manual_seed(seed)

    def rounded_normal(self, count: int, deviation: float) -> npt.NDArray[np.int64]:
        values = torch.randn(count, generator=self._generator, dtype=torch.float64).numpy()
        return np.rint(deviation * values).astype(np.int64)


class NumpyStream(RandomStream):
    def __init__(self, seed: int) -> None:
        super().__init__(bytes(32))
        self._generator = np.random.default_rng(seed)

    def rounded_normal(self, count: int, deviation: float) -> npt.NDArray[np.int64]:
        return np.rint(deviation * self._generator.standard_normal(count)).astype(np.int64)


@dataclass(frozen=True)
class Seeded:
    """Noise from a seeded generator, in the place of the operating system's."""

    kind: Callable[[int], RandomStream]
    seed: int
    seeded = False

    def stream(self, *purpose: str | int) -> RandomStream:
        return self.kind(self.seed) if "noise" in purpose else SystemRandomness().stream()


@pytest.fixture(scope="module")
def first_round() -> Callable[..., Release]:
    """A first round on twelve records, as the server sees it."""
    model = model_of(rank=4)
    start = Adapter.of(model)

    def make(source: Randomness, *, optimizer: str = "sgd") -> Release:
        after = after_a_round(model, start, 12, optimizer, 0.1, source=source, site="a")
        return Release("a", first_move(start, after))

    return make


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_seed_of_torch_is_found_from_one_release(first_round: Callable[..., Release], optimizer: str) -> None:
    assert recover(first_round(Seeded(TorchStream, 7_234), optimizer=optimizer)) == "torch 7234"


def test_a_seed_of_more_than_32_bits_is_no_better(first_round: Callable[..., Release]) -> None:
    assert recover(first_round(Seeded(TorchStream, 2**40 + 77))) == "torch 77"


def test_the_time_as_a_seed_is_found(first_round: Callable[..., Release]) -> None:
    noon = int(time.time()) - 3600
    assert recover(first_round(Seeded(TorchStream, noon))) == f"torch {noon}"


def test_a_seed_of_numpy_is_found(first_round: Callable[..., Release]) -> None:
    assert recover(first_round(Seeded(NumpyStream, 12_345))) == "numpy 12345"


def test_the_seed_of_a_marked_study_is_found(first_round: Callable[..., Release]) -> None:
    """Why such a run has no guarantee, and is marked."""
    assert recover(first_round(SeededRandomness(1000))) == "fedtune 1000"


def test_who_has_the_seed_has_the_other_tensors_too() -> None:
    """The clipped sum of the head is in the release once the noise is taken off: nothing was protected."""
    model, everyone = model_of(rank=4), random_texts(12)
    (exact,) = sums_of(model, everyone, plan(sampling_rate=1.0, noise_multiplier=0.0))
    (noisy,) = sums_of(model, everyone, plan(sampling_rate=1.0), randomness=Seeded(TorchStream, 321))
    stream = TorchStream(321)
    deviation = plan().noise_multiplier * 2.0**GRID_BITS
    for name, released in noisy.items():
        noise = stream.rounded_normal(released.size, deviation) * cell(plan().max_grad_norm)
        np.testing.assert_allclose(released - noise.reshape(released.shape), exact[name], atol=1e-5)
    assert np.abs(exact["head.weight"]).max() > 0.1


def test_in_a_real_round_there_is_nothing_to_find(first_round: Callable[..., Release]) -> None:
    assert recover(first_round(SystemRandomness())) is None


@dataclass(frozen=True)
class WholeRun:
    """A run of one site and one step: what the site released, beside the adapter that the lead sent."""

    start: Adapter
    released: Adapter
    site: str

    @property
    def noise(self) -> Values:
        """How all of A moved."""
        names = [name for name in self.start.tensors if "lora_A" in name]
        moved = [self.released.tensors[name].astype(np.float64) - self.start.tensors[name] for name in names]
        return np.concatenate([values.ravel() for values in moved])


@pytest.fixture(scope="module")
def runs(simulate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[WholeRun, WholeRun]:
    """The same run by the command line, twice."""

    def make() -> WholeRun:
        sites = ("federation.num_sites=1", "federation.min_sites=1", "federation.num_rounds=1", "lora.rank=32")
        training = ("training.local_steps=1", "training.optimizer=sgd", "training.learning_rate=0.1")
        folder = simulate(*sites, *training, into=tmp_path_factory.mktemp("runs"))
        config = saved_config(folder)
        released = Adapter.of(load_task_model(folder / "adapter", model=config.model))
        return WholeRun(SharedModel(config).initial_adapter, released, config.federation.names[0])

    return make(), make()


def test_in_a_whole_run_there_is_nothing_to_find(runs: tuple[WholeRun, WholeRun]) -> None:
    for whole in runs:
        assert recover(Release(whole.site, first_move(whole.start, whole.released))) is None


def test_two_runs_with_one_configuration_share_nothing(runs: tuple[WholeRun, WholeRun]) -> None:
    one, other = runs
    assert one.start.digest() == other.start.digest(), "all but the noise is the same"
    test = Unrelated(one.noise.size, FALSE_ALARM)
    assert test.power(0.1) >= POWER, "a tenth that is shared would be found"
    assert test.accepts(one.noise, other.noise)


@pytest.fixture(scope="module")
def work(tiny: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> SiteWork:
    """A site's work on the records of a simulation, as its round does it."""
    overrides = ("federation.num_rounds=1", "training.local_steps=1")
    config = compose_run(tiny(*overrides, into=tmp_path_factory.mktemp("runs")))
    shared = SharedModel(config)
    records = deal_out(config).sites
    name = config.federation.names[0]
    size = config.declared_sizes()[name]
    return SiteWork(name, shared, records[0], declared_size=size, max_adapter_value=math.inf)


@pytest.fixture
def worked(work: SiteWork) -> Callable[[], Release]:
    """One round of that work, with nothing about its noise chosen here."""

    def make() -> Release:
        config = work.shared.config
        proposal = config.proposal(lead="ab" * 32, plan=config.plan())
        start = work.shared.initial_adapter
        request = round_request(proposal, site=work.site, adapter_digest=start.digest())
        trained = work.do(request, start, 1, fingerprint_key=b"k", noise_factor=1.0)
        return Release(work.site, first_move(start, trained.adapter))

    return make


def test_no_seeded_generator_is_consulted(worked: Callable[[], Release]) -> None:
    """Seeding every generator alike before a round changes nothing, and the round leaves each where it was."""
    releases = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        states = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr]
        releases.append(worked())
        after = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr]
        assert after == states
    assert releases[0].signs != releases[1].signs, "64 signs agree by chance once in 2**64"


def test_every_stream_of_a_round_has_256_bits_of_the_operating_system(
    worked: Callable[[], Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[bytes] = []
    original = RandomStream.__init__

    def kept(self: RandomStream, key: bytes) -> None:
        keys.append(key)
        original(self, key)

    monkeypatch.setattr(RandomStream, "__init__", kept)
    worked()
    worked()
    assert len(keys) == 6, "sampling, noise and choice of records of two rounds"
    assert len(set(keys)) == 6
    assert all(len(key) == 32 for key in keys)
