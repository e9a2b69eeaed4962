"""Starting behind the frozen layers changes nothing but the time it takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleHooks

from fedtune.model import LoraSpec, TaskModelSpec
from fedtune.tasks import TaskModel, build_task_model

LAST_LAYER = LoraSpec(rank=2, alpha=4.0, layers=(-1,))


def per_example(model: TaskModel, batch: Any) -> dict[str, torch.Tensor]:
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            model.losses(batch).sum().backward()
        return {name: parameter.grad_sample.clone() for name, parameter in model.trainable().items()}
    finally:
        hooks.cleanup()


def moved(model: TaskModel) -> TaskModel:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("path", ["random:bert", "random:llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_states_give_the_same_losses_and_gradients(
    path: str, checkpointing: bool, trained: Callable[..., TaskModel], examples: Callable[..., Any]
) -> None:
    model = trained(path, lora=LAST_LAYER)
    if checkpointing:
        model.enable_gradient_checkpointing()
    batch = examples("classification")
    states = model.frozen_states(batch)
    assert states is not None
    kept = replace(batch, prefix=states)
    assert torch.equal(model.losses(kept), model.losses(batch))
    for name, gradient in per_example(model, batch).items():
        torch.testing.assert_close(per_example(model, kept)[name], gradient, rtol=1e-6, atol=1e-7)
    # A batch without them runs every layer again.
    other = replace(batch, input_ids=batch.input_ids.flip(0), attention_mask=batch.attention_mask.flip(0))
    assert not torch.equal(model.losses(other), model.losses(batch))


def test_skipped_layers_really_do_not_run(trained: Callable[..., TaskModel], examples: Callable[..., Any]) -> None:
    model = trained("random:bert", lora=LAST_LAYER)
    batch = examples("classification")
    states = model.frozen_states(batch)
    assert states is not None
    changed = model.losses(replace(batch, prefix=states.flip(0)))
    assert not torch.allclose(changed, model.losses(batch))


def test_no_adapter_moves_the_states(spec: Callable[..., TaskModelSpec], examples: Callable[..., Any]) -> None:
    model = build_task_model(spec("random:bert", lora=LAST_LAYER))
    batch = examples("classification")
    before = model.frozen_states(batch)
    after = moved(model).frozen_states(batch)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_nothing_to_keep_when_the_first_layer_trains(
    spec: Callable[..., TaskModelSpec], examples: Callable[..., Any]
) -> None:
    model = build_task_model(spec("random:bert", lora=LoraSpec(rank=2, alpha=4.0)))
    assert model.frozen_states(examples("classification")) is None
