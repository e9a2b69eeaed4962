"""Tiny models, random examples, and the parts of a private step, for every test of local training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedtune.data import Shapes, TextDataset
from fedtune.model import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.model.products import multiply_by_onednn
from fedtune.privacy.mechanism import cell
from fedtune.privacy.randomness import SeededRandomness
from fedtune.privacy.run_plan import Plan
from fedtune.tasks import TaskModel
from fedtune.training import dp_step
from fedtune.training.dp_step import Records, dp_sgd_step
from fedtune.training.examples import SiteExamples
from fedtune.training.local import RoundOfTraining
from fedtune.training.optimizer import make_optimizer
from fedtune.training.per_example import attached
from fedtune.training.spec import TrainingSpec

from ..builders import DEVICE, built
from ..model.conftest import declared

LABELS = ("card_arrival", "exchange_rate", "lost_card")
KINDS = [
    ("random:bert", "classification"),
    ("random:llama", "causal_lm"),
    ("random:bert", "pairs"),
    ("random:bert", "triplets"),
    ("random:llama", "preference"),
]
"""Models, and tasks that they are tried on."""
TEXTS = {"pairs": 2, "triplets": 3}
"""What stands for task embedding with so many texts a record."""
Arrays = dict[str, npt.NDArray[np.float64]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only get in each other's way in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh() -> Callable[..., TaskModel]:
    """A tiny model as training starts: every B is zero, and so is the head."""

    def make(path: str = "random:bert", task: Any = "classification", **changes: Any) -> TaskModel:
        dtype = changes.pop("dtype", "float32")
        values = {"lora": LoraSpec(rank=2, alpha=4.0), "head": HeadSpec(), "seed": 3} | changes
        if task == "preference":
            values |= {"texts": 2}
        if task in TEXTS:
            task, values = "embedding", values | {"texts": TEXTS[task]}
        spec = TaskModelSpec(model=ModelSpec(path=path, dtype=dtype), task=task, **declared(task), **values)
        model = built(spec)
        multiply_by_onednn(model.base)  # as a run does
        return model

    return make


@pytest.fixture
def trained(fresh: Callable[..., TaskModel]) -> Callable[..., TaskModel]:
    """The same with random trainable tensors of a given size, as after some training."""

    def make(*args: Any, size: float = 0.2, **changes: Any) -> TaskModel:
        return with_random_values(fresh(*args, **changes), size)

    return make


def with_random_values(model: TaskModel, size: float, *, seed: int = 11) -> TaskModel:
    """The model with random trainable tensors of a given size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


class Table:
    """Made-up gradients, looked up by a record's first token; stands in for `PerExampleGradients`."""

    def __init__(self, gradients: dict[str, torch.Tensor]) -> None:
        self._gradients = gradients

    def of(self, batch: Any) -> dict[str, torch.Tensor]:
        found = {name: value[batch.input_ids[:, 0]] for name, value in self._gradients.items()}
        for one in found.values():
            one[len(batch) :] = 0
        return found


@pytest.fixture
def examples() -> Callable[..., TextDataset]:
    """`count` random examples of texts of 2 to 12 tokens; the last has no target, but where that is a class."""

    def make(task: str, count: int = 9, *, seed: int = 5) -> TextDataset:
        generator = np.random.default_rng(seed)
        input_ids = tuple(
            generator.integers(5, 200, size=generator.integers(2, 13)).astype(np.int32)
            for _ in range(count * (2 if task == "preference" else TEXTS.get(task, 1)))
        )
        if task in TEXTS:
            cosines = generator.uniform(0, TEXTS[task] - 1, size=count).astype(np.float32)
            cosines[-1:] = np.nan
            return TextDataset(input_ids, cosines, TEXTS[task])
        if task == "classification":
            return TextDataset(input_ids, generator.integers(0, len(LABELS), size=count))
        targets = [np.where(np.arange(len(ids)) >= 1, ids, -100).astype(np.int64) for ids in input_ids]
        texts = len(targets) // count if count else 1
        for last in targets[-texts:]:
            last[:] = -100
        return TextDataset(input_ids, tuple(targets), texts)

    return make


