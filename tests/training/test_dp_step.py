"""One private step against plain torch, a loop over examples, and its own guarantees."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedtune.data import TextDataset, collate
from fedtune.privacy.mechanism import compute_cell_width, draw_poisson_sample
from fedtune.privacy.randomness import SeededRandomness
from fedtune.tasks.task_model import TaskModel
from fedtune.training.dp_step import SMALLEST_NORM, Records, add_clipped, assert_same_tensors
from fedtune.training.optimizer import make_optimizer
from fedtune.training.spec import TrainingSpec

from . import conftest
from .conftest import (
    CELLS,
    KINDS,
    build_trained,
    make_dummy_examples,
    make_examples,
    make_plan,
    make_records,
    sum_examples,
    take_private_steps,
)

kinds = pytest.mark.parametrize(("path", "task"), KINDS)
UNCLIPPED = {"classification": 128.0, "causal_lm": 16.0, "pairs": 4.0, "triplets": 8.0, "preference": 5.0}
"""Larger than these models' gradients, which are rounded to a grid of 8e-6 to 2e-7."""


def compute_plain_loss(model: Any, dataset: TextDataset, index: int) -> torch.Tensor:
    """Compute the loss of one unpadded example from the PEFT model's output and textbook formulas."""
    if model.task.name not in ("classification", "causal_lm", "preference"):
        return model.losses(collate(dataset, [index], pad_id=0)).sum()  # tests/tasks compare these with textbooks
    texts = [
        torch.from_numpy(dataset.input_ids[text].astype(np.int64))[None] for text in dataset.find_text_indices([index])
    ]
    if model.task.name == "preference":
        targets = [torch.from_numpy(dataset.targets[text]) for text in dataset.find_text_indices([index])]
        with model.base.disable_adapter(), torch.no_grad():
            base = [log_probability(model, ids, row) for ids, row in zip(texts, targets, strict=True)]
        chosen, rejected = (log_probability(model, ids, row) for ids, row in zip(texts, targets, strict=True))
        lengths = [max(1, int((row[1:] != -100).sum())) if model.task.own.per_token else 1 for row in targets]
        margin = model.task.own.beta * ((chosen - base[0]) / lengths[0] - (rejected - base[1]) / lengths[1])
        return torch.log1p(torch.exp(-margin))
    output = model.base(input_ids=texts[0])
    if isinstance(dataset.targets, tuple):
        targets = torch.from_numpy(dataset.targets[index])[1:]
        supervised = targets != -100
        if not supervised.any():
            return output.logits.sum() * 0.0
        return functional.cross_entropy(output.logits[0, :-1][supervised], targets[supervised])
    pooled = output.last_hidden_state[0].mean(dim=0)
    logits = 20.0 * model.head.weight @ (pooled / pooled.norm())
    return functional.cross_entropy(logits[None], torch.tensor(dataset.targets[index])[None])


