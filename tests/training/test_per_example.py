"""Opacus's hooks: what they yield, and that they go again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data import collate
from fedtune.model import HeadSpec, LoraSpec, TaskModel
from fedtune.spec import ConfigError
from fedtune.training.per_example import attached

KINDS = [("random:bert", "classification"), ("random:llama", "classification"), ("random:llama", "causal_lm")]
kinds = pytest.mark.parametrize(("path", "task"), KINDS)


def hooks_on(model: TaskModel) -> int:
    """How many hooks any of its modules has."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def leftovers(model: TaskModel) -> list[str]:
    """Parameters that still hold a gradient of one example or of a batch."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None or getattr(parameter, "grad_sample", None) is not None
    ]


@kinds
def test_hooks_go_at_the_end(trained: Any, examples: Any, path: str, task: str) -> None:
    model = trained(path, task)
    before = hooks_on(model)
    with attached(model) as gradients:
        assert hooks_on(model) > before
        gradients.of(collate(examples(task), [0, 1], pad_id=0))
    assert hooks_on(model) == before
    assert leftovers(model) == []


def gradients_of(model: TaskModel, batch: Any) -> dict[str, torch.Tensor]:
    with attached(model) as gradients:
        return gradients.of(batch)


@pytest.mark.parametrize("within", ["forward pass", "backward pass", "between them"])
def test_a_failure_leaves_no_hook_and_no_trace(trained: Any, examples: Any, within: str) -> None:
    # One base serves every site of a simulation: a site that runs out of memory must not end the others' rounds,
    # nor leave its records' activations behind.
    model, dataset = trained(), examples("classification")
    small, large = collate(dataset, [0, 1], pad_id=0), collate(dataset, [2, 3, 4], pad_id=0)
    expected, before = gradients_of(model, small), hooks_on(model)
    kept = {name: sorted(vars(module)) for name, module in model.named_modules()}

    def fails(*_: Any) -> None:
        raise MemoryError

    query = next(module for name, module in model.named_modules() if name.endswith("layer.1.attention.self.query"))
    handle = {
        "forward pass": query.register_forward_pre_hook,
        "backward pass": query.register_full_backward_pre_hook,
        "between them": model.head.register_forward_hook,
    }[within](fails)
    with pytest.raises(MemoryError):
        gradients_of(model, large)
    handle.remove()

    assert hooks_on(model) == before
    assert leftovers(model) == []
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == kept
    for name, gradient in gradients_of(model, small).items():
        assert torch.equal(gradient, expected[name]), name


def test_hooks_can_be_attached_again(trained: Any, examples: Any) -> None:
    model, batch = trained(), collate(examples("classification"), [0, 1, 2], pad_id=0)
    found = []
    for _ in range(2):
        with attached(model) as gradients:
            found.append(gradients.of(batch))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


def test_a_batch_leaves_nothing_to_the_next(trained: Any, examples: Any) -> None:
    model, dataset = trained(), examples("classification")
    with attached(model) as gradients:
        first = gradients.of(collate(dataset, [0, 1], pad_id=0))
        gradients.of(collate(dataset, [2, 3, 4], pad_id=0))
        again = gradients.of(collate(dataset, [0, 1], pad_id=0))
        assert leftovers(model) == []
    for name, gradient in first.items():
        assert torch.equal(gradient, again[name])


@kinds
def test_gradients_have_the_names_and_shapes_of_what_is_released(
    trained: Any, examples: Any, path: str, task: str
) -> None:
    model = trained(path, task)
    with attached(model) as gradients:
        found = gradients.of(collate(examples(task), np.arange(4), pad_id=0))
    assert list(found) == list(model.trainable())
    for name, gradient in found.items():
        assert (gradient.shape, gradient.dtype) == ((4, *model.trainable()[name].shape), torch.float32)


@pytest.mark.parametrize(
    "changes", [{"lora": LoraSpec(rank=2, layers=(-1,), train_a=False)}, {"head": HeadSpec(train=False)}]
)
def test_frozen_tensors_have_no_gradient(trained: Any, examples: Any, changes: dict[str, Any]) -> None:
    model = trained(**changes)
    with attached(model) as gradients:
        found = gradients.of(collate(examples("classification"), [0, 1], pad_id=0))
    assert list(found) == list(model.trainable())


def test_a_tensor_that_takes_no_part_is_refused(trained: Any, examples: Any) -> None:
    model = trained()
    model.trainable()["head.weight"].requires_grad_(False)
    with attached(model) as gradients:
        model.head.spare = torch.nn.Linear(2, 2, bias=False)
        with pytest.raises(ConfigError, match=r"lora\.target_modules = 'head\.spare\.weight': is trainable but"):
            type(gradients)(model).of(collate(examples("classification"), [0, 1], pad_id=0))