@pytest.fixture
def plan() -> Callable[..., Plan]:
    """A plan without noise that takes every record; keywords override."""

    def make(**changes: object) -> Plan:
        values: dict[str, object] = {"unit": "record", "delta": 1e-5, "sampling_rate": 1.0, "noise_multiplier": 0.0}
        values |= {"max_grad_norm": 1.0, "local_steps": 2, "num_rounds": 3}
        return Plan(**(values | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
def site_examples() -> Callable[..., SiteExamples]:
    """Records of up to 15 tokens as training reads them, in micro-batches of so many tokens; 1: a row each."""

    def make(dataset: TextDataset, *, max_tokens: int = 40) -> SiteExamples:
        shapes = Shapes.of(max_length=15, max_tokens=max_tokens)
        return SiteExamples(dataset, pad_id=0, shapes=shapes, device=DEVICE)

    return make


@pytest.fixture
def records(site_examples: Callable[..., SiteExamples]) -> Callable[..., Records]:
    """The records of a dataset, cut into micro-batches as a round does."""

    def make(dataset: TextDataset, *, declared_size: int = 20, max_tokens: int = 40) -> Records:
        examples = site_examples(dataset, max_tokens=max_tokens)
        return Records(count=len(dataset), declared_size=declared_size, cut=examples.cut)

    return make


@pytest.fixture
def work(plan: Callable[..., Plan]) -> Callable[..., RoundOfTraining]:
    """A private round; keywords override."""

    def make(**changes: Any) -> RoundOfTraining:
        values = {
            "site": "bank_a",
            "round": 1,
            "attempt": 1,
            "plan": plan(sampling_rate=0.6, noise_multiplier=0.5, max_grad_norm=0.5, local_steps=2, num_rounds=3),
            "training": TrainingSpec(local_steps=2, learning_rate=0.01),
            "declared_size": 10,
            "max_adapter_value": 100.0,
        }
        return RoundOfTraining(**(values | changes))

    return make


@dataclass
class Stepper:
    """Takes private steps on a model, with streams seeded alike in every stepper."""

    model: TaskModel
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        self.sampling = SeededRandomness(1).stream("sampling")
        self.noise = SeededRandomness(1).stream("noise")

    def step(self, records: Records, plan: Plan, *, steps: int = 1) -> dict[str, torch.Tensor]:
        """The trainable tensors after `steps` steps, copied."""
        with attached(self.model) as gradients:
            for _ in range(steps):
                dp_sgd_step(
                    gradients,
                    records,
                    plan,
                    parameters=self.model.trainable(),
                    optimizer=self.optimizer,
                    sampling=self.sampling,
                    noise=self.noise,
                )
        return {name: parameter.detach().clone() for name, parameter in self.model.trainable().items()}


@pytest.fixture
def stepper() -> Callable[..., Stepper]:
    """Steps on a model, by plain SGD of rate 1 unless told otherwise."""

    def make(model: TaskModel, **training: Any) -> Stepper:
        spec = TrainingSpec(**({"optimizer": "sgd", "learning_rate": 1.0} | training))
        return Stepper(model, make_optimizer(model.trainable(), spec))

    return make


@pytest.fixture
def clipped_sum(monkeypatch: pytest.MonkeyPatch, stepper: Any, records: Any) -> Callable[..., Arrays]:
    """What a step hands to the Gaussian mechanism: the clipped sum of a whole dataset, no longer in cells."""

    def make(model: TaskModel, dataset: TextDataset, plan: Plan, *, max_tokens: int = 40) -> Arrays:
        seen: list[Arrays] = []

        def without_noise(sums: Mapping[str, npt.NDArray[np.int64]], **_: Any) -> dict[str, npt.NDArray[np.int64]]:
            assert {total.dtype for total in sums.values()} == {np.dtype(np.int64)}, "sums are whole numbers"
            seen.append({name: total * cell(plan.max_grad_norm) for name, total in sums.items()})
            return {name: np.zeros_like(total) for name, total in sums.items()}

        with monkeypatch.context() as patched:
            patched.setattr(dp_step, "add_gaussian_noise", without_noise)
            stepper(model).step(records(dataset, max_tokens=max_tokens), plan)
        assert len(seen) == 1, "noise is added once for each logical batch"
        return seen[0]

    return make


@pytest.fixture
def norm() -> Callable[[Arrays], float]:
    """The joint L2 norm of all tensors."""
    return lambda tensors: float(np.sqrt(sum(np.sum(np.square(value)) for value in tensors.values())))