def log_probability(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability of a text's supervised tokens."""
    each = model.base(input_ids=ids).logits[0].log_softmax(dim=-1)
    return sum(
        (each[index - 1, target] for index, target in enumerate(targets) if index and target != -100), each.sum() * 0.0
    )


def compute_loop_gradient(model: TaskModel, dataset: TextDataset, index: int) -> dict[str, np.ndarray]:
    parameters = model.trainable()
    gradients = torch.autograd.grad(compute_plain_loss(model, dataset, index), list(parameters.values()))
    return {name: gradient.double().numpy() for name, gradient in zip(parameters, gradients, strict=True)}


def require_sums_of_a_loop(model: TaskModel, dataset: TextDataset, **cut: Any) -> None:
    """Require that the clipped sum matches a loop, for any cut into micro-batches; only some examples are clipped."""
    references = [compute_loop_gradient(model, dataset, index) for index in range(len(dataset))]
    norms = [float(np.sqrt(sum(np.sum(np.square(grad)) for grad in grads.values()))) for grads in references]
    clip = float(np.median([norm for norm in norms if norm]))
    assert SMALLEST_NORM < clip < max(norms), "some gradients must be clipped, and some not"
    factors = [min(1.0, clip / norm) if norm else 1.0 for norm in norms]
    for max_tokens in (1, 40, 10_000):
        found = sum_examples(model, make_examples(dataset, max_tokens=max_tokens, **cut), clip)
        for name, total in found.items():
            looped = sum(factor * grads[name] for factor, grads in zip(factors, references, strict=True)) / clip * CELLS
            assert np.abs(total.numpy() - looped).max() <= 1e-5 * CELLS * len(dataset), (name, max_tokens)


@kinds
def test_clipped_sum_matches_a_loop_for_any_micro_batching(path: str, task: str) -> None:
    require_sums_of_a_loop(build_trained(path, task), make_dummy_examples(task))


@pytest.mark.by_day("random:bert-classification-sgd", "random:bert-classification-adamw", "random:llama-causal_lm-sgd")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@kinds
def test_unclipped_noiseless_step_matches_plain_peft_training(path: str, task: str, optimizer: str) -> None:
    clip = UNCLIPPED[task]
    dataset, plan = make_dummy_examples(task), make_plan(sampling_rate=0.5, max_grad_norm=clip)
    # With larger steps, gradients of cosines exceed the clip norm or vanish.
    rate = 0.01 if dataset.texts > 1 else 0.05
    settings = {"optimizer": optimizer, "learning_rate": rate, "weight_decay": 0.01}
    private = build_trained(path, task)
    before = {name: p.detach().clone() for name, p in private.trainable().items()}
    after = take_private_steps(private, make_records(dataset, declared_size=14), plan, steps=4, **settings)

    model = build_trained(path, task)
    parameters = list(model.trainable().values())
    expected = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=rate, weight_decay=0.01),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01),
    }[optimizer]()
    sampling = SeededRandomness(1).stream("sampling")
    smallest = {name: torch.full_like(parameter, torch.inf) for name, parameter in model.trainable().items()}
    for _ in range(4):
        expected.zero_grad()
        chosen = draw_poisson_sample(len(dataset), 0.5, sampling)
        assert len(chosen)
        (sum(compute_plain_loss(model, dataset, int(index)) for index in chosen) / (0.5 * 14)).backward()
        for name, parameter in model.trainable().items():
            smallest[name] = torch.minimum(smallest[name], parameter.grad.abs())
        expected.step()
    compared = []
    for name, parameter in model.trainable().items():
        assert not torch.equal(after[name], before[name]), name
        # AdamW divides a gradient by its magnitude, which amplifies the grid's rounding of small gradients.
        fine = smallest[name] > (1e4 if optimizer == "adamw" else -1) * compute_cell_width(clip)
        compared.append(fine.flatten())
        torch.testing.assert_close(after[name][fine], parameter.detach()[fine], rtol=1e-4, atol=5e-6)
    assert torch.cat(compared).float().mean() > 0.1


def test_optimizer_clipping_and_sum_use_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step checks this before it reads any record."""
    parameters = build_trained().trainable()
    assert_same_tensors(parameters, make_optimizer(parameters, TrainingSpec()))
    without_head = {name: p for name, p in parameters.items() if name != "head.weight"}
    with_buffer = parameters | {"buffer": torch.nn.Parameter(torch.zeros(1))}
    for wrong_parameters in (without_head, with_buffer):
        with pytest.raises(AssertionError, match="stepped tensors and clipped tensors differ"):
            assert_same_tensors(parameters, make_optimizer(wrong_parameters, TrainingSpec()))
    cut = Mock(side_effect=AssertionError("records were read"))
    monkeypatch.setattr(conftest, "make_optimizer", lambda _, spec: make_optimizer(without_head, spec))
    with pytest.raises(AssertionError, match="stepped tensors"):
        take_private_steps(build_trained(), Records(count=3, declared_size=3, cut=cut), make_plan())
    with pytest.raises(AssertionError, match="clipped tensors and summed tensors differ"):
        add_clipped({"a": torch.zeros(1, dtype=torch.int64)}, {"b": torch.zeros(1, 1)}, 1.0)
