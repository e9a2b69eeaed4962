"""Shared helpers for tests of local training: tiny models, random examples, and the parts of a private step."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data import Shapes, TextDataset
from fedtune.model.adapter import Adapter
from fedtune.model.frozen_linear import switch_to_onednn
from fedtune.model.spec import LoraSpec, ModelSpec
from fedtune.privacy.randomness import Randomness, RandomStream, SeededRandomness
from fedtune.privacy.run_plan import Plan
from fedtune.tasks.task_model import TaskModel
from fedtune.training.dp_step import Records, add_clipped, make_zero_sums, take_dp_sgd_step
from fedtune.training.examples import SiteExamples
from fedtune.training.local import TrainingRound, train_round
from fedtune.training.optimizer import make_optimizer
from fedtune.training.per_example import record_gradients
from fedtune.training.spec import TrainingSpec

from ..builders import DEVICE, build_copy, set_random_values
from ..model.conftest import LABELS, TEXTS, make_spec

KINDS = [
    ("random:bert", "classification"),
    ("random:llama", "causal_lm"),
    ("random:bert", "pairs"),
    ("random:bert", "triplets"),
    ("random:llama", "preference"),
]
LAST = LoraSpec(rank=2, alpha=4.0, layers=(-1,))
"""Only the last layer trains, so the outputs of the frozen layers can be cached."""
CELLS = 2**24
"""A clip norm for steps that clip some examples."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_fresh(
    path: str = "random:bert", task: Any = "classification", *, dtype: Any = "float32", **changes: Any
) -> TaskModel:
    changes |= {"texts": 2} if task == "preference" else {}
    model = build_copy(make_spec(path, task, model=ModelSpec(path=path, dtype=dtype), **changes))
    switch_to_onednn(model.base)  # as a run does
    return model


def build_trained(*args: Any, size: float = 0.2, **changes: Any) -> TaskModel:
    return set_random_values(build_fresh(*args, **changes), size)


class Table:
    """Dummy gradients, looked up by a record's first token; replaces `PerExampleGradients`."""

    def __init__(self, gradients: dict[str, torch.Tensor]) -> None:
        self._gradients = gradients

    def compute_gradients(self, batch: Any) -> dict[str, torch.Tensor]:
        gradients = {name: value[batch.input_ids[:, 0]] for name, value in self._gradients.items()}
        for gradient in gradients.values():
            gradient[len(batch) :] = 0
        return gradients


def make_dummy_examples(task: str, count: int = 9, *, seed: int = 5) -> TextDataset:
    """Make `count` random examples of 2 to 12 tokens; the last example has no target, except in classification."""
    generator, texts = np.random.default_rng(seed), 2 if task == "preference" else TEXTS.get(task, 1)
    input_ids = tuple(
        generator.integers(5, 200, size=generator.integers(2, 13)).astype(np.int32) for _ in range(count * texts)
    )
    if task in TEXTS:
        cosines = generator.uniform(0, texts - 1, size=count).astype(np.float32)
        cosines[-1:] = np.nan
        return TextDataset(input_ids, cosines, texts)
    if task == "classification":
        return TextDataset(input_ids, generator.integers(0, len(LABELS), size=count))
    targets = [np.where(np.arange(len(ids)) >= 1, ids, -100).astype(np.int64) for ids in input_ids]
    for last in targets[-texts:]:
        last[:] = -100
    return TextDataset(input_ids, tuple(targets), texts)


BAD = 199
"""A token on which tests make a model fail."""


def insert_token(dataset: TextDataset, *texts: int) -> TextDataset:
    """Append the bad token to the given texts of a data set."""
    ids = [np.where(row == BAD, 7, row) for row in dataset.input_ids]
    for text in texts:
        ids[text][-1] = BAD
    return TextDataset(tuple(ids), dataset.targets, dataset.texts)


def make_plan(**changes: object) -> Plan:
    values: dict[str, object] = {"unit": "record", "delta": 1e-5, "sampling_rate": 1.0, "noise_multiplier": 0.0}
    values |= {"max_grad_norm": 1.0, "local_steps": 2, "num_rounds": 3}
    return Plan(**(values | changes))  # type: ignore[arg-type]


def make_examples(
    dataset: TextDataset,
    shapes: Shapes | None = None,
    *,
    max_tokens: int = 40,
    max_length: int = 15,
    kept_by: TaskModel | None = None,
) -> SiteExamples:
    """Make site examples in micro-batches of at most `max_tokens` tokens; 1 gives one row per micro-batch.

    `kept_by` is a model whose frozen states and reference outputs are cached.
    """
    shapes = shapes or Shapes.from_limits(max_length=max_length, max_tokens=max_tokens)
    examples = SiteExamples(dataset, pad_id=0, shapes=shapes, device=DEVICE)
    if kept_by:
        examples.cache_frozen_states(kept_by)
        examples.cache_reference(kept_by)
        cached = all(batch.prefix is not None for batch in examples.cut(np.arange(len(dataset))))
        assert cached == kept_by.has_frozen_prefix
    return examples


def make_records(dataset: TextDataset, *, declared_size: int = 20, max_tokens: int = 40) -> Records:
    examples = make_examples(dataset, max_tokens=max_tokens)
    return Records(count=len(dataset), declared_size=declared_size, cut=examples.cut)


def make_work(**changes: Any) -> TrainingRound:
    values = {
        "site": "bank_a",
        "round": 1,
        "attempt": 1,
        "plan": make_plan(sampling_rate=0.6, noise_multiplier=0.5, max_grad_norm=0.5),
        "training": TrainingSpec(local_steps=2, learning_rate=0.01),
        "declared_size": 10,
        "max_adapter_value": 100.0,
    }
    return TrainingRound(**(values | changes))


def release_round(
    model: TaskModel,
    units: Any,
    work: TrainingRound,
    *,
    randomness: Randomness | None = None,
    adapter: Adapter | None = None,
) -> Adapter:
    """Return the adapter that a round releases, for a data set, records or users."""
    units = make_examples(units) if isinstance(units, TextDataset) else units
    start = adapter or Adapter.from_task_model(model)
    return train_round(model, start, units, work, randomness=randomness or SeededRandomness(5))[0]


def sum_examples(model: TaskModel, examples: SiteExamples, clip: float, chosen: Any = None) -> dict[str, torch.Tensor]:
    """Return the clipped sum of the selected examples, or of all examples, in cells."""
    sums = make_zero_sums(model.trainable())
    with record_gradients(model) as gradients:
        for batch in examples.cut(np.array(range(len(examples)) if chosen is None else chosen)):
            add_clipped(sums, gradients.compute_gradients(batch), clip)
    return sums


def take_private_steps(
    model: TaskModel,
    records: Records,
    plan: Plan,
    *,
    steps: int = 1,
    units: Callable[[Any], Any] = lambda gradients: gradients,
    sampling: RandomStream | None = None,
    **training: Any,
) -> dict[str, torch.Tensor]:
    """Take private steps on a model, by default with plain SGD at rate 1 and equally seeded streams.

    `units` converts the gradients of single records to the gradients of the clipped units.
    """
    parameters = model.trainable()
    optimizer = make_optimizer(parameters, TrainingSpec(**({"optimizer": "sgd", "learning_rate": 1.0} | training)))
    streams = {purpose: SeededRandomness(1).stream(purpose) for purpose in ("sampling", "noise")}
    streams |= {"sampling": sampling} if sampling else {}
    with record_gradients(model) as gradients:
        for _ in range(steps):
            take_dp_sgd_step(units(gradients), records, plan, parameters=parameters, optimizer=optimizer, **streams)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
