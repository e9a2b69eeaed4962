"""What a private step releases, by the real `take_dp_sgd_step` on a tiny model that it does not move."""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import TextDataset
from fedtune.model.adapter import Adapter
from fedtune.model.spec import LoraSpec
from fedtune.privacy.randomness import Randomness, SystemRandomness
from fedtune.privacy.run_plan import Plan
from fedtune.tasks.task_model import TaskModel
from fedtune.training.dp_step import Records, take_dp_sgd_step
from fedtune.training.per_example import record_gradients
from fedtune.training.spec import TrainingSpec

from ..builders import build_copy
from ..model.conftest import make_spec
from ..training.conftest import make_dummy_examples, make_examples, make_plan, make_work, release_round
from ..training.conftest import one_thread as one_thread

Arrays = dict[str, npt.NDArray[np.float64]]
plan = partial(make_plan, sampling_rate=0.5, noise_multiplier=1.3, max_grad_norm=0.7, local_steps=1)
"""One noisy step a round; keywords override."""
random_texts = partial(make_dummy_examples, "classification")
"""So many random examples of 2 to 12 tokens."""


def build_model(*, rank: int = 16) -> TaskModel:
    """A tiny classifier as training starts: every B is zero, and so is the head."""
    return build_copy(make_spec(lora=LoraSpec(rank=rank, alpha=4.0)))


def release_sums(model: TaskModel, dataset: TextDataset, plan: Plan, *, steps: int = 1) -> list[Arrays]:
    """The noisy sum of each of some steps, of fresh noise, on a dataset or on nobody's."""
    seen, parameters = list[Arrays](), model.trainable()
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)  # parameters stay where they are
    optimizer.register_step_post_hook(
        lambda *_: seen.append({name: p.grad.double().numpy() for name, p in parameters.items() if p.grad is not None})
    )
    # A denominator of one, so that the gradient is the sum.
    records = Records(count=len(dataset), declared_size=1, cut=make_examples(dataset).cut)
    streams = {purpose: SystemRandomness().stream() for purpose in ("sampling", "noise")}
    with record_gradients(model) as gradients:
        for _ in range(steps):
            take_dp_sgd_step(gradients, records, plan, parameters=parameters, optimizer=optimizer, **streams)
    return [{name: plan.sampling_rate * mean for name, mean in means.items()} for means in seen]


def release_step_round(
    model: TaskModel, start: Adapter, records: int, optimizer: Any, rate: float, *, source: Randomness, **place: Any
) -> Adapter:
    """What a round of one step over so many random records releases."""
    training = TrainingSpec(local_steps=1, optimizer=optimizer, learning_rate=rate)
    work = make_work(plan=plan(), training=training, declared_size=20, max_adapter_value=1e6, **place)
    return release_round(model, random_texts(records), work, randomness=source, adapter=start)
