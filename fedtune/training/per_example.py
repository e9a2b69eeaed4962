"""Per-example gradients of a batch from Opacus's grad samplers. `dp_step.py` clips and sums these gradients.

Opacus's own hooks are not used, because they also compute the gradient of the whole batch, and copy every example's
gradient into a tensor of zeros. With LoRA on all linear modules of MiniLM that took a fifth of a step
(simulations/benchmarks).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial, reduce
from typing import Any

import torch
from torch import nn

from fedtune.data.batching import Batch, compute_each_alone
from fedtune.model.frozen_linear import switch_to_onednn, uses_onednn
from fedtune.model.ia3_and_dora import Scales
from fedtune.model.ranks import cut_to_rank
from fedtune.privacy.dp_library import RARELY_USED, defer_imports
from fedtune.spec import ConfigError, translate_panics
from fedtune.tasks.task_model import TaskModel
from fedtune.training.dp_step import sum_by_halves

with defer_imports(RARELY_USED):  # imported by Opacus's accountants, which are not used here
    from opacus.grad_sample import GradSampleHooks, register_grad_sampler

log = logging.getLogger(__name__)

Found = dict[nn.Parameter, torch.Tensor]  # parameter -> (rows, *shape): per-example gradients of a backward pass


class PerExampleGradients:
    """Per-example gradients of a model inside a `record_gradients` block.

    Attributes:
        found: the gradients of the current backward pass; empty between two passes.
    """

    def __init__(self, model: TaskModel) -> None:
        self._model = model
        self._parameters = model.list_active_parameters()
        self.found: Found = {}

    def compute_gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute the gradient of each example's own loss: name -> (rows, *parameter shape), float32.

        Within a site's rank, a gradient has only the rows and columns that train.

        Empty rows are zero. Losses are summed over the batch, never averaged: a mean would let one example rescale
        another.

        An example that makes the pass fail counts as zero, and changes no other example's gradient, because a site's
        reply must not depend on whether some record can be computed. A failure of the machine, as opposed to an
        example, is raised.

        Raises:
            ConfigError: the forward pass does not use a trainable tensor.
        """
        try:
            with translate_panics():
                return self.compute_all_gradients(batch)
        except ConfigError:
            raise
        except Exception:
            log.exception("a micro-batch failed; retrying its examples one at a time")
        nothing, results = compute_each_alone(self.compute_all_gradients, batch)
        gradients = {name: zeros.clone() for name, zeros in nothing.items()}
        for row in range(len(batch)):
            result = next(results)
            if result is not None:
                for name, of_rows in gradients.items():
                    of_rows[row] = result[name][0]
            del result  # free the memory before the next example is computed; enumerate would keep a reference
        return gradients

    def compute_all_gradients(self, batch: Batch, present: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Compute the gradients as `compute_gradients` does, but raise if an example makes the pass fail.

        Args:
            batch: the examples.
            present: (examples,) bool, False for empty rows, in a batch that counts no row as empty; None: all rows
                that the batch counts.

        Raises:
            ConfigError: the forward pass does not use a trainable tensor.
        """
        try:
            losses = self._model.losses(batch)
            if present is not None:
                losses = torch.where(present, losses, 0.0)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            return _zero_rows_without_states(batch, self._compute_gradients_by_name(batch))
        finally:
            self.found.clear()  # also after a pass that failed half-way

    def _compute_gradients_by_name(self, batch: Batch) -> dict[str, torch.Tensor]:
        gradients = {}
        for name, parameter in self._parameters.items():
            gradient = self.found.get(parameter)
            if gradient is None:
                raise ConfigError("lora.target_modules", name, "is trainable, but the forward pass does not use it")
            of_rows = gradient[: len(batch.input_ids)]  # a head may have worked on more rows
            # One after the other: the order in torch's own sum could depend on the number of examples.
            gradients[name] = reduce(torch.add, (of_rows[text :: batch.texts] for text in range(batch.texts)))
        return cut_to_rank(gradients, self._model.rank, axis=1)


@register_grad_sampler(Scales)  # type: ignore[untyped-decorator]
def _scales_grad_sampler(
    layer: Scales, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Compute the per-example gradient of the offset in x * (1 + offset).

    The gradient is the sum over tokens of x times the output gradient.

    x has the shape (n, t, k).
    """
    return {layer.offset: sum_by_halves(backprops * activations[0])}


def _zero_rows_without_states(batch: Batch, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zero the gradient of every example whose cached frozen states are missing for any of its texts.

    Such an example then counts as zero, as it does without cached states. The result depends on the example's own
    states only, and no other gradient changes.
    """
    if batch.prefix is None:
        return gradients
    known = batch.prefix.flatten(1).any(dim=1).view(-1, batch.texts).all(dim=1)
    if known.device.type == "cpu" and known[: len(batch)].all():  # an accelerator would make the process wait
        return gradients
    return {name: torch.where(known.view(-1, *[1] * (grad.dim() - 1)), grad, 0.0) for name, grad in gradients.items()}


@contextmanager
def record_gradients(model: TaskModel) -> Iterator[PerExampleGradients]:
    """Record per-example gradients of every trainable module of `model` until the end of the block.

    Modules that are frozen in this round use the same kernels as trained modules, the kernels that the batch-invariance
    test covered.
    """
    gradients = PerExampleGradients(model)
    trained = {id(parameter) for parameter in model.trainable().values()}
    watched = [module for module in model.modules() if any(id(one) in trained for one in module._parameters.values())]
    for module in watched:
        assert type(module) in GradSampleHooks.GRAD_SAMPLERS, f"{type(module).__name__} has no per-example gradient"
        assert "forward" not in vars(module), "gradients of this model are already being recorded"
    constant = nn.ModuleList(map(_copy_as_constants, watched))
    if uses_onednn(model):
        switch_to_onednn(constant)
    try:
        for module, same in zip(watched, constant, strict=True):
            module.forward = partial(_run_watched_forward, module, same, gradients.found)
        yield gradients
    finally:
        for module in watched:
            vars(module).pop("forward", None)
        gradients.found.clear()


def _copy_as_constants(module: nn.Module) -> nn.Module:
    """Copy the module with detached parameters.

    With attached parameters, every backward pass would also compute the gradient of the whole batch, which is never
    used.
    """
    same = copy(module)
    vars(same)["_parameters"] = _detach_parameters(module)
    return same


def _detach_parameters(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: value if value is None else value.detach() for name, value in module._parameters.items()}


def _run_watched_forward(module: nn.Module, constant: nn.Module, found: Found, values: torch.Tensor) -> torch.Tensor:
    """Return the output (n, ..., k) for `values` (n, ..., j), whose backward pass records per-example gradients."""
    vars(constant)["_parameters"] = _detach_parameters(module)  # the current values, for example after a step
    output: torch.Tensor = constant.forward(values)
    trained = next(module.parameters())
    if not (torch.is_grad_enabled() and trained.requires_grad):
        return output
    return _Watch.apply(output, trained, values.detach(), module, found)  # type: ignore[no-any-return, no-untyped-call]


class _Watch(torch.autograd.Function):
    """Identity function whose backward pass adds the module's per-example gradients to `found`."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, trained: torch.Tensor, values: torch.Tensor, module: nn.Module, found: Found
    ) -> torch.Tensor:
        # `trained` is an input so that backward runs even if the values come from frozen layers and need no gradient.
        ctx.save_for_backward(values)
        ctx.module, ctx.found = module, found
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        of_layer = GradSampleHooks.GRAD_SAMPLERS[type(ctx.module)]
        for parameter, gradient in of_layer(ctx.module, [values], gradients[0]).items():
            known = ctx.found.get(parameter)
            ctx.found[parameter] = gradient if known is None else known + gradient
        return (gradients[0] if ctx.needs_input_grad[0] else None), None, None, None, None
