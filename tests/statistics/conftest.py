"""What a private step releases, by the real `dp_sgd_step` on a tiny model that it does not move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedtune.data import Shapes, TextDataset
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.privacy.randomness import Randomness, SystemRandomness
from fedtune.privacy.run_plan import Plan
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training.dp_step import Records, dp_sgd_step
from fedtune.training.examples import SiteExamples
from fedtune.training.per_example import attached

Arrays = dict[str, npt.NDArray[np.float64]]
LABELS = ("card_arrival", "exchange_rate", "lost_card")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """More threads only get in each other's way in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_of() -> Callable[..., TaskModel]:
    """A tiny classifier as training starts: every B is zero, and so is the head."""

    def make(*, rank: int = 16) -> TaskModel:
        spec = TaskModelSpec(
            model=ModelSpec(path="random:bert", dtype="float32"),
            task="classification",
            labels=LABELS,
            lora=LoraSpec(rank=rank, alpha=4.0),
            head=HeadSpec(),
            seed=3,
        )
        return build_task_model(spec)

    return make


@pytest.fixture(scope="session")
def dataset() -> Callable[[int], TextDataset]:
    """So many random examples of 2 to 12 tokens."""

    def make(count: int) -> TextDataset:
        generator = np.random.default_rng(5)
        input_ids = tuple(
            generator.integers(5, 200, size=generator.integers(2, 13)).astype(np.int32) for _ in range(count)
        )
        return TextDataset(input_ids, generator.integers(0, len(LABELS), size=count))

    return make


@pytest.fixture(scope="session")
def plan() -> Callable[..., Plan]:
    """One noisy step a round; keywords override."""

    def make(**changes: Any) -> Plan:
        values: dict[str, Any] = {"unit": "record", "delta": 1e-5, "sampling_rate": 0.5, "noise_multiplier": 1.3}
        values |= {"max_grad_norm": 0.7, "local_steps": 1, "num_rounds": 3}
        return Plan(**(values | changes))

    return make


class Watching(torch.optim.SGD):
    """Keeps each gradient that it is given, and leaves the parameters where they are."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__(parameters.values(), lr=0.0)
        self._parameters = dict(parameters)
        self.seen: list[Arrays] = []

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.seen.append({name: p.grad.double().numpy() for name, p in self._parameters.items() if p.grad is not None})


@pytest.fixture(scope="session")
def sums_of() -> Callable[..., list[Arrays]]:
    """The noisy sum of each of some steps, of fresh noise, on a dataset or on nobody's."""

    def make(
        model: TaskModel, dataset: TextDataset, plan: Plan, *, steps: int = 1, randomness: Randomness | None = None
    ) -> list[Arrays]:
        shapes = Shapes.of(max_length=12, max_tokens=40)
        examples = SiteExamples(dataset, pad_id=0, shapes=shapes, device="cpu")
        source = randomness or SystemRandomness()
        optimizer = Watching(model.trainable())
        # A denominator of one, so that the gradient is the sum.
        records = Records(count=len(dataset), declared_size=1, cut=examples.cut)
        sampling, noise = source.stream("a", 1, 1, "sampling"), source.stream("a", 1, 1, "noise")
        with attached(model) as gradients:
            for _ in range(steps):
                dp_sgd_step(
                    gradients,
                    records,
                    plan,
                    parameters=model.trainable(),
                    optimizer=optimizer,
                    sampling=sampling,
                    noise=noise,
                )
        return [{name: plan.sampling_rate * mean for name, mean in means.items()} for means in optimizer.seen]

    return make
